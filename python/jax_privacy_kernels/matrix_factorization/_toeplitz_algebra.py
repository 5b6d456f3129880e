"""Coefficients of lower-triangular Toeplitz matrices: algebra, sensitivities and errors.

What the functions have in common stands in the docstring of `toeplitz`, where they are public.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Iterator
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels import ops
from jax_privacy_kernels._checks import (
    check_coef,
    check_int,
    check_memory,
    check_real,
    is_concrete,
    owned,
    promote_types,
)
from jax_privacy_kernels.matrix_factorization import _long_solve, sensitivity
from jax_privacy_kernels.matrix_factorization._certified import bounded_inverse
from jax_privacy_kernels.matrix_factorization._scaling import (
    Scale,
    restored,
    scaled,
)

__all__ = [
    "Array",
    "at_least_default",
    "banded_inverse_square_root_noising_coefs",
    "compute_banded_inverse_sensitivity_squared",
    "in_float64",
    "inverse_coef",
    "materialize_lower_triangular",
    "min_sep_norm",
    "minsep_sensitivity_squared",
    "multiply",
    "norm_squared",
    "optimal_max_error_noising_coefs",
    "optimal_max_error_strategy_coefs",
    "pad_coefs_to_n",
    "reconcile",
    "sensitivity_squared",
    "solve_banded",
    "solved",
    "sqrt_prefix_sum",
]

Array: TypeAlias = jax.Array | np.ndarray

# -- Coefficients -----------------------------------------------------------------------------


def reconcile(
    coef: object,
    n: int | None = None,
    *,
    name: str = "coef",
    invertible: bool = False,
) -> tuple[jax.Array, int]:
    """Returns at most n checked coefficients, and n (by default their number).

    Coefficients of 16 bits become float32: what is computed from them takes more digits.
    """
    coef = check_coef(name, coef, invertible=invertible)
    n = coef.size if n is None else check_int("n", n)
    check_memory("n", n, 32 * n)
    coef = coef if coef.size <= n else coef[:n]
    return coef.astype(promote_types(coef.dtype, jnp.float32)), n


def at_least_default(x: jax.Array) -> jax.Array:
    return x.astype(promote_types(x.dtype, jnp.result_type(float)))


def norm_squared(x: jax.Array) -> jax.Array:
    # Not vdot: that adds up one by one on some platforms (0.02 % off for 40,000 float32 terms) and
    # rounds the factors on others.
    return (x * x).sum()


@contextlib.contextmanager
def in_float64(is_known: bool) -> Iterator[None]:
    """Known values are computed with in float64, whatever the mode, and now, also in a trace."""
    if is_known:
        with jax.ensure_compile_time_eval(), jax.enable_x64(True):
            yield
    else:
        yield


def pad_coefs_to_n(coef: jax.Array, n: int | None = None) -> jax.Array:
    """Drops coefficients, or appends zeros, to get exactly n of them.

    Args:
      coef: ``[b]`` coefficients.
      n: The length of the result, by default b.

    Returns:
      ``[n]`` array, of the default float dtype or the dtype of ``coef``, whichever is wider.

    Raises:
      ValueError: if ``coef`` is not 1-D, empty or not finite, or n < 1.
      TypeError: if n is not an integer, or ``coef`` is not real.
    """
    coef, n = reconcile(coef, n)
    return at_least_default(jnp.pad(coef, (0, n - coef.size)))


def optimal_max_error_strategy_coefs(n: int) -> jax.Array:
    """Returns the Toeplitz strategy of least maximum error for prefix sums, one participation.

    ``c_k = binom(2k, k) / 4^k``, the square root of the prefix-sum matrix A: ``A = C C``. Due to
    Fichtenberger, Henzinger and Upadhyay (https://arxiv.org/abs/2202.11205), proved optimal by
    Dvijotham, McMahan, Pillutla, Steinke and Thakurta (https://arxiv.org/abs/2404.16706).

    Args:
      n: The number of coefficients.

    Returns:
      ``[n]`` array of the default float dtype. All of its digits hold: it is computed in float64.

    Raises:
      ValueError: if n < 1.
      TypeError: if n is not an integer.
    """
    return jnp.asarray(sqrt_prefix_sum(_size(n)), jnp.result_type(float))


def optimal_max_error_noising_coefs(n: int) -> jax.Array:
    """Returns the coefficients of ``C^-1`` for :func:`optimal_max_error_strategy_coefs`.

    They are the differences ``c_k - c_{k-1} = -c_k / (2k - 1)``, with a leading 1; the quotient
    keeps the digits that the difference would cancel.

    Args:
      n: The number of coefficients.

    Returns:
      ``[n]`` array of the default float dtype.

    Raises:
      ValueError: if n < 1.
      TypeError: if n is not an integer.
    """
    n = _size(n)
    return jnp.asarray(sqrt_prefix_sum(n) / (1 - 2 * np.arange(n)), jnp.result_type(float))


def _size(n: int) -> int:
    n = check_int("n", n)
    check_memory("n", n, 32 * n)
    return n


def sqrt_prefix_sum(n: int) -> np.ndarray:
    k = np.arange(1, n)
    return np.cumprod(np.concatenate([[1.0], (2 * k - 1) / (2 * k)]))


def banded_inverse_square_root_noising_coefs(
    num_bands: int, workload_coef: jax.typing.ArrayLike | None = None
) -> jax.Array:
    """Returns the first coefficients of ``C^-1`` for ``C = A^{1/2}``, A the workload.

    The banded inverse square root (BISR) factorization of https://arxiv.org/abs/2505.12128. The
    root of the power series of A comes from Heron's iteration ``C <- (C + C^-1 A) / 2``, which
    doubles the number of right coefficients: O(p^2) in all.

    Args:
      num_bands: The number p of coefficients.
      workload_coef: Coefficients of A, by default all ones: prefix sums. ``workload_coef[0] > 0``;
        those from the p-th on do not matter, missing ones are zero.

    Returns:
      ``[p]`` array, with the dtype of :func:`pad_coefs_to_n`.

    Raises:
      ValueError: if ``workload_coef`` is not 1-D, empty or not finite, does not start with a
        positive number, or p < 1.
      TypeError: if p is not an integer, or the coefficients are not real.
    """
    p = check_int("num_bands", num_bands)
    if workload_coef is None:
        return optimal_max_error_noising_coefs(p)
    workload, _ = reconcile(workload_coef, p, name="workload_coef")
    workload = pad_coefs_to_n(workload, p)
    if not is_concrete(workload_coef):
        return _inverse_square_root(workload, ops.asked())
    if not workload[0] > 0:
        raise ValueError(f"expected workload_coef[0] > 0, found workload_coef[0] = {workload[0]}")
    with jax.enable_x64(True):
        coef = _inverse_square_root(workload.astype(jnp.float64), ops.asked())
        return coef.astype(workload.dtype)


@functools.partial(jax.jit, static_argnums=1)
def _inverse_square_root(coef: jax.Array, name: str | None) -> jax.Array:
    root = jnp.sqrt(coef[:1])
    while root.size < coef.size:
        size = min(2 * root.size, coef.size)
        root = jnp.pad(root, (0, size - root.size))
        root = (root + ops.toeplitz_solve(root, coef[:size], implementation=name)) / 2
    one = jnp.zeros_like(coef).at[0].set(1)
    return ops.toeplitz_solve(root, one, implementation=name)


def materialize_lower_triangular(coef: jax.Array, n: int | None = None) -> jax.Array:
    """Returns the n x n matrix C with ``C[i, j] = coef[i - j]``. O(n^2) time and memory.

    For instance, ``coef = [a, b]`` and ``n = 4`` give::

        [a 0 0 0]
        [b a 0 0]
        [0 b a 0]
        [0 0 b a]

    Args:
      coef: ``[b]`` coefficients.
      n: The size of the matrix, by default b.

    Returns:
      ``[n, n]`` array, with the dtype of :func:`pad_coefs_to_n`.

    Raises:
      ValueError: if ``coef`` is not 1-D, empty or not finite, or n < 1.
      TypeError: if n is not an integer, or ``coef`` is not real.
    """
    coef, n = reconcile(coef, n)
    check_memory("n", n, 8 * n * n)
    coef = pad_coefs_to_n(coef, n)
    row = jnp.arange(n)
    lag = row[:, None] - row[None, :]
    return jnp.where(lag >= 0, coef[lag], jnp.zeros((), coef.dtype))


# -- Algebra ----------------------------------------------------------------------------------


def solve_banded(coef: jax.Array, rhs: jax.Array) -> jax.Array:
    """Solves ``C x = rhs``, in float64, as accurately as forward substitution.

    O(n b) for each column of rhs; for one of a known C, n and b in the ten thousands or more,
    O(n log(n)^2).

    Args:
      coef: ``[b]`` coefficients of C, ``coef[0] != 0``.
      rhs: ``[n]`` or ``[n, ...]``, real; C is n x n.

    Returns:
      x, shaped like ``rhs``, of the dtype that both promote to, at least float32.

    Raises:
      ValueError: if ``coef`` is not 1-D, empty or not finite, ``coef[0] == 0``, or ``rhs`` has no
        axis or no rows.
      TypeError: if one is not real.
    """
    coef, _ = reconcile(coef, invertible=True)
    rhs = owned("rhs", rhs)
    if rhs.ndim == 0 or rhs.shape[0] == 0:
        raise ValueError(f"expected rhs of shape [n, ...], n >= 1, found shape {rhs.shape}")
    return solved(coef, check_real("rhs to hold real numbers", rhs))


def solved(coef: jax.Array, rhs: jax.Array) -> jax.Array:
    """x with ``C x = rhs``, of checked arguments."""
    if (
        rhs.ndim == 1
        and _long_solve.is_long(min(coef.size, rhs.size), rhs.size)
        and is_concrete((coef, rhs))
    ):
        x = _long_solve.solve(np.asarray(coef, np.float64), np.asarray(rhs, np.float64))
        return jnp.asarray(x, promote_types(promote_types(coef.dtype, rhs.dtype), jnp.float32))
    return ops.toeplitz_solve(coef, rhs)


def multiply(lhs_coef: jax.Array, rhs_coef: jax.Array, n: int | None = None) -> jax.Array:
    """Returns the coefficients of the product of two lower-triangular Toeplitz matrices.

    Each is a sum in float64, accurate relative to the sizes of its own terms.

    Args:
      lhs_coef: ``[b]`` coefficients.
      rhs_coef: ``[b']`` coefficients.
      n: The size of the matrices; by default the number of coefficients, the same of both.

    Returns:
      ``[n]`` array of the dtype that both promote to, at least float32.

    Raises:
      ValueError: if coefficients are not 1-D, empty or not finite, or n < 1, or n is None and the
        numbers of coefficients differ.
      TypeError: if n is not an integer, or coefficients are not real.
    """
    n = n if n is None else check_int("n", n)
    lhs, _ = reconcile(lhs_coef, n, name="lhs_coef")
    rhs, _ = reconcile(rhs_coef, n, name="rhs_coef")
    if n is None and lhs.size != rhs.size:
        raise ValueError(
            "lhs_coef and rhs_coef must have the same length: "
            "expected n, or as many coefficients in lhs_coef as in rhs_coef, "
            f"found {lhs.size} and {rhs.size}"
        )
    short, long = sorted((lhs, rhs), key=lambda coef: coef.size)
    return ops.toeplitz_multiply(short, jnp.pad(long, (0, (n or long.size) - long.size)))


def inverse_coef(coef: jax.Array, n: int | None = None) -> jax.Array:
    """Returns the coefficients of ``C^-1``, which is lower-triangular Toeplitz as well.

    O(n b), or O(n log(n)^2) for long ones, see :func:`solve_banded`. Entry t is as accurate as
    forward substitution in float64 makes it.

    Args:
      coef: ``[b]`` coefficients of C, ``coef[0] != 0``.
      n: The size of C, by default b.

    Returns:
      ``[n]`` array, with the dtype of :func:`pad_coefs_to_n`.

    Raises:
      ValueError: if ``coef`` is not 1-D, empty or not finite, ``coef[0] == 0``, or n < 1.
      TypeError: if n is not an integer, or ``coef`` is not real.
    """
    coef, n = reconcile(coef, n, invertible=True)
    return solved(coef, jnp.asarray(np.eye(1, n)[0], jnp.result_type(float)))


# -- Sensitivity ------------------------------------------------------------------------------


def sensitivity_squared(coef: jax.Array, n: int | None = None) -> jax.Array:
    """Returns the squared sensitivity of C for one participation: its largest column norm squared.

    Args:
      coef: ``[b]`` coefficients of C.
      n: The size of C, by default b.

    Returns:
      A scalar of the dtype of the coefficients, at least float32; rounded up, if they are known.

    Raises:
      ValueError: if ``coef`` is not 1-D, empty or not finite, or n < 1; or the result is outside of
        the range of the dtype. In a trace it is then NaN or infinite.
      TypeError: if n is not an integer, or ``coef`` is not real.
    """
    coef, _ = reconcile(coef, n)
    values, scale = scaled(coef)
    return _squared_sensitivity(norm_squared(values), scale, coef.dtype)


def _squared_sensitivity(x: Array, scale: Scale, dtype: np.dtype, power: int = 2) -> jax.Array:
    return restored("the squared sensitivity", x, dtype, (scale, power), upward=True)


def minsep_sensitivity_squared(
    strategy_coef: jax.Array,
    min_sep: int,
    *,
    n: int,
    max_participations: int | None = None,
) -> jax.Array:
    """Returns the squared sensitivity of C when a user may take part several times.

    For non-negative, non-increasing coefficients the worst user takes part in rounds
    ``0, min_sep, 2 min_sep, ...`` as often as allowed, and the result is exact: the squared norm of
    the sum of these columns (https://arxiv.org/abs/2405.13763, Theorem 2). So it is for one
    participation, and for at most ``min_sep`` coefficients of any kind, whose columns are
    orthogonal; in a trace only in float64. Other coefficients are first replaced by the least
    non-increasing sequence that is nowhere below their absolute values, and the result is an upper
    bound.

    Cost: O(n) time and memory. Only non-negative numbers are added, so no digits cancel.

    Args:
      strategy_coef: ``[b]`` coefficients of C.
      min_sep: Minimum separation: a user in rounds i < j has ``j - i >= min_sep``; 1 allows every
        round.
      n: The size of C, that is, the number of rounds.
      max_participations: The most rounds a user takes part in, or None for no limit.

    Returns:
      A scalar of the dtype of the coefficients, at least float32; rounded up, if they are known.

    Raises:
      ValueError: if ``strategy_coef`` is not 1-D, empty or not finite, or another argument is below
        1; or the result is outside of the range of the dtype. In a trace it is then NaN or
        infinite.
      TypeError: if n, ``min_sep`` or ``max_participations`` is not an integer, or the coefficients
        are not real.

    Warns:
      UserWarning: if there are more coefficients than steps between participations, known and not
        non-increasing, and the bound on the sensitivity may be more than 1 % too large.
    """
    coef, n = reconcile(strategy_coef, n, name="strategy_coef")
    values, scale = scaled(coef)
    norm = min_sep_norm(values, n, min_sep, max_participations)
    if isinstance(values, np.ndarray):
        _warn_of_a_loose_bound(values, float(norm), n, min_sep, max_participations)
    return _squared_sensitivity(norm, scale, coef.dtype)


def min_sep_norm(coef: Array, n: int, min_sep: int, max_participations: int | None) -> jax.Array:
    min_sep, k = _pattern(n, min_sep, max_participations)
    with in_float64(isinstance(coef, np.ndarray)):
        c = jnp.asarray(coef)
        # In float64: a sum in float32 might be lower by its rounding.
        if c.dtype == jnp.float64 and (k == 1 or _bands(coef) <= min_sep):
            # Columns are orthogonal, and the first are not cut off.
            last = np.minimum(n - 1 - min_sep * np.arange(k), c.size - 1)
            return jnp.cumsum(c * c)[last].sum()
        return ops.min_sep_norm(c, n=n, min_sep=min_sep, max_participations=k)


def _pattern(n: int, min_sep: int, max_participations: int | None) -> tuple[int, int]:
    """``min_sep`` and the most participations; beyond n all separations mean one of them."""
    min_sep = min(check_int("min_sep", min_sep), n)
    return min_sep, sensitivity.participations(n, min_sep, max_participations)


def _bands(coef: Array) -> int:
    return np.trim_zeros(coef, "b").size if isinstance(coef, np.ndarray) else coef.size


_LOOSE = 1.01  # the ratio of a bound on a sensitivity to what it may be, from which on to tell


def _warn_of_a_loose_bound(
    coef: np.ndarray, bound: float, n: int, min_sep: int, max_participations: int | None
) -> None:
    """Of a squared sensitivity, where coefficients overlap and are not ordered."""
    min_sep, k = _pattern(n, min_sep, max_participations)
    if k == 1 or _bands(coef) <= min_sep or _is_ordered(np.abs(coef)):
        return
    # By a participation every min_sep steps. Some signs make of the columns at least what they
    # would make if they were orthogonal; besides, signs that are all the same, or alternate.
    first = np.zeros(n)
    first[: coef.size] = coef
    attained = float(np.cumsum(first**2)[n - 1 :: -min_sep][:k].sum())
    for sign in (1, -1):
        total = np.zeros(-(-n // min_sep) * min_sep)
        total[:n] = first
        rows = total.reshape(-1, min_sep)
        signs = float(sign) ** np.arange(len(rows))[:, None]
        sums = np.cumsum(rows * signs, axis=0)
        sums[k:] -= sums[:-k].copy()
        attained = max(attained, float(np.sum(sums.reshape(-1)[:n] ** 2)))
    looseness = math.sqrt(bound / attained)
    if looseness > _LOOSE:
        warnings.warn(
            f"the bound on the sensitivity may be up to {100 * (looseness - 1):.3g} % too large: "
            f"{_bands(coef)} coefficients overlap for min_sep={min_sep}, and are not ordered. "
            "sensitivity.get_min_sep_sensitivity_upper_bound of the matrix may be tighter; "
            "toeplitz.optimize_banded_toeplitz(..., min_sep=...) optimizes for it.",
            stacklevel=3,
        )


_MOST_ROWS = 2048  # of a matrix that a bound is computed for unasked: a second


def _is_ordered(coef: np.ndarray | jax.Array) -> bool:
    """Whether coefficients are non-negative and non-increasing, so that sensitivities are exact."""
    values = np.asarray(coef)
    return bool(values[-1] >= 0 and np.all(np.diff(values) <= 0))


def compute_banded_inverse_sensitivity_squared(
    n: int,
    noising_coef: jax.Array,
    min_sep: int,
    max_participations: int | None = None,
    use_matrix_upper_bound: bool | None = None,
) -> jax.Array:
    """Returns the squared sensitivity of C, given the coefficients of its inverse.

    The coefficients of C follow by :func:`inverse_coef`. If they are non-negative and
    non-increasing, the result is exact. Otherwise it is the least of two upper bounds:

    * that of :func:`minsep_sensitivity_squared`, for the least non-increasing sequence above their
      absolute values: O(n), differentiable;
    * that of `sensitivity.get_min_sep_sensitivity_upper_bound`, for the matrix of absolute values:
      O(n^2) memory, O(n^3) time, where coefficients are known and n is at most 2,048.

    What rounding may have taken from the coefficients of C is added to them. Where that would be
    more than 1e-10 of the largest, and values are known, as many digits as it takes are computed
    with: O(n p), at about a million terms a second. In a trace the result is infinite where half of
    it may be missing.

    Args:
      n: The size of C, that is, the number of rounds.
      noising_coef: ``[p]`` coefficients of ``C^-1``, ``noising_coef[0] != 0``.
      min_sep: Minimum separation of a user's participations; 1 allows every round.
      max_participations: The most rounds a user takes part in, or None for no limit.
      use_matrix_upper_bound: Whether to take the second bound too. True does so for any n, not to
        be traced or differentiated; None does so where it can be tighter, see above.

    Returns:
      A scalar, with the dtype of :func:`pad_coefs_to_n`; rounded up, if coefficients are known.

    Raises:
      ValueError: if ``noising_coef`` is not 1-D, empty or not finite, ``noising_coef[0] == 0``, or
        another argument is below 1; the result is outside of the range of the dtype, or cannot be
        bounded (see above).
      TypeError: if n, ``min_sep`` or ``max_participations`` is not an integer, or the coefficients
        are not real.
    """
    coef, n = reconcile(noising_coef, n, name="noising_coef", invertible=True)
    dtype = promote_types(coef.dtype, jnp.result_type(float))
    C, scale = bounded_inverse(coef, n)
    bound = min_sep_norm(C, n, min_sep, max_participations)
    if use_matrix_upper_bound is None:
        known = isinstance(C, np.ndarray)
        use_matrix_upper_bound = known and n <= _MOST_ROWS and not _is_ordered(C)
    if use_matrix_upper_bound:
        with in_float64(isinstance(C, np.ndarray)):
            matrix = materialize_lower_triangular(jnp.abs(jnp.asarray(C)))
            of_matrix = sensitivity.get_min_sep_sensitivity_upper_bound(
                matrix, min_sep, max_participations
            )
            # The root was rounded, and so is its square.
            bound = jnp.minimum(bound, of_matrix**2 * (1 + 2.0**-50))
    return _squared_sensitivity(bound, scale, dtype, power=-2)
