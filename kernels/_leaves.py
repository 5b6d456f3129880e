"""The columns of ``leaves``, ``[LEAVES, COLUMNS]`` int32: what one launch knows of several leaves.

A row stands for a leaf; rows without one begin behind all programs.

* BEGIN: the number of its first program.
* FIRST_KEY: where its keys begin.
* UNITS: its size, in units that all of the leaves are multiples of.
* FIRST_PHASE: the phase of its first tile.
* PROGRAMS, MAGIC, SHIFT: group, magic and shift of `recurrence` (correlated_noise_triton.py).
"""

__all__ = [
    "BEGIN",
    "COLUMNS",
    "FIRST_KEY",
    "FIRST_PHASE",
    "LEAVES",
    "MAGIC",
    "PROGRAMS",
    "SHIFT",
    "UNITS",
]

LEAVES = 8
BEGIN, FIRST_KEY, UNITS, FIRST_PHASE, PROGRAMS, MAGIC, SHIFT = range(7)
COLUMNS = 7
