"""A JAX key type for samples from the middle of an array.

``jax.random.normal(at(key, i), (m,))`` gives elements i .. i + m - 1 of ``jax.random.normal(key,
(n,))`` for a chacha20 key, or a threefry2x32 key under ``jax_threefry_partitionable``, whatever the
dtype: element i of an array is a function of the key and of i alone, and the key types below only
start counting at i.

On CPUs the one for threefry also samples three times faster than JAX's own key type, whose rounds
are a loop over arrays in memory there: these are one fused expression.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.extend.random
import jax.numpy as jnp

from jax_privacy_kernels.kernels._threefry import threefry2x32
from jax_privacy_kernels.ops._chacha20 import CHACHA20, CHACHA20_AT
from jax_privacy_kernels.ops._shards import Words

__all__ = ["at", "looks_ahead", "normal"]


def looks_ahead(key_impl: Any) -> bool:
    """Whether keys of this type take the look-ahead schedule, in the current JAX config."""
    config: Any = jax.config
    if key_impl == CHACHA20:
        return True
    return str(key_impl) == "threefry2x32" and bool(config.jax_threefry_partitionable)


_UINT = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32, 64: jnp.uint64}


def _random_bits(key: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    """Bits as jax.random makes them, for key data (k0, k1, high word, low word of the index)."""
    lo = key[3] + jax.lax.iota(jnp.uint32, math.prod(shape))
    hi = key[2] + (lo < key[3]).astype(jnp.uint32)
    x0, x1 = threefry2x32(key[0], key[1], hi, lo)
    if bit_width == 64:
        bits = (x0.astype(jnp.uint64) << 32) | x1.astype(jnp.uint64)
    else:
        bits = (x0 ^ x1).astype(_UINT[bit_width])
    return bits.reshape(shape)


def _unsupported(*_: object) -> jax.Array:
    raise NotImplementedError("keys of type threefry2x32_at can only be sampled")


_THREEFRY_AT = jax.extend.random.define_prng_impl(
    key_shape=(4,),
    seed=_unsupported,
    split=_unsupported,
    random_bits=_random_bits,
    fold_in=_unsupported,
    name="threefry2x32_at",
    tag="tat",
)


def at(key: jax.Array, index: Words) -> jax.Array:
    """Keys that sample from the element of a row-major index on.

    Args:
      key: typed keys that look ahead.
      index: its high and low word, uint32, broadcastable against key.

    Returns:
      Keys of the broadcast shape, for jax.random.normal and the like (of less than 2^32 elements).
    """
    data = jax.random.key_data(key)
    words = (*(data[..., i] for i in range(data.shape[-1])), *index)
    impl = CHACHA20_AT if jax.random.key_impl(key) == CHACHA20 else _THREEFRY_AT
    return jax.random.wrap_key_data(jnp.stack(jnp.broadcast_arrays(*words), axis=-1), impl=impl)


def normal(
    key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike = float
) -> jax.Array:
    """``jax.random.normal(key, shape, dtype)``, bit for bit, sooner where the key allows it."""
    impl = jax.random.key_impl(key)
    if impl != CHACHA20 and looks_ahead(impl) and math.prod(shape) < 2**32:
        key = at(key, (jnp.uint32(0), jnp.uint32(0)))
    return jax.random.normal(key, shape, dtype)
