"""Products of lower-triangular Toeplitz matrices with vectors, in Pallas."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from jax_privacy_kernels.kernels import _pallas

__all__ = ["toeplitz_multiply"]

WARPS = 4
BLOCK = 32 * WARPS  # rows of a program
LAGS = 8  # products that are added up before they meet the running sum: fewer roundings of its size


def toeplitz_multiply(coef: jax.Array, vectors: jax.Array, first: int) -> jax.Array:
    """Rows from ``first`` on of T x, for every x; ``T[i, j] = coef[i - j]``. O(n m).

    Args:
      coef: ``[matrices, m]``, 1 <= m <= n.
      vectors: ``[vectors, n]``, as many for every matrix.
      first: below n.
    """
    (matrices, m), (count, n) = coef.shape, vectors.shape
    each, rows = count // matrices, n - first
    # A block reads beyond the first entry, by less than this.
    before = BLOCK + LAGS
    coef = jnp.pad(coef, ((0, 0), (0, -m % LAGS)))
    vectors = jnp.pad(vectors, ((0, 0), (before, -rows % BLOCK)))

    def toeplitz_multiply(coef: Any, x: Any, out: Any) -> None:
        vector, block = pl.program_id(0), pl.program_id(1)
        matrix, row = jax.lax.div(vector, np.int32(each)), first + block * BLOCK
        groups = (jnp.minimum(m, row + BLOCK) + LAGS - 1) // LAGS

        def add(group: jax.Array, total: jax.Array) -> jax.Array:
            lags = [group * LAGS + i for i in range(LAGS)]
            products = (
                coef[matrix, lag] * x[vector, pl.ds(before + row - lag, BLOCK)] for lag in lags
            )
            return total + sum(products)

        zero = jnp.zeros(BLOCK, out.dtype)
        out[vector, pl.ds(block * BLOCK, BLOCK)] = jax.lax.fori_loop(0, groups, add, zero)

    out = jax.ShapeDtypeStruct((count, rows + -rows % BLOCK), vectors.dtype)
    grid = (count, out.shape[1] // BLOCK)
    (products,) = _pallas.call(toeplitz_multiply, [out], grid, coef, vectors, warps=WARPS)
    return products[:, :rows]
