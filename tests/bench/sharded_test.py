"""The benchmark of many devices runs: measured numbers are not checked."""

from __future__ import annotations

import json
import pathlib

import pytest
from support import benchmarks

DOCS = pathlib.Path(__file__).parents[2] / "docs"

bench = benchmarks.fixture("sharded")


@pytest.fixture(scope="module")
def run(bench, tmp_path_factory) -> tuple[dict, pathlib.Path]:
    folder = tmp_path_factory.mktemp("sharded")
    bench.main(["--quick", "--output-dir", str(folder)])
    (path,) = folder.glob("sharded-*.json")
    return json.loads(path.read_text()), path


@pytest.mark.subprocess
def test_report_is_complete_and_finite(run, bench):
    report, _ = run
    benchmarks.check_report(report)
    expected = {(name, 3, 2) for name in bench.CASES}
    assert {(row["case"], row["bands"], row["devices"]) for row in report["rows"]} == expected
    for row in report["rows"]:
        assert set(row["implementations"]) == {"single", "mesh"}
        assert min(benchmarks.numbers([row["counted"], row["relative"]])) > 0
        assert all(times["processor_s"] > 0 for times in row["implementations"].values())


@pytest.mark.subprocess
def test_devices_share_the_state(run):
    for row in run[0]["rows"]:
        share = 4 * 2 * row["parameters"] / row["devices"]
        assert share <= row["state_bytes_per_device"] < share + 1024


@pytest.mark.subprocess
def test_floors_hold_but_for_work_which_is_small_here(run, bench):
    failed = [check["floor"] for check in bench.acceptance(run[0]["rows"]) if not check["pass"]]
    assert all("lanes" in floor or "bytes" in floor for floor in failed), failed


@pytest.mark.subprocess
def test_plot_is_written(run):
    assert run[1].with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_one_band_is_refused(bench, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--bands", "8", "1"])
    assert "found 1" in capsys.readouterr().err


def test_the_model_is_what_the_docs_say(bench, tmp_path, capsys):
    bench.main(["--model", str(tmp_path / "model.png")])
    assert (tmp_path / "model.png").read_bytes().startswith(b"\x89PNG")
    page = (DOCS / "scaling.md").read_text()
    for table in capsys.readouterr().out.strip().split("\n\n"):
        assert table in page
