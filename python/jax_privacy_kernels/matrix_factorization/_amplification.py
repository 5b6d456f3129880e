"""Noise multipliers of banded strategies under block-cyclic Poisson sampling.

With b bands, every part of the data is sampled from in at most ``ceil(n / b)`` steps, with
probability ``batch / (dataset // b)``, and the mechanism is as private as that many steps of DP-SGD
on the part (Theorem 4 of https://arxiv.org/abs/2306.08153). dp-accounting is the accountant, by
privacy loss distributions (PLD) or Renyi divergences (RDP): both bound epsilon from above, and the
former bounds it more tightly. RDP takes a fraction of the time, and says where to look.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

from jax_privacy_kernels._checks import check_int, check_scalar

__all__ = ["ACCOUNTANTS", "Target"]

ACCOUNTANTS = ("pld", "rdp")

# Numbers up to the root of the size are tried as its divisors, in some tenths of a second.
_MOST_EXAMPLES = 10**13
_TOLERANCE = 1e-6  # of a noise multiplier
_LARGEST = 1e6  # noise multiplier that is tried
# Beyond, accountants overflow; what meets it meets any larger one.
_LARGEST_EPSILON = 1e6
# Privacy losses are rounded up to multiples of epsilon times one of these. Either grid is certain;
# the coarse one takes a tenth of the time and tells candidates apart.
_COARSE, _FINE = 1e-3, 1e-4
_TINY = 0.01  # of epsilons: below, that of enough noise may be 0
# What a noise multiplier by RDP is divided by to be less than one by PLD: 1.07 as a rule.
_LOOSENESS = 1.2


@dataclasses.dataclass
class Target:
    """A privacy target for n steps on a dataset; raises ValueError or TypeError if it is none."""

    n: int
    dataset_size: int
    batch_size: float
    epsilon: float
    delta: float
    accountant: str = "pld"

    def __post_init__(self) -> None:
        if self.accountant not in ACCOUNTANTS:
            raise ValueError(
                f"expected accountant to be one of {ACCOUNTANTS}, found {self.accountant!r}"
            )
        self.n = check_int("n", self.n)
        self.dataset_size = check_int("dataset_size", self.dataset_size)
        if self.dataset_size > _MOST_EXAMPLES:
            raise ValueError(
                f"expected dataset_size <= {_MOST_EXAMPLES}, found dataset_size={self.dataset_size}"
            )
        self.batch_size = check_scalar(
            "expected_batch_size",
            self.batch_size,
            lambda size: 0 < size < math.inf,
            "a positive number",
        )
        self.epsilon = check_scalar("epsilon", self.epsilon)
        self.delta = check_scalar("delta", self.delta)
        if self.batch_size > self.dataset_size:
            raise ValueError(
                f"expected expected_batch_size <= dataset_size={self.dataset_size}, "
                f"found expected_batch_size={self.batch_size}"
            )
        if not 0 < self.epsilon < math.inf:
            raise ValueError(f"expected 0 < epsilon < inf, found epsilon={self.epsilon}")
        if not 0 < self.delta < 1:
            raise ValueError(f"expected 0 < delta < 1, found delta={self.delta}")
        if not self._orders:
            least = min(self._least_epsilons.values())
            raise ValueError(
                f"expected an epsilon that Renyi accounting can certify at delta={self.delta}, "
                f"which is {least:.3g} and more, found epsilon={self.epsilon}"
            )

    def candidates(self) -> list[int]:
        """Numbers of equal parts, each of a batch at least."""
        size, most = self.dataset_size, int(self.dataset_size / self.batch_size)
        small = [b for b in range(1, math.isqrt(size) + 1) if size % b == 0]
        divisors = sorted({*small, *(size // b for b in small)})
        # From n on, more bands only mean less amplification.
        enough = next((b for b in divisors if b >= self.n), size)
        return [b for b in divisors if b <= min(most, enough)]

    def best(self, errors: Mapping[int, float]) -> tuple[int, float]:
        """The b of the least error times noise multiplier, and that multiplier.

        A candidate is calibrated only if it can win: if the noise with which it would draw with the
        best so far is enough for the target.
        """
        # The likely winner first: then few of the others can.
        order = sorted(errors, key=lambda b: errors[b] * self._estimate(b))
        with _without_dropped_orders():
            best, multiplier = order[0], self._calibrate(order[0])
            for b in order[1:]:
                draw = multiplier * errors[best] / errors[b]
                if draw > _TOLERANCE and self._is_enough(b, draw):
                    best, multiplier = b, self._calibrate(b, draw)
            if self.accountant == "pld":
                multiplier = self._lowered(best, multiplier, _FINE, 2e-5)
        return best, multiplier

    def amplified(self, b: int) -> tuple[float, float]:
        """The noise multiplier of b bands, and the epsilon that is spent with it."""
        with _without_dropped_orders():
            multiplier = self._calibrate(b)
            if self.epsilon >= _TINY:  # for less, both grids are the finest that there is
                multiplier = self._lowered(b, multiplier, _FINE, 2e-5)
            spent = min(self._spent(b, multiplier), self._spent_of_losses(b, multiplier, _FINE))
            if spent > self.epsilon:
                # For tiny deltas the rounding of many fine losses may count for more than grids.
                spent = min(spent, self._spent_of_losses(b, multiplier, _COARSE))
        return multiplier, spent

    def unamplified(self) -> tuple[float, float]:
        """The same for one Gaussian mechanism."""
        import dp_accounting

        epsilon = self._bounded_epsilon

        def spent(multiplier: float) -> float:
            accountant = self._accountant_of_losses(multiplier, _FINE)
            event = dp_accounting.GaussianDpEvent(multiplier)
            # Tiny deltas are less than privacy loss distributions leave out.
            by_losses = self._epsilon(accountant, event)
            return min(by_losses, self._epsilon(self._accountant(), event))

        # By its closed form first: far from it, losses would be many times epsilon.
        high = self._gaussian_multiplier
        low = high * (1 - 1e-4)
        while spent(high) > epsilon:
            if high > _LARGEST:
                raise ValueError(
                    f"expected epsilon={self.epsilon} to be within reach, found more spent with a "
                    f"noise multiplier of {high:g}"
                )
            low, high = high, high + 2 * (high - low)
        while high / low > 1 + 1e-6:
            middle = (low + high) / 2
            low, high = (low, middle) if spent(middle) <= epsilon else (middle, high)
        return high, spent(high)

    @functools.cached_property
    def _gaussian_multiplier(self) -> float:
        """That of one Gaussian mechanism, by its closed form."""
        import dp_accounting
        from dp_accounting import pld

        # It is searched for from about sqrt(log(1 / delta)) / epsilon on, and never found from
        # infinity.
        loss = pld.privacy_loss_mechanism.GaussianPrivacyLoss.from_privacy_guarantee(
            dp_accounting.pld.common.DifferentialPrivacyParameters(
                max(self._bounded_epsilon, 1e-9), max(self.delta, 1e-300)
            )
        )
        return loss.standard_deviation

    @property
    def _bounded_epsilon(self) -> float:
        return min(self.epsilon, _LARGEST_EPSILON)

    def _interval(self, noise_multiplier: float, grid: float) -> float:
        """Between losses; no less than takes a hundred thousand of them for a step."""
        most = 10 / noise_multiplier + 0.5 / noise_multiplier**2
        return max(grid * self._bounded_epsilon, 1e-5 * most)

    def _is_enough(self, b: int, noise_multiplier: float) -> bool:
        if self.accountant == "rdp":
            return self._spent(b, noise_multiplier) <= self.epsilon
        # First whether it is near enough at all.
        near = self._spent(b, noise_multiplier * _LOOSENESS) <= self.epsilon
        return near and self._spent_of_losses(b, noise_multiplier, _COARSE) <= self.epsilon

    def sampling(self, b: int) -> tuple[float, int]:
        """The probability with which a part is sampled from, and how often."""
        return self.batch_size / (self.dataset_size // b), -(-self.n // b)

    def event(self, b: int, noise_multiplier: float) -> Any:
        """What dp-accounting calls the mechanism of b bands."""
        import dp_accounting  # Takes as long to import as everything else.

        probability, steps = self.sampling(b)
        gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
        return dp_accounting.SelfComposedDpEvent(
            dp_accounting.PoissonSampledDpEvent(probability, gaussian), steps
        )

    @functools.cached_property
    def _least_epsilons(self) -> dict[float, float]:
        """What the accountant's orders can certify at the target's delta, at best.

        Order a with Renyi divergence r >= 0 certifies ``r + log(1 - 1/a) - log(a delta) / (a - 1)``
        (https://arxiv.org/abs/2004.00010, Proposition 12).
        """
        from dp_accounting.rdp import rdp_privacy_accountant as rdp

        return {
            a: math.log1p(-1 / a) - math.log(a * self.delta) / (a - 1)
            for a in rdp.DEFAULT_RDP_ORDERS
        }

    @functools.cached_property
    def _orders(self) -> list[float]:
        """The orders that can certify the target at all.

        The others decide nothing, take most of the time, and may not converge.
        """
        return [a for a, least in self._least_epsilons.items() if least <= self.epsilon]

    def _accountant(self) -> Any:
        from dp_accounting import rdp

        return rdp.RdpAccountant(self._orders)

    def _spent(self, b: int, noise_multiplier: float) -> float:
        """Epsilon at the target's delta by RDP, or more than the target's."""
        return self._epsilon(self._accountant(), self.event(b, noise_multiplier))

    def _spent_of_losses(self, b: int, noise_multiplier: float, grid: float) -> float:
        """Epsilon at the target's delta by PLD, rounded up to a grid relative to the target's."""
        accountant = self._accountant_of_losses(noise_multiplier, grid)
        return self._epsilon(accountant, self.event(b, noise_multiplier))

    def _accountant_of_losses(self, noise_multiplier: float, grid: float) -> Any:
        from dp_accounting import pld

        interval = self._interval(noise_multiplier, grid)
        return pld.PLDAccountant(value_discretization_interval=interval)

    def _excess(self, b: int, noise_multiplier: float, grid: float) -> float:
        """How far the noise is from enough by PLD, as a logarithm: positive if it is not enough."""
        if self.epsilon >= _TINY:
            spent = self._spent_of_losses(b, noise_multiplier, grid)
            return math.log(max(spent, 1e-300) / self.epsilon)
        # Epsilon would be 0 up to where it leaps.
        accountant = self._accountant_of_losses(noise_multiplier, grid)
        spent = self._epsilon(accountant, self.event(b, noise_multiplier))
        if math.isinf(spent):
            return math.inf
        excess = math.log(max(accountant.get_delta(self.epsilon), 1e-300) / self.delta)
        return min(excess, 0.0) if spent <= self.epsilon else max(excess, 1e-9)

    def _epsilon(self, accountant: Any, event: Any) -> float:
        """Of an event at the target's delta; infinite where the accountant's numbers overflow."""
        try:
            return accountant.compose(event).get_epsilon(self.delta)
        except OverflowError:
            return math.inf

    def _estimate(self, b: int) -> float:
        """A noise multiplier near the right one, by the central limit theorem.

        ``mu = q sqrt(T (exp(1 / sigma^2) - 1))`` of https://arxiv.org/abs/1911.11607, section 3.2,
        with the mu of the Gaussian mechanism for the target; enough by RDP as a rule.
        """
        probability, steps = self.sampling(b)
        mu = 1 / (_LOOSENESS * self._gaussian_multiplier)
        squared = math.log1p((mu / probability) ** 2 / steps)
        return min(1 / math.sqrt(squared), _LARGEST) if squared else _LARGEST

    def _calibrate(self, b: int, enough: float | None = None) -> float:
        """The least noise multiplier that meets the target, given one that is enough."""
        import dp_accounting

        high = enough or self._estimate(b)
        while enough is None and self._spent(b, high) > self.epsilon:
            if high > _LARGEST:
                raise ValueError(
                    f"expected epsilon={self.epsilon} to be within reach, found more spent with a "
                    f"noise multiplier of {high:g}"
                )
            high *= 1.25
        if self.accountant == "pld":
            return self._lowered(b, high, _COARSE, 2e-4)
        low = high / 1.25
        while low >= _TOLERANCE and self._spent(b, low) <= self.epsilon:
            low, high = low / 1.25, low
        if low < _TOLERANCE:  # below it, what the accountant computes means nothing
            return high
        return dp_accounting.calibrate_dp_mechanism(
            make_fresh_accountant=self._accountant,
            make_event_from_param=lambda noise_multiplier: self.event(b, noise_multiplier),
            target_epsilon=self.epsilon,
            target_delta=self.delta,
            bracket_interval=dp_accounting.ExplicitBracketInterval(low, high),
            tol=_TOLERANCE,
        )

    def _lowered(self, b: int, enough: float, grid: float, tolerance: float) -> float:
        """The least noise multiplier that PLD certifies, up to a relative tolerance.

        By the Illinois method on logarithms, where epsilon is about a line. The result is always
        one for which epsilon was computed, or ``enough``, which is certified already.
        """

        def excess(x: float) -> float:
            return self._excess(b, math.exp(x), grid)

        high = math.log(enough)
        above = excess(high)
        if not above <= 0:
            return enough
        # Close to where it is, if the noise falls as epsilon rises.
        least, fall = math.log(_TOLERANCE), 0.2
        low = high + max(1.5 * above, -0.5) - 5 * tolerance
        while (below := excess(low)) <= 0:
            high, above = low, below
            if low <= least:
                return math.exp(high)
            low = max(low - fall, least)
            fall = min(2 * fall, 2.0)  # far from it where epsilon is tiny
        high_side, low_side = above, below
        while high - low > tolerance:
            # Half a tolerance to the safe side, so that the bracket soon is as small as that.
            middle = (
                low + (high - low) * low_side / (low_side - high_side)
                if math.isfinite(low_side)
                else (low + high) / 2
            )
            middle = min(max(middle + tolerance / 2, low + tolerance / 4), high - tolerance / 4)
            found = excess(middle)
            if found <= 0:
                high, high_side, low_side = middle, found, low_side / 2
            else:
                low, low_side, high_side = middle, found, high_side / 2
        return math.exp(high)


@contextlib.contextmanager
def _without_dropped_orders() -> Iterator[None]:
    """Keeps dp-accounting from logging the orders that it leaves out, which costs no privacy."""

    def tells_more(record: logging.LogRecord) -> bool:
        return "Excluding this order" not in record.getMessage()

    logger = logging.getLogger("absl")
    logger.addFilter(tells_more)
    try:
        yield
    finally:
        logger.removeFilter(tells_more)
