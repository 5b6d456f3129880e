"""Calibrations and bounds: that they hold where the truth is known, and as often as they say.

Seeds are fixed. Counts of repeated runs are compared with what a binomial law allows: its quantile
at 1e-6.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types

import jax
import numpy as np
import pytest
from scipy import optimize, stats
from support import privacy_losses, sweeps

from jax_privacy_kernels import _estimates, monte_carlo, ops
from jax_privacy_kernels.experimental.monte_carlo import delta_calculation
from jax_privacy_kernels.monte_carlo import BallsInBins, BMinSep, CyclicPoisson

C = np.array([1.0, 0.5, 0.375, 0.3125])
ONE_MODE = BallsInBins(6, 1)  # the Gaussian mechanism of this sensitivity
SENSITIVITY = float(np.linalg.norm(np.convolve(C, np.ones(6))[:6]))
ONE_STEP = BallsInBins(1, 4)  # subsampled with probability 1/4


def allowed(runs, probability):
    return stats.binom.isf(1e-6, runs, probability)


def worst(epsilon, sigma):
    return max(privacy_losses.subsampled_deltas(epsilon, sigma, 0.25))


class TestCalibrate:
    def test_gaussian(self, monkeypatch):
        closed = _estimates.gaussian_sigma
        # One mode is not amplified, so that the sweep would hardly begin below the closed form.
        monkeypatch.setattr(_estimates, "gaussian_sigma", lambda *arguments: 2 * closed(*arguments))
        found = monte_carlo.calibrate(ONE_MODE, C, epsilon=1.0, delta=1e-3, seed=0)
        assert found.is_amplified
        true = privacy_losses.gaussian_delta(1.0, found.noise_multiplier / SENSITIVITY)
        assert true <= 1e-3
        # Not by much more than the base delta asks for, and the noise of the estimates.
        assert true >= 2e-4
        unamplified = privacy_losses.gaussian_delta(1.0, found.unamplified / 2 / SENSITIVITY)
        assert unamplified == pytest.approx(5e-4, rel=1e-3)
        assert unamplified <= 5e-4

    @pytest.mark.parametrize(
        ("scheme", "c"),
        [(BallsInBins(20, 5), C), (BMinSep(20, 4, 0.25), C), (CyclicPoisson(20, 4, 0.5), C)],
    )
    def test_what_it_reports(self, scheme, c):
        arguments = {"epsilon": 1.0, "delta": 0.013, "base_delta": 0.012, "seed": 3}
        found = monte_carlo.calibrate(scheme, c, **arguments)
        assert found == monte_carlo.calibrate(scheme, c, **arguments)
        assert found.num_samples == delta_calculation.minimum_samples_to_calibrate(0.012, 0.013)
        assert delta_calculation.get_overall_delta(found.num_samples, 0.012) <= 0.013
        assert found.is_amplified
        assert list(found.sweep) == sorted(found.sweep, reverse=True)
        chosen = found.sweep.index(found.noise_multiplier)
        estimates = np.max(found.estimates, axis=1)
        assert np.all(estimates[: chosen + 1] <= 0.012)
        assert chosen + 1 == len(estimates) or estimates[chosen + 1] > 0.012
        # The same samples, one by one.
        bound = monte_carlo.delta(
            scheme,
            c,
            noise_multiplier=found.noise_multiplier,
            epsilon=1.0,
            num_samples=200_000,
            seed=1,
        )
        assert 0.9 * 0.012 < max(bound.estimates) < 1.05 * 0.012
        text = str(found)
        assert max(map(len, text.splitlines())) <= 80
        for word in (f"{found.noise_multiplier:.6g}", "base delta 0.012", type(scheme).__name__):
            assert word in text
        assert text.count("pass") == np.sum(estimates <= 0.012) + 1  # and once in words

    def test_the_best_of_several_calibrations(self):
        """It takes more samples, and what is printed says what the claim is about."""
        arguments = {"epsilon": 1.0, "delta": 0.1, "seed": 4}
        one = monte_carlo.calibrate(ONE_STEP, [1.0], **arguments)
        many = monte_carlo.calibrate(ONE_STEP, [1.0], **arguments, calibrations=1000)
        assert (one.calibrations, many.calibrations) == (1, 1000)
        assert many.num_samples > one.num_samples
        overall = delta_calculation.get_overall_delta
        assert overall(many.num_samples, many.base_delta, calibrations=1000) <= 0.1
        assert overall(one.num_samples, one.base_delta, calibrations=1000) > 0.1
        assert "this calibration alone, with a seed chosen beforehand" in str(one)
        assert "at most 1,000 calibrations, with seeds chosen beforehand" in str(many)
        assert max(map(len, str(many).splitlines())) <= 80

    def test_seeds(self):
        arguments = {"epsilon": 1.0, "delta": 0.1}
        one, other = (monte_carlo.calibrate(ONE_STEP, [1.0], **arguments) for _ in range(2))
        assert one.seed != other.seed
        assert one.estimates != other.estimates
        assert monte_carlo.calibrate(ONE_STEP, [1.0], **arguments, seed=one.seed) == one

    def test_implementations_agree(self):
        found = [
            monte_carlo.calibrate(
                ONE_STEP, [1.0], epsilon=0.5, delta=0.1, seed=2, implementation=name
            )
            for name in ("cpp", "jax")
        ]
        assert found[0].noise_multiplier == pytest.approx(found[1].noise_multiplier, rel=1e-9)
        assert found[0].sweep == pytest.approx(found[1].sweep, rel=1e-9)

    def test_jax_privacys_strategies(self):
        batch_selection = pytest.importorskip("jax_privacy.batch_selection")
        arguments = {"epsilon": 1.0, "delta": 0.1, "seed": 1}
        pairs = [
            (batch_selection.BallsInBinsSampling(iterations=8, cycle_length=4), BallsInBins(8, 4)),
            (batch_selection.BMinSepSampling(0.5, 8, 4), BMinSep(8, 4, 0.5)),
            (batch_selection.CyclicPoissonSampling(0.5, 8), CyclicPoisson(8, 1, 0.5)),
        ]
        for theirs, ours in pairs:
            c = C if ours != pairs[2][1] else [1.0]
            assert monte_carlo.calibrate(theirs, c, **arguments) == monte_carlo.calibrate(
                ours, c, **arguments
            )

    def test_nothing_passes(self, monkeypatch):
        """What needs no amplification is left."""
        monkeypatch.setattr(_estimates, "crossing", lambda *_: 1e-3)
        found = monte_carlo.calibrate(BallsInBins(8, 4), C, epsilon=1.0, delta=0.1, seed=0)
        assert not found.is_amplified
        assert found.noise_multiplier == found.unamplified
        assert np.max(found.estimates[0]) > found.base_delta

    @pytest.mark.parametrize("runs", sweeps.cases([250, 1000], [250]))
    def test_it_is_delta_dp_on_average(self, runs):
        """Calibrations with few samples: the search included, delta is what was promised."""
        epsilon, delta = 0.3, 0.1
        found = [
            monte_carlo.calibrate(ONE_STEP, [1.0], epsilon=epsilon, delta=delta, seed=seed)
            for seed in range(runs)
        ]
        sigmas = np.array([f.noise_multiplier for f in found])
        points = np.linspace(sigmas.min(), sigmas.max(), 60)
        true = np.interp(sigmas, points, [worst(epsilon, s) for s in points])
        assert true.mean() <= delta
        samples, base = found[0].num_samples, found[0].base_delta
        for t in (1.2 * base, 1.5 * base, 1.8 * base):
            q = math.exp(-samples * delta_calculation._kl(base, t))
            assert np.sum(true > t) <= allowed(runs, q)
        # And it is no bound for its own sake.
        assert true.mean() > 0.7 * base


class TestDelta:
    def test_bounds_err_no_more_often_than_they_say(self):
        epsilon, sigma, runs = 0.3, 0.8, 1000
        true = worst(epsilon, sigma)
        found = [
            monte_carlo.delta(
                ONE_STEP, [1.0], noise_multiplier=sigma, epsilon=epsilon, num_samples=300,
                confidence=0.9, seed=seed,
            )
            for seed in range(runs)
        ]  # fmt: skip
        assert sum(f.delta < true for f in found) <= allowed(runs, 0.1)
        assert np.mean([max(f.estimates) for f in found]) == pytest.approx(true, rel=0.1)
        assert np.mean([f.delta for f in found]) < 2 * true

    @pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
    def test_gaussian(self, epsilon):
        found = monte_carlo.delta(
            ONE_MODE, C, noise_multiplier=SENSITIVITY, epsilon=epsilon, num_samples=200_000, seed=0
        )
        true = privacy_losses.gaussian_delta(epsilon, 1.0)
        assert true < found.delta < 1.1 * true + 1e-4
        assert found.estimates == pytest.approx((true, true), rel=0.05)
        assert f"delta <= {found.delta:.4g}" in str(found)

    def test_poisson_is_dp_accountings(self):
        dp_accounting = pytest.importorskip("dp_accounting")
        gaussian = dp_accounting.GaussianDpEvent(1.0)
        event = dp_accounting.PoissonSampledDpEvent(0.2, gaussian)
        accountant = dp_accounting.pld.PLDAccountant(value_discretization_interval=1e-3)
        accountant.compose(event, 10)
        for epsilon in (0.3, 1.0):
            true = accountant.get_delta(epsilon)
            for scheme in (BMinSep(10, 1, 0.2), CyclicPoisson(10, 1, 0.2)):
                found = monte_carlo.delta(
                    scheme, [1.0], noise_multiplier=1.0, epsilon=epsilon, num_samples=200_000,
                    seed=4,
                )  # fmt: skip
                assert max(found.estimates) == pytest.approx(true, rel=0.04)
                assert true * 0.999 < found.delta < 1.15 * true

    def test_extremes(self):
        """Every estimate has a bound above it, however few samples there are."""
        for mean, samples in ((0.0, 1), (0.0, 10**9), (1.0, 5), (1 - 1e-12, 10**6), (1e-9, 10**7)):
            for failure in (0.1, 1e-6):
                bound = _estimates.upper_bound(mean, samples, failure)
                assert mean <= bound <= 1
                assert bound > mean or mean == 1
        # Without successes, the bound of Clopper and Pearson.
        found = _estimates.upper_bound(0.0, 50, 0.05)
        assert found == pytest.approx(stats.beta.isf(0.05, 1, 50), rel=1e-9)
        # And else not far above it.
        found = _estimates.upper_bound(10 / 50, 50, 0.05)
        assert stats.beta.isf(0.05, 11, 40) < found < 1.2 * stats.beta.isf(0.05, 11, 40)


class TestEpsilon:
    def test_bounds_err_no_more_often_than_they_say(self):
        delta, sigma, runs = 0.1, 0.8, 200
        true = optimize.brentq(lambda e: worst(e, sigma) - delta, 0.0, 3.0, xtol=1e-4)
        found = [
            monte_carlo.epsilon(
                ONE_STEP, [1.0], noise_multiplier=sigma, delta=delta, num_samples=400,
                confidence=0.9, seed=seed,
            )
            for seed in range(runs)
        ]  # fmt: skip
        assert sum(f.epsilon < true for f in found) <= allowed(runs, 0.1)
        assert np.median([f.estimate for f in found]) == pytest.approx(true, abs=0.1)

    @pytest.mark.parametrize("delta", [0.3, 1e-2, 1e-3])
    def test_gaussian(self, delta):
        found = monte_carlo.epsilon(
            ONE_MODE, C, noise_multiplier=SENSITIVITY, delta=delta, num_samples=200_000, seed=0
        )
        true = optimize.brentq(
            lambda e: privacy_losses.gaussian_delta(e, 1.0) - delta, 0.0, 20.0, xtol=1e-9
        )
        assert true < found.epsilon < 1.1 * true + 0.05
        assert found.estimate == pytest.approx(true, abs=0.05)
        assert f"epsilon <= {found.epsilon:.4g}" in str(found)

    def test_it_is_the_inverse_of_delta(self):
        scheme = BMinSep(20, 4, 0.25)
        found = monte_carlo.epsilon(
            scheme, C, noise_multiplier=1.0, delta=0.01, num_samples=100_000, seed=0
        )
        bound = monte_carlo.delta(
            scheme, C, noise_multiplier=1.0, epsilon=found.epsilon, num_samples=100_000, seed=1
        )
        assert bound.delta == pytest.approx(0.01, rel=0.15)

    def test_hardly_any_noise(self):
        """The grid ends at what needs no amplification, and is no worse."""
        found = monte_carlo.epsilon(
            BallsInBins(4, 1), [1.0], noise_multiplier=0.05, delta=0.01, num_samples=2000, seed=0
        )
        true = optimize.brentq(
            lambda e: privacy_losses.gaussian_delta(e, 0.025) - 0.01, 0.0, 3000.0
        )
        assert true * 0.99 < found.epsilon < 1.1 * true


@pytest.mark.parametrize("scale", [2.0**-40, 1e-4, 1e6, 1e-170, 1e200])
@pytest.mark.parametrize(
    "scheme", [BallsInBins(20, 5), BMinSep(20, 4, 0.5), CyclicPoisson(8, 4, 1)]
)
def test_scales_of_c_are_scales_of_noise(scheme, scale):
    unit = C / np.linalg.norm(C)

    def run(c, scale):
        found = monte_carlo.calibrate(scheme, c, epsilon=1.0, delta=0.1, seed=0)
        noise = {"noise_multiplier": found.noise_multiplier, "num_samples": 1000, "seed": 0}
        return (
            found.noise_multiplier / scale,
            found.unamplified / scale,
            np.array(found.sweep) / scale,
            np.array(found.estimates),
            np.array(monte_carlo.delta(scheme, c, epsilon=1.0, **noise).estimates),
            monte_carlo.epsilon(scheme, c, delta=0.1, **noise).epsilon,
            monte_carlo.epsilon(scheme, c, delta=0.1, **noise).noise_multiplier / scale,
        )

    for found, right in zip(run(unit * scale, scale), run(unit, 1.0), strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-6)


@pytest.mark.parametrize("c", [1e-308, 5e-324, 1.7e308])
def test_scales_at_the_end_of_the_range(c):
    message = re.escape(f"norm from 1e-301 to 1e301, found c_col of max {c}")
    with pytest.raises(ValueError, match=message):
        monte_carlo.delta(ONE_STEP, [c], **GOOD["delta"])


def test_extreme_noise_is_no_error_about_something_else():
    """The grid of epsilons ends, and so do pilots."""
    arguments = {"num_samples": 1000, "seed": 0}
    found = monte_carlo.epsilon(ONE_MODE, C, noise_multiplier=1e-5, delta=0.01, **arguments)
    true = optimize.brentq(
        lambda e: privacy_losses.gaussian_delta(e, 1e-5 / SENSITIVITY) - 0.01, 1e9, 1e13
    )
    assert true <= found.epsilon <= true * 1.001
    found = monte_carlo.calibrate(ONE_STEP, [1.0], epsilon=1e4, delta=0.1, seed=0)
    assert 1e-3 < found.noise_multiplier <= found.unamplified


@pytest.mark.parametrize("delta", [0.3, 1e-5, 1e-9])
@pytest.mark.parametrize("epsilon", [0.0, 1e-9, 1e-4, 0.1, 1.0, 30.0, 1e4])
def test_the_closed_form_is_never_optimistic(epsilon, delta):
    """Against an integral over mu = 1 / sigma, which has no difference in it."""

    def true(sigma, epsilon):
        # The derivative by mu is phi(epsilon / mu - mu / 2): its last 40 widths do. Over log(mu).
        mu = 1 / sigma
        low = math.log(max(1e-9 * mu, mu - 40 / (epsilon / mu**2 + 0.5)))
        nodes, weights = np.polynomial.legendre.leggauss(400)
        half = (math.log(mu) - low) / 2
        u = np.exp(low + half * (nodes + 1))
        return half * np.sum(weights * u * stats.norm.pdf(epsilon / u - u / 2))

    sigma = _estimates.gaussian_sigma(epsilon, delta)
    assert delta * (1 - 1e-3) < true(sigma, epsilon) <= delta
    found = _estimates.gaussian_epsilon(sigma, delta)
    assert found == pytest.approx(epsilon, rel=1e-5, abs=2e-6)
    assert true(sigma, found) <= delta


def test_certain_losses_are_no_more_than_one():
    """What is rounded up is clipped: delta is a probability."""
    arguments = {"epsilon": 0.0, "noise_multiplier": 1e-3, "num_samples": 10**5, "seed": 0}
    found = monte_carlo.delta(BMinSep(4, 1, 1.0), [1.0], **arguments)
    assert found.estimates == (1.0, 1.0)
    assert found.delta == 1.0


def test_more_noise_is_more_private_for_the_same_samples():
    """What makes the sweep's last step before a failure mean something."""
    sigmas = np.geomspace(3, 0.5, 30)
    for scheme in (BallsInBins(20, 5), BMinSep(20, 4, 0.25), CyclicPoisson(20, 4, 0.5)):
        sums = ops.privacy_loss_sums(
            scheme, C, sigmas, 0.5, key=jax.random.key(0), num_samples=200_000
        )
        assert np.all(np.diff(sums.sums[:, :, 0], axis=1) > 0)


