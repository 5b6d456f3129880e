"""Bounds of verification against their definition and jax_privacy's, and that they hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from jax_privacy_kernels.experimental.monte_carlo import delta_calculation as ours

peer = pytest.importorskip("jax_privacy.experimental.monte_carlo.delta_calculation")
dp_accounting = pytest.importorskip("dp_accounting")


@pytest.mark.parametrize("base", [0.1, 1e-3, 5e-6])
@pytest.mark.parametrize("ratio", [1.2, 2.0, 5.0])
def test_samples_are_the_least_that_do(base, ratio):
    target = base * ratio
    found = ours.minimum_samples_to_calibrate(base, target)
    assert ours.get_overall_delta(found, base) <= target < ours.get_overall_delta(found - 1, base)
    # jax_privacy searches less closely, and is on the safe side of it.
    assert found == pytest.approx(peer.minimum_samples_to_calibrate(base, target), rel=1e-3)
    assert base <= ours.get_base_delta(found, target) <= ours.get_base_delta(found + 1, target)
    assert ours.get_overall_delta(found, ours.get_base_delta(found, target)) <= target


@pytest.mark.parametrize(
    ("samples", "base"), [(1, 0.5), (1000, 0.01), (10**7, 5e-6), (10**9, 1e-9)]
)
def test_overall_delta_is_the_least_over_t(samples, base):
    found = ours.get_overall_delta(samples, base)
    t = np.geomspace(base, 1 - 1e-9, 100_000)
    q = np.exp(-samples * (base * np.log(base / t) + (1 - base) * np.log((1 - base) / (1 - t))))
    least = np.min(t + (1 - t) * q)
    assert found == pytest.approx(least, rel=1e-4)
    assert base < found <= peer.get_overall_delta(samples, base) * (1 + 1e-6)


def test_a_chernoff_bound_is_kept():
    """Coins that come up with probability t look like base_delta no more often than q."""
    rng = np.random.default_rng(0)
    samples, base = 400, 0.05
    for t in (0.06, 0.08, 0.1):
        passed = np.mean(rng.binomial(samples, t, 100_000) <= base * samples)
        assert passed <= math.exp(-samples * ours._kl(base, t))


def test_the_best_of_several_calibrations():
    """Any of K may err: K q takes the place of q, and it takes more samples to make up for it."""
    samples, base, many = 4000, 0.01, 50
    t = np.geomspace(base, 1 - 1e-9, 100_000)
    q = np.exp(-samples * (base * np.log(base / t) + (1 - base) * np.log((1 - base) / (1 - t))))
    least = np.min(t + (1 - t) * np.minimum(many * q, 1))
    found = ours.get_overall_delta(samples, base, calibrations=many)
    assert found == pytest.approx(least, rel=1e-4)
    assert found > ours.get_overall_delta(samples, base, calibrations=1)
    assert ours.get_overall_delta(samples, base, calibrations=1) == ours.get_overall_delta(
        samples, base
    )
    enough = ours.minimum_samples_to_calibrate(base, 0.02, calibrations=many)
    assert enough > ours.minimum_samples_to_calibrate(base, 0.02)
    assert ours.get_overall_delta(enough, base, calibrations=many) <= 0.02
    assert ours.get_overall_delta(enough - 1, base, calibrations=many) > 0.02

    # A base delta for all of them is a lower one, which a mechanism may pass only on its own.
    of_one, of_many = (ours.get_base_delta(samples, 0.02, calibrations=k) for k in (1, many))
    assert ours.get_overall_delta(samples, of_many, calibrations=many) <= 0.02
    assert of_many < of_one
    losses = np.repeat([np.inf, -np.inf], [round((of_one + of_many) / 2 * samples), samples])
    found = [
        ours.perform_calibration_from_samples(
            1.0, 0.02, positive_samples=[losses[:samples]], calibrations=k
        )
        for k in (1, many)
    ]
    assert found == [(True, 0), (False, of_many)]


def test_the_best_of_several_is_delta_dp_on_average():
    """The best of K has delta t once any of K lets t pass, at most: exact, by binomial laws."""
    base, delta, many = 0.05, 0.1, 10**5
    t = np.linspace(base, 1, 1000)

    def of_the_best(samples):
        passes = stats.binom.cdf(math.floor(base * samples), samples, t)
        with np.errstate(divide="ignore"):
            return np.max(t * -np.expm1(many * np.log1p(-passes)))

    enough = ours.minimum_samples_to_calibrate(base, delta, calibrations=many)
    assert 0.5 * delta < of_the_best(enough) <= delta
    assert of_the_best(ours.minimum_samples_to_calibrate(base, delta)) > delta


@pytest.mark.parametrize("calibrations", [0, -1])
def test_there_is_a_calibration(calibrations):
    with pytest.raises(ValueError, match=f"calibrations >= 1, found calibrations={calibrations}"):
        ours.get_overall_delta(10, 0.1, calibrations=calibrations)


def test_delta_of_samples():
    losses, counts = [-1.0, 0.0, 0.5, 3.0, np.inf], [1, 2, 0, 4, 1]
    for epsilon in (0.0, 0.25, 2.0):
        expected = np.average(
            [max(0.0, 1 - math.exp(epsilon - x)) if x < np.inf else 1.0 for x in losses],
            weights=counts,
        )
        found = ours.delta_from_epsilon_and_samples(epsilon, losses, counts)
        assert found == pytest.approx(expected, rel=1e-14)
        assert found == pytest.approx(
            peer.delta_from_epsilon_and_samples(epsilon, losses, counts), rel=1e-14
        )
        each = np.repeat(losses, counts)
        assert ours.delta_from_epsilon_and_samples(epsilon, each) == pytest.approx(found, rel=1e-14)


def test_delta_of_rounded_up_samples_is_no_less():
    losses = np.random.default_rng(0).normal(0.5, 1, 1000)
    rounded, counts = np.unique(np.ceil(losses * 8) / 8, return_counts=True)
    exact = ours.delta_from_epsilon_and_samples(0.3, losses)
    assert exact <= ours.delta_from_epsilon_and_samples(0.3, rounded, counts) <= exact + 0.1


def test_composition_with_another_event():
    """Two Gaussian mechanisms, one of them sampled, are one with less noise."""
    sigma, epsilon, size = 2.0, 0.5, 5000
    # Quantiles in place of samples: without noise of their own.
    u = (np.arange(size) + 0.5) / size
    losses = 0.5 / sigma**2 + stats.norm.ppf(u) / sigma
    event = dp_accounting.GaussianDpEvent(sigma)
    both = dp_accounting.pld.PLDAccountant().compose(event, 2)
    coarse = np.ceil(losses * 40) / 40
    points, counts = np.unique(coarse, return_counts=True)
    found = ours.delta_from_epsilon_and_samples(epsilon, points, counts, event)
    truth = both.get_delta(epsilon)
    assert truth * 0.995 <= found <= truth * 1.08


def gaussian_losses(sigma, samples, rng):
    return rng.normal(0.5 / sigma**2, 1 / sigma, samples)


def test_calibration_from_samples():
    rng = np.random.default_rng(1)
    sweep = [4.0, 2.0, 1.0, 0.5]
    losses = [gaussian_losses(s, 50_000, rng) for s in sweep]
    for arguments in (
        {"positive_samples": losses},
        {"positive_samples": losses, "negative_samples": losses},
        {"positive_samples": losses, "positive_counts": [np.ones(50_000)] * 4},
        {"positive_samples": losses[:3]},
        {"positive_samples": losses[3:]},
        # The other sign decides too.
        {"positive_samples": losses[:1] * 4, "negative_samples": losses},
    ):
        found = ours.perform_calibration_from_samples(2.0, 0.05, **arguments)
        expected = peer.perform_calibration_from_samples(2.0, 0.05, **arguments)
        assert found == pytest.approx(expected, rel=1e-3)
        assert found[0] is (len(arguments["positive_samples"]) > 1)


def test_composition_decides():
    rng = np.random.default_rng(2)
    losses = [gaussian_losses(s, 5_000, rng) for s in (4.0, 2.0)]
    loud, quiet = dp_accounting.GaussianDpEvent(0.5), dp_accounting.GaussianDpEvent(50.0)
    calibrate = ours.perform_calibration_from_samples
    rounded = [np.ceil(x * 4) / 4 for x in losses]
    points = [np.unique(x, return_counts=True) for x in rounded]
    arguments = {
        "positive_samples": [x for x, _ in points],
        "positive_counts": [n for _, n in points],
    }
    assert calibrate(2.0, 0.05, **arguments, other_event=quiet) == (True, 1)
    assert calibrate(2.0, 0.05, **arguments, other_event=[quiet, loud]) == (True, 0)
    assert calibrate(2.0, 0.05, **arguments, other_event=loud)[0] is False


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ours.get_overall_delta(0, 0.1), "num_samples > 0, found num_samples=0"),
        (lambda: ours.get_overall_delta(10, 0.0), "0 < base_delta <= 1, found base_delta=0.0"),
        (lambda: ours.get_base_delta(10, 1.5), "0 < target_delta <= 1, found target_delta=1.5"),
        (lambda: ours.get_base_delta(10, 1e-6), "enough samples .* found num_samples=10"),
        (lambda: ours.minimum_samples_to_calibrate(0.2, 0.1), "target_delta > base_delta=0.2"),
        (lambda: ours.minimum_samples_to_calibrate(0.1, 0.1), "target_delta > base_delta=0.1"),
        (lambda: ours.delta_from_epsilon_and_samples(-1, [0.0]), "a number >= 0, found epsilon=-1"),
        (lambda: ours.delta_from_epsilon_and_samples(1, []), "non-empty 1-D array"),
        (lambda: ours.delta_from_epsilon_and_samples(1, [0.0, np.nan]), r"samples\[1\] = nan"),
        (lambda: ours.delta_from_epsilon_and_samples(1, [0.0], [-1]), "counts to be non-negative"),
        (lambda: ours.delta_from_epsilon_and_samples(1, [0.0], [1, 2]), "counts of the shape"),
        (lambda: ours.delta_from_epsilon_and_samples(1, [0.0], None, "x"), "DpEvent or a PLD"),
        (lambda: ours.perform_calibration_from_samples(1, 0.1, positive_samples=[]), "non-empty"),
        (
            lambda: ours.perform_calibration_from_samples(
                1, 0.1, positive_samples=[[0.0]], negative_samples=[]
            ),
            "negative_samples for all 1 lists",
        ),
        (
            lambda: ours.perform_calibration_from_samples(1, 1e-6, positive_samples=[[0.0]]),
            "found num_samples=1",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
