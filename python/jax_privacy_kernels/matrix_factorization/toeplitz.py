"""Lower-triangular Toeplitz strategies, given by their first column.

A strategy C is described by its coefficients ``c = C[:b, 0]``: entry (i, j) of C is ``c_{i-j}``,
and 0 for i < j and for i - j >= b, so b is the number of bands. Functions work on the
coefficients, which takes far less time and memory than the n x n matrix.

Every function accepts coefficients as a JAX array, a NumPy array or a list, of floats or integers,
and checks that they are 1-D, non-empty and finite. Given a size n, coefficients from the n-th on
are dropped, as they lie outside of C. Inside a trace values are not checked, shapes are.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jax_privacy_kernels import ops
from jax_privacy_kernels._checks import (
    check_coef,
    check_int,
    check_one_given,
    check_real,
    is_concrete,
)
from jax_privacy_kernels.matrix_factorization import _amplification, optimization, sensitivity
from jax_privacy_kernels.matrix_factorization.streaming_matrix import (
    StreamingMatrix,
    scale_rows_and_columns,
)
from jax_privacy_kernels.ops.correlated_noise._matrices import BandedRecurrence, MovingAverage

__all__ = [
    "banded_inverse_square_root_noising_coefs",
    "compute_banded_inverse_sensitivity_squared",
    "inverse_as_streaming_matrix",
    "inverse_coef",
    "loss",
    "materialize_lower_triangular",
    "minsep_sensitivity_squared",
    "multiply",
    "noising_coef_as_streaming_matrix",
    "optimal_max_error_noising_coefs",
    "optimal_max_error_strategy_coefs",
    "optimize_banded_inverse_toeplitz",
    "optimize_banded_toeplitz",
    "optimize_coefs_for_amplifications",
    "pad_coefs_to_n",
    "per_query_error",
    "sensitivity_squared",
    "solve_banded",
]

# -- Coefficients -----------------------------------------------------------------------------


def _reconcile(
    coef: Any, n: int | None = None, *, name: str = "coef", invertible: bool = False
) -> tuple[jax.Array, int]:
    """Returns at most n checked coefficients, and n (by default their number).

    Coefficients of 16 bits become float32: what is computed from them takes more digits.
    """
    coef = check_coef(name, coef, invertible=invertible)
    n = coef.size if n is None else check_int("n", n)
    coef = coef if coef.size <= n else coef[:n]
    return coef.astype(jnp.promote_types(coef.dtype, jnp.float32)), n


def _at_least_default(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.result_type(float)))


def _norm_squared(x: jax.Array) -> jax.Array:
    # Not vdot: that adds up one by one on some platforms (0.02 % off for 40,000 float32 terms) and
    # rounds the factors on others.
    return jnp.sum(x * x)


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
    coef, n = _reconcile(coef, n)
    return _at_least_default(jnp.pad(coef, (0, n - coef.size)))


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
    return jnp.asarray(_sqrt_prefix_sum(check_int("n", n)), jnp.result_type(float))


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
    c = _sqrt_prefix_sum(check_int("n", n))
    return jnp.asarray(c / (1 - 2 * np.arange(n)), jnp.result_type(float))


def _sqrt_prefix_sum(n: int) -> np.ndarray:
    k = np.arange(1, n)
    return np.cumprod(np.concatenate([[1.0], (2 * k - 1) / (2 * k)]))


# -- Matrices ---------------------------------------------------------------------------------


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
    coef = pad_coefs_to_n(coef, n)
    lag = jnp.arange(coef.size)[:, None] - jnp.arange(coef.size)
    return jnp.where(lag >= 0, coef[lag], 0)


def inverse_as_streaming_matrix(
    coef: jax.Array, column_normalize_for_n: int | None = None
) -> StreamingMatrix:
    """Returns the noising matrix ``C^-1`` of a banded Toeplitz strategy C.

    Row t of ``x = C^-1 z`` is ``x_t = (z_t - sum_{l=1}^{b-1} c_l x_{t-l}) / c_0``: Algorithm 9 of
    https://arxiv.org/abs/2306.08153. The state holds ``x_{t-1} .. x_{t-b+1}``, newest first: an
    array ``(b - 1,) + shape`` for each leaf, of the dtype that the leaf and ``coef`` promote to.

    With ``column_normalize_for_n = n`` the strategy is instead n x n, and each of its columns is
    scaled to unit norm (columns near the end have fewer than b entries, so would have less than
    the others). Row t of ``C^-1`` is then scaled by the norm of column t. Use it when n is known.

    Privacy: C has b = ``coef.size`` bands. Its columns have L2 norm at most ``||coef||``, or
    exactly 1 if normalized.

    Args:
      coef: ``[b]`` coefficients of C, ``coef[0] != 0``.
      column_normalize_for_n: None, or the size n of a column-normalized C. ``coef`` should then
        have norm 1, so that scaling the columns does not change the sensitivity of C.

    Returns:
      ``C^-1``, with the structure that fused kernels look for.

    Raises:
      ValueError: if ``coef`` is not 1-D, empty or not finite, ``coef[0] == 0``, or n < 1.
      TypeError: if n is not an integer, or ``coef`` is not real.

    Warns:
      UserWarning: if columns are normalized and the norm of ``coef`` is not 1 (to 0.1 %, or to the
        precision of its dtype).
    """
    c = check_coef("coef", coef, invertible=True)
    n = column_normalize_for_n
    if n is not None:
        n = check_int("column_normalize_for_n", n)
        c = c[:n]
        if is_concrete(coef):
            norm = float(np.linalg.norm(np.asarray(coef, np.float64)[:n]))
            if abs(norm - 1) > max(1e-3, float(jnp.finfo(c.dtype).eps)):
                warnings.warn(
                    "column_normalize_for_n scales every column of C to norm 1, so the sensitivity "
                    f"of C is that of unit columns and not of ||coef|| = {norm:.6g}. Pass "
                    "coef / ||coef|| to keep both the same.",
                    stacklevel=2,
                )
    bands = c.size

    def init_multiply(abstract_value: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
        dtype = jnp.promote_types(abstract_value.dtype, c.dtype)
        # zeros_like keeps the sharding of the value, zeros would not.
        zero = jnp.zeros_like(abstract_value, dtype=dtype)
        return jnp.broadcast_to(zero, (bands - 1, *zero.shape))

    def multiply_next(z: jax.Array, history: jax.Array) -> tuple[jax.Array, jax.Array]:
        if bands == 1:
            return z / c[0], history
        x = (z - jnp.tensordot(c[1:], history, axes=1, precision="highest")) / c[0]
        return x, jnp.concatenate([x[None].astype(history.dtype), history[:-1]])

    Cinv = StreamingMatrix.from_array_implementation(
        init_multiply, multiply_next, structure=BandedRecurrence(coef=c)
    )
    return Cinv if n is None else scale_rows_and_columns(Cinv, row_scale=_column_norms(c, n))


def noising_coef_as_streaming_matrix(
    noising_coef: jax.Array, *, look_ahead: int | None = None
) -> StreamingMatrix:
    """Returns the noising matrix ``C^-1`` that is itself banded Toeplitz.

    Row t of ``x = C^-1 z`` is ``x_t = sum_{l=0}^{p-1} w_l z_{t-l}``. Such matrices are those of the
    banded inverse square root (:func:`banded_inverse_square_root_noising_coefs`,
    https://arxiv.org/abs/2505.12128) and of BandInvMF (:func:`optimize_banded_inverse_toeplitz`).
    With two coefficients ``(1, -lambda)`` it is the noise of DP-lambda-CGD
    (https://arxiv.org/abs/2601.22334), which takes no more memory than independent noise.

    A privatizer need not keep the samples of the past, for it can make them again from their keys:
    it keeps k terms to come for every parameter, and draws (k + p - 1) / k samples for each at
    every step. Without look-ahead, k = 0, it keeps nothing and draws p samples.

    As a :class:`StreamingMatrix`, apart from privatizers, it keeps ``z_{t-1} .. z_{t-p+1}``, newest
    first: an array ``(p - 1,) + shape`` for each leaf.

    Args:
      noising_coef: ``[p]`` coefficients w of ``C^-1``, ``w_0 != 0``.
      look_ahead: k, by default p - 1. A look-ahead of 1 saves nothing over 0.

    Returns:
      ``C^-1``, with the structure that fused kernels look for. The sensitivity of C is that of
      :func:`compute_banded_inverse_sensitivity_squared`.

    Raises:
      ValueError: if the coefficients are not 1-D, empty or not finite, the first is 0, or k < 0.
      TypeError: if k is not an integer, or the coefficients are not real.
    """
    w = check_coef("noising_coef", noising_coef, invertible=True)
    p = w.size
    slots = p - 1 if look_ahead is None else check_int("look_ahead", look_ahead, minimum=0)

    def init_multiply(abstract_value: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
        dtype = jnp.promote_types(abstract_value.dtype, w.dtype)
        zero = jnp.zeros_like(abstract_value, dtype=dtype)  # keeps the sharding of the value
        return jnp.broadcast_to(zero, (p - 1, *zero.shape))

    def multiply_next(z: jax.Array, history: jax.Array) -> tuple[jax.Array, jax.Array]:
        if p == 1:
            return w[0] * z, history
        x = w[0] * z + jnp.tensordot(w[1:], history, axes=1, precision="highest")
        return x, jnp.concatenate([z[None].astype(history.dtype), history[:-1]])

    return StreamingMatrix.from_array_implementation(
        init_multiply, multiply_next, structure=MovingAverage(w, slots)
    )


def _column_norms(coef: jax.Array, n: int) -> jax.Array:
    """Returns the column norms ``[n]`` of C: column t holds the first n - t coefficients."""
    wide = coef.astype(jnp.promote_types(coef.dtype, jnp.float32))  # also of the result
    norms = jnp.sqrt(jnp.cumsum(wide * wide))
    return jnp.pad(norms, (0, n - coef.size), mode="edge")[::-1]


# -- Algebra ----------------------------------------------------------------------------------


def solve_banded(coef: jax.Array, rhs: jax.Array) -> jax.Array:
    """Solves ``C x = rhs``, by forward substitution in float64. O(n b) for each column of rhs.

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
    coef, _ = _reconcile(coef, invertible=True)
    rhs = jnp.asarray(rhs)
    if rhs.ndim == 0 or rhs.shape[0] == 0:
        raise ValueError(f"expected rhs of shape [n, ...], n >= 1, found shape {rhs.shape}")
    return ops.toeplitz_solve(coef, check_real("rhs to hold real numbers", rhs))


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
    lhs, _ = _reconcile(lhs_coef, n, name="lhs_coef")
    rhs, _ = _reconcile(rhs_coef, n, name="rhs_coef")
    if n is None and lhs.size != rhs.size:
        raise ValueError(
            "expected n, or as many coefficients in lhs_coef as in rhs_coef, "
            f"found {lhs.size} and {rhs.size}"
        )
    short, long = sorted((lhs, rhs), key=lambda coef: coef.size)
    return ops.toeplitz_multiply(short, jnp.pad(long, (0, (n or long.size) - long.size)))


def inverse_coef(coef: jax.Array, n: int | None = None) -> jax.Array:
    """Returns the coefficients of ``C^-1``, which is lower-triangular Toeplitz as well.

    O(n b). Entry t is as accurate as forward substitution in float64 makes it.

    Args:
      coef: ``[b]`` coefficients of C, ``coef[0] != 0``.
      n: The size of C, by default b.

    Returns:
      ``[n]`` array, with the dtype of :func:`pad_coefs_to_n`.

    Raises:
      ValueError: if ``coef`` is not 1-D, empty or not finite, ``coef[0] == 0``, or n < 1.
      TypeError: if n is not an integer, or ``coef`` is not real.
    """
    coef, n = _reconcile(coef, n, invertible=True)
    return ops.toeplitz_solve(coef, jnp.asarray(np.eye(1, n)[0], jnp.result_type(float)))


# -- Sensitivity ------------------------------------------------------------------------------


def sensitivity_squared(coef: jax.Array, n: int | None = None) -> jax.Array:
    """Returns the squared sensitivity of C for one participation: its largest column norm squared.

    Args:
      coef: ``[b]`` coefficients of C.
      n: The size of C, by default b.

    Returns:
      A scalar of the dtype of the coefficients, at least float32.

    Raises:
      ValueError: if ``coef`` is not 1-D, empty or not finite, or n < 1.
      TypeError: if n is not an integer, or ``coef`` is not real.
    """
    return _norm_squared(_reconcile(coef, n)[0])


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
    the sum of these columns (https://arxiv.org/abs/2405.13763, Theorem 2). Other coefficients are
    first replaced by the least such sequence that is nowhere below their absolute values, and the
    result is an upper bound.

    Cost: O(n) time and memory. Only non-negative numbers are added, so no digits cancel.

    Args:
      strategy_coef: ``[b]`` coefficients of C.
      min_sep: Minimum separation: a user in rounds i < j has ``j - i >= min_sep``; 1 allows every
        round.
      n: The size of C, that is, the number of rounds.
      max_participations: The most rounds a user takes part in, or None for no limit.

    Returns:
      A scalar of the dtype of the coefficients, at least float32.

    Raises:
      ValueError: if ``strategy_coef`` is not 1-D, empty or not finite, or another argument is below
        1.
      TypeError: if n, ``min_sep`` or ``max_participations`` is not an integer, or the coefficients
        are not real.
    """
    coef, n = _reconcile(strategy_coef, n, name="strategy_coef")
    # Beyond n all separations mean one participation.
    min_sep = min(check_int("min_sep", min_sep), n)
    k = sensitivity.participations(n, min_sep, max_participations)
    return ops.min_sep_norm(coef, n=n, min_sep=min_sep, max_participations=k)


def compute_banded_inverse_sensitivity_squared(
    n: int,
    noising_coef: jax.Array,
    min_sep: int,
    max_participations: int | None = None,
    use_matrix_upper_bound: bool = False,
) -> jax.Array:
    """Returns the squared sensitivity of C, given the coefficients of its inverse.

    The coefficients of C follow by :func:`inverse_coef`. If they are non-negative and
    non-increasing, the result is exact. Otherwise it is an upper bound:

    * that of :func:`minsep_sensitivity_squared`, for the least non-increasing sequence above their
      absolute values: O(n), differentiable;
    * with ``use_matrix_upper_bound``, also that of
      `sensitivity.get_min_sep_sensitivity_upper_bound`, for the matrix of absolute values, if it is
      smaller: O(n^2) memory, not to be traced or differentiated.

    Args:
      n: The size of C, that is, the number of rounds.
      noising_coef: ``[p]`` coefficients of ``C^-1``, ``noising_coef[0] != 0``.
      min_sep: Minimum separation of a user's participations; 1 allows every round.
      max_participations: The most rounds a user takes part in, or None for no limit.
      use_matrix_upper_bound: Whether to take the second bound too.

    Returns:
      A scalar, with the dtype of :func:`pad_coefs_to_n`.

    Raises:
      ValueError: if ``noising_coef`` is not 1-D, empty or not finite, ``noising_coef[0] == 0``, or
        another argument is below 1.
      TypeError: if n, ``min_sep`` or ``max_participations`` is not an integer, or the coefficients
        are not real.
    """
    coef, n = _reconcile(noising_coef, n, name="noising_coef", invertible=True)
    strategy_coef = inverse_coef(coef, n)
    bound = minsep_sensitivity_squared(
        strategy_coef, min_sep, n=n, max_participations=max_participations
    )
    if not use_matrix_upper_bound:
        return bound
    C = materialize_lower_triangular(jnp.abs(strategy_coef), n)
    of_matrix = sensitivity.get_min_sep_sensitivity_upper_bound(C, min_sep, max_participations)
    return jnp.minimum(bound, of_matrix**2)


# -- Error ------------------------------------------------------------------------------------


def per_query_error(
    *,
    strategy_coef: jax.Array | None = None,
    noising_coef: jax.Array | None = None,
    n: int | None = None,
    workload_coef: jax.Array | None = None,
) -> jax.Array:
    """Returns the expected squared error of every query, for independent noise of variance 1.

    With workload A, it is the squared norm of every row of ``B = A C^-1``. B is lower-triangular
    Toeplitz, so the errors never decrease: the maximum is the last. O(n b) with b bands of C or of
    ``C^-1``.

    Args:
      strategy_coef: ``[b]`` coefficients of C, ``strategy_coef[0] != 0``; or
      noising_coef: ``[b]`` coefficients of ``C^-1``. Exactly one of the two.
      n: The size of the matrices, by default the number of coefficients given.
      workload_coef: Coefficients of A, by default n ones: prefix sums. Those from the n-th on are
        ignored; missing ones are zero.

    Returns:
      ``[n]`` array, with the dtype of :func:`pad_coefs_to_n`.

    Raises:
      ValueError: if not exactly one of C and ``C^-1`` is given, coefficients are not 1-D, empty or
        not finite, ``strategy_coef[0] == 0``, or n < 1.
      TypeError: if n is not an integer, or coefficients are not real.
    """
    check_one_given(strategy_coef=strategy_coef, noising_coef=noising_coef)
    if strategy_coef is not None:
        coef, n = _reconcile(strategy_coef, n, name="strategy_coef", invertible=True)
    else:
        coef, n = _reconcile(noising_coef, n, name="noising_coef")
    if workload_coef is None:
        A = jnp.ones(n)
    else:
        workload, _ = _reconcile(workload_coef, n, name="workload_coef")
        A = pad_coefs_to_n(workload, n)
    if strategy_coef is not None:
        B = ops.toeplitz_solve(coef, A)
    elif workload_coef is None:
        B = _cumsum(pad_coefs_to_n(coef, n))
    else:
        B = multiply(coef, A, n)
    return _cumsum(B * B)


def _cumsum(x: jax.Array) -> jax.Array:
    # Differences undone: in float64, and as fast as anything on CPUs.
    return ops.toeplitz_solve(jnp.array([1, -1], x.dtype), x)


def loss(
    strategy_coef: jax.Array,
    n: int | None = None,
    reduction_fn: Callable[[jax.Array], jax.Array] = jnp.mean,
) -> jax.Array:
    """Returns error times squared sensitivity of C: for prefix sums, and one participation.

    See https://arxiv.org/abs/2405.15913. It does not change if C is multiplied by a number.

    Args:
      strategy_coef: ``[b]`` coefficients of C, ``strategy_coef[0] != 0``.
      n: The size of C, by default b.
      reduction_fn: Makes a scalar of the errors ``[n]`` of the queries: `jax.numpy.mean`,
        `jax.numpy.max`, ``lambda v: v[-1]``.

    Returns:
      A scalar, with the dtype of :func:`pad_coefs_to_n`.

    Raises:
      ValueError: if ``strategy_coef`` is not 1-D, empty or not finite, ``strategy_coef[0] == 0``,
        or n < 1.
      TypeError: if n is not an integer, or the coefficients are not real.
    """
    coef, n = _reconcile(strategy_coef, n, name="strategy_coef", invertible=True)
    error = _reduction(reduction_fn)(per_query_error(strategy_coef=coef, n=n))
    return error * _norm_squared(coef)


def _reduction(reduction_fn: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """The same function of errors that never decrease, with a gradient in the last one only."""
    return _last if reduction_fn is jnp.max else reduction_fn


def _last(errors: jax.Array) -> jax.Array:
    return errors[-1]


# -- Optimization -----------------------------------------------------------------------------


def optimize_banded_toeplitz(
    n: int,
    bands: int,
    strategy_coef: jax.Array | None = None,
    max_optimizer_steps: int = 250,
    reduction_fn: Callable[[jax.Array], jax.Array] = jnp.mean,
) -> jax.Array:
    """Minimizes :func:`loss` over the strategies C of b bands.

    The result is optimal for one participation, and for any number of them at least b steps apart
    (https://arxiv.org/abs/2306.08153). For less separation, compute the sensitivity afterwards with
    :func:`minsep_sensitivity_squared`.

    About 20 steps of O(n b) in float64, in one compiled loop. It is compiled once per n, b and
    ``reduction_fn``: pass the same function, not a new lambda.

    Args:
      n: The size of C, that is, the number of steps of the workload.
      bands: The number b of coefficients.
      strategy_coef: ``[b]`` coefficients to start from, by default
        :func:`optimal_max_error_strategy_coefs`.
      max_optimizer_steps: The most steps of L-BFGS.
      reduction_fn: As for :func:`loss`.

    Returns:
      ``[b]`` coefficients of L2 norm 1, of the dtype of ``strategy_coef`` or the default.

    Raises:
      ValueError: if ``strategy_coef`` does not have b finite entries, or starts with 0, or n or b
        is below 1, or ``max_optimizer_steps`` below 0.
      TypeError: if one of those is not an integer, or the coefficients are not real.
    """
    n, bands = check_int("n", n), check_int("bands", bands)
    if strategy_coef is None:
        dtype = jnp.dtype(jnp.result_type(float))
        init = _sqrt_prefix_sum(bands)
    else:
        coef, _ = _reconcile(strategy_coef, name="strategy_coef", invertible=True)
        if coef.size != bands:
            raise ValueError(f"expected strategy_coef of shape ({bands},), found {coef.shape}")
        dtype = coef.dtype
        init = np.array(coef, np.float64)
    init[n:] = 0  # outside of C: they change no loss, and should not count in the norm
    with jax.enable_x64(True):
        coef = optimization.optimize(
            _banded_loss(n, _reduction(reduction_fn)),
            jnp.asarray(init),
            max_optimizer_steps=max_optimizer_steps,
        )
        return (coef / jnp.linalg.norm(coef)).astype(dtype)


@optimization.compiled_once
def _banded_loss(
    n: int, reduction_fn: Callable[[jax.Array], jax.Array]
) -> Callable[[jax.Array], jax.Array]:
    return lambda coef: loss(coef, n, reduction_fn)


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
    workload, _ = _reconcile(workload_coef, p, name="workload_coef")
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


def optimize_banded_inverse_toeplitz(
    n: int,
    min_sep: int,
    num_bands: int,
    *,
    noising_coef: jax.Array | None = None,
    strategy_coef: jax.Array | None = None,
    workload_coef: jax.Array | None = None,
    max_participations: int | None = None,
    max_optimizer_steps: int = 1000,
    reduction_fn: Callable[[jax.Array], jax.Array] = jnp.mean,
) -> jax.Array:
    """Minimizes error times squared sensitivity over noising matrices ``C^-1`` of p bands.

    BandInvMF, of https://arxiv.org/abs/2505.12128. The sensitivity is that of
    :func:`compute_banded_inverse_sensitivity_squared`. Steps of O(n p) in float64, in one compiled
    loop. It is compiled once per shape, workload and ``reduction_fn``: pass the same function, not
    a new lambda.

    Args:
      n: The number of steps of the workload.
      min_sep: Minimum separation of a user's participations.
      num_bands: The number p of coefficients.
      noising_coef: Coefficients of ``C^-1`` to start from, cut off or filled with zeros to p; by
        default those of ``strategy_coef`` if that is given, otherwise
        :func:`banded_inverse_square_root_noising_coefs`.
      strategy_coef: Coefficients of the C to start from.
      workload_coef: ``[n]`` coefficients of the workload, by default ones: prefix sums.
      max_participations: The most rounds a user takes part in, or None for no limit.
      max_optimizer_steps: The most steps of L-BFGS.
      reduction_fn: Makes a scalar of the errors ``[n]`` of the queries: `jax.numpy.mean`,
        `jax.numpy.max`, ``lambda v: v[-1]``.

    Returns:
      ``[p]`` coefficients of ``C^-1``, the first of them 1, of the dtype of the coefficients given
      to start from or the default.

    Raises:
      ValueError: if ``workload_coef`` does not have shape [n], coefficients are not 1-D, empty or
        not finite, those to start from begin with 0, or an argument is out of range.
      TypeError: if an integer argument is not one, or coefficients are not real.
    """
    n, p = check_int("n", n), check_int("num_bands", num_bands)
    min_sep = check_int("min_sep", min_sep)
    if max_participations is not None:
        max_participations = check_int("max_participations", max_participations)
    strategy, init, dtype = None, None, jnp.dtype(jnp.result_type(float))
    if noising_coef is not None:
        init, _ = _reconcile(noising_coef, p, name="noising_coef", invertible=True)
        dtype = init.dtype
    elif strategy_coef is not None:
        strategy, _ = _reconcile(strategy_coef, name="strategy_coef", invertible=True)
        dtype = strategy.dtype
    with jax.enable_x64(True):
        workload = None
        if workload_coef is not None:
            A, _ = _reconcile(workload_coef, name="workload_coef")
            if A.size != n:
                raise ValueError(f"expected workload_coef of shape ({n},), found ({A.size},)")
            workload = np.asarray(A, np.float64)
        if strategy is not None:
            init = inverse_coef(strategy.astype(jnp.float64), p)
        elif init is None:
            init = banded_inverse_square_root_noising_coefs(p, workload)
        coef = optimization.optimize(
            _banded_inverse_loss(
                n,
                min_sep,
                max_participations,
                None if workload is None else workload.tobytes(),
                _reduction(reduction_fn),
            ),
            pad_coefs_to_n(init, p),
            max_optimizer_steps=max_optimizer_steps,
        )
    values = np.asarray(coef)
    return jnp.asarray(values / values[0], dtype)


@optimization.compiled_once
def _banded_inverse_loss(
    n: int,
    min_sep: int,
    max_participations: int | None,
    workload: bytes | None,
    reduction_fn: Callable[[jax.Array], jax.Array],
) -> Callable[[jax.Array], jax.Array]:
    A: Any = None if workload is None else np.frombuffer(workload)

    def loss_fn(coef: jax.Array) -> jax.Array:
        error = reduction_fn(per_query_error(noising_coef=coef, n=n, workload_coef=A))
        sensitivity_squared = compute_banded_inverse_sensitivity_squared(
            n, coef, min_sep, max_participations
        )
        return error * sensitivity_squared

    return loss_fn


def _progress_bar(iterable: Iterable[Any]) -> Iterable[Any]:
    """Shows itself on a terminal, after two seconds."""
    return tqdm(iterable, desc="optimizing bands", delay=2, disable=None, leave=False)


def optimize_coefs_for_amplifications(
    n: int,
    *,
    dataset_size: int,
    expected_batch_size: int,
    epsilon: float,
    delta: float,
    max_optimizer_steps: int = 250,
    reduction_fn: Callable[[jax.Array], jax.Array] = jnp.mean,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = _progress_bar,
) -> tuple[jax.Array, float]:
    """Chooses bands and coefficients of the least error at a privacy target, with amplification.

    Sampling is block-cyclic Poisson sampling (Algorithm 2 and Theorem 4 of
    https://arxiv.org/abs/2306.08153): the data are cut into b parts, and step t samples from part t
    mod b. More bands correlate noise better, fewer amplify privacy more. Candidates are the b that
    divide ``dataset_size`` and leave parts of at least a batch, up to the first of n or more; each
    is optimized by :func:`optimize_banded_toeplitz`. dp-accounting's RDP accountant, for adding or
    removing one example, gives the noise multiplier of the candidates that may still win.

    Args:
      n: The number of steps of the workload.
      dataset_size: The number of examples.
      expected_batch_size: The expected number of examples in a step.
      epsilon: The privacy target is (epsilon, delta)-DP; positive and finite.
      delta: Strictly between 0 and 1.
      max_optimizer_steps: The most steps of L-BFGS for each b.
      reduction_fn: As for :func:`loss`.
      progress: Wraps the list of candidates while they are optimized, as `tqdm.tqdm` does; by
        default a progress bar, if it takes longer than two seconds and there is a terminal. None
        shows nothing.

    Returns:
      coef: ``[b]`` coefficients of L2 norm 1, of the default float dtype; b is the number of bands
        chosen.
      stddev: standard deviation of the independent noise to privatize sums of examples with, if
        each is clipped to norm 1. The sensitivity of C is part of it.

    Raises:
      ValueError: if an argument is out of range, ``expected_batch_size > dataset_size``, or no
        noise reaches the target.
      TypeError: if an integer argument is not one.
    """
    target = _amplification.Target(n, dataset_size, expected_batch_size, epsilon, delta)
    coefs, errors = {}, {}
    bands = target.candidates()
    with jax.enable_x64(True):
        for b in progress(bands) if progress else bands:
            coefs[b], error_squared = _optimize_few_bands(
                target.n, b, max_optimizer_steps, _reduction(reduction_fn)
            )
            errors[b] = error_squared**0.5
    b, noise_multiplier = target.best(errors)
    coef = jnp.asarray(coefs[b] / np.linalg.norm(coefs[b]), jnp.result_type(float))
    # Of the coefficients as they are given out, rounded.
    norm = float(np.linalg.norm(np.asarray(coef, np.float64)))
    return coef, noise_multiplier * norm


def _optimize_few_bands(
    n: int, b: int, steps: int, reduction_fn: Callable[[jax.Array], jax.Array]
) -> tuple[np.ndarray, float]:
    """Optimized coefficients ``[b]`` and their loss, without compiling for every b anew."""
    free = min(b, n)
    size = 128
    while size < free:
        size *= 4
    size = min(size, n)
    loss_fn = _masked_loss(n, reduction_fn)
    coef = np.zeros(size)
    coef[:free] = _sqrt_prefix_sum(free)
    params = {"coef": jnp.asarray(coef), "mask": jnp.asarray(coef != 0)}
    params = optimization.optimize(loss_fn, params, max_optimizer_steps=steps)
    error = loss(params["coef"], n, reduction_fn)
    result = np.zeros(b)
    result[:free] = np.asarray(params["coef"])[:free]
    return result, float(error)


@optimization.compiled_once
def _masked_loss(
    n: int, reduction_fn: Callable[[jax.Array], jax.Array]
) -> Callable[[dict[str, jax.Array]], jax.Array]:
    """The loss of the coefficients that a mask of ones and zeros lets through."""

    def loss_fn(params: dict[str, jax.Array]) -> jax.Array:
        return loss(params["coef"] * jax.lax.stop_gradient(params["mask"]), n, reduction_fn)

    return loss_fn
