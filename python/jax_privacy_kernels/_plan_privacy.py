"""How examples are sampled, and what makes a mechanism private then: its noise, and why it holds.

Every class is a way to sample. Its jobs make the mechanisms that it takes, one by one, each with
the noise for the target.
"""

from __future__ import annotations

import dataclasses
import decimal
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

from jax_privacy_kernels import _plan_rows, monte_carlo
from jax_privacy_kernels._plan_rows import Mechanism, Problem
from jax_privacy_kernels.matrix_factorization._amplification import Target

__all__ = ["BallsInBins", "FixedOrder", "Job", "Poisson", "Private"]


@dataclasses.dataclass(frozen=True)
class Private:
    """A mechanism with its noise; attributes are those of `planning.Row`."""

    mechanism: Mechanism
    sampling: str
    noise_multiplier: float
    epsilon: float
    event: Any
    guarantee: str


Job = Callable[[], Private]

_MOST_LEFT_OUT = 0.05  # of the data, so that parts are equal


class FixedOrder:
    """Examples in a fixed order: one Gaussian mechanism, of the sensitivity of the strategy."""

    def __init__(self, target: Target, problem: Problem) -> None:
        import dp_accounting

        self.target, self.problem = target, problem
        self.noise_multiplier, self.epsilon = target.unamplified()
        self.event = dp_accounting.GaussianDpEvent(self.noise_multiplier)

    def jobs(self) -> Iterator[Job]:
        for make in _plan_rows.in_fixed_order(self.problem):
            yield functools.partial(self._private, make)

    def _private(self, make: Callable[[], Mechanism]) -> Private:
        return Private(
            mechanism=_plan_rows.in_float64(make),
            sampling="fixed",
            noise_multiplier=self.noise_multiplier,
            epsilon=self.epsilon,
            event=self.event,
            guarantee=(
                f"{_claim(self.target, self.epsilon)} if one example is replaced by a zero "
                f"gradient: an example takes part {_participation(self.problem)}, clipped to norm "
                f"1, and the noise makes it a Gaussian mechanism with noise multiplier "
                f"{_up(self.noise_multiplier)}."
            ),
        )


class Poisson:
    """Block-cyclic Poisson sampling: DP-SGD on every part of the data."""

    def __init__(self, target: Target, problem: Problem) -> None:
        self.target, self.problem = target, problem

    def jobs(self) -> Iterator[Job]:
        """Independent noise, and a few numbers of bands, from few to as many as fit."""
        for bands in sorted({self._near(2**i) for i in range(8)}):
            yield functools.partial(self._private, bands)

    def _near(self, bands: int) -> int:
        """A number of parts that divides the data; or so many, if few examples are left out."""
        target, problem = self.target, self.problem
        most = min(int(target.dataset_size / target.batch_size), problem.steps, problem.slots + 1)
        divides = max(b for b in target.candidates() if b <= min(bands, problem.slots + 1))
        few = target.dataset_size % bands <= _MOST_LEFT_OUT * target.dataset_size
        return bands if 2 * divides <= bands <= most and few else divides

    def _private(self, bands: int) -> Private:
        target = self.target
        make = functools.partial(_plan_rows.for_one_participation, self.problem, bands)
        mechanism = _plan_rows.in_float64(make)
        noise_multiplier, epsilon = target.amplified(bands)
        probability, rounds = target.sampling(bands)
        parts = "every step samples every example"
        if bands > 1:
            left_out = target.dataset_size % bands
            parts = (
                f"the data{f' but {left_out} of them' if left_out else ''} are cut into {bands} "
                f"equal parts, and step t samples every example of part t mod {bands}"
            )
        return Private(
            mechanism=mechanism,
            sampling="poisson",
            noise_multiplier=noise_multiplier,
            epsilon=epsilon,
            event=target.event(bands, noise_multiplier),
            guarantee=(
                f"{_claim(target, epsilon)} if one example is added or removed: {parts} with "
                f"probability {_down(probability)}, in {rounds} steps at most, clipped to norm 1, "
                f"with noise multiplier {_up(noise_multiplier)}."
            ),
        )


class BallsInBins:
    """Every example in one batch of an epoch, drawn at random, the same in all epochs.

    Accounted by Monte Carlo: no accountant of dp-accounting knows it.
    """

    _BANDS = (1, 4, 16, 64)  # few: each of them takes many samples

    def __init__(self, target: Target, problem: Problem, seed: int | None) -> None:
        self.target, self.problem, self.seed = target, problem, seed
        self.bins = int(target.dataset_size / target.batch_size)

    def jobs(self) -> Iterator[Job]:
        most = min(self.problem.steps, self.problem.slots + 1)
        bands = [b for b in self._BANDS if b <= most]
        for b in bands:
            yield functools.partial(self._private, b, len(bands))

    def _private(self, bands: int, calibrations: int) -> Private:
        import dp_accounting

        target, n = self.target, self.problem.steps
        make = functools.partial(_plan_rows.for_one_participation, self.problem, bands)
        mechanism = _plan_rows.in_float64(make)
        found = monte_carlo.calibrate(
            monte_carlo.BallsInBins(iterations=n, cycle_length=self.bins),
            mechanism.strategy_coef,
            epsilon=target.epsilon,
            delta=target.delta,
            calibrations=calibrations,
            seed=self.seed,
            progress=False,
        )
        return Private(
            mechanism=mechanism,
            sampling="bins",
            noise_multiplier=found.noise_multiplier / math.sqrt(mechanism.squared_sensitivity),
            epsilon=found.epsilon,
            event=dp_accounting.UnsupportedDpEvent(),
            guarantee=(
                f"{_claim(target, found.epsilon)} if one example is replaced by a zero gradient: "
                f"every example is in one of {self.bins} batches, drawn at random and kept secret, "
                f"which take turns, clipped to norm 1. The noise was found by Monte Carlo with "
                f"{found.num_samples:,} samples; that the best of {calibrations} such searches "
                "errs is part of delta."
            ),
        )


def _participation(problem: Problem) -> str:
    if problem.participations == 1:
        return "once"
    apart = problem.min_sep
    steps = "1 step" if apart == 1 else f"{apart} steps"
    return f"at most {problem.participations} times, at least {steps} apart"


def _claim(target: Target, epsilon: float) -> str:
    """Numbers in sentences are rounded to the side on which they hold."""
    stated = min(_up(epsilon), f"{target.epsilon}", key=float)
    return f"The run is ({stated}, {target.delta})-DP"


def _up(x: float) -> str:
    return _rounded(x, decimal.ROUND_CEILING)


def _down(x: float) -> str:
    return _rounded(x, decimal.ROUND_FLOOR)


def _rounded(x: float, rounding: str) -> str:
    """x in six digits."""
    with decimal.localcontext(prec=6, rounding=rounding):
        return f"{float(+decimal.Decimal(x)):.6g}"
