"""Errors of a banded strategy on a prefix-sum or momentum workload."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jax_privacy_kernels._checks import is_concrete
from jax_privacy_kernels.ops import _coefficients, _dispatch, _ffi, _linear
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

    Row t of ``y = A x`` is ``y_t = alpha y_{t-1} + r_t m_t`` with ``m_t = beta m_{t-1} + x_t``.

    Attributes:
      momentum: beta, a real scalar.
      learning_rates: ``[m]`` floating array r, whose last entry goes on; None for all ones.
      decay: alpha, a real scalar.
    """

    momentum: jax.typing.ArrayLike = 0.0
    learning_rates: jax.Array | None = None
    decay: jax.typing.ArrayLike = 1.0

    def __str__(self) -> str:
        if not is_concrete((self.momentum, self.learning_rates, self.decay)):
            return "a momentum workload, traced"
        parts = ["prefix sums"]
        if self.momentum != 0:
            parts.append(f"momentum {self.momentum}")
        if self.learning_rates is not None and len(self.learning_rates) > 1:
            parts.append(f"{len(self.learning_rates)} learning rates")
        elif self.learning_rates is not None and self.learning_rates[0] != 1:
            parts.append(f"learning rate {self.learning_rates[0]}")
        if self.decay != 1:
            parts.append(f"decay {self.decay}")
        return ", ".join(parts)


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
    Differentiable any number of times: once in reverse with O(sqrt(n) b^2) memory in C++, forward
    and more than once in plain JAX. Maps over leading axes.

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
    started = jnp.arange(n)[:, None] >= jnp.arange(b)[None, :]
    arrays[0] = jnp.where(started, arrays[0], 0)
    dtype = jnp.result_type(*arrays)
    name = _dispatch.requested("banded_error", IMPLEMENTATIONS, implementation)
    return _error(*(x.astype(dtype) for x in arrays), name)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _error_once(
    rows: jax.Array, scale: jax.Array, rates: jax.Array, momentum: jax.Array, name: str | None
) -> jax.Array:
    return _call(name, rows, scale, rates, momentum)


# Jitted, so that a call outside jit compiles once.
_error = jax.jit(_error_once, static_argnums=4)


def _call(name: str | None, *arrays: jax.Array) -> Any:
    return _coefficients.call("banded_error", IMPLEMENTATIONS, name, *arrays)


@_error_once.defjvp
def _error_jvp(name: str | None, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return _error_once(*primals, name), _linear.apply(_Tangent(name), primals, tangents)[0]


@dataclasses.dataclass(frozen=True)
class _Tangent:
    """From tangents of the arguments to that of the errors. See `_linear.Rule`."""

    name: str | None

    def run(self, residuals: _linear.Arrays, operands: _linear.Arrays) -> _linear.Arrays:
        return [_jax.tangent(*residuals, *operands)]

    def jvp(
        self,
        residuals: _linear.Arrays,
        operands: _linear.Arrays,
        results: _linear.Arrays,
        d_residuals: _linear.Tangents,
        d_operands: _linear.Tangents,
    ) -> _linear.Arrays:
        return _in_plain_jax(
            lambda *args: [jax.jvp(_jax.errors, args[:4], args[4:])[1]],
            [*residuals, *operands],
            [*d_residuals, *d_operands],
        )

    def transpose(
        self,
        residuals: _linear.Arrays,
        cotangents: _linear.Arrays,
        like: Sequence[jax.ShapeDtypeStruct],
    ) -> _linear.Arrays:
        return _linear.apply(_Cotangent(self.name), residuals, cotangents)


@dataclasses.dataclass(frozen=True)
class _Cotangent:
    """The transpose of `_Tangent`, which kernels have."""

    name: str | None

    def run(self, residuals: _linear.Arrays, operands: _linear.Arrays) -> _linear.Arrays:
        return list(_call(self.name, *residuals, *operands))

    def jvp(
        self,
        residuals: _linear.Arrays,
        operands: _linear.Arrays,
        results: _linear.Arrays,
        d_residuals: _linear.Tangents,
        d_operands: _linear.Tangents,
    ) -> _linear.Arrays:
        return _in_plain_jax(
            lambda *args: list(jax.vjp(_jax.errors, *args[:4])[1](args[4])),
            [*residuals, *operands],
            [*d_residuals, *d_operands],
        )

    def transpose(
        self,
        residuals: _linear.Arrays,
        cotangents: _linear.Arrays,
        like: Sequence[jax.ShapeDtypeStruct],
    ) -> _linear.Arrays:
        return _linear.apply(_Tangent(self.name), residuals, cotangents)


def _in_plain_jax(
    fun: Callable[..., list[jax.Array]], arrays: _linear.Arrays, tangents: _linear.Tangents
) -> _linear.Arrays:
    """The derivative of a derivative: rarely wanted, and in the dtype of the arguments."""
    filled = [jnp.zeros_like(x) if t is None else t for x, t in zip(arrays, tangents, strict=True)]
    return jax.jvp(fun, tuple(arrays), tuple(filled))[1]
