"""Every implementation of privacy_loss_sums against all sequences of participations, against each
other sample by sample, and against closed forms.

Statistics have fixed seeds and bounds of five standard errors.
"""

from __future__ import annotations

import fractions
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import implementations, privacy_losses

from jax_privacy_kernels import _checks, ops
from jax_privacy_kernels.ops.privacy_loss_sums import (
    IMPLEMENTATIONS,
    BallsInBins,
    BMinSep,
    CyclicPoisson,
    PrivacyLossSums,
    problem,
)

implementation = implementations.fixture(IMPLEMENTATIONS)

C = np.array([1.0, 0.5, 0.375, 0.3125])
KEY = jax.random.key(20)
# Steps that are no multiple of the cycle, cycles longer than all steps, strategies longer than the
# cycle: what wraps around, what is cut off.
CASES = {
    "bins": (BallsInBins(8, 4), C),
    "bins, part of a cycle": (BallsInBins(7, 3), C[:2]),
    "bins, long strategy": (BallsInBins(8, 3), C),
    "bins, strategy of all steps": (BallsInBins(4, 2), C),
    "bins, most are empty": (BallsInBins(3, 7), C[:3]),
    "one bin": (BallsInBins(6, 1), C),
    "one step": (BallsInBins(1, 3), C[:1]),
    "a gap in the strategy": (BallsInBins(8, 5), [1.0, 0.0, 0.5]),
    "min_sep": (BMinSep(8, 4, 0.3), C),
    "min_sep, short strategy": (BMinSep(8, 3, 0.4), C[:2]),
    "min_sep, cold": (BMinSep(8, 3, 0.4, warm_start=False), C[:3]),
    "min_sep, longer than all steps": (BMinSep(3, 5, 0.4), C[:3]),
    "min_sep, certain": (BMinSep(8, 3, 1.0), C[:3]),
    "min_sep, certain and cold": (BMinSep(8, 3, 1.0, warm_start=False), C[:3]),
    "Poisson": (BMinSep(6, 1, 0.3), C[:1]),
    "cyclic": (CyclicPoisson(8, 4, 0.6), C),
    "cyclic, part of a cycle": (CyclicPoisson(7, 3, 0.5), C[:3]),
    "cyclic, longer than all steps": (CyclicPoisson(3, 5, 0.5), C[:2]),
    "cyclic, certain": (CyclicPoisson(8, 3, 1.0), C[:2]),
}
COMPILED_SLOWLY = ("bins, long strategy", "min_sep", "min_sep, cold", "cyclic")
SIGMAS = np.array([0.4, 1.0, 3.0])
EPSILONS = np.array([-1.0, 0.0, 0.3, 1.5])


def sums(case, implementation, *, sigmas=SIGMAS, epsilons=EPSILONS, samples=40_000, **keywords):
    scheme, c = CASES[case] if isinstance(case, str) else case
    keywords = {"key": KEY, **keywords}
    return ops.privacy_loss_sums(
        scheme,
        c,
        sigmas,
        epsilons,
        num_samples=samples,
        implementation=implementation,
        **keywords,
    )


@functools.cache
def by_all_modes(case):
    """Means and standard errors [2, s, e] from the definition."""
    scheme, c = CASES[case]
    rng = np.random.default_rng(7)
    found = [
        [privacy_losses.draw(scheme, c, s, positive, 40_000, rng) for s in SIGMAS]
        for positive in (True, False)
    ]
    values = privacy_losses.excess(np.array(found)[:, :, None], EPSILONS[:, None])
    return values.mean(axis=-1), values.std(axis=-1) / 200


