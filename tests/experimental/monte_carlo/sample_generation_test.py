"""Samples and losses against all sequences of participations, and against jax_privacy's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from support import privacy_losses

from jax_privacy_kernels import monte_carlo, ops
from jax_privacy_kernels.experimental.monte_carlo import sample_generation as ours
from jax_privacy_kernels.monte_carlo import BallsInBins, BMinSep, CyclicPoisson

batch_selection = pytest.importorskip("jax_privacy.batch_selection")
peer = pytest.importorskip("jax_privacy.experimental.monte_carlo.sample_generation")

C = np.array([1.0, 0.5, 0.375, 0.3125])
INDEPENDENT = batch_selection.PartitionType.INDEPENDENT
# Ours, and the same of jax_privacy's.
CASES = {
    "bins": (
        BallsInBins(8, 4),
        batch_selection.BallsInBinsSampling(iterations=8, cycle_length=4),
        C,
    ),
    "bins that wrap": (
        BallsInBins(8, 3),
        batch_selection.BallsInBinsSampling(iterations=8, cycle_length=3),
        C,
    ),
    "mostly empty bins": (
        BallsInBins(3, 5),
        batch_selection.BallsInBinsSampling(iterations=3, cycle_length=5),
        C[:2],
    ),
    "min_sep": (BMinSep(8, 4, 0.3), batch_selection.BMinSepSampling(0.3, 8, 4), C),
    "cold": (
        BMinSep(8, 4, 0.3, False),
        batch_selection.BMinSepSampling(0.3, 8, 4, warm_start=False),
        C[:2],
    ),
    "short": (BMinSep(3, 5, 0.4), batch_selection.BMinSepSampling(0.4, 3, 5), C[:3]),
    "cyclic": (
        CyclicPoisson(8, 4, 0.6),
        batch_selection.CyclicPoissonSampling(
            sampling_prob=0.6, iterations=8, cycle_length=4, partition_type=INDEPENDENT
        ),
        C,
    ),
    "never": (BMinSep(4, 2, 0.0), batch_selection.BMinSepSampling(0.0, 4, 2), C[:2]),
}
OF_PEER = [name for name in CASES if name not in ("cyclic", "never")]  # what 2.0.0 has, or survives


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("positive", [True, False])
def test_losses_are_those_of_all_modes(case, positive):
    scheme, strategy, c = CASES[case]
    for sigma in (0.3, 1.0, 20.0):
        loss, y = ours.get_privacy_loss_sample(strategy, sigma, c, 0, positive, 50)
        assert loss.shape == (50,)
        assert y.shape == (scheme.iterations, 50)
        expected = privacy_losses.loss(scheme, c, y, sigma) * (1 if positive else -1)
        np.testing.assert_allclose(loss, expected, rtol=1e-10, atol=1e-10)
        again = ours.compute_privacy_loss(scheme, y, sigma, c)
        np.testing.assert_array_equal(again, loss if positive else -loss)


@pytest.mark.parametrize("case", OF_PEER)
def test_losses_are_jax_privacys(case):
    """Up to two bands: its norms of the last columns, which are cut off, are in the wrong order."""
    scheme, strategy, c = CASES[case]
    if isinstance(scheme, BMinSep):
        c = c[:2]
    y = ours.generate_sample(scheme, 1.3, c, 5, True, 20)
    expected = peer.compute_privacy_loss(strategy, y, 1.3, c)
    np.testing.assert_allclose(
        ours.compute_privacy_loss(strategy, y, 1.3, c), expected, rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("case", CASES)
def test_samples_have_the_law_of_all_modes(case):
    scheme, strategy, c = CASES[case]
    y = ours.generate_sample(strategy, 1.0, c, 1, True, 40_000)
    means, weights = privacy_losses.modes(scheme, c)
    mean = means @ weights
    covariance = (means * weights) @ means.T - np.outer(mean, mean) + np.eye(scheme.iterations)
    np.testing.assert_allclose(y.mean(axis=1), mean, atol=0.04)
    np.testing.assert_allclose(np.cov(y), covariance, atol=0.06)


@pytest.mark.parametrize("case", [*OF_PEER, "cyclic"])
@pytest.mark.parametrize("positive", [True, False])
def test_losses_have_the_law_of_the_definition(case, positive):
    scheme, strategy, c = CASES[case]
    rng = np.random.default_rng(2)
    loss, _ = ours.get_privacy_loss_sample(strategy, 0.8, c, 3, positive, 20_000)
    expected = privacy_losses.draw(scheme, c, 0.8, positive, 20_000, rng)
    assert stats.ks_2samp(loss, expected).pvalue > 1e-3


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("case", ["bins", "min_sep"])
def test_losses_have_the_law_of_jax_privacys(case, positive):
    _, strategy, c = CASES[case][0], CASES[case][1], CASES[case][2][:2]
    loss, _ = ours.get_privacy_loss_sample(strategy, 0.8, c, 3, positive, 3000)
    expected, _ = peer.get_privacy_loss_sample(strategy, 0.8, c, 4, positive, 3000)
    assert stats.ks_2samp(loss, expected).pvalue > 1e-3


@pytest.mark.parametrize("sign", [0, 1])
def test_sums_have_the_law_of_jax_privacys(sign):
    """A longer run, with more steps than all modes could be written down for."""
    for strategy, c in (
        (batch_selection.BallsInBinsSampling(iterations=64, cycle_length=10), C),
        (batch_selection.BMinSepSampling(0.1, 64, 4), C[:2]),
    ):
        losses, _ = peer.get_privacy_loss_sample(strategy, 1.5, c, 5, sign == 0, 4000)
        epsilons = np.quantile(losses, [0.1, 0.3, 0.5, 0.7, 0.9])
        scheme = BallsInBins(64, 10) if hasattr(strategy, "cycle_length") else BMinSep(64, 4, 0.1)
        sums = ops.privacy_loss_sums(
            scheme, c, 1.5, epsilons, key=np.array([1, 2], np.uint32), num_samples=100_000
        )
        values = privacy_losses.excess(losses, epsilons[:, None])
        error = values.std(axis=1) / np.sqrt(4000) + 1e-3
        gap = np.abs(values.mean(axis=1) - sums.sums[sign, 0] / 100_000)
        np.testing.assert_array_less(gap, 5 * error)
        exceed = np.abs((losses > epsilons[:, None]).mean(axis=1) - sums.counts[sign, 0] / 100_000)
        np.testing.assert_array_less(exceed, 5 * 0.5 / np.sqrt(4000))


def test_shapes():
    _, strategy, c = CASES["bins"]
    loss, y = ours.get_privacy_loss_sample(strategy, 1.0, c, 0)
    assert isinstance(loss, float)
    assert y.shape == (8,)
    loss, y = ours.get_privacy_loss_sample(strategy, 1.0, c, 0, num_samples=1)
    assert loss.shape == (1,)
    assert y.shape == (8, 1)
    assert y.dtype == loss.dtype == np.float64
    again, _ = ours.get_privacy_loss_sample(strategy, 1.0, c, np.random.default_rng(0))
    assert again == loss[0]


def truncated(warm_start=True, size=3):
    return batch_selection.BMinSepSampling(
        0.5, 6, 2, warm_start=warm_start, truncated_batch_size=size
    )


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("warm_start", [True, False])
def test_truncated_batches(positive, warm_start):
    """Losses are jax_privacy's, sizes of batches and losses have the law of jax_privacy's."""
    strategy, c = truncated(warm_start), C[:2]
    arguments = (strategy, 1.0, c)
    loss, (y, aux) = ours.get_privacy_loss_sample(*arguments, 0, positive, 20_000, 10)
    assert y.shape == aux.shape == (6, 20_000)
    expected = peer.compute_privacy_loss(strategy, y[:, :500], 1.0, c, aux[:, :500])
    np.testing.assert_allclose(loss[:500], expected if positive else -expected, atol=1e-10)
    expected, (y_peer, aux_peer) = peer.get_privacy_loss_sample(*arguments, 1, positive, 20_000, 10)
    assert stats.ks_2samp(loss, expected).pvalue > 1e-3
    for row, row_peer in zip(y, y_peer, strict=True):
        assert stats.ks_2samp(row, row_peer).pvalue > 1e-4
    np.testing.assert_allclose(aux.mean(axis=1), aux_peer.mean(axis=1), atol=0.06)
    np.testing.assert_allclose(np.cov(aux), np.cov(aux_peer), atol=0.12)


def test_batches_that_never_overflow_are_not_truncated():
    strategy = truncated(size=10)
    loss, (y, aux) = ours.get_privacy_loss_sample(strategy, 1.0, C[:2], 0, True, 100, 10)
    assert aux.max() < 10
    plain = batch_selection.BMinSepSampling(0.5, 6, 2)
    np.testing.assert_allclose(loss, ours.compute_privacy_loss(plain, y, 1.0, C[:2]), atol=1e-12)


BINS, MIN_SEP = CASES["bins"][1], CASES["min_sep"][1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ours.generate_sample(BINS, -1.0, C), "noise_multiplier >= 0, found -1.0"),
        (lambda: ours.generate_sample(BINS, 1.0, -C), r"found c_col\[0\] = -1.0"),
        (lambda: ours.generate_sample(BINS, 1.0, C, dataset_size=9), "no dataset_size"),
        (lambda: ours.generate_sample(truncated(), 1.0, C[:2]), "expected dataset_size"),
        (lambda: ours.generate_sample(truncated(size=0), 1.0, C[:2], dataset_size=9), "size >= 1"),
        (lambda: ours.generate_sample(truncated(), 1.0, C[:2], dataset_size=0), "size >= 1"),
        (lambda: ours.generate_sample(MIN_SEP, 1.0, np.ones(5)), "at most min_sep=4 coefficients"),
        (lambda: ours.generate_sample(BINS, 1.0, C, num_samples=0), "num_samples >= 1"),
        (lambda: ours.generate_sample("bins", 1.0, C), "balls-in-bins, .* found a str"),
        (lambda: ours.compute_privacy_loss(BINS, np.zeros(8), 0.0, C), "noise_multiplier > 0"),
        (lambda: ours.compute_privacy_loss(BINS, np.zeros(7), 1.0, C), r"shape \[8\] .* \(7,\)"),
        (lambda: ours.compute_privacy_loss(BINS, np.zeros(8), 1.0, C, np.ones(8)), "expected aux"),
        (lambda: ours.compute_privacy_loss(truncated(), np.zeros(6), 1.0, C[:2]), "expected aux"),
        (
            lambda: ours.compute_privacy_loss(truncated(), np.zeros(6), 1.0, C[:2], np.ones(5)),
            "aux of the shape of sample",
        ),
        (
            lambda: ours.generate_sample(
                batch_selection.CyclicPoissonSampling(0.5, 8, cycle_length=4), 1.0, C
            ),
            "partition_type INDEPENDENT, found",
        ),
        (
            lambda: ours.generate_sample(
                batch_selection.CyclicPoissonSampling(0.5, 8, truncated_batch_size=4), 1.0, C[:1]
            ),
            "without truncated_batch_size",
        ),
        (
            lambda: monte_carlo.delta(truncated(), C[:2], noise_multiplier=1.0, epsilon=1.0),
            "without truncated batches, found truncated_batch_size=3",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_under_the_swap_defaults_are_the_installed_versions():
    """Since some version one sample is the default, and has an axis of its own."""
    from jax_privacy_kernels import _swap, installed

    def newer(strategy, noise_multiplier, c_col, seed=None, positive_sample=True, num_samples=1):
        """As there."""

    adapted = _swap._default_samples(ours.generate_sample, newer)
    assert adapted(BINS, 1.0, C, 0).shape == (8, 1)
    assert adapted(BINS, 1.0, C, 0, num_samples=2).shape == (8, 2)
    with installed():
        assert peer.generate_sample(BINS, 1.0, C, 0).shape == (8,)
        loss, y = peer.get_privacy_loss_sample(BINS, 1.0, C, 0, True, 3)
        assert loss.shape == (3,)
        np.testing.assert_array_equal(y, ours.generate_sample(BINS, 1.0, C, 0, True, 3))
        assert peer.compute_privacy_loss is ours.compute_privacy_loss
    assert peer.compute_privacy_loss is not ours.compute_privacy_loss
