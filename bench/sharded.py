"""One step of correlated noise on 1 to 8 devices: time, work, memory. And a model of many GPUs.

    python bench/sharded.py            # the full run: two minutes, 3 GB of memory
    python bench/sharded.py --quick    # a check that it works
    python bench/sharded.py --model    # nothing is measured: docs/scaling.png and its tables

Devices are XLA's host devices, in a process of their own: eight of them, the meshes over the first
1, 2, 4 and 8. They share the machine's cores, so that a step does not get faster; what should stay
flat is work. It is measured as the processor time of all threads, next to that of one device
without a mesh, which takes turns with the meshes; and it is counted from the schedule
(csrc/visits.h) over a whole cycle of b - 1 steps, all devices together:

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
import dataclasses
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
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_privacy_kernels import noise_addition
from jax_privacy_kernels.ops import _shards
from jax_privacy_kernels.ops.correlated_noise import _schedule

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ZERO = noise_addition.SupportedStrategies.ZERO
DEFAULT = noise_addition.SupportedStrategies.DEFAULT
DEVICES = (1, 2, 4, 8)
LANES = 128  # kBlock of csrc/normal.h
LINE = 64  # bytes that a processor moves at a time
SLOT = 4  # bytes of a float32


@dataclasses.dataclass(frozen=True)
class Case:
    """How gradients are laid out, and the noise."""

    strategy: Any
    axis: int | None  # of the gradients that is split, where it divides

    def spec(self, shape: tuple[int, ...], devices: int) -> PartitionSpec:
        entries: list[str | None] = [None] * len(shape)
        if shape and self.axis is not None and shape[self.axis] % devices == 0:
            entries[self.axis] = "x"
        return PartitionSpec(*entries)

    def gathers(self, shape: tuple[int, ...], devices: int) -> bool:
        """Whether the noise of a leaf has to go from all devices to all."""
        return self.strategy == ZERO and devices > 1 and "x" not in self.spec(shape, devices)


CASES = {
    "rows": Case(DEFAULT, 0),
    "columns": Case(DEFAULT, -1),
    "zero_replicated": Case(ZERO, None),
    "zero_rows": Case(ZERO, 0),
}


def model_shapes(size: int) -> dict[str, tuple[int, ...]]:
    """Leaves of about that many elements in all; what is split divides into 8."""
    rows = {columns: 8 * max(size // (16 * columns), 1) for columns in (1000, 128)}
    return {
        "wide": (rows[1000], 1000),
        "narrow": (rows[128], 128),
        "bias": (1000,),
        "scale": (),
    }


# -- Counted from the schedule ----------------------------------------------------------------


@dataclasses.dataclass
class Work:
    """What a device does at each of the S steps of a cycle, arrays [S]."""

    samples: np.ndarray
    lanes: np.ndarray
    bytes: np.ndarray

    def __add__(self, other: Work) -> Work:
        return Work(
            self.samples + other.samples, self.lanes + other.lanes, self.bytes + other.bytes
        )


def run_starts(shard: _shards.Shard, base: int) -> np.ndarray:
    """The indices in the leaf of the first elements of a shard's runs."""
    starts = np.array([base])
    for count, stride in shard.axes:
        starts = (starts[:, None] + stride * np.arange(count)).reshape(-1)
    return starts


