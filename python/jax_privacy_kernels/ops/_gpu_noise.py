"""What the implementations of correlated noise for GPUs share: shards and coefficients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jax_privacy_kernels.ops import _shards
from jax_privacy_kernels.ops._shards import Shard
from jax_privacy_kernels.ops.correlated_noise._matrices import Layout
from jax_privacy_kernels.ops.correlated_noise._schedule import Leaf, tile_of

__all__ = ["factors", "refuse", "runs"]

SHORTEST = 256  # elements of a run, if there are several: a program works on one at a time


def refuse(leaf: Leaf, layout: Layout) -> str | None:
    """Why no kernel takes what is here of the leaf, or None."""
    if not layout.ahead:
        return "it samples threefry2x32 keys with jax_threefry_partitionable only"
    if leaf.shard.axes and leaf.shard.run < SHORTEST:
        return (
            f"a shard in runs of {leaf.shard.run} elements, but it takes no shorter ones than "
            f"{SHORTEST}"
        )
    return None


def runs(leaf: Leaf, first: jax.Array, slots: int) -> jax.Array:
    """The runs of what is here of a leaf, ``[runs, 4]`` uint32.

    Of each the index in the leaf of its first element, the high and the low word; and of the tile
    that this is in, which is one of S that have all phases, the phase of the first of those S, and
    its place among them.

    Args:
      leaf: static.
      first: the index in the leaf of the first element that is here, the high and the low word.
      slots: static, S.
    """
    slots = max(slots, 1)
    return _runs(leaf.shard.axes, slots, first, jnp.uint32(leaf.first_tile % slots))


# Jitted, so that it is traced once for all whole leaves.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _runs(
    axes: tuple[tuple[int, int], ...], slots: int, first: jax.Array, first_phase: jax.Array
) -> jax.Array:
    hi, lo = _shards.indices(Shard(1, axes), (first[0], first[1]))
    tile = tile_of((hi, lo))
    phase, place = (tile // slots % slots + first_phase) % slots, tile % slots
    return jnp.stack([hi, lo, phase, place], axis=1)


def factors(layout: Layout, step: jax.Array, coef: jax.Array) -> jax.Array:
    """The coefficients as kernels take them.

    Recurrences: ``[rows, slots + 1]``, the factors of z_t, x_{t-1} .. in x_t. Sums of samples: one
    for each of them, in the order of time. Buffers: as they are.
    """
    if layout.filter == "recurrence":
        return jnp.concatenate([jnp.ones_like(coef[:, :1]), -coef[:, 1:]], axis=1) / coef[:, :1]
    if layout.filter == "moving_average":
        # Nothing came before step 0; with slots, the kernel sees to that.
        happened = step - layout.behind + jnp.arange(layout.behind + 1) >= 0
        return coef[0] if layout.slots else jnp.where(happened, coef[0], 0)
    return coef[0] if layout.filter == "row" else coef
