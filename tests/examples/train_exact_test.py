"""The example of exact training runs, and both paths learn at one epsilon."""

from __future__ import annotations

import contextlib
import importlib
import io
import pathlib

import numpy as np
import pytest

for _module in ("sklearn", "matplotlib", "tqdm", "optax", "jax_privacy"):
    pytest.importorskip(_module, reason=f"{_module} is missing; install the examples extra")
dp_accounting = pytest.importorskip("dp_accounting", reason="dp-accounting is missing")


@pytest.fixture(scope="module")
def example():
    return importlib.import_module("train_exact")


@pytest.fixture(scope="module")
def run(example, tmp_path_factory) -> tuple[dict, pathlib.Path, str]:
    path = tmp_path_factory.mktemp("exact") / "accuracy.png"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        rows = example.main(["--quick", "--output", str(path)])
    return {row.path: row for row in rows}, path, printed.getvalue().replace(str(path), "")


def test_both_paths_learn_at_one_epsilon(run):
    rows, *_ = run
    assert set(rows) == {"float", "grid"}
    assert rows["float"].epsilon == rows["grid"].epsilon <= 4
    assert rows["float"].stddev == rows["grid"].stddev
    for row in rows.values():
        assert row.accuracies.shape == (1, len(row.steps))
        assert row.accuracies[:, -1].mean() > 0.15  # chance is 0.1, and these are two epochs
        assert row.step_seconds > 0
        assert row.noise_seconds > 0


def test_accounting_is_of_the_rounded_strategy(run, example):
    rows, *_ = run
    coefs = np.asarray(example.rounded_strategy(36), np.float64)
    # Two participations 36 steps apart meet columns of C that do not overlap.
    sensitivity = np.sqrt(2 * np.square(coefs).sum())
    multiplier = rows["grid"].stddev / sensitivity
    assert dp_accounting.get_epsilon_gaussian(multiplier, 1e-5) <= 4


def test_what_is_printed_fits(run):
    assert max(map(len, run[2].splitlines())) <= 80


def test_plot_is_written(run):
    assert run[1].read_bytes().startswith(b"\x89PNG")
