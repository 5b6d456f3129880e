"""The most that one user can add to a linear function of the rounds."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jax_privacy_kernels.ops import _coefficients, _dispatch, _ffi
from jax_privacy_kernels.ops.participation_max import _cpp, _jax

__all__ = ["IMPLEMENTATIONS", "Run", "participation_max"]


class Run(Protocol):
    """An implementation: it gives the value, or value and gradient if asked to ``differentiate``.

    x is ``[..., n]``, float32 or float64, n >= 1, and the value ``[...]``. All others are static:
    min_sep >= 1 and max_participations >= 0.
    """

    def __call__(
        self,
        x: jax.Array,
        /,
        *,
        min_sep: int,
        max_participations: int,
        differentiate: bool,
    ) -> Sequence[jax.Array]: ...


# Fastest first.
IMPLEMENTATIONS: Mapping[str, _dispatch.Implementation[Run]] = {
    "cpp": _dispatch.Implementation(platforms=("cpu",), run=_cpp.run, unavailable=_ffi.unavailable),
    "jax": _dispatch.Implementation(platforms=_dispatch.PLATFORMS, run=_jax.run),
}


def participation_max(
    x: jax.Array,
    *,
    min_sep: int,
    max_participations: int,
    implementation: str | None = None,
) -> jax.Array:
    """The maximum of ``sum_{i in I} x[i]`` over sets I of at most k rounds, ``min_sep`` apart.

    The dynamic program VecSens, Algorithm 3 of https://arxiv.org/abs/2306.08153:
    ``F(i, j) = max(x[i] + F(i + min_sep, j - 1), F(i + 1, j))``, in float64 whatever the dtype.
    O(n k), and O(n) where k is as large as the rounds allow. Its derivative is that of the maxima,
    one half to either side of a tie, as JAX takes it, forward and in reverse; the second is 0. Rows
    run in parallel.

    Args:
      x: ``[..., n]``, real, n >= 1. Its signs matter: I may be empty.
      min_sep: least distance of two rounds in I, at least 1.
      max_participations: k, at least 0.
      implementation: "jax", "cpp", ..., or None for the fastest.

    Returns:
      ``[...]``, of the dtype of x, at least float32.

    Raises:
      ValueError: the implementation asked for cannot run here.
      NotImplementedError: when lowered, if it does not run on the platform.
    """
    name = _dispatch.requested("participation_max", IMPLEMENTATIONS, implementation)
    return _max(_coefficients.real(x), min_sep, max_participations, name)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _max_once(x: jax.Array, min_sep: int, max_participations: int, name: str | None) -> jax.Array:
    return _call(x, min_sep, max_participations, name, False)[0]


# Jitted, so that a call outside jit compiles once.
_max = jax.jit(_max_once, static_argnums=(1, 2, 3))


def _call(
    x: jax.Array, min_sep: int, max_participations: int, name: str | None, differentiate: bool
) -> Any:
    return _coefficients.call(
        "participation_max",
        IMPLEMENTATIONS,
        name,
        x,
        min_sep=min_sep,
        max_participations=max_participations,
        differentiate=differentiate,
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _with_gradient(
    x: jax.Array, min_sep: int, max_participations: int, name: str | None
) -> tuple[jax.Array, jax.Array]:
    value, gradient = _call(x, min_sep, max_participations, name, True)
    return value, gradient


@_max_once.defjvp
def _max_jvp(
    min_sep: int, max_participations: int, name: str | None, primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
    value, gradient = _with_gradient(*primals, min_sep, max_participations, name)
    return value, jnp.sum(gradient * tangents[0], axis=-1)


@_with_gradient.defjvp
def _gradient_jvp(
    min_sep: int, max_participations: int, name: str | None, primals: Any, tangents: Any
) -> tuple[Any, Any]:
    value, gradient = _with_gradient(*primals, min_sep, max_participations, name)
    # The maximum is piecewise linear.
    return (value, gradient), (jnp.sum(gradient * tangents[0], axis=-1), jnp.zeros_like(gradient))