def test_no_two_purposes_share_samples(monkeypatch):
    """What `calibrate` has chosen is bounded from fresh samples, also for the same seed."""
    used = {}

    def recorded(*arguments, key, **keywords):
        used.setdefault(tuple(map(int, key)), set()).add(name)
        return sums(*arguments, key=key, **keywords)

    sums = _estimates.privacy_loss_sums
    monkeypatch.setattr(_estimates, "privacy_loss_sums", recorded)
    name = "calibrate"
    found = monte_carlo.calibrate(ONE_STEP, [1.0], **GOOD[name], seed=0)
    for name in ("delta", "epsilon"):
        changes = {"noise_multiplier": found.noise_multiplier, "seed": 0}
        getattr(monte_carlo, name)(ONE_STEP, [1.0], **{**GOOD[name], **changes})
    assert all(len(names) == 1 for names in used.values())
    assert sorted(min(names) for names in used.values()) == [
        *["calibrate"] * 4, "delta", "epsilon", "epsilon",
    ]  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1])
def test_keys_differ_pairwise(seed):
    _, keys = monte_carlo._keys(seed, *monte_carlo._PURPOSES)
    assert len({tuple(key) for key in keys}) == len(keys) == 7


def test_progress_and_chunks(capsys, monkeypatch):
    """Chunks change sums by rounding only; the bar is seen where it is asked for."""
    arguments = {"noise_multiplier": 1.0, "epsilon": 0.5, "num_samples": 20_000, "seed": 5}
    whole = monte_carlo.delta(ONE_STEP, [1.0], **arguments)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(_estimates, "_WORK", 1)
    parts = monte_carlo.delta(ONE_STEP, [1.0], **arguments, progress=True)
    assert parts.estimates == pytest.approx(whole.estimates, rel=1e-12)
    assert "/20.0k" in capsys.readouterr().err


