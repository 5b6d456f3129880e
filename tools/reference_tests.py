"""Runs the tests of jax_privacy with this library swapped in, and reports what only then fails.

    git clone https://github.com/google-deepmind/jax_privacy
    python tools/reference_tests.py jax_privacy

The argument is a checkout, or the unpacked source distribution of a release. Every test file runs
in a process of its own, with `install()` before it is imported. A test that fails there runs again
without the swap: if it passes then, the swap is to blame. The exit status is 1 if one is, unless
`--expect` names it.

It needs what those tests need: pytest, chex, hypothesis and, for the Keras API, keras with
KERAS_BACKEND=jax.
"""

from __future__ import annotations

import argparse
import collections
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from xml.etree import ElementTree

import _checkout

# One process per file, as the tests change JAX's configuration and count on being alone.
RUN = """
import sys
import _checkout
_checkout.prepare()
if sys.argv[1] == "swapped":
    import jax_privacy_kernels
    jax_privacy_kernels.install()
import pytest
sys.exit(pytest.main(sys.argv[2:]))
"""
FAILED = ("failure", "error")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkout", type=pathlib.Path)
    parser.add_argument("files", nargs="*", help="test files below tests/; all, if none are named")
    parser.add_argument(
        "--expect", action="append", default=[], help="part of the name of a test that may fail"
    )
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for a file")
    options = parser.parse_intermixed_args()
    tests = options.checkout.resolve() / "tests"
    files = [tests / name for name in options.files] or sorted(tests.rglob("*_test.py"))
    total: collections.Counter[str] = collections.Counter()
    unexpected = 0
    print(f"{'file':<44} {'tests':>6} {'passed':>7} {'skipped':>8} {'swap':>5} {'seconds':>8}")
    for file in files:
        start = time.perf_counter()
        outcomes = run(options.checkout, file, [], swapped=True, timeout=options.timeout)
        failed = [name for name, outcome in outcomes.items() if outcome in FAILED]
        blamed = []
        if failed:
            plain = run(options.checkout, file, failed, swapped=False, timeout=options.timeout)
            blamed = [name for name in failed if plain.get(name) not in FAILED]
        counts = collections.Counter(outcomes.values())
        counts["blamed"] = len(blamed)
        counts["tests"] = len(outcomes)
        total += counts
        show(str(file.relative_to(tests)), counts, time.perf_counter() - start)
        for name in failed:
            expected = any(part in name for part in options.expect)
            unexpected += name in blamed and not expected
            why = "expected" if expected else "swap" if name in blamed else "fails without, too"
            print(f"    {name}: {why}", flush=True)
    show("all", total)
    return int(unexpected > 0)


def run(
    checkout: pathlib.Path, file: pathlib.Path, tests: list[str], *, swapped: bool, timeout: float
) -> dict[str, str]:
    """The outcome of those tests of a file, or of all: passed, skipped, failure or error."""
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.xml"
        how = "swapped" if swapped else "plain"
        chosen = [f"{file}::{test.replace('.', '::', 1)}" for test in tests] or [str(file)]
        arguments = [*chosen, "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command = [sys.executable, "-c", RUN, how, *arguments]
        environment = _checkout.environment(checkout)
        try:
            done = subprocess.run(
                command,
                env=environment,
                cwd=folder,
                timeout=timeout,
                capture_output=True,
                text=True,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"no end in sight": "error"}
        if not report.exists():  # the process died
            print(done.stdout[-3000:], done.stderr[-3000:], sep="\n")
            return {"the process died": "error"}
        if os.environ.get("SHOW_FAILURES"):
            print(done.stdout)
        return {
            f"{case.get('classname', '').rpartition('.')[2]}.{case.get('name')}": next(
                (child.tag for child in case if child.tag in (*FAILED, "skipped")), "passed"
            )
            for case in ElementTree.parse(report).iter("testcase")
        }


def show(name: str, counts: collections.Counter[str], seconds: float = 0.0) -> None:
    print(
        f"{name:<44} {counts['tests']:>6} {counts['passed']:>7} {counts['skipped']:>8} "
        f"{counts['blamed']:>5} {seconds:>8.0f}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
