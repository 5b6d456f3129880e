"""The squared sensitivity of a Toeplitz strategy to a user who takes part several times."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jax_privacy_kernels.ops import _coefficients, _dispatch, _ffi, _jax_pallas, _jax_triton
from jax_privacy_kernels.ops.min_sep_norm import _cpp, _jax, _pallas, _triton

__all__ = ["IMPLEMENTATIONS", "Run", "min_sep_norm"]


class Run(Protocol):
    """An implementation: it gives the value, or value and gradient if asked to ``differentiate``.

    coef is ``[m]``, float32 or float64, 1 <= m <= n. All others are static: 1 <= min_sep <= n and
    max_participations >= 1.
    """

    def __call__(
        self,
        coef: jax.Array,
        /,
        *,
        n: int,
        min_sep: int,
        max_participations: int,
        differentiate: bool,
    ) -> Sequence[jax.Array]: ...


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


def min_sep_norm(
    coef: jax.Array,
    *,
    n: int,
    min_sep: int,
    max_participations: int,
    implementation: str | None = None,
) -> jax.Array:
    """The squared norm of the sum of up to k columns of C, ``min_sep`` apart, the first included.

    C is n x n, lower-triangular Toeplitz. Its coefficients are replaced by p, the least
    non-increasing sequence above ``|coef|``, for which these columns are the worst
    (https://arxiv.org/abs/2405.13763, Theorem 2): entry t of their sum is
    ``p[t] + p[t - min_sep] + ...``, k terms. O(n), in float64 whatever the dtype, and nothing is
    subtracted. Differentiable any number of times, forward and in reverse, where an element of p
    goes with the first coefficient behind it that equals it: for coefficients that are
    non-increasing already, p is differentiated as they are. At a coefficient of 0 the derivative is
    that to the right. Maps over leading axes.

    Args:
      coef: ``[m]``, real, m >= 1; those from the n-th on do not matter.
      n: number of rows.
      min_sep: distance of the columns, ``1 <= min_sep <= n``.
      max_participations: k, at least 1.
      implementation: "jax", "cpp", ..., or None for the fastest.

    Returns:
      A scalar of the dtype of ``coef``, at least float32.

    Raises:
      ValueError: the implementation asked for cannot run here.
      NotImplementedError: when lowered, if it does not run on the platform.
    """
    name = _dispatch.requested("min_sep_norm", IMPLEMENTATIONS, implementation)
    return _norm(_coefficients.real(coef), n, min_sep, max_participations, name)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3, 4))
def _norm_once(
    coef: jax.Array, n: int, min_sep: int, max_participations: int, name: str | None
) -> jax.Array:
    return _call(coef, n, min_sep, max_participations, name, False)[0]


# Jitted, so that a call outside jit compiles once.
_norm = jax.jit(_norm_once, static_argnums=(1, 2, 3, 4))


def _call(
    coef: jax.Array,
    n: int,
    min_sep: int,
    max_participations: int,
    name: str | None,
    differentiate: bool,
) -> Any:
    return _coefficients.call(
        "min_sep_norm",
        IMPLEMENTATIONS,
        name,
        coef[:n],
        n=n,
        min_sep=min_sep,
        max_participations=max_participations,
        differentiate=differentiate,
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3, 4))
def _with_gradient(
    coef: jax.Array, n: int, min_sep: int, max_participations: int, name: str | None
) -> tuple[jax.Array, jax.Array]:
    value, gradient = _call(coef, n, min_sep, max_participations, name, True)
    return value, jnp.pad(gradient, (0, coef.size - gradient.size))


@_norm_once.defjvp
def _norm_jvp(
    n: int, min_sep: int, max_participations: int, name: str | None, primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
    value, gradient = _with_gradient(*primals, n, min_sep, max_participations, name)
    return value, jnp.sum(gradient * tangents[0])


@_with_gradient.defjvp
def _gradient_jvp(
    n: int, min_sep: int, max_participations: int, name: str | None, primals: Any, tangents: Any
) -> tuple[Any, Any]:
    (coef,), (d_coef,) = primals, tangents
    value, gradient = _with_gradient(coef, n, min_sep, max_participations, name)
    bent = _jax.curvature(coef[:n], d_coef[:n], n, min_sep, max_participations)
    bent = jnp.pad(bent, (0, coef.size - bent.size)).astype(coef.dtype)
    return (value, gradient), (jnp.sum(gradient * d_coef), bent)