def test_interrupts_are_passed_on(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(_estimates, "privacy_loss_sums", interrupted)
    with pytest.raises(KeyboardInterrupt):
        monte_carlo.delta(ONE_STEP, [1.0], noise_multiplier=1.0, epsilon=1.0)


GOOD = {
    "calibrate": {"epsilon": 1.0, "delta": 0.1},
    "delta": {"epsilon": 1.0, "noise_multiplier": 1.0, "num_samples": 100},
    "epsilon": {"delta": 0.1, "noise_multiplier": 1.0, "num_samples": 100},
}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("calibrate", {"epsilon": -1.0}, "0 <= epsilon <= 10000, found epsilon=-1.0"),
        ("calibrate", {"epsilon": math.nan}, "found epsilon=nan"),
        ("calibrate", {"delta": 0.0}, "0 < delta < 1, found delta=0.0"),
        ("calibrate", {"delta": 1.0}, "0 < delta < 1, found delta=1.0"),
        ("calibrate", {"base_delta": 0.1}, "base_delta < delta=0.1, found base_delta=0.1"),
        ("calibrate", {"base_delta": 0.0}, "0 < base_delta < 1, found base_delta=0.0"),
        ("calibrate", {"delta": 1e-9}, "base_delta >= 1e-09, found base_delta=5e-10"),
        ("calibrate", {"base_delta": 9e-10}, "base_delta >= 1e-09, found base_delta=9e-10"),
        ("epsilon", {"delta": 9e-10}, "delta >= 1e-09, found delta=9e-10"),
        ("calibrate", {"calibrations": 0}, "calibrations >= 1, found calibrations=0"),
        ("calibrate", {"seed": -1}, "seed >= 0, found seed=-1"),
        ("calibrate", {"seed": 2**64}, r"seed < 2\^64"),
        ("calibrate", {"implementation": "fast"}, "'fast' of privacy_loss_sums was asked for"),
        ("calibrate", {"epsilon": 0.0, "delta": 1e-7}, "epsilon and base_delta that need noise"),
        ("delta", {"noise_multiplier": 0.0}, r"noise_multiplier <= 1e\+06 .*, found 0.0"),
        ("epsilon", {"noise_multiplier": 1e-7}, "expected 1e-06 <= noise_multiplier .* 1e-07"),
        ("delta", {"noise_multiplier": math.nan}, "found nan"),
        ("delta", {"epsilon": -0.1}, "found epsilon=-0.1"),
        ("delta", {"num_samples": 0}, "num_samples >= 1, found num_samples=0"),
        ("delta", {"confidence": 1.0}, "0 < confidence < 1, found confidence=1.0"),
        ("epsilon", {"delta": 0.0}, "0 < delta < 1, found delta=0.0"),
        ("delta", {"num_samples": 2**60}, f"num_samples <= {2**44}, found num_samples={2**60}"),
        ("epsilon", {"num_samples": 2**60}, f"num_samples <= {2**44}, found"),
        ("calibrate", {"base_delta": 0.1 * (1 - 1e-6)}, f"at most {2**44} samples, found delta=0"),
        ("epsilon", {"num_samples": 10}, "num_samples >= 66 .* found num_samples=10"),
    ],
)
def test_bad_arguments(name, changes, message):
    with pytest.raises(ValueError, match=message):
        getattr(monte_carlo, name)(ONE_STEP, [1.0], **{**GOOD[name], **changes})


