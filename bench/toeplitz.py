"""Time of the algebra of strategies, Toeplitz or banded: jax_privacy, plain JAX, C++.

    python bench/toeplitz.py            # the full run: some minutes, 1 GB of memory
    python bench/toeplitz.py --quick    # a check that it works

Each public function is called as a user calls it, eagerly, by the contestants in turn and on the
same inputs: coefficients of the optimal strategy for prefix sums, the first b or all n of them.
Their results are compared. The first call of each finds nothing compiled, the others find what
earlier calls of their own have left. Who takes part, and how often at most, is up to the case:

  multiply     the product of two full matrices; a million coefficients for C++ alone
  inverse      coefficients of the inverse, of 32 bands or of all
  solve        a system of 32 bands
  min_sep      the squared sensitivity of a full strategy, participations 100 steps apart
  gram         the bound on the sensitivity from a Gram matrix, participations 5 steps apart
  error        the error of every query
  error_grad   the mean of them and its gradient
  rows         the error of every query of a banded strategy that is not Toeplitz
  rows_grad    the mean of them and its gradient

A name that ends in _large is of a size that jax_privacy is not asked for, one that ends in _float64
of 64 bits, JAX's 64-bit mode being on.
"""

from __future__ import annotations

import dataclasses
import gc
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import harness
import jax
import matplotlib
import numpy as np

from jax_privacy_kernels._bench import algebra

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAMES = harness.NAMES
PEER = algebra.peer()
OFTEN = 1_000_000  # times: as often as the options say


