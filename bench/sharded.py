"""One step of correlated noise on 1 to 8 devices: time, work, memory. And a model of many GPUs.

    python bench/sharded.py            # the full run: two minutes, 3 GB of memory
    python bench/sharded.py --quick    # a check that it works
    python bench/sharded.py --model    # nothing is measured: docs/scaling.png and its tables

Devices are XLA's host devices, in a process of their own: eight of them, the meshes over the first
1, 2, 4 and 8. They share the machine's cores, so that a step does not get faster; what should stay
flat is work. It is measured as the processor time of all threads, next to that of one device
without a mesh, which takes turns with the meshes; and it is counted from the schedule
(scaling_model.py) over a whole cycle of b - 1 steps, all devices together:

  samples   of the elements that are refreshed, replicas included
  lanes     what is computed for them: samples are made in blocks of 128, and what a worker finds
            too little of for a block is filled up
  bytes     read and written by the kernel, in lines of 64 where elements are refreshed, which need
            not lie side by side: gradient, output, slot, and the ring of what is refreshed
  busiest   the samples of the device that has most at a step, over the mean of all, averaged over
            steps; other devices wait for it

With ZERO these are the kernel's, without bringing noise to the gradients and adding it. Cases, all
of leaves of two dimensions with rows of 1,000 and 128 elements, and of two small ones:

  rows             DEFAULT, gradients split on their first axis
  columns          DEFAULT, on their last axis: every device has a piece of every row
  zero_replicated  ZERO, gradients on every device: noise is gathered there
  zero_rows        ZERO, gradients split on their first axis
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import harness
import jax
import jax.numpy as jnp
import matplotlib
import noise
import numpy as np
from jax.sharding import AxisType, NamedSharding
from scaling_model import CASES, DEFAULT, SLOT, Case, all_work, plot_model, summarize, tables

from jax_privacy_kernels import noise_addition
from jax_privacy_kernels.ops import _leaves

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DEVICES = (1, 2, 4, 8)


def model_shapes(size: int) -> dict[str, tuple[int, ...]]:
    """Leaves of about that many elements in all; what is split divides into 8."""
    rows = {columns: 8 * max(size // (16 * columns), 1) for columns in (1000, 128)}
    return {
        "wide": (rows[1000], 1000),
        "narrow": (rows[128], 128),
        "bias": (1000,),
        "scale": (),
    }


# -- Measured ---------------------------------------------------------------------------------


class Runner:
    """A privatizer with its state on a mesh, or on one device without; a call takes a step."""

    def __init__(self, case: Case, bands: int, grads: dict[str, np.ndarray], devices: int | None):
        self._mesh = None
        arrays = {name: jnp.asarray(x) for name, x in grads.items()}
        strategy = DEFAULT
        if devices:
            strategy = case.strategy
            explicit = (AxisType.Explicit,)
            self._mesh = jax.make_mesh(
                (devices,), ("x",), axis_types=explicit, devices=jax.devices()[:devices]
            )
            arrays = {
                name: jax.device_put(x, NamedSharding(self._mesh, case.spec(x.shape, devices)))
                for name, x in grads.items()
            }
        privatizer = noise_addition.matrix_factorization_privatizer(
            noise.banded_toeplitz(noise.mechanisms, bands),
            stddev=1.0,
            prng_key=0,
            intermediate_strategy=strategy,
        )
        self._grads = arrays
        self._update = jax.jit(privatizer.update, donate_argnums=1)
        self.processor_seconds: list[float] = []
        with self._on_mesh():
            self._state = jax.block_until_ready(privatizer.init(arrays))

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        return jax.set_mesh(self._mesh) if self._mesh is not None else contextlib.nullcontext()

    def __call__(self) -> Any:
        start = time.process_time()
        with self._on_mesh():
            out, self._state = jax.block_until_ready(self._update(self._grads, self._state))
        self.processor_seconds.append(time.process_time() - start)
        return out

    def collectives(self) -> dict[str, int]:
        """How often the compiled step communicates, by kind."""
        with self._on_mesh():
            text = self._update.lower(self._grads, self._state).compile().as_text() or ""
        kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
        return dict(Counter(re.findall(rf"({kinds})(?:-start)?\(", text)))

    def state_bytes(self) -> list[int]:
        """Of the noise, on every device."""
        held: Counter[Any] = Counter()
        for leaf in jax.tree.leaves(self._state):
            for shard in leaf.addressable_shards:
                held[shard.device] += shard.data.nbytes
        return list(held.values())


def measure(
    name: str, bands: int, size: int, devices: Sequence[int], repeats: int
) -> Iterator[dict[str, Any]]:
    """Times the meshes of a case in turns with one device without a mesh."""
    case, shapes = CASES[name], model_shapes(size)
    rng = np.random.default_rng(0)
    grads = {n: rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}
    parameters = sum(math.prod(shape) for shape in shapes.values())
    runners = {str(n or "single"): Runner(case, bands, grads, n) for n in (None, *devices)}
    slots = bands - 1
    calls = slots * -(-repeats // slots)
    times = harness.interleave(runners, warmup=bands, repeats=calls)
    for label, runner in runners.items():
        times[label]["processor_s"] = float(np.median(runner.processor_seconds[-calls:]))
    outs = {label: runner() for label, runner in runners.items()}
    threads = max(harness.cores(), jax.device_count())  # XLA's, which it shares among devices
    leaves = [shapes[leaf] for leaf in sorted(shapes)]  # in the order of the tree
    one = summarize(all_work(CASES["rows"], leaves, 1, slots, threads))
    for n in devices:
        counted = summarize(all_work(case, leaves, n, slots, threads))
        single, mesh = times["single"], times[str(n)]
        yield {
            "case": name,
            "bands": bands,
            "devices": n,
            "parameters": parameters,
            "leaves": len(leaves),
            "state_bytes_per_device": max(runners[str(n)].state_bytes()),
            "ring_bytes": SLOT * slots * parameters,
            "collectives": runners[str(n)].collectives(),
            "leaves_to_gather": sum(case.gathers(shape, n) for shape in shapes.values()),
            "counted": counted,
            # To those of one device without a mesh.
            "relative": {
                **{what: counted[what] / one[what] for what in ("samples", "lanes", "bytes")},
                "median_s": mesh["median_s"] / single["median_s"],
                "processor_s": mesh["processor_s"] / single["processor_s"],
            },
            # The same noise: these leaves are split so that ZERO's comes in the same order.
            "max_difference": max(
                float(np.abs(np.asarray(x) - np.asarray(outs["single"][leaf])).max())
                for leaf, x in outs[str(n)].items()
            ),
            "implementations": {"single": single, "mesh": mesh},
        }


def measure_in_new_process(options: dict[str, Any]) -> list[dict[str, Any]]:
    """`measure` where there are as many devices as it takes."""
    count = max(options["devices"])
    flags = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={count}"
    run = subprocess.run(
        [sys.executable, __file__, "--measure", json.dumps(options)],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(run.stdout.splitlines()[-1])


def acceptance(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The floors that a release must hold, for what was measured."""
    checks = []
    for name in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == name]
        for what in ("samples", "lanes", "bytes"):
            value = max(row["relative"][what] for row in mine)
            checks.append(harness.floor(f"{name}: {what} of all devices", value, "<=", 1.02))
        # A tile for each leaf, and a kilobyte of keys and counters.
        spare = max(
            (row["state_bytes_per_device"] - row["ring_bytes"] / row["devices"] - 1024)
            / (row["leaves"] * (row["bands"] - 1) * SLOT * _leaves.TILE)
            for row in mine
        )
        checks.append(harness.floor(f"{name}: state beyond its share, tiles", spare, "<=", 1))
        others = max(
            sum(row["collectives"].values())
            - min(row["collectives"].get("all-gather", 0), row["leaves_to_gather"])
            for row in mine
        )
        what = "collectives but for noise of replicated leaves"
        checks.append(harness.floor(f"{name}: {what}", others, "<=", 0))
        different = max(row["max_difference"] for row in mine)
        checks.append(harness.floor(f"{name}: difference of noise", different, "<=", 0))
    return checks


