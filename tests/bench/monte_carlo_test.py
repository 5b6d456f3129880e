"""The accounting benchmark runs, and its report is complete: times themselves are not checked."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
from support import benchmarks

bench = benchmarks.fixture("monte_carlo")
CASES = ("bins", "min_sep", "calibrate_bins")


@pytest.fixture(scope="module")
def run(bench, tmp_path_factory) -> tuple[dict, pathlib.Path]:
    folder = tmp_path_factory.mktemp("monte_carlo")
    bench.main(["--quick", "--output-dir", str(folder), "--cases", *CASES])
    (path,) = folder.glob("monte_carlo-*.json")
    return json.loads(path.read_text()), path


def test_report_is_complete_and_finite(run, bench):
    report, _ = run
    benchmarks.check_report(report)
    assert tuple(row["case"] for row in report["rows"]) == CASES
    for row in report["rows"]:
        assert set(row["implementations"]) == set(bench.CASES[row["case"]].samples)
    assert set(report["rows"][0]["speedup"]) == {"jax", "cpp"}
    assert report["rows"][2]["samples"]["cpp"] > 100
    # Tiny sizes have no floors.
    assert report["acceptance"] == []


def test_floors(bench):
    """What is asked for stands in the report, whether it holds or not."""
    rows = [
        {
            "case": name,
            "n": bench.CASES[name].scheme.iterations,
            "speedup": {"cpp": 100.0},
            "us_per_sample": {"cpp": 0.2},
            "processor_us_per_sample": {"cpp": 0.4},
            "implementations": {"cpp": {"median_s": 61.0}},
            "more_bytes": 10**6,
        }
        for name in bench.CASES
    ]
    floors = {check["floor"]: check["pass"] for check in bench.acceptance(rows)}
    assert floors == {
        "bins: cpp, times peer per sample": False,
        "min_sep: cpp, times peer per sample": True,
        "calibrate_bins: cpp, seconds": False,
        "calibrate_bins: bytes": True,
        "calibrate_min_sep: cpp, seconds": True,
        "calibrate_min_sep: bytes": True,
        "bins_long: cpp, processor time, times bins": True,
    }


def test_contestants_find_the_same(bench):
    case = bench.CASES["bins"].smaller()
    samples = {"peer": 2000, "jax": 20_000, "cpp": 20_000}
    case = bench.dataclasses.replace(case, samples=samples)
    found = {name: np.array(call()) for name, call in bench.contestants(case).items()}
    np.testing.assert_allclose(found["jax"], found["cpp"], rtol=1e-9)
    np.testing.assert_allclose(found["peer"], found["cpp"] / 20_000, rtol=0.35)


def test_text_and_plot(run, bench):
    report, path = run
    lines = bench.describe(report).splitlines()
    for name in CASES:
        assert any(line.startswith(f"{name} ") for line in lines)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
