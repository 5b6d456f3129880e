"""Privacy accounting of matrix mechanisms that are amplified by sampling, by Monte Carlo.

Sampling amplifies correlated noise too, and the tightest known accounting of that is simulation:
balls in bins (https://arxiv.org/abs/2410.06266), b-min-sep (https://arxiv.org/abs/2602.09338),
cyclic Poisson. Strategies are lower-triangular Toeplitz and non-negative, given by their first
column ``c_col``; adjacent datasets differ by one example being zeroed out.

    calibrate   the noise multiplier for a guarantee, verified: the result is (epsilon, delta)-DP
    delta       an upper confidence bound on delta, at a noise multiplier and epsilon
    epsilon     an upper confidence bound on epsilon, at a noise multiplier and delta

Samples are never kept, so that memory does not depend on their number. Results do not depend on the
number of threads, and are reproduced by their seed. ``docs/amplified_accounting.md`` has the
arguments: why the guarantee of `calibrate` holds although it is found by chance, and why all noise
multipliers may share their samples.

    >>> sampling = BallsInBins(iterations=20, cycle_length=5)
    >>> bound = delta(
    ...     sampling, [1.0, 0.5], noise_multiplier=2.0, epsilon=2.0, num_samples=10_000, seed=0
    ... )
    >>> bound.confidence
    0.999
"""

from __future__ import annotations

import dataclasses
import math
import secrets
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels import _estimates, _sampling
from jax_privacy_kernels._checks import check_int, check_scalar, check_seed
from jax_privacy_kernels.experimental.monte_carlo import delta_calculation
from jax_privacy_kernels.ops.privacy_loss_sums import (
    BallsInBins,
    BMinSep,
    CyclicPoisson,
    Scheme,
    check_c_col,
    problem,
)

__all__ = [
    "BMinSep",
    "BallsInBins",
    "Calibration",
    "CyclicPoisson",
    "DeltaBound",
    "EpsilonBound",
    "Scheme",
    "calibrate",
    "delta",
    "epsilon",
]

