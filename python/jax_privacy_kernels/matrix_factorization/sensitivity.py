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

import contextlib
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp

from jax_privacy_kernels import ops
from jax_privacy_kernels._checks import (
    check_int,
    check_memory,
    check_real,
    check_vector,
    is_concrete,
    owned,
    promote_types,
)
from jax_privacy_kernels.matrix_factorization import checks
from jax_privacy_kernels.matrix_factorization._scaling import restored, scaled
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
    if not concrete:
        for name, value in (
            ("n", n),
            ("min_sep", min_sep),
            ("max_participations", max_participations),
        ):
            if value is not None and not jnp.issubdtype(jnp.result_type(value), jnp.integer):
                raise TypeError(f"expected {name} to be an integer, found {value!r}")
    most = -(n // -min_sep)
    if max_participations is None:
        return most
    if concrete:
        return min(check_int("max_participations", max_participations, minimum=0), most)
    traced: Any = jnp.minimum(max_participations, most)
    return traced


def participations(n: int, min_sep: int, max_participations: int | None) -> int:
    """As :func:`minsep_true_max_participations`, an int, for ``max_participations`` from 1 on."""
    n, min_sep = check_int("n", n), check_int("min_sep", min_sep)
    if max_participations is not None:
        max_participations = check_int("max_participations", max_participations)
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
    min_sep = min(check_int("min_sep", min_sep), x.size)
    largest = ops.participation_max(x, min_sep=min_sep, max_participations=k)
    if is_concrete((x, largest)) and jnp.isfinite(x).all() and not jnp.isfinite(largest):
        raise ValueError(f"expected sums in the range of {x.dtype}, found {largest}")
    return largest


# -- Masks ------------------------------------------------------------------------------------


def banded_lower_triangular_mask(n: int, num_bands: int) -> jax.Array:
    """Returns the int32 ``[n, n]`` matrix with 1 where ``0 <= i - j < num_bands``, 0 elsewhere.

    Raises:
      ValueError: if ``n < 0`` or ``num_bands < 1``.
      TypeError: if one is not an integer.
    """
    n, num_bands = _mask_size(n, num_bands)
    return jnp.tri(n, dtype=jnp.int32) - jnp.tri(n, k=-num_bands, dtype=jnp.int32)


def banded_symmetric_mask(n: int, num_bands: int) -> jax.Array:
    """Returns the int32 ``[n, n]`` matrix with 1 where ``|i - j| < num_bands``, 0 elsewhere.

    Raises:
      ValueError: if ``n < 0`` or ``num_bands < 1``.
      TypeError: if one is not an integer.
    """
    n, num_bands = _mask_size(n, num_bands)
    below = jnp.tri(n, k=-num_bands, dtype=jnp.int32)
    return jnp.tri(n, k=num_bands - 1, dtype=jnp.int32) - below


def _mask_size(n: int, num_bands: int) -> tuple[int, int]:
    n = check_int("n", n, minimum=0)
    check_memory("n", n, 4 * n * n)
    return n, min(check_int("num_bands", num_bands), n + 1)


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
    if is_concrete(C):
        given = owned("C", C).dtype
        integer = jnp.issubdtype(given, jnp.integer)
        dtype = promote_types(jnp.result_type(float) if integer else given, jnp.float32)
    with _known_in_float64(C):
        wide = _matrix(C)
        checks.check(C=wide)
        values, scale = scaled(wide)
        norm = _largest_norm(jnp.asarray(values))
    if not is_concrete(C):
        dtype = norm.dtype
    return restored("the sensitivity", norm, dtype, (scale, 1), upward=True)


@contextlib.contextmanager
def _known_in_float64(M: Any) -> Iterator[None]:
    """Known values are computed with now, also in a trace, and in float64, whatever the mode."""
    if is_concrete(M):
        with jax.ensure_compile_time_eval(), jax.enable_x64(True):
            yield
    else:
        yield


def _largest_norm(C: jax.Array) -> jax.Array:
    return jnp.linalg.norm(C, axis=0).max()


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
    values, scale = scaled(X)
    return _root(_min_sep_bound(jnp.asarray(values), min_sep, max_participations), scale)


def _min_sep_bound(X: jax.Array, min_sep: int, max_participations: int | None) -> jax.Array:
    k = participations(len(X), min_sep, max_participations)
    min_sep = min(check_int("min_sep", min_sep), len(X))
    rows = ops.participation_max(jnp.abs(X), min_sep=min_sep, max_participations=k)
    return ops.participation_max(rows, min_sep=min_sep, max_participations=k)


def _root(squared: jax.Array, exponent: Any) -> float:
    """The root of ``squared 2^exponent``, rounded up; a ValueError if it is out of range."""
    exponent = int(exponent)
    # Of an even exponent.
    even = math.ldexp(float(squared), exponent % 2)
    root = math.sqrt(even)
    exponent -= exponent % 2
    if Fraction(root) ** 2 < Fraction(even):
        root = math.nextafter(root, math.inf)
    try:
        result = math.ldexp(root, exponent // 2)
    except OverflowError:
        result = math.inf
    if root and not 2.0**-1022 <= result < math.inf:
        raise ValueError(
            f"expected a sensitivity in the range of float64, found {root} * 2**{exponent // 2}"
        )
    return result


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
    X, scale = _gram(C)
    return _root(_min_sep_bound(_widened(X, jnp.shape(C)[0]), min_sep, max_participations), scale)


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
    values, scale = scaled(X)
    return _root(_banded(jnp.asarray(values), scale, min_sep, max_participations), scale)


def _banded(X: jax.Array, exponent: Any, min_sep: int, max_participations: int | None) -> jax.Array:
    """The squared sensitivity, for a Gram matrix that is ``X 2^exponent``."""
    n = len(X)
    min_sep = check_int("min_sep", min_sep)
    if min_sep > n:
        raise ValueError(f"expected 1 <= min_sep <= {n}, the size of X, found min_sep={min_sep}")
    k = participations(n, min_sep, max_participations)
    if is_concrete(X):
        reached = (banded_symmetric_mask(n, min_sep) == 0) & (X != 0)
        if reached.any():
            i, j = (int(index) for index in jnp.argwhere(reached, size=1)[0])
            raise ValueError(
                "columns must be orthogonal: "
                f"expected columns at least min_sep={min_sep} apart to be orthogonal, "
                f"found X[{i}, {j}] = {math.ldexp(float(X[i, j]), exponent)}"
            )
    return ops.participation_max(jnp.diag(X), min_sep=min_sep, max_participations=k)


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
    X, scale = _gram(C)
    return _root(_banded(X, scale, min_sep, max_participations), scale)


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
    values, scale = scaled(X)
    return _root(_fixed_epochs(jnp.asarray(values), epochs), scale)


def _fixed_epochs(X: jax.Array, epochs: int) -> jax.Array:
    n, epochs = len(X), check_int("epochs", epochs)
    if n % epochs:
        raise ValueError(
            f"epochs must divide n: expected epochs to divide n={n}, found epochs={epochs}"
        )
    by_epoch = jnp.abs(X).reshape(epochs, n // epochs, epochs, n // epochs)
    return jnp.einsum("siti->i", by_epoch).max()


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
    X, scale = _gram(C)
    return _root(_fixed_epochs(_widened(X, jnp.shape(C)[0]), epochs), scale)


def _matrix(M: Any) -> jax.Array:
    """M as an array of floats, of 64 bits in x64 mode."""
    M = check_real("a matrix of real numbers", owned("a matrix", M))
    if M.size == 0:
        raise ValueError(f"expected a matrix with entries, found shape {M.shape}")
    return M.astype(promote_types(M.dtype, jnp.result_type(float)))


def _gram(C: Any) -> tuple[jax.Array, int]:
    """``C^T C``, and the exponent of the power of two that it is to be multiplied by."""
    C = _matrix(C)
    checks.check(C=C)
    check_memory("the number of columns", C.shape[1], 16 * C.shape[1] ** 2)
    values, exponent = scaled(C)
    C = jnp.asarray(values)
    return jnp.matmul(C.T, C, precision="highest"), 2 * int(exponent)


def _widened(X: jax.Array, rows: int) -> jax.Array:
    """``|X|``, and what rounding may have taken from the inner products of columns."""
    norms = jnp.sqrt(jnp.diag(X))
    return jnp.abs(X) + 4 * (rows + 8) * 2.0**-53 * (norms[:, None] * norms[None, :])


def __dir__() -> list[str]:  # for completion: no imported names
    return sorted(__all__)
