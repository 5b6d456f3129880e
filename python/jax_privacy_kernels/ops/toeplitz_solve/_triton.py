"""Toeplitz systems in Triton (kernels/toeplitz_solve_triton.py)."""

from __future__ import annotations

import math

import jax

from jax_privacy_kernels.ops import _coefficients, _jax_triton

__all__ = ["run"]

# Rows that a program solves for together, and lags that it adds up beside each other.
ROWS = 32
LAGS = 64


@_coefficients.in_float64
def run(coef: jax.Array, rhs: jax.Array, *, transpose: bool) -> jax.Array:
    """The solution."""
    *batch, n, columns = rhs.shape
    if rhs.size == 0:
        return rhs
    from jax_privacy_kernels.kernels.toeplitz_solve_triton import solve

    (x,) = _jax_triton.call(
        solve,
        [coef, rhs],
        [coef.shape[-1], n, columns],
        [jax.ShapeDtypeStruct(rhs.shape, rhs.dtype)],
        programs=math.prod(batch) * columns,
        TRANSPOSE=transpose,
        ROWS=ROWS,
        LAGS=LAGS,
    )
    return x
