"""Time of one step of correlated noise on a GPU: jax_privacy, this library's implementations.

    python bench/gpu.py            # the full run: under eight minutes, 75 GB of GPU memory
    python bench/gpu.py --quick    # a check that it works, also without a GPU

A contestant takes chains of steps, each on the state of the one before (donated), and waits for the
last of a chain only: this is device time, unless a step is shorter than it takes to launch it. The
states are too large to be there together, so that contestants do not take turns but follow each
other; bandwidth and sampling rate are measured before and after all of them. At least b steps pass
before any is timed, since the first b - 1 differ. What does not fit in memory, or in the time
given, is left out, and the table says so. Cases:

  bands   2^28 float32 parameters in one leaf, 1 to 64 bands
  sizes   from 10^6 parameters on
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Sequence
from typing import Any

# Before JAX allocates: two states of 63 slots would not fit in less.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")

import harness
import jax
import jax.numpy as jnp
import matplotlib
import noise
import numpy as np

from jax_privacy_kernels.ops.correlated_noise import IMPLEMENTATIONS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LARGE = 2**28
CASES = {  # parameters and bands, what the floors are about first
    "bands": [(LARGE, bands) for bands in (8, 32, 1, 64, 2, 16)],
    "sizes": [(d, bands) for d in (10**6, 10**7, 2**26) for bands in (8, 1, 64)],
}
QUICK = {"bands": [(5_000, 1), (5_000, 3)], "sizes": [(1_000, 3)]}
CHAIN = 8  # steps, at least
SLICE = 4096  # elements at both ends of an output that are compared


def contestants() -> list[str]:
    """The peer, and the implementations that run on the default device, slowest first."""
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    ours = [n for n, e in IMPLEMENTATIONS.items() if platform in e.platforms]
    return ["peer", *(n for n in reversed(ours) if not IMPLEMENTATIONS[n].unavailable())]


def ends(out: jax.Array) -> np.ndarray:
    return np.concatenate([np.asarray(out[:SLICE]), np.asarray(out[-SLICE:])])


def measure_one(name: str, bands: int, grads: Any, repeats: int) -> tuple[Any, np.ndarray | None]:
    """The times of a contestant, or why there are none, and both ends of an output."""
    try:
        start = time.perf_counter()
        runner = noise.runner(name, noise.Case((bands,)), bands, grads, 1)
        out = jax.block_until_ready(runner())
        first = time.perf_counter() - start
        for _ in range(bands):
            out = runner()
        sample = ends(out["leaf"])
        del out
        steps = max(CHAIN, bands - 1)  # the schedule repeats after b - 1
        seconds = sorted(harness.chain(runner, steps) for _ in range(repeats))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return "out of memory", None
    return {
        "median_s": float(np.median(seconds)),
        "p90_s": float(np.percentile(seconds, 90)),
        "min_s": seconds[0],
        "max_s": seconds[-1],
        "first_call_s": first,
        "rounds": repeats,
        "steps_per_round": steps,
    }, sample


def measure(case: str, size: int, bands: int, repeats: int, deadline: float) -> dict[str, Any]:
    """Times all contestants on a leaf of this size, one after the other."""
    grads = {"leaf": jax.random.normal(jax.random.key(1), (size,), jnp.float32)}
    times: dict[str, Any] = {}
    missing: dict[str, str] = {}
    samples: dict[str, np.ndarray] = {}
    for name in contestants():
        if time.monotonic() > deadline:
            missing[name] = "no time left"
            continue
        result, sample = measure_one(name, bands, grads, repeats)
        if sample is None:
            missing[name] = result
        else:
            times[name], samples[name] = result, sample
        jax.clear_caches()
        gc.collect()
    return {
        "case": case,
        "bands": bands,
        "parameters": size,
        "bytes_per_step": noise.bytes_per_step((size, 4, 4), noise.look_ahead_passes(bands)),
        "implementations": times,
        "missing": missing,
        "speedup": harness.speedups(times, "median_s"),
        # All have taken the same number of steps, so that they must agree.
        "max_difference": {
            name: float(np.abs(sample - samples["peer"]).max())
            for name, sample in samples.items()
            if name != "peer" and "peer" in samples
        },
    }


def relate(row: dict[str, Any], limits: dict[str, float]) -> None:
    """Adds the times that the machine's limits allow, and how near the contestants come."""
    row["bounds"] = {
        "bandwidth_s": row["bytes_per_step"] / limits["copy_bytes_per_s"],
        "sampling_s": row["parameters"] / limits["samples_per_s"],
    }
    bound = max(row["bounds"].values())
    row["use"] = {
        name: {
            "bytes_per_s": row["bytes_per_step"] / t["median_s"],
            "samples_per_s": row["parameters"] / t["median_s"],
            "fraction_of_bound": bound / t["median_s"],
        }
        for name, t in row["implementations"].items()
        if name != "peer"
    }


