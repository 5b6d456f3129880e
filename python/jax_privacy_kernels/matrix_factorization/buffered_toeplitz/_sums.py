"""Geometric sums of n terms, accurate for ratios as close to 1 as the decays of a BLT are.

Sums of n terms are doubled: a state holds the sums of m terms, from which follow those of 2 m and
of m + 1. For decays in [0, 1] only non-negative numbers are added, so the result has all of its
digits however close to 1 they are, where quotients like (1 - r^n) / (1 - r) lose them; and it is a
polynomial, so its derivative has no singularities either.

Ratios in [0, 1] that are known have a closed form that is as accurate however many terms there are,
while doubling lets the rounding of a ratio grow n-fold.

Every formula is written once, for values that are known, which NumPy computes with in float64, and
for tracers: it takes an `Arithmetic`, :data:`KNOWN` or :data:`TRACED`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels._checks import (
    check_int,
    is_concrete,
    nan_unless,
    promote_types,
    standard_promotion,
)

__all__ = [
    "KNOWN",
    "TRACED",
    "Arithmetic",
    "Array",
    "Count",
    "as_count",
    "coefs",
    "geometric_sum",
    "geometric_sums",
    "result",
    "robust_max_error_Gamma_j",
    "robust_max_error_Gamma_jk",
    "rounding",
    "series",
    "squares_of_coefs",
    "sum_of_squares",
]

Array: TypeAlias = jax.Array | np.ndarray
Count: TypeAlias = int | float | jax.Array
"""A number of terms: an int, infinity, or a tracer."""

State = TypeVar("State")


class Arithmetic(NamedTuple):
    """How formulas compute.

    Attributes:
      xp: The namespace, numpy or jax.numpy.
      is_known: Whether values are known, so that a formula may choose by them.
      doubled: ``(double, add, state, n)``: the state of n terms, from that of none, where
        ``double`` and ``add`` lead to 2 m and to m + 1.
      constant: Takes a value that derivatives pass by.
      matmul: The matrix product, with all of the digits.
    """

    xp: ModuleType
    is_known: bool
    doubled: Callable[[Callable[[State], State], Callable[[State], State], State, Count], State]
    constant: Callable[[Array], Array]
    matmul: Callable[[Array, Array], Array]


def _doubled_known(
    double: Callable[[State], State], add: Callable[[State], State], state: State, n: Count
) -> State:
    with np.errstate(all="ignore"):
        for digit in f"{n:b}":
            state = double(state)
            state = add(state) if digit == "1" else state
    return state


def _doubled_traced(
    double: Callable[[State], State], add: Callable[[State], State], state: State, n: Count
) -> State:
    if isinstance(n, jax.Array):
        if jnp.issubdtype(n.dtype, jnp.floating):
            state = jax.tree.map(functools.partial(nan_unless, ~jnp.isnan(n)), state)
        n = n.astype(jnp.result_type(int))
        places = np.arange(jnp.iinfo(n.dtype).bits - 2, -1, -1, dtype=n.dtype)
        digits: Array = (n >> places) & 1 == 1
    else:
        digits = np.array([digit == "1" for digit in f"{n:b}"])

    def step(state: State, digit: Any) -> tuple[State, None]:
        state = double(state)
        return jax.tree.map(lambda a, b: jnp.where(digit, a, b), add(state), state), None

    return jax.lax.scan(step, state, digits)[0]


def _same(x: Array) -> Array:
    return x


def _matmul_traced(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")


KNOWN = Arithmetic(np, True, _doubled_known, _same, np.matmul)
TRACED = Arithmetic(jnp, False, _doubled_traced, jax.lax.stop_gradient, _matmul_traced)


def result(x: jax.typing.ArrayLike, dtype: jax.typing.DTypeLike) -> jax.Array:
    """x as an array of the dtype, or the nearest one that JAX's mode has."""
    return jnp.asarray(x, jax.dtypes.canonicalize_dtype(dtype))