def leaf_work(
    shard: _shards.Shard, base: int, first_tile: int, slots: int, part: int, chunk: int
) -> tuple[Work, int]:
    """What csrc/visits.h makes of a shard from step S on, and the number of its parts.

    Workers take `chunk` parts at a time; `part` is the number of the shard's first.
    """
    tile, size = _schedule.TILE, shard.size
    starts = run_starts(shard, base)
    shift = 0 if shard.axes else base % tile
    parts = -(-(size + shift) // tile)
    # Where, here, a run ends, or a tile, or what a worker takes.
    cuts = [np.arange(starts.size + 1) * shard.run]
    before = starts // tile
    tiles = (starts + shard.run - 1) // tile - before
    of_run = np.repeat(np.arange(starts.size), tiles)
    number = np.arange(of_run.size) - np.repeat(np.cumsum(tiles) - tiles, tiles) + 1
    cuts.append(of_run * shard.run + (before[of_run] + number) * tile - starts[of_run])
    cuts.append(np.clip(np.arange(-part % chunk, parts + 1, chunk) * tile - shift, 0, size))
    edges = np.unique(np.concatenate(cuts))
    here, count = edges[:-1], np.diff(edges)

    index = starts[here // shard.run] + here % shard.run
    phase = (index // tile + index // (tile * slots) + first_tile) % slots
    taken = (part + (here + shift) // tile) // chunk
    taken -= taken[0]
    elements = np.bincount(phase, count, slots)

    rest = np.zeros((slots, int(taken[-1]) + 1), np.int64)
    np.add.at(rest, (phase, taken), count % LANES)
    blocks = np.bincount(phase, count // LANES, slots) + (-(-rest // LANES)).sum(axis=1)

    order = np.argsort(phase, kind="stable")
    first, last = (here * SLOT // LINE)[order], (((here + count) * SLOT - 1) // LINE)[order]
    shared = (first[1:] == last[:-1]) & (np.diff(phase[order]) == 0)
    lines = np.bincount(phase, minlength=slots) * 0.0
    np.add.at(lines, phase[order], last - first + 1)
    np.subtract.at(lines, phase[order][1:], shared)

    # Of what is refreshed, all slots are read and written, and the one that is added is at hand.
    moved = SLOT * (2 * size + size - elements) + 2 * slots * LINE * lines
    return Work(slots * elements, slots * LANES * blocks, moved), parts


def device_work(shards: Sequence[tuple[_shards.Shard, int, int]], slots: int, workers: int) -> Work:
    """The step on (shard, base, first tile) of all leaves, as correlated_noise shares it out."""

    def parts(shard: _shards.Shard, base: int) -> int:
        return -(-(shard.size + (0 if shard.axes else base % _schedule.TILE)) // _schedule.TILE)

    total = sum(parts(shard, base) for shard, base, _ in shards)
    workers = min(max(total // 8, 1), workers)
    chunk = min(max(total // (8 * workers), 1), 256)
    zero = np.zeros(slots)
    work, part = Work(zero, zero, zero), 0
    for shard, base, first_tile in shards:
        more, count = leaf_work(shard, base, first_tile, slots, part, chunk)
        work, part = work + more, part + count
    return work


def all_work(
    case: Case, shapes: Sequence[tuple[int, ...]], devices: int, slots: int, workers: int
) -> list[Work]:
    """The work of every device of a mesh of one axis."""
    specs = [case.spec(shape, devices) for shape in shapes]
    if case.strategy == ZERO:
        shapes = [(-(-math.prod(shape) // devices) * devices,) for shape in shapes]
        specs = [PartitionSpec("x")] * len(shapes)
    first_tiles = [
        leaf.first_tile for leaf in _schedule.plan(shapes, [np.dtype("float32")] * len(shapes))
    ]
    work = []
    for device in range(devices):
        shards = []
        for shape, spec, first_tile in zip(shapes, specs, first_tiles, strict=True):
            split = [entry is not None for entry in spec]
            local = [n // devices if s else n for n, s in zip(shape, split, strict=True)]
            strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
            base = sum(
                s * device * n * stride for s, n, stride in zip(split, local, strides, strict=True)
            )
            shards.append((_shards.shard(shape, local), base, first_tile))
        work.append(device_work(shards, slots, workers))
    return work


def summarize(work: Sequence[Work]) -> dict[str, float]:
    """Per step, over all devices."""
    steps = work[0].samples.size
    samples = np.stack([w.samples for w in work])
    return {
        "samples": float(samples.sum() / steps),
        "lanes": float(sum(w.lanes.sum() for w in work) / steps),
        "bytes": float(sum(w.bytes.sum() for w in work) / steps),
        "busiest": float(samples.max(axis=0).mean() / samples.mean()),
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
            / (row["leaves"] * (row["bands"] - 1) * SLOT * _schedule.TILE)
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


# -- Computed: many GPUs ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What the model assumes of an H200. docs/scaling.md says where each number comes from."""

    copy: float = 4.3e12  # bytes per second, measured
    capacity: float = 141e9  # bytes, data sheet
    usable: float = 0.8  # of them; activations and buffers get the others
    instructions: float = 132 * 128 * 1.8e9  # per second: processors, lanes, clock
    sample: float = 145  # instructions for one sample, counted
    band: float = 2  # and for each band of it, counted
    link: float = (
        450e9  # bytes per second into a GPU from those of its node, data sheet: half of 900
    )
    node: int = 8  # GPUs
    network: float = 50e9  # bytes per second into a GPU from other nodes: 400 Gb/s


H200 = Gpu()
SIZES = (10**9, 10**10, 7 * 10**10)
BANDS = (8, 16, 32, 64)
GPUS = tuple(2**k for k in range(10))
# Bytes per parameter beside noise state: parameters, gradients, noisy gradients, Adam's moments.
TRAINING = {"float32": 4 + 4 + 4 + 8, "bfloat16": 2 + 2 + 2 + 4}


def kernel_seconds(elements: float, bands: int, gpu: Gpu = H200) -> float:
    """The look-ahead kernel's limit: memory or arithmetic, the larger, as if overlapped fully."""
    moved = noise.bytes_per_step((1, 4, 4), noise.look_ahead_passes(bands))
    instructions = gpu.sample + gpu.band * (bands - 1)
    return elements * max(moved / gpu.copy, instructions / gpu.instructions)


def reference_seconds(elements: float, bands: int, gpu: Gpu = H200) -> float:
    """The least that reading all slots and writing them one further can take, nothing else."""
    return elements * max(
        (8 * (bands - 1) + 8) / gpu.copy,
        (gpu.sample + gpu.band * (bands - 1)) / gpu.instructions,
    )


def gather_seconds(parameters: float, gpus: int, gpu: Gpu = H200) -> float:
    """Bringing float32 noise that is split over all GPUs to each of them."""
    size, nodes = 4 * parameters, -(-gpus // gpu.node)
    inside = size * (1 - 1 / gpus) / gpu.link
    return max(inside, size * (1 - 1 / nodes) / (min(gpu.node, gpus) * gpu.network))


def step_seconds(parameters: float, bands: int, gpus: int, layout: str, gpu: Gpu = H200) -> float:
    """A step of noise. Layouts: of DEFAULT and of ZERO, by gradients "sharded" or "replicated"."""
    share = parameters / gpus
    added = 12 / gpu.copy  # noise and gradient read, sum written
    zeros = 4 / gpu.copy  # which ZERO's kernel adds its noise to
    return {
        "default sharded": lambda: kernel_seconds(share, bands, gpu),
        "default replicated": lambda: kernel_seconds(parameters, bands, gpu),
        "zero sharded": lambda: kernel_seconds(share, bands, gpu) + share * (zeros + added),
        "zero replicated": lambda: (
            kernel_seconds(share, bands, gpu)
            + share * zeros
            + gather_seconds(parameters, gpus, gpu)
            + parameters * added
        ),
    }[layout]()


def state_bytes(parameters: float, bands: int, gpus: int) -> float:
    """Of the noise, per GPU, if split over all of them."""
    return 4 * (bands - 1) * parameters / gpus


def fewest(parameters: float, bands: int, training: float, gpu: Gpu = H200) -> int:
    """GPUs that hold training and noise state, all split over all of them."""
    total = parameters * (training + 4 * (bands - 1))
    return math.ceil(total / (gpu.usable * gpu.capacity))


def power(number: int) -> str:
    exponent = math.floor(math.log10(number))
    first = number // 10**exponent
    return f"10^{exponent}" if first == 1 else f"{first} * 10^{exponent}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def significant(number: float) -> str:
    """Two digits that count."""
    return f"{number:.1f}" if number < 10 else f"{number:,.0f}"


def tables() -> str:
    """Those of docs/scaling.md."""
    layouts = ("default sharded", "zero sharded", "default replicated", "zero replicated")
    times = []
    for d in SIZES:
        for gpus in (1, 8, 64, 512):
            cells = []
            for bands in (8, 64):
                fits = fewest(d, bands, TRAINING["float32"]) <= gpus
                ours = 1e3 * step_seconds(d, bands, gpus, layouts[0])
                theirs = 1e3 * reference_seconds(d / gpus, bands)
                cells.append(f"{ours:.2g} / {theirs:.2g}" if fits else "does not fit")
            times.append([power(d), gpus, *cells])
    ways = [
        [layout, *(f"{1e12 * step_seconds(1, bands, 8, layout):.2f}" for bands in BANDS)]
        for layout in layouts
    ]
    need = [
        [
            power(d),
            kind,
            *(fewest(d, bands, each) for bands in BANDS),
            significant(4 * 7 * d / 1e9) + " / " + significant(4 * 63 * d / 1e9),
        ]
        for d in SIZES
        for kind, each in TRAINING.items()
    ]
    balance = [
        [f"{columns:,}", *(f"{busiest(columns, bands, 8):.2f}" for bands in BANDS)]
        for columns in (4096, 5120, 7168, 8192, 14336, 28672)
    ]
    names = [f"{bands} bands" for bands in BANDS]
    return "\n\n".join(
        [
            markdown(["parameters", "GPUs", "8 bands", "64 bands"], times),
            markdown(["layout, 8 GPUs", *names], ways),
            markdown(["parameters", "training in", *names, "noise state, GB"], need),
            markdown(["elements in a row", *names], balance),
        ]
    )


def busiest(columns: int, bands: int, devices: int) -> float:
    """`summarize`'s, for a leaf of 4,096 rows that are split."""
    shape = (4096, columns)
    return summarize(all_work(CASES["columns"], [shape], devices, bands - 1, 1))["busiest"]


def plot_model(path: pathlib.Path) -> None:
    """Time per step and memory per GPU over GPUs, a column for each model; where all of it fits."""
    figure, panels = plt.subplots(
        2, len(SIZES), figsize=(12, 7.2), layout="constrained", sharex=True, sharey="row"
    )
    training = TRAINING["float32"]
    for d, (above, below) in zip(SIZES, panels.T, strict=True):
        for color, bands in enumerate(BANDS):
            gpus = [n for n in GPUS if fewest(d, bands, training) <= n]
            ours = [1e3 * step_seconds(d, bands, n, "default sharded") for n in gpus]
            theirs = [1e3 * reference_seconds(d / n, bands) for n in gpus]
            style = {"color": f"C{color}", "marker": "o", "markersize": 3.5}
            above.plot(gpus, ours, label=f"{bands} bands, DEFAULT, all split", **style)
            label = f"{bands} bands, jax_privacy, at least"
            above.plot(gpus, theirs, ":", label=label, **{**style, "marker": None})
            if d * training <= H200.usable * H200.capacity:  # parameters on every GPU
                replicated = [
                    n
                    for n in GPUS[1:]
                    if d * training + state_bytes(d, bands, n) <= H200.usable * H200.capacity
                ]
                zero = [1e3 * step_seconds(d, bands, n, "zero replicated") for n in replicated]
                above.plot(replicated, zero, "--", color=f"C{color}", linewidth=1)
            memory = [state_bytes(d, bands, n) / 1e9 for n in GPUS]
            below.plot(GPUS, memory, label=f"{bands} bands", **style)
        rest = [d * training / n / 1e9 for n in GPUS]
        below.plot(GPUS, rest, "--k", linewidth=1, label="the rest of training, float32, Adam")
        below.axhline(H200.capacity / 1e9, color="red", linewidth=1, label="an H200")
        above.set_title(f"{power(d)} parameters")
        below.set_xlabel("GPUs")
        for axes in (above, below):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(GPUS, [str(n) for n in GPUS])
            axes.yaxis.set_major_formatter("{x:g}")
            axes.grid(True, linewidth=0.3)
    panels[0, 0].plot([], [], "--", color="gray", label="ZERO, gradients on every GPU")
    panels[0, 0].set_ylabel("ms per step of noise, computed")
    panels[1, 0].set_ylabel("GB of noise state per GPU, computed")
    panels[1, 0].legend(fontsize=8)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
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
    report = {
        "benchmark": "sharded",
        "environment": environment,
        "rows": rows,
        "acceptance": acceptance(rows),
    }
    return harness.publish(report, describe, plot, args.output_dir)


if __name__ == "__main__":
    main()
