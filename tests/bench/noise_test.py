"""The noise benchmark runs, and its report is complete: the numbers themselves are not checked."""

from __future__ import annotations

import importlib
import json
import math
import pathlib
from typing import Any

import pytest

from jax_privacy_kernels.ops import _cpp

for _module in ("matplotlib", "jax_privacy"):
    pytest.importorskip(_module, reason=f"{_module} is missing; install the bench extra")
if _cpp.unavailable():
    pytest.skip("the compiled extension is missing", allow_module_level=True)

BENCH = pathlib.Path(__file__).parents[2] / "bench"
NAMES = ("peer", "jax", "cpp")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Any, dict, pathlib.Path]:
    folder = tmp_path_factory.mktemp("noise")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))  # The scripts find the harness beside them.
        noise = importlib.import_module("noise")
    noise.main(["--quick", "--output-dir", str(folder)])
    (path,) = folder.glob("noise-*.json")
    return noise, json.loads(path.read_text()), path


def _numbers(tree: Any) -> list[float]:
    if isinstance(tree, dict | list):
        return [n for v in (tree.values() if isinstance(tree, dict) else tree) for n in _numbers(v)]
    return [tree] if isinstance(tree, int | float) else []


def test_report_is_complete_and_finite(run):
    noise, report, _ = run
    assert all(map(math.isfinite, _numbers(report)))
    assert {(row["case"], row["bands"]) for row in report["rows"]} == {
        (name, min(bands, 3)) for name, case in noise.CASES.items() for bands in case.bands
    }
    for row in report["rows"]:
        assert set(row["implementations"]) == set(NAMES)
        for times in row["implementations"].values():
            assert 0 < times["min_s"] <= times["median_s"] <= times["p90_s"] <= times["max_s"]
            assert times["first_call_s"] > 0
            assert times["rounds"] > 0
        assert min(_numbers(row["cpp"])) > 0
        assert min(_numbers(row["bounds"])) > 0
    assert report["limits"]["copy_bytes_per_s"] > 0
    assert set(report["limits"]["samples_per_s"]) == {"float32", "float64"}
    assert min(_numbers(report["limits"])) > 0
    assert all(report["environment"].values())


def test_implementations_agree(run):
    tolerance = {"float32": 1e-4, "float64": 1e-12, "bfloat16": 0.1}
    for row in run[1]["rows"]:
        for difference in row["max_difference"].values():
            assert difference < tolerance[row["dtype"]], row["case"]


def test_acceptance_has_verdicts(run):
    checks = run[1]["acceptance"]
    assert checks  # The floors at few bands: the quick run has no others.
    assert all(isinstance(check["pass"], bool) for check in checks)


def test_plot_is_written(run):
    assert run[2].with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("bands", "expected"), [(1, 8 * 1000), (2, 16 * 1000), (64, (8 + 12 - 4 / 63) * 1000)]
)
def test_traffic_model(run, bands, expected):
    assert run[0].bytes_per_step((1000, 4, 4), bands) == pytest.approx(expected)
