"""Every kernel in Triton compiles for every architecture, and spills no registers."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

if not importlib.util.find_spec("triton"):
    pytest.skip("triton is not installed", allow_module_level=True)

pytestmark = [pytest.mark.subprocess, pytest.mark.triton]

FOLDER = pathlib.Path(__file__).parent


def run(script, cache, *arguments):
    """In a process of its own: in this one Triton may have been told to interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, str(FOLDER / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    result = run("compile_triton.py", tmp_path_factory.mktemp("triton"))
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_all_are_there(compiled):
    assert {kernel["sm"] for kernel in compiled} == {80, 90, 100}
    assert {kernel["kernel"] for kernel in compiled} == {
        "multiply",
        "recurrence",
        "solve",
        "weighted_samples",
        "window_sums",
    }


def test_nothing_is_spilled(compiled, record_property):
    for kernel in compiled:
        print(*(f"{key} {value}" for key, value in kernel.items()), sep=", ")
        record_property(f"{kernel['case']}, sm_{kernel['sm']}", kernel["registers"])
    assert not [kernel for kernel in compiled if kernel["stack"] or kernel["local"]]
    # Four warps of a program: this many registers leave room for six programs on a processor.
    noise = [kernel["registers"] for kernel in compiled if kernel["kernel"] == "recurrence"]
    assert max(noise) <= 80


def test_threads_wait_for_what_others_have_written(compiled):
    """An interpreter runs one thread, and misses no barrier."""
    expected = {"recurrence": 2, "solve": 1, "window_sums": 1}
    for kernel in compiled:
        # Of 2 bands all tiles are refreshed, and there is no code that only reads.
        gone = kernel["kernel"] == "recurrence" and kernel["case"].startswith("2 bands")
        assert kernel["barriers"] == expected.get(kernel["kernel"], 0) - gone, kernel


def test_lowering(tmp_path):
    """A custom call for every leaf, in which the ring keeps its place."""
    result = run("lower_triton.py", tmp_path, "cuda")
    if result.returncode == 77:
        pytest.skip(result.stdout)
    assert result.returncode == 0, result.stderr
    calls = [line for line in result.stdout.splitlines() if "@triton_kernel_call(" in line]
    assert len(calls) == 3
    assert all("output_tuple_indices = [1], operand_index = 5" in call for call in calls)
