"""What the noise kernels in Pallas share: samples, and the elements that a program works on.

Kernels know the parts of a leaf that are here as ``runs`` (_runs.py). A program works on THREADS
elements at a time, one for each of its threads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jax_privacy_kernels.kernels._runs import HIGH, LOW, PHASE, PLACE
from jax_privacy_kernels.kernels._threefry import threefry2x32

__all__ = [
    "THREADS",
    "WARPS",
    "Elements",
    "Place",
    "blocks",
    "emit",
    "loop",
    "phase",
    "place",
    "programs",
    "sample",
    "weighted_samples",
]

WARPS = 8
THREADS = 32 * WARPS


class Place(NamedTuple):
    """The elements of a tile that are here; they follow each other, here and in the leaf.

    Attributes:
      phase: the phase of the tile.
      here: where the first element is here.
      in_leaf: and in the leaf, the high and the low word.
      left: the number of elements from it on, also in other tiles.
      unit: a number that divides ``left``.
    """

    phase: jax.Array
    here: jax.Array
    in_leaf: tuple[Any, jax.Array]
    left: jax.Array
    unit: int


def programs(size: int, count: int, tile: int, whole: bool) -> int:
    """How many programs take a tile each, of all ``count`` runs of ``size`` elements in all."""
    # The first tile of a run may begin before it.
    return count * pl.cdiv(size // count + (0 if whole else tile - 1), tile)


def place(slots: int, tile: int, whole: bool, runs: Any, size: int) -> Place:
    """What this program has of its tile, if anything."""
    return (_in_leaf if whole else _in_run)(slots, tile, runs, size)


def _in_leaf(slots: int, size_of_tile: int, runs: Any, size: int) -> Place:
    """The tile of this program, of a leaf that is here as a whole."""
    tile = pl.program_id(0)
    first = tile * size_of_tile
    of_tile = phase(slots, runs[0, PHASE], tile)
    return Place(of_tile, first, (np.uint32(0), first.astype(jnp.uint32)), size - first, size)


def _in_run(slots: int, size_of_tile: int, runs: Any, size: int) -> Place:
    """What the run of this program has of its tile, if anything."""
    length = size // runs.shape[0]
    tiles = pl.cdiv(length + size_of_tile - 1, size_of_tile)
    run, tile = pl.program_id(0) // tiles, pl.program_id(0) % tiles
    high, low, first_phase, before = (runs[run, i] for i in (HIGH, LOW, PHASE, PLACE))
    start = tile * size_of_tile - (low % size_of_tile).astype(jnp.int32)  # of the tile, in the run
    offset = jnp.maximum(start, 0)
    index_low = low + offset.astype(jnp.uint32)
    index_high = high + (index_low < low).astype(jnp.uint32)
    of_tile = phase(slots, first_phase, tile + before.astype(jnp.int32))
    left = jnp.minimum(length - offset, start - offset + size_of_tile)
    return Place(of_tile, run * length + offset, (index_high, index_low), left, 1)


def phase(slots: int, first_phase: jax.Array, tile: jax.Array) -> jax.Array:
    """The phase of a tile, counted from the first of S that have all phases."""
    slots = max(slots, 1)
    return (tile + tile // slots + first_phase.astype(jnp.int32)) % slots


@dataclasses.dataclass(frozen=True)
class Elements:
    """Elements ``offset`` .. ``offset + count - 1`` of a tile, as far as there are any."""

    place: Place
    offset: Any
    count: int

    @property
    def index(self) -> tuple[Any, jax.Array]:
        """In the leaf, the high and the low word: a tile has one high word."""
        hi, lo = self.place.in_leaf
        lane = jnp.arange(self.count, dtype=jnp.int32)
        return hi, lo + (self.offset + lane).astype(jnp.uint32)

    def mask(self) -> jax.Array | None:
        if self.place.unit % self.count == 0:
            return None
        return jnp.arange(self.count, dtype=jnp.int32) < self.place.left - self.offset

    def load(self, array: Any, *row: Any) -> jax.Array:
        part, mask = self._part(array, *row), self.mask()
        return plgpu.load(part, mask=mask, other=None if mask is None else 0)

    def store(self, values: jax.Array, array: Any, *row: Any) -> None:
        plgpu.store(self._part(array, *row), values, mask=self.mask())

    def _part(self, array: Any, *row: Any) -> Any:
        return array.at[(*row, pl.ds(self.place.here + self.offset, self.count))]


def blocks(place: Place, tile: int) -> Any:
    """How many times THREADS elements there are in the tile, the last time perhaps fewer."""
    most: Any = pl.cdiv(tile, THREADS)
    if place.unit % tile:
        return jnp.minimum(most, (place.left + THREADS - 1) // THREADS)
    return most


def emit(at: Elements, scale: jax.Array, x: jax.Array, grad: Any, out: Any) -> None:
    """out = grad + scale x."""
    at.store((at.load(grad) + scale * x).astype(out.dtype), out)


def sample(keys: Any, key: int | jax.Array, at: Elements, noise_dtype: Any) -> jax.Array:
    """The elements of ``jax.random.normal(keys[key], ..)``."""
    high, low = at.index
    x0, x1 = threefry2x32(keys[key, 0], keys[key, 1], high, low)
    return _normal(x0, x1, noise_dtype)


def _normal(x0: jax.Array, x1: jax.Array, dtype: Any) -> jax.Array:
    """What jax.random.normal makes of the two words of a counter."""
    if dtype == jnp.float32:
        bits = ((x0 ^ x1) >> 9) | np.uint32(0x3F800000)
    else:
        bits = (x0.astype(jnp.uint64) << 32) | x1.astype(jnp.uint64)
        bits = (bits >> 12) | np.uint64(0x3FF0000000000000)
    one, lowest = np.ones((), dtype), np.nextafter(np.array(-1, dtype), np.zeros((), dtype))
    unit = jax.lax.bitcast_convert_type(bits, dtype) - one
    uniform = jnp.maximum(lowest, unit * (one - lowest) + lowest)
    return jax.lax.erf_inv(uniform) * np.array(np.sqrt(2), dtype)


def loop(start: Any, stop: Any, body: Callable[..., Any], *carry: jax.Array) -> Any:
    """``carry = body(i, *carry)`` for i from start to stop, a tuple of arrays."""
    return jax.lax.fori_loop(start, stop, lambda i, carry: tuple(body(i, *carry)), carry)


def weighted_samples(weights: Any, draw: Callable[[Any], jax.Array]) -> jax.Array:
    """sum_j weights[j] draw(j). Samples without weight are not made."""

    def add(key: Any, x: jax.Array) -> list[jax.Array]:
        weight = weights[key]
        return [jax.lax.cond(weight != 0, lambda: x + weight * draw(key), lambda: x)]

    return loop(0, weights.shape[0], add, jnp.zeros(THREADS, weights.dtype))[0]
