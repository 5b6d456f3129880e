"""ChaCha20 as a JAX key type: what each block of a key is for, and where bits stand in blocks.

A key is 8 words. Beside them the input of a block (RFC 8439, section 2.3) has four more, which no
two uses of a key share:

| word | holds |
|---|---|
| 12 | the low half of the number of the block |
| 13 | the domain: what the block is for |
| 14 | the high half of the number of the block |
| 15 | a count within the domain |

`Domain` says what numbers the blocks of a domain. Elements of an array are taken in groups of 128,
in row-major order. Group g of 64 bits are the blocks 16 g .. 16 g + 15: element e of it has word
e // 16 of block 16 g + e % 16 as its low word, and word e // 16 + 8 as its high one. Group g of at
most 32 bits are the blocks 8 g .. 8 g + 7: element e has word e // 8 of block 8 g + e % 8, or its
low bits. So lanes of a vector, a block each, hold neighbours. csrc/streams.h,
kernels/_streams_triton.py and kernels/_streams_pallas.py do the same.
"""

from __future__ import annotations

import enum
import functools
import math
import warnings
from typing import Any

import jax
import jax.extend.random
import jax.numpy as jnp

from jax_privacy_kernels.kernels._chacha20 import GROUP, KEY_WORDS, chacha20
from jax_privacy_kernels.ops._shards import Words

__all__ = ["CHACHA20", "CHACHA20_AT", "CHUNK", "GROUP", "KEY_WORDS", "Domain", "bits", "blocks"]

CHUNK = 128  # groups that CPUs make at once: rounds are loops over words in memory, here in caches


class Domain(enum.IntEnum):
    """Word 13: what a block is for. csrc/chacha20.h repeats those that C++ makes."""

    SEED = 1
    """The key of an integer, words 0 to 7 of the block of that number under the key of zeros."""
    SPLIT = 2
    """Child i of a key in `jax.random.split`, words 0 to 7 of block i."""
    FOLD_IN = 3
    """The key with i folded in by `jax.random.fold_in`, words 0 to 7 of block i."""
    BITS_8 = 8
    """Bits of arrays, by the index of the element; so are the next three."""
    BITS_16 = 16
    BITS_32 = 32
    BITS_64 = 64
    GRID = 256
    """64 bits of exact noise, by the index of the element in the leaf."""
    GRID_EXTENSION = 257
    """Further bits of an element of exact noise: the block of the element's index, whose word 15
    counts the blocks that it has had."""


def blocks(key: jax.Array, domain: int, number: Words, count: int = 0) -> list[jax.Array]:
    """The 16 words of blocks of a key.

    Args:
      key: ``[8]`` uint32.
      domain: word 13.
      number: of the blocks, their high and their low words, uint32 arrays that broadcast.
      count: word 15.
    """
    high, low = number
    nonce = (low, jnp.uint32(domain), high, jnp.uint32(count))
    return chacha20([key[i] for i in range(KEY_WORDS)], nonce)


def bits(
    key: jax.Array, domain: int, width: int, size: int, first: Words | None = None
) -> jax.Array:
    """``[size]``, the bits of elements that follow each other in the order of indices.

    Args:
      key: ``[8]`` uint32.
      domain: word 13.
      width: 32 or 64, static.
      size: static.
      first: the high and the low word of the index of the first element; None for 0.
    """
    if size == 1 and first is not None:
        return _one(key, domain, width, first)
    groups = -(-size // GROUP) if first is None else (size + GROUP - 2) // GROUP + 1
    high, low = (jnp.uint32(0), jnp.uint32(0)) if first is None else first
    group = high >> 7, low >> 7 | high << 25

    def at_once(key: jax.Array, group: Words) -> jax.Array:
        return _of_groups(key, domain, width, group, groups)

    def in_chunks(key: jax.Array, group: Words) -> jax.Array:
        begins = jnp.arange(0, groups, CHUNK, dtype=jnp.uint32)
        some = lambda i: _of_groups(key, domain, width, _plus(group, i), CHUNK)  # noqa: E731
        return jax.lax.map(some, begins).reshape(-1)[: groups * GROUP]

    if not isinstance(groups, int) or groups <= CHUNK:  # or a size that is exported as a symbol
        found = at_once(key, group)
    else:
        found = jax.lax.platform_dependent(key, group, cpu=in_chunks, default=at_once)
    if first is None:
        return found[:size]
    return jax.lax.dynamic_slice_in_dim(found, (low % GROUP).astype(jnp.int32), size)


def _of_groups(key: jax.Array, domain: int, width: int, first: Words, groups: int) -> jax.Array:
    """``[GROUP groups]``, the bits of groups that follow each other."""
    lanes, shift = (8, 3) if width == 32 else (16, 4)
    high, low = _plus(first, jax.lax.iota(jnp.uint32, groups)[:, None])
    lane = jax.lax.iota(jnp.uint32, lanes)
    number = high << shift | low >> (32 - shift), low << shift | lane
    words = jnp.stack(blocks(key, domain, number), axis=1)  # [groups, 16, lanes]
    if width == 64:
        words = _join(words[:, 8:], words[:, :8])
    return words.reshape(-1)


def _plus(number: Words, less: jax.Array) -> Words:
    """The sum of a number of two words and one of a word."""
    low = number[1] + less
    return number[0] + (low < less).astype(jnp.uint32), low


def _one(key: jax.Array, domain: int, width: int, index: Words) -> jax.Array:
    """``[1]``, the bits of one element: of one block, not of all of its group."""
    lanes, shift = (8, 3) if width == 32 else (16, 4)
    high, low = index
    group, group_high = low >> 7 | high << 25, high >> 7
    number = group_high << shift | group >> (32 - shift), group << shift | low % lanes
    words = jnp.stack(blocks(key, domain, number))
    word = (low % GROUP >> shift).astype(jnp.int32)
    found = jax.lax.dynamic_slice_in_dim(words, word, 1)
    if width == 32:
        return found
    return _join(jax.lax.dynamic_slice_in_dim(words, word + 8, 1), found)


def _join(high: jax.Array, low: jax.Array) -> jax.Array:
    return high.astype(jnp.uint64) << 32 | low.astype(jnp.uint64)


# JAX calls the functions of a key type outside of traces, too: jitted, so as to be compiled whole.
# Those of the type itself are plain functions, which can be pickled.

_UINT = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32, 64: jnp.uint64}