def as_count(name: str, n: jax.typing.ArrayLike, minimum: int, *, infinite: bool = False) -> Count:
    """n as an ``int``, or `math.inf` where that is allowed; a scalar tracer is rounded up."""
    if jnp.ndim(n) != 0:
        raise ValueError(f"expected {name} to be a scalar, found shape {jnp.shape(n)}")
    if isinstance(n, jax.core.Tracer):
        return jnp.ceil(n) if jnp.issubdtype(n.dtype, jnp.floating) else n
    number = np.asarray(n).item()
    if infinite and number == math.inf:
        return math.inf
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    return check_int(name, number, minimum)


# -- Sums of powers ---------------------------------------------------------------------------


def geometric_sums(r: Array, n: Count, on: Arithmetic) -> tuple[Array, Array]:
    """``g(n) = 1 + r + ... + r^(n-1)`` and ``g(0) + ... + g(n-1)``, element by element."""
    xp = on.xp

    def double(state: tuple[Array, ...]) -> tuple[Array, ...]:
        m, p, g, s = state
        return m + m, p * p, g + p * g, s + m * g + p * s

    def add(state: tuple[Array, ...]) -> tuple[Array, ...]:
        m, p, g, s = state
        return m + 1, p * r, g + p, s + g

    zero = xp.zeros_like(r)
    state: tuple[Array, ...] = (xp.zeros((), r.dtype), zero + 1, zero, zero)
    _, _, g, s = on.doubled(double, add, state, n)
    return g, s


def _geometric_product(r: Array, s: Array, n: Count, on: Arithmetic) -> Array:
    """``sum_{i<n} g_i(r) g_i(s)`` for the sums of :func:`geometric_sums`, element by element."""
    xp = on.xp

    def double(state: tuple[Array, ...]) -> tuple[Array, ...]:
        m, p, q, g, h, sum_g, sum_h, total = state
        total = total + m * g * h + p * h * sum_g + q * g * sum_h + p * q * total
        sum_g, sum_h = sum_g + m * g + p * sum_g, sum_h + m * h + q * sum_h
        return m + m, p * p, q * q, g + p * g, h + q * h, sum_g, sum_h, total

    def add(state: tuple[Array, ...]) -> tuple[Array, ...]:
        m, p, q, g, h, sum_g, sum_h, total = state
        return m + 1, p * r, q * s, g + p, h + q, sum_g + g, sum_h + h, total + g * h

    zero = xp.zeros_like(r * s)
    state = (xp.zeros((), zero.dtype), zero + 1, zero + 1, *[zero] * 5)
    return on.doubled(double, add, state, n)[-1]


def series(a: Array, r: Array, gap: Array, n: Count, on: Arithmetic) -> Array:
    """``a g_n(r)``, given also ``gap = 1 - r``: rounded once, where r is a product."""
    xp = on.xp

    def limit(a: Array, r: Array, gap: Array) -> Array:
        converges = xp.abs(r) < 1
        value = a / xp.where(converges, gap, 1)
        diverges = xp.where(a == 0, 0.0, xp.where(a > 0, xp.inf, -xp.inf))
        value = xp.where(converges, value, diverges)
        with jax.debug_nans(False):  # the NaN of arithmetic, which is hardly ever taken
            return xp.where(converges | (r > 0), value, xp.nan)

    def finite(a: Array, r: Array, gap: Array) -> Array:
        g = geometric_sums(r, n, on)[0]
        if on.is_known and not isinstance(n, jax.Array):
            g = np.where(is_ratio(r), _closed_form(gap, n), g)
        return a * g

    if not isinstance(n, jax.Array):
        return limit(a, r, gap) if n == math.inf else finite(a, r, gap)
    if not jnp.issubdtype(n.dtype, jnp.floating):
        return finite(a, r, gap)
    return jax.lax.cond(jnp.isinf(n), limit, finite, *jnp.broadcast_arrays(a, r, gap))


def is_ratio(r: Array) -> Array:
    """Where a sum has the closed form."""
    return (r >= 0) & (r <= 1)


def _closed_form(gap: Array, n: Count) -> np.ndarray:
    """``(1 - r^n) / (1 - r)`` for ``gap = 1 - r`` in [0, 1], to a few units in the last place."""
    with np.errstate(all="ignore"):
        quotient = -np.expm1(float(n) * np.log1p(-np.asarray(gap))) / gap
    return np.where(gap > 0, quotient if n else 0.0, float(n))


# -- Sums of squares --------------------------------------------------------------------------

