"""The model of many devices counts the work of the kernel, and computes what its constants say."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from support import benchmarks

from jax_privacy_kernels.ops import _shards

TILE, LANES = 1024, 128

bench = benchmarks.fixture("scaling_model")


def visited(leaf, first, last, slots, step):
    """The elements that csrc/visits.h refreshes of [first, last), and in how many blocks."""
    shard, base, first_tile = leaf
    starts = run_starts(shard, base)
    refreshed, blocks, waiting = [], 0, 0
    here = first
    while here < last:
        run, offset = divmod(here, shard.run)
        index = starts[run] + offset
        count = min(last - here, shard.run - offset, TILE - index % TILE)
        tile = index // TILE
        if (tile + tile // slots + first_tile) % slots == step % slots:
            refreshed += range(here, here + count)
            blocks += count // LANES
            waiting += count % LANES
            blocks, waiting = blocks + waiting // LANES, waiting % LANES
        here += count
    return refreshed, blocks + (waiting > 0)


def run_starts(shard, base):
    counts, strides = [c for c, _ in shard.axes], np.array([s for _, s in shard.axes], int)
    return [base + int(np.dot(strides, place)) for place in np.ndindex(*counts)]


@pytest.mark.parametrize("slots", [1, 2, 7])
@pytest.mark.parametrize("workers", [1, 3])
def test_work_is_what_the_kernel_visits(bench, slots, workers):
    leaves = [
        (_shards.shard((70, 1000), (70, 125)), 250, 0),  # runs of 125
        (_shards.Shard(9_000), 36_100, 69),  # one run, from within a tile on
        (_shards.Shard(1), 0, 114),
        (_shards.shard((3, 50, 130), (3, 25, 26)), 25 * 130 + 52, 115),  # axes that do not merge
        (_shards.shard((64, 4096), (64, 1024)), 2048, 135),
    ]
    shifts = [0 if shard.axes else base % TILE for shard, base, _ in leaves]
    parts = [-(-(leaf[0].size + shift) // TILE) for leaf, shift in zip(leaves, shifts, strict=True)]
    workers_used = min(max(sum(parts) // 8, 1), workers)
    chunk = min(max(sum(parts) // (8 * workers_used), 1), 256)
    samples, lanes, moved = np.zeros((3, slots), int)
    for step in range(slots):
        part = 0
        for leaf, shift, count in zip(leaves, shifts, parts, strict=True):
            size, lines, elements = leaf[0].size, set(), 0
            stops = [0, *(p for p in range(1, count) if (part + p) % chunk == 0), count]
            for begin, end in itertools.pairwise(stops):
                first, last = (min(max(p * TILE - shift, 0), size) for p in (begin, end))
                refreshed, blocks = visited(leaf, first, last, slots, step)
                lines.update(4 * element // 64 for element in refreshed)
                elements += len(refreshed)
                lanes[step] += slots * LANES * blocks
            samples[step] += slots * elements
            moved[step] += 4 * (3 * size - elements) + 2 * slots * 64 * len(lines)
            part += count
    work = bench.device_work(leaves, slots, workers)
    np.testing.assert_array_equal(work.samples, samples)
    np.testing.assert_array_equal(work.lanes, lanes)
    np.testing.assert_array_equal(work.bytes, moved)
    assert samples.sum() == slots * sum(leaf[0].size for leaf in leaves)


def test_nobody_is_waited_for(bench):
    assert bench.busiest(7168, 8, 8) < 1.01  # 7 tiles in a row, 7 slots
    assert 1.1 < bench.busiest(5120, 32, 8) < 1.2  # the worst of docs/scaling.md
    # One run on every device has all phases alike.
    work = bench.all_work(bench.CASES["rows"], [(8 * 7 * 1024, 16)], 8, 7, 1)
    assert bench.summarize(work)["busiest"] == 1


def test_model(bench):
    # As docs/gpu.md has it: 20 bytes at 4.3 TB/s; 110 instructions, and 1.5 for a
    # band, on 132 processors of 128 lanes. The former takes longer up to 20 bands.
    assert bench.kernel_seconds(2**28, 8) == pytest.approx((20 - 4 / 7) * 2**28 / 4.3e12)
    assert bench.kernel_seconds(2**28, 64) == pytest.approx(204.5 * 2**28 / 3.041e13, rel=1e-3)
    assert bench.step_seconds(1e9, 8, 8, "default sharded") == bench.kernel_seconds(1.25e8, 8)
    for layout in ("default sharded", "zero sharded"):
        one, many = (bench.step_seconds(1e9, 64, gpus, layout) for gpus in (1, 512))
        assert one == pytest.approx(512 * many)
    assert bench.gather_seconds(1e9, 8) == pytest.approx(4e9 * 7 / 8 / 450e9)
    assert bench.gather_seconds(1e9, 512) == pytest.approx(4e9 * 63 / 64 / 400e9)
    assert bench.state_bytes(1e9, 8, 4) == 7e9
    assert bench.fewest(1e9, 64, 20) == 3  # 272 GB, of which a GPU takes 112.8
