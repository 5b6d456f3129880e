"""What the plain JAX implementations of the noise ops share: samples of what is here of a leaf.

A shard that is one run of a leaf is treated as the leaf is, from another index on; the elements of
other shards one by one. Samples are the same bit for bit wherever they are made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_privacy_kernels.ops import _chacha20, _counter_prng, _shards
from jax_privacy_kernels.ops._jax_bundles import Bundle
from jax_privacy_kernels.ops._leaves import TILE, Leaf, tile_of
from jax_privacy_kernels.ops._shards import Shard, Words

__all__ = ["Here", "refuse", "weighted_samples"]


def refuse(leaf: Leaf, ahead: bool, stream: str) -> str | None:
    """Why plain JAX cannot take what is here of a leaf, or None.

    ``ahead`` says whether bits are a function of the key and the index of an element. Where they
    are not, the whole leaf is sampled for each of its shards.
    """
    del stream  # JAX samples by keys of all types
    size = leaf.shard.size if ahead else leaf.size
    if size >= 2**31 and (ahead or not leaf.whole):
        return f"{size} elements, but its indices are 32 bits wide"
    return None


class Here(NamedTuple):
    """The elements of a leaf that are here."""

    shard: Shard | None  # None: the whole leaf
    first: Words  # the index in the leaf of the first element that is here
    leaf_size: int  # 0 where bits are a function of the key and the index
    size: int
    noise_dtype: jnp.dtype
    dtype: jnp.dtype  # of the ring

    @property
    def shift(self) -> int | jax.Array:
        """By how many elements a tile begins before the first element that is here."""
        return 0 if self.shard is None else (self.first[1] % TILE).astype(jnp.int32)

    def tile(self, index: Words, slots: int) -> jax.Array:
        """The tiles that elements are in, modulo ``slots^2``."""
        return (tile_of(index) % min(slots**2, 2**31)).astype(jnp.int32)

    def phase(self, slots: int, first_phase: jax.Array) -> jax.Array:
        """``[size]``, the phases of the tiles that the elements are in.

        ``first_phase`` is the leaf's first_tile modulo ``slots``.
        """
        if self.shard is None:
            tile = jnp.arange(self.size, dtype=jnp.int32) // TILE
        else:
            tile = self.tile(_shards.indices(self.shard, self.first), slots)
        return (tile + tile // slots + first_phase) % slots

    def sample(self, key: jax.Array) -> jax.Array:
        """``[size]``, the samples of all elements."""
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
        """``[size]``, the samples of elements that follow each other in the leaf."""
        key = _counter_prng.at(key, index)
        return jax.random.normal(key, (size,), self.noise_dtype).astype(self.dtype)

    def sample_windows(self, keys: jax.Array, index: Words, size: int) -> jax.Array:
        """``[keys, windows, size]``, the samples of elements that follow those of each index."""

        def under_keys(index: Words) -> jax.Array:
            return jax.vmap(lambda key: self.sample_from(key, index, size))(keys)

        def at_once(index: Words) -> jax.Array:
            return jax.vmap(under_keys, out_axes=1)(index)

        def in_chunks(index: Words) -> jax.Array:
            windows = max(_chacha20.CHUNK * _chacha20.GROUP // (size * keys.shape[0]), 1)
            return jnp.swapaxes(jax.lax.map(under_keys, index, batch_size=windows), 0, 1)

        if jax.random.key_impl(keys) != _chacha20.CHACHA20:
            return at_once(index)
        return jax.lax.platform_dependent(index, cpu=in_chunks, default=at_once)

    def sample_at(self, key: jax.Array, index: Words) -> jax.Array:
        """The samples of elements anywhere in the leaf."""
        return jax.vmap(lambda hi, lo: self.sample_from(key, (hi, lo), 1)[0])(*index)


def weighted_samples(
    here: Here | Bundle, key_of: Callable[[jax.Array], jax.Array], weights: jax.Array
) -> jax.Array:
    """sum_j weights[j] z_j, one sample after the other; zeros at both ends are not sampled."""
    used = weights != 0
    first, last = jnp.argmax(used), weights.shape[0] - jnp.argmax(used[::-1])

    def add(j: jax.Array, total: jax.Array) -> jax.Array:
        return total + weights[j] * here.sample(key_of(j))

    stop = jnp.where(used.any(), last, first)
    return jax.lax.fori_loop(first, stop, add, jnp.zeros(here.size, weights.dtype))
