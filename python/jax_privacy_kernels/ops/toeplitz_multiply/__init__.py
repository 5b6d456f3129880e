"""Products of a lower-triangular Toeplitz matrix with vectors."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jax_privacy_kernels.ops import _coefficients, _dispatch, _ffi, _jax_pallas, _jax_triton
from jax_privacy_kernels.ops.toeplitz_multiply import _cpp, _jax, _pallas, _triton

__all__ = ["IMPLEMENTATIONS", "Run", "toeplitz_multiply"]


class Run(Protocol):
    """An implementation: it gives the first rows of T rhs, or of T^T rhs.

    coef is ``[m]``, 1 <= m <= n, and rhs ``[n, columns]``, both float32 or float64; the result
    ``[rows, columns]`` has their common dtype, 1 <= rows <= n. ``transpose`` (T^T in place of T)
    and ``rows`` are static.
    """

    def __call__(
        self, coef: jax.Array, rhs: jax.Array, /, *, transpose: bool, rows: int
    ) -> jax.Array: ...


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


def toeplitz_multiply(
    coef: jax.Array,
    rhs: jax.Array,
    *,
    transpose: bool = False,
    rows: int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies by the lower-triangular Toeplitz matrix T with ``T[i, j] = coef[i - j]``.

    Sums are made in float64, whatever the dtypes. Differentiable any number of times in reverse,
    and maps over leading axes.

    Args:
      coef: ``[m]``, real, m >= 1; those from the n-th on do not matter.
      rhs: ``[n]`` or ``[n, ...]``, real, n >= 1.
      transpose: multiplies by ``T^T`` instead.
      rows: how many rows of the result are wanted, by default all n.
      implementation: "jax", "cpp", ..., or None for the fastest.

    Returns:
      ``[rows]`` or ``[rows, ...]``, of the dtype that the arguments promote to, integers being
      default floats, at least float32.

    Raises:
      ValueError: the implementation asked for cannot run here.
      NotImplementedError: when lowered, if it does not run on the platform.
    """
    coef, rhs = _coefficients.real(coef), _coefficients.real(rhs)
    name = _dispatch.requested("toeplitz_multiply", IMPLEMENTATIONS, implementation)
    return _multiply(coef, rhs, transpose, rhs.shape[0] if rows is None else rows, name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _multiply_once(
    coef: jax.Array, rhs: jax.Array, transpose: bool, rows: int, name: str | None
) -> jax.Array:
    n, shape = rhs.shape[0], rhs.shape[1:]
    if not transpose and rows < n:
        n, rhs = rows, rhs[:rows]
    out = _coefficients.call(
        "toeplitz_multiply",
        IMPLEMENTATIONS,
        name,
        coef[:n],
        rhs.reshape(n, math.prod(rhs.shape[1:])),
        transpose=transpose,
        rows=rows,
    )
    return out.reshape(rows, *shape)


def _forward(coef: jax.Array, rhs: jax.Array, *static: Any) -> tuple[jax.Array, Any]:
    return _multiply(coef, rhs, *static), (coef, rhs)


def _backward(
    transpose: bool, rows: int, name: str | None, residuals: Any, g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    coef, rhs = residuals
    n, m = rhs.shape[0], coef.shape[0]
    full = jnp.concatenate([g, jnp.zeros((n - rows, *g.shape[1:]), g.dtype)])
    rhs_bar = _multiply(coef, full, not transpose, n, name)
    # <g, T x> = <coef, T_x^T g> and <g, T^T x> = <coef, T_g^T x>.
    left, right = (g, rhs) if transpose else (rhs, full)
    return coefficients_bar(left, right, m, name).astype(coef.dtype), rhs_bar.astype(rhs.dtype)


def coefficients_bar(left: jax.Array, right: jax.Array, m: int, name: str | None) -> jax.Array:
    """The first m entries of ``T_left^T right``, added up over the columns."""
    n = right.shape[0]
    lags = min(m, n)
    if right.ndim > 1:
        # One column below the other, with zeros between them that no lag reaches across.
        columns = math.prod(right.shape[1:])
        gap = jnp.zeros((lags - 1, columns), right.dtype)
        left, right = (
            jnp.concatenate(
                [jnp.pad(x.reshape(len(x), columns), ((0, n - len(x)), (0, 0))), gap]
            ).T.reshape(-1)
            for x in (left, right)
        )
    if right.size == 0:
        return jnp.zeros(m, right.dtype)
    return jnp.pad(_multiply(left, right, True, lags, name), (0, m - lags))


_multiply_once.defvjp(_forward, _backward)
# Jitted, so that a call outside jit compiles once.
_multiply = jax.jit(_multiply_once, static_argnums=(2, 3, 4))
