"""Every kernel in Triton lowers to a call and compiles for every architecture, spilling nothing."""

from __future__ import annotations

import collections
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

if not importlib.util.find_spec("jax_triton"):
    pytest.skip("jax-triton is not installed", allow_module_level=True)

pytestmark = [pytest.mark.subprocess, pytest.mark.triton]

SCRIPT = pathlib.Path(__file__).parent / "compile_triton.py"


@pytest.fixture(scope="module")
def lines():
    """What the script prints, in a process of its own: here Triton may have been told to interpret.

    It has no cache: jax-triton compiles anew in every process.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode == 77:
        pytest.skip(result.stdout)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def kernels(lines, record_testsuite_property):
    versions, *_ = lines
    for name, version in versions.items():
        record_testsuite_property(name, version)
    return [line for line in lines if "kernel" in line]


def test_every_program_has_a_call(lines):
    """And where there is a ring, it keeps its place."""
    programs = [line for line in lines if "calls" in line]
    assert len(programs) % 3 == 0
    assert len(programs) >= 3 * 25
    for program in programs:
        assert program["calls"] == 1, program
        has_ring = "band" in program["case"] and not program["case"].startswith("1 band")
        assert program["aliased"] == has_ring, program


def test_all_are_there(kernels):
    names = {"multiply", "recurrence", "solve", "weighted_samples", "window_sums"}
    found = collections.defaultdict(set)
    for kernel in kernels:
        found[kernel["sm"]].add(kernel["kernel"])
    assert found == {80: names, 90: names, 100: names}


def test_nothing_is_spilled(kernels, record_property):
    for kernel in kernels:
        print(*(f"{key} {value}" for key, value in kernel.items()), sep=", ")
        record_property(f"{kernel['case']}, sm_{kernel['sm']}", kernel["registers"])
    assert not [kernel for kernel in kernels if kernel["stack"] or kernel["local"]]
    # Four warps of a program: this many registers leave room for six programs on a processor.
    # With keys of chacha20, for five: 16 words of a block are in registers, then those of a group.
    for stream, most in (("threefry2x32", 80), ("chacha20", 96)):
        noise = [
            kernel["registers"]
            for kernel in kernels
            if kernel["kernel"] == "recurrence"
            and kernel["case"].endswith("chacha20") == (stream == "chacha20")
        ]
        assert noise
        assert max(noise) <= most, stream


def test_threads_wait_for_what_others_have_written(kernels):
    """An interpreter runs one thread, and misses no barrier."""
    expected = {"recurrence": 2, "solve": 1, "window_sums": 1}
    for kernel in kernels:
        barriers = expected.get(kernel["kernel"], 0)
        assert kernel["barriers"] == barriers, kernel
        # Of 2 bands all tiles are refreshed, and there is no code that only reads.
        gone = kernel["kernel"] == "recurrence" and kernel["case"].startswith("2 bands")
        left = barriers - gone
        # The compiler has waits of its own, where threads exchange values in shared memory.
        assert kernel["waits"] == left if not kernel["shared"] else kernel["waits"] >= left, kernel


def test_rounding_is_as_written(kernels):
    """XLA has the last word on what PTX leaves open, and would fuse products and sums."""
    assert not [kernel for kernel in kernels if kernel["fusible"]]
