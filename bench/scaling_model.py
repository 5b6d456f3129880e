"""The model of a step on many devices: work counted from the schedule, time and memory computed.

`bench/sharded.py` compares its measurements with the counts, and prints the model of many GPUs:

    python bench/sharded.py --model    # nothing is measured: docs/scaling.png and its tables
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import matplotlib
import noise
import numpy as np
from jax.sharding import PartitionSpec

from jax_privacy_kernels import noise_addition
from jax_privacy_kernels.ops import _leaves, _shards
from jax_privacy_kernels.ops.correlated_noise import _schedule

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ZERO = noise_addition.SupportedStrategies.ZERO
DEFAULT = noise_addition.SupportedStrategies.DEFAULT
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
    tile, size = _leaves.TILE, shard.size
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
    phase = _schedule.phase(index // tile, slots, first_tile)
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
        return -(-(shard.size + (0 if shard.axes else base % _leaves.TILE)) // _leaves.TILE)

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
    structs = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
    first_tiles = [leaf.first_tile for leaf in _leaves.plan(structs, np.float32, None)]
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


# -- Computed: many GPUs ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What the model assumes of an H200. docs/scaling.md says where each number comes from."""

    copy: float = 4.3e12  # bytes per second, measured
    capacity: float = 141e9  # bytes, data sheet
    usable: float = 0.8  # of them; activations and buffers get the others
    instructions: float = 132 * 128 * 1.8e9  # per second: processors, lanes, clock
    sample: float = 110  # instructions for one sample, counted
    band: float = 1.5  # and for each band of it, counted
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


# How the lines that are of no number of bands look.
REST: dict[str, Any] = {
    "color": "black",
    "linestyle": "-.",
    "linewidth": 1,
    "label": "the rest of training",
}
CAPACITY: dict[str, Any] = {
    "color": "#D55E00",
    "linestyle": "-",
    "linewidth": 2,
    "label": "memory of an H200",
}


def plot_model(path: pathlib.Path) -> None:
    """Time per step and memory per GPU over GPUs, a row for each model; where all of it fits."""
    figure, panels = plt.subplots(
        len(SIZES), 2, figsize=(8, 9.5), layout="constrained", sharex=True, sharey="col"
    )
    training = TRAINING["float32"]
    shades = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(BANDS)))
    for d, (left, right) in zip(SIZES, panels, strict=True):
        for shade, bands in zip(shades, BANDS, strict=True):
            gpus = [n for n in GPUS if fewest(d, bands, training) <= n]
            ours = [1e3 * step_seconds(d, bands, n, "default sharded") for n in gpus]
            theirs = [1e3 * reference_seconds(d / n, bands) for n in gpus]
            left.plot(gpus, ours, "o-", color=shade, markersize=3.5)
            left.plot(gpus, theirs, ":", color=shade)
            if d * training <= H200.usable * H200.capacity:  # parameters on every GPU
                replicated = [
                    n
                    for n in GPUS[1:]
                    if d * training + state_bytes(d, bands, n) <= H200.usable * H200.capacity
                ]
                zero = [1e3 * step_seconds(d, bands, n, "zero replicated") for n in replicated]
                left.plot(replicated, zero, "--", color=shade, linewidth=1)
            memory = [state_bytes(d, bands, n) / 1e9 for n in GPUS]
            right.plot(GPUS, memory, "o-", color=shade, markersize=3.5)
        right.plot(GPUS, [d * training / n / 1e9 for n in GPUS], **REST)
        right.axhline(H200.capacity / 1e9, **CAPACITY)
        left.set_ylabel(f"{power(d)} parameters", fontsize="large")
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(GPUS[::2], [str(n) for n in GPUS[::2]])
            axes.yaxis.set_major_formatter("{x:g}")
            axes.grid(True, linewidth=0.3)
    panels[0, 0].set_title("milliseconds per step of noise, computed")
    panels[0, 1].set_title("GB of noise state per GPU")
    for axes in panels[-1]:
        axes.set_xlabel("GPUs")
    names = [f"{bands} bands" for bands in BANDS]
    lines = [plt.Line2D([], [], color=c, label=n) for c, n in zip(shades, names, strict=True)]
    kinds: list[dict[str, Any]] = [
        {"linestyle": "-", "marker": "o", "markersize": 3.5, "label": "this library, all split"},
        {"linestyle": ":", "label": "jax_privacy, at least"},
        {"linestyle": "--", "linewidth": 1, "label": "ZERO, gradients on every GPU"},
    ]
    lines += [plt.Line2D([], [], **{"color": "gray", **kind}) for kind in (*kinds, REST, CAPACITY)]
    figure.legend(handles=lines, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150)
    plt.close(figure)
