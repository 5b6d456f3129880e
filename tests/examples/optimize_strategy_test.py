"""The strategy example runs end to end, and its errors survive dense arithmetic."""

from __future__ import annotations

import importlib
import math
import pathlib
import types

import numpy as np
import pytest

for _module in ("matplotlib", "tqdm"):
    pytest.importorskip(_module, reason=f"{_module} is missing; install the examples extra")

N, EPOCHS, MIN_SEP = 60, 3, 20


@pytest.fixture(scope="module")
def example() -> types.ModuleType:
    return importlib.import_module("optimize_strategy")


@pytest.fixture(scope="module")
def run(example, tmp_path_factory) -> tuple[list, pathlib.Path]:
    path = tmp_path_factory.mktemp("strategies") / "strategies.png"
    return example.main([f"--n={N}", f"--epochs={EPOCHS}", f"--output={path}"]), path


def _matrix(coef: np.ndarray) -> np.ndarray:
    lags = np.subtract.outer(np.arange(N), np.arange(N))
    return np.where(lags >= 0, coef[lags], 0.0)


def test_every_kind_is_there_with_every_band_count(run, example):
    counts = example.band_counts(MIN_SEP)
    planned = {(row.kind, row.bands) for row in run[0]}
    kinds = (example.BANDED, example.INVERSE_ROOT, example.INVERSE)
    assert planned == {(example.IDENTITY, 1), (example.SQUARE_ROOT, N)} | {
        (kind, b) for kind in kinds for b in counts
    }
    assert len(run[0]) == len(planned)


@pytest.mark.parametrize(
    ("most", "expected"), [(1, [1]), (2, [2]), (8, [4, 8]), (20, [4, 20]), (200, [4, 16, 64, 200])]
)
def test_band_counts(example, most, expected):
    assert example.band_counts(most) == expected


def test_independent_noise_has_its_closed_form(run, example):
    (row,) = (row for row in run[0] if row.kind == example.IDENTITY)
    assert row.sensitivity == pytest.approx(math.sqrt(EPOCHS))
    assert row.rms_error == pytest.approx(math.sqrt(np.arange(1, N + 1).mean() * EPOCHS))
    assert row.max_error == pytest.approx(math.sqrt(N * EPOCHS))
    assert row.models == 0


def test_errors_are_those_of_the_matrices(run):
    """Builds C, and inverts it, rather than trust the recurrences."""
    for row in run[0]:
        C = _matrix(row.strategy)
        B = np.tri(N) @ np.linalg.inv(C)
        expected = np.linalg.norm(B, axis=1) * row.sensitivity
        np.testing.assert_allclose(row.errors, expected, rtol=1e-4)
        assert row.rms_error == pytest.approx(math.sqrt((expected**2).mean()), rel=1e-4)
        assert row.max_error == pytest.approx(expected[-1], rel=1e-4)


def test_sensitivity_is_that_of_the_worst_example(run):
    exact = 0
    for row in run[0]:
        C = _matrix(row.strategy)
        # Fixed epochs and single steps late: every first step, every separation, every count.
        worst = max(
            np.linalg.norm(np.abs(C[:, first : first + k * sep : sep]).sum(axis=1))
            for first in range(N)
            for sep in range(MIN_SEP, N + 1)
            for k in range(1, EPOCHS + 1)
        )
        if np.all(np.diff(row.strategy) <= 0) and row.strategy[-1] >= 0:
            assert row.sensitivity == pytest.approx(worst, rel=1e-4)
            exact += 1
        else:
            assert row.sensitivity >= worst * (1 - 1e-5)
    assert exact > len(run[0]) // 2


def test_optimizing_pays(run, example):
    found = {(row.kind, row.bands): row for row in run[0]}
    for b in example.band_counts(MIN_SEP):
        optimized = found[example.INVERSE, b].rms_error
        assert optimized <= found[example.INVERSE_ROOT, b].rms_error * (1 + 1e-6)
        assert found[example.BANDED, b].rms_error < found[example.IDENTITY, 1].rms_error


def test_table_is_sorted_and_marks_the_winner(run, example):
    rows, _ = run
    assert [row.rms_error for row in rows] == sorted(row.rms_error for row in rows)
    header, _, *lines, _ = example.format_table(rows).splitlines()
    assert "rms error" in header
    assert max(map(len, lines)) <= 80
    assert len(lines) == len(rows)
    assert [line.endswith("*") for line in lines] == [True] + [False] * (len(rows) - 1)
    assert all(line.startswith(row.kind) for line, row in zip(lines, rows, strict=True))
    # Marked even if it does not come first.
    assert example.format_table(rows[::-1]).splitlines()[-2].endswith("*")


def test_plot_is_written(run):
    _, path = run
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


@pytest.mark.parametrize("arguments", [["--n=1", "--epochs=1"], ["--n=5", "--epochs=5"]])
def test_smallest_sizes(example, tmp_path, arguments):
    rows = example.main([*arguments, f"--output={tmp_path / 'small.png'}"])
    assert all(math.isfinite(row.max_error) for row in rows)
