"""The columns of ``runs``, ``[n, COLUMNS]`` uint32, by which the noise kernels know where they are.

A row stands for a run: elements that are here and that follow each other in the leaf. All runs of a
call have the same length; a leaf that is here as a whole is one run.

* HIGH, LOW: the two words of the index, in the leaf, of the first element of the run.
* PHASE, PLACE: the tile of that element is one of S tiles, in a row from a multiple of S on, which
  have all phases (ops/correlated_noise/_schedule.py). PHASE is that of the first of them, PLACE the
  place of the tile among them.
"""

__all__ = ["COLUMNS", "HIGH", "LOW", "PHASE", "PLACE"]

HIGH, LOW, PHASE, PLACE = range(4)
COLUMNS = 4
