"""Solutions of lower-triangular Toeplitz systems."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, Protocol

import jax

from jax_privacy_kernels.ops import _coefficients, _dispatch, _ffi, _jax_pallas, _jax_triton
from jax_privacy_kernels.ops.toeplitz_multiply import coefficients_bar
from jax_privacy_kernels.ops.toeplitz_solve import _cpp, _jax, _pallas, _triton

__all__ = ["IMPLEMENTATIONS", "Run", "toeplitz_solve"]


class Run(Protocol):
    """An implementation: it gives x with T x = rhs, or with T^T x = rhs.

    coef is ``[m]``, 1 <= m <= n, and rhs ``[n, columns]``, both float32 or float64; x is like rhs
    and has their common dtype. ``transpose`` (T^T in place of T) is static.
    """

    def __call__(self, coef: jax.Array, rhs: jax.Array, /, *, transpose: bool) -> jax.Array: ...


# Fastest first.
IMPLEMENTATIONS: Mapping[str, _dispatch.Implementation[Run]] = {
    "cpp": _dispatch.Implementation(platforms=("cpu",), run=_cpp.run, unavailable=_ffi.unavailable),
    # Nobody has measured GPU kernels yet: that they come before jax, and in this order, is a guess.
    "triton": _dispatch.Implementation(
        platforms=("cuda",),
        run=_triton.run,
        unavailable=_jax_triton.unavailable,
        refuse=_coefficients.refuse_long,
        limits="to jax: more than 2^30 rows",
    ),
    "pallas": _dispatch.Implementation(
        platforms=("cuda",),
        run=_pallas.run,
        unavailable=_jax_pallas.unavailable,
        refuse=_coefficients.refuse_long,
        limits="to jax: more than 2^30 rows",
    ),
    "jax": _dispatch.Implementation(platforms=_dispatch.PLATFORMS, run=_jax.run),
}


def toeplitz_solve(
    coef: jax.Array,
    rhs: jax.Array,
    *,
    transpose: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """Solves ``T x = rhs`` for the lower-triangular Toeplitz T with ``T[i, j] = coef[i - j]``.

    By forward substitution, O(n m), in float64 whatever the dtypes. Differentiable any number of
    times in reverse, and maps over leading axes.

    Args:
      coef: ``[m]``, real, m >= 1; those from the n-th on do not matter. If ``coef[0]`` is 0 the
        result is not finite.
      rhs: ``[n]`` or ``[n, ...]``, real, n >= 1.
      transpose: solves ``T^T x = rhs`` instead.
      implementation: "jax", "cpp", ..., or None for the fastest.

    Returns:
      x, shaped like rhs, of the dtype that the arguments promote to, integers being default floats,
      at least float32.

    Raises:
      ValueError: the implementation asked for cannot run here.
      NotImplementedError: when lowered, if it does not run on the platform.
    """
    coef, rhs = _coefficients.real(coef), _coefficients.real(rhs)
    name = _dispatch.requested("toeplitz_solve", IMPLEMENTATIONS, implementation)
    return _solve(coef, rhs, transpose, name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _solve_once(coef: jax.Array, rhs: jax.Array, transpose: bool, name: str | None) -> jax.Array:
    n = rhs.shape[0]
    x = _coefficients.call(
        "toeplitz_solve",
        IMPLEMENTATIONS,
        name,
        coef[:n],
        rhs.reshape(n, math.prod(rhs.shape[1:])),
        transpose=transpose,
    )
    return x.reshape(rhs.shape)


def _forward(coef: jax.Array, rhs: jax.Array, *static: Any) -> tuple[jax.Array, Any]:
    x = _solve(coef, rhs, *static)
    return x, (coef, rhs[:0], x)  # rhs for its dtype


def _backward(
    transpose: bool, name: str | None, residuals: Any, g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    coef, rhs, x = residuals
    rhs_bar = _solve(coef, g, not transpose, name)
    left, right = (rhs_bar, x) if transpose else (x, rhs_bar)
    bar = coefficients_bar(left, right, coef.shape[0], name)
    return -bar.astype(coef.dtype), rhs_bar.astype(rhs.dtype)


_solve_once.defvjp(_forward, _backward)
# Jitted, so that a call outside jit compiles once.
_solve = jax.jit(_solve_once, static_argnums=(2, 3))
