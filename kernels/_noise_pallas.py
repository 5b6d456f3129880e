"""What the noise kernels in Pallas share beside samples: the elements that a program works on.

Kernels know the parts of a leaf that are here as ``runs`` (_runs.py).
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

__all__ = [
    "Elements",
    "Place",
    "emit",
    "loop",
    "phase",
    "place",
    "programs",
    "visit",
    "weighted_samples",
]


class Place(NamedTuple):
    """The elements of a tile that are here; they follow each other, here and in the leaf.

    Attributes:
      phase: the phase of the tile.
      here: where its first element is here, or would be.
      in_leaf: and in the leaf, the high and the low word.
      begin: how many of its elements are before those that are here.
      end: how many are before those behind them; more than the tile has if they go on in the next.
      unit: a number that divides ``end``.
      whole: whether all of the leaf is here, so that ``begin`` is 0. Static.
    """

    phase: jax.Array
    here: jax.Array
    in_leaf: tuple[Any, jax.Array]
    begin: Any
    end: jax.Array
    unit: int
    whole: bool


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
    index = np.uint32(0), first.astype(jnp.uint32)
    return Place(of_tile, first, index, 0, size - first, size, whole=True)


def _in_run(slots: int, size_of_tile: int, runs: Any, size: int) -> Place:
    """What the run of this program has of its tile, if anything."""
    length = size // runs.shape[0]
    tiles = pl.cdiv(length + size_of_tile - 1, size_of_tile)
    run, tile = pl.program_id(0) // tiles, pl.program_id(0) % tiles
    high, low, first_phase, before = (runs[run, i] for i in (HIGH, LOW, PHASE, PLACE))
    cut = low % size_of_tile  # off the first tile
    start = tile * size_of_tile - cut.astype(jnp.int32)
    index_low = low - cut + (tile * size_of_tile).astype(jnp.uint32)
    index = high + (index_low < low - cut).astype(jnp.uint32), index_low
    of_tile = phase(slots, first_phase, tile + before.astype(jnp.int32))
    begin = jnp.maximum(-start, 0)
    return Place(of_tile, run * length + start, index, begin, length - start, 1, whole=False)


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
        """Of the first of them in the leaf, the high and the low word."""
        high, low = self.place.in_leaf
        return high, low + self.offset.astype(jnp.uint32)

    def load(self, array: Any, *row: Any) -> jax.Array:
        where, mask = self._where()
        part = array.at[(*row, where)]
        return plgpu.load(part, mask=mask, other=None if mask is None else 0)

    def store(self, values: jax.Array, array: Any, *row: Any) -> None:
        where, mask = self._where()
        plgpu.store(array.at[(*row, where)], values, mask=mask)

    def _where(self) -> tuple[Any, jax.Array | None]:
        """Which elements of an array these are, and which of them there are."""
        place, first = self.place, self.place.here + self.offset
        lane = jnp.arange(self.count, dtype=jnp.int32)
        if place.whole:
            mask = lane < place.end - self.offset
            return pl.ds(first, self.count), mask if place.unit % self.count else None
        mask = (lane >= place.begin - self.offset) & (lane < place.end - self.offset)
        # What is before an array has no index.
        return jnp.where(mask, first + lane, np.int32(2**31 - 1)), mask


def visit(
    place: Place, tile: int, count: int, read_count: Any, body: Callable[[Elements], None]
) -> None:
    """``body(elements)`` for all elements of a tile, ``count`` of them at a time.

    ``read_count()`` is ``count``, too, from memory, so that LLVM cannot know it. If it knows that
    indices of elements go up by a constant from one time to the next, it takes apart the sums that
    the rounds of threefry2x32 make of them, and twice as many additions come of it.
    """
    if tile == count:
        return body(Elements(place, np.int32(0), tile))
    stop: Any = pl.cdiv(tile, count)
    if place.unit % tile:
        stop = jnp.minimum(stop, (place.end + count - 1) // count)

    def block(i: jax.Array, _: None) -> None:
        body(Elements(place, i * read_count(), count))

    jax.lax.fori_loop(place.begin // count, stop, block, None)


def emit(at: Elements, scale: jax.Array, x: jax.Array, grad: Any, out: Any) -> None:
    """out = grad + scale x."""
    at.store((at.load(grad) + scale * x).astype(out.dtype), out)


def loop(start: Any, stop: Any, body: Callable[..., Any], *carry: jax.Array) -> Any:
    """``carry = body(i, *carry)`` for i from start to stop, a tuple of arrays."""
    return jax.lax.fori_loop(start, stop, lambda i, carry: tuple(body(i, *carry)), carry)


def weighted_samples(weights: Any, x: jax.Array, draw: Callable[[Any], jax.Array]) -> jax.Array:
    """x + sum_j weights[j] draw(j). Of several samples, those without weight are not made."""
    if weights.shape[0] == 1:
        return x + weights[0] * draw(0)

    def add(key: Any, x: jax.Array) -> list[jax.Array]:
        weight = weights[key]
        return [jax.lax.cond(weight != 0, lambda: x + weight * draw(key), lambda: x)]

    return loop(0, weights.shape[0], add, x)[0]
