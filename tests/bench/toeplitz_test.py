"""The Toeplitz benchmark runs, and its report is complete: times themselves are not checked."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import numpy as np
import pytest
from support import benchmarks

# One of each function, of each dtype and of each selection of contestants.
CASES = (
    "multiply",
    "multiply_large",
    "inverse",
    "solve",
    "min_sep_float64",
    "gram_limited_large",
    "error",
    "error_grad_float64",
)

bench = benchmarks.fixture("toeplitz")


@pytest.fixture(scope="module")
def run(bench, tmp_path_factory) -> tuple[dict, pathlib.Path]:
    folder = tmp_path_factory.mktemp("toeplitz")
    bench.main(["--quick", "--repeats", "2", "--output-dir", str(folder), "--cases", *CASES])
    (path,) = folder.glob("toeplitz-*.json")
    return json.loads(path.read_text()), path


def test_report_is_complete_and_finite(run, bench):
    report, _ = run
    benchmarks.check_report(report)
    assert tuple(row["case"] for row in report["rows"]) == CASES
    for row in report["rows"]:
        names = set(bench.CASES[row["case"]].repeats)
        assert set(row["implementations"]) == names
        for times in row["implementations"].values():
            assert times["rounds"] == 2
        compared = names - {"peer"} if "peer" in names else set()
        assert set(row["speedup"]) == set(row["first_call_speedup"]) == compared
        products = row["function"] in ("multiply", "inverse", "solve")
        assert set(row["multiply_adds_per_s"]) == (names if products else set())
    assert report["acceptance"] == []  # There are no floors for tiny sizes.


def test_results_agree(run):
    tolerance = {"float32": 1e-5, "float64": 1e-11}
    for row in run[0]["rows"]:
        assert row["max_relative_difference"]
        for difference in row["max_relative_difference"].values():
            assert difference < tolerance[row["dtype"]], row["case"]


def test_peer_or_the_exact_result_is_the_reference(run):
    references = {row["case"]: row["reference"] for row in run[0]["rows"]}
    assert references["multiply"] == "peer"
    assert references["multiply_large"] == "exact"
    assert references["gram_limited_large"] == "jax"


def test_text_shows_every_case(run, bench):
    report, _ = run
    lines = bench.describe(report).splitlines()
    for name in CASES:
        assert any(line.startswith(f"{name} ") for line in lines)


def test_plot_is_written(run):
    assert run[1].with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("n", "bands"), [(1, 1), (7, 3), (7, 7), (64, 1)])
def test_multiply_adds(bench, n, bands):
    terms = sum(1 for i in range(n) for j in range(i + 1) if i - j < bands)
    assert bench.multiply_adds(bench.Case("solve", n, bands)) == terms
    assert bench.multiply_adds(bench.Case("error", n, bands)) is None


def test_difference_is_relative_to_the_largest_number(bench):
    a, b = (np.array([0.0, 8.0]), 1.0), (np.array([2.0, 8.0]), 1.0)
    assert bench.algebra.difference(a, b) == 0.25
    assert bench.algebra.difference(b, b) == 0
    assert math.isnan(bench.algebra.difference(np.array([1.0, np.nan]), np.ones(2)))


def test_acceptance_at_full_size(bench):
    def row(name: str, value: float) -> dict[str, Any]:
        case = bench.CASES[name]
        return {
            "case": name,
            "n": case.n,
            "speedup": {"cpp": value},
            "first_call_speedup": {"cpp": value},
            "implementations": {n: {"median_s": value} for n in case.repeats},
        }

    for value, passes in ((50.0, True), (0.5, False)):
        checks = bench.acceptance([row("inverse", value), row("error", value)])
        assert [check["pass"] for check in checks] == [passes] * 3
    checks = bench.acceptance([row("multiply_large", 1.0), row("multiply_large", 6.0)])
    assert [check["pass"] for check in checks] == [True, False]
    # The first call of every case that the peer takes part in has its floor.
    everything = bench.acceptance([row(name, 1.0) for name in bench.CASES])
    firsts = [check for check in everything if "first call" in check["floor"]]
    assert len(firsts) == sum("peer" in case.repeats for case in bench.CASES.values())


def test_interleave_counts_calls(bench):
    calls = {"often": 0, "seldom": 0, "once": 0}

    def counter(name: str) -> Any:
        def call() -> None:
            calls[name] += 1

        return call

    times = bench.harness.interleave(
        {name: counter(name) for name in calls},
        warmup=2,
        repeats={"often": 5, "seldom": 2, "once": 0},
    )
    assert calls == {"often": 7, "seldom": 4, "once": 1}
    assert {name: t["rounds"] for name, t in times.items()} == {"often": 5, "seldom": 2, "once": 1}
    assert times["once"]["median_s"] == times["once"]["first_call_s"]
