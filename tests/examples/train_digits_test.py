"""The digits example runs end to end, and its accounting survives independent arithmetic."""

from __future__ import annotations

import importlib
import math
import pathlib
import types

import numpy as np
import pytest

for _module in ("sklearn", "matplotlib", "tqdm", "optax", "jax_privacy"):
    pytest.importorskip(_module, reason=f"{_module} is missing; install the examples extra")
dp_accounting = pytest.importorskip("dp_accounting", reason="dp-accounting is missing")

EPSILON, DELTA = 4.0, 1e-5


@pytest.fixture(scope="module")
def example() -> types.ModuleType:
    return importlib.import_module("train_digits")


@pytest.fixture(scope="module")
def run(example, tmp_path_factory) -> tuple[dict, pathlib.Path]:
    path = tmp_path_factory.mktemp("digits") / "accuracy.png"
    rows = example.main(["--quick", "--epsilon", "4", "--delta", "1e-5", "--output", str(path)])
    return {row.mechanism: row for row in rows}, path


def test_rows_are_complete_and_finite(run):
    rows, _ = run
    assert set(rows) == {"bandmf", "independent", "non-private"}
    for row in rows.values():
        assert row.accuracies.shape == (1, len(row.steps))
        assert np.all((row.accuracies >= 0) & (row.accuracies <= 1))
        assert row.accuracy_mean > 0.15  # Above chance, which is 0.1, after two epochs.
        assert math.isfinite(row.accuracy_std)
    for name in ("bandmf", "independent"):
        row = rows[name]
        assert all(map(math.isfinite, (row.epsilon, row.delta, row.sensitivity, row.stddev)))
        assert row.noise_seconds["jax"] > 0
        assert row.noise_seconds["cpp"] is None or row.noise_seconds["cpp"] > 0


def test_epsilon_is_within_its_target(run, example):
    rows, _ = run
    for name in ("bandmf", "independent"):
        row = rows[name]
        assert row.delta == DELTA
        assert row.epsilon <= EPSILON
        # The closed form for one Gaussian mechanism, which no search or discretization has touched.
        multiplier = row.stddev / (row.sensitivity * example.CLIP_NORM)
        exact = dp_accounting.get_epsilon_gaussian(multiplier, DELTA)
        assert exact <= EPSILON
        assert row.epsilon == pytest.approx(exact, rel=1e-3)
    assert rows["non-private"].epsilon == math.inf


def test_noise_differs_only_by_sensitivity(run):
    rows, _ = run
    bandmf, independent = rows["bandmf"], rows["independent"]
    assert bandmf.stddev / independent.stddev == pytest.approx(
        bandmf.sensitivity / independent.sensitivity
    )


def test_sensitivity_is_that_of_the_worst_example(run, example):
    """Builds C and walks through the steps of every example, rather than trust the formula."""
    rows, _ = run
    for name in ("bandmf", "independent"):
        row = rows[name]
        n = row.steps[-1]
        coefs = np.zeros(n)
        coefs[: row.bands] = example.strategy_coefs(row.bands)
        lags = np.subtract.outer(np.arange(n), np.arange(n))
        strategy = np.where(lags >= 0, coefs[lags], 0.0)
        steps_per_epoch = n // 2  # --quick runs two epochs.
        worst = max(
            np.linalg.norm(strategy[:, first::steps_per_epoch].sum(axis=1))
            for first in range(steps_per_epoch)
        )
        assert row.sensitivity == pytest.approx(worst, rel=1e-5)


def test_batches_partition_the_examples(example):
    data = example.load_data(batch_size=40)
    assert data.labels.shape == (36, 40)
    flat = np.asarray(data.images).reshape(1440, -1)
    everything = (example.load_digits().data / 16.0).astype(np.float32)
    held_out = np.asarray(data.test_images)
    # Together they are the dataset, each example once.
    both = np.concatenate([flat, held_out])
    assert np.array_equal(np.sort(both.sum(axis=1)), np.sort(everything.sum(axis=1)))


def test_table_fits(run, example):
    lines = example.format_table(list(run[0].values())).splitlines()
    assert len(lines) == 6
    assert max(map(len, lines)) <= 80


def test_plot_is_written(run):
    _, path = run
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000
