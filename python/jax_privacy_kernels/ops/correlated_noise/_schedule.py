"""The look-ahead schedule of correlated noise, which is the meaning of its state.

A strategy of b bands needs S = b - 1 terms of history. Each leaf keeps them in a ring of S slots,
x_tau in slot tau mod S. Computing x_t needs every slot; but once they are loaded, x_t .. x_{t+S-1}
can be computed too, each into the slot whose term it no longer needs, and the next S steps read
one slot each. The visits are spread over the steps:

* A leaf is cut, in row-major order, into tiles of ``TILE`` elements (the last may be shorter).
  Tiles are those of the whole leaf, also where it is spread over devices; a device may have parts
  of them. Tile q has phase ``(q + floor(q / S) + first_tile) mod S``, where first_tile counts the
  tiles of the leaves before it: every S tiles have all phases, and where rows are split over
  devices, each device has tiles of all phases, even if a row has S tiles.
* At step t the tiles with phase ``t mod S`` are *refreshed*: their slots get x_t .. x_{t+S-1}.
* At the first S - 1 steps, tiles with phase > t *warm up*: slot t gets x_t. Slots not yet written
  are 0.
* Then x_t stands in slot ``t mod S`` of every tile.

Other noising matrices follow the same schedule, for as many slots as one likes: a moving average
makes its terms from samples alone, and makes samples of past steps again from their keys; the
buffers of a BLT stand in rows of the ring before the slots, as they are before the first step that
the tile has not made yet. Without slots, all tiles make x_t at step t and keep no term of it.

A key whose bits are not a function of the element's index alone (any but chacha20, and threefry2x32
with ``jax_threefry_partitionable``) cannot be sampled tile by tile. Its schedule is the plain one:
at every step all tiles compute x_t, recurrences into slot ``t mod S``, the others without slots.

The schedule is stated here and computed in every implementation. These are all of the places; a
test checks each against the golden table in tests/support/golden_schedule.csv:

* ``phase``, ``terms`` and ``slot`` below, which bench/ uses, too;
* ``Here.phase`` in ops/_jax_noise.py, ``_refresh`` and ``_warm_up`` in _jax.py; ``_Step.turn``,
  ``_advance`` and ``_rests`` in _jax_bundle.py;
* ``Visits::take`` in csrc/visits.h;
* ``phase`` in kernels/_noise_pallas.py and ``_tile`` in kernels/correlated_noise_pallas.py;
* ``_phase`` and ``recurrence`` in kernels/correlated_noise_triton.py;
* ``runs`` in ops/_gpu_noise.py, which tells kernels for GPUs where in the schedule a run begins.
"""

from __future__ import annotations

from typing import Any

__all__ = ["phase", "slot", "terms"]


def phase(tile: Any, slots: int, first_tile: int) -> Any:
    """The phase of a tile, of any integer type: at which steps, mod S, its turn comes."""
    slots = max(slots, 1)
    return (tile + tile // slots + first_tile) % slots


def terms(phase: Any, slots: int, step: Any) -> Any:
    """How many terms a tile of that phase makes at a step: S, 1 or 0. Without slots always 1."""
    if slots == 0:
        return 1
    return slots if step % slots == phase else 1 if step < phase else 0


def slot(slots: int, step: Any) -> Any:
    """The slot of x_t, if there are any."""
    return step % slots if slots else 0
