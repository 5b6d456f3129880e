"""The geometry of shards: which elements of a leaf are here.

The noise of an element is a function of its index in the leaf, so that every device makes the noise
of its own shards, and no device needs to hear of another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Shard", "Words", "first", "indices", "plus", "shard"]

Words = tuple[jax.Array, jax.Array]  # the high and the low 32 bits of numbers, uint32


class Shard(NamedTuple):
    """Some elements of a leaf, but for the first of them. Static.

    They are runs of elements that follow each other in the leaf, one for each place on the axes.

    Attributes:
      run: the elements of a run.
      axes: the outermost first, how many places, and how many elements of the leaf from each to
        the next.
    """

    run: int
    axes: tuple[tuple[int, int], ...] = ()

    @property
    def size(self) -> int:
        return self.run * math.prod(count for count, _ in self.axes)


def shard(shape: Sequence[int], local: Sequence[int]) -> Shard:
    """The shard that a block of shape ``local`` is of a leaf of ``shape``, both in row-major order.

    Blocks may reach beyond the leaf, as the last one does where blocks do not divide it.
    """
    axes: list[tuple[int, int]] = []
    run = stride = 1
    whole = True  # so far, from the innermost dimension on
    for size, count in zip(reversed(shape), reversed(local), strict=True):
        if whole:
            run *= count
        elif axes and axes[-1][0] * axes[-1][1] == stride:
            axes[-1] = (axes[-1][0] * count, axes[-1][1])
        elif count > 1:
            axes.append((count, stride))
        whole = whole and count == size
        stride *= size
    return Shard(run, tuple(reversed(axes)))


def first(shape: Sequence[int], local: Sequence[int], place: Sequence[Any]) -> Words:
    """The index in the leaf of the first element of a block, at that place among the blocks."""
    # Of NumPy, so that the places of thousands of whole leaves are one constant.
    total: Any = (np.uint32(0), np.uint32(0))
    stride = 1
    for size, count, at in zip(reversed(shape), reversed(local), reversed(place), strict=True):
        if not isinstance(at, int) or at:
            total = plus(total, _times(jnp.asarray(at).astype(jnp.uint32), count * stride))
        stride *= size
    return total


def indices(shard: Shard, first: Words) -> Words:
    """The indices in the leaf of all elements of a shard, ``[shard.size]``."""
    shape = (*(count for count, _ in shard.axes), shard.run)
    total = first
    for dimension, stride in enumerate([*(stride for _, stride in shard.axes), 1]):
        place = jax.lax.broadcasted_iota(jnp.uint32, shape, dimension)
        total = plus(total, _times(place, stride))
    return total[0].reshape(-1), total[1].reshape(-1)


def plus(x: Words, y: Words) -> Words:
    """x + y modulo 2^64."""
    lo = x[1] + y[1]
    return x[0] + y[0] + (lo < y[1]).astype(jnp.uint32), lo


def _times(x: jax.Array, factor: int) -> Words:
    """x factor modulo 2^64, by halves of words."""
    high, low = np.uint32(factor >> 32), np.uint32(factor & 0xFFFFFFFF)
    x0, x1, y0, y1 = x & 0xFFFF, x >> 16, low & 0xFFFF, low >> 16
    middle = ((x0 * y0) >> 16) + ((x0 * y1) & 0xFFFF) + ((x1 * y0) & 0xFFFF)
    carried = x1 * y1 + ((x0 * y1) >> 16) + ((x1 * y0) >> 16) + (middle >> 16)
    return carried + x * high, x * low
