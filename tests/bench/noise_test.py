"""The noise benchmark runs, and its report is complete: the numbers themselves are not checked."""

from __future__ import annotations

import json
import pathlib

import pytest
from support import benchmarks

bench = benchmarks.fixture("noise")


FEW = "bands", "float64", "by_row", "buffers", "dense"


@pytest.fixture(
    scope="module",
    params=[FEW, pytest.param(None, marks=pytest.mark.nightly)],
    ids=["few cases", "all cases"],
)
def run(request, bench, tmp_path_factory) -> tuple[dict, pathlib.Path]:
    folder = tmp_path_factory.mktemp("noise")
    some = ["--cases", *request.param] if request.param else []
    bench.main(["--quick", "--output-dir", str(folder), *some])
    (path,) = folder.glob("noise-*.json")
    return json.loads(path.read_text()), path


def test_report_is_complete_and_finite(run, bench, request):
    report, _ = run
    benchmarks.check_report(report)
    cases = FEW if "few cases" in request.node.name else bench.CASES
    assert {(row["case"], row["bands"]) for row in report["rows"]} == {
        (name, min(bands, 3)) for name in cases for bands in bench.CASES[name].bands
    }
    for row in report["rows"]:
        case = bench.CASES[row["case"]]
        plain = set() if case.exact else {"jax"}
        assert set(row["implementations"]) == {"cpp"} | plain | (
            {"peer"} if case.mechanism.peer else set()
        )
        assert min(benchmarks.numbers(row["cpp"])) > 0
        assert min(benchmarks.numbers(row["bounds"])) > 0
    assert report["limits"]["copy_bytes_per_s"] > 0
    assert set(report["limits"]["samples_per_s"]) == {"float32", "float64"}
    assert min(benchmarks.numbers(report["limits"])) > 0


def test_implementations_agree(run):
    tolerance = {"float32": 1e-4, "float64": 1e-12, "bfloat16": 0.1}
    for row in run[0]["rows"]:
        for difference in row["max_difference"].values():
            assert difference < tolerance[row["dtype"]], row["case"]


def test_floors(run, bench):
    """Tiny sizes have none; of the measurements on record, each has a verdict."""
    assert run[0]["acceptance"] == []
    path = bench.harness.RESULTS / "noise-2026-11-22.json"
    rows = json.loads(path.read_text())["rows"]
    verdicts = {check["floor"]: check["pass"] for check in bench.acceptance(rows)}
    assert verdicts["bands: cpp at 32 bands, times peer"] is True
    for row in rows:
        row["speedup"] = dict.fromkeys(row["speedup"], 0.5)
    slow = [check["pass"] for check in bench.acceptance(rows) if "peer" in check["floor"]]
    assert slow
    assert not any(slow)


def test_quick_runs_overwrite_nothing(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.harness, "RESULTS", tmp_path)
    bench.main(["--quick", "--cases", "bands", "--bands", "2", "--repeats", "1"])
    assert list(tmp_path.iterdir()) == []


def test_plot_is_written(run):
    assert run[1].with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("case", "bands", "expected"),
    [
        ("bands", 1, 8),
        ("bands", 2, 16),
        ("bands", 64, 8 + 12 - 4 / 63),
        ("by_row", 32, 8 + 12 - 4 / 31),
        ("inverse", 2, 12),
        ("buffers", 4, 8 + 32),
        ("dense", 64, 8),
    ],
)
def test_traffic_model(bench, case, bands, expected):
    passes = bench.CASES[case].mechanism.slot_passes(bands)
    assert bench.bytes_per_step((1000, 4, 4), passes) == pytest.approx(1000 * expected)