def describe(report: dict[str, Any]) -> str:
    """The report as text."""
    header = ["case", "bands", "devices", "ms (p90)", "processor ms", "x one", "samples x"]
    header += ["lanes x", "bytes x", "busiest", "state MB per device", "communicates"]
    lines = []
    for row in report["rows"]:
        mesh, relative = row["implementations"]["mesh"], row["relative"]
        line = [row["case"], row["bands"], row["devices"]]
        line.append(f"{mesh['median_s'] * 1e3:.2f} ({mesh['p90_s'] * 1e3:.2f})")
        line += [f"{mesh['processor_s'] * 1e3:.2f}", f"{relative['processor_s']:.2f}"]
        line += [f"{relative[what]:.4f}" for what in ("samples", "lanes", "bytes")]
        line += [f"{row['counted']['busiest']:.3f}", f"{row['state_bytes_per_device'] / 1e6:.2f}"]
        line.append(" ".join(f"{n} {kind}" for kind, n in row["collectives"].items()) or "-")
        lines.append(line)
    what = (
        f"{report['rows'][0]['parameters']:,} float32 parameters in {report['rows'][0]['leaves']}"
    )
    return harness.text(report, what + " leaves", harness.table(header, lines))


LABELS = {
    "rows": "DEFAULT, first axis split",
    "columns": "DEFAULT, last axis split",
    "zero_replicated": "ZERO, gradients replicated",
    "zero_rows": "ZERO, first axis split",
}


