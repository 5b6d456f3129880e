"""Time of one step of correlated noise: jax_privacy, this library in plain JAX, its C++ kernel.

    python bench/noise.py            # the full run: a quarter of an hour, 11 GB of memory
    python bench/noise.py --quick    # a check that it works

The three take turns on the same gradients, key and strategy, each with its own state, and their
outputs are compared. At least b steps pass before any is timed, since the first b - 1 differ; timed
is every other step, over whole cycles of b - 1 of them, after which the look-ahead schedule
repeats: the first after a switch would pay for what the one before gave back to the system. Cases:

  bands     one float32 leaf, the state donated
  leaves    a tree of 200 leaves of 1,000 elements
  scan      steps inside lax.scan, where the output does not need fresh memory
  in_place  the gradients donated as well, each output being the next step's gradients
  copied    the state not donated: it is copied at every step
  float64   gradients and noise of 64 bits
  bfloat16  gradients of 16 bits, noise of 32
  secure    a chacha20 key, as privatizers draw; before that the kernel with it beside the kernel
            with a threefry2x32 key, the two alone, as the others' states would crowd theirs out
  grid      exact noise of integers, by C++ alone, as plain JAX takes minutes; beside steps in
            floats by jax_privacy and by this library, and for one band beside discrete Gaussians
            in NumPy (discrete_gaussian.py)

and for other noising matrices than the inverse of a banded Toeplitz strategy, all of them one
float32 leaf, the state donated, "bands" being the size of the mechanism:

  by_row    a banded strategy with coefficients of its own in every column, 1,000 steps
  inverse   a banded inverse: a moving average of the samples, which jax_privacy does not have
  buffers   a buffered linear Toeplitz strategy (BLT)
  dense     rows of a matrix with that many non-zeros
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import discrete_gaussian
import harness
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jax_privacy import matrix_factorization as peer_mechanisms
from jax_privacy import noise_addition as peer_noise_addition

from jax_privacy_kernels import grid, noise_addition, random
from jax_privacy_kernels import matrix_factorization as mechanisms
from jax_privacy_kernels._bench.steps import Runner, bytes_per_step, look_ahead_passes

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAMES = harness.NAMES
FEW = (8,)  # where one band count shows the effect
# Of exact noise: in steps of the grid, and the bits of coefficients after the point.
GRID_STDDEV, FRACTION_BITS = 2.0**20, 12


# -- Noising matrices of a size, by either library's modules ----------------------------------


def banded_toeplitz(library: Any, bands: int) -> Any:
    coef = mechanisms.toeplitz.optimal_max_error_strategy_coefs(bands)
    return library.toeplitz.inverse_as_streaming_matrix(coef)


def rounded_banded_toeplitz(library: Any, bands: int) -> Any:
    coef = mechanisms.toeplitz.optimal_max_error_strategy_coefs(bands)
    return library.toeplitz.inverse_as_streaming_matrix(grid.round_coefs(coef, FRACTION_BITS))


def banded_by_row(library: Any, bands: int) -> Any:
    params = mechanisms.banded.ColumnNormalizedBanded.default(1000, bands).params
    return library.banded.ColumnNormalizedBanded(params=params).inverse_as_streaming_matrix()


def banded_inverse(library: Any, bands: int) -> Any:
    coef = mechanisms.toeplitz.banded_inverse_square_root_noising_coefs(bands)
    return library.toeplitz.noising_coef_as_streaming_matrix(coef)


def buffers(library: Any, bands: int) -> Any:
    parameters = np.linspace(0.99, 0.5, bands), np.linspace(0.1, 0.3, bands) / bands
    build = library.buffered_toeplitz.BufferedToeplitz.build
    return build(*parameters, dtype=jnp.float32).inverse_as_streaming_matrix()


def dense_rows(library: Any, bands: int) -> Any:
    del library
    rows = np.lib.stride_tricks.sliding_window_view(np.eye(100 + bands), bands, axis=1)
    return jnp.asarray(rows.sum(axis=2)[:, :100].T, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """How a noising matrix is made, and what a step of this library's schedule costs.

    Per parameter: passes over the state, in slots, and samples.
    """

    matrix: Callable[[Any, int], Any]
    slot_passes: Callable[[int], float]
    samples: Callable[[int], float] = lambda bands: 1
    ahead: bool = True  # whether there are slots: one less than bands
    peer: bool = True  # whether jax_privacy has it


BANDED = Mechanism(banded_toeplitz, look_ahead_passes)
ROUNDED = Mechanism(rounded_banded_toeplitz, look_ahead_passes)
BY_ROW = Mechanism(banded_by_row, look_ahead_passes)
BUFFERS = Mechanism(buffers, lambda bands: 2 * bands, ahead=False)
DENSE = Mechanism(dense_rows, lambda bands: 0, lambda bands: bands, ahead=False)
INVERSE = Mechanism(
    banded_inverse,
    lambda bands: 2 - 1 / (bands - 1),
    lambda bands: 2,  # p - 1 slots take 2 (p - 1) samples
    peer=False,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """What is the same for all implementations in a row of the table."""

    bands: tuple[int, ...]
    mechanism: Mechanism = BANDED
    dtype: str = "float32"  # of the gradients
    noise_dtype: str | None = None
    many_leaves: bool = False
    scan: bool = False
    donate: tuple[int, ...] = (1,)  # of update(grads, state)
    secure: bool = False  # a chacha20 key
    exact: bool = False  # of integers, but for jax_privacy

    @property
    def names(self) -> tuple[str, ...]:
        if self.exact:  # plain JAX, bit for bit the same, takes minutes for what takes seconds
            return ("peer", "cpp")
        return NAMES if self.mechanism.peer else NAMES[1:]


CASES = {
    "bands": Case((1, 2, 4, 8, 16, 32, 64)),
    "leaves": Case((1, 8, 32), many_leaves=True),
    "scan": Case((1, 8, 32), scan=True),
    "in_place": Case(FEW, donate=(0, 1)),
    "copied": Case((8, 32, 64), donate=()),
    "float64": Case(FEW, dtype="float64"),
    "bfloat16": Case(FEW, dtype="bfloat16", noise_dtype="float32"),
    "secure": Case((1, 8, 32), secure=True),
    "grid": Case((1, 32), ROUNDED, secure=True, exact=True),
    "by_row": Case((32,), BY_ROW),
    "inverse": Case((16,), INVERSE),
    "buffers": Case((4,), BUFFERS),
    "dense": Case((64,), DENSE),
}


def runner(name: str, case: Case, bands: int, grads: Any, steps: int) -> Runner:
    """Of a contestant; a call takes some steps, where the case is a scan."""
    key = random.secure_key(bytes(32)) if case.secure else jax.random.key(0)
    options: dict[str, Any] = {"stddev": 1.0, "prng_key": key, "dtype": case.noise_dtype}
    if name == "peer":
        matrix = case.mechanism.matrix(peer_mechanisms, bands)
        privatizer = peer_noise_addition.matrix_factorization_privatizer(matrix, **options)
    else:
        matrix = case.mechanism.matrix(mechanisms, bands)
        make: Any = noise_addition.matrix_factorization_privatizer
        if case.exact:
            grads = jax.tree.map(lambda g: jnp.round(1000 * g).astype(jnp.int32), grads)
            make, options = grid.privatizer, {"stddev": GRID_STDDEV, "prng_key": key}
        privatizer = make(matrix, implementation=name, **options)
    return Runner(privatizer, grads, donate=case.donate, scan=steps if case.scan else None)


def measure(
    name: str, case: Case, bands: int, shapes: Sequence[int], repeats: int
) -> dict[str, Any]:
    """Times the three implementations on leaves of these sizes."""
    rng = np.random.default_rng(0)
    grads = {
        f"leaf{i:03}": jnp.asarray(rng.standard_normal(n, np.float32), case.dtype)
        for i, n in enumerate(shapes)
    }
    cycle = max(bands - 1, 1) if case.mechanism.ahead else 1
    steps = cycle * -(-8 // cycle) if case.scan else 1
    calls = cycle * -(-repeats // cycle) if not case.scan else max(repeats // 4, 2)
    warmup = max(cycle + 1, 3) if not case.scan else 2
    streams: dict[str, Any] = {}
    if case.secure and not case.exact:
        pair = {
            "chacha20": runner("cpp", case, bands, grads, steps),
            "threefry2x32": runner(
                "cpp", dataclasses.replace(case, secure=False), bands, grads, steps
            ),
        }
        streams = harness.interleave(pair, warmup=warmup, repeats=2 * calls, settle=True)
        del pair
        gc.collect()
    names = case.names
    runners = {n: runner(n, case, bands, grads, steps) for n in names}
    others: dict[str, Callable[[], Any]] = {}
    if case.exact:
        others["float"] = runner("cpp", dataclasses.replace(case, exact=False), bands, grads, steps)
        if bands == 1:
            draw = functools.partial(discrete_gaussian.discrete_gaussian, rng, GRID_STDDEV)
            others["discrete_gaussian"] = functools.partial(draw, sum(shapes))
    rounds = {n: min(calls, 3) if n == "discrete_gaussian" else calls for n in (*names, *others)}
    times = harness.interleave({**runners, **others}, warmup=warmup, repeats=rounds, settle=True)
    # All have taken the same number of steps, so that they must agree, but for other mechanisms.
    alike = names[1:] if case.exact else names
    outs = {n: [np.asarray(x, np.float64) for x in runners[n]().values()] for n in alike}
    for t in times.values():
        t.update({key: t[key] / steps for key in ("median_s", "p90_s", "min_s", "max_s")})
    slot = np.dtype(case.noise_dtype or case.dtype)
    parameters = sum(shapes)
    return {
        # Of other noise, not another implementation of the same step.
        **{key: times.pop(key) for key in others},
        **({"streams": streams} if streams else {}),
        "case": name,
        "bands": bands,
        "leaves": len(shapes),
        "parameters": parameters,
        "dtype": case.dtype,
        "noise_dtype": slot.name,
        "steps_per_call": steps,
        "bytes_per_step": bytes_per_step(
            (parameters, jnp.dtype(case.dtype).itemsize, slot.itemsize),
            case.mechanism.slot_passes(bands),
        ),
        "samples_per_step": parameters * case.mechanism.samples(bands),
        "max_difference": {
            n: max(float(np.abs(a - b).max()) for a, b in zip(outs[n], outs[alike[0]], strict=True))
            for n in alike[1:]
        },
        "speedup": harness.speedups(times, "median_s"),
        "implementations": times,
    }


def relate(row: dict[str, Any], limits: dict[str, Any]) -> None:
    """Adds to a row the times that the machine's limits allow, and how near the kernel comes."""
    bounds = {
        "bandwidth_s": row["bytes_per_step"] / limits["copy_bytes_per_s"],
        "sampling_s": row["samples_per_step"]
        / limits["samples_per_s"][row["noise_dtype"]]["kernel"],
    }
    seconds = row["implementations"]["cpp"]["median_s"]
    row["bounds"] = bounds
    row["cpp"] = {
        "samples_per_s": row["samples_per_step"] / seconds,
        "bytes_per_s": row["bytes_per_step"] / seconds,
        "fraction_of_bound": max(bounds.values()) / seconds,
    }


