"""Where the samples of kernels in Pallas get their bits, and the samples, by jax.random.normal.

The stream, the type of the keys, is threefry2x32 or chacha20; what else there is in a kernel only
asks how many elements to work on at a time. _streams_triton.py has the same for Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plgpu

from jax_privacy_kernels.kernels import _chacha20
from jax_privacy_kernels.kernels._threefry import threefry2x32

__all__ = ["Width", "samples", "width"]


class Width(NamedTuple):
    """What a program works on at a time.

    Attributes:
      elements: how many of them, a power of two.
      warps: of 32 threads, that the program has.
    """

    elements: int
    warps: int


def width(stream: str, keys: int, dtype: Any, tile: int) -> Width:
    """What a program works on at a time that draws samples of so many keys at once, up to 8.

    A block of ChaCha20 has the bits of 16 elements of float32, or of 8 of float64, of one key. They
    are no neighbours: a thread that kept to its own elements would compute a block for every one of
    them. So each thread computes one block, of any of the keys, and the bits go by shared memory to
    the threads that have the elements. There are as many blocks as threads.
    """
    if stream == "threefry2x32":
        return Width(256, 8)
    of_block, keys = _elements_of_block(dtype), _power_of_two(keys)
    elements = min(128 * of_block // keys, tile)
    return Width(elements, elements * keys // of_block // 32)


def samples(
    stream: str, keys: Any, first: Any, count: int, index: tuple[Any, Any], size: int, dtype: Any
) -> list[jax.Array]:
    """The elements of ``jax.random.normal(keys[i], ..)`` for i = first .. first + count - 1.

    Args:
      stream: the type of the keys.
      keys: ``[samples, words]`` uint32.
      first: number of a key.
      count: static, up to 8. The last key stands for those after it.
      index: that of the first element, its high and its low word, and a multiple of size.
      size: how many elements there are from that one on, static, a power of two from 128 on.
      dtype: float32 or float64.

    Returns:
      An array ``[size]`` for each of the keys.
    """
    if stream == "threefry2x32":
        high, low = index[0], index[1] + jnp.arange(size, dtype=jnp.uint32)
        bits = [
            _encrypted_index(keys, jnp.minimum(first + i, keys.shape[0] - 1), high, low, dtype)
            for i in range(count)
        ]
    else:
        bits = _bits_of_blocks(keys, first, count, index, size, dtype)
    return [_normal(x, dtype) for x in bits]


def _encrypted_index(keys: Any, key: Any, high: Any, low: jax.Array, dtype: Any) -> jax.Array:
    """threefry2x32 with jax_threefry_partitionable: what it makes of the index of an element."""
    x0, x1 = threefry2x32(keys[key, 0], keys[key, 1], high, low)
    return x0 ^ x1 if dtype == jnp.float32 else _join(x0, x1)


def _bits_of_blocks(
    keys: Any, first: Any, count: int, index: tuple[Any, Any], size: int, dtype: Any
) -> list[jax.Array]:
    """chacha20: ops/_chacha20.py says where bits stand in blocks."""
    of_block, at_once = _elements_of_block(dtype), _power_of_two(count)
    blocks = size // of_block
    lane = jnp.arange(at_once * blocks, dtype=jnp.int32)
    key = jnp.minimum(first + jax.lax.div(lane, np.int32(blocks)), keys.shape[0] - 1)
    of_key = [plgpu.load(keys.at[key, jnp.full_like(key, i)]) for i in range(_chacha20.KEY_WORDS)]
    up, down = np.uint32(33 - of_block.bit_length()), np.uint32(of_block.bit_length() - 1)
    high, low = index[0] >> down, index[1] >> down | index[0] << up
    # Without a carry: low is a multiple of blocks.
    number = low + jax.lax.rem(lane, np.int32(blocks)).astype(jnp.uint32)
    domain = np.uint32(8 * dtype.itemsize)
    words = _chacha20.chacha20(of_key, (number, domain, high, np.uint32(0)), barrier=lambda x: x)
    if dtype == jnp.float64:
        words = [_join(words[8 + i], words[i]) for i in range(8)]
    x = _stacked(words).reshape(at_once, -1, _chacha20.GROUP // of_block, of_block)
    x = x.transpose(1, 3, 2, 0).reshape(size, at_once)  # by element, then by key
    halves = [x]
    while halves[0].shape[1] > 1:
        parts = [jax.lax.split(half, [half.shape[1] // 2] * 2, axis=1) for half in halves]
        halves = [half for pair in parts for half in pair]
    return [half.reshape(size) for half in halves[:count]]


def _stacked(arrays: Sequence[jax.Array]) -> jax.Array:
    """2^k arrays as one that has k dimensions more, the last ones, which count them."""
    if len(arrays) == 1:
        return arrays[0]
    even, odd = _stacked(arrays[::2]), _stacked(arrays[1::2])
    return jax.lax.concatenate([even[..., None], odd[..., None]], even.ndim)


def _elements_of_block(dtype: Any) -> int:
    return 64 // int(dtype.itemsize)


def _power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()


def _join(high: jax.Array, low: jax.Array) -> jax.Array:
    return high.astype(jnp.uint64) << 32 | low.astype(jnp.uint64)


def _normal(bits: jax.Array, dtype: Any) -> jax.Array:
    """What jax.random.normal makes of bits."""
    if dtype == jnp.float32:
        bits = (bits >> 9) | np.uint32(0x3F800000)
    else:
        bits = (bits >> 12) | np.uint64(0x3FF0000000000000)
    one, lowest = np.ones((), dtype), np.nextafter(np.array(-1, dtype), np.zeros((), dtype))
    unit = jax.lax.bitcast_convert_type(bits, dtype) - one
    uniform = jnp.maximum(lowest, unit * (one - lowest) + lowest)
    return jax.lax.erf_inv(uniform) * np.array(np.sqrt(2), dtype)
