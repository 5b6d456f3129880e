"""Workloads of SGD: momentum, decay of the iterates, and learning rates that change."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels import ops
from jax_privacy_kernels._checks import (
    check_coef,
    check_int,
    check_memory,
    check_scalar,
    is_concrete,
)

__all__ = [
    "can_follow",
    "known_workload",
    "momentum_errors",
    "momentum_sgd_coefs",
    "toeplitz_coefs",
]

# Products of decays, squared, stay within float64.
_LARGEST_EXPONENT = 300.0


def momentum_sgd_coefs(n: int, *, momentum: float = 0.0, decay: float = 1.0) -> jax.Array:
    """Returns the coefficients of the workload of SGD with momentum and weight decay.

    Iterates are ``y_t = decay y_{t-1} + m_t`` with ``m_t = momentum m_{t-1} + x_t``, x the
    gradients: the workload is Toeplitz, with ``a_t = sum_{s<=t} decay^(t-s) momentum^s``
    (https://arxiv.org/abs/2405.13763, section 2). With the defaults it is the prefix sum. For
    learning rates that change see `streaming_matrix.momentum_sgd_matrix`.

    Args:
      n: The number of coefficients.
      momentum: The momentum, at least 0 and below 1.
      decay: What every step multiplies the iterate by, above 0 and at most 1: one minus the product
        of learning rate and weight decay, for instance 0.9999.

    Returns:
      ``[n]`` array of the default float dtype, computed in float64. No digits cancel.

    Raises:
      ValueError: if n < 1, or an argument is out of range.
      TypeError: if n is not an integer, or another argument is not a real number.
    """
    n = check_int("n", n)
    check_memory("n", n, 32 * n)
    momentum = check_scalar("momentum", momentum, lambda x: 0 <= x < 1, "in [0, 1)")
    decay = check_scalar("decay", decay, lambda x: 0 < x <= 1, "in (0, 1]")
    # One recurrence after the other: all terms are positive.
    powers = itertools.accumulate(itertools.repeat(momentum, n - 1), operator.mul, initial=1.0)
    sums = itertools.accumulate(powers, lambda before, power: decay * before + power)
    return jnp.asarray(np.fromiter(sums, float, n), jnp.result_type(float))


def known_workload(workload_coef: Any, n: int, name: str = "workload_coef") -> np.ndarray | None:
    """``[n]`` coefficients of a workload in float64, or None for prefix sums."""
    if workload_coef is None:
        return None
    if not is_concrete(workload_coef):
        raise TypeError(f"expected {name} that is known, found a tracer")
    check_memory("n", n, 40 * n)
    with jax.enable_x64(True):
        values = np.asarray(check_coef(name, workload_coef), np.float64)[:n]
    return np.pad(values, (0, n - values.size))


def toeplitz_coefs(structure: Any, n: int) -> np.ndarray | None:
    """``[n]`` coefficients, float64, of a workload with this structure, if it is Toeplitz."""
    if not isinstance(structure, ops.Momentum):
        return None
    rates: Any = np.ones(1) if structure.learning_rates is None else structure.learning_rates
    momentum: Any = structure.momentum
    decay: Any = structure.decay
    if not is_concrete((rates, momentum, decay)) or not 0 <= float(momentum) < 1:
        return None
    rates = np.asarray(rates, np.float64)[:n]
    if (rates != rates[0]).any():
        return None
    with jax.enable_x64(True):
        coefs = momentum_sgd_coefs(n, momentum=float(momentum), decay=float(decay))
        return rates[0] * np.asarray(coefs)


def can_follow(structure: Any, n: int) -> bool:
    """Whether :func:`momentum_errors` computes the errors of a workload with this structure."""
    if not isinstance(structure, ops.Momentum):
        return False
    decay: Any = structure.decay
    return is_concrete(decay) and -n * math.log(float(decay)) <= _LARGEST_EXPONENT


def momentum_errors(
    rows: jax.Array, scale: jax.Array, structure: ops.Momentum, name: str | None = None
) -> jax.Array:
    """The errors ``[n]`` of a banded strategy on a momentum workload. O(n b^2).

    Args:
      rows: ``[n, b]`` of the strategy, as `ops.banded_error` takes them.
      scale: ``[n]`` norms of its columns.
      structure: Of the workload: one that :func:`can_follow`.
      name: Of an implementation.
    """
    rates = np.ones(1) if structure.learning_rates is None else structure.learning_rates
    decay: Any = structure.decay
    return _momentum_errors(rows, scale, rates, structure.momentum, float(decay), name)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _momentum_errors(
    rows: jax.Array,
    scale: jax.Array,
    rates: jax.Array,
    momentum: jax.Array,
    decay: float,
    name: str | None,
) -> jax.Array:
    dtype, n = scale.dtype, len(scale)
    rates = jnp.asarray(rates, dtype).at[jnp.arange(n)].get(mode="clip")
    momentum = jnp.asarray(momentum, dtype)
    if decay == 1:
        return ops.banded_error(rows, scale, rates, momentum, implementation=name)
    # Iterates divided by decay^t are sums: those of momentum / decay, of terms divided alike.
    powers = jnp.asarray(np.float64(decay) ** np.arange(n), dtype)
    errors = ops.banded_error(rows, scale / powers, rates, momentum / decay, implementation=name)
    return errors * powers**2
