"""Time to plan a mechanism: jax_privacy, plain JAX, C++.

    python bench/optimize.py            # the full run: some minutes
    python bench/optimize.py --quick    # a check that it works

A plan is made once, so that the first call counts, compilation included: it is made in a process of
its own, several times, of which the median is taken. Further calls take turns in one process. What
is found is compared in float64, by the loss: mean squared error times squared sensitivity, or for
buffers the largest squared error. Cases:

  banded          optimize_banded_toeplitz, 10,000 steps, 32 bands
  banded_large    the same for a million steps, C++ alone
  inverse         optimize_banded_inverse_toeplitz, which jax_privacy 2.0.0 does not have
  by_row          banded.optimize, 1,000 steps, 16 bands, as many coefficients in every column
  dense           dense.optimize, 128 steps, 8 epochs, which ends within 1e-5 of the optimum
  dense_512_1     the same for 512 steps and 1 epoch, and with 8 and 16 epochs dense_512_8 and
                  dense_512_16; jax_privacy is called just once
  dense_1024_1    for 1,024 steps, and with more epochs likewise; jax_privacy ends after 40 steps
  buffers         buffered_toeplitz.optimize, 1,000 steps, 10 participations, up to 3 buffers
  amplified       optimize_coefs_for_amplifications; jax_privacy, slow there, is called just once
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import harness
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jax_privacy import matrix_factorization as peer
from jax_privacy.matrix_factorization import toeplitz as peer_toeplitz

from jax_privacy_kernels import matrix_factorization
from jax_privacy_kernels.matrix_factorization import banded, buffered_toeplitz, dense, toeplitz

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAMES = harness.NAMES
AS_LOW = 1e-9  # A loss is as low as another if it is above by less, relatively.
OFTEN = 1_000_000  # times: as often as the options say
FEW_STEPS = {"max_optimizer_steps": 40}  # in place of hundreds, for many minutes


@dataclasses.dataclass(frozen=True)
class Case:
    """What is the same for all contestants in a row of the table."""

    function: str  # module.function
    arguments: Mapping[str, Any]
    quick: Mapping[str, Any]  # arguments that --quick puts in their place
    first: Mapping[str, int]  # Who takes part, and the most processes for first calls.
    again: Mapping[str, int]  # And the most calls thereafter.
    floor: float | None = None  # what cpp has to reach, times the peer
    first_floor: float | None = None  # and on first calls
    at_most: float | None = None  # seconds that a first call of cpp may take
    as_low: float = AS_LOW
    of_peer: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # arguments of its own

    def smaller(self) -> Case:
        """The same at a size for a quick look."""
        return dataclasses.replace(self, arguments={**self.arguments, **self.quick})

    @property
    def steps(self) -> int:
        return self.arguments["n"]


def _dense(n: int, epochs: int, **options: Any) -> Case:
    """A dense strategy that takes the peer long; it plans just once."""
    return Case(
        "dense.optimize",
        {"n": n, "epochs": epochs},
        {"n": 16, "epochs": min(epochs, 4)},
        first={"peer": 1, "cpp": OFTEN},
        again={"cpp": 3},
        first_floor=1,
        as_low=1e-5,
        **options,
    )


EVERYONE = dict.fromkeys(NAMES, OFTEN)
OURS = dict.fromkeys(NAMES[1:], OFTEN)
CASES = {
    "banded": Case(
        "toeplitz.optimize_banded_toeplitz",
        {"n": 10_000, "bands": 32, "max_optimizer_steps": 250},
        {"n": 200, "bands": 4, "max_optimizer_steps": 20},
        first=EVERYONE,
        again=EVERYONE | {"peer": 3},
        floor=20,
        first_floor=3,
    ),
    "banded_large": Case(
        "toeplitz.optimize_banded_toeplitz",
        {"n": 1_000_000, "bands": 32, "max_optimizer_steps": 250},
        {"n": 2_000, "bands": 4, "max_optimizer_steps": 20},
        first={"cpp": OFTEN},
        again={"cpp": 1},
        at_most=60,
    ),
    "inverse": Case(
        "toeplitz.optimize_banded_inverse_toeplitz",
        {"n": 10_000, "min_sep": 100, "num_bands": 32, "max_participations": 5},
        {"n": 200, "min_sep": 20, "num_bands": 4, "max_optimizer_steps": 20},
        first=OURS,
        again=OURS | {"jax": 3},
    ),
    "by_row": Case(
        "banded.optimize",
        {"n": 1_000, "bands": 16, "max_optimizer_steps": 100},
        {"n": 50, "bands": 4, "max_optimizer_steps": 10},
        first=EVERYONE | {"peer": 1},
        again=EVERYONE | {"peer": 1, "jax": 3},
        floor=20,
    ),
    "dense": Case(
        "dense.optimize",
        {"n": 128, "epochs": 8},
        {"n": 16, "epochs": 4},
        first={"peer": OFTEN, "cpp": OFTEN},
        again={"peer": OFTEN, "cpp": OFTEN},
        floor=1,
        first_floor=1,
        as_low=1e-5,
    ),
    "dense_512_1": _dense(512, 1, at_most=10),
    "dense_512_8": _dense(512, 8, at_most=10),
    "dense_512_16": _dense(512, 16, at_most=10),
    "dense_1024_1": _dense(1024, 1, at_most=60, of_peer=FEW_STEPS),
    "dense_1024_8": _dense(1024, 8, at_most=60, of_peer=FEW_STEPS),
    "dense_1024_16": _dense(1024, 16, at_most=60, of_peer=FEW_STEPS),
    "buffers": Case(
        "buffered_toeplitz.optimize",
        {"n": 1_000, "min_sep": 100, "max_participations": 10, "max_buffers": 3},
        {"n": 50, "min_sep": 10, "max_participations": 3, "max_buffers": 1},
        first=EVERYONE | {"peer": 1},
        again=EVERYONE | {"peer": 1, "jax": 3},
        floor=4,
        first_floor=4,
    ),
    "amplified": Case(
        "toeplitz.optimize_coefs_for_amplifications",
        {
            "n": 1024,
            "dataset_size": 60_000,
            "expected_batch_size": 500,
            "epsilon": 2.0,
            "delta": 1e-6,
        },
        {
            "n": 16,
            "dataset_size": 1_000,
            "expected_batch_size": 500,
            "max_optimizer_steps": 5,
        },
        first=EVERYONE | {"peer": 1},
        again=OURS,
        first_floor=15,
    ),
}


def contestant(name: str, case: Case) -> Callable[[], Any]:
    """The call of one contestant."""
    module, function = case.function.split(".")
    library = getattr(peer if name == "peer" else matrix_factorization, module)
    arguments = dict(case.arguments) | dict(case.of_peer if name == "peer" else {})
    if name != "peer" and function == "optimize_coefs_for_amplifications":
        arguments["accountant"] = "rdp"  # as the peer accounts
    return harness.contestant(name, functools.partial(getattr(library, function), **arguments))


def numbers(found: Any) -> list[float]:
    """Those of what was found: coefficients, or decays and scales of buffers."""
    with jax.enable_x64(True):
        return np.concatenate(
            [np.asarray(leaf, np.float64).reshape(-1) for leaf in jax.tree.leaves(found)]
        ).tolist()


def find(name: str, case: Case) -> dict[str, Any]:
    """Makes the first call of this process; gives its time and what it has found."""
    jax.block_until_ready(jnp.zeros(1))  # JAX looks for devices once.
    call, found = contestant(name, case), None

    def keep() -> Any:
        nonlocal found
        found = call()
        return found

    seconds = harness.clock(keep)
    coef, stddev = found if isinstance(found, tuple) else (found, None)
    return {
        "seconds": seconds,
        "coef": numbers(coef),
        "stddev": None if stddev is None else float(stddev),
    }


def find_in_new_process(name: str, case_name: str, quick: bool) -> dict[str, Any]:
    """The same as ``find``, in a process of its own."""
    command = [sys.executable, __file__, "--find", case_name, name, *(["--quick"] * quick)]
    # jax_privacy warns some hundred times of orders that its accountant leaves out.
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{case_name}, {name} failed:\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def loss(case: Case, coef: Sequence[float]) -> float:
    """Squared error, mean or largest, times squared sensitivity of what was found, in float64."""
    with jax.enable_x64(True):
        c = jnp.asarray(coef, jnp.float64)
        limits = {
            key: case.arguments[key]
            for key in ("min_sep", "max_participations")
            if key in case.arguments
        }
        if case.function == "banded.optimize":
            C = banded.ColumnNormalizedBanded(c.reshape(case.steps, -1))
            return float(banded.per_query_error(C).mean())
        if case.function == "dense.optimize":
            strategy = c.reshape(case.steps, case.steps)
            return dense.certificate(strategy, epochs=case.arguments["epochs"]).loss
        if case.function == "buffered_toeplitz.optimize":
            blt = buffered_toeplitz.BufferedToeplitz.build(*jnp.split(c, 2))
            c = blt.toeplitz_coefs(case.steps)
            error = peer_toeplitz.per_query_error(strategy_coef=c)[-1]
            squared = toeplitz.minsep_sensitivity_squared(c, n=case.steps, **limits)
            return float(error * squared)
        if "min_sep" not in limits:
            return float(peer_toeplitz.loss(c, case.steps))
        error = peer_toeplitz.per_query_error(noising_coef=jnp.pad(c, (0, case.steps - c.size)))
        sensitivity_squared = toeplitz.compute_banded_inverse_sensitivity_squared(
            case.steps, c, **limits
        )
        return float(error.mean() * sensitivity_squared)


def measure(name: str, case: Case, processes: int, repeats: int, quick: bool) -> dict[str, Any]:
    """Times those that take part in a case."""
    found: dict[str, list[dict[str, Any]]] = {n: [] for n in case.first}
    for i in range(processes):
        for n, most in case.first.items():
            if i < most:
                found[n].append(find_in_new_process(n, name, quick))
    rounds = {n: min(repeats, most) for n, most in case.again.items()}
    calls = {n: contestant(n, case) for n in rounds}
    times: dict[str, dict[str, Any]] = {n: {} for n in found}
    for n, t in harness.interleave(calls, warmup=1, repeats=rounds).items():
        del t["first_call_s"]  # Another process has measured it.
        times[n].update(t)
    for n, finds in found.items():
        seconds = [f["seconds"] for f in finds]
        times[n] |= {
            "first_call_s": float(np.median(seconds)),
            "first_calls_s": seconds,
            "loss": loss(case, finds[-1]["coef"]),
            "coefficients": len(finds[-1]["coef"]),
        }
        if finds[-1]["stddev"] is not None:
            times[n]["stddev"] = finds[-1]["stddev"]
    return {
        "case": name,
        "function": case.function,
        "arguments": dict(case.arguments),
        "arguments_of_peer": dict(case.of_peer),
        "speedup": harness.speedups(times, "median_s"),
        "first_call_speedup": harness.speedups(times, "first_call_s"),
        "implementations": times,
    }


def acceptance(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The floors that a release must hold; of rows at another size only those of what is found."""
    checks = []
    for row in rows:
        name, case, found = row["case"], CASES[row["case"]], row["implementations"]
        if row["arguments"] == case.arguments:
            for floor, key, what in (
                (case.floor, "speedup", "cpp"),
                (case.first_floor, "first_call_speedup", "first call of cpp"),
            ):
                if floor is not None:
                    checks.append(
                        harness.floor(f"{name}: {what}, times peer", row[key]["cpp"], ">=", floor)
                    )
            if case.at_most is not None:
                seconds = found["cpp"]["first_call_s"]
                what = f"{name}: first call of cpp, seconds"
                checks.append(harness.floor(what, seconds, "<=", case.at_most))
        cpp, other = found["cpp"], "peer" if "peer" in found else "jax"
        if other not in found:
            continue
        if "stddev" in cpp:
            bands = abs(cpp["coefficients"] - found[other]["coefficients"])
            checks.append(harness.floor(f"{name}: bands, cpp off {other}", bands, "<=", 0))
            off = abs(cpp["stddev"] / found[other]["stddev"] - 1)
            checks.append(harness.floor(f"{name}: stddev, cpp off {other}", off, "<=", 1e-3))
        elif other == "peer":
            # Not of the banded inverse, whose loss has kinks: the last bits decide where it stops.
            excess = cpp["loss"] / found[other]["loss"] - 1
            what = f"{name}: loss, cpp above {other}"
            checks.append(harness.floor(what, excess, "<=", CASES[name].as_low))
    return checks


