"""The optimization of Toeplitz strategies."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jax_privacy_kernels._checks import check_instance, check_int
from jax_privacy_kernels.matrix_factorization import _amplification, optimization
from jax_privacy_kernels.matrix_factorization._dense_bounds import dense_bound
from jax_privacy_kernels.matrix_factorization._nonsmooth import bfgs
from jax_privacy_kernels.matrix_factorization._toeplitz_algebra import (
    banded_inverse_square_root_noising_coefs,
    compute_banded_inverse_sensitivity_squared,
    inverse_coef,
    pad_coefs_to_n,
    reconcile,
)
from jax_privacy_kernels.matrix_factorization._toeplitz_errors import (
    check_pattern,
    loss,
    per_query_error,
    reduction,
)
from jax_privacy_kernels.matrix_factorization._toeplitz_named import (
    banded_inverse_power_noising_coefs,
    square_root,
)
from jax_privacy_kernels.matrix_factorization._workloads import known_workload
from jax_privacy_kernels.matrix_factorization.streaming_matrix import StreamingMatrix

__all__ = [
    "optimize_banded_inverse_toeplitz",
    "optimize_banded_toeplitz",
    "optimize_coefs_for_amplifications",
]


def optimize_banded_toeplitz(
    n: int,
    bands: int,
    strategy_coef: jax.Array | None = None,
    max_optimizer_steps: int = 250,
    reduction_fn: Callable[[jax.Array], jax.Array] = jnp.mean,
    *,
    workload_coef: jax.Array | None = None,
    A: StreamingMatrix | None = None,
    min_sep: int | None = None,
    max_participations: int | None = None,
    report: optimization.ReportFnType | None = None,
) -> jax.Array:
    """Minimizes :func:`loss` over the strategies C of b bands.

    By default the result is optimal for one participation, and for any number of them at least b
    steps apart (https://arxiv.org/abs/2306.08153). For less separation give ``min_sep``: then the
    loss has the sensitivity of that pattern, and its optimum may have fewer bands that matter. The
    optimum for one participation, run at less separation, may cost more than ``min_sep`` bands.

    About 20 steps of O(n b) in float64, in one compiled loop. It is compiled once per n, b,
    workload, pattern and ``reduction_fn``: pass the same function, not a new lambda. With fewer
    steps between participations than bands it is run from three starts.

    Args:
      n: The size of C, that is, the number of steps of the workload.
      bands: The number b of coefficients.
      strategy_coef: ``[b]`` coefficients to start from, by default the first of the square root of
        the workload, as of :func:`optimal_max_error_strategy_coefs`.
      max_optimizer_steps: The most steps of L-BFGS from each start.
      reduction_fn: As for :func:`loss`.
      workload_coef: Coefficients of the workload, by default ones: prefix sums. See
        :func:`momentum_sgd_coefs`.
      A: In their place, a workload that need not be Toeplitz; see :func:`per_query_error`.
      min_sep: Minimum separation of a user's participations, or None for one participation.
      max_participations: The most rounds a user takes part in, with ``min_sep``; None for no limit.
      report: Called with an `optimization.Report` at the end. For the mean error and n up to 128
        it has a lower bound on all strategies of b bands, Toeplitz or not, if every user has one
        participation or one in each of ``n / min_sep`` epochs. The bound takes some seconds.

    Returns:
      ``[b]`` coefficients of L2 norm 1, of the dtype of ``strategy_coef`` or the default.

    Raises:
      ValueError: if ``strategy_coef`` does not have b finite entries, or starts with 0, or an
        argument is out of range, or does not go with another.
      TypeError: if an integer argument is not one, or coefficients are not real.
    """
    n, bands = check_int("n", n), check_int("bands", bands)
    check_pattern(min_sep, max_participations)
    optimization.check_report(report)
    workload = known_workload(workload_coef, n)
    _check_one_workload(workload, A)
    few = bands if min_sep is None else min(min_sep, bands)
    if strategy_coef is None:
        dtype = jnp.dtype(jnp.result_type(float))
        starts = [square_root(bands, workload)]
    else:
        coef, _ = reconcile(strategy_coef, name="strategy_coef", invertible=True)
        if coef.size != bands:
            raise ValueError(f"expected strategy_coef of shape ({bands},), found {coef.shape}")
        dtype, few = coef.dtype, bands
        starts = [np.array(coef, np.float64)]
    encoded = None if workload is None else workload.tobytes()
    reduction_fn = reduction(reduction_fn) if A is None else reduction_fn
    loss_fn = _banded_loss(n, reduction_fn, encoded, A, min_sep, max_participations)

    def minimized(init: np.ndarray) -> tuple[np.ndarray, int, str]:
        init[n:] = 0  # outside of C: they change no loss, and should not count in the norm
        coef, taken, stopped = optimization.minimized(
            loss_fn, jnp.asarray(init), max_optimizer_steps=max_optimizer_steps
        )
        return np.array(coef), taken, stopped

    with jax.enable_x64(True):
        found: list[tuple[np.ndarray, int, str]] = []
        if few < bands:
            # The optimum without overlap is a candidate, and so a start as it is and a little off:
            # in a coefficient that is 0 the sensitivity has a kink.
            narrow, taken, stopped = minimized(square_root(few, workload))
            padded = np.pad(narrow, (0, bands - few))
            starts += [padded, padded + 1e-3 * padded[few - 1] * (np.arange(bands) >= few)]
            found.append((padded, taken, stopped))
        found += [minimized(start.copy()) for start in starts]
        cost = optimization.jitted(loss_fn)
        best, _, stopped = found[0]
        if len(found) > 1:
            best, _, stopped = min(found, key=lambda ended: float(cost(jnp.asarray(ended[0]))))
        if report is not None:
            bound = dense_bound(n, bands, reduction_fn, workload, A, min_sep, max_participations)
            steps = sum(taken for _, taken, _ in found)
            report(optimization.Report(float(cost(jnp.asarray(best))), steps, stopped, bound))
        return jnp.asarray(best / np.linalg.norm(best)).astype(dtype)


def _check_one_workload(workload: np.ndarray | None, A: Any) -> None:
    if A is not None:
        check_instance("A", A, StreamingMatrix)
        if workload is not None:
            raise ValueError("expected workload_coef or A, found both")


@optimization.compiled_once
def _banded_loss(
    n: int,
    reduction_fn: Callable[[jax.Array], jax.Array],
    workload: bytes | None,
    A: StreamingMatrix | None,
    min_sep: int | None,
    max_participations: int | None,
) -> Callable[[jax.Array], jax.Array]:
    workload_coef: Any = None if workload is None else np.frombuffer(workload)

    def loss_fn(coef: jax.Array) -> jax.Array:
        return loss(
            coef,
            n,
            reduction_fn,
            workload_coef=workload_coef,
            A=A,
            min_sep=min_sep,
            max_participations=max_participations,
        )

    return loss_fn


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
    report: optimization.ReportFnType | None = None,
) -> jax.Array:
    """Minimizes error times squared sensitivity over noising matrices ``C^-1`` of p bands.

    BandInvMF, of https://arxiv.org/abs/2505.12128. The sensitivity is the first bound of
    :func:`compute_banded_inverse_sensitivity_squared`. Steps of O(n p) in float64, in one compiled
    loop. It is compiled once per shape, workload and ``reduction_fn``: pass the same function, not
    a new lambda.

    The loss has kinks and local minima. Steps are those of BFGS with a line search for losses that
    are not smooth (https://doi.org/10.1007/s10107-012-0514-2). Without coefficients to start from
    there are several starts, the banded inverse square root and the best of
    :func:`banded_inverse_power_noising_coefs` among them; the best of what they lead to is
    disturbed and started from again. The result is the best of all.

    Args:
      n: The number of steps of the workload.
      min_sep: Minimum separation of a user's participations.
      num_bands: The number p of coefficients.
      noising_coef: Coefficients of ``C^-1`` to start from, cut off or filled with zeros to p; by
        default those of ``strategy_coef`` if that is given, otherwise see above.
      strategy_coef: Coefficients of the C to start from.
      workload_coef: ``[n]`` coefficients of the workload, by default ones: prefix sums.
      max_participations: The most rounds a user takes part in, or None for no limit.
      max_optimizer_steps: The most steps from each start.
      reduction_fn: Makes a scalar of the errors ``[n]`` of the queries: `jax.numpy.mean`,
        `jax.numpy.max`, ``lambda v: v[-1]``.
      report: Called with an `optimization.Report` at the end. Its lower bound is that of all
        strategies; see :func:`optimize_banded_toeplitz` for when there is one.

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
    optimization.check_report(report)
    strategy, init, dtype = None, None, jnp.dtype(jnp.result_type(float))
    if noising_coef is not None:
        init, _ = reconcile(noising_coef, p, name="noising_coef", invertible=True)
        dtype = init.dtype
    elif strategy_coef is not None:
        strategy, _ = reconcile(strategy_coef, name="strategy_coef", invertible=True)
        dtype = strategy.dtype
    with jax.enable_x64(True):
        workload = None
        if workload_coef is not None:
            A, _ = reconcile(workload_coef, name="workload_coef")
            if A.size != n:
                raise ValueError(f"expected workload_coef of shape ({n},), found ({A.size},)")
            workload = np.asarray(A, np.float64)
        if strategy is not None:
            init = inverse_coef(strategy.astype(jnp.float64), p)
        encoded = None if workload is None else workload.tobytes()
        loss_fn = _banded_inverse_loss(
            n, min_sep, max_participations, encoded, reduction(reduction_fn)
        )

        steps = check_int("max_optimizer_steps", max_optimizer_steps, minimum=0)
        descent = _Descent(optimization.value_and_grad(loss_fn), steps)
        if init is not None:
            start = np.asarray(pad_coefs_to_n(init, p), np.float64)
            descent.start(start / start[0])
        else:
            _start_often(descent, p, workload)
        if report is not None:
            bound = dense_bound(n, n, reduction_fn, workload, None, min_sep, max_participations)
            report(optimization.Report(descent.loss, descent.steps_taken, descent.stopped, bound))
    return jnp.asarray(descent.best, dtype)


class _Descent:
    """Minimizes a loss of coefficients ``[p]`` that begin with 1; keeps the best it sees."""

    def __init__(self, value_and_grad: Callable[[Any], Any], most_steps: int) -> None:
        self.value_and_grad, self.most_steps = value_and_grad, most_steps
        self.best, self.loss, self.stopped = np.ones(1), math.inf, "converged"
        self.steps_taken = 0

    def _of_tail(self, tail: np.ndarray) -> tuple[float, np.ndarray]:
        loss, gradient = self.value_and_grad(jnp.asarray(np.concatenate([[1.0], tail])))
        # NaN where there is no telling.
        return (float(loss) if np.isfinite(loss) else math.inf), np.asarray(gradient)[1:]

    def cost(self, coef: np.ndarray) -> float:
        return self._of_tail(coef[1:])[0]

    def start(self, coef: np.ndarray) -> None:
        tail, loss, taken, stopped = bfgs(self._of_tail, coef[1:], self.most_steps)
        self.steps_taken += taken
        if loss < self.loss or not math.isfinite(self.loss):
            self.best, self.loss = np.concatenate([[1.0], tail]), loss
            self.stopped = stopped


def _start_often(descent: _Descent, p: int, workload: np.ndarray | None) -> None:
    if workload is not None and not workload[0] > 0:  # which has no powers
        workload = None
    root = np.asarray(banded_inverse_square_root_noising_coefs(p, workload), np.float64)
    powers = [
        np.asarray(banded_inverse_power_noising_coefs(p, gamma, workload))
        for gamma in np.linspace(0.3, 1, 15)
    ]
    powers = [coef / coef[0] for coef in powers]
    starts = [root / root[0], *sorted(powers, key=descent.cost)[:2]]
    for start in starts:
        descent.start(start)
    rng = np.random.default_rng(0)
    for size in (0.1, 0.03, 0.01):
        if p > 1 and descent.most_steps:
            descent.start(descent.best * (1 + size * rng.standard_normal(p) * (np.arange(p) > 0)))


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
            n, coef, min_sep, max_participations, use_matrix_upper_bound=False
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
    expected_batch_size: float,
    epsilon: float,
    delta: float,
    max_optimizer_steps: int = 250,
    reduction_fn: Callable[[jax.Array], jax.Array] = jnp.mean,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = _progress_bar,
    workload_coef: jax.Array | None = None,
    A: StreamingMatrix | None = None,
    accountant: str = "pld",
    report: optimization.ReportFnType | None = None,
) -> tuple[jax.Array, float]:
    """Chooses bands and coefficients of the least error at a privacy target, with amplification.

    Sampling is block-cyclic Poisson sampling (Algorithm 2 and Theorem 4 of
    https://arxiv.org/abs/2306.08153): the data are cut into b parts, and step t samples from part t
    mod b. More bands correlate noise better, fewer amplify privacy more. Candidates are the b that
    divide ``dataset_size`` and leave parts of at least a batch, up to the first of n or more; each
    is optimized by :func:`optimize_banded_toeplitz`. dp-accounting, for adding or removing one
    example, gives the noise multiplier of the candidates that may still win.

    Args:
      n: The number of steps of the workload.
      dataset_size: The number of examples.
      expected_batch_size: The expected number of examples in a step, positive; whole or not.
      epsilon: The privacy target is (epsilon, delta)-DP; positive and finite.
      delta: Strictly between 0 and 1.
      max_optimizer_steps: The most steps of L-BFGS for each b.
      reduction_fn: As for :func:`loss`.
      progress: Wraps the list of candidates while they are optimized, as `tqdm.tqdm` does; by
        default a progress bar, if it takes longer than two seconds and there is a terminal. None
        shows nothing.
      workload_coef: Coefficients of the workload, by default ones: prefix sums. See
        :func:`momentum_sgd_coefs`.
      A: In their place, a workload that need not be Toeplitz; see :func:`per_query_error`.
      accountant: Of dp-accounting: "pld", by privacy loss distributions, or "rdp", by Renyi
        divergences, which asks for about 6 % more noise.
      report: Called with an `optimization.Report` at the end: the loss of the coefficients chosen,
        the steps for all b together, and a lower bound as of :func:`optimize_banded_toeplitz`.

    Returns:
      coef: ``[b]`` coefficients of L2 norm 1, of the default float dtype; b is the number of bands
        chosen.
      stddev: standard deviation of the independent noise to privatize sums of examples with, if
        each is clipped to norm 1. The sensitivity of C is part of it.

    Raises:
      ValueError: if an argument is out of range, or does not go with another,
        ``expected_batch_size > dataset_size``, or no noise reaches the target.
      TypeError: if an integer argument is not one, or A is not a `StreamingMatrix`.
    """
    target = _amplification.Target(n, dataset_size, expected_batch_size, epsilon, delta, accountant)
    optimization.check_report(report)
    workload = known_workload(workload_coef, target.n)
    _check_one_workload(workload, A)
    found = {}
    bands = target.candidates()
    root = square_root(min(max(bands), target.n), workload)
    reduced = reduction(reduction_fn) if A is None else reduction_fn
    with jax.enable_x64(True):
        for b in progress(bands) if progress else bands:
            found[b] = _optimize_few_bands(
                target.n, root[:b], b, max_optimizer_steps, reduced, workload, A
            )
    b, noise_multiplier = target.best({b: reached.loss**0.5 for b, (_, reached) in found.items()})
    best, reached = found[b]
    if report is not None:
        bound = dense_bound(target.n, b, reduction_fn, workload, A, None, None)
        steps = sum(of_b.steps for _, of_b in found.values())
        report(dataclasses.replace(reached, steps=steps, lower_bound=bound))
    coef = jnp.asarray(best / np.linalg.norm(best), jnp.result_type(float))
    # Of the coefficients as they are given out, rounded.
    norm = float(np.linalg.norm(np.asarray(coef, np.float64)))
    return coef, noise_multiplier * norm


def optimized_bands(
    n: int, b: int, workload: np.ndarray | None, A: StreamingMatrix | None = None
) -> np.ndarray:
    """Coefficients ``[b]`` of L2 norm 1, of one compiled loop for many b, which may exceed n."""
    root = square_root(min(b, n), workload)
    with jax.enable_x64(True):
        coef, _ = _optimize_few_bands(n, root, b, 250, reduction(jnp.mean), workload, A)
    return coef / np.linalg.norm(coef)


def _optimize_few_bands(
    n: int,
    init: np.ndarray,
    b: int,
    steps: int,
    reduction_fn: Callable[[jax.Array], jax.Array],
    workload: np.ndarray | None,
    A: StreamingMatrix | None = None,
) -> tuple[np.ndarray, optimization.Report]:
    """Optimized coefficients ``[b]`` and their report, without compiling for every b anew.

    With A every b is compiled for: what is masked would cost too much.
    """
    free = min(b, n)
    size = 128 if A is None else free
    while size < free:
        size *= 4
    size = min(size, n)
    loss_fn = _masked_loss(n, reduction_fn, None if workload is None else workload.tobytes(), A)
    coef = np.zeros(size)
    coef[:free] = init
    params = {"coef": jnp.asarray(coef), "mask": jnp.asarray(np.arange(size) < free)}
    params, taken, stopped = optimization.minimized(loss_fn, params, max_optimizer_steps=steps)
    result = np.zeros(b)
    result[:free] = np.asarray(params["coef"])[:free]
    return result, optimization.Report(float(loss_fn(params)), taken, stopped)


@optimization.compiled_once
def _masked_loss(
    n: int,
    reduction_fn: Callable[[jax.Array], jax.Array],
    workload: bytes | None,
    A: StreamingMatrix | None,
) -> Callable[[dict[str, jax.Array]], jax.Array]:
    """The loss of the coefficients that a mask of ones and zeros lets through."""
    workload_coef: Any = None if workload is None else np.frombuffer(workload)

    def loss_fn(params: dict[str, jax.Array]) -> jax.Array:
        coef = params["coef"] * jax.lax.stop_gradient(params["mask"]).astype(float)
        return loss(coef, n, reduction_fn, workload_coef=workload_coef, A=A)

    return loss_fn
