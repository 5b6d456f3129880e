"""Correlated noise in plain JAX: the oracle of the other implementations, and what TPUs run.

The look-ahead of a tile is a matrix product. Every filter is linear, so with x' the ring after a
visit, x the ring before and z the samples, all [.., elements], x' = P z + Q x for two small
matrices that depend on the coefficients and the slots only.

A shard that is one run of a leaf is treated as the leaf is, from another index on; the elements of
another one by one. Samples are the same bit for bit wherever they are made. Sums of them are not:
how XLA rounds a product depends on its size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg

from jax_privacy_kernels.ops import _counter_prng, _shards
from jax_privacy_kernels.ops._shards import Shard, Words
from jax_privacy_kernels.ops.correlated_noise._matrices import Layout
from jax_privacy_kernels.ops.correlated_noise._schedule import TILE, Leaf, tile_of

__all__ = ["refuse", "run"]

_Sampler = Callable[[jax.Array], jax.Array]  # of all elements, from a key
_Matrices = tuple[jax.Array, jax.Array | None]  # P, and Q if it is not zero


def refuse(leaf: Leaf, layout: Layout) -> str | None:
    """Why this implementation cannot take the leaf, or None."""
    # Where keys do not count, samples are those of the whole leaf.
    size = leaf.shard.size if layout.ahead else leaf.size
    if size >= 2**31 and (layout.ahead or not leaf.whole):
        return f"{size} elements, but its indices are 32 bits wide"
    return None


def run(
    layout: Layout,
    leaves: Sequence[Leaf],
    step: jax.Array,
    keys: jax.Array,
    coef: jax.Array,
    scale: jax.Array,
    base: jax.Array,
    grads: Sequence[jax.Array],
    rings: Sequence[jax.Array],
) -> tuple[list[jax.Array], list[jax.Array]]:
    """One step; the contract stands in the op, above its table."""
    # Under a vmap, keys of type unsafe_rbg split otherwise.
    over_keys = jax.vmap if layout.ahead else lambda f: functools.partial(jax.lax.map, f)
    leaf_keys = over_keys(lambda key: jax.random.split(key, leaves[0].count))(keys)
    matrices = None
    if layout.slots and layout.ahead:
        matrices = _visit(layout, step, coef.astype(jnp.result_type(coef, *rings)))
    outs, new_rings = [], []
    for leaf, first, grad, ring in zip(leaves, base, grads, rings, strict=True):
        out, ring = _leaf_step(
            layout,
            leaf.noise_dtype,
            None if leaf.whole else leaf.shard,
            0 if layout.ahead else leaf.size,
            step,
            jnp.int32(leaf.first_tile % max(layout.slots, 1)),
            (first[0], first[1]),
            leaf_keys[:, leaf.index],
            coef,
            matrices,
            scale,
            grad,
            ring,
        )
        outs.append(out)
        new_rings.append(ring)
    return outs, new_rings


# Jitted, so that leaves of one shape are traced once.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _leaf_step(
    layout: Layout,
    noise_dtype: jnp.dtype,
    shard: Shard | None,
    leaf_size: int,
    step: jax.Array,
    first_phase: jax.Array,
    first: Words,
    keys: jax.Array,
    coef: jax.Array,
    matrices: _Matrices | None,
    scale: jax.Array,
    grad: jax.Array,
    ring: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """A step of one leaf; shard is None if all of it is here."""
    here = _Here(shard, first, leaf_size, grad.size, noise_dtype, ring.dtype)
    flat = ring.reshape(layout.rows, grad.size)
    one_step = functools.partial(
        _one_step, layout, here.sample, step, keys, coef.astype(ring.dtype), flat
    )
    if matrices is None:
        x, hidden = one_step()
        flat = _put(layout, step, flat, x, hidden)
    else:
        slots, now = layout.slots, step % layout.slots
        if slots > 1:
            phase = functools.partial(here.phase, slots, first_phase)
            flat = _warm_up(layout, one_step, step, phase, flat)
        if shard is None or not shard.axes:
            flat = _refresh(slots, here, now, first_phase, keys, matrices, flat)
        else:
            due = here.phase(slots, first_phase) == now
            flat = _refresh_elements(here, due, keys, matrices, flat)
        x = flat[layout.hidden + now]
    noise = scale.astype(ring.dtype) * x.reshape(grad.shape)
    return (grad + noise).astype(grad.dtype), flat.reshape(ring.shape)


class _Here(NamedTuple):
    """The elements of a leaf that are here."""

    shard: Shard | None  # None: all of it
    first: Words
    leaf_size: int  # where keys do not count
    size: int
    noise_dtype: jnp.dtype
    dtype: jnp.dtype  # of the ring

    @property
    def shift(self) -> int | jax.Array:
        """By how many elements a tile begins before the first that is here."""
        return 0 if self.shard is None else (self.first[1] % TILE).astype(jnp.int32)

    def tile(self, index: Words, slots: int) -> jax.Array:
        """The place of elements' tiles, modulo ``slots^2``."""
        return (tile_of(index) % min(slots**2, 2**31)).astype(jnp.int32)

    def phase(self, slots: int, first_phase: jax.Array) -> jax.Array:
        """``[size]``, of all elements."""
        if self.shard is None:
            tile = jnp.arange(self.size) // TILE
        else:
            tile = self.tile(_shards.indices(self.shard, self.first), slots)
        return (tile + tile // slots + first_phase) % slots

    def sample(self, key: jax.Array) -> jax.Array:
        """``[size]``, of all elements."""
        if self.shard is None:
            z = _counter_prng.normal(key, (self.size,), self.noise_dtype)
        elif self.leaf_size:
            z = _counter_prng.normal(key, (self.leaf_size,), self.noise_dtype)
            z = z[_shards.indices(self.shard, self.first)[1]]
        elif not self.shard.axes:
            return self.sample_from(key, self.first, self.size)
        else:
            return self.sample_at(key, _shards.indices(self.shard, self.first))
        return z.astype(self.dtype)

    def sample_from(self, key: jax.Array, index: Words, size: int) -> jax.Array:
        """``[size]``, of elements that follow each other in the leaf."""
        key = _counter_prng.at(key, index)
        return jax.random.normal(key, (size,), self.noise_dtype).astype(self.dtype)

    def sample_at(self, key: jax.Array, index: Words) -> jax.Array:
        """Of any elements."""
        return jax.vmap(lambda hi, lo: self.sample_from(key, (hi, lo), 1)[0])(*index)


# -- One step of all elements -----------------------------------------------------------------


def _one_step(
    layout: Layout,
    sample: _Sampler,
    step: jax.Array,
    keys: jax.Array,
    coef: jax.Array,
    ring: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """x_t, and the hidden rows after it. What came before step 0 is zero."""
    size, hidden = ring.shape[1], ring[: layout.hidden]
    if layout.filter == "moving_average":
        happened = step - layout.behind + jnp.arange(layout.behind + 1) >= 0
        weights = jnp.where(happened, coef[0], 0)
        return _weighted_samples(sample, lambda j: keys[j], weights, size), hidden
    if layout.filter == "row":
        key_of = functools.partial(jax.random.fold_in, keys[0])
        return _weighted_samples(sample, key_of, coef[0], size), hidden
    z = sample(keys[0])
    if layout.filter == "recurrence":
        past = jnp.zeros_like(z)
        if layout.slots:
            # Slot m holds the term of lag (now - m) mod S, and of lag S if m = now.
            lags = jnp.roll(coef[0, 1:][::-1], step % layout.slots)
            past = jnp.einsum("s,sn->n", lags, ring, precision=jax.lax.Precision.HIGHEST)
        return (z - past) / coef[0, 0], hidden
    return _buffers_step(layout.filter == "inverse_buffers", coef, z, hidden)


def _buffers_step(
    inverse: bool, coef: jax.Array, z: jax.Array, buffers: jax.Array
) -> tuple[jax.Array, jax.Array]:
    decay, weight = coef
    read = jnp.einsum("m,mn->n", weight, buffers, precision=jax.lax.Precision.HIGHEST)
    x = z - read if inverse else z + read
    return x, decay[:, None] * buffers + (x if inverse else z)


def _weighted_samples(
    sample: _Sampler, key_of: Callable[[jax.Array], jax.Array], weights: jax.Array, size: int
) -> jax.Array:
    """sum_j weights[j] z_j, one sample after the other; zeros at both ends are not sampled."""
    used = weights != 0
    first, last = jnp.argmax(used), weights.shape[0] - jnp.argmax(used[::-1])

    def add(j: jax.Array, total: jax.Array) -> jax.Array:
        return total + weights[j] * sample(key_of(j))

    stop = jnp.where(used.any(), last, first)
    return jax.lax.fori_loop(first, stop, add, jnp.zeros(size, weights.dtype))


def _put(
    layout: Layout, step: jax.Array, ring: jax.Array, x: jax.Array, hidden: jax.Array
) -> jax.Array:
    """The ring with these hidden rows, and x in the slot of the step."""
    if layout.hidden:
        ring = ring.at[: layout.hidden].set(hidden)
    if layout.slots:
        ring = ring.at[layout.hidden + step % layout.slots].set(x)
    return ring


def _warm_up(
    layout: Layout,
    one_step: Callable[[], tuple[jax.Array, jax.Array]],
    step: jax.Array,
    phase_of_all: Callable[[], jax.Array],
    ring: jax.Array,
) -> jax.Array:
    """Makes x_t of the tiles not refreshed yet, in the first S - 1 steps."""
    old = ring[layout.hidden + step % layout.slots], ring[: layout.hidden]

    def compute() -> tuple[jax.Array, jax.Array]:
        phase, new = phase_of_all(), one_step()
        return jnp.where(phase > step, new[0], old[0]), jnp.where(phase > step, new[1], old[1])

    x, hidden = jax.lax.cond(step < layout.slots - 1, compute, lambda: old)
    return _put(layout, step, ring, x, hidden)


# -- The look-ahead of some tiles -------------------------------------------------------------


def _refresh(
    slots: int,
    here: _Here,
    now: jax.Array,
    first_phase: jax.Array,
    keys: jax.Array,
    matrices: _Matrices,
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
    here: _Here, keys: jax.Array, matrices: _Matrices, tiles: jax.Array, ring: jax.Array
) -> jax.Array:
    size = ring.shape[1]
    width = min(TILE, size)
    begin = tiles * TILE - here.shift
    # A tile may be short at either end: its window reaches into the next, which stays.
    start = jnp.clip(begin, 0, size - width)
    old = _read(ring, start, width)  # [rows, tiles, width]
    index = _shards.plus(here.first, (jnp.zeros_like(start, jnp.uint32), start.astype(jnp.uint32)))
    sample = functools.partial(here.sample_from, size=width)
    z = jax.vmap(lambda key: jax.vmap(lambda hi, lo: sample(key, (hi, lo)))(*index))(keys)
    new = _visited(matrices, z, old)
    if size % TILE or here.shard is not None:
        place = start[:, None] + jnp.arange(width)[None, :] - begin[:, None]
        new = jnp.where((place >= 0) & (place < TILE), new, old)
    return _write(ring, start, new)


def _refresh_elements(
    here: _Here, due: jax.Array, keys: jax.Array, matrices: _Matrices, ring: jax.Array
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
        new = _visited(matrices, z, old)[:, 0]
        return ring.at[:, at].set(new, mode="drop", unique_indices=True, indices_are_sorted=True)

    count = (jnp.count_nonzero(due) + width - 1) // width
    return jax.lax.fori_loop(0, count, some, ring)


def _visited(matrices: _Matrices, z: jax.Array, ring: jax.Array) -> jax.Array:
    """P z + Q x, of samples and rings ``[.., tiles, width]``."""
    of_noise, of_ring = matrices
    new = _matmul(of_noise.astype(ring.dtype), z)
    return new if of_ring is None else new + _matmul(of_ring.astype(ring.dtype), ring)


def _matmul(matrix: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.einsum("ij,jtw->itw", matrix, x, precision=jax.lax.Precision.HIGHEST)


def _read(ring: jax.Array, start: jax.Array, width: int) -> jax.Array:
    """Columns start[t] .. start[t] + width - 1 of the ring, as ``[rows, t, width]``."""
    return jax.lax.gather(
        ring,
        start[:, None],
        jax.lax.GatherDimensionNumbers(
            offset_dims=(0, 2), collapsed_slice_dims=(), start_index_map=(1,)
        ),
        slice_sizes=(ring.shape[0], width),
        indices_are_sorted=True,
        unique_indices=True,
        mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )


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


def _visit(layout: Layout, step: jax.Array, coef: jax.Array) -> _Matrices:
    """P ``[rows, behind + S]`` and Q ``[rows, rows]`` of a visit at this step."""
    slots, now = layout.slots, step % layout.slots
    # In the order of time, x_t .. x_{t+S-1}; slot order is `now` places on.
    if layout.filter == "recurrence":
        of_noise, of_ring = _visit_recurrence(slots, coef)
        return jnp.roll(of_noise, now, 0), jnp.roll(jnp.roll(of_ring, now, 0), now, 1)
    if layout.filter == "moving_average":
        behind = layout.behind
        lag = jnp.arange(behind + slots)[None, :] - jnp.arange(slots)[:, None]
        weights = jnp.where((lag >= 0) & (lag <= behind), coef[0, jnp.clip(lag, 0, behind)], 0)
        happened = step - behind + jnp.arange(behind + slots) >= 0
        return jnp.roll(jnp.where(happened, weights, 0), now, 0), None
    of_buffers, of_noise = _visit_buffers(layout, coef)
    order = jnp.concatenate(
        [jnp.arange(layout.hidden), layout.hidden + (jnp.arange(slots) - now) % slots]
    )
    nothing = jnp.zeros((layout.rows, slots), coef.dtype)  # of the slots as they were
    return of_noise[order], jnp.concatenate([of_buffers[order], nothing], axis=1)


def _visit_recurrence(slots: int, coef: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The terms to come x' of a recurrence, T x' + H x = z for two triangular matrices."""
    padded = jnp.pad(jnp.broadcast_to(coef, (slots, slots + 1)), ((0, 0), (0, slots)))
    row, column = jnp.arange(slots)[:, None], jnp.arange(slots)[None, :]
    # In time order x_{t+i} meets x_{t+j} with lag i - j, and x_{t-S+j} with lag S + i - j <= S.
    to_come = jnp.where(column <= row, padded[row, row - column], 0)
    in_ring = jnp.where(column >= row, padded[row, slots + row - column], 0)
    rhs = jnp.concatenate([jnp.eye(slots, dtype=coef.dtype), -in_ring], axis=1)
    of_noise, of_ring = jnp.split(
        jax.scipy.linalg.solve_triangular(to_come, rhs, lower=True), 2, axis=1
    )
    return of_noise, of_ring


def _visit_buffers(layout: Layout, coef: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Buffers and terms after S steps, as linear forms in the buffers before and in the samples."""
    forms = jnp.eye(layout.rows, dtype=coef.dtype)  # of each buffer, then of each sample
    inverse = layout.filter == "inverse_buffers"

    def step(buffers: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, buffers = _buffers_step(inverse, coef, z, buffers)
        return buffers, x

    buffers, x = jax.lax.scan(step, forms[: layout.hidden], forms[layout.hidden :])
    of_buffers, of_noise = jnp.split(jnp.concatenate([buffers, x]), [layout.hidden], axis=1)
    return of_buffers, of_noise
