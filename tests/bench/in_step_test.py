"""The benchmark of steps runs, and its report is complete: the numbers are not checked."""

from __future__ import annotations

import json
import pathlib

import jax
import numpy as np
import pytest
from support import benchmarks

bench = benchmarks.fixture("in_step")


@pytest.fixture(scope="module")
def run(bench, tmp_path_factory) -> tuple[dict, pathlib.Path]:
    folder = tmp_path_factory.mktemp("in_step")
    options = ["--quick", "--cases", "one", "small", "--bands", "3"]
    bench.main([*options, "--output-dir", str(folder)])
    (path,) = folder.glob("in_step-*.json")
    return json.loads(path.read_text()), path


def test_report_is_complete(run, bench):
    report, path = run
    assert [(row["case"], row["bands"]) for row in report["rows"]] == [("one", 3), ("small", 3)]
    for row in report["rows"]:
        assert set(row["implementations"]) == set(bench.NAMES)
        assert min(benchmarks.numbers(row["implementations"])) > 0
        assert set(row["marginal_s"]) == {"peer", "jax", "cpp"}
    assert report["acceptance"] == []
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_noise_of_the_kernel_takes_no_temporary_memory(bench):
    """It lies where the gradients are. XLA needs some words."""
    case = bench.CASES["one"]
    trainers = {n: bench.Trainer(n, case, case.shapes(100_000), 3) for n in ("none", "cpp")}
    more = trainers["cpp"].temporary_bytes - trainers["none"].temporary_bytes
    assert more < 10_000


def test_noise_is_that_of_the_peer(bench):
    """All train the same model, but for the one without noise."""
    case = bench.CASES["one"]
    trainers = {n: bench.Trainer(n, case, case.shapes(1_000), 3) for n in bench.NAMES}
    for _ in range(3):
        params = {n: np.asarray(jax.tree.leaves(t())[0]) for n, t in trainers.items()}
    np.testing.assert_allclose(params["cpp"], params["peer"], atol=1e-5)
    np.testing.assert_allclose(params["jax"], params["peer"], atol=1e-5)
    assert np.abs(params["none"] - params["peer"]).max() > 1e-4


def test_floors(bench):
    """A verdict for each row that was measured; tiny sizes have none."""

    def row(case, bands, seconds, temporary):
        return {
            "case": case,
            "bands": bands,
            "parameters": 100,
            "marginal_s": {"peer": 40.0, "cpp": seconds},
            "marginal_speedup": {"cpp": 40.0 / seconds},
            "temporary_bytes": {"none": 400, "cpp": temporary},
        }

    one = row("one", 8, 2.0, 400)
    assert [c["pass"] for c in bench.acceptance([one])] == [True, True]
    assert [c["pass"] for c in bench.acceptance([row("one", 8, 2.1, 800)])] == [False, False]
    both = bench.acceptance([one, row("transformer", 8, 2.4, 400)])
    assert [c["pass"] for c in both] == [True, True, False, True]
