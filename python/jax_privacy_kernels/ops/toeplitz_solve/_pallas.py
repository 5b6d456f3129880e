"""Toeplitz systems as a GPU kernel, in Pallas (kernels/toeplitz_solve_pallas.py)."""

from __future__ import annotations

import jax

from jax_privacy_kernels.ops import _coefficients

__all__ = ["run"]


@_coefficients.in_float64
def run(coef: jax.Array, rhs: jax.Array, *, transpose: bool) -> jax.Array:
    """The solution."""
    from jax_privacy_kernels.kernels.toeplitz_solve_pallas import toeplitz_solve

    *batch, n, columns = rhs.shape
    if rhs.size == 0:
        return rhs
    vectors = rhs.swapaxes(-1, -2).reshape(-1, n)
    if transpose:  # T between vectors that begin with their last row
        vectors = vectors[:, ::-1]
    x = toeplitz_solve(coef.reshape(-1, coef.shape[-1]), vectors)
    x = x[:, ::-1] if transpose else x
    return x.reshape(*batch, columns, n).swapaxes(-1, -2)