@functools.partial(jax.jit, static_argnums=(1, 2))
def _jitted_bits(key: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    first = (key[8], key[9]) if key.shape[0] > KEY_WORDS else None
    width, size = max(bit_width, 32), math.prod(shape)
    found = bits(key[:KEY_WORDS], Domain(bit_width), width, size, first)
    return found.astype(_UINT[bit_width]).reshape(shape)


@functools.partial(jax.jit, static_argnums=1)
def _jitted_children(key: jax.Array, domain: Domain, number: Words) -> jax.Array:
    return jnp.stack(blocks(key, domain, number)[:KEY_WORDS], axis=-1)


def _random_bits(key: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    """For key data of 8 words, or of 10, whose last two are the index of the first element."""
    return _jitted_bits(key, bit_width, tuple(shape))


def _split(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    count = math.prod(shape)
    if isinstance(count, int) and count > 2**32:  # their numbers would begin again
        raise ValueError(f"expected at most 2^32 children of a key, found {count}")
    child = jax.lax.iota(jnp.uint32, count)
    children = _jitted_children(key, Domain.SPLIT, (jnp.zeros_like(child), child))
    return children.reshape(*shape, KEY_WORDS)


def _fold_in(key: jax.Array, data: jax.typing.ArrayLike) -> jax.Array:
    number = jnp.uint32(0), jnp.asarray(data).astype(jnp.uint32)
    return _jitted_children(key, Domain.FOLD_IN, number)


def _seed(seed: Any) -> jax.Array:
    seed = jnp.asarray(seed)
    if not jnp.issubdtype(seed.dtype, jnp.integer):
        raise TypeError(f"expected the seed of a key to be an integer, found dtype {seed.dtype}")
    warnings.warn(
        "an integer is no secret: whoever guesses the seed of a chacha20 key knows all of its "
        "noise. Use jax_privacy_kernels.random.secure_key() unless a run is to be reproduced",
        stacklevel=2,
    )
    high = (seed >> 32).astype(jnp.uint32) if seed.dtype.itemsize > 4 else jnp.uint32(0)
    zeros = jnp.zeros(KEY_WORDS, jnp.uint32)
    return _jitted_children(zeros, Domain.SEED, (high, seed.astype(jnp.uint32)))


CHACHA20 = jax.extend.random.define_prng_impl(
    key_shape=(KEY_WORDS,),
    seed=_seed,
    split=_split,
    random_bits=_random_bits,
    fold_in=_fold_in,
    name="chacha20",
    tag="chacha20",
)


def _unsupported(*_: object) -> jax.Array:
    raise NotImplementedError("keys of type chacha20_at can only be sampled")


# Keys that sample from the middle of an array, see _counter_prng.py.
CHACHA20_AT = jax.extend.random.define_prng_impl(
    key_shape=(KEY_WORDS + 2,),
    seed=_unsupported,
    split=_unsupported,
    random_bits=_random_bits,
    fold_in=_unsupported,
    name="chacha20_at",
    tag="chacha20_at",
)
