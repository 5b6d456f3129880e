"""The accounting example runs end to end, and its numbers survive other ways to them."""

from __future__ import annotations

import importlib
import math
import pathlib
import types

import numpy as np
import pytest

for _module in ("matplotlib", "tqdm", "dp_accounting"):
    pytest.importorskip(_module, reason=f"{_module} is missing; install the examples extra")

ARGUMENTS = ["--examples=200", "--batch=10", "--epochs=2", "--delta=0.02"]
EPSILONS, BANDS = (1.0, 4.0), (1, 5)


@pytest.fixture(scope="module")
def example() -> types.ModuleType:
    return importlib.import_module("amplified_accounting")


@pytest.fixture(scope="module")
def run(example, tmp_path_factory) -> tuple[list, pathlib.Path]:
    path = tmp_path_factory.mktemp("accounting") / "accounting.png"
    epsilons, bands = ([f"{x:g}" for x in values] for values in (EPSILONS, BANDS))
    arguments = [*ARGUMENTS, "--epsilon", *epsilons, "--bands", *bands, f"--output={path}"]
    return example.main(arguments), path


def test_every_method_is_there(run, example):
    found = [(c.epsilon, c.bands, c.method) for c in run[0]]
    assert found == [(e, b, m) for e in EPSILONS for b in BANDS for m in example.METHODS]


def test_noise_without_amplification_is_gaussian(run, example):
    import dp_accounting

    for cell in run[0]:
        if cell.method == "none":
            # Two participations of a column of norm 1 each.
            spent = dp_accounting.get_epsilon_gaussian(cell.noise / math.sqrt(2), 0.02)
            assert spent == pytest.approx(cell.epsilon, rel=1e-3)


def test_amplification_saves_noise(run):
    noise = {(c.method, c.epsilon, c.bands): c.noise for c in run[0]}
    for epsilon in EPSILONS:
        for b in BANDS:
            least = noise["none", epsilon, b]
            for method in ("bins", "min-sep"):
                assert noise[method, epsilon, b] < least
        # One band: b-min-sep is Poisson sampling, and the two accountants agree, up to the base
        # delta of one half and the step of its sweep.
        ratio = noise["min-sep", epsilon, 1] / noise["Poisson", epsilon, 1]
        assert 0.99 < ratio < 1.3


def test_the_guarantee_covers_every_calibration_of_the_table(example, monkeypatch):
    """The best of the table is taken."""
    training, epsilons, bands, _ = example.parse_args(
        [*ARGUMENTS, "--epsilon", "1", "2", "1", "--bands", "1", "5", "2"]
    )
    assert (epsilons, bands) == ([1.0, 2.0], [1, 2, 5])
    calls = []
    found = types.SimpleNamespace(noise_multiplier=1.0)
    monkeypatch.setattr(
        example.monte_carlo, "calibrate", lambda *_, **keywords: calls.append(keywords) or found
    )
    for epsilon in epsilons:
        for b in bands:
            for method in ("bins", "min-sep"):
                example.noise(training, method, epsilon, np.ones(b))
    assert [call["calibrations"] for call in calls] == [len(calls)] * len(calls)


def test_error_is_that_of_the_matrices(run, example):
    training = example.Training(200, 10, 2, 0.02, 0)
    n = training.steps
    for cell in run[0]:
        coef, _ = example.plan(training, cell.bands)
        assert np.linalg.norm(coef) == pytest.approx(1)
        lags = np.subtract.outer(np.arange(n), np.arange(n))
        C = np.where(lags >= 0, np.concatenate([coef, np.zeros(n)])[np.maximum(lags, 0)], 0)
        B = np.tri(n) @ np.linalg.inv(C)
        expected = cell.noise * np.sqrt(np.mean(np.linalg.norm(B, axis=1) ** 2)) / 10
        assert cell.error == pytest.approx(expected, rel=1e-4)


def test_table_fits_and_marks_the_best(run, example):
    cells, _ = run
    lines = example.format_table(cells).splitlines()
    assert max(map(len, lines)) <= 80
    rows = lines[3:-1]
    assert len(rows) == len(EPSILONS) * len(BANDS)
    assert sum(line.count("*") for line in rows) == len(EPSILONS)
    for epsilon in EPSILONS:
        least = min((c for c in cells if c.epsilon == epsilon), key=lambda c: c.error)
        assert any(f"{least.noise:.3f}*" in line for line in rows)


def test_advice_names_the_best(run, example):
    text = example.advice(run[0])
    assert max(map(len, text.splitlines())) <= 80
    for epsilon in EPSILONS:
        cells = [c for c in run[0] if c.epsilon == epsilon]
        least = min(cells, key=lambda c: c.error)
        line = next(x for x in text.splitlines() if x.startswith(f"epsilon {epsilon:g}: "))
        assert example.NAMES[least.method] in line
        assert f"{least.bands} bands" in line


def test_plot_is_written(run):
    assert run[1].read_bytes().startswith(b"\x89PNG")