def acceptance(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The floors for the largest size, of the kernels that are contestants here."""
    found = {row["bands"]: row for row in rows if row["parameters"] == LARGE}
    checks = []
    for name in ("triton", "pallas"):
        if not any(name in row["implementations"] or name in row["missing"] for row in rows):
            continue
        speedup, median, use = {}, {}, {}
        for bands, row in found.items():
            speedup[bands] = row["speedup"].get(name)
            median[bands] = row["implementations"].get(name, {}).get("median_s")
            use[bands] = row["use"].get(name, {}).get("fraction_of_bound")
        for bands, least in ((32, 8.0), (8, 2.5), (1, 1.0)):
            what = f"{name} at {bands} bands, times peer"
            checks.append(harness.floor(what, speedup.get(bands), ">=", least))
        few, many = median.get(8), median.get(64)
        ratio = many / few if few and many else None
        checks.append(harness.floor(f"{name} time at 64 bands over 8", ratio, "<=", 1.5))
        for bands in sorted(bands for _, bands in CASES["bands"]):
            what = f"{name} at {bands} bands, of the machine's limit"
            checks.append(harness.floor(what, use.get(bands), ">=", 0.5))
    return checks


def describe(report: dict[str, Any]) -> str:
    """The report as text."""
    limits, names = report["limits"], report["contestants"]
    header = ["parameters", "bands", *(f"{n} ms (p90)" for n in names)]
    header += [f"{n} x" for n in names[1:]]
    header += ["limit ms", *(f"{n} %" for n in names[1:]), "differ by"]
    lines = []
    for row in report["rows"]:
        times = row["implementations"]
        milli = [
            f"{times[n]['median_s'] * 1e3:.3f} ({times[n]['p90_s'] * 1e3:.3f})"
            if n in times
            else row["missing"][n]
            for n in names
        ]
        ratios = [f"{row['speedup'][n]:.1f}" if n in row["speedup"] else "" for n in names[1:]]
        use = [
            f"{row['use'][n]['fraction_of_bound'] * 100:.0f}" if n in row["use"] else ""
            for n in names[1:]
        ]
        bound = f"{max(row['bounds'].values()) * 1e3:.3f}"
        differ = f"{max(row['max_difference'].values(), default=0):.0e}"
        lines.append([f"{row['parameters']:,}", row["bands"], *milli, *ratios, bound, *use, differ])
    found = (
        f"limits: copy {limits['copy_bytes_per_s'] / 1e9:.0f} GB/s, read + written; "
        f"{limits['samples_per_s'] / 1e9:.1f} G samples/s"
    )
    return harness.text(report, found, harness.table(header, lines))


def plot(rows: Sequence[dict[str, Any]], path: Any) -> None:
    """Time per step over bands at the largest size, and over sizes at 8 bands, with the limits."""
    most = max(row["parameters"] for row in rows)
    bands = 8 if any(row["bands"] == 8 for row in rows) else rows[0]["bands"]
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axes, key, title, chosen in (
        (panels[0], "bands", f"{most:,} parameters", [r for r in rows if r["parameters"] == most]),
        (panels[1], "parameters", f"{bands} bands", [r for r in rows if r["bands"] == bands]),
    ):
        chosen = sorted(chosen, key=lambda row: row[key])
        for name in contestants():
            points = [
                (row[key], row["implementations"][name]["median_s"] * 1e3)
                for row in chosen
                if name in row["implementations"]
            ]
            if points:
                axes.plot(*zip(*points, strict=True), **harness.style(name))
        bound = [max(row["bounds"].values()) * 1e3 for row in chosen]
        axes.plot([row[key] for row in chosen], bound, ":k", linewidth=1, label="limit")
        axes.set_xscale("log", base=2 if key == "bands" else 10)
        if key == "bands":
            axes.set_xticks([row[key] for row in chosen], [str(row[key]) for row in chosen])
        axes.set_yscale("log")
        harness.log_ticks(axes.yaxis)
        axes.grid(True, which="both", linewidth=0.3)
        axes.set_xlabel(key)
        axes.set_title(title)
    panels[0].set_ylabel("milliseconds per step")
    panels[1].legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = harness.options(__doc__, CASES)
    parser.add_argument("--repeats", type=int, default=15, help="timed chains of steps (15)")
    parser.add_argument(
        "--seconds", type=float, default=420, help="after which nothing new is begun (420)"
    )
    args = parser.parse_args(argv)
    if not args.quick and jax.default_backend() != "gpu":
        parser.error(f"expected a GPU, found {jax.devices()}; --quick takes what there is")
    deadline = time.monotonic() + args.seconds
    cases, repeats = (QUICK, 3) if args.quick else (CASES, args.repeats)
    size = 10_000 if args.quick else LARGE

    device = jax.devices()[0]
    environment = {**harness.environment(), "device": device.device_kind}
    found = harness.device_limits(size, repeats)
    rows = []
    for case in args.cases:
        for parameters, bands in cases[case]:
            rows.append(measure(case, parameters, bands, repeats, deadline))
            print(f"{parameters:,} parameters, {bands} bands: done", flush=True)
    found = jax.tree.map(max, found, harness.device_limits(size, repeats))
    for row in rows:
        relate(row, found)
    return harness.publish(
        "gpu",
        environment,
        rows,
        acceptance,
        describe,
        plot,
        args,
        contestants=contestants(),
        limits=found,
    )


if __name__ == "__main__":
    main()