def acceptance(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The floors that a release must hold; those whose rows were not measured are left out."""
    found = {(row["case"], row["bands"]): row for row in rows}
    floors = [("bands", "cpp", 1, 4), ("bands", "cpp", 2, 4), ("bands", "cpp", 8, 8)]
    floors += [("bands", "cpp", 32, 15), ("bands", "jax", 32, 3)]
    floors += [("leaves", "cpp", bands, 1) for bands in CASES["leaves"].bands]
    floors += [
        ("grid", "cpp", 32, 4),
        ("by_row", "cpp", 32, 9),
        ("buffers", "cpp", 4, 8),
        ("dense", "cpp", 64, 6),
    ]
    checks = [
        harness.floor(
            f"{case}: {name} at {bands} bands, times peer",
            found[case, bands]["speedup"][name],
            ">=",
            least,
        )
        for case, name, bands, least in floors
        if (case, bands) in found
    ]
    for case, bands in found:
        if case == "secure":
            streams = found[case, bands]["streams"]
            ratio = streams["chacha20"]["median_s"] / streams["threefry2x32"]["median_s"]
            what = f"secure: cpp time at {bands} bands over that with a threefry2x32 key"
            checks.append(harness.floor(what, ratio, "<=", 1.15))
        if case == "grid":
            row = found[case, bands]
            exact = row["implementations"]["cpp"]["median_s"]
            what = f"grid: cpp time at {bands} bands over the step in floats"
            checks.append(harness.floor(what, exact / row["float"]["median_s"], "<=", 2))
            if "discrete_gaussian" in row:
                ratio = row["discrete_gaussian"]["median_s"] / exact
                what = "grid: discrete Gaussians in NumPy over cpp time at 1 band"
                checks.append(harness.floor(what, ratio, ">=", 40))
    for one, other, what, most in (
        (("bands", 64), ("bands", 8), "bands: cpp time at 64 bands over 8", 1.6),
        (("inverse", 16), ("bands", 16), "inverse: cpp time over bands, both at 16", 1.5),
    ):
        if one in found and other in found:
            times = (found[case]["implementations"]["cpp"]["median_s"] for case in (one, other))
            checks.append(harness.floor(what, next(times) / next(times), "<=", most))
    return checks


def describe(report: dict[str, Any]) -> str:
    """The report as text."""
    limits = report["limits"]
    rates = "; ".join(
        f"{dtype} {rate['kernel'] / 1e6:.0f} M samples/s (jax.random.normal "
        f"{rate['jax.random.normal'] / 1e6:.0f})"
        for dtype, rate in limits["samples_per_s"].items()
    )
    copy = f"copy {limits['copy_bytes_per_s'] / 1e9:.1f} GB/s, read + written"
    header = ["case", "bands", "parameters", *(f"{n} ms (p90)" for n in NAMES), "jax x", "cpp x"]
    header += [
        "chacha20 ms",
        "threefry2x32 ms",
        "float ms",
        "cpp Ms/s",
        "cpp GB/s",
        "% of bound",
        "first call s",
        "differ by",
    ]
    lines = []
    for row in report["rows"]:
        times, cpp = row["implementations"], row["cpp"]
        milli = [
            f"{times[n]['median_s'] * 1e3:.2f} ({times[n]['p90_s'] * 1e3:.2f})"
            if n in times
            else "-"
            for n in NAMES
        ]
        ratios = [f"{row['speedup'][n]:.1f}" if n in row["speedup"] else "-" for n in NAMES[1:]]
        streams = row.get("streams", {})
        for other in (*map(streams.get, ("chacha20", "threefry2x32")), row.get("float")):
            ratios.append(f"{other['median_s'] * 1e3:.2f}" if other else "-")
        use = [f"{cpp['samples_per_s'] / 1e6:.0f}", f"{cpp['bytes_per_s'] / 1e9:.1f}"]
        use.append(f"{cpp['fraction_of_bound'] * 100:.0f}")
        first = " ".join(f"{times[n]['first_call_s']:.2f}" for n in NAMES if n in times)
        differ = f"{max(row['max_difference'].values()):.0e}" if row["max_difference"] else "-"
        size = f"{row['leaves']} x {row['parameters'] // row['leaves']:.0e}"
        lines.append([row["case"], row["bands"], size, *milli, *ratios, *use, first, differ])
    return harness.text(report, f"limits: {copy}; {rates}", harness.table(header, lines))


def plot(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Time per step over bands, with the machine's limits."""
    rows = sorted((row for row in rows if row["case"] == "bands"), key=lambda row: row["bands"])
    if not rows:
        return
    bands = [row["bands"] for row in rows]
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name in NAMES:
        milli = [row["implementations"][name]["median_s"] * 1e3 for row in rows]
        axes.plot(bands, milli, **harness.style(name))
    limits = {"sampling_s": "limit: samples / rate", "bandwidth_s": "limit: bytes / bandwidth"}
    for (key, label), style in zip(limits.items(), ("--", ":"), strict=True):
        bound = [row["bounds"][key] * 1e3 for row in rows]
        axes.plot(bands, bound, style, color="black", linewidth=1, label=label)
    harness.over_bands(axes, bands)
    axes.grid(True, which="both", linewidth=0.3)
    axes.set_ylabel("milliseconds per step")
    axes.set_title(f"Correlated noise for {rows[0]['parameters']:,} parameters, float32, CPU")
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1))  # beside the curves, not over them
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = harness.options(__doc__, CASES)
    parser.add_argument("--size", type=int, help="elements of the one leaf (10,000,000)")
    parser.add_argument(
        "--bands", type=int, nargs="+", help="band counts, in place of every case's own"
    )
    parser.add_argument("--repeats", type=int, help="timed steps, rounded up to whole cycles (20)")
    args = parser.parse_args(argv)
    size = args.size or (5_000 if args.quick else 10_000_000)
    leaf_count = 5 if args.quick else 200
    repeats = args.repeats or (3 if args.quick else 20)
    used = {CASES[name].noise_dtype or CASES[name].dtype for name in args.cases}
    megabytes, limit_repeats = (4, 3) if args.quick else (256, 20)

    environment, rows = harness.environment(), []
    with jax.default_device(jax.devices("cpu")[0]):
        limits = harness.machine_limits(sorted(used), megabytes, limit_repeats)
        for name in args.cases:
            case = CASES[name]
            shapes = [1_000] * leaf_count if case.many_leaves else [size]
            few = sorted({min(b, 3) for b in case.bands})
            for b in args.bands or (few if args.quick else case.bands):
                with jax.enable_x64(case.dtype == "float64"):
                    rows.append(measure(name, case, b, shapes, repeats))
                print(f"{name}, {b} bands: done", flush=True)
                # Memory for the next states, and nothing compiled before that it could share.
                jax.clear_caches()
                gc.collect()
        after = harness.machine_limits(sorted(used), megabytes, limit_repeats)
        limits = jax.tree.map(max, limits, after)
    for row in rows:
        relate(row, limits)
    return harness.publish(
        "noise", environment, rows, acceptance, describe, plot, args, limits=limits
    )


if __name__ == "__main__":
    main()
