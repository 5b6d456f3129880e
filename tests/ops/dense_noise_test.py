"""Every implementation of dense_noise against its definition and against the JAX one."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import implementations
from support.parts import PARTS, base_of, leaves_of

from jax_privacy_kernels import random
from jax_privacy_kernels.ops import _leaves, init_dense_noise
from jax_privacy_kernels.ops import dense_noise as dense_noise_step
from jax_privacy_kernels.ops.dense_noise import IMPLEMENTATIONS
from jax_privacy_kernels.ops.dense_noise._contract import Inputs

# How far a sample may be from jax.random.normal's, relative to max(1, |z|), as in
# correlated_noise_test.py.
SAMPLE_RTOL = {"float16": 2**-10, "bfloat16": 2**-7, "float32": 2e-6, "float64": 1e-13}
PALLAS_CALL = implementations.CUDA_CALLS["pallas"]
KEY = jax.random.key(3)
CHACHA20_KEY = random.secure_key(bytes(range(32)))
KEYS = {"threefry2x32": KEY, "chacha20": CHACHA20_KEY}
ROWS = {
    "zeros among others": (0.0, 0.5, 0.0, -2.0, 0.0),
    "zeros alone": (0.0, 0.0),
    "one sample": (3.0,),
    "a hundred samples": tuple(np.linspace(-1, 1, 100)),
}

implementation = implementations.fixture(IMPLEMENTATIONS)


def dense_noise(grads, row, *, key, dtype=None, implementation=None):
    """The first step of a matrix of one row."""
    matrix, key_impl = jnp.asarray(row)[None], jax.random.key_impl(key)
    state = init_dense_noise(grads, matrix, key=key, dtype=dtype)
    options = {"dtype": dtype, "implementation": implementation}
    return dense_noise_step(grads, state, matrix, stddev=1.0, key_impl=key_impl, **options)[0]


def definition(grads, row, key, noise_dtype=None):
    """What the gradients with their noise are in float64, and how far they may be off."""
    expected, tolerance = [], []
    for grad, leaf_key in zip(grads, jax.random.split(key, len(grads)), strict=True):
        dtype = noise_dtype or grad.dtype
        z = np.asarray(
            [
                jax.random.normal(jax.random.fold_in(leaf_key, j), grad.shape, dtype)
                for j in range(len(row))
            ],
            np.float64,
        )
        expected.append(np.asarray(grad, np.float64) + np.tensordot(row, z, axes=1))
        relative = SAMPLE_RTOL[jnp.dtype(dtype).name]
        largest = max(1, np.abs(z).max(initial=0))
        tolerance.append(relative * (1 + largest * np.abs(row).sum()))
    return expected, tolerance


def gradients(dtypes, shapes=((2100,), (3, 5), (), (0,))):
    rng = np.random.default_rng(7)
    return [
        jnp.asarray(rng.standard_normal(shape), dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]


def check(implementation, dtypes, row, row_dtype="float32", noise_dtype=None, key=KEY):
    x64 = "float64" in (*dtypes, row_dtype, noise_dtype)
    with jax.enable_x64(x64):
        grads = gradients(dtypes)
        if implementation is not None:
            stream = str(jax.random.key_impl(key))
            leaves = _leaves.plan(grads, row_dtype, noise_dtype)
            reasons = [
                IMPLEMENTATIONS[implementation].refuse(leaf, True, stream) for leaf in leaves
            ]
            if reason := next(filter(None, reasons), None):
                pytest.skip(reason)
        weights = jnp.asarray(row, row_dtype)
        outs = dense_noise(
            grads, weights, key=key, dtype=noise_dtype, implementation=implementation
        )
        expected, tolerance = definition(grads, np.asarray(weights), key, noise_dtype)
        for i, out in enumerate(outs):
            assert out.dtype == grads[i].dtype
            np.testing.assert_allclose(
                np.asarray(out).astype(np.float64),
                expected[i],
                rtol=2 * float(jnp.finfo(out.dtype).eps),
                atol=tolerance[i],
            )


class TestImplementation:
    """What holds for every implementation."""

    @pytest.mark.each_value
    @pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_definition(self, implementation, row, dtype):
        check(implementation, (dtype, "float32", dtype, "float32"), row, dtype)

    @pytest.mark.each_value
    @pytest.mark.parametrize("row", [(0.0, 0.5, 0.0, -2.0, 1.0), (3.0,)], ids=str)
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_chacha20(self, implementation, row, dtype):
        dtypes = dtype, "float32", dtype, "float32"
        check(implementation, dtypes, row, dtype, key=CHACHA20_KEY)

    def test_gradients_of_16_bits(self, implementation):
        check(implementation, ("bfloat16", "float16") * 2, (0.5, 1.0), noise_dtype="float32")

    def test_wider_coefficients(self, implementation):
        check(implementation, ("float32",) * 4, (0.5, 1.0), row_dtype="float64")

    def test_jit_and_eager_agree(self, implementation):
        grads, row = gradients(("float32",) * 4), jnp.array([1.0, 0.25])
        noise = functools.partial(dense_noise, key=KEY, implementation=implementation)
        for eager, jitted in zip(noise(grads, row), jax.jit(noise)(grads, row), strict=True):
            np.testing.assert_allclose(eager, jitted, atol=1e-6)

    def test_nan_is_seen(self, implementation):
        row = jnp.array([1.0, np.nan])
        for out in dense_noise(
            gradients(("float32",) * 4), row, key=KEY, implementation=implementation
        ):
            assert np.isnan(out).all()

    @pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
    def test_shards(self, implementation, key):
        if implementation not in implementations.INTERPRETERS:
            pytest.skip("kernels for GPUs are compared with it")
        leaves = leaves_of(PARTS)
        refuse = IMPLEMENTATIONS[implementation].refuse
        if any(refuse(leaf, True, str(jax.random.key_impl(key))) for leaf in leaves):
            pytest.skip("it leaves them to others")
        on_cpu = jax.config.jax_default_device.platform == "cpu"
        oracle = "cpp" if on_cpu and not IMPLEMENTATIONS["cpp"].unavailable() else "jax"
        actual, expected = (jax.jit(on_parts(name, key))() for name in (implementation, oracle))
        for a, b in zip(actual, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=5e-5)


def on_parts(implementation, key):
    """() -> the outputs of shards of leaves."""
    leaves = leaves_of(PARTS)

    def run():
        inputs = Inputs(
            leaves=leaves,
            base=base_of(PARTS),
            grads=[jnp.ones(leaf.shard.size) for leaf in leaves],
            rings=[],
            ahead=True,
            key=key,
            row=jnp.array([0.5, 0.0, -2.0]),
        )
        return IMPLEMENTATIONS[implementation].run(inputs).outs

    return run


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_implementations_agree_on_shards(key):
    if reason := IMPLEMENTATIONS["cpp"].unavailable():
        pytest.skip(reason)
    small = [PARTS[1]]
    leaves = leaves_of(small)
    grads = [jnp.ones(leaf.shard.size) for leaf in leaves]

    def run(name):
        row = jnp.array([0.5, -2.0])
        inputs = Inputs(leaves, base_of(small), grads, [], True, key, row)
        return jax.jit(IMPLEMENTATIONS[name].run)(inputs).outs[0]

    np.testing.assert_allclose(run("cpp"), run("jax"), atol=1e-5)


@pytest.mark.parametrize("key_impl", ["rbg", "unsafe_rbg"])
def test_other_keys(key_impl):
    key, grads = jax.random.key(1, impl=key_impl), gradients(("float32",) * 4)
    outs = dense_noise(grads, jnp.array([1.0, 0.5]), key=key)
    expected, tolerance = definition(grads, (1.0, 0.5), key)
    for out, want, atol in zip(outs, expected, tolerance, strict=True):
        np.testing.assert_allclose(out, want, atol=atol, rtol=1e-6)
    with pytest.raises(ValueError, match=r"cpp.*threefry2x32|cpp.*cannot be loaded"):
        dense_noise(grads, jnp.ones(2), key=key, implementation="cpp")


def test_noise_of_16_bits():
    check(None, ("bfloat16", "float16", "float32", "bfloat16"), (0.5, 1.0))


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_pallas_lowers_for_cuda(key):
    if reason := IMPLEMENTATIONS["pallas"].unavailable():
        pytest.skip(reason)
    function = functools.partial(dense_noise, key=key, implementation="pallas")
    grads = gradients(("float32",) * 4)
    lowered = jax.jit(function).trace(grads, jnp.ones(50)).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count(PALLAS_CALL) == 3  # the fourth leaf is empty


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_pallas_lowers_shards_for_cuda(key):
    if reason := IMPLEMENTATIONS["pallas"].unavailable():
        pytest.skip(reason)
    lowered = jax.jit(on_parts("pallas", key)).trace().lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count(PALLAS_CALL) == 3
