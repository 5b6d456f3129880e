"""ChaCha20 as a key type: RFC 8439's blocks, the layout of bits, and all of JAX around them."""

from __future__ import annotations

import pickle
import secrets

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import chacha20

from jax_privacy_kernels import grid, noise_addition, random
from jax_privacy_kernels.kernels import _chacha20 as kernel
from jax_privacy_kernels.matrix_factorization import toeplitz
from jax_privacy_kernels.ops import _chacha20, _counter_prng

DATA = bytes(range(100, 132))
KEY = random.secure_key(DATA)
WORDS = chacha20.words_of(DATA)


def words(key):
    return np.asarray(jax.random.key_data(key))


# -- Blocks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", chacha20.VECTORS.values(), ids=chacha20.VECTORS)
def test_vectors_of_the_rfc(vector):
    key, nonce, expected = vector
    assert chacha20.block(key, nonce) == expected
    arrays = [jnp.array([word], jnp.uint32) for word in key], [jnp.uint32(word) for word in nonce]
    assert [int(word[0]) for word in jax.jit(kernel.chacha20)(*arrays)] == expected


# -- What blocks are for ----------------------------------------------------------------------


def test_domains_differ():
    """And so do the blocks of a key that are used for anything."""
    values = [domain.value for domain in _chacha20.Domain]
    assert len(set(values)) == len(values)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64"])
def test_bits_stand_where_the_layout_says(dtype):
    width = 8 * np.dtype(dtype).itemsize
    with jax.enable_x64(True):
        bits = np.asarray(jax.random.bits(KEY, (3, 211), dtype)).ravel()
    for i in (0, 1, 7, 8, 15, 16, 127, 128, 129, 300, 511, 632):
        assert int(bits[i]) == chacha20.element(WORDS, width, width, i)


@pytest.mark.parametrize("dtype", ["uint32", "uint64"])
@pytest.mark.parametrize("first", [0, 5, 128, 2**32 - 3, 2**36 - 130, 2**36 + 1, 7 * 2**40 - 5])
def test_bits_of_any_element(dtype, first):
    width = 8 * np.dtype(dtype).itemsize
    with jax.enable_x64(True):
        index = tuple(jnp.uint32(word) for word in divmod(first, 2**32))
        key = _counter_prng.at(KEY, index)
        bits = jax.random.bits(key, (150,), dtype)
        alone = jax.random.bits(key, (1,), dtype)
    assert alone[0] == bits[0]
    for i in (0, 1, 2, 3, 77, 149):
        assert int(bits[i]) == chacha20.element(WORDS, width, width, first + i)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_part_is_part_of_the_whole(dtype):
    with jax.enable_x64(dtype == "float64"):
        whole = np.asarray(jax.random.normal(KEY, (7, 431), dtype)).ravel()
        for first in (1, 3000):
            key = _counter_prng.at(KEY, (jnp.uint32(0), jnp.uint32(first)))
            part = jax.random.normal(key, (17,), dtype)
            np.testing.assert_array_equal(part, whole[first : first + 17])
        np.testing.assert_array_equal(
            _counter_prng.normal(KEY, (7, 431), dtype), whole.reshape(7, 431)
        )


def test_splits_and_folds_are_blocks_of_their_own_domains():
    for i, child in enumerate(words(jax.random.split(KEY, (2, 2))).reshape(4, 8)):
        assert child.tolist() == chacha20.block(WORDS, (i, 2, 0, 0))[:8]
    for i in (0, 1, 2**32 - 1):
        folded = words(jax.random.fold_in(KEY, i)).tolist()
        assert folded == chacha20.block(WORDS, (i, 3, 0, 0))[:8]


def test_a_seed_is_a_block_of_the_key_of_zeros():
    with pytest.warns(UserWarning, match="an integer is no secret"):
        key = jax.random.key(5, impl=random.chacha20)
    assert words(key).tolist() == chacha20.block([0] * 8, (5, 1, 0, 0))[:8]
    with jax.enable_x64(True), pytest.warns(UserWarning, match="secure_key"):
        key = jax.random.key(5 + 9 * 2**32, impl=random.chacha20)
    assert words(key).tolist() == chacha20.block([0] * 8, (5, 1, 9, 0))[:8]


