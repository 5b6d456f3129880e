"""The attack of the example wins against floats and not against the grid."""

from __future__ import annotations

import importlib
import pathlib

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is missing; install the examples extra")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[list, pathlib.Path]:
    path = tmp_path_factory.mktemp("attack") / "attack.png"
    rows = importlib.import_module("attack").main(["--coordinates", "5000", "--output", str(path)])
    return rows, path


def test_floats_tell_gradients_apart(run):
    true, *others = run[0]
    assert true.difference == 0
    assert true.possible["float"] == 1
    for row in others:
        assert row.identified["float"]
        assert row.possible["float"] < 0.5


def test_the_grid_does_not(run):
    for row in run[0]:
        assert row.possible["grid"] == 1
        assert not row.identified["grid"]


def test_plot_is_written(run):
    assert run[1].read_bytes().startswith(b"\x89PNG")
