"""Leaves that plain JAX samples together, so that a program does not grow with their number.

XLA compiles whatever it is given for each leaf anew, and samples are most of it. The leaves of a
*bundle* stand after each other, each in whole tiles, and are sampled in one go. What is left for
each leaf is to slice that and to add it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels.ops import _chacha20, _counter_prng
from jax_privacy_kernels.ops._leaves import TILE, Leaf

__all__ = ["SMALL", "Bundle", "bundles", "each", "places"]

# Elements of a leaf. A larger one takes longer at every step with others than alone, as samples go
# through memory: a quarter of a millisecond for 130,000, where compiling it alone takes 150.
SMALL = 2**15
_PARTS = 8  # bundles of about an eighth of all elements bound what is in memory beside the leaves
_FEW = 2**20  # elements that are no matter


def bundles(leaves: Sequence[Leaf], counted: bool) -> list[list[int]]:
    """The leaves, by their positions, in groups that can be sampled together.

    Shards of leaves, sizes that are symbols, and leaves that are not small stay alone.

    Args:
      leaves: static.
      counted: whether bits are a function of the key and the index of an element. Where they are
        not, leaves must be of one size.
    """
    sizes = [leaf.size if leaf.whole and isinstance(leaf.size, int) else 0 for leaf in leaves]
    most = max(sum(sizes) // _PARTS, _FEW)
    groups: list[list[int]] = []
    last: dict[Any, list[int]] = {}  # the group that is being filled, by what its leaves share
    for i, (leaf, size) in enumerate(zip(leaves, sizes, strict=True)):
        if not 0 < size <= SMALL:
            groups.append([i])
            continue
        shared = leaf.noise_dtype, leaf.dtype, None if counted else size
        group = last.get(shared)
        if group is None or sum(sizes[j] for j in group) + size > most:
            last[shared] = group = []
            groups.append(group)
        group.append(i)
    return groups


def each(table: jax.Array, count: int) -> Iterator[jax.Array]:
    """The rows of a table, as numbers that XLA does not know.

    What it does with each row, on arrays of one shape, is then the same to it and compiled once.
    """
    for i in range(count):
        yield table[0]
        if i + 1 < count:
            table = jax.lax.optimization_barrier(jnp.concatenate([table[1:], table[:1]]))


class Bundle(NamedTuple):
    """The elements of whole leaves that stand after each other; as `Here` has it for one leaf."""

    sizes: tuple[int, ...]
    counted: bool
    noise_dtype: jnp.dtype
    dtype: jnp.dtype  # of the rings

    @classmethod
    def of(cls, leaves: Sequence[Leaf], counted: bool) -> Bundle:
        sizes = tuple(leaf.size for leaf in leaves)
        return cls(sizes, counted, leaves[0].noise_dtype, leaves[0].dtype)

    @property
    def tiles(self) -> list[int]:
        return [-(-size // TILE) for size in self.sizes]

    @property
    def size(self) -> int:
        """The number of elements, with those that fill up tiles."""
        return sum(self.tiles) * TILE if self.counted else sum(self.sizes)

    @property
    def begins(self) -> np.ndarray:
        """``[leaves]``, where leaves begin among all elements."""
        each = [n * TILE for n in self.tiles] if self.counted else self.sizes
        return np.cumsum([0, *each[:-1]]).astype(np.int32)

    def sample(self, keys: jax.Array) -> jax.Array:
        """``[size]``, the samples of all elements, by a key for each of the leaves."""
        if not self.counted:  # keys of type unsafe_rbg make other bits under a vmap
            one = lambda key: jax.random.normal(key, self.sizes[:1], self.noise_dtype)  # noqa: E731
            return jax.lax.map(one, keys).reshape(-1).astype(self.dtype)
        leaf, tile = places(self.tiles)
        return self.sample_tiles(keys[None], leaf, tile * TILE).reshape(-1)

    def sample_tiles(self, keys: jax.Array, leaf: jax.Array, begin: jax.Array) -> jax.Array:
        """``[keys, tiles, TILE]``, the samples of elements that follow each other in their leaves.

        Args:
          keys: ``[keys, leaves]``.
          leaf: ``[tiles]``, which of the leaves.
          begin: ``[tiles]``, the index in its leaf of the first element.
        """

        def under_keys(keys: jax.Array, begin: jax.Array) -> jax.Array:
            index = jnp.zeros_like(begin), begin
            at = _counter_prng.at(keys, index)
            z = jax.vmap(lambda key: jax.random.normal(key, (TILE,), self.noise_dtype))(at)
            return z.astype(self.dtype)

        def at_once(keys: jax.Array, begin: jax.Array) -> jax.Array:
            return jax.vmap(under_keys, (0, None))(keys, begin)

        def in_chunks(keys: jax.Array, begin: jax.Array) -> jax.Array:
            some = max(_chacha20.CHUNK * _chacha20.GROUP // (TILE * keys.shape[0]), 1)
            one = lambda both: jax.vmap(lambda k: under_keys(k[None], both[1][None])[0])(both[0])  # noqa: E731
            z = jax.lax.map(one, (jnp.swapaxes(keys, 0, 1), begin), batch_size=some)
            return jnp.swapaxes(z, 0, 1)

        keys, begin = keys[:, leaf], begin.astype(jnp.uint32)
        if jax.random.key_impl(keys) != _chacha20.CHACHA20:
            return at_once(keys, begin)
        return jax.lax.platform_dependent(keys, begin, cpu=in_chunks, default=at_once)


def places(counts: Iterable[int]) -> tuple[jax.Array, jax.Array]:
    """``[sum]`` each: which of the leaves, and the place among its own, that many for each."""
    counts = np.fromiter(counts, np.int32)
    total = int(counts.sum())
    # XLA would spend its time on computing them when it compiles.
    ends = jax.lax.optimization_barrier(jnp.asarray(np.cumsum(counts), jnp.int32))
    at = jnp.arange(total, dtype=jnp.int32)
    leaf = jnp.searchsorted(ends, at, side="right").astype(jnp.int32)
    before = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
    return leaf, at - before[leaf]