def test_a_seed_is_an_integer():
    with pytest.raises(TypeError, match="seed of a key to be an integer, found dtype float32"):
        jax.random.key(1.5, impl=random.chacha20)


# -- Keys -------------------------------------------------------------------------------------


def test_a_secure_key_has_all_bits_from_the_system(monkeypatch):
    asked = []

    def token_bytes(count):
        asked.append(count)
        return DATA

    monkeypatch.setattr(secrets, "token_bytes", token_bytes)
    key = random.secure_key()
    assert asked == [32]
    assert key.shape == ()
    assert jax.random.key_impl(key) == random.chacha20
    assert words(key).tolist() == WORDS


def test_secure_keys_differ():
    assert (words(random.secure_key()) != words(random.secure_key())).any()


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_data_reproduces_a_key(kind):
    np.testing.assert_array_equal(words(random.secure_key(kind(DATA))), words(KEY))


def test_data_that_is_not_contiguous_is_read_in_order():
    view = memoryview(bytes(x for byte in DATA for x in (byte, 0)))[::2]
    np.testing.assert_array_equal(words(random.secure_key(view)), words(KEY))


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_data_of_another_size_is_refused(size):
    with pytest.raises(ValueError, match=f"32 bytes, found {size}"):
        random.secure_key(bytes(size))


@pytest.mark.parametrize("data", ["a" * 32, 7, [0] * 32, np.zeros(8, np.uint32)])
def test_data_that_is_not_bytes_is_refused(data):
    with pytest.raises(TypeError, match="expected data to be 32 bytes, found"):
        random.secure_key(data)


def test_no_message_shows_data():
    with pytest.raises(ValueError, match="32 bytes") as error:
        random.secure_key(b"secret")
    assert "secret" not in str(error.value)


def test_no_error_shows_a_key():
    """Wherever it is given by mistake."""
    matrix = toeplitz.inverse_as_streaming_matrix(jnp.ones(1))
    zeros = jnp.zeros(3, jnp.int32)
    for function in (
        lambda: grid.privatizer(matrix, stddev=KEY),
        lambda: grid.privatizer(KEY, stddev=1.0),
        lambda: grid.clip_and_round(jnp.ones(3), KEY, 100),
        lambda: grid.clip_and_round(jnp.ones(3), 1.0, KEY),
        lambda: grid.clip_and_round(KEY, 1.0, 100),
        lambda: grid.to_float(KEY, 1.0, 100),
        lambda: grid.round_coefs(KEY, 8),
        lambda: grid.round_coefs([1.0], KEY),
        lambda: grid.privatizer(matrix, stddev=1.0).update(zeros, KEY),
        lambda: noise_addition.gaussian_privatizer(stddev=KEY),
        lambda: noise_addition.matrix_factorization_privatizer(KEY, stddev=1.0),
        lambda: random.secure_key(KEY),
        lambda: toeplitz.optimal_max_error_strategy_coefs(KEY),
    ):
        with pytest.raises((TypeError, ValueError)) as error:
            function()
        assert not any(str(word) in str(error.value) for word in WORDS)
    with pytest.raises(ValueError, match="64 bits, found one of 250 bits"):
        noise_addition.gaussian_privatizer(stddev=1.0, prng_key=2**249).init(jnp.zeros(3))


def test_no_secure_key_is_drawn_inside_a_trace():
    with pytest.raises(ValueError, match="inside a trace"):
        jax.jit(lambda: jax.random.key_data(random.secure_key()))()
    inside = jax.jit(lambda: jax.random.key_data(random.secure_key(DATA)))()
    np.testing.assert_array_equal(inside, words(KEY))


def test_the_type_has_a_name_and_can_be_pickled():
    assert str(random.chacha20) == "chacha20"
    assert pickle.loads(pickle.dumps(random.chacha20)) == random.chacha20


# -- Everywhere in JAX ------------------------------------------------------------------------


def draw(key):
    """What jax.random does with keys: splits, folds, bits."""
    one, two = jax.random.split(key)
    return {
        "normal": jax.random.normal(one, (5, 30)),
        "uniform": jax.random.uniform(jax.random.fold_in(two, 3), minval=-1.0),
        "none": jax.random.normal(two, (0, 3)),
    }


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_other_distributions():
    one, two = jax.random.split(KEY)
    np.testing.assert_array_equal(np.sort(jax.random.permutation(one, 50)), np.arange(50))
    dice = jax.random.randint(two, (6000,), 0, 6)
    assert scipy.stats.chisquare(np.bincount(dice, minlength=6)).pvalue > 1e-3


