"""Correlated noise in plain JAX: the oracle of the other implementations, and what TPUs run.

The look-ahead of a tile is a matrix product. Every filter is linear, so with x' the ring after a
visit, x the ring before and z the samples, all [.., elements], x' = P z + Q x for two small
matrices that depend on the coefficients and the slots only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import jax.scipy.linalg

from jax_privacy_kernels.ops import _counter_prng
from jax_privacy_kernels.ops._lookahead import TILE, Leaf
from jax_privacy_kernels.ops._recurrence import Layout

__all__ = ["refuse", "run"]

_Sampler = Callable[[jax.Array, int], jax.Array]  # (key, size) -> z
_Matrices = tuple[jax.Array, jax.Array | None]  # P, and Q if it is not zero


def refuse(leaf: Leaf, layout: Layout) -> str | None:
    """Why this implementation cannot take the leaf, or None."""
    if layout.ahead and leaf.size >= 2**31:
        return f"{leaf.size} elements, but its indices are 32 bits wide"
    return None


def run(
    layout: Layout,
    leaves: Sequence[Leaf],
    step: jax.Array,
    keys: jax.Array,
    coef: jax.Array,
    scale: jax.Array,
    grads: Sequence[jax.Array],
    rings: Sequence[jax.Array],
) -> tuple[list[jax.Array], list[jax.Array]]:
    """One step; the contract stands in correlated_noise.py, above its table."""
    # Under a vmap, keys of type unsafe_rbg split otherwise.
    over_keys = jax.vmap if layout.ahead else lambda f: functools.partial(jax.lax.map, f)
    leaf_keys = over_keys(lambda key: jax.random.split(key, leaves[0].count))(keys)
    matrices = None
    if layout.slots and layout.ahead:
        matrices = _visit(layout, step, coef.astype(jnp.result_type(coef, *rings)))
    outs, new_rings = [], []
    for leaf, grad, ring in zip(leaves, grads, rings, strict=True):
        out, ring = _leaf_step(
            layout,
            leaf.noise_dtype,
            step,
            jnp.int32(leaf.first_tile % max(layout.slots, 1)),
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
@functools.partial(jax.jit, static_argnums=(0, 1))
def _leaf_step(
    layout: Layout,
    noise_dtype: jnp.dtype,
    step: jax.Array,
    first_phase: jax.Array,
    keys: jax.Array,
    coef: jax.Array,
    matrices: _Matrices | None,
    scale: jax.Array,
    grad: jax.Array,
    ring: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    def sample(key: jax.Array, size: int) -> jax.Array:
        return _counter_prng.normal(key, (size,), noise_dtype).astype(ring.dtype)

    flat = ring.reshape(layout.rows, grad.size)
    one_step = functools.partial(
        _one_step, layout, sample, step, keys, coef.astype(ring.dtype), flat
    )
    if matrices is None:
        x, hidden = one_step()
        flat = _put(layout, step, flat, x, hidden)
    else:
        if layout.slots > 1:
            flat = _warm_up(layout, one_step, step, first_phase, flat)
        flat = _refresh(
            layout.slots, sample, step % layout.slots, first_phase, keys, matrices, flat
        )
        x = flat[layout.hidden + step % layout.slots]
    noise = scale.astype(ring.dtype) * x.reshape(grad.shape)
    return (grad + noise).astype(grad.dtype), flat.reshape(ring.shape)


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
    z = sample(keys[0], size)
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
        return total + weights[j] * sample(key_of(j), size)

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
    first_phase: jax.Array,
    ring: jax.Array,
) -> jax.Array:
    """Makes x_t of the tiles not refreshed yet, in the first S - 1 steps."""
    old = ring[layout.hidden + step % layout.slots], ring[: layout.hidden]

    def compute() -> tuple[jax.Array, jax.Array]:
        phase = (jnp.arange(ring.shape[1]) // TILE + first_phase) % layout.slots
        new = one_step()
        return jnp.where(phase > step, new[0], old[0]), jnp.where(phase > step, new[1], old[1])

    x, hidden = jax.lax.cond(step < layout.slots - 1, compute, lambda: old)
    return _put(layout, step, ring, x, hidden)


# -- The look-ahead of some tiles -------------------------------------------------------------


def _refresh(
    slots: int,
    sample: _Sampler,
    now: jax.Array,
    first_phase: jax.Array,
    keys: jax.Array,
    matrices: _Matrices,
    ring: jax.Array,
) -> jax.Array:
    """Overwrites the tiles whose turn it is with x_t .. x_{t+S-1}."""
    size = ring.shape[1]
    tile = (now - first_phase) % slots  # the first tile whose turn it is; then every S-th
    tiles, groups = -(-size // TILE), (size // TILE) // slots
    if groups:
        every = tile + slots * jnp.arange(groups, dtype=jnp.int32)
        ring = _refresh_tiles(sample, keys, matrices, every, ring)
    if tiles > slots * groups:  # fewer than S tiles more, or S with a short one
        last = tile + slots * groups
        ring = jax.lax.cond(
            last < tiles,
            lambda ring: _refresh_tiles(sample, keys, matrices, last[None], ring),
            lambda ring: ring,
            ring,
        )
    return ring


def _refresh_tiles(
    sample: _Sampler, keys: jax.Array, matrices: _Matrices, tiles: jax.Array, ring: jax.Array
) -> jax.Array:
    size = ring.shape[1]
    width = min(TILE, size)
    # The last tile may be short: its window reaches back into the tile before, which stays.
    start = jnp.minimum(tiles * TILE, size - width)
    old = _read(ring, start, width)  # [rows, tiles, width]
    at = _counter_prng.at(keys[:, None], start)
    z = jax.vmap(jax.vmap(lambda key: sample(key, width)))(at)
    of_noise, of_ring = matrices
    new = _matmul(of_noise.astype(ring.dtype), z)
    if of_ring is not None:
        new = new + _matmul(of_ring.astype(ring.dtype), old)
    if size % TILE:
        mine = start[:, None] + jnp.arange(width)[None, :] >= tiles[:, None] * TILE
        new = jnp.where(mine[None], new, old)
    return _write(ring, start, new)


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
