"""Solutions of lower-triangular Toeplitz systems."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp

from jax_privacy_kernels._checks import nan_unless
from jax_privacy_kernels.ops import (
    _coefficients,
    _dispatch,
    _ffi,
    _jax_pallas,
    _jax_triton,
    _linear,
)
from jax_privacy_kernels.ops.toeplitz_multiply import product
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
    times, forward and in reverse, and maps over leading axes.

    Args:
      coef: ``[m]``, real, m >= 1; those from the n-th on do not matter. If ``coef[0]`` is 0 the
        result is not finite; if one that matters is not finite it is NaN.
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


def _solution(coef: jax.Array, rhs: jax.Array, transpose: bool, name: str | None) -> jax.Array:
    coef = coef[: rhs.shape[0]]
    # An infinite coefficient would make an x of zeros.
    coef = nan_unless(jnp.isfinite(coef).all(), coef)
    return _linear.apply(_Solution(transpose, name), [coef], [rhs])[0]


# Jitted, so that a call outside jit compiles once.
_solve = jax.jit(_solution, static_argnums=(2, 3))


@dataclasses.dataclass(frozen=True)
class _Solution:
    """The solution as a linear map of ``rhs``. See `_linear.Rule`."""

    transposed: bool
    name: str | None

    def run(self, residuals: _linear.Arrays, operands: _linear.Arrays) -> _linear.Arrays:
        (coef,), (rhs,) = residuals, operands
        n = rhs.shape[0]
        x = _coefficients.call(
            "toeplitz_solve",
            IMPLEMENTATIONS,
            self.name,
            coef[:n],
            rhs.reshape(n, math.prod(rhs.shape[1:])),
            transpose=self.transposed,
        )
        return [x.reshape(rhs.shape)]

    def jvp(
        self,
        residuals: _linear.Arrays,
        operands: _linear.Arrays,
        results: _linear.Arrays,
        d_residuals: _linear.Tangents,
        d_operands: _linear.Tangents,
    ) -> _linear.Arrays:
        (coef,), (x,), (d_coef,), (d_rhs,) = residuals, results, d_residuals, d_operands
        # T dx = d_rhs - dT x.
        terms = [] if d_rhs is None else [d_rhs.astype(x.dtype)]
        if d_coef is not None:
            moved = product(d_coef, x, self.transposed, len(x), self.name, "coef")
            terms.append(-moved.astype(x.dtype))
        rhs = functools.reduce(operator.add, terms)
        return [_solution(coef, rhs, self.transposed, self.name)]

    def transpose(
        self,
        residuals: _linear.Arrays,
        cotangents: _linear.Arrays,
        like: Sequence[jax.ShapeDtypeStruct],
    ) -> _linear.Arrays:
        (coef,), (g,), (wanted,) = residuals, cotangents, like
        return [_solution(coef, g, not self.transposed, self.name).astype(wanted.dtype)]