class TestImplementation:
    """What holds for every implementation."""

    @pytest.mark.parametrize("case", CASES)
    def test_the_law_is_that_of_all_modes(self, implementation, case):
        if implementation == "jax" and case not in COMPILED_SLOWLY:
            pytest.skip("the same samples as cpp's, which is a test of its own")
        found = sums(case, implementation)
        mean, error = by_all_modes(case)
        # Where next to nothing is seen, errors are not seen either.
        allowed = 5 * np.sqrt(2) * error + 4 / found.num_samples
        np.testing.assert_array_less(np.abs(found.sums / found.num_samples - mean), allowed)
        assert np.all(found.counts <= found.num_samples)
        assert np.all((found.maxima >= 0) & (found.maxima <= 1))
        assert np.all(found.sums >= found.maxima)
        assert np.all(found.sums <= found.counts * found.maxima * (1 + 1e-8))

    @pytest.mark.parametrize("case", ["bins, long strategy", "min_sep", "cyclic"])
    def test_samples_are_numbered(self, implementation, case):
        whole = sums(case, implementation, samples=1000)
        parts = [
            sums(case, implementation, samples=n, first_sample=f)
            for f, n in ((0, 1), (1, 414), (415, 585))
        ]
        found = parts[0] + parts[1] + parts[2]
        assert found.num_samples == 1000
        np.testing.assert_allclose(found.sums, whole.sums, rtol=1e-12)
        np.testing.assert_array_equal(found.counts, whole.counts)
        np.testing.assert_allclose(found.maxima, whole.maxima, rtol=1e-12)

    @pytest.mark.parametrize("case", ["bins, long strategy", "min_sep", "cyclic"])
    def test_far_samples_and_other_keys_are_others(self, implementation, case):
        near = sums(case, implementation, samples=500)
        for other in (
            sums(case, implementation, samples=500, first_sample=2**40),
            sums(case, implementation, samples=500, key=jax.random.key(21)),
        ):
            assert np.all(other.sums[:, 1, :] != near.sums[:, 1, :])
            np.testing.assert_allclose(other.sums[:, 1, 0], near.sums[:, 1, 0], rtol=0.2)

    def test_it_rounds_up(self, implementation):
        """Where L is zero, X is as well: what is found above is the margin, and is small."""
        found = sums((BMinSep(8, 3, 0.0), C[:3]), implementation, samples=100)
        at_zero = EPSILONS == 0
        assert np.all(found.counts[..., at_zero] == 100)
        assert np.all((found.sums[..., at_zero] > 0) & (found.sums[..., at_zero] < 100 * 1e-7))
        assert np.all(found.sums[..., EPSILONS > 0] == 0)

    def test_x64_mode_changes_nothing(self, implementation):
        with jax.enable_x64(True):
            wide = sums("min_sep", implementation, samples=100)
        narrow = sums("min_sep", implementation, samples=100)
        for a, b in zip(wide[:3], narrow[:3], strict=True):
            assert a.dtype == b.dtype == np.float64
            np.testing.assert_array_equal(a, b)

    @pytest.mark.parametrize("case", ["bins, long strategy", "min_sep", "cyclic"])
    def test_extreme_noise(self, implementation, case):
        """Losses of thousands, and of next to nothing; X stays in [0, 1]."""
        found = sums(case, implementation, sigmas=[1e-3, 0.05, 1e5], samples=2000)
        assert np.all(np.isfinite(found.sums))
        # With next to no noise the example is seen if it takes part; with very much, it is not.
        xs, weights = privacy_losses.participations(CASES[case][0])
        unseen = weights[xs.sum(axis=1) == 0].sum()
        assert found.sums[0, 0, 1] == pytest.approx(2000 * (1 - unseen), abs=100)
        np.testing.assert_array_less(found.sums[:, 2, 2], 1e-3)