@pytest.mark.parametrize(
    ("name", "argument"),
    [(name, argument) for name in GOOD for argument in GOOD[name] if argument != "num_samples"]
    + [("calibrate", "base_delta"), ("delta", "confidence"), ("epsilon", "confidence")],
)
@pytest.mark.parametrize("value", ["a", "0.5", [0.5], np.array([0.5, 0.5]), 0.5j])
def test_arguments_are_numbers(name, argument, value):
    with pytest.raises(TypeError, match=f"expected {argument} to be a real number, found"):
        getattr(monte_carlo, name)(ONE_STEP, [1.0], **{**GOOD[name], argument: value})


def test_numbers_of_any_type():
    one = monte_carlo.delta(
        ONE_STEP, [1.0], epsilon=1.0, noise_multiplier=0.5, num_samples=100, seed=1
    )
    other = monte_carlo.delta(
        ONE_STEP,
        jax.numpy.ones(1),
        epsilon=jax.numpy.float32(1),
        noise_multiplier=np.array(0.5),
        num_samples=1e2,
        seed=np.uint64(1),
    )
    assert one == other
    assert repr(one) == repr(other)


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize(
    ("c", "message"),
    [
        ([-1.0], r"non-negative, found c_col\[0\] = -1.0"),
        ([0.0], r"c_col\[0\] > 0, found c_col\[0\] = 0.0"),
        ([1.0, 1.0], "at most iterations=1 coefficients, found 2"),
    ],
)
def test_bad_strategies(name, c, message):
    with pytest.raises(ValueError, match=message):
        getattr(monte_carlo, name)(ONE_STEP, c, **GOOD[name])


