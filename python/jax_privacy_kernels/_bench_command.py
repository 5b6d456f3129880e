"""Measures this machine: steps of noise, Toeplitz algebra, a plan.

jax_privacy takes part where it is installed. All contestants take turns on the default device, and
the machine's own limits are measured in the same run: the most of the time to move the bytes of a
step and the time to draw its samples is the limit. It takes less than two minutes.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import pathlib
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
from tqdm import tqdm

from jax_privacy_kernels import _arguments
from jax_privacy_kernels._bench import cases, looks, machine
from jax_privacy_kernels._files import draw_whole, write_whole

__all__ = ["EXAMPLES", "add_arguments", "main"]

EXAMPLES = """
  bench
  bench --bands 1 8 64 --params 1e6
  bench --json bench.json --plot bench.png
"""
SECTIONS = ("noise", "algebra")
# Parameters, if nobody says how many and memory allows it.
DEFAULT = {"cpu": 4_000_000, "gpu": 2**26, "tpu": 2**26}
WIDTH = 80


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sections", nargs="*", metavar="section", help=f"of {', '.join(SECTIONS)}; both by default"
    )
    parser.add_argument(
        "--params",
        type=_arguments.count,
        metavar="N",
        help="float32 parameters of the model (4e6 on a CPU, 2^26 on a GPU, fewer where memory "
        "is short)",
    )
    parser.add_argument(
        "--bands",
        type=_arguments.count,
        nargs="+",
        default=[1, 8, 32],
        metavar="B",
        help="(1 8 32)",
    )
    parser.add_argument(
        "--implementation",
        nargs="+",
        choices=("jax", "cpp", "pallas", "triton"),
        default=[],
        metavar="NAME",
        help="of jax, cpp, pallas and triton (all that run here)",
    )
    parser.add_argument(
        "--seconds",
        type=_arguments.positive,
        default=80.0,
        metavar="S",
        help="after which nothing new is begun (80)",
    )
    parser.add_argument(
        "--json", type=_arguments.output, metavar="FILE", help="all that was measured; - to print"
    )
    parser.add_argument(
        "--plot", type=_arguments.picture, metavar="FILE", help="a picture; needs matplotlib"
    )
    parser.set_defaults(fail=parser.error)


def main(options: argparse.Namespace) -> None:
    """Measures, then prints a table, or what was asked for."""
    unknown = [name for name in options.sections if name not in SECTIONS]
    if unknown:
        options.fail(f"expected sections of {', '.join(SECTIONS)}, found {unknown[0]!r}")
    report = measure(options)
    if options.json == pathlib.Path("-"):
        print(json.dumps(report, indent=1, allow_nan=False))
    else:
        print(describe(report))
        if options.json:
            text = json.dumps(report, indent=1, allow_nan=False) + "\n"
            write_whole(options.json, text.encode())
    if options.plot:
        plot(report, options.plot)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The report: a dictionary of plain values."""
    deadline = time.monotonic() + options.seconds
    environment = machine.environment()
    device = jax.devices()[0]
    environment["device"] = device.device_kind
    sections = options.sections or SECTIONS
    peer = _peer()
    names = cases.contestants("correlated_noise", options.implementation, peer)
    missing = [name for name in options.implementation if name not in names]
    if missing:
        options.fail(
            f"implementation {missing[0]!r} does not run here, found {names}; "
            "python -m jax_privacy_kernels says why"
        )
    most = cases.most_parameters(max(options.bands), len(names), machine.free_memory(device) // 2)
    if options.params and options.params > most:
        options.fail(
            f"--params: expected at most {most:,}, for which memory suffices at "
            f"{max(options.bands)} bands, found {options.params:,}"
        )
    parameters = options.params or min(DEFAULT.get(device.platform, 4_000_000), most)

    progress = tqdm(
        total=len(options.bands) * ("noise" in sections)
        + (len(cases.ALGEBRA) + 1) * ("algebra" in sections)
        + 1,
        bar_format="{desc:<40.40} {bar} {n}/{total} {elapsed}",
        disable=None,  # where it goes into a file
        leave=False,
        ncols=WIDTH - 1,
    )

    def shown(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        found = []
        for row in rows:
            found.append(row)
            progress.set_description_str(row["what"], refresh=False)
            progress.update()
        return found

    report: dict[str, Any] = {"benchmark": "bench", "environment": environment}
    progress.set_description_str("the machine's limits")
    limits = _limits(device.platform, parameters)
    progress.update()
    with progress:
        if "noise" in sections:
            # Algebra comes last, and gets what is left.
            until = deadline - 0.4 * options.seconds * ("algebra" in sections)
            rows = shown(cases.noise_rows(parameters, options.bands, names, peer, until))
            # A limit is what the machine can do at best.
            limits = jax.tree.map(max, limits, _limits(device.platform, parameters))
            for row in rows:
                row["bounds"] = {
                    "bandwidth_s": row["bytes_per_step"] / limits["copy_bytes_per_s"],
                    "sampling_s": row["parameters"] / limits["samples_per_s"],
                }
            report["noise"] = rows
        report["limits"] = limits
        if "algebra" in sections:
            report["algebra"] = shown(cases.algebra_rows(options.implementation, peer, deadline))
    return report


def _limits(platform: str, parameters: int) -> dict[str, float]:
    """Bytes read plus written, and samples drawn, per second."""
    limits = machine.device_limits(parameters, 5)
    if platform == "cpu":
        rate = machine.sampling_rates(repeats=5)["kernel"]
        limits["samples_per_s"] = max(limits["samples_per_s"], rate)
        copied = machine.copy_bandwidth(64, 5)
        limits["copy_bytes_per_s"] = max(limits["copy_bytes_per_s"], copied)
    return limits


def _peer() -> ModuleType | None:
    """jax_privacy with the modules that take part, if it is installed."""
    if importlib.util.find_spec("jax_privacy") is None:
        return None
    for name in ("noise_addition", "matrix_factorization.toeplitz"):
        importlib.import_module(f"jax_privacy.{name}")
    return importlib.import_module("jax_privacy")


def describe(report: Mapping[str, Any]) -> str:
    """The report as text of at most 80 columns."""
    found, limits = report["environment"], report["limits"]
    versions = ", ".join(
        f"{name} {found[name]}"
        for name in ("jax-privacy-kernels", "jax", "jax-privacy", "python")
        if found[name] != "none"
    )
    device = "" if found["device"] == "cpu" else f"{found['device']}; "
    head = [
        versions,
        f"{device}{found['cores']} cores of {found['cpu']}, {found['simd']}; "
        f"load before {found['load before']}",
        f"limits: copy {limits['copy_bytes_per_s'] / 1e9:.3g} GB/s (read + written), "
        f"{limits['samples_per_s'] / 1e6:.4g} M samples/s",
    ]
    if found["jax-privacy"] == "none":
        head.append("jax_privacy is not installed; to see it beside: pip install jax-privacy")
    parts = ["\n".join(textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in head)]
    if report.get("noise"):
        size = report["noise"][0]["parameters"]
        parts.append(f"One step of noise, {size:,} float32 parameters, milliseconds\n")
        parts[-1] += _table(report["noise"], bounded=True)
    if report.get("algebra"):
        parts.append("Algebra and plans, milliseconds\n" + _table(report["algebra"]))
    rows = [*report.get("noise", []), *report.get("algebra", [])]
    reasons = sorted({reason for row in rows for reason in row["missing"].values()})
    if reasons:
        parts.append(f"-: {', '.join(reasons)}")
    return "\n\n".join(parts)


def _table(rows: Sequence[Mapping[str, Any]], bounded: bool = False) -> str:
    """Rows of medians; what this library's fastest makes of the peer's time; the limit."""
    taking_part = {name for row in rows for name in [*row["implementations"], *row["missing"]]}
    names = [name for name in looks.LABELS if name in taking_part]
    best = "" if names == ["peer"] else names[-1]
    header = ["", *("jax_privacy" if name == "peer" else name for name in names)]
    compared = "peer" in names and best != ""
    header += [f"{best} x"] if compared else []
    header += ["limit", f"{best} %"] if bounded and best else []
    lines = []
    for row in rows:
        times = {name: t["median_s"] for name, t in row["implementations"].items()}
        line = [row["what"], *(_milli(times.get(name)) for name in names)]
        if compared:
            line.append(f"{row['speedup'][best]:.1f}" if best in row["speedup"] else "-")
        if bounded and best:
            limit = max(row["bounds"].values())
            line += [_milli(limit), f"{100 * limit / times[best]:.0f}" if best in times else "-"]
        lines.append(line)
    text = looks.table(header, lines)
    if max(map(len, text.splitlines())) <= WIDTH:
        return text
    # What a row is about stands above it.
    indented = looks.table(header, [["", *line[1:]] for line in lines]).splitlines()
    pairs = zip(lines, indented[1:], strict=True)
    return "\n".join([indented[0], *(f"{line[0]}\n{numbers}" for line, numbers in pairs)])


def _milli(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    milli = seconds * 1e3
    return f"{milli:.0f}" if milli >= 100 else f"{milli:.3g}"


def plot(report: Mapping[str, Any], path: pathlib.Path) -> None:
    """Time per step over bands with the limit, and the times of algebra and plans."""
    # An extra.
    from matplotlib.figure import Figure

    shown = [key for key in ("noise", "algebra") if report.get(key)]
    # A panel without a single time would show nothing but an axis that is made up.
    shown = [k for k in shown if any(row["implementations"] for row in report[k])] or shown[:1]
    figure = Figure(figsize=(6.5 * len(shown), 4.5), layout="constrained")
    panels = dict(zip(shown, figure.subplots(1, len(shown), squeeze=False)[0], strict=True))
    if axes := panels.get("noise"):
        rows = sorted(report["noise"], key=lambda row: row["bands"])
        for name in looks.LABELS:
            found = [(r["bands"], r["implementations"][name]) for r in rows if name in
                     r["implementations"]]  # fmt: skip
            if found:
                milli = [times["median_s"] * 1e3 for _, times in found]
                axes.plot([b for b, _ in found], milli, **looks.style(name))
        bands = [row["bands"] for row in rows]
        limit = [max(row["bounds"].values()) * 1e3 for row in rows]
        axes.plot(bands, limit, ":k", linewidth=1, label="limit")
        looks.over_bands(axes, bands)
        axes.set_ylabel("milliseconds per step")
        axes.set_title(f"Noise for {rows[0]['parameters']:,} parameters")
    if axes := panels.get("algebra"):
        rows = [row for row in report["algebra"] if row["implementations"]]
        for name in looks.LABELS:
            at = [i for i, row in enumerate(rows) if name in row["implementations"]]
            if at:
                milli = [rows[i]["implementations"][name]["median_s"] * 1e3 for i in at]
                axes.plot(milli, at, linestyle="none", **looks.style(name))
        axes.set_xscale("log")
        looks.log_ticks(axes.xaxis)
        titles = [row["what"].replace(", ", "\n", 1) for row in rows]
        axes.set_yticks(range(len(rows)), titles, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("milliseconds per call")
        axes.set_title("Algebra and plans")
    for axes in panels.values():
        axes.grid(True, which="both", linewidth=0.3)
    handles, labels = next(iter(panels.values())).get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    draw_whole(figure, path)
