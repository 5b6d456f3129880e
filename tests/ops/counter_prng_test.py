"""Samples from the middle of an array are those of the whole array."""

from __future__ import annotations

import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np
import pytest

from jax_privacy_kernels.ops import _counter_prng


def at(key, index):
    index = np.asarray(index, np.uint64)
    words = index >> np.uint64(32), index & np.uint64(2**32 - 1)
    return _counter_prng.at(key, tuple(jnp.asarray(word, jnp.uint32) for word in words))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_part_is_part_of_the_whole(dtype):
    key = jax.random.key(4)
    with jax.enable_x64(dtype == "float64"):
        whole = np.asarray(jax.random.normal(key, (7, 431), dtype)).ravel()
        for first in (0, 1, 1000, 3000):
            part = jax.random.normal(at(key, first), (17,), dtype)
            np.testing.assert_array_equal(part, whole[first : first + 17])
        np.testing.assert_array_equal(
            _counter_prng.normal(key, (7, 431), dtype), whole.reshape(7, 431)
        )


def test_many_keys_and_indices_at_once():
    keys = jax.random.split(jax.random.key(5), 3)
    first = jnp.array([0, 7, 90, 2])
    parts = jax.vmap(jax.vmap(lambda key: jax.random.normal(key, (5,))))(at(keys[:, None], first))
    for key, row in zip(keys, parts, strict=True):
        whole = jax.random.normal(key, (100,))
        for i, part in zip(first, row, strict=True):
            np.testing.assert_array_equal(part, whole[i : i + 5])


@pytest.mark.parametrize("start", [2**32, 2**41, 7 * 2**32])
def test_the_index_carries_into_its_upper_word(start):
    """Element 2^32 and others of arrays that large, without the arrays."""
    key, first, count = jax.random.key(6), start - 3, 8
    index = np.arange(first, first + count, dtype=np.uint64)
    k0, k1 = (jnp.full(count, word) for word in jax.random.key_data(key))
    hi, lo = (index >> np.uint64(32)).astype(np.uint32), index.astype(np.uint32)
    x0, x1 = jax.extend.random.threefry2x32_p.bind(k0, k1, jnp.asarray(hi), jnp.asarray(lo))
    np.testing.assert_array_equal(jax.random.bits(at(key, first), (count,)), x0 ^ x1)


def test_other_keys_are_sampled_by_jax():
    key = jax.random.key(7, impl="rbg")
    np.testing.assert_array_equal(
        _counter_prng.normal(key, (50,), jnp.float32), jax.random.normal(key, (50,))
    )


def test_only_sampling_is_offered():
    key = at(jax.random.key(0), 0)
    with pytest.raises(NotImplementedError, match="can only be sampled"):
        jax.random.split(key)
