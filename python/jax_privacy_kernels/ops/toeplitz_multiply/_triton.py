"""Toeplitz products in Triton (kernels/toeplitz_multiply_triton.py)."""

from __future__ import annotations

import math

import jax

from jax_privacy_kernels.ops import _coefficients, _jax_triton

__all__ = ["run"]

# Of a program: rows, and lags that it adds up beside each other.
ROWS = 32
LAGS = 64


@_coefficients.in_float64
def run(coef: jax.Array, rhs: jax.Array, *, transpose: bool, rows: int) -> jax.Array:
    """The product."""
    *batch, n, columns = rhs.shape
    out = jax.ShapeDtypeStruct((*batch, rows, columns), rhs.dtype)
    if math.prod(out.shape) == 0:
        return jax.numpy.zeros(out.shape, out.dtype)
    from jax_privacy_kernels.kernels.toeplitz_multiply_triton import multiply

    (product,) = _jax_triton.call(
        multiply,
        [coef, rhs],
        [coef.shape[-1], n, columns, rows],
        [out],
        programs=math.prod(batch) * -(-rows // ROWS) * columns,
        TRANSPOSE=transpose,
        ROWS=ROWS,
        LAGS=LAGS,
    )
    return product
