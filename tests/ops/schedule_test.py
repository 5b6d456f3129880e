"""Every copy of the look-ahead schedule, against the golden table.

correlated_noise_test.py compares what the implementations do with it, and native/visits_test.cc
what csrc/visits.h says.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import golden_schedule

from jax_privacy_kernels.ops import _gpu_noise, _leaves
from jax_privacy_kernels.ops._jax_noise import Here
from jax_privacy_kernels.ops._leaves import TILE
from jax_privacy_kernels.ops._shards import Shard
from jax_privacy_kernels.ops.correlated_noise import _schedule

TABLE = golden_schedule.load()
PHASES = {}  # of (slots, first_tile), those of the tiles
for row in TABLE:
    phases = golden_schedule.phases(row.slots, row.first_tile, row.tile + 1)
    PHASES[row.slots, row.first_tile] = np.array(phases)


def test_the_table_is_that_of_the_definition():
    groups = itertools.groupby(TABLE, lambda row: (row.slots, row.first_tile))
    for (slots, first_tile), rows in groups:
        rows = list(rows)
        tiles, steps = rows[-1].tile + 1, rows[-1].step + 1
        assert rows == golden_schedule.visits(slots, first_tile, tiles, steps)
        assert tiles > 3 * slots
        assert steps > 2 * slots


def test_python():
    for row in TABLE:
        phase = _schedule.phase(row.tile, row.slots, row.first_tile)
        assert _schedule.terms(phase, row.slots, row.step) == row.terms
        assert _schedule.slot(row.slots, row.step) == row.slot


@pytest.mark.parametrize(("slots", "first_tile"), PHASES)
def test_plain_jax(slots, first_tile):
    phases = PHASES[slots, first_tile]
    first_phase = jnp.int32(first_tile % max(slots, 1))
    size = len(phases) * TILE
    zero = (jnp.uint32(0), jnp.uint32(0))
    whole = Here(None, zero, 0, size, jnp.float32, jnp.float32)
    found = whole.phase(max(slots, 1), first_phase)
    np.testing.assert_array_equal(found, np.repeat(phases, TILE))
    # A shard that begins within a tile, of two runs.
    start, shard = TILE + 500, Shard(700, ((2, 900),))
    some = Here(shard, (jnp.uint32(0), jnp.uint32(start)), 0, 1400, jnp.float32, jnp.float32)
    index = start + np.concatenate([np.arange(700), 900 + np.arange(700)])
    if index[-1] < size:
        found = some.phase(max(slots, 1), first_phase)
        np.testing.assert_array_equal(found, phases[index // TILE])


@pytest.mark.parametrize(("slots", "first_tile"), PHASES)
def test_runs_for_gpus(slots, first_tile):
    """What kernels make of ``runs``, from any tile on that a run begins in."""
    pallas = pytest.importorskip("jax_privacy_kernels.kernels._noise_pallas")
    from jax_privacy_kernels.kernels import _runs

    phases = PHASES[slots, first_tile]
    size = len(phases) * TILE
    before = jax.ShapeDtypeStruct((first_tile * TILE,), jnp.float32)
    tree = [before, jax.ShapeDtypeStruct((size,), jnp.float32)]
    leaf = _leaves.plan(tree, jnp.float32, None)[1]
    tiles = jnp.arange(len(phases))  # of one size for all runs, which XLA compiles once
    for begin in range(len(phases)):
        index = jnp.array([0, begin * TILE + 3], jnp.uint32)
        (run,) = _gpu_noise.runs(leaf, index, slots)
        assert run[_runs.LOW] == begin * TILE + 3
        tile = tiles + run[_runs.PLACE].astype(jnp.int32)
        found = np.asarray(pallas.phase(slots, run[_runs.PHASE], tile))
        np.testing.assert_array_equal(found[: len(phases) - begin], phases[begin:])