def plot(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Processor time and lanes of all devices, and state per device, over the devices."""
    figure, panels = plt.subplots(1, 3, figsize=(13, 4.3), layout="constrained")
    values = (
        ("processor time of all devices, x one without mesh\n(measured)", "processor_s"),
        ("samples computed, empty lanes included, x one\n(counted)", "lanes"),
        ("state per device, MB\n(measured)", None),
    )
    few = sorted({row["bands"] for row in rows})
    styles = dict(zip(few, itertools.cycle(("-", "--", ":")), strict=False))
    for axes, (title, key) in zip(panels, values, strict=True):
        for (name, label), marker in zip(LABELS.items(), "osD^", strict=True):
            for bands in few:
                mine = [row for row in rows if (row["case"], row["bands"]) == (name, bands)]
                y = [
                    row["relative"][key] if key else row["state_bytes_per_device"] / 1e6
                    for row in mine
                ]
                x = [row["devices"] for row in mine]
                color = f"C{list(LABELS).index(name)}"
                marked = {"marker": marker, "markersize": 5, "fillstyle": "none"}
                text = f"{label}, {bands} bands"
                axes.plot(x, y, styles[bands], color=color, label=text, **marked)
        counts = sorted({row["devices"] for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(n) for n in counts])
        axes.set_xlabel("host devices, which share the cores")
        axes.set_title(title, fontsize=10)
        axes.grid(True, which="both", linewidth=0.3)
        if key == "processor_s":
            axes.set_ylim(bottom=0)
        elif key == "lanes":
            axes.set_ylim(0.99, max(1.1, axes.get_ylim()[1]))
        else:
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter("{x:g}")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    parser = harness.options(__doc__, CASES)
    parser.add_argument("--size", type=int, help="parameters, about (2^22)")
    parser.add_argument("--bands", type=int, nargs="+", help="2 and more (8 32)")
    parser.add_argument("--devices", type=int, nargs="+", choices=DEVICES, help="(1 2 4 8)")
    parser.add_argument("--repeats", type=int, help="timed steps, rounded up to whole cycles (62)")
    parser.add_argument(
        "--model", type=pathlib.Path, nargs="?", const=pathlib.Path("docs/scaling.png"),
        help="plot the model there (docs/scaling.png), print its tables, measure nothing",
    )  # fmt: skip
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.model:
        plot_model(args.model)
        print(tables())
        return None
    if args.measure:
        rows: list[dict[str, Any]] = []
        for name, bands in args.measure.pop("what"):
            rows += measure(name, bands, **args.measure)
            print(f"{name}, {bands} bands: done", file=sys.stderr, flush=True)
            jax.clear_caches()
            gc.collect()
        print(json.dumps(rows))
        return None

    bands = args.bands or ([3] if args.quick else [8, 32])
    if min(bands) < 2:
        parser.error(f"expected 2 bands or more, which have state; found {min(bands)}")
    options = {
        "what": [(name, b) for name in args.cases for b in bands],
        "size": args.size or (40_000 if args.quick else 2**22),
        "devices": args.devices or ([2] if args.quick else list(DEVICES)),
        "repeats": args.repeats or (3 if args.quick else 62),
    }
    environment = harness.environment()
    rows = measure_in_new_process(options)
    return harness.publish("sharded", environment, rows, acceptance, describe, plot, args)


if __name__ == "__main__":
    main()
