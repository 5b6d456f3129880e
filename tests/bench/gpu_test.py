"""The GPU benchmark runs to its end, here on what there is: the numbers are not checked."""

from __future__ import annotations

import json
import pathlib
import re

import jax
import pytest
from support import benchmarks

bench = benchmarks.fixture("gpu")


@pytest.fixture(scope="module")
def run(bench, tmp_path_factory) -> tuple[dict, pathlib.Path]:
    folder = tmp_path_factory.mktemp("gpu")
    bench.main(["--quick", "--output-dir", str(folder)])
    (path,) = folder.glob("gpu-*.json")
    return json.loads(path.read_text()), path


def test_report_is_complete_and_finite(run, bench):
    report, _ = run
    benchmarks.check_report(report)
    expected = {(d, bands) for rows in bench.QUICK.values() for d, bands in rows}
    assert {(row["parameters"], row["bands"]) for row in report["rows"]} == expected
    for row in report["rows"]:
        assert set(row["implementations"]) == set(bench.contestants()) >= {"peer", "jax"}
        assert not row["missing"]
        assert min(benchmarks.numbers([row["use"], row["bounds"]])) > 0
        assert row["bytes_per_step"] == row["parameters"] * {1: 8, 3: 18}[row["bands"]]
    assert min(benchmarks.numbers(report["limits"])) > 0


def test_implementations_agree(run):
    for row in run[0]["rows"]:
        assert max(row["max_difference"].values()) < 1e-4


def test_plot_is_written(run):
    assert run[1].with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def out_of_memory(*_):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: there is no more")


@pytest.mark.parametrize(("seconds", "reason"), [("420", "out of memory"), ("0", "no time left")])
def test_what_cannot_be_measured_is_left_out(bench, monkeypatch, tmp_path, capsys, seconds, reason):
    monkeypatch.setattr(bench.noise, "runner", out_of_memory)
    options = ["--cases", "sizes", "--seconds", seconds, "--output-dir", str(tmp_path)]
    bench.main(["--quick", *options])
    (row,) = json.loads(next(tmp_path.glob("gpu-*.json")).read_text())["rows"]
    assert row["missing"] == dict.fromkeys(bench.contestants(), reason)
    assert capsys.readouterr().out.count(reason) == len(bench.contestants())


def test_without_a_gpu(bench, monkeypatch, capsys):
    monkeypatch.setattr(bench.jax, "default_backend", lambda: "cpu")
    with pytest.raises(SystemExit):
        bench.main([])
    assert re.search(r"expected a GPU, found \[.+\]; --quick", capsys.readouterr().err)


def test_floors_are_those_of_the_largest_size(bench):
    def row(bands, milliseconds):
        times = {name: {"median_s": ms / 1e3} for name, ms in milliseconds.items()}
        size = bench.LARGE
        result = {
            "parameters": size,
            "bands": bands,
            "bytes_per_step": 20.0 * size,
            "implementations": times,
            "missing": {} if "peer" in times else {"peer": "out of memory"},
            "speedup": bench.harness.speedups(times, "median_s"),
        }
        bench.relate(result, {"copy_bytes_per_s": 4e12, "samples_per_s": 1e12})
        return result

    rows = [
        row(1, {"peer": 3.0, "triton": 2.0}),
        row(8, {"peer": 9.0, "triton": 2.0}),
        row(32, {"peer": 15.0, "triton": 2.0}),
        row(64, {"triton": 4.0}),
    ]
    checks = bench.acceptance(rows)
    verdicts = {check["floor"]: check["pass"] for check in checks}
    assert verdicts["triton at 8 bands, times peer"]
    assert not verdicts["triton at 32 bands, times peer"]
    assert not verdicts["triton time at 64 bands over 8"]
    assert verdicts["triton at 8 bands, of the machine's limit"]
    assert not verdicts["triton at 64 bands, of the machine's limit"]
    assert not any("pallas" in floor for floor in verdicts)  # it was no contestant

    # What was not measured is there, and does not pass.
    checks = bench.acceptance([row(1, {"peer": 3.0, "triton": 2.0}), row(8, {"triton": 2.0})])
    missing = [check for check in checks if check["value"] is None]
    assert not any(check["pass"] for check in missing)
    names = {check["floor"] for check in missing}
    assert {"triton at 8 bands, times peer", "triton time at 64 bands over 8"} < names
    assert {check["floor"] for check in checks} == set(verdicts) | names
    text = bench.harness.text({"acceptance": checks, "environment": {}})
    assert text.count("not measured") == len(missing)
