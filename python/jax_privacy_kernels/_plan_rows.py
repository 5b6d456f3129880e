"""The mechanisms that `planning.plan` compares: strategies, their errors and sensitivities.

Numbers are computed of the coefficients in float32, as they will be run.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels.matrix_factorization import (
    banded,
    buffered_toeplitz,
    streaming_matrix,
    toeplitz,
)
from jax_privacy_kernels.matrix_factorization._toeplitz_named import lambda_cgd_column_norms
from jax_privacy_kernels.matrix_factorization._toeplitz_optimization import optimized_bands
from jax_privacy_kernels.matrix_factorization.buffered_toeplitz._optimization import grow

__all__ = ["Mechanism", "Problem", "in_fixed_order"]

_MOST_WORK = 2**23  # n b^2 of a step of optimization by columns: some hundredths of a second


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is to be run.

    Attributes:
      steps: n.
      min_sep: The least number of steps between two participations of one example.
      participations: The most of them.
      workload: ``[n]`` coefficients, float64; None for prefix sums, unless there is
      A: a StreamingMatrix. Banded strategies are optimized for it, others for prefix sums.
      followed: The workload, Toeplitz or not, as a matrix whose errors take O(n b^2) for any banded
        strategy; None if it has no such structure.
      slots: The most numbers of state that there may be for every parameter.
    """

    steps: int
    min_sep: int
    participations: int
    workload: Any
    A: streaming_matrix.StreamingMatrix | None
    followed: streaming_matrix.StreamingMatrix | None
    slots: float

    def errors_of(self, noising_matrix: streaming_matrix.StreamingMatrix) -> np.ndarray:
        """Errors ``[n]`` for A, in O(n^2)."""
        assert self.A is not None
        return np.asarray((self.A @ noising_matrix).row_norms_squared(self.steps))


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """A strategy without its noise.

    Attributes:
      name: For people.
      slots: Numbers of state for every parameter.
      noising_matrix: Makes ``C^-1``.
      squared_sensitivity: For all participations, or one of them where sampling amplifies.
      errors: ``[n]``, of independent noise of variance 1.
      strategy_coef: ``[b]`` coefficients of C, float64, if it is Toeplitz and banded.
    """

    name: str
    slots: int
    noising_matrix: Callable[[], Any]
    squared_sensitivity: float
    errors: np.ndarray
    strategy_coef: np.ndarray | None = None


def independent(problem: Problem, participations: int) -> Mechanism:
    coef = np.ones(1, np.float32)
    return banded_toeplitz(problem, coef, float(participations), "independent noise")


def banded_toeplitz(
    problem: Problem, coef: Any, squared: float | None = None, name: str = ""
) -> Mechanism:
    """Of strategy coefficients in float32; its sensitivity is that of the problem by default.

    Columns that are at least as many steps apart as there are bands are orthogonal.
    """
    wide = coef.astype(np.float64)
    errors = toeplitz.per_query_error(
        strategy_coef=wide, n=problem.steps, workload_coef=problem.workload, A=problem.A
    )
    if squared is None:
        assert coef.size <= problem.min_sep
        exact = toeplitz.minsep_sensitivity_squared(
            wide, problem.min_sep, n=problem.steps, max_participations=problem.participations
        )
        squared = float(exact) * (1 + 1e-12)
    matrix: Callable[[], Any] = functools.partial(toeplitz.inverse_as_streaming_matrix, coef)
    if coef.size == 1:
        matrix = streaming_matrix.identity
    return Mechanism(
        name or f"banded Toeplitz, {coef.size} bands",
        coef.size - 1,
        matrix,
        squared,
        np.asarray(errors),
        wide,
    )


def for_one_participation(problem: Problem, bands: int) -> Mechanism:
    """A banded strategy whose sensitivity is that of one participation, for amplification."""
    if bands == 1:
        return independent(problem, 1)
    coef = optimized_bands(problem.steps, bands, problem.workload, problem.A)
    # Negative coefficients, of which there hardly are any, would make its analysis another one.
    coef = np.maximum(coef, 0).astype(np.float32)
    return banded_toeplitz(problem, coef, float(np.sum(coef.astype(np.float64) ** 2)) * (1 + 1e-12))


def in_fixed_order(problem: Problem) -> Iterator[Callable[[], Mechanism]]:
    """Makes the mechanisms for participations that are only known to be far apart, one by one."""
    yield functools.partial(independent, problem, problem.participations)
    sizes = _sizes(min(problem.min_sep, problem.steps, problem.slots + 1))
    for bands in sizes:
        yield functools.partial(_optimized, problem, bands)
    few = [b for b in sizes if problem.steps * b**2 <= _MOST_WORK]
    if few and problem.followed is not None:
        yield functools.partial(_optimized_by_column, problem, few[-1])
    most = int(min(problem.slots, 4))
    blts = _blts(problem, most)
    for buffers in range(1, most + 1):
        yield functools.partial(_next_buffered, problem, buffers, blts)
    yield functools.partial(_lambda_cgd, problem)
    for bands in (2, 4, 8):
        if bands <= problem.steps:
            yield functools.partial(_banded_inverse, problem, bands)


def _sizes(most: float) -> list[int]:
    """Powers of two from 2 on, and the most there may be, up to 128."""
    most = int(min(most, 128))
    return sorted({*(2**i for i in range(1, 8) if 2**i <= most), *([most] if most > 1 else [])})


def _optimized(problem: Problem, bands: int) -> Mechanism:
    coef = optimized_bands(problem.steps, bands, problem.workload, problem.A)
    return banded_toeplitz(problem, coef.astype(np.float32))


