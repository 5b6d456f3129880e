"""A weighted sum of samples, added to one leaf, in Pallas."""

from __future__ import annotations

from typing import Any

import jax

from jax_privacy_kernels.kernels import _pallas
from jax_privacy_kernels.kernels._noise_pallas import (
    THREADS,
    WARPS,
    Elements,
    blocks,
    place,
    programs,
    sample,
    weighted_samples,
)

__all__ = ["dense_noise"]


def dense_noise(
    tile: int,
    noise_dtype: Any,
    whole: bool,
    runs: jax.Array,
    keys: jax.Array,
    weights: jax.Array,
    grad: jax.Array,
) -> jax.Array:
    """grad + sum_j w_j z_j, by a program for every tile.

    Args:
      tile: how many elements a program takes, static.
      noise_dtype: float32 or float64, the dtype that is sampled, static.
      whole: whether all of the leaf is here, static.
      runs: see _runs.py.
      keys: ``[samples, 2]`` uint32, those of the leaf.
      weights: ``[samples]`` w, float32 or float64.
      grad: ``[size]``, size >= 1, of any floating dtype.
    """

    def dense_noise(runs: Any, keys: Any, weights: Any, grad: Any, out: Any) -> None:
        at_tile = place(0, tile, whole, runs, grad.shape[0])

        def block(i: jax.Array, _: None) -> None:
            at = Elements(at_tile, i * THREADS, THREADS)

            def draw(j: Any) -> jax.Array:
                return sample(keys, j, at, noise_dtype).astype(weights.dtype)

            x = weighted_samples(weights, draw)
            at.store((at.load(grad) + x).astype(out.dtype), out)

        jax.lax.fori_loop(0, blocks(at_tile, tile), block, None)

    outs = [jax.ShapeDtypeStruct(grad.shape, grad.dtype)]
    grid = (programs(grad.size, runs.shape[0], tile, whole),)
    arrays = [runs, keys, weights, grad]
    (out,) = _pallas.call(dense_noise, outs, grid, *arrays, warps=WARPS)
    return out
