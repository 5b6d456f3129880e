"""Lower-triangular Toeplitz strategies, given by their first column.

A strategy C is described by its coefficients ``c = C[:b, 0]``: entry (i, j) of C is ``c_{i-j}``,
and 0 for i < j and for i - j >= b, so b is the number of bands. Functions work on the
coefficients, which takes far less time and memory than the n x n matrix.

    >>> coef = optimal_max_error_strategy_coefs(4)
    >>> print(coef)
    [1.     0.5    0.375  0.3125]
    >>> print(materialize_lower_triangular(coef[:2], n=3))
    [[1.  0.  0. ]
     [0.5 1.  0. ]
     [0.  0.5 1. ]]
    >>> print(multiply(coef, inverse_coef(coef)).round(6))  # C C^-1
    [1. 0. 0. 0.]
    >>> print(f"{per_query_error(strategy_coef=coef, n=100).max():.2f}")
    21.65
    >>> print(f"{minsep_sensitivity_squared(coef, min_sep=4, n=100):.2f}")
    37.21
    >>> print(momentum_sgd_coefs(4, momentum=0.5))  # a workload other than prefix sums
    [1.    1.5   1.75  1.875]

Every function accepts coefficients as a JAX array, a NumPy array or a list, of floats or integers,
and checks that they are 1-D, non-empty and finite. Given a size n, coefficients from the n-th on
are dropped, as they lie outside of C. Inside a trace values are not checked, shapes are.
"""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels._checks import (
    check_coef,
    check_int,
    check_memory,
    is_concrete,
    nan_unless,
    promote_types,
)
from jax_privacy_kernels.matrix_factorization._scaling import ending_in_nan, within_range
from jax_privacy_kernels.matrix_factorization._toeplitz_algebra import (
    banded_inverse_square_root_noising_coefs,
    compute_banded_inverse_sensitivity_squared,
    inverse_coef,
    materialize_lower_triangular,
    minsep_sensitivity_squared,
    multiply,
    optimal_max_error_noising_coefs,
    optimal_max_error_strategy_coefs,
    pad_coefs_to_n,
    sensitivity_squared,
    solve_banded,
)
from jax_privacy_kernels.matrix_factorization._toeplitz_errors import loss, per_query_error
from jax_privacy_kernels.matrix_factorization._toeplitz_named import (
    banded_inverse_power_noising_coefs,
    banded_square_root_strategy_coefs,
    lambda_cgd_column_norms,
    lambda_cgd_sensitivity_squared,
    nu_dp_ftrl_noising_coefs,
    nu_dp_ftrl_sensitivity_squared,
    stationary_sensitivity_squared,
)
from jax_privacy_kernels.matrix_factorization._toeplitz_optimization import (
    optimize_banded_inverse_toeplitz,
    optimize_banded_toeplitz,
    optimize_coefs_for_amplifications,
)
from jax_privacy_kernels.matrix_factorization._workloads import momentum_sgd_coefs
from jax_privacy_kernels.matrix_factorization.streaming_matrix import (
    StreamingMatrix,
    scale_rows_and_columns,
)
from jax_privacy_kernels.ops.correlated_noise._matrices import BandedRecurrence, MovingAverage

__all__ = [
    "banded_inverse_power_noising_coefs",
    "banded_inverse_square_root_noising_coefs",
    "banded_square_root_strategy_coefs",
    "compute_banded_inverse_sensitivity_squared",
    "inverse_as_streaming_matrix",
    "inverse_coef",
    "lambda_cgd_as_streaming_matrix",
    "lambda_cgd_sensitivity_squared",
    "loss",
    "materialize_lower_triangular",
    "minsep_sensitivity_squared",
    "momentum_sgd_coefs",
    "multiply",
    "noising_coef_as_streaming_matrix",
    "nu_dp_ftrl_noising_coefs",
    "nu_dp_ftrl_sensitivity_squared",
    "optimal_max_error_noising_coefs",
    "optimal_max_error_strategy_coefs",
    "optimize_banded_inverse_toeplitz",
    "optimize_banded_toeplitz",
    "optimize_coefs_for_amplifications",
    "pad_coefs_to_n",
    "per_query_error",
    "sensitivity_squared",
    "solve_banded",
    "stationary_sensitivity_squared",
]