@dataclasses.dataclass(frozen=True)
class Case(algebra.Size):
    """What is the same for all contestants in a row of the table."""

    dtype: str = "float32"
    # Who takes part, and the most timed calls; 0 if the first call has to do for a median.
    repeats: Mapping[str, int] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(NAMES, OFTEN)
    )
    floor: float | None = None  # what cpp has to reach, times the peer
    at_most: float | None = None  # seconds that cpp may take

    def smaller(self) -> Case:
        """The same at a size for a quick look."""
        n = max(self.n // 100, 64)
        limit = self.max_participations
        return dataclasses.replace(
            self,
            n=n,
            bands=self.bands and min(self.bands, n),
            max_participations=limit and max(limit * n // self.n, 2),
            repeats=dict.fromkeys(self.repeats, OFTEN),
        )


PRODUCTS = ("multiply", "inverse", "solve")  # made of a product with each coefficient, for each row

SLOW_PEER = {"peer": 3, "jax": OFTEN, "cpp": OFTEN}
OURS_FEW = {"jax": 3, "cpp": OFTEN}
CASES = {
    "multiply": Case("multiply", 100_000, floor=100, repeats={"peer": 0, "jax": 5, "cpp": OFTEN}),
    "multiply_large": Case("multiply", 1_000_000, at_most=5, repeats={"cpp": 3}),
    "multiply_float64": Case("multiply", 10_000, dtype="float64"),
    "inverse": Case("inverse", 100_000, 32, floor=15),
    "inverse_float64": Case("inverse", 100_000, 32, dtype="float64"),
    "inverse_full": Case("inverse", 10_000, floor=10),
    "solve": Case("solve", 100_000, 32, floor=15),
    "min_sep": Case("min_sep", 100_000, min_sep=100, floor=5),
    "min_sep_float64": Case("min_sep", 100_000, min_sep=100, dtype="float64"),
    "gram": Case("gram", 500, min_sep=5, floor=20),
    "gram_float64": Case("gram", 500, min_sep=5, dtype="float64"),
    "gram_large": Case("gram", 4_000, min_sep=5, at_most=60, repeats=OURS_FEW),
    "gram_limited_large": Case(
        "gram", 4_000, min_sep=5, max_participations=100, at_most=60, repeats=OURS_FEW
    ),
    "error": Case("error", 100_000, 32),
    "error_grad": Case("error_grad", 100_000, 32),
    "error_grad_float64": Case("error_grad", 100_000, 32, dtype="float64"),
    "rows": Case("rows", 4_000, 32, repeats=SLOW_PEER),
    "rows_grad": Case("rows_grad", 4_000, 32, repeats=SLOW_PEER, floor=50),
    "rows_large": Case("rows", 100_000, 32, at_most=5, repeats=OURS_FEW),
}


def contestants(case: Case) -> dict[str, Callable[[], Any]]:
    """A call by each that takes part."""
    calls = {
        name: algebra.call(case, PEER if name == "peer" else algebra.OURS)
        for name in NAMES
        if name in case.repeats
    }
    return {name: harness.contestant(name, call) for name, call in calls.items()}


class Recorder:
    """A call that keeps its last result."""

    def __init__(self, call: Callable[[], Any]):
        self._call, self.result = call, None

    def __call__(self) -> Any:
        self.result = None  # Its memory is free again, as when a user drops it.
        self.result = self._call()
        return self.result


def multiply_adds(case: Case) -> int | None:
    """What the product of a matrix of m bands with a vector takes, term by term; None if it is not
    one.
    """
    m = case.coefficients
    return case.n * m - m * (m - 1) // 2 if case.function in PRODUCTS else None


def measure(name: str, case: Case, repeats: int) -> dict[str, Any]:
    """Times those that take part in a case."""
    calls = {n: Recorder(call) for n, call in contestants(case).items()}
    rounds = {n: min(repeats, most) for n, most in case.repeats.items()}
    times = harness.interleave(calls, warmup=2, repeats=rounds, fresh=True)
    results: dict[str, Any] = {n: call.result for n, call in calls.items()}
    if len(results) > 1:
        reference = next(iter(results))
    else:  # The strategy is the square root of prefix sums.
        assert case.function == "multiply"
        reference, results["exact"] = "exact", np.ones(case.n)
    terms = multiply_adds(case)
    return {
        "case": name,
        "function": case.function,
        "n": case.n,
        "coefficients": case.coefficients,
        "min_sep": case.min_sep,
        "max_participations": case.max_participations,
        "dtype": case.dtype,
        "reference": reference,
        "max_relative_difference": {
            n: algebra.difference(results[n], results[reference]) for n in times if n != reference
        },
        "multiply_adds": terms,
        "multiply_adds_per_s": {n: terms / t["median_s"] for n, t in times.items() if terms},
        "speedup": harness.speedups(times, "median_s"),
        "first_call_speedup": harness.speedups(times, "first_call_s"),
        "implementations": times,
    }


def acceptance(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The floors that a release must hold; those whose rows were not measured, or were at another
    size, are left out.
    """
    checks = []
    for row in rows:
        name, case = row["case"], CASES[row["case"]]
        if row["n"] != case.n:
            continue
        if case.floor is not None:
            what = f"{name}: cpp, times peer"
            checks.append(harness.floor(what, row["speedup"]["cpp"], ">=", case.floor))
        if case.at_most is not None:
            seconds = row["implementations"]["cpp"]["median_s"]
            checks.append(harness.floor(f"{name}: cpp, seconds", seconds, "<=", case.at_most))
        if "peer" in row["implementations"]:
            value = row["first_call_speedup"]["cpp"]
            checks.append(harness.floor(f"{name}: first call of cpp, times peer", value, ">=", 1))
    return checks


def describe(report: dict[str, Any]) -> str:
    """The report as text."""
    header = ["case", "n", "coefs", *(f"{n} ms" for n in NAMES), "jax x", "cpp x"]
    header += [*(f"{n} first" for n in NAMES), "first x", "jax Gmadd/s", "cpp Gmadd/s"]
    header += ["rounds", "differ by"]
    lines = []
    for row in report["rows"]:
        times, rates = row["implementations"], row["multiply_adds_per_s"]

        def milli(name: str, key: str, times: dict[str, Any] = times) -> str:
            return f"{times[name][key] * 1e3:.4g}" if name in times else "-"

        def ratio(key: str, name: str, row: dict[str, Any] = row) -> str:
            return f"{row[key][name]:.1f}" if name in row[key] else "-"

        lines.append(
            [
                row["case"],
                row["n"],
                row["coefficients"],
                *(milli(n, "median_s") for n in NAMES),
                *(ratio("speedup", n) for n in NAMES[1:]),
                *(milli(n, "first_call_s") for n in NAMES),
                ratio("first_call_speedup", "cpp"),
                *(f"{rates[n] / 1e9:.3g}" if n in rates else "-" for n in NAMES[1:]),
                "/".join(str(t["rounds"]) for t in times.values()),
                f"{max(row['max_relative_difference'].values()):.0e}",
            ]
        )
    return harness.text(report, harness.table(header, lines))


def label(row: dict[str, Any]) -> str:
    """A row in words."""
    sizes = {key: row[key] for key in ("function", "n", "min_sep", "max_participations")}
    size = algebra.Size(bands=row["coefficients"], **sizes).label
    dtype = "" if row["dtype"] == "float32" else f", {row['dtype']}"
    return f"{algebra.TITLES[row['function']]}\n{size}{dtype}"


def plot(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Time of a call and of the first one, case by case."""
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.48 * len(rows)), layout="constrained")
    for name in NAMES:
        at = [i for i, row in enumerate(rows) if name in row["implementations"]]
        times = [rows[i]["implementations"][name] for i in at]
        style: dict[str, Any] = {**harness.style(name), "linestyle": "none"}
        milli = [t["median_s"] * 1e3 for t in times]
        axes.plot(milli, at, **style, zorder=3)
        first = [t["first_call_s"] * 1e3 for t in times]
        style |= {"fillstyle": "none", "markersize": 9}  # To be seen around a median as well.
        style["label"] += ", first call"
        axes.plot(first, at, **style)
    axes.set_xscale("log")
    harness.log_ticks(axes.xaxis)
    axes.set_yticks(range(len(rows)), [label(row) for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.grid(True, axis="x", which="both", linewidth=0.3)
    axes.grid(True, axis="y", linewidth=0.3)
    axes.set_xlabel("milliseconds per call")
    axes.set_title("Toeplitz algebra and sensitivities, CPU")
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1))  # beside the marks, not over them
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = harness.options(__doc__, CASES)
    parser.add_argument("--repeats", type=int, help="timed calls, at most (20)")
    args = parser.parse_args(argv)
    repeats = args.repeats or (3 if args.quick else 20)

    environment, rows = harness.environment(), []
    with jax.default_device(jax.devices("cpu")[0]):
        for name in args.cases:
            case = CASES[name].smaller() if args.quick else CASES[name]
            with jax.enable_x64(case.dtype == "float64"):
                if not args.quick:  # What a first use imports and loads is nobody's to pay.
                    measure(name, case.smaller(), 1)
                rows.append(measure(name, case, repeats))
            print(f"{name}: done", flush=True)
            gc.collect()
    return harness.publish("toeplitz", environment, rows, acceptance, describe, plot, args)


if __name__ == "__main__":
    main()
