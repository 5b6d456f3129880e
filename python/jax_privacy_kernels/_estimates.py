"""Sums over samples of the privacy loss, chunk by chunk, and the bounds that they give."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy import special

from jax_privacy_kernels.experimental.monte_carlo import delta_calculation
from jax_privacy_kernels.ops.privacy_loss_sums import (
    BallsInBins,
    PrivacyLossSums,
    Scheme,
    privacy_loss_sums,
)

_WORK = 2**29  # about what a chunk of samples takes; Ctrl-C waits for no more than one chunk


# -- Sums of samples --------------------------------------------------------------------------


def progress_bar(progress: bool | None, samples: int) -> Any:
    from tqdm import tqdm

    disable = None if progress is None else not progress  # None: unless on a terminal
    return tqdm(total=samples, unit=" samples", unit_scale=True, disable=disable, leave=False)


@dataclasses.dataclass(frozen=True)
class Run:
    """Samples of a mechanism, in chunks whose limits depend on nothing but their work."""

    scheme: Scheme
    c_col: np.ndarray
    epsilons: Sequence[float] | np.ndarray
    implementation: str | None

    def chunks(self, sigma_count: int, samples: int) -> Iterator[tuple[int, int]]:
        scheme = self.scheme
        width = scheme.cycle_length if isinstance(scheme, BallsInBins) else scheme.iterations
        work = width * (16 + sigma_count) + sigma_count * len(self.epsilons)
        size = max(_WORK // work // 4096, 1) * 4096
        for first in range(0, samples, size):
            yield first, min(size, samples - first)

    def sums(self, sigmas: np.ndarray, key: np.ndarray, first: int, count: int) -> PrivacyLossSums:
        return privacy_loss_sums(
            self.scheme,
            self.c_col,
            sigmas,
            self.epsilons,
            key=key,
            num_samples=count,
            first_sample=first,
            implementation=self.implementation,
        )

    def total(self, sigmas: np.ndarray, key: np.ndarray, samples: int, bar: Any) -> PrivacyLossSums:
        result = None
        for first, count in self.chunks(len(sigmas), samples):
            found = self.sums(sigmas, key, first, count)
            result = found if result is None else result + found
            bar.update(count)
        assert result is not None
        return result


def scan(
    run: Run, sigmas: np.ndarray, base_delta: float, key: np.ndarray, samples: int, bar: Any
) -> tuple[int, np.ndarray]:
    """How many noise multipliers pass before the first that fails, and estimates ``[2, s]``.

    Sums only grow: a noise multiplier whose sum exceeds what all samples together may have has
    failed, and neither it nor those after it need more samples.
    """
    sums, taken = np.zeros((2, len(sigmas))), np.zeros(len(sigmas))
    alive = len(sigmas)
    for first, count in run.chunks(len(sigmas), samples):
        if alive:
            sums[:, :alive] += run.sums(sigmas[:alive], key, first, count).sums[:, :, 0]
            sums[:, :alive] *= 1 + 2.0**-51  # up, by more than the sum is off
            taken[:alive] += count
            failed = np.flatnonzero(~(sums.max(axis=0) <= base_delta * samples))
            alive = min(alive, failed[0]) if failed.size else alive
        bar.update(count)
    return alive, np.minimum(sums / taken, 1)


def crossing(
    run: Run, sigmas: np.ndarray, delta: float, key: np.ndarray, samples: int, bar: Any
) -> float:
    """About the noise multiplier where delta is reached; sigmas fall."""
    # Beyond thirty times that, it is not in question.
    _, estimates = scan(run, sigmas, 30 * delta, key, samples, bar)
    found = np.maximum.accumulate(estimates.max(axis=0))
    return math.exp(-interpolated(-np.log(sigmas), found, delta, rising=True))


def interpolated(x: np.ndarray, y: np.ndarray, at: float, rising: bool = False) -> float:
    """Where y, which falls (or rises) with x, is ``at``; log y is taken for linear in between."""
    above = y >= at if rising else y <= at
    i = int(np.argmax(above)) if above.any() else len(x) - 1
    if i == 0 or not above.any():
        return float(x[i])
    low, high = np.log(np.maximum(y[i - 1 : i + 1], 1e-300))
    if min(y[i - 1], y[i]) <= 0:  # nothing seen: as if it was halfway
        return float((x[i - 1] + x[i]) / 2)
    fraction = (math.log(at) - low) / (high - low)
    return float(x[i - 1] + min(max(fraction, 0.0), 1.0) * (x[i] - x[i - 1]))


# -- Bounds -----------------------------------------------------------------------------------


def upper_bound(mean: float, samples: int, failure: float) -> float:
    """The largest expectation that is possible: KL(mean, u) = log(1 / failure) / samples."""
    allowed = -math.log(failure) / samples
    low, high = min(mean, 1.0), 1.0
    for _ in range(100):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        # At mean = 1 the relative entropy to less is infinite.
        far = middle < 1 and (mean >= 1 or float(delta_calculation._kl(mean, middle)) > allowed)
        low, high = (low, middle) if far else (middle, high)
    return high


def gaussian_delta(epsilon: float, sigma: float) -> float:
    """Delta of the Gaussian mechanism of sensitivity 1, https://arxiv.org/abs/1805.06530."""
    a, b = 1 / (2 * sigma), epsilon * sigma
    return float(special.ndtr(a - b) - math.exp(min(epsilon + special.log_ndtr(-a - b), 0.0)))


def gaussian_sigma(epsilon: float, delta: float) -> float:
    """The least sigma of a Gaussian mechanism of sensitivity 1, rounded up."""
    low, high = 1e-3, 1.0
    while gaussian_delta(epsilon, high) > delta:
        low, high = high, 2 * high
    while gaussian_delta(epsilon, low) <= delta:
        low /= 2
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if gaussian_delta(epsilon, middle) <= delta else (middle, high)
    return high * (1 + 1e-6)


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """The least epsilon of a Gaussian mechanism of sensitivity 1, rounded up."""
    low, high = 0.0, 1.0
    while gaussian_delta(high, sigma) > delta:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if gaussian_delta(middle, sigma) <= delta else (middle, high)
    return high * (1 + 1e-6) + 1e-9
