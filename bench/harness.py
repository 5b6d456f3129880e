"""What the benchmarks share beside what is installed, `jax_privacy_kernels._bench`: options, files.

A benchmark times all its contestants in one process, round-robin, so that a change in the machine's
load or clock hits all of them alike; the limits are measured in the same run for the same reason.
"""

from __future__ import annotations

import argparse
import json
import operator
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jax_privacy_kernels._bench.looks import LABELS, log_ticks, over_bands, style, table
from jax_privacy_kernels._bench.machine import (
    copy_bandwidth,
    cores,
    device_limits,
    environment,
    machine_limits,
    sampling_rates,
)
from jax_privacy_kernels._bench.timing import chain, clock, contestant, interleave, speedups

__all__ = [
    "LABELS",
    "NAMES",
    "chain",
    "clock",
    "contestant",
    "copy_bandwidth",
    "cores",
    "device_limits",
    "environment",
    "floor",
    "interleave",
    "log_ticks",
    "machine_limits",
    "options",
    "over_bands",
    "publish",
    "sampling_rates",
    "speedups",
    "style",
    "table",
    "text",
]

RESULTS = pathlib.Path(__file__).parent / "results"
NAMES = ("peer", "jax", "cpp")  # the contestants on a CPU


def options(doc: str, cases: Iterable[str]) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes: a check, not a measurement"
    )
    parser.add_argument("--cases", nargs="+", choices=cases, default=list(cases))
    parser.add_argument(
        "--output-dir", type=pathlib.Path, help=f"({RESULTS}; with --quick nothing is written)"
    )
    return parser


def floor(what: str, value: float | None, sign: str, bound: float) -> dict[str, Any]:
    """An entry of the list of floors that a release must hold; the sign is ">=" or "<=".

    What was not measured, None, does not pass.
    """
    passed = {">=": operator.ge, "<=": operator.le}[sign]
    return {
        "floor": what,
        "value": value,
        "required": f"{sign} {bound:g}",
        "pass": value is not None and bool(passed(value, bound)),
    }


def text(report: Mapping[str, Any], *parts: str) -> str:
    """A report: where it was measured, the parts given, and the floors with what was measured."""
    verdicts = [
        (
            check["floor"],
            "not measured" if check["value"] is None else f"{check['value']:.3g}",
            check["required"],
            "PASS" if check["pass"] else "" if check["value"] is None else "FAIL",
        )
        for check in report["acceptance"]
    ]
    environment = "\n".join(f"{key}: {value}" for key, value in report["environment"].items())
    floors = [table(("floor", "measured", "required", ""), verdicts)] if verdicts else []
    return "\n\n".join([environment, *parts, *floors])


def publish(
    benchmark: str,
    environment: Mapping[str, Any],
    rows: list[dict[str, Any]],
    acceptance: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
    describe: Callable[[dict[str, Any]], str],
    plot: Callable[[Sequence[dict[str, Any]], pathlib.Path], None],
    args: argparse.Namespace,
    **more: Any,
) -> dict[str, Any]:
    """Prints a report, writes it to <output-dir>/<benchmark>-<date>.json and plots its rows beside.

    Tiny sizes have no floors, and are not written where measurements are. What else is given goes
    into the report, by its name.
    """
    report = {
        "benchmark": benchmark,
        "environment": environment,
        **more,
        "rows": rows,
        "acceptance": [] if args.quick else acceptance(rows),
    }
    print("\n" + describe(report))
    folder = args.output_dir or (None if args.quick else RESULTS)
    if folder is None:
        return report
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{benchmark}-{environment['date']}.json"
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    plot(rows, path.with_suffix(".png"))
    return report