def test_under_transformations():
    keys = jax.random.split(KEY, 3)
    each = [jax.jit(draw)(key) for key in keys]
    together = jax.tree.map(lambda *x: np.stack(x), *each)
    assert_same(jax.jit(jax.vmap(draw))(keys), together)
    assert_same(jax.lax.scan(lambda _, key: (None, draw(key)), None, keys)[1], together)
    assert_same(jax.lax.map(draw, keys), together)


def test_outside_of_jit():
    bits = jax.random.bits(KEY, (5,))
    with jax.disable_jit():
        np.testing.assert_array_equal(jax.random.bits(KEY, (5,)), bits)
        assert (
            words(jax.random.fold_in(KEY, 1)).tolist()
            == words(jax.jit(jax.random.fold_in)(KEY, 1)).tolist()
        )


def test_folds_of_many():
    many = jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(3))
    for i, key in enumerate(many):
        np.testing.assert_array_equal(words(key), words(jax.random.fold_in(KEY, i)))


def test_no_two_children_have_one_number():
    with pytest.raises(ValueError, match="at most 2\\^32 children of a key, found 8589934592"):
        jax.eval_shape(lambda key: _chacha20._split(key, (2, 2**32)), jnp.zeros(8, jnp.uint32))


def test_raw_words_are_wrapped():
    key = jax.random.wrap_key_data(jnp.array(WORDS, jnp.uint32), impl=random.chacha20)
    np.testing.assert_array_equal(jax.random.bits(key, (3,)), jax.random.bits(KEY, (3,)))
    with pytest.raises(TypeError):
        jax.random.wrap_key_data(jnp.zeros(2, jnp.uint32), impl=random.chacha20)


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_on_many_devices(kind):
    expected = jax.random.normal(KEY, (16, 100))
    keys = jax.random.split(KEY, 8)
    each = jax.vmap(lambda key: jax.random.normal(key, (30,)))(keys)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    rows = NamedSharding(mesh, P("x"))
    with jax.set_mesh(mesh):
        whole = jax.jit(lambda: jax.random.normal(KEY, (16, 100)), out_shardings=rows)()
        np.testing.assert_array_equal(whole, expected)
        shards = jax.shard_map(
            jax.vmap(lambda key: jax.random.normal(key, (30,))), in_specs=P("x"), out_specs=P("x")
        )(jax.device_put(keys, rows))
        np.testing.assert_array_equal(shards, each)


# -- Statistics: a fixed key, so these either always pass or always fail. ----------------------


def test_bits_are_fair():
    with jax.enable_x64(True):
        bits = np.asarray(jax.random.bits(KEY, (2**16,), jnp.uint64))
    ones = np.array([(bits >> np.uint64(i) & np.uint64(1)).mean() for i in range(64)])
    assert np.abs(ones - 0.5).max() < 4.5 * 0.5 / 2**8
    # No two elements, words or neighbouring blocks go together.
    signs = np.stack([(bits >> np.uint64(i) & np.uint64(1)) * 2.0 - 1 for i in (0, 31, 32, 63)])
    for lag in (1, 8, 16, 128):
        assert np.abs((signs[:, lag:] * signs[:, :-lag]).mean(axis=1)).max() < 4.5 / 2**8
    off = np.corrcoef(signs) - np.eye(4)
    assert np.abs(off).max() < 4.5 / 2**8


def test_samples_are_normal_and_children_independent():
    keys = [KEY, *jax.random.split(KEY, 2), jax.random.fold_in(KEY, 0), jax.random.fold_in(KEY, 1)]
    samples = np.stack([np.asarray(jax.random.normal(key, (50_000,))) for key in keys])
    for sample in samples:
        assert scipy.stats.kstest(sample, "norm").pvalue > 1e-3
    assert np.abs(np.corrcoef(samples) - np.eye(len(keys))).max() < 4.5 / np.sqrt(50_000)
    assert np.unique(samples).size > 0.97 * samples.size