@pytest.mark.parametrize("sampling", [None, types.SimpleNamespace(iterations=3), "bins"])
def test_bad_sampling(sampling):
    with pytest.raises(ValueError, match=r"expected balls-in-bins, .* found a "):
        monte_carlo.calibrate(sampling, [1.0], **GOOD["calibrate"])


class BallsInBinsSampling:
    """Looks like jax_privacy's."""

    iterations, cycle_length = 1, 4

    def batch_iterator(self):
        """As its name says."""


class CyclicPoissonSampling(BallsInBinsSampling):
    def batch_iterator(self):
        """Of a class that is both: it is none of them."""


@pytest.mark.parametrize("size", [1, 0, 8])
def test_truncation_is_never_ignored(size):
    sampling = BallsInBinsSampling()
    sampling.truncated_batch_size = size
    with pytest.raises(ValueError, match=f"without truncated_batch_size, .* found {size}"):
        monte_carlo.calibrate(sampling, [1.0], **GOOD["calibrate"])
    sampling.truncated_batch_size = None
    arguments = {**GOOD["delta"], "seed": 0}
    found = monte_carlo.delta(sampling, [1.0], **arguments)
    assert found == monte_carlo.delta(ONE_STEP, [1.0], **arguments)


def test_other_batches_are_refused():
    """Whatever is derived from a strategy and draws other batches has other privacy."""
    own = BallsInBinsSampling()
    own.batch_iterator = lambda: None
    derived = [type("Mine", (BallsInBinsSampling,), {"batch_iterator": lambda self: None})()]
    derived.append(type("BallsInBinsSampling", (type(derived[0]),), {})())
    for sampling in (own, CyclicPoissonSampling(), *derived):
        with pytest.raises(ValueError, match="expected the batch_iterator of BallsInBinsSampling"):
            monte_carlo.delta(sampling, [1.0], **GOOD["delta"])
    same = type("Mine", (BallsInBinsSampling,), {"name": "only this is new"})()
    assert monte_carlo.delta(same, [1.0], **GOOD["delta"]).num_samples == 100


def test_results_are_frozen():
    found = monte_carlo.delta(ONE_STEP, [1.0], **GOOD["delta"], seed=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.delta = 0.0