def describe(report: dict[str, Any]) -> str:
    """The report as text."""
    header = ["case", "n", "", "first call s", "(range)", "x", "again s", "x", "rounds"]
    header += ["coefs", "loss", "stddev"]
    lines = []
    for row in report["rows"]:
        for name, times in row["implementations"].items():
            firsts = times["first_calls_s"]
            again = f"{times['median_s']:.3f}" if "median_s" in times else "-"
            ratios = {
                key: f"{row[key][name]:.1f}" if name in row[key] else "-"
                for key in ("first_call_speedup", "speedup")
            }
            lines.append(
                [
                    row["case"],
                    row["arguments"]["n"],
                    name,
                    f"{times['first_call_s']:.2f}",
                    f"{min(firsts):.2f}-{max(firsts):.2f}",
                    ratios["first_call_speedup"],
                    again,
                    ratios["speedup"],
                    f"{len(firsts)}+{times.get('rounds', 0)}",
                    times["coefficients"],
                    f"{times['loss']:.12g}",
                    f"{times['stddev']:.8g}" if "stddev" in times else "-",
                ]
            )
    return harness.text(report, harness.table(header, lines))


def plot(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Time of the first call, and of those after it, case by case."""
    figure, axes = plt.subplots(figsize=(8, 1.4 + 0.9 * len(rows)), layout="constrained")
    for offset, name in zip((-0.25, 0, 0.25), harness.NAMES, strict=True):
        text, color = harness.style(name)["label"], harness.style(name)["color"]
        for i, row in enumerate(rows):
            times = row["implementations"].get(name)
            if times is None:
                continue
            first, firsts, y = times["first_call_s"], times["first_calls_s"], i + offset
            axes.plot([min(firsts), max(firsts)], [y, y], color=color, linewidth=1)
            if "median_s" in times:
                axes.plot(times["median_s"], y, "o", color=color)
            axes.plot(first, y, "o", color=color, markerfacecolor="white", zorder=3)
            beside: dict[str, Any] = {"xytext": (8, 0), "textcoords": "offset points"}
            where = (max(firsts), y)
            axes.annotate(f"{first:.3g} s", where, **beside, va="center", fontsize=8)
        axes.plot([], [], "s", color=color, label=text)
    first = {"color": "black", "linewidth": 1, "markerfacecolor": "white"}
    axes.plot([], [], "o-", **first, label="first call, compiling;\nmedian and range")
    axes.plot([], [], "o", color="black", label="calls after it")
    for i in range(1, len(rows)):
        axes.axhline(i - 0.5, color="black", linewidth=0.5)
    axes.set_xscale("log")
    harness.log_ticks(axes.xaxis)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * 3)  # room for the numbers
    titles = [f"{row['function']}\n{settings(row)}" for row in rows]
    axes.set_yticks(range(len(rows)), titles, fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(True, axis="x", which="both", linewidth=0.3)
    axes.set_xlabel("seconds per call; the numbers are of first calls")
    axes.set_title("Time to plan a mechanism, CPU")
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1))  # beside the marks, not over them
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def settings(row: dict[str, Any]) -> str:
    """The main arguments of a row in words."""
    arguments, found = row["arguments"], row["implementations"]["cpp"]
    parts = [f"n = {arguments['n']:,}"]
    if "min_sep" in arguments:
        parts.append(f"min_sep = {arguments['min_sep']}")
    if "epochs" in arguments:
        epochs, of_peer = arguments["epochs"], row["arguments_of_peer"]
        parts.append(f"{epochs} epoch{'s' if epochs > 1 else ''}")
        if of_peer:
            parts[-1] += f"\njax_privacy ended after {of_peer['max_optimizer_steps']} steps"
        return ", ".join(parts)
    if "max_buffers" in arguments:
        return ", ".join([*parts, f"{found['coefficients'] // 2} buffers chosen"])
    chosen = " chosen" if "epsilon" in arguments else ""
    bands = arguments.get("bands", found["coefficients"])
    parts.append(f"{bands} band{'s' if bands > 1 else ''}{chosen}")
    return ", ".join(parts)


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    parser = harness.options(__doc__, CASES)
    parser.add_argument("--processes", type=int, help="for first calls, at most (3)")
    parser.add_argument("--repeats", type=int, help="timed calls after the first, at most (10)")
    # What the processes for first calls are asked.
    parser.add_argument("--find", nargs=2, metavar=("CASE", "NAME"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    processes = args.processes or (1 if args.quick else 3)
    repeats = args.repeats or (2 if args.quick else 10)
    cases = {name: case.smaller() if args.quick else case for name, case in CASES.items()}

    with jax.default_device(jax.devices("cpu")[0]):
        if args.find:
            case_name, name = args.find
            print(json.dumps(find(name, cases[case_name])))
            return None
        environment, rows = harness.environment(), []
        for name in args.cases:
            rows.append(measure(name, cases[name], processes, repeats, args.quick))
            print(f"{name}: done", flush=True)
            gc.collect()
    return harness.publish("optimize", environment, rows, acceptance, describe, plot, args)


if __name__ == "__main__":
    main()
