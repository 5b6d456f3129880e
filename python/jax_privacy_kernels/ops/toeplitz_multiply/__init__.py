"""Products of a lower-triangular Toeplitz matrix with vectors."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jax_privacy_kernels.ops import (
    _coefficients,
    _dispatch,
    _ffi,
    _jax_pallas,
    _jax_triton,
    _linear,
)
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

    Sums are made in float64, whatever the dtypes. Differentiable any number of times, forward and
    in reverse, and maps over leading axes.

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


def product(
    coef: jax.Array,
    rhs: jax.Array,
    transpose: bool,
    rows: int,
    name: str | None,
    linear_in: str = "rhs",
) -> jax.Array:
    """The product of checked arrays, to be transposed in ``rhs`` or in ``coef``."""
    rule = _Product(transpose, rows, name, linear_in)
    return _linear.apply(rule, *rule.sorted([coef], [rhs]))[0]


# Jitted, so that a call outside jit compiles once.
_multiply = jax.jit(product, static_argnums=(2, 3, 4, 5))


@dataclasses.dataclass(frozen=True)
class _Product:
    """The product as a linear map of ``rhs``, or of ``coef``. See `_linear.Rule`."""

    transposed: bool
    rows: int
    name: str | None
    linear_in: str

    def sorted(self, coef: Any, rhs: Any) -> tuple[Any, Any]:
        """Residuals and operands of coefficients and right-hand side, and the other way round."""
        return (coef, rhs) if self.linear_in == "rhs" else (rhs, coef)

    def run(self, residuals: _linear.Arrays, operands: _linear.Arrays) -> _linear.Arrays:
        (coef,), (rhs,) = self.sorted(residuals, operands)
        n, shape = rhs.shape[0], rhs.shape[1:]
        if not self.transposed and self.rows < n:
            n, rhs = self.rows, rhs[: self.rows]
        out = _coefficients.call(
            "toeplitz_multiply",
            IMPLEMENTATIONS,
            self.name,
            coef[:n],
            rhs.reshape(n, math.prod(rhs.shape[1:])),
            transpose=self.transposed,
            rows=self.rows,
        )
        return [out.reshape(self.rows, *shape)]

    def jvp(
        self,
        residuals: _linear.Arrays,
        operands: _linear.Arrays,
        results: _linear.Arrays,
        d_residuals: _linear.Tangents,
        d_operands: _linear.Tangents,
    ) -> _linear.Arrays:
        (coef,), (rhs,) = self.sorted(residuals, operands)
        (d_coef,), (d_rhs,) = self.sorted(d_residuals, d_operands)
        static = self.transposed, self.rows, self.name
        terms = []
        if d_rhs is not None:
            terms.append(product(coef, d_rhs, *static, "rhs"))
        if d_coef is not None:
            terms.append(product(d_coef, rhs, *static, "coef"))
        return [functools.reduce(operator.add, terms)]

    def transpose(
        self,
        residuals: _linear.Arrays,
        cotangents: _linear.Arrays,
        like: Sequence[jax.ShapeDtypeStruct],
    ) -> _linear.Arrays:
        (g,), (wanted,) = cotangents, like
        (known,) = residuals
        n = (wanted if self.linear_in == "rhs" else known).shape[0]
        full = jnp.concatenate([g, jnp.zeros((n - self.rows, *g.shape[1:]), g.dtype)])
        if self.linear_in == "rhs":
            bar = product(known, full, not self.transposed, n, self.name)
        # <g, T x> = <coef, T_x^T g> and <g, T^T x> = <coef, T_g^T x>.
        elif self.transposed:
            bar = coefficients_bar(g, known, wanted.shape[0], self.name, "coef")
        else:
            bar = coefficients_bar(known, full, wanted.shape[0], self.name, "rhs")
        return [bar.astype(wanted.dtype)]


def coefficients_bar(
    left: jax.Array, right: jax.Array, m: int, name: str | None, linear_in: str
) -> jax.Array:
    """The first m entries of ``T_left^T right``, added up over the columns.

    To be transposed in ``right``, its "rhs", or in ``left``, its "coef".
    """
    n = right.shape[0]
    lags = min(m, n)
    if right.ndim > 1:
        # One column below the other, with zeros between them that no lag reaches across.
        columns = math.prod(right.shape[1:])
        gap = jnp.zeros((lags - 1, columns), right.dtype)
        left, right = (
            jnp.concatenate(
                [
                    jnp.pad(x.reshape(len(x), columns), ((0, n - len(x)), (0, 0))),
                    gap.astype(x.dtype),
                ]
            ).T.reshape(-1)
            for x in (left, right)
        )
    if right.size == 0:
        return jnp.zeros(m, right.dtype)
    return jnp.pad(product(left, right, True, lags, name, linear_in), (0, m - lags))
