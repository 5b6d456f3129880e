"""The optimization of BLTs."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_privacy_kernels._checks import check_instance, check_int, check_scalar, is_concrete
from jax_privacy_kernels._mirrored import Mirrored
from jax_privacy_kernels.matrix_factorization import optimization
from jax_privacy_kernels.matrix_factorization._scaling import scaled
from jax_privacy_kernels.matrix_factorization._workloads import known_workload
from jax_privacy_kernels.matrix_factorization.buffered_toeplitz._losses import LossFn
from jax_privacy_kernels.matrix_factorization.buffered_toeplitz._matrix import (
    MIN_GAP,
    BufferedToeplitz,
    blt_pair_from_theta_pair,
    blts_of_decays,
    min_gap,
)
from jax_privacy_kernels.matrix_factorization.buffered_toeplitz._sums import (
    KNOWN,
    TRACED,
    Arithmetic,
    Array,
)

__all__ = [
    "Parameterization",
    "get_init_blt",
    "grow",
    "optimize",
    "optimize_loss",
]

Params: TypeAlias = Any
"""A tree of arrays, which depends on the parameterization."""


@dataclasses.dataclass(frozen=True)
class Parameterization(Mirrored):
    """What :func:`optimize_loss` varies.

    Attributes:
      params_from_blt: Maps C to parameters, a tree of arrays.
      blt_and_inverse_from_params: Maps them to ``(C, C^-1)``.
    """

    params_from_blt: Callable[[BufferedToeplitz], Params]
    blt_and_inverse_from_params: Callable[[Params], tuple[BufferedToeplitz, BufferedToeplitz]]

    @classmethod
    def strategy_blt(cls) -> Parameterization:
        """The parameters are C itself, a `BufferedToeplitz`."""
        return cls(_same, _with_inverse)

    @classmethod
    def buf_decay_pair(cls) -> Parameterization:
        """The parameters are the decays of C and of ``C^-1``: see :func:`blt_pair_from_theta_pair`.

        No eigenvalues are computed on the way.
        """
        return cls(_decay_pair, _blts_of_decay_pair)

    @classmethod
    def interlaced_decays(cls) -> Parameterization:
        """The parameters are free numbers, and any of them make a well-behaved BLT.

        C has positive scales and decays in (0, 1), and ``C^-1`` positive decays, if and only if the
        decays interlace: ``1 > theta_1 > theta_hat_1 > theta_2 > ... > theta_hat_m > 0``. (The
        poles and zeros of a sum of simple fractions with positive numerators alternate, see
        Theorem 1 of https://arxiv.org/abs/2504.21413.) The parameters are
        ``logit(1 - theta_1)`` and the logs of the differences, along this sequence, of
        ``logit(1 - decay)``: decays close to 0 and 1 take no small steps.

        They are a pair of arrays ``[2 m]``; the second says which of the first are free (1), and
        which are not (0).
        """
        return cls(_interlaced, _blts_of_interlaced)

    def get_loss_fn(self, loss_fn: LossFn) -> Callable[[Params], jax.Array]:
        """Returns the penalized loss as a function of the parameters.

        The same one for the same loss, so that `optimization.optimize` compiles it once.
        """
        check_instance("loss_fn", loss_fn, LossFn)
        return _penalized_loss(loss_fn, self.blt_and_inverse_from_params)


@optimization.compiled_once
def _penalized_loss(
    loss_fn: LossFn, blts: Callable[[Params], tuple[BufferedToeplitz, BufferedToeplitz]]
) -> Callable[[Params], jax.Array]:
    return lambda params: loss_fn.penalized_loss(*blts(params))


def _same(blt: BufferedToeplitz) -> BufferedToeplitz:
    return blt


def _with_inverse(blt: BufferedToeplitz) -> tuple[BufferedToeplitz, BufferedToeplitz]:
    return blt, blt.inverse(skip_checks=True)


def _decay_pair(blt: BufferedToeplitz) -> tuple[Array, Array]:
    return blt.buf_decay, blt.inverse().buf_decay


def _blts_of_decay_pair(
    params: tuple[jax.Array, jax.Array],
) -> tuple[BufferedToeplitz, BufferedToeplitz]:
    return blt_pair_from_theta_pair(*params)


def _logits(blt: BufferedToeplitz) -> np.ndarray:
    """``logit(1 - decay)`` for the decays of C and ``C^-1``, which interlace."""
    pair = blt.canonicalize(), blt.inverse()
    decays = np.stack([np.asarray(x.buf_decay, np.float64) for x in pair], axis=1).ravel()
    with np.errstate(all="ignore"):
        logits = np.log1p(-decays) - np.log(decays)
    if not (np.all(np.isfinite(logits)) and np.all(np.diff(logits) > 0)):
        raise ValueError(
            "expected a BLT of positive output_scale, buf_decay in (0, 1) and pillutla_score() "
            f"below 1, found\n{blt}\nUse Parameterization.buf_decay_pair() for others."
        )
    return logits


def _interlaced_params(logits: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Parameters of ``size`` buffers, those that are missing held where they do nothing.

    Their decays are all but the same in C and in ``C^-1``, so that their scales are all but 0.
    """
    idle = size - len(logits) // 2
    params = np.concatenate([logits[:1], np.log(np.diff(logits)), np.tile([0.0, -25.0], idle)])
    return params, np.repeat([1.0, 0.0], [len(logits), 2 * idle])


def _logits_of_steps(steps: Array, on: Arithmetic) -> Array:
    # Not cumsum, which takes longer to compile.
    return np.tri(len(steps)) @ on.xp.concatenate([steps[:1], on.xp.exp(steps[1:])])


def _interlaced(blt: BufferedToeplitz) -> tuple[np.ndarray, np.ndarray]:
    return _interlaced_params(_logits(blt), len(blt.buf_decay))


def _blts_of_interlaced(params: Params) -> tuple[BufferedToeplitz, BufferedToeplitz]:
    on = KNOWN if is_concrete(params) else TRACED
    steps, free = (on.xp.asarray(x) for x in params)
    steps = on.xp.where(free > 0, steps, on.constant(steps))
    with np.errstate(over="ignore"):
        decays = 1 / (1 + on.xp.exp(_logits_of_steps(steps, on)))
    return blts_of_decays(decays[0::2], decays[1::2], on)


def get_init_blt(
    num_buffers: int = 3, init_blt: BufferedToeplitz | None = None
) -> BufferedToeplitz:
    """Returns a BLT to start an optimization from.

    Args:
      num_buffers: The number of buffers, at least 0.
      init_blt: The result, if it is given; by default it is
        :meth:`BufferedToeplitz.from_rational_approx_to_sqrt_x` with decays and Pillutla score at
        most ``1 - 1e-6``, or the identity for 0 buffers.

    Raises:
      ValueError: If ``init_blt`` has another number of buffers, or ``num_buffers < 0``, or there is
        a BLT to be made and JAX is not in 64-bit mode.
      TypeError: If ``num_buffers`` is not an integer.
    """
    m = check_int("num_buffers", num_buffers, minimum=0)
    if init_blt is None:
        if m == 0:
            return BufferedToeplitz.build([], [])
        return BufferedToeplitz.from_rational_approx_to_sqrt_x(
            m, max_buf_decay=1 - 1e-6, max_pillutla_score=1 - 1e-6
        )
    check_instance("init_blt", init_blt, BufferedToeplitz)
    if len(init_blt.buf_decay) != m:
        raise ValueError(
            f"expected init_blt with num_buffers={m} buffers, found {len(init_blt.buf_decay)}"
        )
    return init_blt


# The default, on the free parameters of `interlaced_decays`.
_OPTIMIZER = optax.lbfgs(
    memory_size=10,
    linesearch=optax.scale_by_backtracking_linesearch(
        60, decrease_factor=0.5, increase_factor=float("inf"), store_grad=True
    ),
)
# For other parameterizations: it takes many more steps, but leads to decays within 1e-10 of 1. The
# tuning is that of jax_privacy.
_CAREFUL_OPTIMIZER = optax.lbfgs(
    memory_size=15,
    linesearch=optax.scale_by_zoom_linesearch(
        100, curv_rtol=0.5, max_learning_rate=1.0, stepsize_precision=1e-20
    ),
)


def _is_flat(loss: jax.Array, gradient: Params) -> jax.Array:
    """Where the loss is flat, to 1e-8 of itself and less."""
    largest = jnp.stack([jnp.abs(leaf).max() for leaf in jax.tree.leaves(gradient)]).max()
    return largest <= 1e-8 * jnp.abs(loss)


@optimization.jax_enable_x64
def optimize_loss(
    loss_fn: LossFn,
    num_buffers: int = 1,
    init_blt: BufferedToeplitz | None = None,
    parameterization: Parameterization | None = None,
    *,
    report: optimization.ReportFnType | None = None,
    **kwargs: Any,
) -> tuple[BufferedToeplitz, jax.Array]:
    """Minimizes a loss over BLTs of m buffers, in float64.

    Losses for several participations have local minima. If neither ``init_blt`` nor
    ``parameterization`` is given, buffers are added one at a time, each from three starts: that of
    :func:`get_init_blt`, and the best BLT of one buffer less with one that decays slower or faster
    than all others.

    Args:
      loss_fn: The loss.
      num_buffers: The number m of buffers, at least 0.
      init_blt: The BLT to start from; by default see above, or that of :func:`get_init_blt`.
      parameterization: What is varied, by default :meth:`Parameterization.interlaced_decays`.
      report: Called with an `optimization.Report` at the end.
      **kwargs: ``max_optimizer_steps`` (600 for each start), ``callback`` and ``optimizer``, as of
        `optimization.optimize`. A callback makes each step a call, and sees parameters of the
        ``parameterization``.

    Returns:
      The BLT, of float64, and its loss without penalties.

    Raises:
      ValueError: If ``num_buffers`` is not that of ``init_blt``, or below 0; or ``init_blt`` has no
        parameters.
      TypeError: If ``num_buffers`` is not an integer, or an argument is unknown.
      RuntimeError: If no BLT with a finite loss is found.

    Warns:
      UserWarning: If a scale of the result is within 1e-8 of 0, so that fewer buffers would do.
    """
    m = check_int("num_buffers", num_buffers, minimum=0)
    check_instance("loss_fn", loss_fn, LossFn)
    optimization.check_report(report)
    if parameterization is not None:
        check_instance("parameterization", parameterization, Parameterization)
    start = get_init_blt(m, init_blt)
    if m == 0 or (init_blt is None and parameterization is None):
        *_, (blt, reached) = grow(loss_fn, m, kwargs)
    else:
        parameterization = parameterization or Parameterization.interlaced_decays()
        params = parameterization.params_from_blt(start)
        blt, reached, _ = _minimize(loss_fn, parameterization, params, m, kwargs)
    loss = reached.loss
    if not np.isfinite(loss):
        raise RuntimeError(
            f"expected the optimization to end at a finite loss, found {loss} for\n{blt}"
        )
    scales = np.abs(np.asarray(blt.output_scale))
    if np.any(scales < 1e-8):
        warnings.warn(
            f"buffers of output_scale {scales.min()} do next to nothing: fewer of them would do",
            stacklevel=3,
        )
    if report is not None:
        report(reached)
    return blt, jnp.asarray(loss)


def grow(
    loss_fn: LossFn, size: int, kwargs: dict[str, Any]
) -> Iterator[tuple[BufferedToeplitz, optimization.Report]]:
    """The best BLTs of 0, 1, ... ``size`` buffers, each with the report of all steps up to it."""
    blt = BufferedToeplitz.build([], [])
    taken = 0
    yield blt, optimization.Report(float(loss_fn.loss(blt)), taken, "converged")
    parameterization = Parameterization.interlaced_decays()
    logits: Any = np.zeros(0)
    for m in range(1, size + 1):
        starts = [_logits(get_init_blt(m))]
        if m == 1:
            starts.append(np.array([-math.log(loss_fn.n) / 2 - 1, 0]))
        else:
            starts.append(np.concatenate([logits[0] - [2, 1], logits]))
            starts.append(np.concatenate([logits, logits[-1] + [1, 2]]))
        # All of one shape, so that the loss is compiled once.
        found = [
            _minimize(loss_fn, parameterization, _interlaced_params(start, size), m, kwargs)
            for start in starts
        ]
        taken += sum(reached.steps for _, reached, _ in found)
        blt, reached, logits = min(found, key=lambda result: result[1].loss)
        yield blt, dataclasses.replace(reached, steps=taken)


def _minimize(
    loss_fn: LossFn,
    parameterization: Parameterization,
    params: Params,
    m: int,
    kwargs: dict[str, Any],
) -> tuple[BufferedToeplitz, optimization.Report, np.ndarray | None]:
    """The BLT of m buffers that the parameters lead to, and its logits if they interlace.

    The loss is infinite where there is no telling it.
    """
    interlaced = parameterization == Parameterization.interlaced_decays()
    defaults = {
        "max_optimizer_steps": 600,
        "optimizer": _OPTIMIZER if interlaced else _CAREFUL_OPTIMIZER,
        "done": None if "optimizer" in kwargs else _is_flat,
    }
    params, taken, stopped = optimization.minimized(
        parameterization.get_loss_fn(loss_fn), params, **(defaults | kwargs)
    )
    logits: Any = None
    if interlaced:
        params = [np.asarray(x)[: 2 * m] for x in params]
        logits = _logits_of_steps(params[0], KNOWN)
    blt, _ = parameterization.blt_and_inverse_from_params(params)
    loss = math.inf
    if np.all(np.isfinite(np.stack([blt.buf_decay, blt.output_scale]))):
        blt = blt.canonicalize()
        if not min_gap(np.asarray(blt.buf_decay), KNOWN) < MIN_GAP:
            with contextlib.suppress(ValueError):  # a loss that float64 does not hold
                loss = float(loss_fn.loss(blt))
    reached = optimization.Report(loss if math.isfinite(loss) else math.inf, taken, stopped)
    return blt, reached, logits


@optimization.jax_enable_x64
def optimize(
    *,
    n: int,
    min_sep: int = 1,
    max_participations: int | None = 1,
    error: str = "max",
    min_buffers: int = 0,
    max_buffers: int = 10,
    rtol: float = 1.01,
    init_blt: BufferedToeplitz | None = None,
    workload_coef: jax.Array | None = None,
    report: optimization.ReportFnType | None = None,
    **kwargs: Any,
) -> BufferedToeplitz:
    """Finds a BLT of low error times squared sensitivity, and how many buffers it takes.

    Buffers are added one at a time, see :func:`optimize_loss`, until one more does not lower the
    loss by a factor of ``rtol``. All steps are compiled loops, of one program for all numbers of
    buffers.

    For one participation and the maximum error of prefix sums the loss has a closed form, and n
    hardly matters.
    Otherwise a step is O(n m): see :meth:`LossFn.build_min_sep`.

    Args:
      n: The number of iterations.
      min_sep: Minimum separation of a user's participations; 1 allows every round.
      max_participations: The most rounds a user takes part in, or None for no limit.
      error: "max" or "mean": the largest or the mean squared error of the queries.
      min_buffers: The fewest buffers, at least 0.
      max_buffers: The most buffers, at most 15. 3 to 7 usually are best.
      rtol: See above.
      init_blt: The BLT to start from, if ``min_buffers == max_buffers``; then no other is tried.
      workload_coef: Coefficients of the workload, by default ones: prefix sums. See
        `toeplitz.momentum_sgd_coefs`.
      report: Called with an `optimization.Report` at the end; its steps are those of all numbers of
        buffers.
      **kwargs: As for :func:`optimize_loss`, and the same for each number of buffers.

    Returns:
      The BLT, of float64, whatever the mode of the caller.

    Raises:
      ValueError: If an argument is out of range, or ``init_blt`` has another number of buffers.
      TypeError: If an integer argument is not one, or an argument is unknown.
      RuntimeError: If no BLT with a finite loss is found.
    """
    fewest = check_int("min_buffers", min_buffers, minimum=0)
    most = check_int("max_buffers", max_buffers, minimum=0)
    if not fewest <= most <= 15:
        raise ValueError(
            "expected min_buffers <= max_buffers <= 15, more of which have decays too close to "
            f"each other to compute with, found min_buffers={fewest} and max_buffers={most}"
        )
    rtol = check_scalar("rtol", rtol, lambda x: x > 0, "positive")
    if init_blt is not None and fewest != most:
        raise ValueError(
            "expected min_buffers == max_buffers with init_blt, "
            f"found min_buffers={fewest} and max_buffers={most}"
        )
    optimization.check_report(report)
    exponent: Any = 0
    if workload_coef is not None:  # penalties are for losses of ordinary size
        workload, exponent = scaled(jnp.asarray(known_workload(workload_coef, n)))
        workload_coef = jnp.asarray(workload)
    loss_fn = LossFn.build_min_sep(
        n, error, min_sep, max_participations, workload_coef=workload_coef
    )
    if loss_fn.max_participations == 1 and error == "max" and workload_coef is None:
        loss_fn = LossFn.build_closed_form_single_participation(n)
    best: BufferedToeplitz | None = None
    reached = optimization.Report(math.inf, 0, "converged")
    if init_blt is not None:
        reports: list[optimization.Report] = []
        best, _ = optimize_loss(loss_fn, most, init_blt, report=reports.append, **kwargs)
        reached = reports[0]
    else:
        steps = 0
        for m, (blt, found) in enumerate(grow(loss_fn, most, kwargs)):
            steps = found.steps
            if m < fewest:
                continue
            if best is not None and not rtol * found.loss < reached.loss:
                break
            best, reached = blt, found
        reached = dataclasses.replace(reached, steps=steps)
    if best is None or not math.isfinite(reached.loss):
        raise RuntimeError(f"expected a BLT with a finite loss, found {reached.loss} for\n{best}")
    if report is not None:
        loss = math.ldexp(reached.loss, 2 * int(exponent))
        report(dataclasses.replace(reached, loss=loss))
    return best
