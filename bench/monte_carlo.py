"""Monte Carlo privacy accounting: jax_privacy, plain JAX, C++.

    python bench/monte_carlo.py            # the full run: some minutes
    python bench/monte_carlo.py --quick    # a check that it works

Contestants sample privacy losses of both signs and sum up what delta takes. They take turns in one
process, with as many samples as each manages in a second or so; times are per sample and sign. The
peer has no calibration of its own: its two functions, in a loop, are what the samples cost. Cases:

  bins                 balls in bins: 1,000 steps, cycles of 100, 32 bands, one noise multiplier
  bins_long            the same for 100,000 steps, by C++ alone
  bins_sweep           the same for 20 noise multipliers, by this library
  min_sep              b-min-sep: 1,000 steps, 32 bands, probability 1/69
  min_sep_sweep        the same for 20 noise multipliers, by this library
  cyclic               cyclic Poisson: 1,000 steps, cycles of 32, probability 0.32; not in 2.0.0
  calibrate_bins       a whole calibration of `bins` for epsilon 2 and delta 1e-5, by C++
  calibrate_min_sep    the same of `min_sep`

`calibrate` drops noise multipliers once they have failed, as `bins_sweep` and `min_sep_sweep` do
not.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import harness
import matplotlib
import numpy as np
from jax_privacy import batch_selection
from jax_privacy.experimental.monte_carlo import delta_calculation as peer_deltas
from jax_privacy.experimental.monte_carlo import sample_generation as peer_samples

from jax_privacy_kernels import monte_carlo, ops

matplotlib.use("Agg")
import matplotlib.pyplot as plt

EPSILON, SIGMA = 2.0, 3.0
KEY = np.array([1, 2], np.uint32)


@dataclasses.dataclass(frozen=True)
class Case:
    """What is the same for all contestants in a row of the table."""

    scheme: monte_carlo.BallsInBins | monte_carlo.BMinSep | monte_carlo.CyclicPoisson
    bands: int
    samples: Mapping[str, int]  # Who takes part, and how many of each sign a call makes.
    sigmas: int = 1
    delta: float | None = None  # of a calibration
    floor: float | None = None  # what cpp has to reach, times the peer
    at_most: float | None = None  # seconds that cpp may take

    def smaller(self) -> Case:
        """The same at a size for a quick look."""
        scheme = dataclasses.replace(self.scheme, iterations=40)
        if isinstance(scheme, monte_carlo.BMinSep):
            scheme = dataclasses.replace(scheme, min_sep=4)
        else:
            scheme = dataclasses.replace(scheme, cycle_length=4)
        samples = dict.fromkeys(self.samples, 50)
        delta = None if self.delta is None else 0.05
        return dataclasses.replace(self, scheme=scheme, bands=3, samples=samples, delta=delta)

    @property
    def c_col(self) -> np.ndarray:
        """The square root of prefix sums, cut off and scaled to norm 1."""
        k = np.arange(1, self.bands)
        c = np.concatenate([[1.0], np.cumprod((2 * k - 1) / (2 * k))])
        return c / np.linalg.norm(c)


BINS = monte_carlo.BallsInBins(1000, 100)
MIN_SEP = monte_carlo.BMinSep(1000, 32, 1 / 69)
CYCLIC = monte_carlo.CyclicPoisson(1000, 32, 0.32)
CASES = {
    "bins": Case(BINS, 32, {"peer": 500, "jax": 2**14, "cpp": 2**20}, floor=500),
    "bins_long": Case(monte_carlo.BallsInBins(100_000, 100), 32, {"cpp": 2**20}),
    "bins_sweep": Case(BINS, 32, {"jax": 2**12, "cpp": 2**18}, sigmas=20),
    "min_sep": Case(MIN_SEP, 32, {"peer": 2000, "jax": 2**11, "cpp": 2**16}, floor=20),
    "min_sep_sweep": Case(MIN_SEP, 32, {"jax": 2**10, "cpp": 2**14}, sigmas=20),
    "cyclic": Case(CYCLIC, 32, {"jax": 2**11, "cpp": 2**16}),
    "calibrate_bins": Case(BINS, 32, {"cpp": 0}, delta=1e-5, at_most=60),
    "calibrate_min_sep": Case(MIN_SEP, 32, {"cpp": 0}, delta=1e-5, at_most=900),
}
BYTES = 200 * 10**6  # that a calibration may take


def peer_strategy(scheme: Any) -> Any:
    if isinstance(scheme, monte_carlo.BallsInBins):
        return batch_selection.BallsInBinsSampling(scheme.iterations, scheme.cycle_length)
    return batch_selection.BMinSepSampling(
        scheme.sampling_prob, scheme.iterations, scheme.min_sep, scheme.warm_start
    )


def by_peer(case: Case) -> list[float]:
    """Delta of either sign."""
    strategy, count = peer_strategy(case.scheme), case.samples["peer"]
    found = []
    for positive in (True, False):
        losses, _ = peer_samples.get_privacy_loss_sample(
            strategy, SIGMA, case.c_col, 1, positive, count
        )
        found.append(float(peer_deltas.delta_from_epsilon_and_samples(EPSILON, losses)))
    return found


def by_us(case: Case, name: str) -> Any:
    sigmas = np.geomspace(1.3, 1 / 1.3, case.sigmas) * SIGMA if case.sigmas > 1 else SIGMA
    count = case.samples[name]
    return ops.privacy_loss_sums(
        case.scheme, case.c_col, sigmas, EPSILON, key=KEY, num_samples=count
    ).sums.sum(axis=(1, 2))


def calibrated(case: Case) -> monte_carlo.Calibration:
    return monte_carlo.calibrate(
        case.scheme, case.c_col, epsilon=EPSILON, delta=case.delta or 0.0, seed=1
    )


def contestants(case: Case) -> dict[str, Callable[[], Any]]:
    """A call by each that takes part."""
    calls: dict[str, Callable[[], Any]] = {}
    for name in case.samples:
        if case.delta is not None:
            calls[name] = functools.partial(calibrated, case)
        elif name == "peer":
            calls[name] = functools.partial(by_peer, case)
        else:
            calls[name] = functools.partial(by_us, case, name)
    return {name: harness.contestant(name, call) for name, call in calls.items()}


def peak() -> int:
    """The most bytes of memory that this process has had, on Linux."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def lowered_peak() -> int | None:
    """The peak, after it was lowered to what is in use; None where that cannot be done."""
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return peak()


