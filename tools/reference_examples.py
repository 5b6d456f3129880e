"""Runs jax_privacy's example programs, unmodified, with and without the swap.

    git clone https://github.com/google-deepmind/jax_privacy
    python tools/reference_examples.py jax_privacy

The table says which run, whether they print the same numbers (but times), and how many seconds they
take in all. Programs that need a package or a data set that is not there are named with what they
miss: they fail without the swap as well. Notebooks are left out. The exit status is 1 if a program
fails with the swap alone.

`--small` gives constants of programs that take no arguments smaller values, for which a copy of the
program runs.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import _checkout

RUN = """
import runpy, sys
import _checkout
_checkout.prepare()
if sys.argv[1] == "swapped":
    import jax_privacy_kernels
    jax_privacy_kernels.install()
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# Small enough for a laptop.
ARGUMENTS = {
    "distributed_noise_generation.py": [  # by itself, with 32 GiB of state
        ["--model=toy", "--hidden_size=64", "--bands=8", "--steps=3"]
    ],
    "dpmf_strategy_optimization.py": [
        [f"--strategy={strategy}", "--iterations=128"]
        for strategy in (
            "dense",
            "banded",
            "banded-toeplitz",
            "banded-inverse-toeplitz",
            "blt",
            "banded-sqrt",
            "banded-inverse-sqrt",
            "normalized-banded-toeplitz",
        )
    ],
}
VARIABLES = {
    "distributed_noise_generation.py": {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
}
SMALL = {
    "balls_in_bins_accounting.py": {"DELTA": "5e-2"},
    "dp_logistic_regression.py": {  # which checks its loss: fewer steps, and less noise
        "EPSILON": "50.0",
        "ITERATIONS": "200",
        "PADDING_MULTIPLE": "2048",
    },
    "secure_noise_example.py": {
        "USERS": "1000",
        "EXPECTED_BATCH_SIZE": "100",
        "ITERATIONS": "50",
        "PADDING_MULTIPLE": "512",
    },
}
# A line that says how long something took.
TIMES = re.compile(r"\b(time|took|seconds?|sec|ms|elapsed|speed|throughput)\b|\d\s?m?s\b", re.I)
LOGGED = re.compile(r"^[IWE]\d{4} \S+\s+\d+ \S+\] ")  # absl's prefix
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[+-]?\d+)?")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkout", type=pathlib.Path)
    parser.add_argument("programs", nargs="*", help="names of files in examples/; all by default")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for a run")
    parser.add_argument("--small", action="store_true", help="change constants of programs")
    options = parser.parse_intermixed_args()
    folder = options.checkout.resolve() / "examples"
    programs = options.programs or sorted(path.name for path in folder.glob("*.py"))
    failed = 0
    print(f"{'program':<62} {'numbers apart':>14} {'seconds':>18}")
    for program in programs:
        for arguments in ARGUMENTS.get(program, [[]]):
            name = " ".join([program, *arguments])
            plain = run(options, folder / program, arguments, "plain")
            if plain.why:
                print(f"{name:<62} fails without the swap: {plain.why}", flush=True)
                continue
            swap = run(options, folder / program, arguments, "swapped")
            if swap.why:
                failed += 1
                print(f"{name:<62} FAILS with the swap: {swap.why}", flush=True)
                continue
            print(
                f"{name:<62} {apart(plain.output, swap.output):>14} "
                f"{plain.seconds:>7.1f} -> {swap.seconds:<7.1f}",
                flush=True,
            )
    return int(failed > 0)


class Run:
    """What a program printed, how long it took, and why it failed, or ""."""

    def __init__(self, output: str, seconds: float, why: str) -> None:
        self.output, self.seconds, self.why = output, seconds, why


def run(options: argparse.Namespace, program: pathlib.Path, arguments: list[str], how: str) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        if options.small:
            program = small(program, pathlib.Path(folder))
        command = [sys.executable, "-c", RUN, how, str(program), *arguments]
        environment = _checkout.environment(options.checkout, **VARIABLES.get(program.name, {}))
        start = time.perf_counter()
        try:
            done = subprocess.run(
                command,
                env=environment,
                timeout=options.timeout,
                capture_output=True,
                text=True,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Run("", options.timeout, f"no end within {options.timeout:.0f} seconds")
        seconds = time.perf_counter() - start
    lines = done.stderr.strip().splitlines()
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    why = (errors or lines or ["?"])[-1][:160] if done.returncode else ""
    return Run(done.stdout + done.stderr, seconds, why)


def small(program: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """A copy of a program with smaller constants."""
    source = program.read_text()
    for name, value in SMALL.get(program.name, {}).items():
        source, count = re.subn(rf"(?m)^{name} = .*$", f"{name} = {value}", source)
        if count != 1:
            raise ValueError(f"expected one {name} in {program}, found {count}")
    copy = folder / program.name
    copy.write_text(source)
    return copy


def apart(first: str, second: str) -> str:
    """How many of the numbers that both print differ by more than a thousandth."""
    a, b = numbers(first), numbers(second)
    if len(a) != len(b):
        return f"{len(a)}, {len(b)} of them"
    different = sum(
        not math.isclose(x, y, rel_tol=1e-3, abs_tol=1e-6) for x, y in zip(a, b, strict=True)
    )
    return f"{different} of {len(a)}"


def numbers(output: str) -> list[float]:
    """Those of lines which do not speak of time."""
    lines = [LOGGED.sub("", line) for line in output.splitlines()]
    return [float(x) for line in lines if not TIMES.search(line) for x in NUMBER.findall(line)]


if __name__ == "__main__":
    sys.exit(main())
