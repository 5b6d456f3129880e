"""Correlated noise in plain JAX: the oracle of the other implementations, and what TPUs run.

The look-ahead of a tile is one matrix product. With x' the S terms to come, x the S terms in the ring and
z the fresh noise, all [S, elements], the recurrence is T x' + H x = z for two triangular matrices of
coefficients, so x' = T^-1 z - T^-1 H x.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import jax.scipy.linalg

from jax_privacy_kernels.ops import _counter_prng
from jax_privacy_kernels.ops._lookahead import TILE, Leaf

__all__ = ["refuse", "run"]


def refuse(leaf: Leaf, ahead: bool) -> str | None:
    """Why this implementation cannot take the leaf, or None."""
    if ahead and leaf.size >= 2**31:
        return f"{leaf.size} elements, but its indices are 32 bits wide"
    return None


def run(
    leaves: Sequence[Leaf],
    ahead: bool,
    step: jax.Array,
    keys: jax.Array,
    coef: jax.Array,
    stddev: jax.Array,
    row_scale: jax.Array,
    grads: Sequence[jax.Array],
    rings: Sequence[jax.Array],
) -> tuple[list[jax.Array], list[jax.Array]]:
    """One step; see `correlated_noise.Implementation.run`."""
    slots = coef.shape[0] - 1
    leaf_keys = jax.vmap(lambda key: jax.random.split(key, leaves[0].count))(keys)
    matrices = _advance_matrices(coef, step % slots) if slots and ahead else None
    outs, new_rings = [], []
    for leaf, grad, ring in zip(leaves, grads, rings, strict=True):
        out, ring = _leaf_step(
            leaf.noise_dtype,
            ahead,
            step,
            jnp.int32(leaf.first_tile % max(slots, 1)),
            leaf_keys[:, leaf.index],
            coef,
            matrices,
            stddev,
            row_scale,
            grad,
            ring,
        )
        outs.append(out)
        new_rings.append(ring)
    return outs, new_rings


# Jitted, so that leaves of one shape are traced once.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _leaf_step(
    noise_dtype: jnp.dtype,
    ahead: bool,
    step: jax.Array,
    first_phase: jax.Array,
    keys: jax.Array,
    coef: jax.Array,
    matrices: tuple[jax.Array, jax.Array] | None,
    stddev: jax.Array,
    row_scale: jax.Array,
    grad: jax.Array,
    ring: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    slots = ring.shape[0]
    sample = functools.partial(_sample, stddev, noise_dtype, ring.dtype)
    coef = coef.astype(ring.dtype)
    if slots == 0:
        x = sample(keys[0], grad.shape) / coef[0]
    elif grad.size == 0:
        x = jnp.zeros(grad.shape, ring.dtype)
    else:
        now = step % slots
        flat = ring.reshape(slots, -1)
        if ahead:
            assert matrices is not None
            flat = _warm_up(sample, step, first_phase, keys[now], coef, grad.shape, flat)
            flat = _refresh(sample, now, first_phase, keys, matrices, flat)
        else:
            z = sample(keys[0], grad.shape).ravel()
            flat = flat.at[now].set(_one_step(coef, now, z, flat))
        x = flat[now].reshape(grad.shape)
        ring = flat.reshape(ring.shape)
    return (grad + row_scale.astype(ring.dtype) * x).astype(grad.dtype), ring


def _sample(stddev, noise_dtype, ring_dtype, key, shape):
    z = _counter_prng.normal(key, shape, noise_dtype)
    return (stddev.astype(noise_dtype) * z).astype(ring_dtype)


def _one_step(coef, now, z, ring):
    """x_t from z_t and the S terms before it, those before step 0 being zero."""
    # Slot m holds the term of lag (now - m) mod S, and of lag S if m = now.
    lags_from_now = jnp.roll(coef[1:][::-1], now)
    past = jnp.einsum("s,sn->n", lags_from_now, ring, precision=jax.lax.Precision.HIGHEST)
    return (z - past) / coef[0]


def _warm_up(sample, step, first_phase, key, coef, shape, ring):
    """Writes x_t to slot t of the tiles that have not been refreshed yet, in the first S - 1 steps."""
    slots, size = ring.shape
    if slots == 1:
        return ring
    now = step % slots

    def compute() -> jax.Array:
        phase = (jnp.arange(size) // TILE + first_phase) % slots
        x = _one_step(coef, now, sample(key, shape).ravel(), ring)
        return jnp.where(phase > step, x, ring[now])

    row = jax.lax.cond(step < slots - 1, compute, lambda: ring[now])
    return ring.at[now].set(row)


def _refresh(sample, now, first_phase, keys, matrices, ring):
    """Overwrites the tiles whose turn it is with x_t .. x_{t+S-1}."""
    slots, size = ring.shape
    tiles = -(-size // TILE)
    tile = (now - first_phase) % slots  # the first tile whose turn it is; then every S-th
    groups = (size // TILE) // slots
    if groups:
        every = tile + slots * jnp.arange(groups, dtype=jnp.int32)
        ring = _refresh_tiles(sample, keys, matrices, ring, every)
    if tiles > slots * groups:  # fewer than S tiles, or S with a short one
        last = tile + slots * groups
        ring = jax.lax.cond(
            last < tiles,
            lambda ring: _refresh_tiles(sample, keys, matrices, ring, last[None]),
            lambda ring: ring,
            ring,
        )
    return ring


def _refresh_tiles(sample, keys, matrices, ring, tiles):
    slots, size = ring.shape
    width = min(TILE, size)
    # The last tile may be short: its window reaches back into the tile before, which stays as it is.
    start = jnp.minimum(tiles * TILE, size - width)
    old = _read(ring, start, width)  # [S, tiles, width]
    z = jax.vmap(jax.vmap(lambda key: sample(key, (width,))))(
        _counter_prng.at(keys[:, None], start)
    )
    of_noise, of_ring = (matrix.astype(ring.dtype) for matrix in matrices)
    new = _matmul(of_noise, z) + _matmul(of_ring, old)
    if size % TILE:
        mine = start[:, None] + jnp.arange(width) >= tiles[:, None] * TILE
        new = jnp.where(mine, new, old)
    return _write(ring, start, new)


def _matmul(matrix, x):
    return jnp.einsum("ij,jtw->itw", matrix, x, precision=jax.lax.Precision.HIGHEST)


def _read(ring, start, width):
    """Columns start[t] .. start[t] + width - 1 of the ring, as [S, t, width]."""
    dimensions = jax.lax.GatherDimensionNumbers(
        offset_dims=(0, 2), collapsed_slice_dims=(), start_index_map=(1,)
    )
    mode = jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS
    sizes = (ring.shape[0], width)
    return jax.lax.gather(
        ring,
        start[:, None],
        dimensions,
        sizes,
        unique_indices=True,
        indices_are_sorted=True,
        mode=mode,
    )


def _write(ring, start, columns):
    """The ring with columns start[t] .. start[t] + width - 1 replaced."""
    dimensions = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(0, 2), inserted_window_dims=(), scatter_dims_to_operand_dims=(1,)
    )
    mode = jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS
    return jax.lax.scatter(
        ring,
        start[:, None],
        columns,
        dimensions,
        unique_indices=True,
        indices_are_sorted=True,
        mode=mode,
    )


def _advance_matrices(coef, now):
    """T^-1 and -T^-1 H, both [S, S], rows and columns in slot order."""
    slots = coef.shape[0] - 1
    padded = jnp.concatenate([coef, jnp.zeros(slots, coef.dtype)])
    row, column = jnp.arange(slots)[:, None], jnp.arange(slots)
    # In time order: x_{t+i} meets x_{t+j} with lag i - j, and x_{t-S+j} with lag S + i - j <= S.
    to_come = jnp.where(column <= row, padded[row - column], 0)
    in_ring = jnp.where(column >= row, padded[slots + row - column], 0)
    rhs = jnp.concatenate([jnp.eye(slots, dtype=coef.dtype), -in_ring], axis=1)
    solved = jax.scipy.linalg.solve_triangular(to_come, rhs, lower=True)
    return tuple(jnp.roll(m, (now, now), (0, 1)) for m in jnp.split(solved, 2, axis=1))
