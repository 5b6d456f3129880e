"""Lower-triangular Toeplitz strategies, given by their first column.

A strategy C is described by its coefficients ``c = C[:b, 0]``: entry (i, j) of C is ``c_{i-j}``,
and 0 for i < j and for i - j >= b, so b is the number of bands. Functions work on the
coefficients, which takes far less time and memory than the n x n matrix.

Every function accepts coefficients as a JAX array, a NumPy array or a list, of floats or integers,
and checks that they are 1-D, non-empty and finite. Given a size n, coefficients from the n-th on
are dropped, as they lie outside of C. Inside a trace values are not checked, shapes are.
"""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels._checks import check_coef, check_int, is_concrete
from jax_privacy_kernels.matrix_factorization import sensitivity
from jax_privacy_kernels.matrix_factorization.streaming_matrix import (
    StreamingMatrix,
    scale_rows_and_columns,
)
from jax_privacy_kernels.ops._recurrence import BandedRecurrence

__all__ = [
    "inverse_as_streaming_matrix",
    "materialize_lower_triangular",
    "minsep_sensitivity_squared",
    "optimal_max_error_noising_coefs",
    "optimal_max_error_strategy_coefs",
    "pad_coefs_to_n",
    "sensitivity_squared",
]

# -- Coefficients -----------------------------------------------------------------------------


def _reconcile(
    coef: jax.Array, n: int | None = None, *, name: str = "coef"
) -> tuple[jax.Array, int]:
    """Returns at most n checked coefficients, and n (by default their number).

    Their dtype is at least the default float dtype, and never narrower than it was.
    """
    coef = check_coef(name, coef)
    n = coef.size if n is None else check_int("n", n)
    return coef[:n].astype(jnp.promote_types(jnp.result_type(float), coef.dtype)), n


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
    return jnp.pad(coef, (0, n - coef.size))


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


def _column_norms(coef: jax.Array, n: int) -> jax.Array:
    """Returns the column norms ``[n]`` of C: column t holds the first n - t coefficients."""
    wide = coef.astype(jnp.promote_types(coef.dtype, jnp.float32))
    norms = jnp.sqrt(jnp.cumsum(wide * wide))
    return jnp.pad(norms, (0, n - coef.size), mode="edge")[::-1].astype(coef.dtype)


# -- Sensitivity ------------------------------------------------------------------------------


def sensitivity_squared(coef: jax.Array, n: int | None = None) -> jax.Array:
    """Returns the squared sensitivity of C for one participation: its largest column norm squared.

    Args:
      coef: ``[b]`` coefficients of C.
      n: The size of C, by default b.

    Returns:
      A scalar, with the dtype of :func:`pad_coefs_to_n`.

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
      A scalar, with the dtype of :func:`pad_coefs_to_n`.

    Raises:
      ValueError: if ``strategy_coef`` is not 1-D, empty or not finite, or another argument is below
        1.
      TypeError: if n, ``min_sep`` or ``max_participations`` is not an integer, or the coefficients
        are not real.
    """
    coef, n = _reconcile(strategy_coef, n, name="strategy_coef")
    # Beyond n all separations mean one participation; a smaller one needs less padding.
    min_sep = min(check_int("min_sep", min_sep), n)
    if max_participations is not None:
        check_int("max_participations", max_participations)
    k = sensitivity.minsep_true_max_participations(n, min_sep, max_participations)
    coef = jax.lax.cummax(jnp.abs(coef), reverse=True)

    # Entry t of the sum is coef[t] + coef[t - min_sep] + ..., k terms. Lay coef out in rows of
    # min_sep: this is the sum of a window of k rows. Cut the rows into blocks of k: the window is
    # the head of one block and the tail of the block before.
    blocks = jnp.pad(coef, (0, -n % (k * min_sep) + n - coef.size)).reshape(-1, k, min_sep)
    head = jax.lax.cumsum(blocks, axis=1)
    tail = jax.lax.cumsum(blocks, axis=1, reverse=True)
    tail_before = jnp.pad(tail[:-1, 1:], ((1, 0), (0, 1), (0, 0)))
    return _norm_squared((head + tail_before).reshape(-1)[:n])
