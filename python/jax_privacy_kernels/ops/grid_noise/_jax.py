"""Exact noise in plain JAX: the oracle of the other implementations, and what GPUs run.

It computes in integers of 64 bits, and estimates in float64, whatever JAX's x64 mode.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_privacy_kernels.ops import _chacha20, _shards
from jax_privacy_kernels.ops._chacha20 import Domain
from jax_privacy_kernels.ops._jax_noise import Here
from jax_privacy_kernels.ops._leaves import TILE, Leaf
from jax_privacy_kernels.ops._noise import NoiseOutputs
from jax_privacy_kernels.ops._shards import Shard, Words
from jax_privacy_kernels.ops.correlated_noise._filters import (
    MovingAverageFilter,
    RecurrenceFilter,
)
from jax_privacy_kernels.ops.grid_noise._contract import Inputs
from jax_privacy_kernels.ops.grid_noise._jax_normal import rounded_normal, rounded_sums
from jax_privacy_kernels.ops.grid_noise._rounding import Rounding

__all__ = ["refuse", "run"]

_Filter = RecurrenceFilter | MovingAverageFilter
# Makes x of step t + ahead of some elements of the leaf, int64, of their terms before it.
_Make = Callable[[jax.Array, jax.Array], jax.Array]


def refuse(leaf: Leaf, filter: _Filter, stream: str) -> str | None:
    """Why this implementation cannot take what is here of the leaf, or None."""
    del filter, stream  # any of them
    if leaf.shard.size >= 2**31:
        return f"{leaf.shard.size} elements, but its indices are 32 bits wide"
    return None


def run(inputs: Inputs) -> NoiseOutputs:
    """One step."""
    assert inputs.base is not None
    leaf_keys = jax.vmap(lambda key: jax.random.split(key, inputs.leaves[0].count))(inputs.keys)
    data = jax.random.key_data(leaf_keys)
    outs, rings = [], []
    with jax.enable_x64(True):
        for i, (leaf, grad) in enumerate(zip(inputs.leaves, inputs.grads, strict=True)):
            first = inputs.base[i]
            out, ring = _leaf_step(
                inputs.filter,
                inputs.rounding,
                None if leaf.whole else leaf.shard,
                jnp.maximum(inputs.step, 0),
                jnp.int32(leaf.first_tile % max(inputs.filter.slots, 1)),
                (first[0], first[1]),
                data[:, leaf.index],
                inputs.coef,
                grad,
                inputs.rings[i] if inputs.rings else None,
            )
            outs.append(jnp.where(inputs.step < 0, jnp.iinfo(out.dtype).min, out))
            rings.append(ring)
    return NoiseOutputs(outs, rings if inputs.rings else [])


# Jitted, so that leaves of one shape are traced once.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _leaf_step(
    filter: _Filter,
    rounding: Rounding,
    shard: Shard | None,
    step: jax.Array,
    first_phase: jax.Array,
    first: Words,
    keys: jax.Array,
    coef: jax.Array,
    grad: jax.Array,
    ring: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """A step of one leaf; shard is None if all of it is here, ring if there are no slots."""
    here = Here(shard, first, 0, grad.size, grad.dtype, grad.dtype)
    slots = filter.slots
    maker = functools.partial(_maker, filter, rounding, step, keys, coef)
    make_all = maker(_indices(here), functools.partial(_bits, here))
    if ring is None:
        x = make_all(jnp.int32(0), jnp.zeros((0, grad.size), jnp.int64))
        return _plus(grad, x), None
    flat = ring.reshape(slots, grad.size)
    now = step % slots
    phase = here.phase(slots, first_phase)
    if slots > 1:
        flat = _warm_up(make_all, step, phase, flat)
    flat = _refresh(maker, _indices(here), now, phase == now, flat)
    return _plus(grad, flat[now]), flat.reshape(ring.shape)


def _plus(grad: jax.Array, x: jax.Array) -> jax.Array:
    return grad + x.reshape(grad.shape).astype(grad.dtype)


# -- Bits -------------------------------------------------------------------------------------


def _indices(here: Here) -> Words:
    shard = Shard(here.size) if here.shard is None else here.shard
    return _shards.indices(shard, here.first)


def _bits(here: Here, key: jax.Array) -> Words:
    """``[size]`` each, the high and the low words of the bits of all elements."""
    if here.shard is not None and here.shard.axes:
        return _bits_at(_indices(here), key)
    return _split(_chacha20.bits(key, Domain.GRID, 64, here.size, here.first))


def _bits_at(index: Words, key: jax.Array) -> Words:
    """The same of elements anywhere in the leaf."""
    one = jax.vmap(lambda hi, lo: _chacha20.bits(key, Domain.GRID, 64, 1, (hi, lo))[0])
    return _split(one(*index))


def _split(bits: jax.Array) -> Words:
    return (bits >> 32).astype(jnp.uint32), bits.astype(jnp.uint32)


def _more_bits(index: Words, key: jax.Array) -> jax.Array:
    """``[4, n]``, the further words of elements."""
    return jnp.stack(_chacha20.blocks(key, Domain.GRID_EXTENSION, index)[:4])


# -- Terms ------------------------------------------------------------------------------------


def _maker(
    filter: _Filter,
    rounding: Rounding,
    step: jax.Array,
    keys: jax.Array,
    coef: jax.Array,
    index: Words,
    bits: Callable[[jax.Array], Words],
) -> _Make:
    """What makes terms of the elements with these indices, whose bits ``bits(key)`` gives."""

    def at(places: jax.Array) -> Words:
        return index[0][places], index[1][places]

    def recurrence(ahead: jax.Array, terms: jax.Array) -> jax.Array:
        key = keys[ahead]
        n = rounded_normal(rounding, bits(key), lambda places: _more_bits(at(places), key))
        row = coef[jnp.minimum(ahead, coef.shape[0] - 1)].astype(jnp.int64)
        slots = filter.slots
        if slots:
            lags = ((step + ahead) % slots - jnp.arange(slots, dtype=jnp.int32)) % slots
            weights = row[jnp.where(lags == 0, slots, lags)]
            n -= (weights[:, None] * terms).sum(axis=0)
        return _quotient(n, row[0])

    def moving_average(ahead: jax.Array, terms: jax.Array) -> jax.Array:
        del terms
        # Samples before step 0 have no part.
        first = jnp.clip(filter.behind - step - ahead, 0, filter.behind)

        def all_bits(j: jax.Array, places: jax.Array) -> tuple[Words, jax.Array]:
            some, key = at(places), keys[ahead + j]
            return _bits_at(some, key), _more_bits(some, key)

        words = coef.astype(jnp.uint64)
        weights = jax.lax.bitcast_convert_type(words[:, 1] << 32 | words[:, 0], jnp.float64)
        size = index[0].shape[0]
        return rounded_sums(
            weights, rounding.scale, first, lambda j: bits(keys[ahead + j]), all_bits, size
        )

    return moving_average if isinstance(filter, MovingAverageFilter) else recurrence


def _quotient(n: jax.Array, divisor: jax.Array) -> jax.Array:
    """R(n / divisor) for integers: floor((2 n + d) / (2 d)) for a positive d."""
    sign, d = jnp.sign(divisor), jnp.abs(divisor)
    return (2 * sign * n + d) // (2 * d)


def _warm_up(make: _Make, step: jax.Array, phase: jax.Array, ring: jax.Array) -> jax.Array:
    """Makes x_t of the tiles not refreshed yet, in the first S - 1 steps."""
    slots = ring.shape[0]
    now = step % slots
    old = ring[now]

    def compute() -> jax.Array:
        x = make(jnp.int32(0), ring.astype(jnp.int64))
        return jnp.where(phase > step, x.astype(ring.dtype), old)

    return ring.at[now].set(jax.lax.cond(step < slots - 1, compute, lambda: old))


def _refresh(
    maker: Callable[[Words, Callable[[jax.Array], Words]], _Make],
    index: Words,
    now: jax.Array,
    due: jax.Array,
    ring: jax.Array,
) -> jax.Array:
    """Overwrites the elements whose turn it is with x_t .. x_{t+S-1}, some tiles at a time."""
    slots, size = ring.shape
    width = min(16 * TILE, size)
    padded = -(-size // width) * width
    chosen = jnp.nonzero(due, size=padded, fill_value=size)[0].astype(jnp.int32)

    def some(i: jax.Array, ring: jax.Array) -> jax.Array:
        at = jax.lax.dynamic_slice_in_dim(chosen, i * width, width)
        here = index[0].at[at].get(mode="clip"), index[1].at[at].get(mode="clip")
        make = maker(here, functools.partial(_bits_at, here))

        def advance(ahead: jax.Array, terms: jax.Array) -> jax.Array:
            return terms.at[(now + ahead) % slots].set(make(ahead, terms))

        old = ring.at[:, at].get(mode="clip").astype(jnp.int64)
        new = jax.lax.fori_loop(jnp.int32(0), jnp.int32(slots), advance, old).astype(ring.dtype)
        return ring.at[:, at].set(new, mode="drop")

    count = (jnp.count_nonzero(due).astype(jnp.int32) + width - 1) // width
    return jax.lax.fori_loop(jnp.int32(0), count, some, ring)