# Each is compiled: those that differ in more than numbers.
@pytest.mark.parametrize(
    "case",
    [
        *COMPILED_SLOWLY,
        "bins, most are empty",
        "min_sep, longer than all steps",
        "min_sep, certain and cold",
        "Poisson",
        "cyclic, part of a cycle",
        "cyclic, longer than all steps",
    ],
)
def test_implementations_agree_sample_by_sample(case):
    found = [sums(case, name, samples=70, first_sample=5) for name in ("cpp", "jax")]
    np.testing.assert_allclose(found[0].sums, found[1].sums, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(found[0].counts, found[1].counts)
    np.testing.assert_allclose(found[0].maxima, found[1].maxima, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "case", [(BallsInBins(5, 1), C), (BMinSep(8, 8, 1.0, False), C), (BMinSep(4, 1, 1.0), [1])]
)
def test_one_mode_is_the_gaussian_mechanism(case):
    scheme, c = case
    samples = 40_000
    found = sums(case, None, epsilons=[0.0, 0.5, 1.5], samples=samples)
    for i, sigma in enumerate(SIGMAS):
        truth = privacy_losses.gaussian_delta(
            np.array([0.0, 0.5, 1.5]), sigma / problem(scheme, c).sensitivity
        )
        error = np.sqrt(truth * (1 - truth) / samples)
        for sign in (0, 1):
            gap = np.abs(found.sums[sign, i] / samples - truth)
            np.testing.assert_array_less(gap, 5 * error + 1e-7)


@pytest.mark.parametrize(
    "scheme", [BallsInBins(1, 4), BMinSep(1, 1, 0.25), CyclicPoisson(1, 1, 0.25)]
)
def test_one_step_is_subsampled(scheme):
    samples, epsilons = 40_000, [0.1, 0.4]
    found = sums((scheme, [1.0]), None, epsilons=epsilons, samples=samples)
    for i, sigma in enumerate(SIGMAS):
        for j, epsilon in enumerate(epsilons):
            truth = np.array(privacy_losses.subsampled_deltas(epsilon, sigma, 0.25))
            error = np.sqrt(truth * (1 - truth) / samples)
            gap = np.abs(found.sums[:, i, j] / samples - truth)
            np.testing.assert_array_less(gap, 5 * error + 1e-7)


def test_large_problem():
    """Several tiles of steps, taps that span them, a separation with an interval of its own."""
    c = 1 / np.sqrt(1 + np.arange(90.0))
    for scheme in (BMinSep(300, 90, 0.05), CyclicPoisson(300, 90, 0.5)):
        found = sums((scheme, c), "cpp", sigmas=[0.2, 2.0], samples=300)
        other = sums((scheme, c), "jax", sigmas=[0.2, 2.0], samples=300)
        np.testing.assert_allclose(found.sums, other.sums, rtol=1e-6, atol=1e-6)


def test_certain_b_min_sep_is_balls_in_bins():
    """Two algorithms, for two descriptions of one mechanism: other samples, the same law."""
    c, samples = C[:3], 200_000
    pairs = [
        sums((scheme, c), None, sigmas=[1.0], samples=samples)
        for scheme in (BallsInBins(20, 5), BMinSep(20, 5, 1.0), CyclicPoisson(20, 5, 1.0))
    ]
    for other in pairs[1:]:
        gap = np.abs(pairs[0].sums - other.sums) / samples
        np.testing.assert_array_less(gap, 5 * np.sqrt(0.5 / samples))


def test_balls_in_bins_does_not_see_the_number_of_steps():
    """Cycles add up: k cycles with noise sqrt(k) are one, up to the ends of the steps."""
    many, one = (
        sums((BallsInBins(n, 4), [1.0]), None, sigmas=[s]) for n, s in ((400, 10.0), (4, 1.0))
    )
    np.testing.assert_allclose(many.sums, one.sums, rtol=1e-6)


@pytest.mark.parametrize(
    ("scheme", "c", "keywords", "message"),
    [
        (BallsInBins(4, 2), [1.0, -0.5], {}, r"non-negative, found c_col\[1\] = -0.5"),
        (BallsInBins(4, 2), [1.0, np.nan], {}, r"finite .* found c_col\[1\] = nan"),
        (BallsInBins(4, 2), [], {}, r"non-empty 1-D array, found shape \(0,\)"),
        (BallsInBins(4, 2), [[1.0]], {}, r"1-D array, found shape \(1, 1\)"),
        (BallsInBins(4, 2), np.ones(5), {}, "at most iterations=4 coefficients, found 5"),
        (BMinSep(9, 2, 0.5), np.ones(3), {}, "at most min_sep=2 coefficients, found 3"),
        (CyclicPoisson(9, 2, 0.5), np.ones(3), {}, "at most cycle_length=2 coefficients, found 3"),
        (BallsInBins(4, 2), [0.0], {}, "squared norm .* found 0 for c_col of max 0"),
        (BallsInBins(4, 2), [1e-170], {}, "squared norm .* for c_col of max 1e-170"),
        (BallsInBins(4, 2), [1e200], {}, r"squared norm .* found inf|1e\+400 for c_col"),
        (BMinSep(4, 2, 0.5), [0.0], {}, "squared norm .* found 0 for c_col of max 0"),
        (BMinSep(4, 2, 0.5), [1e200], {}, r"squared norm .* found inf for c_col of max 1e\+200"),
        (CyclicPoisson(4, 2, 0.5), [1e-170], {}, "squared norm .* found 0 for c_col of max"),
        (BallsInBins(4, 2), [1.0], {"sigmas": [1.0, 0.0]}, r"noise_multipliers\[1\] = 0.0"),
        (BallsInBins(4, 2), [1.0], {"sigmas": [[1.0]]}, r"found shape \(1, 1\)"),
        (BallsInBins(4, 2), [1.0], {"epsilons": [np.nan]}, r"epsilons\[0\] = nan"),
        (BallsInBins(4, 2), [1.0], {"samples": 0}, "num_samples >= 1, found num_samples=0"),
        (BallsInBins(4, 2), [1.0], {"first_sample": -1}, "first_sample >= 0"),
        (BallsInBins(4, 2), [1.0], {"first_sample": 2**44}, f"<= {2**44}, found"),
        (BallsInBins(4, 2), [1.0], {"key": np.zeros(3, np.uint32)}, "uint32 of shape"),
        (BallsInBins(4, 2), [1.0], {"key": jax.random.key(0, impl="rbg")}, "found rbg"),
    ],
)
def test_bad_arguments(scheme, c, keywords, message):
    with pytest.raises(ValueError, match=message):
        sums((scheme, c), None, **keywords)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BallsInBins(0, 2), "iterations >= 1, found iterations=0"),
        (lambda: BallsInBins(2, 0), "cycle_length >= 1, found cycle_length=0"),
        (lambda: BMinSep(2, 0, 0.5), "min_sep >= 1, found min_sep=0"),
        (lambda: BMinSep(2, 1, 1.5), "0 <= sampling_prob <= 1, found sampling_prob=1.5"),
        (lambda: BMinSep(2, 1, float("nan")), "found sampling_prob=nan"),
        (lambda: CyclicPoisson(2, 1, -0.1), "found sampling_prob=-0.1"),
    ],
)
def test_bad_schemes(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        (BMinSep(10, 2**58, 0.5), "min_sep"),
        (BMinSep(10, 2**1000, 0.5), "min_sep"),
        (CyclicPoisson(10, 2**58, 0.5), "cycle_length"),
        (BMinSep(8, 10**13, 0.5), "min_sep"),
        (BMinSep(10**13, 1, 0.5), "iterations"),
        (BMinSep(100, 10**8, 0.5), "min_sep"),
        (BallsInBins(100_000, 50_000), "cycle_length"),
        (BallsInBins(8, 10**8), "cycle_length"),
        (BallsInBins(10**13, 2), "iterations"),
    ],
)
def test_what_does_not_fit_is_refused(monkeypatch, scheme, name):
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**22}  # 16 GiB, wherever this runs
    monkeypatch.setattr(_checks.os, "sysconf", pages.get)
    with pytest.raises(ValueError, match=f"found {name}=.* which takes [0-9]+ bytes"):
        problem(scheme, [1.0])


