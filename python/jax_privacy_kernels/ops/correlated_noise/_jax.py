"""Correlated noise in plain JAX: the oracle of the other implementations, and what TPUs run.

The look-ahead of a tile is a matrix product. Every filter is linear, so with x' the ring after a
visit, x the ring before and z the samples, all ``[.., elements]``, x' = P z + Q x for two small
matrices that depend on the coefficients and the slots only (_jax_filters.py). How XLA rounds such a
product depends on its size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels.ops import _jax_noise, _shards
from jax_privacy_kernels.ops._jax_bundles import Bundle, bundles
from jax_privacy_kernels.ops._jax_noise import Here
from jax_privacy_kernels.ops._leaves import TILE, Leaf
from jax_privacy_kernels.ops._noise import NoiseOutputs
from jax_privacy_kernels.ops._shards import Shard, Words
from jax_privacy_kernels.ops.correlated_noise._contract import Inputs
from jax_privacy_kernels.ops.correlated_noise._filters import Filter
from jax_privacy_kernels.ops.correlated_noise._jax_bundle import bundle_step
from jax_privacy_kernels.ops.correlated_noise._jax_filters import (
    VISITS,
    Matrices,
    put,
    read,
    visited,
)

__all__ = ["refuse", "run"]


def refuse(leaf: Leaf, filter: Filter, stream: str) -> str | None:
    """Why this implementation cannot take what is here of the leaf, or None."""
    return _jax_noise.refuse(leaf, filter.counted, stream)


def run(inputs: Inputs) -> NoiseOutputs:
    """One step."""
    filter, keys, base = inputs.filter, inputs.keys, inputs.base
    assert base is not None
    # XLA rounds products with numbers that it knows otherwise: in jit as outside, bit for bit.
    coef, scale = jax.lax.optimization_barrier((inputs.coef, inputs.scale))
    # Under a vmap, keys of type unsafe_rbg split otherwise.
    over_keys = jax.vmap if filter.counted else lambda f: functools.partial(jax.lax.map, f)
    leaf_keys = over_keys(lambda key: jax.random.split(key, inputs.leaves[0].count))(keys)
    matrices = None
    if filter.slots and filter.ahead:
        dtype = jnp.result_type(coef, *(leaf.dtype for leaf in inputs.leaves))
        matrices = VISITS[type(filter)].matrices(filter, inputs.step, coef.astype(dtype))
    outs, rings = list(inputs.grads), list(inputs.rings)
    for group in bundles(inputs.leaves, filter.counted):
        shared = coef, inputs.stddevs, matrices, scale
        if len(group) == 1:
            (i,) = group
            leaf = inputs.leaves[i]
            outs[i], ring = _leaf_step(
                filter,
                leaf.noise_dtype,
                leaf.dtype,
                None if leaf.whole else leaf.shard,
                0 if filter.counted else leaf.size,
                inputs.step,
                jnp.asarray(leaf.first_tile % max(filter.slots, 1), jnp.int32),
                (base[i, 0], base[i, 1]),
                leaf_keys[:, leaf.index],
                *shared,
                inputs.grads[i],
                inputs.rings[i] if inputs.rings else None,
            )
            if rings:
                rings[i] = ring
            continue
        leaves = [inputs.leaves[i] for i in group]
        bundle = Bundle.of(leaves, filter.counted)
        first_tiles = np.array([leaf.first_tile % max(filter.slots, 1) for leaf in leaves])
        results = bundle_step(
            filter,
            bundle,
            first_tiles.astype(np.int32),
            inputs.step,
            leaf_keys[:, np.array([leaf.index for leaf in leaves])],
            *shared,
            [inputs.grads[i] for i in group],
            [inputs.rings[i] for i in group if inputs.rings],
        )
        for place, i in enumerate(group):
            outs[i] = results[0][place]
            if rings:
                rings[i] = results[1][place]
    return NoiseOutputs(outs, rings)


# Jitted, so that leaves of one shape are traced once.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _leaf_step(
    filter: Filter,
    noise_dtype: jnp.dtype,
    dtype: jnp.dtype,
    shard: Shard | None,
    leaf_size: int,
    step: jax.Array,
    first_phase: jax.Array,
    first: Words,
    keys: jax.Array,
    coef: jax.Array,
    stddevs: jax.Array | None,
    matrices: Matrices | None,
    scale: jax.Array,
    grad: jax.Array,
    ring: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """A step of one leaf; shard is None if all of it is here, ring if it has no rows."""
    here = Here(shard, first, leaf_size, grad.size, noise_dtype, dtype)
    flat = jnp.zeros((0, grad.size), dtype) if ring is None else ring.reshape(-1, grad.size)
    visits, coef = VISITS[type(filter)], coef.astype(dtype)
    stddevs = jnp.ones(keys.shape, dtype) if stddevs is None else stddevs.astype(dtype)

    def one_step() -> tuple[jax.Array, jax.Array]:
        noise = visits.noise(filter, here, step, keys, coef, stddevs)
        return visits.term(filter, step, coef, noise, flat)

    if matrices is None:
        x, buffers = one_step()
        flat = put(filter, step, flat, x, buffers)
    else:
        slots, now = filter.slots, step % filter.slots
        if slots > 1:
            phase = functools.partial(here.phase, slots, first_phase)
            flat = _warm_up(filter, one_step, step, phase, flat)
        if not isinstance(grad.size, int):
            flat = _refresh_any_size(slots, here, now, first_phase, keys, matrices, flat)
        elif shard is None or not shard.axes:
            flat = _refresh(slots, here, now, first_phase, keys, matrices, flat)
        else:
            due = here.phase(slots, first_phase) == now
            flat = _refresh_elements(here, due, keys, matrices, flat)
        x = flat[filter.buffers + now]
    noise = scale.astype(dtype) * x.reshape(grad.shape)
    return (grad + noise).astype(grad.dtype), None if ring is None else flat.reshape(ring.shape)


# -- One step of all elements -----------------------------------------------------------------


def _warm_up(
    filter: Filter,
    one_step: Callable[[], tuple[jax.Array, jax.Array]],
    step: jax.Array,
    phase_of: Callable[[], jax.Array],
    ring: jax.Array,
) -> jax.Array:
    """Makes x_t of the tiles not refreshed yet, in the first S - 1 steps."""
    old = ring[filter.buffers + step % filter.slots], ring[: filter.buffers]

    def compute() -> tuple[jax.Array, jax.Array]:
        phase, new = phase_of(), one_step()
        return jnp.where(phase > step, new[0], old[0]), jnp.where(phase > step, new[1], old[1])

    x, buffers = jax.lax.cond(step < filter.slots - 1, compute, lambda: old)
    return put(filter, step, ring, x, buffers)


# -- The look-ahead of some tiles -------------------------------------------------------------


def _refresh(
    slots: int,
    here: Here,
    now: jax.Array,
    first_phase: jax.Array,
    keys: jax.Array,
    matrices: Matrices,
    ring: jax.Array,
) -> jax.Array:
    """Overwrites the tiles whose turn it is with x_t .. x_{t+S-1}, one of every S in the leaf."""
    size, shard = ring.shape[1], here.shard is not None
    begin = here.tile(here.first, slots) if shard else 0  # the first tile that is here, or part of

    def turn(group: int | jax.Array) -> jax.Array:
        """The place among the tiles here of the one of a group of S whose turn it is."""
        phase = first_phase + group + begin // slots
        return slots * group + (now - phase) % slots - begin % slots

    refresh = functools.partial(_refresh_tiles, here, keys, matrices)
    # Shards may begin within a group, and within a tile.
    sure = range(1 if shard else 0, (size // TILE) // slots)
    if sure:
        ring = refresh(turn(jnp.arange(sure.start, sure.stop, dtype=jnp.int32)), ring)
    tiles, most = (size + here.shift + TILE - 1) // TILE, -(-size // TILE)
    groups = -(-(most + slots) // slots) if shard else -(-most // slots)
    for group in sorted(set(range(groups)) - set(sure)):
        tile = turn(group)
        ring = jax.lax.cond(
            (tile >= 0) & (tile < tiles),
            functools.partial(refresh, tile[None]),
            lambda ring: ring,
            ring,
        )
    return ring


def _refresh_tiles(
    here: Here, keys: jax.Array, matrices: Matrices, tiles: jax.Array, ring: jax.Array
) -> jax.Array:
    size = ring.shape[1]
    width = min(TILE, size)
    begin = tiles * TILE - here.shift
    # A tile may be short at either end: its window reaches into the next, which stays.
    start = jnp.clip(begin, 0, size - width)
    old = read(ring, start, width)  # [rows, tiles, width]
    index = _shards.plus(here.first, (jnp.zeros_like(start, jnp.uint32), start.astype(jnp.uint32)))
    z = here.sample_windows(keys, index, width)
    new = visited(matrices, z, old)
    if size % TILE or here.shard is not None:
        place = start[:, None] + jnp.arange(width)[None, :] - begin[:, None]
        new = jnp.where((place >= 0) & (place < TILE), new, old)
    return _write(ring, start, new)


def _refresh_any_size(
    slots: int,
    here: Here,
    now: jax.Array,
    first_phase: jax.Array,
    keys: jax.Array,
    matrices: Matrices,
    ring: jax.Array,
) -> jax.Array:
    """As `_refresh`, of a whole leaf whose size is symbolic: by way of a copy in whole tiles."""
    rows, size = ring.shape
    tiles = (size + TILE - 1) // TILE
    padded = jnp.pad(ring, ((0, 0), (0, tiles * TILE - size))).reshape(rows, tiles, TILE)
    group = jnp.arange((tiles + slots - 1) // slots, dtype=jnp.int32)
    turn = slots * group + (now - first_phase - group) % slots  # the last may be beyond the leaf
    sample = functools.partial(here.sample_from, size=TILE)
    start = jnp.zeros_like(turn, jnp.uint32), turn.astype(jnp.uint32) * TILE
    z = jax.vmap(lambda key: jax.vmap(lambda hi, lo: sample(key, (hi, lo)))(*start))(keys)
    new = visited(matrices, z, padded.at[:, turn].get(mode="clip"))
    return padded.at[:, turn].set(new, mode="drop").reshape(rows, tiles * TILE)[:, :size]


def _refresh_elements(
    here: Here, due: jax.Array, keys: jax.Array, matrices: Matrices, ring: jax.Array
) -> jax.Array:
    """Overwrites the elements whose turn it is with x_t .. x_{t+S-1}, a few at a time."""
    assert here.shard is not None
    size = ring.shape[1]
    width = min(4 * TILE, size)
    chosen = jnp.nonzero(due, size=-(-size // width) * width, fill_value=size)[0]
    hi, lo = _shards.indices(here.shard, here.first)

    def some(i: jax.Array, ring: jax.Array) -> jax.Array:
        at = jax.lax.dynamic_slice_in_dim(chosen, i * width, width)
        index = hi.at[at].get(mode="clip"), lo.at[at].get(mode="clip")
        z = jax.vmap(lambda key: here.sample_at(key, index))(keys)[:, None]
        old = ring.at[:, at].get(mode="clip")[:, None]
        new = visited(matrices, z, old)[:, 0]
        return ring.at[:, at].set(new, mode="drop", unique_indices=True, indices_are_sorted=True)

    count = (jnp.count_nonzero(due) + width - 1) // width
    return jax.lax.fori_loop(0, count, some, ring)


def _write(ring: jax.Array, start: jax.Array, columns: jax.Array) -> jax.Array:
    """The ring with columns start[t] .. start[t] + width - 1 replaced."""
    return jax.lax.scatter(
        ring,
        start[:, None],
        columns,
        jax.lax.ScatterDimensionNumbers(
            update_window_dims=(0, 2), inserted_window_dims=(), scatter_dims_to_operand_dims=(1,)
        ),
        indices_are_sorted=True,
        unique_indices=True,
        mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )
