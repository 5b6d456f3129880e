"""What the noise ops for GPUs share: which shards they take, and how kernels see them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jax_privacy_kernels.kernels import _runs
from jax_privacy_kernels.ops import _shards
from jax_privacy_kernels.ops._leaves import TILE, Leaf, tile_of
from jax_privacy_kernels.ops._shards import Shard

__all__ = ["refuse_pallas", "refuse_triton", "runs", "tiles_of_run", "warps"]

SHORTEST = 256  # elements of a run, if there are several: a program works on one at a time


def _refuse(leaf: Leaf, ahead: bool) -> str | None:
    """Why no kernel takes what is here of the leaf, or None."""
    if not ahead:
        return (
            "it looks ahead, which takes chacha20 keys, or threefry2x32 keys with "
            "jax_threefry_partitionable, and a stddev that is not traced"
        )
    if leaf.shard.axes and leaf.shard.run < SHORTEST:
        return (
            f"a shard in runs of {leaf.shard.run} elements, but it takes no shorter ones than "
            f"{SHORTEST}"
        )
    return None


def refuse_triton(leaf: Leaf, ahead: bool, stream: str) -> str | None:
    """Why no kernel in Triton takes what is here of the leaf, or None."""
    del stream  # with those that look ahead, it samples by keys of all types
    if reason := _refuse(leaf, ahead):
        return reason
    if leaf.noise_dtype != jnp.float32:
        return f"it samples float32, not {leaf.noise_dtype}"
    return None


def refuse_pallas(leaf: Leaf, ahead: bool, stream: str) -> str | None:
    """Why no kernel in Pallas takes what is here of the leaf, or None."""
    del stream  # as in Triton
    if reason := _refuse(leaf, ahead):
        return reason
    if leaf.noise_dtype not in (jnp.float32, jnp.float64):
        return f"it samples float32 and float64, not {leaf.noise_dtype}"
    if leaf.shard.size > 2**31 - TILE:
        return f"{leaf.shard.size} elements, but its indices are 32 bits wide"
    return None


def warps(bits: int, stream: str) -> int:
    """The warps of a program in Triton that draws so many bits of 32 at once.

    With chacha20 keys, each of the 32 threads of a warp computes a block, which has 16 of them:
    see kernels/_streams_triton.py.
    """
    return bits // (16 * 32) if stream == "chacha20" else 4


def runs(leaf: Leaf, first: jax.Array, slots: int) -> jax.Array:
    """The runs of what is here of a leaf, as kernels take them (kernels/_runs.py).

    Args:
      leaf: static.
      first: the index in the leaf of the first element that is here, the high and the low word.
      slots: static, S.
    """
    slots = max(slots, 1)
    return _of_axes(leaf.shard.axes, slots, first, jnp.uint32(leaf.first_tile % slots))


def tiles_of_run(leaf: Leaf) -> int:
    """How many tiles a run can have elements of; the first may begin before it."""
    return -(-(leaf.shard.run + (0 if leaf.whole else TILE - 1)) // TILE)


# Jitted, so that it is traced once for all whole leaves.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _of_axes(
    axes: tuple[tuple[int, int], ...], slots: int, first: jax.Array, first_phase: jax.Array
) -> jax.Array:
    high, low = _shards.indices(Shard(1, axes), (first[0], first[1]))
    tile = tile_of((high, low))
    columns = {
        _runs.HIGH: high,
        _runs.LOW: low,
        _runs.PHASE: (tile // slots % slots + first_phase) % slots,
        _runs.PLACE: tile % slots,
    }
    return jnp.stack([columns[i] for i in range(_runs.COLUMNS)], axis=1)