def test_grids_that_do_not_fit_are_refused():
    many = np.linspace(1.0, 2.0, 2**20)
    with pytest.raises(ValueError, match=f"noise_multipliers times epsilons={2**40}"):
        sums("min_sep", None, sigmas=many, epsilons=many, samples=1)
    with pytest.raises(ValueError, match=r"found min_sep=100000, which takes [0-9]+ bytes"):
        sums((BMinSep(10, 10**5, 0.5), [1.0]), None, sigmas=many, samples=1)
    with pytest.raises(ValueError, match=f"found iterations={10**10}, which takes [0-9]+ bytes"):
        sums((BMinSep(10**10, 10**4, 0.5), [1.0]), "jax", samples=1)


def test_plain_jax_that_stands_in_is_bounded_too(monkeypatch):
    monkeypatch.delitem(IMPLEMENTATIONS, "cpp")
    with pytest.raises(ValueError, match=f"found iterations={10**10}, which takes"):
        sums((BMinSep(10**10, 10**4, 0.5), [1.0]), None, samples=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"period": 2**58}, "n and period from 1 to"),
        ({"n": 2**58}, "n and period from 1 to"),
        ({"period": 2**47}, "at most .* bytes"),
        ({"n": 2**47, "period": 1}, "at most .* bytes"),
    ],
)
@pytest.mark.parametrize("scheme", ["min_sep", "min_sep_warm", "cyclic"])
def test_the_kernel_bounds_what_it_asks_for(scheme, changes, message):
    """By itself: no caller makes it write out of bounds."""
    static = {"n": 10, "period": 4, "p": 0.5, "scheme": scheme, **changes}
    one = np.ones(1)
    arrays = (np.zeros(2, np.uint32), np.array([0, 1]), (one,), one, 0 * one, one)
    run = jax.jit(functools.partial(IMPLEMENTATIONS["cpp"].run, **static))
    with jax.enable_x64(True), pytest.raises(Exception, match=message):
        jax.block_until_ready(run(*arrays))


