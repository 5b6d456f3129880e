"""A weighted sum of samples, added to one leaf, in Pallas."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels.kernels import _pallas
from jax_privacy_kernels.kernels._noise_pallas import (
    Elements,
    place,
    programs,
    weighted_samples,
)
from jax_privacy_kernels.kernels._streams_pallas import samples, width

__all__ = ["dense_noise"]


def dense_noise(
    stream: str,
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
      stream: the type of the keys, static.
      tile: how many elements a program takes, static.
      noise_dtype: float32 or float64, the dtype that is sampled, static.
      whole: whether all of the leaf is here, static.
      runs: see _runs.py.
      keys: ``[samples, words]`` uint32, those of the leaf.
      weights: ``[samples]`` w, float32 or float64.
      grad: ``[size]``, size >= 1, of any floating dtype.
    """

    def dense_noise(runs: Any, keys: Any, weights: Any, grad: Any, out: Any) -> None:
        at = Elements(place(0, tile, whole, runs, grad.shape[0]), np.int32(0), tile)

        def draw(j: Any) -> jax.Array:
            (z,) = samples(stream, keys, j, 1, at.index, tile, noise_dtype)
            return z.astype(weights.dtype)

        x = weighted_samples(weights, jnp.zeros(tile, weights.dtype), draw)
        at.store((at.load(grad) + x).astype(out.dtype), out)

    outs = [jax.ShapeDtypeStruct(grad.shape, grad.dtype)]
    grid = (programs(grad.size, runs.shape[0], tile, whole),)
    arrays = [runs, keys, weights, grad]
    warps = width(stream, 1, noise_dtype, tile).warps
    (out,) = _pallas.call(dense_noise, outs, grid, *arrays, warps=warps)
    return out
