"""Sensitivity of matrix mechanisms when one user takes part several times.

A participation pattern is a set of rounds that one user may be in: any two at least ``min_sep``
apart, at most k = ``max_participations`` of them. The sensitivity of a strategy C is the largest
norm of a sum of its columns over a pattern, each column times a contribution of norm at most 1. It
depends on C through the Gram matrix ``X = C^T C`` only.

    >>> minsep_true_max_participations(n=10, min_sep=4)
    3
    >>> prefix_sums = jnp.tri(4)
    >>> print(f"{get_min_sep_sensitivity_upper_bound(prefix_sums, min_sep=2):.4f}")
    3.1623
    >>> print(f"{fixed_epoch_sensitivity(prefix_sums, epochs=2):.4f}")
    3.1623

Matrices are JAX or NumPy arrays of real numbers.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jax_privacy_kernels import ops
from jax_privacy_kernels._checks import check_int, check_real, check_vector, is_concrete
from jax_privacy_kernels.matrix_factorization import checks
from jax_privacy_kernels.matrix_factorization.optimization import jax_enable_x64

__all__ = [
    "banded_lower_triangular_mask",
    "banded_symmetric_mask",
    "fixed_epoch_sensitivity",
    "fixed_epoch_sensitivity_for_X",
    "get_min_sep_sensitivity_upper_bound",
    "get_min_sep_sensitivity_upper_bound_for_X",
    "get_sensitivity_banded",
    "get_sensitivity_banded_for_X",
    "max_participation_for_linear_fn",
    "minsep_true_max_participations",
    "single_participation_sensitivity",
]

# -- Participation patterns -------------------------------------------------------------------


def minsep_true_max_participations(
    n: int, min_sep: int, max_participations: int | None = None
) -> int:
    """Counts how often one user can really take part in n rounds.

    Participations i < j of a user satisfy ``j - i >= min_sep``, so there are at most
    ``ceil(n / min_sep)`` of them, whatever ``max_participations`` allows.

    Args:
      n: Number of rounds, at least 1.
      min_sep: Minimum separation, at least 1; 1 allows consecutive rounds.
      max_participations: Upper limit k on the count, at least 0, or None for no limit.

    Returns:
      ``min(k, ceil(n / min_sep))``, an int. Integer tracers are accepted too, unchecked, and give a
      scalar integer array.

    Raises:
      ValueError: if an argument is below its minimum.
      TypeError: if an argument is not an integer.
    """
    concrete = is_concrete((n, min_sep, max_participations))
    if concrete:
        n, min_sep = check_int("n", n), check_int("min_sep", min_sep)
    most = -(n // -min_sep)
    if max_participations is None:
        return most
    if concrete:
        return min(check_int("max_participations", max_participations, minimum=0), most)
    traced: Any = jnp.minimum(max_participations, most)
    return traced


def participations(n: int, min_sep: int, max_participations: int | None) -> int:
    """As :func:`minsep_true_max_participations`, for ``max_participations`` of at least 1."""
    if max_participations is not None:
        check_int("max_participations", max_participations)
    return minsep_true_max_participations(n, min_sep, max_participations)


def max_participation_for_linear_fn(
    x: jax.Array, min_sep: int = 1, max_participations: int | None = None
) -> jax.Array:
    """Returns the maximum of ``<x, u>`` over indicator vectors u of participation patterns.

    By the dynamic program VecSens (Algorithm 3 of https://arxiv.org/abs/2306.08153), compiled:
    O(n k) at most, and O(n) if only ``min_sep`` limits the participations. Signs matter: a pattern
    may leave negative entries out, or be empty. Differentiable; a tie counts half to either side.

    Args:
      x: ``[n]``, n >= 1.
      min_sep: Least distance of two participations; 1 allows consecutive rounds.
      max_participations: Most participations, or None for as many as fit.

    Returns:
      A scalar, of the dtype of x, at least float32; sums are made in float64.

    Raises:
      ValueError: if x is not 1-D, or empty, or holds NaN, or a limit is below 1.
      TypeError: if x is not real, or a limit is not an integer.
    """
    x = check_vector("x", x, lambda values: values == values, "x not to hold NaN")
    x = check_real("a vector x of real numbers", x)
    k = participations(x.size, min_sep, max_participations)
    return ops.participation_max(x, min_sep=min(min_sep, x.size), max_participations=k)


# -- Masks ------------------------------------------------------------------------------------


def banded_lower_triangular_mask(n: int, num_bands: int) -> jax.Array:
    """Returns the int32 ``[n, n]`` matrix with 1 where ``0 <= i - j < num_bands``, 0 elsewhere.

    Raises:
      ValueError: if ``n < 0`` or ``num_bands < 1``.
      TypeError: if one is not an integer.
    """
    n = check_int("n", n, minimum=0)
    num_bands = min(check_int("num_bands", num_bands), n + 1)
    return jnp.tri(n, dtype=jnp.int32) - jnp.tri(n, k=-num_bands, dtype=jnp.int32)


def banded_symmetric_mask(n: int, num_bands: int) -> jax.Array:
    """Returns the int32 ``[n, n]`` matrix with 1 where ``|i - j| < num_bands``, 0 elsewhere.

    Raises:
      ValueError: if ``n < 0`` or ``num_bands < 1``.
      TypeError: if one is not an integer.
    """
    n = check_int("n", n, minimum=0)
    num_bands = min(check_int("num_bands", num_bands), n + 1)
    below = jnp.tri(n, k=-num_bands, dtype=jnp.int32)
    return jnp.tri(n, k=num_bands - 1, dtype=jnp.int32) - below


# -- One participation ------------------------------------------------------------------------


def single_participation_sensitivity(C: jax.Array) -> jax.Array:
    """Returns the sensitivity of C to one participation: its largest column norm.

    Args:
      C: ``[m, n]``; lower-triangular if it is square.

    Returns:
      A scalar of the dtype of C, at least float32.

    Raises:
      ValueError: if C is not a matrix, not finite, or square and not lower-triangular.
    """
    if not is_concrete(C):
        return jnp.linalg.norm(_matrix(C), axis=0).max()
    given = jnp.asarray(C).dtype
    integer = jnp.issubdtype(given, jnp.integer)
    dtype = jnp.result_type(float if integer else given, jnp.float32)
    with jax.enable_x64(True):
        wide = _matrix(C)
        checks.check(C=wide)
        return jnp.linalg.norm(wide, axis=0).max().astype(dtype)


# -- Minimum separation -----------------------------------------------------------------------


@jax_enable_x64
def get_min_sep_sensitivity_upper_bound_for_X(
    X: jax.Array, min_sep: int = 1, max_participations: int | None = None
) -> float:
    """Returns an upper bound on the sensitivity of any C with ``C^T C = X``.

    The squared sensitivity is at most the largest sum of ``|X[i, j]|`` over i and j in one pattern.
    The bound lets every row i choose its own pattern of columns, and then a pattern of rows:
    Algorithm 4 of https://arxiv.org/abs/2306.08153. For min-sep-banded X,
    `get_sensitivity_banded_for_X` is exact, and may be smaller. O(n^2 k), or O(n^2) if only
    ``min_sep`` limits the participations; rows run in parallel.

    Args:
      X: ``[n, n]`` Gram matrix, symmetric.
      min_sep: Least distance of two participations; 1 allows consecutive rounds.
      max_participations: Most participations, or None for as many as fit.

    Returns:
      The bound on the L2 sensitivity.

    Raises:
      ValueError: if X is not square, finite and symmetric, or a limit is below 1.
      TypeError: if a limit is not an integer.
    """
    X = _matrix(X)
    checks.check(X=X)
    k = participations(len(X), min_sep, max_participations)
    min_sep = min(min_sep, len(X))
    rows = ops.participation_max(jnp.abs(X), min_sep=min_sep, max_participations=k)
    largest = ops.participation_max(rows, min_sep=min_sep, max_participations=k)
    return math.sqrt(float(largest))


@jax_enable_x64
def get_min_sep_sensitivity_upper_bound(
    C: jax.Array, min_sep: int = 1, max_participations: int | None = None
) -> float:
    """Like :func:`get_min_sep_sensitivity_upper_bound_for_X`, of the Gram matrix of C.

    Args:
      C: ``[m, n]`` strategy; lower-triangular if it is square.
      min_sep: Least distance of two participations; 1 allows consecutive rounds.
      max_participations: Most participations, or None for as many as fit.

    Returns:
      The bound on the L2 sensitivity.

    Raises:
      ValueError: if C is not a matrix, not finite, or square and not lower-triangular; or a limit
        is below 1.
      TypeError: if a limit is not an integer.
    """
    return get_min_sep_sensitivity_upper_bound_for_X(_gram(C), min_sep, max_participations)


@jax_enable_x64
def get_sensitivity_banded_for_X(
    X: jax.Array, min_sep: int = 1, max_participations: int | None = None
) -> float:
    """Returns the sensitivity of C with ``C^T C = X``, where X is min-sep-banded.

    Columns at least ``min_sep`` apart must be orthogonal: ``X[i, j] = 0`` for ``|i - j| >=
    min_sep``. A lower-triangular C of at most ``min_sep`` bands has this. The squared sensitivity
    is then the largest sum of ``X[i, i]`` over a pattern, which is exact. O(n^2) to check X, O(n k)
    to compute.

    Args:
      X: ``[n, n]`` Gram matrix, symmetric and min-sep-banded.
      min_sep: Least distance of two participations, ``1 <= min_sep <= n``.
      max_participations: Most participations, or None for as many as fit.

    Returns:
      The L2 sensitivity.

    Raises:
      ValueError: if X is not square, finite, symmetric and min-sep-banded, or a limit is out of
        range.
      TypeError: if a limit is not an integer.
    """
    X = _matrix(X)
    checks.check(X=X)
    n = len(X)
    if not 1 <= check_int("min_sep", min_sep) <= n:
        raise ValueError(f"expected 1 <= min_sep <= {n}, the size of X, found min_sep={min_sep}")
    k = participations(n, min_sep, max_participations)
    if is_concrete(X):
        reached = (banded_symmetric_mask(n, min_sep) == 0) & (X != 0)
        if reached.any():
            i, j = (int(index) for index in jnp.argwhere(reached, size=1)[0])
            raise ValueError(
                "columns must be orthogonal: "
                f"expected columns at least min_sep={min_sep} apart to be orthogonal, "
                f"found X[{i}, {j}] = {X[i, j]}"
            )
    largest = ops.participation_max(jnp.diag(X), min_sep=min_sep, max_participations=k)
    return math.sqrt(float(largest))


@jax_enable_x64
def get_sensitivity_banded(
    C: jax.Array, min_sep: int = 1, max_participations: int | None = None
) -> float:
    """Like :func:`get_sensitivity_banded_for_X`, of the Gram matrix of C.

    Args:
      C: ``[m, n]`` strategy, of at most ``min_sep`` bands; lower-triangular if it is square.
      min_sep: Least distance of two participations, ``1 <= min_sep <= n``.
      max_participations: Most participations, or None for as many as fit.

    Returns:
      The L2 sensitivity.

    Raises:
      ValueError: if C is not a matrix, not finite, square and not lower-triangular, or has columns
        that overlap ``min_sep`` apart; or a limit is out of range.
      TypeError: if a limit is not an integer.
    """
    return get_sensitivity_banded_for_X(_gram(C), min_sep, max_participations)


# -- Fixed epochs -----------------------------------------------------------------------------


@jax_enable_x64
def fixed_epoch_sensitivity_for_X(X: jax.Array, epochs: int) -> float:
    """Returns the sensitivity of C with ``C^T C = X`` when all epochs visit users in one order.

    A user takes part in rounds ``i, i + r, i + 2 r, ...``, with ``r = n / epochs``. The squared
    sensitivity is the largest sum of ``|X[s, t]|`` over s and t in such a pattern: exact for
    non-negative X (https://arxiv.org/abs/2211.06530, section 2), an upper bound otherwise
    (https://arxiv.org/abs/2306.08153, equation 5).

    Args:
      X: ``[n, n]`` Gram matrix, symmetric.
      epochs: Number of epochs, which divides n.

    Returns:
      The L2 sensitivity.

    Raises:
      ValueError: if X is not square, finite and symmetric, or ``epochs`` is below 1 or does not
        divide n.
      TypeError: if ``epochs`` is not an integer.
    """
    X = _matrix(X)
    checks.check(X=X)
    n, epochs = len(X), check_int("epochs", epochs)
    if n % epochs:
        raise ValueError(
            f"epochs must divide n: expected epochs to divide n={n}, found epochs={epochs}"
        )
    by_epoch = jnp.abs(X).reshape(epochs, n // epochs, epochs, n // epochs)
    return math.sqrt(float(jnp.einsum("siti->i", by_epoch).max()))


@jax_enable_x64
def fixed_epoch_sensitivity(C: jax.Array, epochs: int) -> float:
    """Like :func:`fixed_epoch_sensitivity_for_X`, of the Gram matrix of C.

    Args:
      C: ``[m, n]`` strategy; lower-triangular if it is square.
      epochs: Number of epochs, which divides n.

    Returns:
      The L2 sensitivity.

    Raises:
      ValueError: if C is not a matrix, not finite, or square and not lower-triangular; or
        ``epochs`` is below 1 or does not divide n.
      TypeError: if ``epochs`` is not an integer.
    """
    return fixed_epoch_sensitivity_for_X(_gram(C), epochs)


def _matrix(M: Any) -> jax.Array:
    """M as an array of floats; in x64 mode of 64 bits, in which no square vanishes or overflows."""
    M = check_real("a matrix of real numbers", jnp.asarray(M))
    if M.size == 0:
        raise ValueError(f"expected a matrix with entries, found shape {M.shape}")
    return M.astype(jnp.promote_types(M.dtype, jnp.result_type(float)))


def _gram(C: Any) -> jax.Array:
    C = _matrix(C)
    checks.check(C=C)
    return jnp.matmul(C.T, C, precision="highest")
