"""The sums of strided windows that the min-sep norm is made of, in Pallas."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from jax_privacy_kernels.kernels import _pallas

__all__ = ["window_sums"]

WARPS = 4
BLOCK = 32 * WARPS  # entries of a program


def window_sums(x: jax.Array, min_sep: int, k: int) -> jax.Array:
    """Entry t of a row is ``x[t] + x[t - min_sep] + ...``, k terms.

    Every entry by itself, O(n k): no entry waits for another, and nothing is subtracted.

    Args:
      x: ``[rows, n]``, n < 2^31.
      min_sep: at least 1.
      k: at least 1.
    """
    rows, n = x.shape
    # Entries before the first, up to a block of them, are zero.
    padded = jnp.pad(x, ((0, 0), (BLOCK, -n % BLOCK)))

    def min_sep_norm(x: Any, sums: Any) -> None:
        row, block = pl.program_id(0), pl.program_id(1)
        last = (block + 1) * BLOCK  # among the padded
        terms = jnp.minimum(k, jax.lax.div(last - 1, np.int32(min_sep)) + 1)

        def add(j: jax.Array, total: jax.Array) -> jax.Array:
            return total + x[row, pl.ds(last - j * min_sep, BLOCK)]

        zero = jnp.zeros(BLOCK, sums.dtype)
        sums[row, pl.ds(block * BLOCK, BLOCK)] = jax.lax.fori_loop(0, terms, add, zero)

    out = jax.ShapeDtypeStruct((rows, padded.shape[1] - BLOCK), x.dtype)
    grid = (rows, out.shape[1] // BLOCK)
    (sums,) = _pallas.call(min_sep_norm, [out], grid, padded, warps=WARPS)
    return sums[:, :n]
