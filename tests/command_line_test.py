"""The command line: what each command prints, and how it refuses."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from support import sweeps

import jax_privacy_kernels
from jax_privacy_kernels import __main__ as command_line
from jax_privacy_kernels import _arguments, _bench_command, _run_command
from jax_privacy_kernels._bench import cases
from jax_privacy_kernels.ops import _ffi

PYTHON_M = [sys.executable, "-m", "jax_privacy_kernels"]
# As small as it gets: what is measured does not matter.
TINY = ["bench", "--params", "2000", "--bands", "1", "3", "--seconds", "60"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(
        cases, "ALGEBRA", {cases.algebra.Size("multiply", 100): "toeplitz_multiply"}
    )
    monkeypatch.setattr(cases, "PLAN", {"n": 50, "bands": 3, "max_optimizer_steps": 5})
    monkeypatch.setattr(cases, "ROUND", 1e-4)


def test_version(capsys):
    command_line.main(["--version"])
    expected = f"jax-privacy-kernels {jax_privacy_kernels.__version__}\n"
    assert capsys.readouterr().out == expected


def test_help_names_every_command_and_fits(capsys):
    command_line.main(["--help"])
    text = capsys.readouterr().out
    for name in command_line.COMMANDS:
        assert f"\n  {name} " in text
        assert f"jax_privacy_kernels {name}" in text
    for name in command_line.COMMANDS:
        with pytest.raises(SystemExit) as stop:
            command_line.main([name, "--help"])
        assert stop.value.code == 0
        text += capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.subprocess
def test_nobody_reads_on():
    reader, writer = os.pipe()
    os.close(reader)
    run = subprocess.run(PYTHON_M, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (run.returncode, run.stderr) == (1, "")


def test_interrupts_end_without_a_word(capsys, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_bench_command, "main", interrupted)
    monkeypatch.setattr(os, "_exit", lambda code: sys.exit(f"at once, {code}"))
    with pytest.raises(SystemExit) as stop:
        command_line.main(["bench"])
    assert stop.value.code == "at once, 130"
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bnch"], "expected a command or a program, found no file 'bnch'"),
        (["run"], "expected a program"),
        (["report", "x"], "unrecognized arguments: x"),
        (["bench", "nois"], "expected sections of noise, algebra, found 'nois'"),
        (["bench", "--params", "0"], "expected a whole number from 1 on, found '0'"),
        (["bench", "--params", "1.5"], "expected a whole number from 1 on, found '1.5'"),
        (["bench", "--params", "nan"], "expected a number, found 'nan'"),
        (["bench", "--params", "1e15"], "for which memory suffices at 32 bands"),
        (["bench", "--bands", "-1"], "expected a whole number from 1 on, found '-1'"),
        (["bench", "--seconds", "0"], "expected a number above 0, found '0'"),
        (["bench", "--json", "missing/x"], "expected a file that can be written"),
        (["bench", "--json", "/proc/x"], "expected a file that can be written"),
        (["bench", "--plot", "."], "expected a file that can be written, found '.'"),
        (["bench", "--plot", "x.txt"], "expected a picture, whose name ends in one of"),
        (["bench", "--plot", "-"], "expected a picture, whose name ends in one of"),
        (["bench", "--implementation", "CPP"], "invalid choice: 'CPP'"),
        (["bench", "--implementation", "triton"], "'triton' does not run here"),
    ],
)
def test_refusals(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        command_line.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_program_without_jax_privacy_is_refused_in_words(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        command_line.main(["run", __file__])
    assert stop.value.code == 2
    said = "which is not installed: pip install jax-privacy\n"
    assert capsys.readouterr().err.endswith(said)


@pytest.mark.parametrize(
    "name", ["no_such_module", "no_such.module", "json.no_such", "json.no.such"]
)
def test_a_module_that_there_is_not_is_refused_in_words(capsys, monkeypatch, name):
    monkeypatch.setattr(_run_command, "install", lambda force: None)
    monkeypatch.setattr(sys, "addaudithook", lambda hook: None)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as stop:
        command_line.main(["run", "-m", name])
    assert stop.value.code == 2
    assert f"expected a module to run, found none named '{name}'" in capsys.readouterr().err


def test_numbers():
    assert _arguments.count("1e6") == 1_000_000
    assert _arguments.positive("0.5") == 0.5
    assert _arguments.output("-") == pathlib.Path("-")


def test_a_link_to_what_is_not_there_yet_can_be_written(tmp_path):
    target, link = tmp_path / "target.json", tmp_path / "bench.json"
    link.symlink_to(target)
    assert _arguments.output(str(link)) == link
    assert link.is_symlink()
    assert not target.exists()


@pytest.mark.parametrize("width", sweeps.cases(["few", "all"], ["all"]))
@pytest.mark.slow
def test_bench(tmp_path, capsys, width):
    pytest.importorskip("matplotlib", reason="matplotlib is missing; install the bench extra")
    files = [str(tmp_path / name) for name in ("bench.json", "bench.png")]
    only = ["--implementation", "jax"] if width == "few" else []
    command_line.main([*TINY, *only, "--json", files[0], "--plot", files[1]])
    captured = capsys.readouterr()
    assert captured.err == ""  # progress is for terminals
    assert max(map(len, captured.out.splitlines())) <= 80
    report = json.loads(pathlib.Path(files[0]).read_text())
    expected = {"jax"} if only or _ffi.unavailable() else {"jax", "cpp"}
    rows = [*report["noise"], *report["algebra"]]
    assert [row["what"] for row in report["noise"]] == ["1 band", "3 bands"]
    for row in rows:
        assert set(row["implementations"]) - {"peer"} == expected
        assert row["missing"] == {}
        assert row["what"] in captured.out
        for times in row["implementations"].values():
            assert 0 < times["min_s"] <= times["median_s"] <= times["max_s"]
    assert all(value > 0 for row in report["noise"] for value in row["bounds"].values())
    assert pathlib.Path(files[1]).read_bytes().startswith(b"\x89PNG")


def test_bench_without_the_peer_and_in_json(capsys, monkeypatch):
    monkeypatch.setattr(_bench_command, "_peer", lambda: None)
    command_line.main([*TINY, "noise", "--json", "-"])
    report = json.loads(capsys.readouterr().out)
    assert "algebra" not in report
    assert all("peer" not in row["implementations"] for row in report["noise"])
    assert "jax_privacy" not in _bench_command.describe(report).splitlines()[-2]


@pytest.mark.slow
def test_bench_leaves_out_what_it_has_no_time_or_memory_for(capsys, monkeypatch):
    def no_memory(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: there is no more")

    monkeypatch.setattr(cases.steps, "Runner", no_memory)
    command_line.main([*TINY, "noise"])
    assert "-: out of memory" in capsys.readouterr().out
    command_line.main([*TINY[:-1], "1e-9"])
    assert "-: no time left" in capsys.readouterr().out


def test_what_was_not_measured_is_not_drawn(monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is missing; install the bench extra")
    drawn = []
    monkeypatch.setattr(_bench_command, "draw_whole", lambda figure, path: drawn.append(figure))

    def row(what, *names):
        times = {name: {"median_s": 1e-3} for name in names}
        return {"what": what, "bands": 1, "parameters": 5, "bounds": {"s": 1e-3},
                "implementations": times}  # fmt: skip

    noise, algebra = [row("1 band", "jax")], [row("multiply, n = 5"), row("solve, n = 5", "jax")]
    for report in (
        {"noise": noise, "algebra": algebra},
        {"noise": noise, "algebra": algebra[:1]},
        {"algebra": algebra[:1]},
    ):
        _bench_command.plot(report, pathlib.Path("plot.png"))
    assert [len(figure.axes) for figure in drawn] == [2, 1, 1]
    assert [tick.get_text() for tick in drawn[0].axes[1].get_yticklabels()] == ["solve\nn = 5"]


def test_memory_that_is_asked_for():
    assert cases.most_parameters(1, 1, 400) == 25  # gradients, outputs and one of each to spare
    assert cases.most_parameters(33, 3, 4 * 136) == 1