def measure(name: str, case: Case, repeats: int) -> dict[str, Any]:
    """Times those that take part in a case."""
    row: dict[str, Any] = {
        "case": name,
        "n": case.scheme.iterations,
        "bands": case.bands,
        "noise_multipliers": case.sigmas,
    }
    results: dict[str, Any] = {}
    processor: dict[str, float] = {}  # seconds of a core: hardly more on a busy machine

    def kept(who: str, call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> None:
            start = time.process_time()
            results[who] = call()
            processor[who] = min(time.process_time() - start, processor.get(who, math.inf))

        return run

    calls = {who: kept(who, call) for who, call in contestants(case).items()}
    if case.delta is not None:
        before = lowered_peak()
        times = harness.interleave(calls, warmup=1, repeats=0)
        found = results["cpp"]
        row |= {
            "samples": {"cpp": found.num_samples},
            "noise_multiplier": found.noise_multiplier,
            "unamplified": found.unamplified,
            "processor_s": processor["cpp"],
            "more_bytes": None if before is None else peak() - before,
        }
        return row | {"us_per_sample": {}, "speedup": {}, "implementations": times}
    times = harness.interleave(calls, warmup=2, repeats=repeats)
    # Per sample, sign and noise multiplier.
    each = {
        who: t["median_s"] / (2 * case.samples[who] * case.sigmas) * 1e6 for who, t in times.items()
    }
    speedup = {who: each["peer"] / t for who, t in each.items() if "peer" in each and who != "peer"}
    return row | {
        "samples": dict(case.samples),
        "us_per_sample": each,
        "processor_us_per_sample": {
            who: seconds / (2 * case.samples[who] * case.sigmas) * 1e6
            for who, seconds in processor.items()
        },
        "speedup": speedup,
        "implementations": times,
    }


def acceptance(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The floors that a release must hold; other sizes are left out."""
    checks, by_name = [], {row["case"]: row for row in rows}
    for name, row in by_name.items():
        case = CASES[name]
        if row["n"] != case.scheme.iterations:
            continue
        if case.floor is not None:
            what = f"{name}: cpp, times peer per sample"
            checks.append(harness.floor(what, row["speedup"]["cpp"], ">=", case.floor))
        if case.at_most is not None:
            seconds = row["implementations"]["cpp"]["median_s"]
            checks.append(harness.floor(f"{name}: cpp, seconds", seconds, "<=", case.at_most))
            checks.append(harness.floor(f"{name}: bytes", row["more_bytes"], "<=", BYTES))
    if {"bins", "bins_long"} <= by_name.keys() and checks:
        times = [by_name[name]["processor_us_per_sample"]["cpp"] for name in ("bins_long", "bins")]
        what = "bins_long: cpp, processor time, times bins"
        checks.append(harness.floor(what, times[0] / times[1], "<=", 1.3))
    return checks


def describe(report: dict[str, Any]) -> str:
    """The report as text."""
    header = ["case", "n", "sigmas", *(f"{n} us" for n in harness.NAMES), "jax x", "cpp x", "s"]
    header += [f"{n} core us" for n in ("peer", "cpp")]
    lines = []
    for row in report["rows"]:
        each, speedup = row["us_per_sample"], row["speedup"]
        core = row.get("processor_us_per_sample", {})
        lines.append(
            [
                row["case"],
                row["n"],
                row["noise_multipliers"],
                *(f"{each[n]:.3g}" if n in each else "-" for n in harness.NAMES),
                *(f"{speedup[n]:.0f}" if n in speedup else "-" for n in harness.NAMES[1:]),
                "/".join(f"{t['median_s']:.2g}" for t in row["implementations"].values()),
                *(f"{core[n]:.3g}" if n in core else "-" for n in ("peer", "cpp")),
            ]
        )
    busy = [
        f"{row['case']}: {row['processor_s']:.3g} s of a core, noise multiplier "
        f"{row['noise_multiplier']:.4g}, {row['unamplified']:.4g} without amplification"
        for row in report["rows"]
        if "processor_s" in row
    ]
    return harness.text(
        report,
        harness.table(header, lines),
        *busy,
        "us: per sample, sign and noise multiplier; s: of one call, of each that takes part; core: "
        "processor time",
    )


def plot(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Time per sample, sign and noise multiplier."""
    shown = [row for row in rows if row["us_per_sample"]]
    figure, axes = plt.subplots(figsize=(8, 1.4 + 0.5 * len(shown)), layout="constrained")
    for name in harness.NAMES:
        at = [i for i, row in enumerate(shown) if name in row["us_per_sample"]]
        times = [shown[i]["us_per_sample"][name] for i in at]
        axes.plot(times, at, linestyle="none", **harness.style(name))
    axes.set_xscale("log")
    harness.log_ticks(axes.xaxis)
    axes.set_yticks(range(len(shown)), [f"{row['case']}, n = {row['n']:,}" for row in shown])
    axes.invert_yaxis()
    axes.set_xlabel("microseconds per sample, sign and noise multiplier")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = harness.options(__doc__ or "", CASES)
    parser.add_argument("--repeats", type=int, default=7, help="rounds that are timed (7)")
    args: argparse.Namespace = parser.parse_args(argv)
    environment = harness.environment()
    rows = []
    for name in args.cases:
        case = CASES[name].smaller() if args.quick else CASES[name]
        print(f"{name} ...", flush=True)
        rows.append(measure(name, case, 2 if args.quick else args.repeats))
    return harness.publish("monte_carlo", environment, rows, acceptance, describe, plot, args)


if __name__ == "__main__":
    main()
