"""Errors of a banded strategy on a prefix-sum or momentum workload."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jax_privacy_kernels.ops import _coefficients, _dispatch, _ffi
from jax_privacy_kernels.ops.banded_error import _cpp, _jax

__all__ = ["IMPLEMENTATIONS", "Momentum", "Run", "banded_error"]


class Run(Protocol):
    """An implementation, of ``rows, scale, rates, momentum`` or of those and ``g``.

    It gives the errors ``[n]``; or, given g ``[n]``, the derivatives of <g, errors> with respect to
    the four others. rows are ``[n, b]``, scale and rates ``[n]``, momentum is a scalar; all are
    float32 or all are float64.
    """

    def __call__(self, *arrays: jax.Array) -> Any: ...


# Fastest first.
IMPLEMENTATIONS: Mapping[str, _dispatch.Implementation[Run]] = {
    "cpp": _dispatch.Implementation(platforms=("cpu",), run=_cpp.run, unavailable=_ffi.unavailable),
    "jax": _dispatch.Implementation(platforms=_dispatch.PLATFORMS, run=_jax.run),
}


@dataclasses.dataclass(frozen=True)
class Momentum:
    """The rows of a momentum workload, prefix sums among them.

    Row t of ``y = A x`` is ``y_t = y_{t-1} + r_t m_t`` with ``m_t = beta m_{t-1} + x_t``.

    Attributes:
      momentum: beta, a real scalar.
      learning_rates: ``[m]`` floating array r, whose last entry goes on; None for all ones.
    """

    momentum: jax.typing.ArrayLike = 0.0
    learning_rates: jax.Array | None = None


def banded_error(
    rows: jax.Array,
    scale: jax.Array,
    rates: jax.Array,
    momentum: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Returns the variances of ``y = A diag(scale) P^-1 z`` for z of variance 1.

    P is lower-triangular with b bands, ``P[t, t - l] = rows[t, l]``. A is momentum with learning
    rates: ``m_t = momentum m_{t-1} + u_t``, ``y_t = y_{t-1} + rates[t] m_t``; prefix sums for
    momentum 0 and rates 1. The last b - 1 elements of ``P^-1 z``, m and y are a Markov process,
    whose covariance follows from step to step: O(n b^2) time, exact, in float64 for all dtypes.
    Differentiable once, with O(sqrt(n) b^2) memory in C++. Maps over leading axes.

    Args:
      rows: ``[n, b]``, real; ``rows[t, l]`` with l > t does not matter, ``rows[t, 0] != 0``.
      scale: ``[n]``, real.
      rates: ``[n]``, real.
      momentum: A real scalar.
      implementation: "jax", "cpp", ..., or None for the fastest.

    Returns:
      ``[n]``, of the dtype that the arguments promote to, at least float32.

    Raises:
      ValueError: the implementation asked for cannot run here.
      NotImplementedError: when lowered, if it does not run on the platform.
    """
    arrays = [_coefficients.real(x) for x in (rows, scale, rates, momentum)]
    n, b = arrays[0].shape[-2:]
    started = jnp.arange(n)[:, None] >= jnp.arange(b)
    arrays[0] = jnp.where(started, arrays[0], 0)
    dtype = jnp.result_type(*arrays)
    name = _dispatch.requested("banded_error", IMPLEMENTATIONS, implementation)
    return _error(*(x.astype(dtype) for x in arrays), name)


def _error_once(
    rows: jax.Array, scale: jax.Array, rates: jax.Array, momentum: jax.Array, name: str | None
) -> jax.Array:
    return _call(name, rows, scale, rates, momentum)


def _call(name: str | None, *arrays: jax.Array) -> Any:
    return _coefficients.call("banded_error", IMPLEMENTATIONS, name, *arrays)


def _forward(
    rows: jax.Array, scale: jax.Array, rates: jax.Array, momentum: jax.Array, name: str | None
) -> tuple[jax.Array, Any]:
    arrays = (rows, scale, rates, momentum)
    return _call(name, *arrays), arrays


def _backward(name: str | None, arrays: Any, g: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(_call(name, *arrays, g))


_with_rule = jax.custom_vjp(_error_once, nondiff_argnums=(4,))
_with_rule.defvjp(_forward, _backward)
# Jitted, so that a call outside jit compiles once.
_error = jax.jit(_with_rule, static_argnums=4)