# Prefix sums of a good BLT cancel by a factor of 10. From this one on, rounding is bounded.
_CANCELLATION = 100
# The most coefficients that are summed up where closed forms cancel.
MAX_COEFS = 10**7


def sum_of_squares(theta: Array, omega: Array, n: Count, on: Arithmetic) -> Array:
    """``sum_{i<n} (1 + sum_j omega_j g_i(theta_j))^2``: the first n prefix sums of coefficients.

    Block by block, m to 2 m, from the prefix sum that the block starts with. What cancels in a
    block is at most what its prefix sums fall by, a small factor; not the factor n / log(n) between
    the sum over pairs of decays and the result. Where scales of both signs on close decays cancel
    much more than that, the result is an upper bound.
    """
    xp = on.xp

    def double(state: tuple[Array, ...]) -> tuple[Array, ...]:
        m, p, g, s, pairs, total, size = state
        first, scale = 1 + xp.sum(omega * g), omega * p
        terms = m * first**2, 2 * first * scale * s, scale[:, None] * scale * pairs
        total = total + sum(xp.sum(x) for x in terms)
        size = size + sum(xp.sum(xp.abs(x)) for x in terms)
        ps = p * s
        new_pairs = pairs + m * g[:, None] * g + g[:, None] * ps + ps[:, None] * g
        new_pairs = new_pairs + p[:, None] * p * pairs
        return m + m, p * p, g + p * g, s + m * g + ps, new_pairs, total, size

    def add(state: tuple[Array, ...]) -> tuple[Array, ...]:
        m, p, g, s, pairs, total, size = state
        square = (1 + xp.sum(omega * g)) ** 2
        pairs = pairs + g[:, None] * g
        return m + 1, p * theta, g + p, s + g, pairs, total + square, size + square

    zero = xp.zeros_like(theta)
    none = xp.zeros((), theta.dtype)
    pairs = zero[:, None] * zero
    state: tuple[Array, ...] = (none, zero + 1, zero, zero, pairs, none, none)
    _, _, g, _, _, total, size = on.doubled(double, add, state, n)
    with np.errstate(all="ignore"):
        relative = xp.max(rounding(theta[:, None] * theta, n, on), initial=0)
        # Of the terms, and of the prefix sums that the blocks start with.
        most = xp.sqrt(1.0 * n) * (1 + xp.sum(xp.abs(omega * g)))
        bound = (xp.sqrt(xp.maximum(total, 0) + relative * size) + relative * most) ** 2
        cancels = ~((size <= _CANCELLATION * total) & (most <= 1e5 * xp.sqrt(total)))
    if isinstance(n, int) and on.is_known and cancels and n <= MAX_COEFS:
        return np.fmin(bound, squares_of_coefs(theta, omega, n, prefix_sums=True))
    return total + on.constant(xp.where(cancels, bound - total, 0))


def rounding(r: Array, n: Count, on: Arithmetic) -> Array:
    """A bound on the relative error of doubled geometric sums of ratios, element by element.

    A rounded ratio is off by 1 in ``1 / eps``; its power n, and the ratio's sum, by n times that,
    or 1 / (1 - r) times if that is less.
    """
    xp = on.xp
    gap = 1 - xp.abs(r)
    steps = xp.where(gap > 0, xp.minimum(1.0 * n, 1 / xp.where(gap > 0, gap, 1)), 1.0 * n)
    return 8 * (steps + 64 + r.size) * xp.finfo(r.dtype).eps


