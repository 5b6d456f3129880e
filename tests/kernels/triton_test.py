"""Every kernel in Triton lowers to a call and compiles for every architecture, spilling nothing.

The instructions of each are on record, for two versions of Triton, in instructions/. What makes a
kernel longer is seen there. If it is meant, write the file of a Triton that is installed again:

    python tests/kernels/triton_test.py --write
"""

from __future__ import annotations

import collections
import difflib
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import compile_triton
import pytest

if not importlib.util.find_spec("jax_triton"):
    pytest.skip("jax-triton is not installed", allow_module_level=True)

pytestmark = [pytest.mark.subprocess, pytest.mark.triton]

RECURRENCES = ("recurrence", "recurrences")
SPILLED = "64 bands by row, bfloat16, 8 odd leaves, chacha20"
FOLDER = pathlib.Path(__file__).parent
COLUMNS = {
    "sm": "sm",
    "registers": "registers",
    "stack": "spilled",
    "shared": "shared",
    "instructions": "instructions",
    "per_sample": "per sample",
    "case": "case",
}


def compiled():
    """What the script prints in processes of its own: here Triton may have been told to interpret.

    There is one for each GPU, at the same time. They have no cache: jax-triton compiles anew in
    every process.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    processes = [
        subprocess.Popen(
            [sys.executable, compile_triton.__file__, gpu],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for gpu in compile_triton.GPUS
    ]
    lines = []
    for process in processes:
        out, error = process.communicate()
        if process.returncode == 77:
            pytest.skip(out)
        assert process.returncode == 0, error
        lines += map(json.loads, out.splitlines())
    return lines


@pytest.fixture(scope="module")
def lines():
    return compiled()


@pytest.fixture(scope="module")
def kernels(lines, record_testsuite_property):
    versions, *_ = lines
    for name, version in versions.items():
        record_testsuite_property(name, version)
    return [line for line in lines if "kernel" in line]


def test_every_program_has_a_call(lines):
    """And where there are rings, they keep their places."""
    programs = [line for line in lines if "calls" in line]
    assert len(programs) % 3 == 0
    assert len(programs) >= 3 * 25
    for program in programs:
        assert program["calls"] == 1, program
        has_ring = "band" in program["case"] and not program["case"].startswith("1 band")
        leaves = re.search(r"(\d) (?:odd )?leaves", program["case"])
        rings = int(leaves[1]) if leaves else 1
        assert program["aliased"] == has_ring * rings, program


def test_all_are_there(kernels):
    names = {"multiply", "recurrence", "recurrences", "solve", "weighted_samples", "window_sums"}
    found = collections.defaultdict(set)
    for kernel in kernels:
        found[kernel["sm"]].add(kernel["kernel"])
    assert found == {80: names, 90: names, 100: names}


def test_nothing_is_spilled(kernels, record_property):
    for kernel in kernels:
        print(*(f"{key} {value}" for key, value in kernel.items()), sep=", ")
        record_property(f"{kernel['case']}, sm_{kernel['sm']}", kernel["registers"])
    for kernel in kernels:
        # Two launches would cost more than these few bytes, of the one case that has any.
        most = 16 if kernel["case"] == SPILLED and kernel["sm"] == 80 else 0
        assert kernel["stack"] <= most, kernel
        assert kernel["local"] == 0, kernel
    # Four warps of a program: this many registers leave room for six programs on a processor.
    # With keys of chacha20, for five: 16 words of a block are in registers, then those of a group.
    for stream, most in (("threefry2x32", 80), ("chacha20", 96)):
        noise = [
            kernel["registers"]
            for kernel in kernels
            if kernel["kernel"] in RECURRENCES
            and kernel["case"].endswith("chacha20") == (stream == "chacha20")
        ]
        assert noise
        assert max(noise) <= most, stream


def snapshot(lines):
    """The file of the installed Triton: instructions that a program has, and that a sample takes.

    A row for each case and architecture; registers of a thread, bytes of its stack for what is
    spilled, and bytes of a program's shared memory.
    """
    return FOLDER / "instructions" / f"triton-{lines[0]['triton']}.txt"


def table(lines):
    yield "  ".join(COLUMNS.values())
    cases = list(compile_triton.CASES)
    kernels = [line for line in lines if "kernel" in line]
    for kernel in sorted(kernels, key=lambda line: (cases.index(line["case"]), line["sm"])):
        cells = {key: "" if kernel[key] is None else str(kernel[key]) for key in COLUMNS}
        yield "  ".join(cells[key].rjust(len(title)) for key, title in COLUMNS.items())


def test_instructions_are_those_on_record(lines):
    path, found = snapshot(lines), list(table(lines))
    if not path.exists():
        pytest.skip(f"nothing is on record for Triton {lines[0]['triton']}")
    recorded = path.read_text().splitlines()
    difference = list(difflib.unified_diff(recorded, found, path.name, "found", "", "", 0, ""))
    if difference:
        pytest.fail("\n".join([*difference, "", str(__doc__)]), pytrace=False)


def test_threads_wait_for_what_others_have_written(kernels):
    """An interpreter runs one thread, and misses no barrier."""
    expected = {**dict.fromkeys(RECURRENCES, 2), "solve": 1, "window_sums": 1}
    for kernel in kernels:
        barriers = expected.get(kernel["kernel"], 0)
        assert kernel["barriers"] == barriers, kernel
        # Of 2 bands all tiles are refreshed, and there is no code that only reads.
        gone = kernel["kernel"] in RECURRENCES and kernel["case"].startswith("2 bands")
        left = barriers - gone
        # The compiler has waits of its own, where threads exchange values in shared memory.
        assert kernel["waits"] == left if not kernel["shared"] else kernel["waits"] >= left, kernel


def test_rounding_is_as_written(kernels):
    """XLA has the last word on what PTX leaves open, and would fuse products and sums."""
    assert not [kernel for kernel in kernels if kernel["fusible"]]


if __name__ == "__main__":
    lines = compiled()
    if sys.argv[1:] == ["--write"]:
        snapshot(lines).write_text("\n".join(table(lines)) + "\n")
    else:
        print(*table(lines), sep="\n")