def _optimized_by_column(problem: Problem, bands: int) -> Mechanism:
    n, A = problem.steps, problem.followed
    start: Any = optimized_bands(n, bands, problem.workload, problem.A)
    found = banded.optimize(
        n, bands=bands, A=A, C=banded.ColumnNormalizedBanded.from_banded_toeplitz(n, start)
    )
    params: Any = np.asarray(found.params, np.float32)
    C = banded.ColumnNormalizedBanded(params)
    wide = banded.ColumnNormalizedBanded(params.astype(np.float64))
    squared = banded.minsep_sensitivity_squared(wide, problem.min_sep, problem.participations)
    return Mechanism(
        f"column-normalized, {bands} bands",
        bands - 1,
        C.inverse_as_streaming_matrix,
        squared * (1 + 1e-6),  # columns are divided by norms that are rounded to float32
        np.asarray(banded.per_query_error(wide, A)),
    )


def _blts(problem: Problem, most: int) -> Iterator[buffered_toeplitz.BufferedToeplitz]:
    """The best of 1, 2, ... buffers; each is optimized when it is asked for."""
    loss_fn = buffered_toeplitz.LossFn.build_min_sep(
        problem.steps,
        "mean",
        problem.min_sep,
        problem.participations,
        workload_coef=problem.workload,
    )
    for blt, _ in itertools.islice(grow(loss_fn, most, {}), 1, None):
        yield blt


def _next_buffered(
    problem: Problem, buffers: int, blts: Iterator[buffered_toeplitz.BufferedToeplitz]
) -> Mechanism:
    n, found = problem.steps, next(blts)
    decay, scale = (np.asarray(x, np.float32) for x in (found.buf_decay, found.output_scale))
    blt = buffered_toeplitz.BufferedToeplitz.build(decay, scale, dtype=jnp.float32)
    wide = buffered_toeplitz.BufferedToeplitz.build(
        np.asarray(blt.buf_decay, np.float64), np.asarray(blt.output_scale, np.float64)
    )
    coef = wide.toeplitz_coefs(n)
    squared = toeplitz.minsep_sensitivity_squared(
        coef, problem.min_sep, n=n, max_participations=problem.participations
    )
    errors: Any
    if problem.A is None:
        errors = toeplitz.per_query_error(strategy_coef=coef, n=n, workload_coef=problem.workload)
    else:
        errors = problem.errors_of(wide.inverse_as_streaming_matrix())
    return Mechanism(
        f"BLT, {buffers} buffer" + "s" * (buffers > 1),
        buffers,
        blt.inverse_as_streaming_matrix,
        float(squared) * (1 + 1e-9),
        np.asarray(errors),
    )


def _banded_inverse(problem: Problem, bands: int) -> Mechanism:
    n = problem.steps
    coef: Any = toeplitz.optimize_banded_inverse_toeplitz(
        n,
        problem.min_sep,
        bands,
        workload_coef=problem.workload,
        max_participations=problem.participations,
    )
    coef = np.asarray(coef, np.float32)
    wide = coef.astype(np.float64)
    squared = toeplitz.compute_banded_inverse_sensitivity_squared(
        n, wide, problem.min_sep, problem.participations
    )
    errors: Any
    if problem.A is None:
        errors = toeplitz.per_query_error(noising_coef=wide, n=n, workload_coef=problem.workload)
    else:
        errors = problem.errors_of(toeplitz.noising_coef_as_streaming_matrix(wide))
    slots = bands - 1 if bands - 1 <= problem.slots else 0
    return Mechanism(
        f"banded inverse, {bands} coefs",
        slots,
        functools.partial(toeplitz.noising_coef_as_streaming_matrix, coef, look_ahead=slots),
        float(squared),
        np.asarray(errors),
    )


def _lambda_cgd(problem: Problem) -> Mechanism:
    """With the best lambda of a grid."""

    def made(lam: float) -> tuple[float, np.ndarray]:
        squared = toeplitz.lambda_cgd_sensitivity_squared(
            problem.steps, lam, problem.min_sep, problem.participations
        )
        # Rows are scaled by norms that are rounded to float32.
        return float(squared) * (1 + 1e-6), _lambda_cgd_errors(problem, lam)

    # Of float32, and so the same when it is run.
    grid = [float(np.float32(lam)) for lam in (*np.linspace(0.05, 0.95, 19), 0.97, 0.98, 0.99)]
    found = {lam: made(lam) for lam in grid}
    lam = min(found, key=lambda lam: found[lam][0] * found[lam][1].mean())
    squared, errors = found[lam]
    if problem.A is not None:
        errors = problem.errors_of(toeplitz.lambda_cgd_as_streaming_matrix(problem.steps, lam))
    return Mechanism(
        f"lambda-CGD, lambda = {lam:.2g}",
        0,
        functools.partial(toeplitz.lambda_cgd_as_streaming_matrix, problem.steps, lam),
        squared,
        errors,
    )


def _lambda_cgd_errors(problem: Problem, lam: float) -> np.ndarray:
    """Squared norms of the rows of ``A C^-1``, with ``x_t = d_t (z_t - lam z_{t-1})``.

    Entry (t, j) is ``a_{t-j} d_j - lam a_{t-j-1} d_{j+1}``: its square is three convolutions.
    """
    n = problem.steps
    a: Any = np.ones(n) if problem.workload is None else problem.workload
    d: Any = lambda_cgd_column_norms(n, lam)
    squares = np.asarray(toeplitz.multiply(a**2, d**2, n))
    products = np.zeros(n)
    if n > 1:
        products[1:] = np.asarray(toeplitz.multiply(a[1:] * a[:-1], d[:-1] * d[1:], n - 1))
    return (1 + lam**2) * squares - lam**2 * a**2 * d[0] ** 2 - 2 * lam * products


def in_float64(make: Callable[[], Mechanism]) -> Mechanism:
    with jax.enable_x64(True):
        return make()