def coefs(theta: Array, omega: Array, n: int, on: Arithmetic) -> Array:
    """The first n coefficients of a BLT, of which only ``2 m sqrt(n)`` are powers."""
    xp = on.xp
    size = max(math.isqrt(n - 1), 1)
    if on.is_known:  # in a trace this would lose the derivative
        theta = np.where(omega == 0, 0, theta)
    # theta^(t-1), t - 1 = size row + column.
    rows = omega * theta ** (size * np.arange(-(-(n - 1) // size)))[:, None]
    columns = theta ** np.arange(size)[:, None]
    tail = on.matmul(rows, columns.T).reshape(-1)[: n - 1]
    return xp.concatenate([xp.ones(1, theta.dtype), tail])


def squares_of_coefs(
    theta: Array, omega: Array, n: int, *, prefix_sums: bool = False
) -> np.ndarray:
    """An upper bound on the sum of n squared coefficients, or of their prefix sums: O(n m)."""
    eps = np.finfo(np.float64).eps
    with np.errstate(all="ignore"):
        values = coefs(theta, omega, n, KNOWN)
        errors = (len(theta) + 8) * eps * coefs(np.abs(theta), np.abs(omega), n, KNOWN)
        if prefix_sums:
            values = np.cumsum(values)
            errors = np.cumsum(errors + eps * np.abs(values))
        return np.sum((np.abs(values) + errors) ** 2)


# -- The public sums --------------------------------------------------------------------------


def _arrays(n: Count, *xs: jax.typing.ArrayLike) -> tuple[np.dtype, Arithmetic, Sequence[Array]]:
    """Their dtype, how to compute with them and n, and the arrays for that."""
    dtype = promote_types(jnp.result_type(*xs), jnp.result_type(float))
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"expected real numbers, found dtype {dtype}")
    if is_concrete((n, xs)):
        return dtype, KNOWN, [np.asarray(x, np.float64) for x in xs]
    return dtype, TRACED, [jnp.asarray(x, dtype) for x in xs]


@standard_promotion()
def geometric_sum(a: jax.Array, r: jax.Array, num: jax.typing.ArrayLike = jnp.inf) -> jax.Array:
    """Returns ``a + a r + a r^2 + ... + a r^(num-1)``, or its limit. Accurate for r = 1, and near.

    O(log num); a tracer counts as the largest integer.

    Args:
      a: First terms.
      r: Ratios; they broadcast with ``a``.
      num: The number of terms, an integer of at least 0, or infinity. A scalar.

    Returns:
      Array of the dtype that a and r promote to, at least the default float dtype. The limit is
      infinite for r >= 1 and a != 0, and NaN for r <= -1.

    Raises:
      ValueError: If ``num`` is negative or not a scalar.
      TypeError: If it is neither an integer nor infinite.
    """
    count = as_count("num", num, 0, infinite=True)
    dtype, on, (first, ratio) = _arrays(count, a, r)
    return result(series(first, ratio, 1 - ratio, count, on), dtype)


@standard_promotion()
def robust_max_error_Gamma_j(omega: jax.Array, theta: jax.Array, n: jax.Array) -> jax.Array:
    """Returns ``1/n sum_{i<n} omega g_i(theta)`` with ``g_i = 1 + theta + ... + theta^(i-1)``.

    A term of Lemma 5.4 of https://arxiv.org/abs/2404.16706. Accurate for all decays in [0, 1].

    Args:
      omega: Scales.
      theta: Decays; they broadcast with the scales.
      n: The number of iterations, an integer of at least 1. A scalar.

    Raises:
      ValueError: If n < 1 or n is not a scalar.
      TypeError: If n is not an integer.
    """
    count = as_count("n", n, 1)
    dtype, on, (scale, decay) = _arrays(count, omega, theta)
    return result(scale * geometric_sums(decay, count, on)[1] / count, dtype)


@standard_promotion()
def robust_max_error_Gamma_jk(
    omega1: jax.Array, theta1: jax.Array, omega2: jax.Array, theta2: jax.Array, n: jax.Array
) -> jax.Array:
    """Returns ``1/n sum_{i<n} omega1 g_i(theta1) omega2 g_i(theta2)``.

    With g as for :func:`robust_max_error_Gamma_j`. A term of Lemma 5.4 of
    https://arxiv.org/abs/2404.16706. Accurate for all decays in [0, 1].

    Args:
      omega1: Scales.
      theta1: Decays.
      omega2: Scales.
      theta2: Decays. All four broadcast: ``[m]`` with ``[m, 1]`` gives all pairs.
      n: The number of iterations, an integer of at least 1. A scalar.

    Raises:
      ValueError: If n < 1 or n is not a scalar.
      TypeError: If n is not an integer.
    """
    count = as_count("n", n, 1)
    dtype, on, (w1, t1, w2, t2) = _arrays(count, omega1, theta1, omega2, theta2)
    return result(w1 * w2 * _geometric_product(t1, t2, count, on) / count, dtype)
