"""Strategies given as dense n x n matrices: their error, and their optimization.

Their sensitivity is in `sensitivity`. Everything here takes O(n^3) time and O(n^2) memory.

    >>> C = optimize(8, epochs=2)
    >>> error = per_query_error(strategy_matrix=C).mean() ** 0.5
    >>> print(f"{error:.3f} x {sensitivity.fixed_epoch_sensitivity(C, epochs=2):.3f}")
    2.147 x 1.000
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.linalg
import numpy as np

from jax_privacy_kernels._checks import (
    check_instance,
    check_int,
    check_memory,
    check_one_given,
    check_real,
    check_scalar,
    is_concrete,
    nan_unless,
    owned,
    promote_types,
)
from jax_privacy_kernels.matrix_factorization import checks, optimization, sensitivity
from jax_privacy_kernels.matrix_factorization._dual import (
    Certificate,
    Found,
    lower_bound,
)
from jax_privacy_kernels.matrix_factorization._dual_iteration import least
from jax_privacy_kernels.matrix_factorization._scaling import exponent_of_small, restored, scaled

__all__ = [
    "Certificate",
    "certificate",
    "get_orthogonal_mask",
    "honaker_tree",
    "optimize",
    "per_query_error",
    "pg_tol_termination_fn",
    "strategy_from_X",
]


def per_query_error(
    *,
    strategy_matrix: jax.Array | None = None,
    noising_matrix: jax.Array | None = None,
    workload_matrix: jax.Array | None = None,
    skip_checks: bool = False,
) -> jax.Array:
    """Returns the expected squared error of every query, for independent noise of variance 1.

    It is the squared norm of every row of ``B = A C^-1``.

    Args:
      strategy_matrix: ``[n, n]`` C, invertible and lower-triangular; or
      noising_matrix: ``[n, m]`` ``C^-1``. Exactly one of the two.
      workload_matrix: ``[n, n]`` A, lower-triangular; by default prefix sums, `jax.numpy.tri`.
      skip_checks: Leaves values unchecked. Inside a trace they are not checked either way.

    Returns:
      ``[n]`` array of the dtype that the matrices promote to, at least the default float dtype if
      there is no workload.

    Raises:
      ValueError: If not exactly one of C and ``C^-1`` is given, or matrices are not finite, of
        shapes that do not fit, or square and not lower-triangular.
    """
    check_one_given(strategy_matrix=strategy_matrix, noising_matrix=noising_matrix)
    name = "strategy_matrix" if noising_matrix is None else "noising_matrix"
    M = _real_matrix(name, strategy_matrix if strategy_matrix is not None else noising_matrix)
    n = len(M)
    if workload_matrix is None:
        A = jnp.tri(n, dtype=jnp.result_type(float))  # whose default differs between JAX versions
    else:
        A = _real_matrix("workload_matrix", workload_matrix)
    if A.shape != (n, n):
        raise ValueError(f"expected workload_matrix of shape ({n}, {n}), found {A.shape}")
    dtype = promote_types(promote_types(M.dtype, A.dtype), jnp.float32)
    M, A = M.astype(dtype), A.astype(dtype)
    if strategy_matrix is not None:
        # Of a C that is not square, which inverse is meant would decide the error.
        checks.check_square(M, "strategy_matrix")
        if not skip_checks:
            checks.check(A=A, C=M)
    elif not skip_checks:
        checks.check(A=A, B=M)
    (M, scale), (A, workload_scale) = (
        (jnp.asarray(x.values, dtype), x.scale) for x in (scaled(M), scaled(A))
    )
    if strategy_matrix is not None:
        B = jnp.linalg.solve(M.T, A.T).T
    else:
        B = jnp.matmul(A, M, precision="highest")
    errors = jnp.sum(B * B, axis=1)
    vanished = (errors == 0) & (B != 0).any(axis=1)
    if not is_concrete(vanished) or vanished.any():
        errors = nan_unless(~vanished, errors)
    power = -2 if strategy_matrix is not None else 2
    powers = (scale, power), (workload_scale, 2)
    if skip_checks and is_concrete((errors, powers)) and not jnp.isfinite(errors).all():
        exponent = int(scale) * power + int(workload_scale) * 2
        return jnp.asarray(np.ldexp(np.asarray(errors, np.float64), exponent), dtype)
    return restored("the squared errors", errors, dtype, *powers)


def _real_matrix(name: str, M: Any) -> jax.Array:
    M = check_real(f"{name} to hold real numbers", owned(name, M))
    checks.check_is_matrix(M, name)
    if M.size == 0:
        raise ValueError(f"expected {name} to have entries, found shape {M.shape}")
    return M


def honaker_tree(n: int) -> tuple[jax.Array, jax.Array]:
    """Returns strategy and noising matrix of binary tree aggregation with Honaker's estimates.

    The tree has a node for every interval of ``2^h`` steps from a multiple of ``2^h`` on that ends
    within n. Every prefix sum is estimated with the least variance from the nodes that are complete
    by then, as in Honaker's online estimator and in DP-FTRL (https://arxiv.org/abs/2103.00039): a
    node of height h with variance ``v_h = 2^h / (2^(h+1) - 1)``.

    C is not square. One participation has the sensitivity ``sqrt(floor(log2 n) + 1)`` at most, and
    `sensitivity.get_min_sep_sensitivity_upper_bound` and `sensitivity.fixed_epoch_sensitivity` take
    C for several. A privatizer takes the noising matrix as it is, keeps no state, and draws
    O(log(n)^2) samples a step for every parameter in the middle, O(n) at worst. O(n^2) memory.

    Args:
      n: The number of steps.

    Returns:
      ``(C, noising)``, both of the default float dtype. C is ``[m, n]`` of zeros and ones, with
      m < 2 n the number of nodes, in the order of completion; noising is ``[n, m]``, and the noise
      of the prefix sums is ``tri @ noising @ z``.

    Raises:
      ValueError: if n < 1, or the matrices do not fit into memory.
      TypeError: if n is not an integer.
    """
    n = check_int("n", n)
    check_memory("n", n, 64 * n * n)
    nodes = [
        (start + 2**h, h) for h in range(n.bit_length()) for start in range(0, n - 2**h + 1, 2**h)
    ]
    index = {node: i for i, node in enumerate(sorted(nodes))}
    C = np.zeros((len(nodes), n))
    estimates: dict[tuple[int, int], np.ndarray] = {}
    for (end, h), i in index.items():
        C[i, end - 2**h : end] = 1
        own = np.zeros(len(nodes))
        own[i] = 1
        if h:
            # Its own noise has variance 1, the sum of its children 2 v_{h-1}.
            children = estimates[end - 2 ** (h - 1), h - 1] + estimates[end, h - 1]
            of_children = 2**h / (2**h - 1)
            own = (of_children * own + children) / (1 + of_children)
        estimates[end, h] = own
    prefixes = np.zeros((n, len(nodes)))
    for t in range(1, n + 1):
        last = t & -t
        prefixes[t - 1] = estimates[t, last.bit_length() - 1]
        if t > last:
            prefixes[t - 1] += prefixes[t - last - 1]
    noising = np.diff(prefixes, axis=0, prepend=0)
    dtype = jnp.result_type(float)
    return jnp.asarray(C, dtype), jnp.asarray(noising, dtype)


def get_orthogonal_mask(n: int, epochs: int = 1) -> jax.Array:
    """Returns the ``[n, n]`` mask that is 0 where one user may be in rounds i and j, ``i != j``.

    All epochs visit users in one order, so these are the i and j that ``n / epochs`` divides the
    difference of (https://arxiv.org/abs/2211.06530). Where a Gram matrix is 0 there, its diagonal
    alone makes up the sensitivity.

    Args:
      n: The number of rounds.
      epochs: The number of epochs, which divides n.

    Returns:
      A float array of zeros and ones.

    Raises:
      ValueError: If an argument is below 1, or ``epochs`` does not divide n.
      TypeError: If one is not an integer.
    """
    n, epochs = check_int("n", n), check_int("epochs", epochs)
    if n % epochs:
        raise ValueError(
            f"epochs must divide n: expected epochs to divide n={n}, found epochs={epochs}"
        )
    check_memory("n", n, 8 * n * n)
    i = np.arange(n)
    together = (i[:, None] - i) % (n // epochs) == 0
    return jnp.asarray(~together | np.eye(n, dtype=bool), jnp.result_type(float))


def strategy_from_X(X: jax.Array) -> jax.Array:
    """Returns the lower-triangular C with positive diagonal and ``C^T C = X``.

    Args:
      X: ``[n, n]`` Gram matrix, symmetric and positive definite.

    Returns:
      C, a Cholesky factor from the last row up; NaN if X is not positive definite.

    Raises:
      ValueError: If X is not a square matrix with entries.
      TypeError: If it is not real.
    """
    X = _real_matrix("X", X)
    checks.check_square(X, "X")
    return jnp.linalg.cholesky(X[::-1, ::-1]).T[::-1, ::-1]


def pg_tol_termination_fn(step_info: optimization.CallbackArgs) -> bool:
    """Whether no entry of the (projected) gradient exceeds 1e-3: a callback that ends there."""
    check_instance("step_info", step_info, optimization.CallbackArgs)
    return bool(jnp.abs(jnp.asarray(step_info.grad)).max() <= 1e-3)


def certificate(
    strategy_matrix: jax.Array,
    *,
    epochs: int = 1,
    bands: int | None = None,
    equal_norm: bool = False,
    A: jax.Array | None = None,
) -> Certificate:
    """Returns the loss of a strategy, and what no strategy of its kind can go below.

    The loss is the mean of :func:`per_query_error` times the squared sensitivity for the
    participation of :func:`optimize`. The bound is that of a dual problem: it holds for every
    strategy. Without limits on the bands the dual is solved, whatever the strategy; with them the
    bound is near the optimum if the strategy is, and weak if it is not. Also for strategies of any
    other module, at sizes for which O(n^3), some twenty times, is no matter.

    Args:
      strategy_matrix: ``[n, n]`` C, lower-triangular and invertible.
      epochs: As for :func:`optimize`, and
      bands: likewise; C may have no more, and
      equal_norm: likewise; then the sensitivity is the root of ``epochs`` times the largest norm of
        a column, for any participations that columns of C are orthogonal for, and
      A: likewise.

    Returns:
      A `Certificate`, computed in float64.

    Raises:
      ValueError: If an integer argument is out of range, ``epochs`` does not divide n, a matrix is
        not ``[n, n]``, finite and lower-triangular, or C has more than ``bands`` bands.
      TypeError: If an integer argument is not one.
    """
    C = np.asarray(_real_matrix("strategy_matrix", strategy_matrix), np.float64)
    checks.check(C=C)
    n = len(C)
    workload, mask = _problem(n, epochs, bands, A)
    if bands is not None and np.tril(C, -min(bands, n)).any():
        raise ValueError(f"expected strategy_matrix of at most {bands} bands, found more")
    with jax.enable_x64(True):
        wide = jnp.asarray(C)
        if equal_norm:
            squared = epochs * float(sensitivity.single_participation_sensitivity(wide)) ** 2
        else:
            squared = float(sensitivity.fixed_epoch_sensitivity(wide, epochs)) ** 2
        error = per_query_error(strategy_matrix=wide, workload_matrix=workload).mean()
        X = jnp.matmul(wide.T, wide, precision="highest") / squared
        bound = float(lower_bound(X, workload, mask, int(epochs), bool(equal_norm)))
        # That of strategies without limits on their bands holds for all, and is near for these.
        found = least(workload, int(epochs), bool(equal_norm), 2e-6, _BOUND_STEPS, near=X)
        if found is not None:
            bound = max(bound, found.lower_bound)
        return Certificate(float(error) * squared, bound)


_BOUND_STEPS = 60


def _problem(
    n: int, epochs: int, bands: int | None, A: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The workload, and the mask of a Gram matrix, in float64."""
    mask = np.asarray(get_orthogonal_mask(n, epochs))
    if bands is not None:
        mask = mask * np.asarray(sensitivity.banded_symmetric_mask(n, bands))
    if A is not None:
        checks.check(A=_real_matrix("A", A))  # A itself keeps its 64 bits
        if jnp.shape(A) != (n, n):
            raise ValueError(f"expected A of shape ({n}, {n}), found {jnp.shape(A)}")
    with jax.enable_x64(True):
        workload = jnp.asarray(np.tri(n) if A is None else A, jnp.float64)
        return workload, jnp.asarray(mask, jnp.float64)


def optimize(
    n: int,
    *,
    epochs: int = 1,
    bands: int | None = None,
    equal_norm: bool = False,
    A: jax.Array | None = None,
    max_optimizer_steps: int = 10000,
    reduction_fn: Callable[[jax.Array], jax.Array] = jnp.mean,
    callback: Callable[[optimization.CallbackArgs], bool | None] | None = pg_tol_termination_fn,
    rtol: float = 1e-5,
    report: optimization.ReportFnType | None = None,
) -> jax.Array:
    """Minimizes the error over strategies C of sensitivity 1.

    In float64, with the Gram matrix ``X = C^T C`` as parameters. For the mean error, and without
    limits on the bands, the optimum is a fixed point, which some ten to forty eigenvalue problems
    come near to (https://arxiv.org/abs/2202.08312, for one participation); otherwise it is found by
    L-BFGS, with the gradient projected to what leaves the sensitivity at 1
    (https://arxiv.org/abs/2211.06530). The participation it is 1 for:

    * one (the default), https://arxiv.org/abs/2202.08312;
    * one per epoch, all epochs in one order: ``epochs``;
    * any number, ``bands`` steps apart or more: ``bands = min_sep`` with ``equal_norm``, up to the
      root of their number (https://arxiv.org/abs/2306.08153);
    * amplified by sampling: ``bands`` below the separation, with ``equal_norm``.

    With the default ``callback`` steps are compiled, and end once the mean error is proved to be
    near the least: see :func:`certificate`.

    Args:
      n: The number of rounds.
      epochs: The number of epochs, which divides n.
      bands: The most bands of C, or None for all.
      equal_norm: Whether all columns of C have the same norm. With one epoch they always do.
      A: ``[n, n]`` workload, by default prefix sums.
      max_optimizer_steps: The most steps, of either kind.
      reduction_fn: Makes a scalar of the errors ``[n]`` of the queries: `jax.numpy.mean`, for which
        this was tuned, or another differentiable function.
      callback: As for `optimization.optimize`. The default stands for what ``rtol`` says.
      rtol: By default, ends once the mean error is above its lower bound by at most this, relative
        to it; or once 100 steps lower the error by less than a thousandth of that.
      report: Called with an `optimization.Report` at the end. It has a lower bound if
        ``reduction_fn`` is the mean.

    Returns:
      C, ``[n, n]``, lower-triangular, of the default float dtype.

    Raises:
      ValueError: If an integer argument is out of range, ``epochs`` does not divide n, or A is not
        ``[n, n]``, finite and lower-triangular.
      TypeError: If an integer argument is not one.
    """
    n, epochs = check_int("n", n), check_int("epochs", epochs)
    steps = check_int("max_optimizer_steps", max_optimizer_steps, minimum=0)
    rtol = check_scalar("rtol", rtol, lambda x: x > 0, "positive")
    optimization.check_report(report)
    workload, mask = _problem(n, epochs, bands, A)
    dtype = jnp.result_type(float)
    is_default, is_mean = callback is pg_tol_termination_fn, reduction_fn is jnp.mean
    with jax.enable_x64(True):
        objective = _Objective(workload, mask, epochs, equal_norm, reduction_fn)
        found: Found | None = None
        if is_default and is_mean and bands is None:
            found = least(workload, epochs, equal_norm, rtol, steps)
        if is_default and (found is None or found.stopped == "max_optimizer_steps"):
            found = _until_proved(objective, found or Found(_start(n, epochs), 0, ""), rtol, steps)
        if found is None:
            found = Found(
                *optimization.minimized(
                    objective.loss_and_gradient,
                    _start(n, epochs),
                    max_optimizer_steps=steps,
                    grad=True,
                    callback=callback,
                )
            )
        if report is not None:
            loss = float(objective.loss_and_gradient(found.X)[0])
            bound = max(found.lower_bound, objective.lower_bound(found.X))
            report(optimization.Report(loss, found.steps, found.stopped, bound or None))
        return strategy_from_X(found.X).astype(dtype)


def _start(n: int, epochs: int) -> jax.Array:
    return jnp.eye(n, dtype=jnp.float64) / epochs


@dataclasses.dataclass(frozen=True)
class _Objective:
    """What is minimized over Gram matrices."""

    workload: jax.Array
    mask: jax.Array
    epochs: int
    equal_norm: bool
    reduction_fn: Callable[[jax.Array], jax.Array]
    factor: float = 1.0

    @functools.cached_property
    def loss_and_gradient(self) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
        return functools.partial(
            _loss_and_projected_gradient,
            workload=self.workload,
            mask=self.mask,
            epochs=self.epochs,
            equal_norm=self.equal_norm,
            reduction_fn=self.reduction_fn,
            factor=self.factor,
        )

    def lower_bound(self, X: jax.Array) -> float:
        """Of the mean error; 0 for other reductions."""
        if self.reduction_fn is not jnp.mean:
            return 0.0
        bound = lower_bound(X, self.workload, self.mask, self.epochs, self.equal_norm)
        return float(bound) * self.factor


_TURN = 100  # steps of L-BFGS between two bounds, each of which takes as long as a few


def _until_proved(objective: _Objective, found: Found, rtol: float, steps: int) -> Found:
    """Steps of L-BFGS until the loss is near its lower bound, or steps hardly lower it any more."""
    X, taken, _, bound = found
    # Only here, as other callbacks see losses as they are.
    exponent = exponent_of_small(float(objective.loss_and_gradient(X)[0]))
    objective, bound = dataclasses.replace(objective, factor=2.0**-exponent), bound * 2.0**-exponent
    before = math.inf
    while taken < steps:
        X, count, stopped = optimization.minimized(
            objective.loss_and_gradient,
            X,
            max_optimizer_steps=min(_TURN, steps - taken),
            grad=True,
        )
        taken += count
        loss = float(objective.loss_and_gradient(X)[0])
        bound = max(bound, objective.lower_bound(X))
        is_proved = loss <= bound * (1 + rtol)
        if is_proved or stopped == "converged" or before - loss <= 1e-3 * rtol * loss:
            stopped = "proved" if is_proved else "converged"
            break
        before = loss
    else:
        stopped = "max_optimizer_steps"
    return Found(X, taken, stopped, bound * 2.0**exponent)


def _loss_and_projected_gradient(
    X: jax.Array,
    *,
    workload: jax.Array,
    mask: jax.Array,
    epochs: int,
    equal_norm: bool,
    reduction_fn: Callable[[jax.Array], jax.Array],
    factor: float,
) -> tuple[jax.Array, jax.Array]:
    """The error of any C with Gram matrix X, ``diag(A X^-1 A^T)`` reduced, and where to go.

    Both are times a factor.
    """
    n = len(X)
    H = jax.scipy.linalg.solve(X, workload.T, assume_a="pos")
    errors = jnp.sum(workload * H.T, axis=1)
    loss, weights = jax.value_and_grad(reduction_fn)(errors)
    # The derivative of a^T X^-1 a is -h h^T, with h = X^-1 a.
    gradient = -jnp.matmul(H * weights[None, :], H.T, precision="highest")
    diagonal = jnp.diag(gradient)
    # Rounds of one user share the sensitivity: only exchanges among them are free.
    shared = diagonal.reshape(epochs, -1).mean(axis=0)
    diagonal = jnp.zeros_like(diagonal) if equal_norm else diagonal - jnp.tile(shared, epochs)
    gradient = gradient.at[jnp.diag_indices(n)].set(diagonal)
    return loss * factor, gradient * mask * factor


def __dir__() -> list[str]:  # for completion: no imported names
    return sorted(__all__)
