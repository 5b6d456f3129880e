"""Correlated noise in plain JAX: the oracle of the other implementations, and what TPUs run.

The look-ahead of a tile is one matrix product. With x' the S terms to come, x the S terms in the
ring and z the fresh noise, all [S, elements], the recurrence is T x' + H x = z for two triangular
matrices of coefficients, so x' = T^-1 z - T^-1 H x.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import jax.scipy.linalg

from jax_privacy_kernels.ops import _counter_prng
from jax_privacy_kernels.ops._lookahead import TILE, Leaf

__all__ = ["refuse", "run"]

_Sampler = Callable[[jax.Array, int], jax.Array]  # (key, size) -> z
_Matrices = tuple[jax.Array, jax.Array]


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
    scale: jax.Array,
    grads: Sequence[jax.Array],
    rings: Sequence[jax.Array],
) -> tuple[list[jax.Array], list[jax.Array]]:
    """One step; the contract stands in correlated_noise.py, above its table."""
    slots = coef.shape[0] - 1
    leaf_keys = jax.vmap(lambda key: jax.random.split(key, leaves[0].count))(keys)
    matrices = None
    if slots and ahead:
        matrices = _advance_matrices(coef.astype(jnp.result_type(coef, *rings)), step % slots)
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
    noise_dtype: jnp.dtype,
    ahead: bool,
    step: jax.Array,
    first_phase: jax.Array,
    keys: jax.Array,
    coef: jax.Array,
    matrices: _Matrices | None,
    scale: jax.Array,
    grad: jax.Array,
    ring: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    slots = ring.shape[0]
    coef = coef.astype(ring.dtype)

    def sample(key: jax.Array, size: int) -> jax.Array:
        return _counter_prng.normal(key, (size,), noise_dtype).astype(ring.dtype)

    if slots == 0:
        x = sample(keys[0], grad.size) / coef[0]
    else:
        now = step % slots
        flat = ring.reshape(slots, -1)
        if matrices is None:
            flat = flat.at[now].set(_one_step(coef, now, sample(keys[0], grad.size), flat))
        else:
            flat = _warm_up(sample, step, first_phase, keys[now], coef, flat)
            flat = _refresh(sample, now, first_phase, keys, matrices, flat)
        x = flat[now]
        ring = flat.reshape(ring.shape)
    noise = scale.astype(ring.dtype) * x.reshape(grad.shape)
    return (grad + noise).astype(grad.dtype), ring


def _one_step(coef: jax.Array, now: jax.Array, z: jax.Array, ring: jax.Array) -> jax.Array:
    """x_t from z_t and the S terms before it, those before step 0 being zero."""
    # Slot m holds the term of lag (now - m) mod S, and of lag S if m = now.
    lags = jnp.roll(coef[1:][::-1], now)
    past = jnp.einsum("s,sn->n", lags, ring, precision=jax.lax.Precision.HIGHEST)
    return (z - past) / coef[0]


def _warm_up(
    sample: _Sampler,
    step: jax.Array,
    first_phase: jax.Array,
    key: jax.Array,
    coef: jax.Array,
    ring: jax.Array,
) -> jax.Array:
    """Writes x_t to slot t of the tiles not refreshed yet, in the first S - 1 steps."""
    slots, size = ring.shape
    if slots == 1:
        return ring
    now = step % slots

    def compute() -> jax.Array:
        phase = (jnp.arange(size) // TILE + first_phase) % slots
        return jnp.where(phase > step, _one_step(coef, now, sample(key, size), ring), ring[now])

    return ring.at[now].set(jax.lax.cond(step < slots - 1, compute, lambda: ring[now]))


def _refresh(
    sample: _Sampler,
    now: jax.Array,
    first_phase: jax.Array,
    keys: jax.Array,
    matrices: _Matrices,
    ring: jax.Array,
) -> jax.Array:
    """Overwrites the tiles whose turn it is with x_t .. x_{t+S-1}."""
    slots, size = ring.shape
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
    old = _read(ring, start, width)  # [S, tiles, width]
    at = _counter_prng.at(keys[:, None], start)
    z = jax.vmap(jax.vmap(lambda key: sample(key, width)))(at)
    of_noise, of_ring = (matrix.astype(ring.dtype) for matrix in matrices)
    new = _matmul(of_noise, z) + _matmul(of_ring, old)
    if size % TILE:
        mine = start[:, None] + jnp.arange(width)[None, :] >= tiles[:, None] * TILE
        new = jnp.where(mine[None], new, old)
    return _write(ring, start, new)


def _matmul(matrix: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.einsum("ij,jtw->itw", matrix, x, precision=jax.lax.Precision.HIGHEST)


def _read(ring: jax.Array, start: jax.Array, width: int) -> jax.Array:
    """Columns start[t] .. start[t] + width - 1 of the ring, as ``[S, t, width]``."""
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


def _advance_matrices(coef: jax.Array, now: jax.Array) -> _Matrices:
    """T^-1 and -T^-1 H, both ``[S, S]``, rows and columns in slot order."""
    slots = coef.shape[0] - 1
    padded = jnp.concatenate([coef, jnp.zeros(slots, coef.dtype)])
    row, column = jnp.arange(slots)[:, None], jnp.arange(slots)[None, :]
    # In time order x_{t+i} meets x_{t+j} with lag i - j, and x_{t-S+j} with lag S + i - j <= S.
    to_come = jnp.where(column <= row, padded[row - column], 0)
    in_ring = jnp.where(column >= row, padded[slots + row - column], 0)
    rhs = jnp.concatenate([jnp.eye(slots, dtype=coef.dtype), -in_ring], axis=1)
    solved = jax.scipy.linalg.solve_triangular(to_come, rhs, lower=True)
    of_noise, of_ring = (
        jnp.roll(jnp.roll(matrix, now, 0), now, 1) for matrix in jnp.split(solved, 2, axis=1)
    )
    return of_noise, of_ring
