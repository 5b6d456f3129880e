"""The swap example runs end to end, and its two programs are one."""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
import types

import jax
import numpy as np
import pytest

for _module in ("sklearn", "matplotlib", "tqdm", "jax_privacy"):
    pytest.importorskip(_module, reason=f"{_module} is missing; install the examples extra")

STEPS = 12


@pytest.fixture(scope="module")
def example() -> types.ModuleType:
    return importlib.import_module("swap_in")


@pytest.fixture(scope="module")
def run(example, tmp_path_factory) -> tuple[list, pathlib.Path, list]:
    path = tmp_path_factory.mktemp("swap") / "swap.png"
    libraries = []
    train = example.train

    def spy(*args, **kwargs):
        for found in train(*args, **kwargs):
            privatizer = example.execution_plan.noise_addition.matrix_factorization_privatizer
            libraries.append(privatizer.__module__.split(".")[0])
            yield found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "train", spy)
        patch.setattr(example, "PAD_TO", 128)  # one size of batches, compiled once
        rows = example.main([f"--steps={STEPS}", "--bands=4", "--hidden=16", f"--output={path}"])
    return rows, path, libraries


def test_each_run_is_of_the_library_it_says(run):
    rows, _, libraries = run
    assert [(row.swapped, row.donated) for row in rows] == [
        (False, False),
        (True, False),
        (False, True),
        (True, True),
    ]
    assert libraries == 2 * (STEPS + 1) * ["jax_privacy", "jax_privacy_kernels"]


def test_all_runs_train_the_same(run, example):
    rows, _, _ = run
    start = example.init_params(16)
    moved = [
        np.abs(np.asarray(a) - np.asarray(b)).max()
        for a, b in zip(jax.tree.leaves(rows[0].params), jax.tree.leaves(start), strict=True)
    ]
    assert min(moved) > 1e-3
    for row in rows:
        assert len(row.losses) == len(row.step_times) == len(row.noise_times) == STEPS
        np.testing.assert_allclose(row.losses, rows[0].losses, rtol=1e-4)
        assert example.difference(rows[0], row) < 1e-4
        assert row.dp_event == rows[0].dp_event
        assert min(row.plan_seconds, *row.step_times, *row.noise_times) > 0


def test_difference_is_that_of_the_parameters(run, example):
    rows, _, _ = run
    (row,) = rows[:1]
    scaled = dataclasses.replace(row, params=jax.tree.map(lambda x: 1.5 * x, row.params))
    assert example.difference(row, scaled) == pytest.approx(0.5, rel=1e-5)


def test_table_and_plot(run, example):
    rows, path, _ = run
    header, _, *lines = example.format_table(rows).splitlines()
    assert "its noise" in header
    assert max(map(len, lines)) <= 80
    assert ["reference" in line for line in lines] == [True, False, False, False]
    assert ["swapped" in line for line in lines] == [row.swapped for row in rows]
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000