_LARGEST_EPSILON = 1e4
_GRID_END = 1e6  # of epsilons
# Below it `_estimates.gaussian_delta`, a difference, loses more than is rounded up.
_LEAST_DELTA = 1e-9
_NOISE = (1e-6, 1e6)  # the range of noise multipliers, over about the norm of c_col


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A noise multiplier, and what was verified about it.

    Attributes:
      noise_multiplier: run the mechanism with this; noise has this standard deviation times the
        clip norm, whatever the norm of c_col.
      epsilon, delta: what verification and the run together guarantee.
      base_delta: every noise multiplier from the first on to the one chosen has an estimate of at
        most this, for both signs.
      num_samples: of either sign.
      calibrations: how many of them the guarantee lets one choose from.
      sampling: how examples take part.
      sweep: the noise multipliers that were to be tried, from the most private on.
      estimates: for every one of them, delta estimated with and without the example. Those after
        the first that failed, and of it, are of the samples that it took to fail.
      unamplified: the noise multiplier that needs no amplification, for epsilon and base_delta. It
        is what is left if all of the sweep fails.
      seed: reproduces the result.
    """

    noise_multiplier: float
    epsilon: float
    delta: float
    base_delta: float
    num_samples: int
    calibrations: int
    sampling: Scheme
    sweep: tuple[float, ...]
    estimates: tuple[tuple[float, float], ...]
    unamplified: float
    seed: int

    @property
    def is_amplified(self) -> bool:
        """Whether anything of the sweep passed, as opposed to what needs no amplification."""
        return self.noise_multiplier != self.unamplified

    def __str__(self) -> str:
        lines = [
            f"noise multiplier {self.noise_multiplier:.6g} for ({self.epsilon:g}, {self.delta:g})"
            "-DP, zero-out adjacency",
            f"  sampling           {type(self.sampling).__name__}"
            + "".join(
                f"\n    {field.name:<17}{getattr(self.sampling, field.name)}"
                for field in dataclasses.fields(self.sampling)
            ),
            f"  unamplified        {self.unamplified:.6g}",
            f"  verified           at base delta {self.base_delta:g}, with {self.num_samples:,} "
            "samples",
            "  why it holds       every noise multiplier before the first that fails is",
            "                     taken only if those before it pass: one event can go",
            f"                     wrong, and its probability is part of delta = {self.delta:g}",
            "  chosen from        "
            + (
                "this calibration alone, with a seed chosen beforehand"
                if self.calibrations == 1
                else f"at most {self.calibrations:,} calibrations, with seeds chosen beforehand"
            ),
            f"  seed               {self.seed}",
            "  noise multiplier  delta, with  and without the example",
        ]
        for sigma, (positive, negative) in zip(self.sweep, self.estimates, strict=True):
            passed = max(positive, negative) <= self.base_delta
            chosen = " <-" if sigma == self.noise_multiplier else ""
            verdict = "pass" if passed else "fail"
            lines.append(
                f"  {sigma:>16.6g}  {positive:>11.3e}  {negative:>11.3e}  {verdict}{chosen}"
            )
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class DeltaBound:
    """A bound on delta at a given epsilon.

    Attributes:
      delta: at least the true delta, with a probability of at least ``confidence``.
      estimates: means over the samples, with and without the example.
      epsilon, noise_multiplier, num_samples, confidence, seed: what it was computed for.
    """

    delta: float
    estimates: tuple[float, float]
    epsilon: float
    noise_multiplier: float
    num_samples: int
    confidence: float
    seed: int

    def __str__(self) -> str:
        return (
            f"delta <= {self.delta:.4g} at epsilon {self.epsilon:g} and noise multiplier "
            f"{self.noise_multiplier:g},\n"
            f"  with confidence {self.confidence:g} over {self.num_samples:,} samples "
            f"(seed {self.seed});\n"
            f"  estimates: {self.estimates[0]:.4g} with the example, {self.estimates[1]:.4g} "
            "without"
        )


@dataclasses.dataclass(frozen=True)
class EpsilonBound:
    """A bound on epsilon at a given delta.

    Attributes:
      epsilon: at least the true epsilon, with a probability of at least ``confidence``.
      estimate: where the mean over the samples is delta: above or below the truth.
      delta, noise_multiplier, num_samples, confidence, seed: what it was computed for.
    """

    epsilon: float
    estimate: float
    delta: float
    noise_multiplier: float
    num_samples: int
    confidence: float
    seed: int

    def __str__(self) -> str:
        return (
            f"epsilon <= {self.epsilon:.4g} at delta {self.delta:g} and noise multiplier "
            f"{self.noise_multiplier:g},\n"
            f"  with confidence {self.confidence:g} over {self.num_samples:,} samples "
            f"(seed {self.seed}); estimate: {self.estimate:.4g}"
        )


def calibrate(
    sampling: Any,
    c_col: Any,
    *,
    epsilon: float,
    delta: float,
    base_delta: float | None = None,
    calibrations: int = 1,
    seed: int | None = None,
    progress: bool | None = None,
    implementation: str | None = None,
) -> Calibration:
    """The least noise multiplier found for an ``(epsilon, delta)``-DP mechanism, verified.

    Algorithm 5 of https://arxiv.org/abs/2602.09338: from the most private noise multiplier of a
    sweep on, estimate delta for both signs, and take the last one before the first whose estimate
    exceeds ``base_delta``. Both this search and the run of what it finds are then one mechanism
    that is ``(epsilon, delta)``-DP, the chance that the search goes wrong included. The argument
    asks for three things:

    * The losses of a noise multiplier are independent. Those of different noise multipliers may
      depend on each other, and so may the two signs: the search errs only if the first noise
      multiplier of the sweep whose true delta is too large passes, which is one event.
    * Less noise is less private, so that all before that one are private enough.
    * The sweep is fixed before the samples that verify it are drawn. It is chosen by samples of
      its own, around the noise multiplier whose estimate they find to be ``base_delta``.

    The guarantee is one of a single call, with a seed that is chosen beforehand. If the best of
    several is run, of several schemes, strategies, epsilons or seeds, each of them can go wrong:
    give all of them their number as ``calibrations``, which takes somewhat more samples.

    The sweep ends above at the noise multiplier that needs no amplification, in closed form. The
    least is found to 0.5 %, and lies above the true one by what ``base_delta`` is below ``delta``.

    Cost: `delta_calculation.minimum_samples_to_calibrate` samples, 1.07e7 for delta = 1e-5 and
    twice that for half of it; more, the closer base_delta is to delta.

    Args:
      sampling: a `BallsInBins`, `BMinSep` or `CyclicPoisson`, or jax_privacy's strategy of that
        kind. Truncated batches are not supported.
      c_col: ``[b]``, non-negative, c_col[0] > 0; at most as many as there are steps, and as
        ``min_sep`` or (cyclic Poisson) the cycle.
      epsilon: of the guarantee, at least 0.
      delta: of the guarantee, in (0, 1).
      base_delta: what estimates may be at most, from 1e-9 to below delta; by default delta / 2.
      calibrations: of how many calls with these deltas what is run is chosen, at least 1.
      seed: from 0 to 2^64 - 1, or None for one of the system's. `calibrate`, `delta` and `epsilon`
        have samples of their own, also for the same seed.
      progress: whether to show progress on standard error; None does where that is a terminal.
      implementation: "jax", "cpp", or None for the fastest.

    Returns:
      The noise multiplier, and what was verified. If nothing of the sweep passes, it is the one
      that needs no amplification.

    Raises:
      ValueError: an argument is out of range, or the implementation cannot run here.
      TypeError: an argument is of the wrong type.
    """
    mechanism = _checked(sampling, c_col)
    epsilon = _check_epsilon(epsilon)
    delta = _check_delta("delta", delta)
    base_delta = delta / 2 if base_delta is None else _check_delta("base_delta", base_delta)
    if base_delta >= delta:
        raise ValueError(f"expected base_delta < delta={delta}, found base_delta={base_delta}")
    _check_least("base_delta", base_delta)
    calibrations = check_int("calibrations", calibrations)
    count = delta_calculation.minimum_samples_to_calibrate(
        base_delta, delta, calibrations=calibrations
    )
    if count > mechanism.most_samples:
        raise ValueError(
            f"expected delta and base_delta that take at most {mechanism.most_samples} samples, "
            f"found delta={delta} and base_delta={base_delta}, which take {count}"
        )
    seed, (*pilot_keys, key) = _keys(seed, *_PURPOSES[:4])
    unamplified = _estimates.gaussian_sigma(epsilon, base_delta) * mechanism.sensitivity
    if unamplified > _NOISE[1]:
        raise ValueError(
            f"expected epsilon and base_delta that need noise of at most {_NOISE[1]:g} times the "
            f"norm of c_col, found epsilon={epsilon} and base_delta={base_delta}, which need "
            f"{unamplified:g} times that without amplification"
        )

    run = _estimates.Run(mechanism.scheme, mechanism.c, (epsilon,), implementation)
    least = min(count, 2**14)
    with _estimates.progress_bar(progress, least + 2 * (count // 8) + count) as bar:
        center = unamplified
        # Each finds the noise multiplier more closely: the first may miss it by a lot.
        pilots = ((least, 1e3, 25), (count // 8, 3.0, 17), (count // 8, 1.1, 9))
        for own_key, (samples, reach, size) in zip(pilot_keys, pilots, strict=True):
            if samples:
                sigmas = np.minimum(center * np.geomspace(reach, 1 / reach, size), unamplified)
                sigmas = np.unique(np.maximum(sigmas, _NOISE[0]))[::-1]
                center = _estimates.crossing(run, sigmas, base_delta, own_key, samples, bar)
        steps = np.concatenate([[1.25, 1.12], 1.05 * 1.005 ** -np.arange(18.0)])
        sweep = center * steps
        sweep = sweep[(sweep < unamplified) & (sweep >= _NOISE[0])]
        failed, estimates = 0, np.zeros((2, 0))
        if sweep.size:
            failed, estimates = _estimates.scan(run, sweep, base_delta, key, count, bar)
    sweep, unamplified = (
        np.ldexp(sweep, mechanism.exponent),
        math.ldexp(unamplified, mechanism.exponent),
    )
    return Calibration(
        noise_multiplier=float(sweep[failed - 1]) if failed else unamplified,
        epsilon=epsilon,
        delta=delta,
        base_delta=base_delta,
        num_samples=count,
        calibrations=calibrations,
        sampling=mechanism.scheme,
        sweep=tuple(map(float, sweep)),
        estimates=tuple((float(p), float(q)) for p, q in estimates.T),
        unamplified=unamplified,
        seed=seed,
    )


def delta(
    sampling: Any,
    c_col: Any,
    *,
    noise_multiplier: float,
    epsilon: float,
    num_samples: int = 10_000_000,
    confidence: float = 0.999,
    seed: int | None = None,
    progress: bool | None = None,
    implementation: str | None = None,
) -> DeltaBound:
    """An upper confidence bound on delta at a given epsilon.

    The mean m of ``num_samples`` numbers in [0, 1] falls short of their expectation u with
    ``m <= u`` and ``KL(m, u) >= log(1 / (1 - confidence)) / num_samples`` with a probability of at
    most ``1 - confidence`` (Chernoff and Hoeffding): the bound is the largest u that this leaves
    possible. For counts it is close to that of Clopper and Pearson. The larger of the signs' bounds
    bounds the larger of their deltas with the same confidence, since only that one's can err.

    A bound holds with a probability, and a guarantee of differential privacy does not; for one that
    includes that probability use `calibrate`.

    Args:
      sampling, c_col, seed, progress, implementation: as for `calibrate`.
      noise_multiplier: sigma, from 1e-6 to 1e6 times about the norm of c_col.
      epsilon: at least 0.
      num_samples: of either sign, at least 1.
      confidence: in (0, 1).

    Raises:
      ValueError: an argument is out of range, or the implementation cannot run here.
      TypeError: an argument is of the wrong type.
    """
    mechanism = _checked(sampling, c_col)
    epsilon = _check_epsilon(epsilon)
    sigma = mechanism.noise(noise_multiplier)
    num_samples = mechanism.samples(num_samples)
    confidence = _check_delta("confidence", confidence)
    failure = 1 - confidence
    seed, (key,) = _keys(seed, "delta")
    run = _estimates.Run(mechanism.scheme, mechanism.c, (epsilon,), implementation)
    with _estimates.progress_bar(progress, num_samples) as bar:
        sums = run.total(np.array([sigma]), key, num_samples, bar)
    estimates = sums.sums[:, 0, 0] / num_samples
    return DeltaBound(
        delta=_estimates.upper_bound(float(estimates.max()), num_samples, failure),
        estimates=(float(estimates[0]), float(estimates[1])),
        epsilon=epsilon,
        noise_multiplier=math.ldexp(sigma, mechanism.exponent),
        num_samples=num_samples,
        confidence=confidence,
        seed=seed,
    )


def epsilon(
    sampling: Any,
    c_col: Any,
    *,
    noise_multiplier: float,
    delta: float,
    num_samples: int = 10_000_000,
    confidence: float = 0.999,
    seed: int | None = None,
    progress: bool | None = None,
    implementation: str | None = None,
) -> EpsilonBound:
    """An upper confidence bound on epsilon at a given delta.

    The least of a grid of 64 epsilons at which the bound of `delta` is at most ``delta``; or, where
    there is none, the epsilon without amplification. Both the true delta and its bound fall with
    epsilon, for the same samples: the result is below the true epsilon only if the bound errs at
    the last epsilon of the grid that is, which is one event, whatever the size of the grid. Samples
    of their own choose the grid.

    Args:
      sampling, c_col, seed, progress, implementation: as for `calibrate`.
      noise_multiplier: sigma, from 1e-6 to 1e6 times about the norm of c_col.
      delta: at least 1e-9, below 1.
      num_samples: of either sign, at least as many as it takes for a bound below delta.
      confidence: in (0, 1).

    Raises:
      ValueError: an argument is out of range, or the implementation cannot run here.
      TypeError: an argument is of the wrong type.
    """
    mechanism = _checked(sampling, c_col)
    delta = _check_delta("delta", delta)
    _check_least("delta", delta)
    sigma = mechanism.noise(noise_multiplier)
    num_samples = mechanism.samples(num_samples)
    confidence = _check_delta("confidence", confidence)
    failure = 1 - confidence
    if _estimates.upper_bound(0.0, num_samples, failure) > delta:
        least = math.ceil(math.log(failure) / math.log1p(-delta))
        raise ValueError(
            f"expected num_samples >= {least} for delta={delta} and confidence={confidence}, found "
            f"num_samples={num_samples}"
        )
    seed, (pilot_key, key) = _keys(seed, "epsilon: pilot", "epsilon")
    unamplified = _estimates.gaussian_epsilon(sigma / mechanism.sensitivity, delta)
    last, sigmas = min(unamplified, _GRID_END), np.array([sigma])
    pilot = min(num_samples, max(num_samples // 10, math.ceil(30 / delta)))
    with _estimates.progress_bar(progress, pilot + num_samples) as bar:
        wide = np.concatenate([[0.0], np.geomspace(1e-4, 1, 63)]) * last
        run = _estimates.Run(mechanism.scheme, mechanism.c, wide, implementation)
        found = run.total(sigmas, pilot_key, pilot, bar).sums[:, 0].max(axis=0) / pilot
        guess = _estimates.interpolated(wide, found, delta)
        low, high = max(0.0, 0.8 * guess - 0.01), min(last, 1.4 * guess + 0.1)
        grid = np.linspace(low, high, 64)
        run = _estimates.Run(mechanism.scheme, mechanism.c, grid, implementation)
        means = run.total(sigmas, key, num_samples, bar).sums[:, 0].max(axis=0) / num_samples
    result = unamplified
    for value, mean in zip(grid[::-1], means[::-1], strict=True):
        if not _estimates.upper_bound(float(mean), num_samples, failure) <= delta:
            break
        result = min(result, float(value))
    return EpsilonBound(
        epsilon=result,
        estimate=_estimates.interpolated(grid, means, delta),
        delta=delta,
        noise_multiplier=math.ldexp(sigma, mechanism.exponent),
        num_samples=num_samples,
        confidence=confidence,
        seed=seed,
    )


# -- Arguments --------------------------------------------------------------------------------


class _Mechanism(NamedTuple):
    """What is asked about, with c divided by 2^exponent, which is about its norm.

    Powers of two are exact, and the division leaves privacy as it is if the noise is divided, too.
    """

    scheme: Scheme
    c: np.ndarray
    exponent: int
    sensitivity: float
    most_samples: int

    def noise(self, value: Any) -> float:
        """A noise multiplier, checked, for this c."""
        given = check_scalar("noise_multiplier", value)
        least, most = (math.ldexp(x, self.exponent) for x in _NOISE)
        if not least <= given <= most:
            raise ValueError(
                f"expected {least:g} <= noise_multiplier <= {most:g} for this c_col, found {given}"
            )
        return math.ldexp(given, -self.exponent)

    def samples(self, value: Any) -> int:
        """The number of samples, checked before any is made."""
        count = check_int("num_samples", value)
        if count > self.most_samples:
            raise ValueError(
                f"expected num_samples <= {self.most_samples}, found num_samples={count}"
            )
        return count


def _checked(sampling: Any, c_col: Any) -> _Mechanism:
    scheme, truncated = _sampling.as_scheme(sampling)
    if truncated is not None:
        raise ValueError(
            f"expected sampling without truncated batches, found truncated_batch_size={truncated}; "
            "experimental.monte_carlo has samples of the truncated mechanism"
        )
    c = check_c_col(c_col)
    if not c[0] > 0:
        raise ValueError(f"expected c_col[0] > 0, found c_col[0] = {c[0]}")
    largest = math.frexp(c.max())[1]
    norm = float(np.linalg.norm(np.ldexp(c, -largest)))
    exponent = largest + round(math.log2(norm))
    if abs(exponent) > 1000:
        raise ValueError(
            f"expected c_col of a norm from 1e-301 to 1e301, found c_col of max {c.max()}"
        )
    c = np.ldexp(c, -exponent)
    prepared = problem(scheme, c)
    return _Mechanism(scheme, c, exponent, prepared.sensitivity, prepared.most_samples)


def _check_epsilon(value: Any) -> float:
    epsilon = check_scalar("epsilon", value)
    if not 0 <= epsilon <= _LARGEST_EPSILON:
        raise ValueError(f"expected 0 <= epsilon <= {_LARGEST_EPSILON:g}, found epsilon={epsilon}")
    return epsilon


def _check_delta(name: str, value: Any) -> float:
    delta = check_scalar(name, value)
    if not 0 < delta < 1:
        raise ValueError(f"expected 0 < {name} < 1, found {name}={delta}")
    return delta


def _check_least(name: str, delta: float) -> None:
    if delta < _LEAST_DELTA:
        raise ValueError(f"expected {name} >= {_LEAST_DELTA:g}, found {name}={delta}")


# What samples are for. Each has a key of its own: samples that chose something, say a noise
# multiplier, are not those that a bound for it is found from.
_PURPOSES = (
    "calibrate: first pilot",
    "calibrate: second pilot",
    "calibrate: third pilot",
    "calibrate",
    "delta",
    "epsilon: pilot",
    "epsilon",
)


def _keys(seed: int | None, *purposes: str) -> tuple[int, list[np.ndarray]]:
    """A seed, the system's if there is none, and the keys that it makes, words ``[2]``."""
    seed = secrets.randbits(64) if seed is None else check_seed(seed)
    words = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
    key = jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")
    found = [jax.random.fold_in(key, _PURPOSES.index(purpose)) for purpose in purposes]
    return seed, [np.asarray(jax.random.key_data(k)) for k in found]


def __dir__() -> list[str]:  # for completion: no imported names
    return sorted(__all__)
