"""A step of correlated noise of a bundle of leaves, in plain JAX.

Samples, and products of them with matrices, are those of all leaves at once. Rings stay apart: only
the windows of the tiles whose turn it is are brought together, and written back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels.ops._jax_bundles import Bundle, each, places
from jax_privacy_kernels.ops._leaves import TILE
from jax_privacy_kernels.ops.correlated_noise._filters import Filter
from jax_privacy_kernels.ops.correlated_noise._jax_filters import (
    VISITS,
    Matrices,
    put,
    read,
    visited,
)

__all__ = ["bundle_step"]

_Rings = list[jax.Array]  # [rows, size] each
_T = TypeVar("_T")


class _Step(NamedTuple):
    """What the parts of a step share."""

    filter: Filter
    bundle: Bundle
    first_phases: np.ndarray  # [leaves]
    step: jax.Array
    keys: jax.Array  # [keys, leaves]
    coef: jax.Array
    stddevs: jax.Array

    @property
    def now(self) -> jax.Array:
        return self.step % self.filter.slots

    def noise(self) -> jax.Array:
        """``[bundle.size]``, the part of x_t that is of samples alone."""
        filter, dtype = self.filter, self.bundle.dtype
        make = functools.partial(VISITS[type(filter)].noise, filter, self.bundle)
        arguments = self.step, self.keys, self.coef, self.stddevs
        return self.in_memory(make, (self.bundle.size,), dtype, *arguments)

    def in_memory(
        self, make: Callable[..., jax.Array], shape: tuple[int, ...], dtype: jnp.dtype, *args: Any
    ) -> jax.Array:
        """``make(*args)``, which XLA must not fuse into what is done with it.

        It would compile samples for every leaf, and be slow at making them in another order. It
        does not know that there is always a step after this one.
        """
        none = lambda *_: jnp.full(shape, jnp.nan, dtype)  # noqa: E731
        return jax.lax.cond(self.step < jnp.iinfo(jnp.int32).max, make, none, *args)

    def turn(self, first_phase: jax.Array, group: jax.Array) -> jax.Array:
        """The tile of a group of S whose turn it is."""
        return self.filter.slots * group + (self.now - first_phase - group) % self.filter.slots


def bundle_step(
    filter: Filter,
    bundle: Bundle,
    first_phases: np.ndarray,
    step: jax.Array,
    keys: jax.Array,
    coef: jax.Array,
    stddevs: jax.Array | None,
    matrices: Matrices | None,
    scale: jax.Array,
    grads: Sequence[jax.Array],
    rings: Sequence[jax.Array],
) -> tuple[list[jax.Array], list[jax.Array]]:
    """A step of the leaves of a bundle; rings are none if they have no rows."""
    dtype = bundle.dtype
    stddevs = jnp.ones(keys.shape[:1], dtype) if stddevs is None else stddevs.astype(dtype)
    this = _Step(filter, bundle, first_phases, step, keys, coef.astype(dtype), stddevs)
    if rings:
        flat = [r.reshape(-1, g.size) for r, g in zip(rings, grads, strict=True)]
    else:
        flat = [jnp.zeros((0, grad.size), dtype) for grad in grads]
    if matrices is None:
        noise, begins = this.noise(), each(jnp.asarray(bundle.begins), len(grads))
        xs = []
        for i, begin in enumerate(begins):
            x, flat[i] = _advance(filter, step, this.coef, noise, begin, flat[i])
            xs.append(x)
    else:
        if filter.slots > 1:
            flat = _warm_up(this, flat)
        flat = _refresh(this, matrices, flat)
        xs = [_slot(ring, filter.buffers + this.now) for ring in flat]
    scale = scale.astype(dtype)
    outs = [_add(grad, x, scale) for grad, x in zip(grads, xs, strict=True)]
    return outs, [new.reshape(ring.shape) for new, ring in zip(flat, rings, strict=bool(rings))]


# What is done for each leaf is jitted, so that leaves of one shape are traced once.


@jax.jit
def _add(grad: jax.Array, x: jax.Array, scale: jax.Array) -> jax.Array:
    return (grad + scale * x.reshape(grad.shape)).astype(grad.dtype)


def _slot(ring: jax.Array, row: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(ring, row, 0, keepdims=False)


@functools.partial(jax.jit, static_argnums=0)
def _advance(
    filter: Filter,
    step: jax.Array,
    coef: jax.Array,
    noise: jax.Array,
    begin: jax.Array,
    ring: jax.Array,
    first_phase: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """x_t, and the ring after one step of all tiles, or of those whose phase is yet to come."""
    size = ring.shape[1]
    noise = jax.lax.dynamic_slice(noise, (begin,), (size,))
    x, buffers = VISITS[type(filter)].term(filter, step, coef, noise, ring)
    if first_phase is not None:
        tile = jax.lax.iota(jnp.int32, size) // TILE
        later = (tile + tile // filter.slots + first_phase) % filter.slots > step
        x = jnp.where(later, x, _slot(ring, filter.buffers + step % filter.slots))
        buffers = jnp.where(later, buffers, ring[: filter.buffers])
    return x, put(filter, step, ring, x, buffers)


def _warm_up(this: _Step, rings: _Rings) -> _Rings:
    """Makes x_t of the tiles not refreshed yet, in the first S - 1 steps."""
    filter, step = this.filter, this.step

    def advance(rings: _Rings) -> _Rings:
        noise = this.noise()
        table = each(jnp.stack([this.bundle.begins, this.first_phases], axis=1), len(rings))
        return [
            _advance(filter, step, this.coef, noise, begin, ring, first_phase)[1]
            for ring, (begin, first_phase) in zip(rings, table, strict=True)
        ]

    return jax.lax.cond(step < filter.slots - 1, advance, lambda rings: rings, rings)


# -- The look-ahead of some tiles -------------------------------------------------------------
#
# A leaf has whole groups of S tiles, one of which has its turn at every step, and perhaps a rest of
# fewer, one of which has at some steps. The tiles whose turn it is are columns ``[rows, TILE]``:
# those of whole groups, leaf by leaf, and then those of rests, as many as there are at most.


class _Rests(NamedTuple):
    """The rests of the leaves that have one, ``[rests]`` each, in the order of their phases."""

    leaves: np.ndarray  # which of the leaves
    part_count: int
    start: jax.Array  # the first element of the window that its tile is read and written in
    due: jax.Array  # whether the tile is there
    chosen: jax.Array  # the rests that the columns are of; of the last, any
    # [4] for each: the first element of the tile, start, due, and its column, or one that nobody
    # reads if it is not there.
    rows: list[jax.Array]

    @property
    def parts(self) -> list[np.ndarray]:
        """The rests by phases, few of which have tiles whose turn it is."""
        return np.array_split(np.arange(self.leaves.size), self.part_count)

    def if_due(self, part: np.ndarray, do: Callable[[_T], _T], state: _T) -> _T:
        """``do(state)``; the state as it is if that is known to change nothing."""
        if self.part_count == 1:
            return do(state)
        return jax.lax.cond(self.due[part].any(), do, lambda state: state, state)


def _groups(this: _Step) -> np.ndarray:
    """``[leaves]``, the numbers of whole groups."""
    return np.array(this.bundle.sizes) // TILE // this.filter.slots


def _rests(this: _Step) -> _Rests | None:
    slots, groups = this.filter.slots, _groups(this)
    sizes, tiles = np.array(this.bundle.sizes), np.array(this.bundle.tiles)
    leaves = np.flatnonzero(tiles > slots * groups)
    if not leaves.size:
        return None
    parts = max(min(-(-slots // 2), leaves.size // 4), 1)
    leaves = leaves[np.argsort((groups + this.first_phases)[leaves] % slots, kind="stable")]
    group, first = groups[leaves], this.first_phases[leaves]
    place = slots * group[:, None] + np.arange(slots)
    phase = (place + group[:, None] + first[:, None]) % slots
    most = np.bincount(phase[place < tiles[leaves, None]]).max()
    tile = this.turn(jnp.asarray(first), jnp.asarray(group, jnp.int32))
    due = tile < jnp.asarray(tiles[leaves], jnp.int32)
    own = jnp.cumsum(due, dtype=jnp.int32) - 1
    column = jnp.where(due, own, most) + int(groups.sum())
    room = jnp.asarray(sizes - np.minimum(sizes, TILE), jnp.int32)[leaves]
    (chosen,) = jnp.nonzero(due, size=int(most) + 1, fill_value=0)
    begin = tile * TILE
    start = jnp.minimum(begin, room)
    table = jnp.stack([begin, start, due.astype(jnp.int32), column], axis=1)
    return _Rests(leaves, parts, start, due, chosen, list(each(table, leaves.size)))


def _refresh(this: _Step, matrices: Matrices, rings: _Rings) -> _Rings:
    """Overwrites the tiles whose turn it is with x_t .. x_{t+S-1}."""
    groups, rests = _groups(this), _rests(this)
    leaf, group = places(groups)
    start = this.turn(jnp.asarray(this.first_phases)[leaf], group) * TILE
    if rests is not None:
        leaf = jnp.concatenate([leaf, jnp.asarray(rests.leaves, jnp.int32)[rests.chosen]])
        start = jnp.concatenate([start, rests.start[rests.chosen]])
    shape = this.keys.shape[0], leaf.shape[0], TILE
    sample = this.bundle.sample_tiles
    z = this.in_memory(sample, shape, this.bundle.dtype, this.keys, leaf, start)
    columns = None if matrices[1] is None else _read(this, groups, rests, rings, leaf.shape[0])
    new = visited(matrices, z, columns)
    rings = _write_groups(this, groups, new, rings)
    return rings if rests is None else _write_rests(rests, new, rings)


def _windows(this: _Step, groups: np.ndarray, leaves: np.ndarray) -> jax.Array:
    """``[leaves, 3]``, the groups of each, its first column and the phase of its first tile."""
    columns = np.cumsum([0, *groups[:-1]])
    table = np.stack([groups, columns, this.first_phases], axis=1)[leaves]
    return jnp.asarray(table, jnp.int32)


def _read(
    this: _Step, groups: np.ndarray, rests: _Rests | None, rings: _Rings, count: int
) -> jax.Array:
    """``[rows, count, TILE]``, the rings in the windows of the columns."""
    columns = jnp.zeros((this.filter.rows, count, TILE), this.bundle.dtype)
    leaves = np.flatnonzero(groups)
    table = each(_windows(this, groups, leaves), leaves.size)
    for i, (_, column, first_phase) in zip(leaves, table, strict=True):
        of_leaf = jnp.arange(groups[i], dtype=jnp.int32)
        found = read(rings[i], this.turn(first_phase, of_leaf) * TILE, TILE)
        columns = jax.lax.dynamic_update_slice(columns, found, (0, column, 0))
    if rests is not None:
        for part in rests.parts:

            def body(columns: jax.Array, part: np.ndarray = part) -> jax.Array:
                for i in part:
                    _, start, _, column = rests.rows[i]
                    columns = _read_rest(columns, rings[rests.leaves[i]], start, column)
                return columns

            columns = rests.if_due(part, body, columns)
    return columns


@jax.jit
def _read_rest(
    columns: jax.Array, ring: jax.Array, start: jax.Array, column: jax.Array
) -> jax.Array:
    rows, size = ring.shape
    found = jax.lax.dynamic_slice(ring, (0, start), (rows, min(TILE, size)))
    return jax.lax.dynamic_update_slice(columns, found[:, None], (0, column, 0))


def _write_groups(this: _Step, groups: np.ndarray, new: jax.Array, rings: _Rings) -> _Rings:
    """The rings with the columns of whole groups."""
    rings = list(rings)
    # Leaves of similar size share a loop; those that are done write their last column again.
    classes = np.array([int(n).bit_length() for n in groups])
    for similar in sorted(set(classes[groups > 0].tolist())):
        leaves = np.flatnonzero(classes == similar)

        def body(j: jax.Array, some: _Rings, leaves: np.ndarray = leaves) -> _Rings:
            table, written = each(_windows(this, groups, leaves), leaves.size), []
            for ring, (count, column, first_phase) in zip(some, table, strict=True):
                group = jnp.minimum(j, count - 1)
                shape = (ring.shape[0], 1, TILE)
                window = jax.lax.dynamic_slice(new, (0, column + group, 0), shape)[:, 0]
                start = this.turn(first_phase, group) * TILE
                written.append(jax.lax.dynamic_update_slice(ring, window, (0, start)))
            return written

        some = [rings[i] for i in leaves]
        some = jax.lax.fori_loop(0, int(groups[leaves].max()), body, some)
        for i, ring in zip(leaves, some, strict=True):
            rings[i] = ring
    return rings


def _write_rests(rests: _Rests, new: jax.Array, rings: _Rings) -> _Rings:
    """The rings with the columns of rests that have their turn."""
    rings = list(rings)
    for part in rests.parts:

        def body(some: _Rings, part: np.ndarray = part) -> _Rings:
            return [
                _write_rest(ring, new, *rests.rows[i]) for ring, i in zip(some, part, strict=True)
            ]

        leaves = rests.leaves[part]
        some = rests.if_due(part, body, [rings[i] for i in leaves])
        for i, ring in zip(leaves, some, strict=True):
            rings[i] = ring
    return rings


@jax.jit
def _write_rest(
    ring: jax.Array,
    new: jax.Array,
    begin: jax.Array,
    start: jax.Array,
    due: jax.Array,
    column: jax.Array,
) -> jax.Array:
    rows, width = ring.shape[0], min(TILE, ring.shape[1])
    window = jax.lax.dynamic_slice(new, (0, column, 0), (rows, 1, width))[:, 0]
    old = jax.lax.dynamic_slice(ring, (0, start), (rows, width))
    # The last tile may be short: its window reaches into the tile before, which stays.
    there = (due > 0) & (start + jax.lax.iota(jnp.int32, width) >= begin)
    return jax.lax.dynamic_update_slice(ring, jnp.where(there, window, old), (0, start))