def inverse_as_streaming_matrix(
    coef: jax.Array, column_normalize_for_n: int | None = None
) -> StreamingMatrix:
    """Returns the noising matrix ``C^-1`` of a banded Toeplitz strategy C.

    Row t of ``x = C^-1 z`` is ``x_t = (z_t - sum_{l=1}^{b-1} c_l x_{t-l}) / c_0``: Algorithm 9 of
    https://arxiv.org/abs/2306.08153. The state holds ``x_{t-1} .. x_{t-b+1}``, newest first: an
    array ``(b - 1,) + shape`` for each leaf, of the dtype that the leaf and ``coef`` promote to.

    With ``column_normalize_for_n = n`` the strategy is instead n x n, and each of its columns is
    scaled to unit norm (columns near the end have fewer than b entries, so would have less than
    the others). Row t of ``C^-1`` is then scaled by the norm of column t. Use it when n is known:
    there is no column n, so rows of the product from the n-th on are NaN.

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
    c = _visibly_valid(check_coef("coef", coef, invertible=True))
    n = column_normalize_for_n
    if n is not None:
        n = check_int("column_normalize_for_n", n)
        check_memory("column_normalize_for_n", n, 32 * n)
        c = within_range(c[:n]).astype(c.dtype)
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
        dtype = promote_types(abstract_value.dtype, c.dtype)
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
    return Cinv if n is None else scale_rows_and_columns(Cinv, row_scale=_row_scale(c, n))


def _visibly_valid(coef: jax.Array) -> jax.Array:
    """The coefficients; NaN if a trace hid that they are not finite or start with 0."""
    if is_concrete(coef):
        return coef
    valid = jnp.isfinite(coef).all() & (coef[0] != 0)
    return nan_unless(valid, coef)


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
    w = _visibly_valid(check_coef("noising_coef", noising_coef, invertible=True))
    p = w.size
    slots = p - 1 if look_ahead is None else check_int("look_ahead", look_ahead, minimum=0)

    def init_multiply(abstract_value: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
        dtype = promote_types(abstract_value.dtype, w.dtype)
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


def lambda_cgd_as_streaming_matrix(n: int, lam: float, *, look_ahead: int = 0) -> StreamingMatrix:
    """Returns the noising matrix ``C^-1`` of DP-lambda-CGD, with the columns of C scaled to norm 1.

    Row t of ``x = C^-1 z`` is ``x_t = d_t (z_t - lam z_{t-1})``, d the norms of the columns of the
    matrix whose inverse has coefficients ``(1, -lam)`` (https://arxiv.org/abs/2601.22334). It takes
    the memory of independent noise, since z_{t-1} can be made again from its key. The sensitivity
    of C is 1 for one participation, and at most that of :func:`lambda_cgd_sensitivity_squared` for
    several.

    Args:
      n: The number of steps: rows from the n-th on are NaN.
      lam: lambda, at least 0, where noise is independent, and below 1.
      look_ahead: As for :func:`noising_coef_as_streaming_matrix`.

    Returns:
      ``C^-1``, with the structure that fused kernels look for.

    Raises:
      ValueError: if n < 1, lam is out of range, or ``look_ahead < 0``.
      TypeError: if n or ``look_ahead`` is not an integer, or lam is not a real number.
    """
    norms = lambda_cgd_column_norms(n, lam)
    dtype = jnp.result_type(float)
    noising = noising_coef_as_streaming_matrix(
        jnp.asarray([1.0, -lam], dtype), look_ahead=look_ahead
    )
    return scale_rows_and_columns(noising, row_scale=ending_in_nan(norms, dtype))


def _row_scale(coef: jax.Array, n: int) -> jax.Array:
    """The column norms of C, and NaN: column t holds the first n - t coefficients.

    The last entry of a row scale goes on. Columns past n would have the norm of all coefficients,
    and the norm of the last would be too little noise for them.
    """
    dtype = promote_types(coef.dtype, jnp.float32)  # also of the result
    if is_concrete(coef):
        # Of hypotenuses no square vanishes, however small the first coefficients are.
        norms = np.hypot.accumulate(np.abs(np.asarray(coef, np.float64)))
        norms = np.pad(norms, (0, n - coef.size), mode="edge")
        return ending_in_nan(norms[::-1], dtype)
    traced = jax.lax.associative_scan(jnp.hypot, jnp.abs(coef).astype(dtype))
    return ending_in_nan(jnp.pad(traced, (0, n - coef.size), mode="edge")[::-1], dtype)


# Pickles name this module, whichever file a function is written in.
for _name in __all__:
    globals()[_name].__module__ = __name__


def __dir__() -> list[str]:  # for completion: no imported names
    return sorted(__all__)
