"""Solutions of lower-triangular Toeplitz systems, in Pallas."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jax_privacy_kernels.kernels import _pallas

__all__ = ["toeplitz_solve"]

WARPS = 1  # in which a number goes from one thread to all soonest
BLOCK = 128  # rows solved for before the next ones are looked at
ROWS = 8  # of the solution, read together


def toeplitz_solve(coef: jax.Array, vectors: jax.Array) -> jax.Array:
    """x with T x = u for every u, by forward substitution; ``T[i, j] = coef[i - j]``. O(n m).

    A program solves for one vector. Column by column, what is known of x is taken to a block's
    right-hand side: first what lies before the block, then the block's own.

    Args:
      coef: ``[matrices, m]``, 1 <= m <= n.
      vectors: ``[vectors, n]``, as many for every matrix.
    """
    (matrices, m), (count, n) = coef.shape, vectors.shape
    each, blocks = count // matrices, -(-n // BLOCK)
    past = -(-(m - 1) // ROWS) * ROWS  # rows before a block that go into it
    # factors[BLOCK + l] is that of x_{i-l} in x_i, and there are none but for l = 1 .. m - 1.
    factors = jnp.pad(-coef[:, 1:] / coef[:, :1], ((0, 0), (BLOCK + 1, past + BLOCK)))
    scaled = jnp.repeat(coef[:, 0], each)[:, None]
    vectors = jnp.pad(vectors / scaled, ((0, 0), (past, blocks * BLOCK - n)))

    def toeplitz_solve(factors: Any, _: Any, x: Any) -> None:
        vector = pl.program_id(0)
        matrix = jax.lax.div(vector, np.int32(each))
        row = jnp.arange(BLOCK, dtype=jnp.int32)

        def column(distance: jax.Array) -> jax.Array:
            """The factors of the x so many rows above the block."""
            return factors[matrix, pl.ds(BLOCK + distance, BLOCK)]

        def solve(block: jax.Array, _: None) -> None:
            first = past + block * BLOCK  # among the padded

            def above(group: jax.Array, total: jax.Array) -> jax.Array:
                distances = [past - group * ROWS - i for i in range(ROWS)]
                return total + sum(column(d) * x[vector, first - d] for d in distances)

            def own(i: jax.Array, total: jax.Array) -> jax.Array:
                solved = jnp.sum(jnp.where(row == i, total, 0))
                return total + column(-i) * solved

            total = x[vector, pl.ds(first, BLOCK)]
            total = jax.lax.fori_loop(0, past // ROWS, above, total)
            x[vector, pl.ds(first, BLOCK)] = jax.lax.fori_loop(0, BLOCK, own, total)
            plgpu.debug_barrier()  # The block's threads read all of it next.

        jax.lax.fori_loop(0, blocks, solve, None)

    out = jax.ShapeDtypeStruct(vectors.shape, vectors.dtype)
    (x,) = _pallas.call(
        toeplitz_solve, [out], (count,), factors, vectors, warps=WARPS, aliases={1: 0}
    )
    return x[:, past : past + n]
