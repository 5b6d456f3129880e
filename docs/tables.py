"""Tables of the site, made from what benchmarks have written to bench/results/.

`python docs/tables.py` draws docs/bands.png, the picture of README.md, from them.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = [
    "environment",
    "first_calls",
    "markdown",
    "newest",
    "noise_rows",
    "plot_bands",
    "toeplitz_rows",
]

DOCS = pathlib.Path(__file__).parent
RESULTS = DOCS.parent / "bench" / "results"
NAMES = {"peer": "jax_privacy", "jax": "`jax`", "cpp": "`cpp`"}


def newest(benchmark: str) -> dict[str, Any]:
    """The newest results of a benchmark, or of some of its cases that have a file of their own."""
    paths = sorted(RESULTS.glob(f"{benchmark}-[0-9]*.json"))
    if not paths:
        raise FileNotFoundError(f"expected results of {benchmark} in {RESULTS}, found none")
    return json.loads(paths[-1].read_text())


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown, numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def environment(report: dict[str, Any]) -> str:
    """Where and when it was measured, in a sentence."""
    found = report["environment"]
    return (
        f"Measured {found['date']} on {found['cores']} cores of {found['cpu']}, SIMD "
        f"{found['simd']}, JAX {found['jax']}, jax-privacy {found['jax-privacy']}."
    )


def noise_rows(report: dict[str, Any], case: str) -> str:
    """Milliseconds per step of a case of bench/noise.py, band by band."""
    rows = sorted((r for r in report["rows"] if r["case"] == case), key=lambda row: row["bands"])
    lines = []
    for row in rows:
        times, limit = row["implementations"], max(row["bounds"].values())
        lines.append(
            [
                row["bands"],
                *(_milli(times[name]["median_s"]) if name in times else "-" for name in NAMES),
                f"{row['speedup']['cpp']:.1f}x" if "cpp" in row["speedup"] else "-",
                _milli(limit),
            ]
        )
    return markdown(["bands", *NAMES.values(), "`cpp` against jax_privacy", "limit"], lines)


def toeplitz_rows(report: dict[str, Any]) -> str:
    """Milliseconds per call of the cases of bench/toeplitz.py that jax_privacy takes part in."""
    lines = []
    for row in report["rows"]:
        times = row["implementations"]
        if "peer" in times:
            size = f"n = {row['n']:,}"
            if row["coefficients"] < row["n"]:
                size += f", b = {row['coefficients']}"
            if row["dtype"] != "float32":
                size += f", {row['dtype']}"
            speedup = f"{row['speedup']['cpp']:.1f}x"
            milli = [_milli(times[name]["median_s"]) for name in NAMES]
            lines.append([f"{row['function']}, {size}", *milli, speedup])
    return markdown(["", *NAMES.values(), "`cpp` against jax_privacy"], lines)


def first_calls(report: dict[str, Any]) -> str:
    """Seconds of the first call of a process, and of later ones, of bench/optimize.py."""
    lines = []
    for row in report["rows"]:
        for name, label in NAMES.items():
            times = row["implementations"].get(name)
            if times:
                again = f"{times['median_s']:.3f}" if "median_s" in times else "-"
                arguments = f"n = {row['arguments']['n']:,}"
                first = f"{times['first_call_s']:.2f}"
                lines.append([f"{row['function']}, {arguments}", label, first, again])
    return markdown(["", "by", "first call, s", "again, s"], lines)


def _milli(seconds: float) -> str:
    milli = seconds * 1e3
    return f"{milli:,.0f}" if milli >= 100 else f"{milli:.3g}"


def plot_bands(path: pathlib.Path) -> None:
    """Time of a step over bands, of jax_privacy and of this library."""
    from matplotlib.figure import Figure

    from jax_privacy_kernels._bench import looks

    report = newest("noise")
    rows = sorted((r for r in report["rows"] if r["case"] == "bands"), key=lambda r: r["bands"])
    bands = [row["bands"] for row in rows]
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    for name in ("peer", "cpp"):
        milli = [row["implementations"][name]["median_s"] * 1e3 for row in rows]
        label = "jax_privacy" if name == "peer" else "this library"
        axes.plot(bands, milli, **{**looks.style(name), "label": label})
        for at in (0, -1):
            axes.annotate(
                f"{milli[at]:.0f} ms", (bands[at], milli[at]), (0, 8), textcoords="offset points",
                ha="center",
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(bands, [str(b) for b in bands])
    axes.minorticks_off()
    axes.set_yscale("log")
    axes.set_ylim(5, 2000)
    looks.log_ticks(axes.yaxis)
    axes.set_xlabel("bands of the strategy")
    axes.set_ylabel("milliseconds per step")
    axes.set_title(f"Noise for {rows[0]['parameters']:,} parameters on two cores")
    axes.grid(True, linewidth=0.3)
    axes.legend(loc="center right")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    plot_bands(DOCS / "bands.png")
