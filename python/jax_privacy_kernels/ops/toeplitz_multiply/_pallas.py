"""Toeplitz products as a GPU kernel, in Pallas (kernels/toeplitz_multiply_pallas.py)."""

from __future__ import annotations

import jax

from jax_privacy_kernels.ops import _coefficients

__all__ = ["run"]


@_coefficients.in_float64
def run(coef: jax.Array, rhs: jax.Array, *, transpose: bool, rows: int) -> jax.Array:
    """The product."""
    from jax_privacy_kernels.kernels.toeplitz_multiply_pallas import toeplitz_multiply

    *batch, n, columns = rhs.shape
    if rhs.size == 0:
        return rhs[..., :rows, :]
    vectors = rhs.swapaxes(-1, -2).reshape(-1, n)
    if transpose:  # T between vectors that begin with their last row
        vectors = vectors[:, ::-1]
    first = n - rows if transpose else 0
    out = toeplitz_multiply(coef.reshape(-1, coef.shape[-1]), vectors, first)
    out = out[:, ::-1] if transpose else out[:, :rows]
    return out.reshape(*batch, columns, rows).swapaxes(-1, -2)