@pytest.mark.parametrize(
    ("scheme", "c"),
    [(BMinSep(23, 7, 0.5), C), (BMinSep(22, 4, 0.5), C), (CyclicPoisson(3, 9, 0.5), C[:3])],
)
def test_sensitivity_is_that_of_all_participations(scheme, c):
    n, period = scheme.iterations, getattr(scheme, "min_sep", None) or scheme.cycle_length
    x = np.arange(n) % period == 0
    expected = np.linalg.norm(np.convolve(x, c)[:n])
    assert problem(scheme, c).sensitivity == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (lambda: BallsInBins(8.0, np.array(4)), BallsInBins(8, 4)),
        (lambda: BMinSep(np.array(8), 4.0, jnp.float32(0.5), np.True_), BMinSep(8, 4, 0.5)),
        (lambda: CyclicPoisson(jnp.array(8), np.int8(4), np.array(1)), CyclicPoisson(8, 4, 1.0)),
    ],
)
def test_schemes_keep_pythons_numbers(given, kept):
    found = given()
    assert found == kept
    assert hash(found) == hash(kept)
    assert repr(found) == repr(kept)
    for name, value in vars(kept).items():
        assert type(vars(found)[name]) is type(value)
    a, b = (sums((x, C), None, samples=50) for x in (found, kept))
    np.testing.assert_array_equal(a.sums, b.sums)


def test_sums_of_many_terms_are_rounded_up():
    """By more than the terms' addition can lose, one after the other; certain ones are exact."""
    n = 2**20
    found = sums((BallsInBins(4, 1), [1.0]), None, sigmas=[1e-3], epsilons=[0.0], samples=n)
    np.testing.assert_array_equal(found.sums, n)
    np.testing.assert_array_equal((found + found).sums, 2 * n)
    half = np.full((2, 1, 1), 1 / 3)
    part = PrivacyLossSums(half, np.ones((2, 1, 1)), half, 1)
    total = functools.reduce(lambda a, b: a + b, [part] * 1000)
    exact = 1000 * fractions.Fraction(1 / 3)
    assert (
        exact <= fractions.Fraction(total.sums[0, 0, 0]) <= exact * (1 + fractions.Fraction(1e-12))
    )


@pytest.mark.parametrize("p", ["0.5", None, [0.5], np.array([0.5, 0.5]), 0.5j])
def test_probabilities_are_numbers(p):
    for make in (lambda: BMinSep(8, 4, p), lambda: CyclicPoisson(8, 4, p)):
        with pytest.raises(TypeError, match="expected sampling_prob to be a real number, found"):
            make()


def test_a_warm_start_is_true_or_false():
    with pytest.raises(TypeError, match="expected warm_start to be True or False, found 'no'"):
        BMinSep(8, 4, 0.5, "no")


@pytest.mark.parametrize("values", [None, "1.0", ["a"], [1.0 + 1j], [[1.0], [1.0, 2.0]]])
def test_arrays_hold_real_numbers(values):
    with pytest.raises(TypeError, match="expected c_col to hold real numbers, found"):
        sums((BallsInBins(4, 2), values), None)
    with pytest.raises(TypeError, match="expected noise_multipliers to hold real numbers, found"):
        sums((BallsInBins(4, 2), [1.0]), None, sigmas=values)
    with pytest.raises(TypeError, match="expected epsilons to hold real numbers, found"):
        sums((BallsInBins(4, 2), [1.0]), None, epsilons=values)


def test_steps_are_whole_numbers():
    with pytest.raises(TypeError, match=r"iterations to be an integer, found 2\.5"):
        BallsInBins(2.5, 1)
