"""Privatizers against jax_privacy for the same key, and what their users rely on."""

from __future__ import annotations

import dataclasses
import functools
import re
import secrets

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import sweeps

from jax_privacy_kernels import noise_addition, random
from jax_privacy_kernels.matrix_factorization import banded as banded_strategies
from jax_privacy_kernels.matrix_factorization import (
    buffered_toeplitz,
    streaming_matrix,
    toeplitz,
)
from jax_privacy_kernels.noise_addition import (
    gaussian_privatizer,
    matrix_factorization_privatizer,
)
from jax_privacy_kernels.ops.correlated_noise import IMPLEMENTATIONS

needs_cpp = pytest.mark.skipif(
    bool(IMPLEMENTATIONS["cpp"].unavailable()), reason="the extension is missing"
)

COEF = (0.9, 0.3, -0.2, 0.1)
UNIT_COEF = tuple(np.array(COEF) / np.linalg.norm(COEF))


@pytest.fixture(scope="module")
def reference():
    """jax_privacy: noise_addition, streaming_matrix, toeplitz, banded, buffered_toeplitz."""
    pytest.importorskip("jax_privacy")
    from jax_privacy import noise_addition as noise
    from jax_privacy.matrix_factorization import banded as banded_reference
    from jax_privacy.matrix_factorization import buffered_toeplitz as buffered_reference
    from jax_privacy.matrix_factorization import streaming_matrix as streaming
    from jax_privacy.matrix_factorization import toeplitz as toeplitz_reference

    return noise, streaming, toeplitz_reference, banded_reference, buffered_reference


class Ours:
    noise, streaming, toeplitz = noise_addition, streaming_matrix, toeplitz
    banded, buffered = banded_strategies, buffered_toeplitz


def banded(lib, **kwargs):
    return lib.toeplitz.inverse_as_streaming_matrix(jnp.array(UNIT_COEF, jnp.float32), **kwargs)


def general_banded(lib, n=7):
    params = np.random.default_rng(3).uniform(-0.4, 0.4, (n, 3)).astype(np.float32)
    params[:, 0] = np.linspace(1, 2, n)
    params[np.add.outer(np.arange(n), np.arange(3)) >= n] = 0  # outside of C
    return lib.banded.ColumnNormalizedBanded(
        params=jnp.asarray(params)
    ).inverse_as_streaming_matrix()


def buffered(lib, inverse=True, **kwargs):
    blt = lib.buffered.BufferedToeplitz.build([0.95, 0.5], [0.2, 0.3], dtype=jnp.float32)
    return blt.inverse_as_streaming_matrix(**kwargs) if inverse else blt.as_streaming_matrix()


def banded_inverse(lib, look_ahead=None):
    coef = jnp.array([1.0, -0.5, -0.2, 0.1])
    return lib.toeplitz.noising_coef_as_streaming_matrix(coef, look_ahead=look_ahead)


def dense(shape, seed=0):
    rows = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    rows = np.tril(rows, shape[1] - shape[0])
    rows[2] = 0
    return jnp.asarray(rows)


MATRICES = {
    "identity": lambda lib: lib.streaming.identity(),
    "banded": banded,
    "one band": lambda lib: lib.toeplitz.inverse_as_streaming_matrix(jnp.array([2.0])),
    "column-normalized": lambda lib: banded(lib, column_normalize_for_n=STEPS),
    "scaled": lambda lib: banded(lib) * 0.5,
    "rows scaled": lambda lib: banded(lib).scale_rows_and_columns(jnp.array([1.0, 3.0, 0.2])),
    "columns scaled": lambda lib: banded(lib).scale_rows_and_columns(None, jnp.array([1.0, 3.0])),
    "general banded": general_banded,
    "buffers": buffered,
    "buffers, not inverted": lambda lib: buffered(lib, inverse=False),
    "no buffers": lambda lib: lib.buffered.BufferedToeplitz.build(
        [], [], dtype=jnp.float32
    ).inverse_as_streaming_matrix(),
    "prefix_sum": lambda lib: lib.streaming.prefix_sum(),
    "product": lambda lib: lib.streaming.prefix_sum() @ banded(lib),
    "diagonal": lambda lib: lib.streaming.diagonal(jnp.array([1.0, 2.0, -3.0])),
    "dense": lambda lib: dense((7, 7)),
    "dense, wide": lambda lib: dense((7, 10)),
    "dense, tall": lambda lib: dense((9, 4)),
}
BEYOND_THE_REFERENCE = {
    "banded inverse": banded_inverse,
    "banded inverse, two slots": lambda lib: banded_inverse(lib, 2),
    "banded inverse without state": lambda lib: banded_inverse(lib, 0),
    "buffers, looking ahead": lambda lib: buffered(lib, look_ahead=3),
}
STEPS = 7
SHAPES = {"w": (3, 500), "v": (1100,), "empty": (0, 2), "scalar": ()}


def model(dtype=jnp.float32, seed=0):
    """A tree of gradients; ``dtype`` may be one for each leaf."""
    rng = np.random.default_rng(seed)
    dtypes = [dtype] * len(SHAPES) if not isinstance(dtype, tuple) else dtype
    return {
        name: jnp.asarray(rng.standard_normal(shape), d)
        for (name, shape), d in zip(SHAPES.items(), dtypes, strict=True)
    }


def run(privatizer, steps=STEPS, dtype=jnp.float32):
    """Outputs of all steps, stacked."""
    state = privatizer.init(model(dtype))
    update = jax.jit(privatizer.update)
    outs = []
    for t in range(steps):
        out, state = update(model(dtype, seed=t), state)
        outs.append(out)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)


def assert_same_noise(actual, expected, sample_rtol=2e-6):
    """The tolerance of samples, 2e-6 for float32, is magnified by the matrix: by less than 10."""

    def compare(a, e):
        assert a.dtype == e.dtype
        rtol = 2 * float(jnp.finfo(a.dtype).eps)  # their rounding and ours: one unit each
        a, e = (np.asarray(v).astype(np.float64) for v in (a, e))
        scale = max(np.abs(e).max(initial=0), 1)
        np.testing.assert_allclose(a, e, rtol=rtol, atol=10 * sample_rtol * scale)

    jax.tree.map(compare, actual, expected)


def build(lib, matrix, **kwargs):
    return lib.noise.matrix_factorization_privatizer(
        (MATRICES | BEYOND_THE_REFERENCE)[matrix](lib), **{"stddev": 1.5, "prng_key": 7, **kwargs}
    )


@pytest.fixture(scope="module")
def theirs(reference):
    class Theirs:
        noise, streaming, toeplitz, banded, buffered = reference

    return Theirs


# -- The same noise as jax_privacy ------------------------------------------------------------


@pytest.mark.parametrize(
    "matrix",
    sweeps.cases(
        list(MATRICES),
        [
            "identity",
            "banded",
            "column-normalized",
            "rows scaled",
            "general banded",
            "buffers",
            "buffers, not inverted",
            "prefix_sum",
            "product",
            "dense",
        ],
    ),
)
def test_noise_of_the_reference(theirs, matrix):
    assert_same_noise(run(build(Ours, matrix)), run(build(theirs, matrix)))


@pytest.mark.each_value
@pytest.mark.filterwarnings("ignore:column_normalize_for_n")
@pytest.mark.parametrize("matrix", ["identity", "column-normalized", "product", "dense"])
@pytest.mark.parametrize(
    ("grads", "noise"),
    [
        ((jnp.bfloat16, jnp.float32, jnp.float32, jnp.float16), None),
        ((jnp.bfloat16, jnp.float32, jnp.float16, jnp.float16), jnp.float32),
        (jnp.float32, jnp.bfloat16),
    ],
    ids=["mixed", "float32 noise", "bfloat16 noise"],
)
def test_dtypes_of_the_reference(theirs, matrix, grads, noise):
    # A stddev that is a power of two scales samples of 16 bits exactly.
    kwargs = {"dtype": noise, "stddev": 2.0}
    ours, expected = (run(build(lib, matrix, **kwargs), dtype=grads) for lib in (Ours, theirs))
    # Samples of 16 bits are rounded between operations or not, as the compiler likes; sums of them
    # (prefix sums, dense rows) drift by a unit of the last place each.
    coarse = noise == jnp.bfloat16 or noise is None
    assert_same_noise(ours, expected, sample_rtol=2**-10 if coarse else 2e-6)


def test_float64_noise_of_the_reference(theirs):
    with jax.enable_x64(True):
        for matrix in ("banded", "dense"):
            ours, expected = (run(build(lib, matrix), dtype=jnp.float64) for lib in (Ours, theirs))
            assert ours["w"].dtype == jnp.float64
            # The coefficients are float32 here, as they are in the reference; the noise is not.
            assert_same_noise(ours, expected, sample_rtol=1e-13)


@pytest.mark.each_value
@pytest.mark.parametrize(
    "key",
    [
        lambda: jax.random.key(3),
        lambda: jax.random.PRNGKey(3),
        lambda: 3,
        lambda: jax.random.key(3, impl="rbg"),
    ],
    ids=["typed", "raw", "seed", "rbg"],
)
@pytest.mark.parametrize("matrix", ["banded", "dense", "product"])
def test_keys_of_the_reference(theirs, key, matrix):
    ours, expected = (run(build(lib, matrix, prng_key=key()), 4) for lib in (Ours, theirs))
    assert_same_noise(ours, expected)


def test_gaussian_privatizer_is_that_of_the_identity(theirs):
    ours = run(gaussian_privatizer(stddev=0.5, prng_key=2))
    assert_same_noise(ours, run(theirs.noise.gaussian_privatizer(stddev=0.5, prng_key=2)))
    identity = matrix_factorization_privatizer(streaming_matrix.identity(), stddev=0.5, prng_key=2)
    jax.tree.map(np.testing.assert_array_equal, ours, run(identity))


@pytest.mark.parametrize("implementation", ["jax", pytest.param("cpp", marks=needs_cpp)])
def test_implementations_agree(implementation):
    asked = build(Ours, "column-normalized", implementation=implementation)
    assert_same_noise(run(asked), run(build(Ours, "column-normalized")))


FUSED = ["banded", "column-normalized", "general banded", "buffers", *BEYOND_THE_REFERENCE]


@pytest.mark.each_value
@pytest.mark.parametrize("scale", [None, (0.5,), (1.0, 3.0, 0.2)])
@pytest.mark.parametrize("matrix", FUSED)
def test_fused_noise_is_that_of_the_streaming_matrix(matrix, scale):
    """The description that kernels take describes what the two functions of the matrix do."""
    fused = (MATRICES | BEYOND_THE_REFERENCE)[matrix](Ours)
    if scale is not None:
        fused = fused.scale_rows_and_columns(jnp.array(scale))
    assert fused.structure is not None
    plain = dataclasses.replace(fused)
    assert plain.structure is None
    ours, expected = (
        run(matrix_factorization_privatizer(m, stddev=1.5, prng_key=7)) for m in (fused, plain)
    )
    assert_same_noise(ours, expected)


def test_small_scales_of_16_bits_do_not_multiply_to_none():
    scale = jnp.array([1e-4], jnp.float16)
    matrix = toeplitz.inverse_as_streaming_matrix(jnp.array([1.0, 0.5], jnp.float16))
    for _ in range(2):
        matrix = matrix.scale_rows_and_columns(scale)
    privatizer = matrix_factorization_privatizer(matrix, stddev=1.0, prng_key=0)
    zeros = jnp.zeros(10_000)
    noise, _ = privatizer.update(zeros, privatizer.init(zeros))
    assert np.std(noise) == pytest.approx(1e-8, rel=0.05)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_columns_of_16_bits_have_norm_1(dtype):
    """The noise of every row is scaled by the norm of a column: in 16 bits that would be off."""
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.uniform(0.2, 1, (40, 8)), dtype)
    C = banded_strategies.ColumnNormalizedBanded(params)
    wide = banded_strategies.ColumnNormalizedBanded(params.astype(jnp.float32))
    rows = (c.inverse_as_streaming_matrix().structure.row_scale for c in (C, wide))
    np.testing.assert_array_equal(*rows)


def test_a_float64_strategy_outside_and_inside_of_64_bit_mode():
    with jax.enable_x64(True):
        blt = buffered_toeplitz.BufferedToeplitz.build([0.9, 0.5], [0.2, 0.3])
        matrix = blt.inverse_as_streaming_matrix()
    privatizer = matrix_factorization_privatizer(matrix, stddev=1.0, prng_key=0)
    outside = run(privatizer, 2)
    with jax.enable_x64(True):
        inside = run(privatizer, 2)
    assert_same_noise(inside, outside)


def test_general_banded_noise_ends_with_the_strategy():
    privatizer = matrix_factorization_privatizer(general_banded(Ours, n=3), stddev=1.0, prng_key=0)
    out = run(privatizer, 5)["v"]
    assert np.isfinite(out[:3]).all()
    assert np.isnan(out[3:]).all()


def test_noise_without_state_takes_the_memory_of_independent_noise():
    """DP-lambda-CGD: z_t - lambda z_{t-1}, both of them made when they are needed."""
    size = 1_000_000
    matrix = toeplitz.noising_coef_as_streaming_matrix(jnp.array([1.0, -0.7]), look_ahead=0)
    privatizers = {
        "independent": gaussian_privatizer(stddev=1.0, prng_key=0),
        "correlated": matrix_factorization_privatizer(matrix, stddev=1.0, prng_key=0),
    }
    memory = {}
    for name, privatizer in privatizers.items():
        grads = jax.ShapeDtypeStruct((size,), jnp.float32)
        state = jax.eval_shape(privatizer.init, grads)
        step = jax.jit(privatizer.update, donate_argnums=1).lower(grads, state).compile()
        analysis = step.memory_analysis()
        memory[name] = sum(
            getattr(analysis, f"{kind}_size_in_bytes") for kind in ("argument", "output", "temp")
        )
    assert 8 * size <= memory["independent"]  # gradients in, gradients out
    assert abs(memory["correlated"] - memory["independent"]) < 1000
    z, x = (
        np.asarray(run(p)["v"]) - np.stack([model(seed=t)["v"] for t in range(STEPS)])
        for p in privatizers.values()
    )
    np.testing.assert_allclose(x[1:], z[1:] - 0.7 * z[:-1], atol=1e-5)
    np.testing.assert_allclose(x[0], z[0], atol=1e-5)


# -- How it is used ---------------------------------------------------------------------------

KINDS = ["identity", "banded", "product", "dense", "general banded", "banded inverse", "buffers"]


@pytest.mark.parametrize("matrix", KINDS)
def test_arguments_by_name(matrix):
    privatizer = build(Ours, matrix)
    grads = model()
    state = privatizer.init(grads)
    expected = privatizer.update(grads, state)
    named = privatizer.update(sum_of_clipped_grads=grads, noise_state=state, params=grads)
    jax.tree.map(np.testing.assert_array_equal, named, expected)
    positional = privatizer.update(grads, state, grads)
    jax.tree.map(np.testing.assert_array_equal, positional, expected)


@pytest.mark.parametrize("matrix", KINDS)
def test_donation_changes_nothing_but_deletes_the_state(matrix):
    key = jax.random.key(9)
    privatizer = build(Ours, matrix, prng_key=key)
    donating = jax.jit(privatizer.update, donate_argnums=1)
    expected = run(privatizer)
    state = privatizer.init(model())
    for t in range(STEPS):
        old = state
        out, state = donating(model(seed=t), state)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old) if leaf.size)
        jax.tree.map(lambda a, e, t=t: np.testing.assert_array_equal(a, e[t]), out, expected)
    # The caller's key was copied: the state is not the only owner of its buffer.
    assert jax.random.key_data(key).tolist() == [0, 9]
    raw = jax.random.PRNGKey(9)
    from_raw = build(Ours, matrix, prng_key=raw)
    donating(model(), from_raw.init(model()))
    assert raw.tolist() == [0, 9]
    jax.tree.map(np.testing.assert_array_equal, run(from_raw), expected)


@pytest.mark.parametrize("matrix", KINDS)
def test_init_on_shapes_eval_shape_and_scan(matrix):
    privatizer = build(Ours, matrix)
    structs = jax.eval_shape(model)
    state = privatizer.init(structs)
    jax.tree.map(np.testing.assert_array_equal, state, privatizer.init(model()))
    abstract = jax.eval_shape(privatizer.init, structs)
    out, after = jax.eval_shape(privatizer.update, structs, abstract)
    shape_of = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype))
    assert shape_of(abstract) == shape_of(state) == shape_of(after)
    assert shape_of(out) == shape_of(structs)

    grads = jax.tree.map(lambda *v: jnp.stack(v), *[model(seed=t) for t in range(STEPS)])
    scan = jax.jit(lambda s: jax.lax.scan(lambda s, g: privatizer.update(g, s)[::-1], s, grads)[1])
    assert_same_noise(scan(state), run(privatizer))


def test_chain_with_an_optimizer():
    privatizer = build(Ours, "banded")
    optimizer = optax.chain(privatizer, optax.sgd(0.1))
    params = model()
    state, noise_state = optimizer.init(params), privatizer.init(params)
    expected = params
    for t in range(3):
        updates, state = optimizer.update(model(seed=t), state, params)
        params = optax.apply_updates(params, updates)
        noisy, noise_state = privatizer.update(model(seed=t), noise_state)
        expected = jax.tree.map(lambda p, g: p - 0.1 * g, expected, noisy)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), params, expected)


@pytest.mark.parametrize("matrix", KINDS)
def test_key_lives_in_the_state(matrix):
    """So a compiled update serves all keys, and a state restored elsewhere continues its stream."""
    one, other = build(Ours, matrix, prng_key=1), build(Ours, matrix, prng_key=2)
    update = jax.jit(one.update)
    grads = model()
    noise_of_one, _ = update(grads, one.init(grads))
    noise_of_other, _ = update(grads, other.init(grads))
    expected, _ = jax.jit(other.update)(grads, other.init(grads))
    jax.tree.map(np.testing.assert_array_equal, noise_of_other, expected)
    assert np.all(np.asarray(noise_of_one["v"]) != np.asarray(noise_of_other["v"]))
    assert update._cache_size() == 1


@pytest.mark.parametrize("matrix", KINDS)
@pytest.mark.parametrize("empty", [{}, (), None, {"a": {}}], ids=repr)
def test_empty_trees_stay_empty(matrix, empty):
    privatizer = build(Ours, matrix)
    state = privatizer.init(empty)
    for _ in range(3):
        out, state = privatizer.update(empty, state)
        assert out == empty


def test_state_is_the_rings_and_little_else():
    size, bands = 100_000, len(COEF)
    state = build(Ours, "banded").init({"w": jnp.zeros(size)})
    memory = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert memory <= 1.01 * (bands - 1) * size * 4
    assert build(Ours, "identity").init(jnp.zeros(size)).inner == ()


def test_numpy_gradients():
    """NumPy's default dtype is float64, which JAX does not have by default."""
    privatizer = build(Ours, "banded")
    grads = np.ones(30)
    out, _ = privatizer.update(grads, privatizer.init(grads))
    expected, _ = privatizer.update(jnp.ones(30), privatizer.init(jnp.ones(30)))
    np.testing.assert_array_equal(out, expected)


@pytest.mark.filterwarnings("error:requested dtype float64")  # ours, and not that of JAX
@pytest.mark.parametrize("matrix", KINDS)
def test_float64_noise_is_float32_where_jax_has_no_float64(matrix):
    """``dtype=float`` is JAX's default float dtype everywhere else, jax_privacy included."""
    with pytest.raises(UserWarning, match="requested dtype float64 is not available"):
        build(Ours, matrix, dtype=np.float64)
    privatizer, expected = build(Ours, matrix, dtype=float), build(Ours, matrix)
    assert_same_noise(run(privatizer, 2), run(expected, 2))


# -- Fresh keys -------------------------------------------------------------------------------


@pytest.mark.parametrize("matrix", KINDS)
def test_fresh_keys_differ(matrix):
    one, other = (run(build(Ours, matrix, prng_key=None), 1) for _ in range(2))
    differ = np.asarray(one["v"]) != np.asarray(other["v"])
    # Two of 2^23 uniforms are the same now and then.
    assert differ.mean() > 0.99


def test_fresh_keys_are_all_entropy(monkeypatch):
    requests = []

    def token_bytes(count):
        requests.append(count)
        return bytes(range(251, 251 - count, -1))

    monkeypatch.setattr(secrets, "token_bytes", token_bytes)
    state = gaussian_privatizer(stddev=1.0).init(jnp.zeros(2))
    assert requests == [32]
    split = jax.random.split(random.secure_key(bytes(range(251, 219, -1))))
    np.testing.assert_array_equal(state.clock.keys, jax.random.key_data(split)[::-1])


def test_the_stream_is_told():
    """ChaCha20 without a key, jax_privacy's for seeds, and otherwise that of the key."""
    for prng_key, stream in (
        (None, "chacha20"),
        (3, "threefry2x32"),
        (jax.random.PRNGKey(3), "threefry2x32"),
        (jax.random.key(3, impl="rbg"), "rbg"),
        (random.secure_key(), "chacha20"),
    ):
        privatizer = gaussian_privatizer(stddev=1.0, prng_key=prng_key)
        assert f"noise stream {stream})" in repr(privatizer)
        ((kind, _),) = privatizer.init(jnp.zeros(3)).clock.kind.items()
        assert f"_{stream}_" in kind


def test_a_secure_key_reproduces_a_run():
    def noise(prng_key):
        privatizer = gaussian_privatizer(stddev=1.0, prng_key=prng_key)
        return privatizer.update(jnp.zeros(50), privatizer.init(jnp.zeros(50)))[0]

    one, same = noise(random.secure_key(bytes(32))), noise(random.secure_key(bytes(32)))
    np.testing.assert_array_equal(one, same)
    assert (noise(random.secure_key(bytes(31) + b"1")) != one).all()


def test_fresh_keys_leave_numpy_alone():
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = gaussian_privatizer(stddev=1.0).init(jnp.zeros(2)).clock.keys
    after = np.random.get_state()  # noqa: NPY002
    np.testing.assert_array_equal(before, after[1])
    np.random.seed(0)  # noqa: NPY002
    second = gaussian_privatizer(stddev=1.0).init(jnp.zeros(2)).clock.keys
    assert np.any(np.asarray(first) != np.asarray(second))


# -- Errors -----------------------------------------------------------------------------------


def test_step_beyond_the_rows_of_a_dense_matrix():
    privatizer = matrix_factorization_privatizer(np.eye(2), stddev=1.0, prng_key=0)
    grads = {"a": jnp.zeros(4), "b": jnp.zeros(())}
    state = privatizer.init(grads)
    for _ in range(2):
        out, state = privatizer.update(grads, state)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out))
    with pytest.raises(ValueError, match=r"at most 2 steps.*found step 2"):
        privatizer.update(grads, state)
    out, _ = jax.jit(privatizer.update)(grads, state)
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(out))


@pytest.mark.parametrize(
    ("stddev", "error"),
    [
        (-1.0, ValueError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        (jnp.float32(-2), ValueError),
        ("2", TypeError),
        (None, TypeError),
        (1j, TypeError),
        ([1.0], TypeError),
        (np.ones(1), TypeError),
    ],
    ids=repr,
)
def test_stddev_that_is_none(stddev, error):
    with pytest.raises(error, match="expected stddev to be"):
        gaussian_privatizer(stddev=stddev, prng_key=0)


def test_stddev_out_of_the_range_of_the_noise():
    """1e-50 is zero and 1e39 infinite in float32: no noise, or nothing but noise."""
    for stddev in (1e-50, 1e39):
        with pytest.raises(ValueError, match=re.escape(f"found {stddev}")):
            gaussian_privatizer(stddev=stddev, prng_key=0)


@pytest.mark.each_value
@pytest.mark.parametrize("stddev", [0, 0.0, -0.0])
@pytest.mark.parametrize("matrix", KINDS)
def test_no_noise_of_stddev_zero(matrix, stddev):
    def first(stddev):
        privatizer = build(Ours, matrix, stddev=stddev)
        return privatizer.update(jnp.ones(50), privatizer.init(jnp.ones(50)))[0]

    np.testing.assert_array_equal(first(stddev), 1)
    np.testing.assert_array_equal(jax.jit(first)(abs(stddev)), 1)


def test_a_stddev_may_be_any_integer_of_the_range():
    assert gaussian_privatizer(stddev=10**30, prng_key=0).init(1.0)
    with pytest.raises(ValueError, match="expected stddev in the range of float64"):
        gaussian_privatizer(stddev=10**400, prng_key=0)


def test_stddev_may_be_traced():
    def noise(stddev):
        privatizer = gaussian_privatizer(stddev=stddev, prng_key=0)
        return privatizer.update(jnp.zeros(5), privatizer.init(jnp.zeros(5)))[0]

    np.testing.assert_allclose(jax.jit(noise)(2.0), noise(2.0), rtol=1e-6)


@pytest.mark.parametrize(
    ("matrix", "error", "message"),
    [
        (np.ones(3), ValueError, r"2-D.*\(3,\)"),
        (np.ones((2, 2, 2)), ValueError, r"2-D.*\(2, 2, 2\)"),
        (1.0, ValueError, r"2-D.*\(\)"),
        (np.ones((0, 3)), ValueError, r"not empty.*\(0, 3\)"),
        (np.array([[1.0, np.nan]]), ValueError, "finite"),
        (np.array([[np.inf]]), ValueError, "finite"),
        (np.array([[1.0 + 1j]]), TypeError, "noising_matrix.*complex"),
        ("identity", TypeError, "'identity'"),
        ([[1.0]], TypeError, r"\[\[1.0\]\]"),
        (None, TypeError, "None"),
    ],
    ids=repr,
)
@pytest.mark.filterwarnings("ignore:Casting complex")
def test_matrix_that_is_none(matrix, error, message):
    with pytest.raises(error, match=message):
        matrix_factorization_privatizer(matrix, stddev=1.0, prng_key=0)


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        (lambda: jax.random.split(jax.random.key(0)), ValueError, r"\(2,\)"),
        (lambda: jax.random.split(jax.random.PRNGKey(0)), (TypeError, ValueError), r"\(2, 2\)"),
        (lambda: np.zeros(2, np.int32), TypeError, r"int32.*\(2,\)"),
        (lambda: np.zeros(2), TypeError, r"float.*\(2,\)"),
        (lambda: 1.5, TypeError, "found a float"),
        (lambda: "seed", TypeError, "found a str"),
    ],
    ids=["keys", "raw keys", "int32", "floats", "float", "str"],
)
def test_key_that_is_none(key, error, message):
    with pytest.raises(error, match=f"expected prng_key to be .*{message}"):
        gaussian_privatizer(stddev=1.0, prng_key=key())


@pytest.mark.parametrize("matrix", KINDS)
@pytest.mark.parametrize(
    "dtype", [jnp.int32, jnp.complex64, jnp.float8_e4m3fn, jnp.bool_], ids=lambda d: d.__name__
)
def test_gradients_that_get_no_noise(matrix, dtype):
    privatizer = build(Ours, matrix)
    grads = {"w": {"kernel": jnp.zeros(3, dtype)}, "b": jnp.zeros(2)}
    message = rf"\['w'\]\['kernel'\].*{jnp.dtype(dtype).name}"
    with pytest.raises(TypeError, match=message):
        privatizer.init(grads)
    state = privatizer.init(jax.tree.map(lambda g: jnp.zeros(g.shape), grads))
    with pytest.raises(TypeError, match=message):
        privatizer.update(grads, state)


def test_leaves_that_are_keys():
    with pytest.raises(TypeError, match=r"leaf \['k'\] to hold numbers, found key<fry>"):
        build(Ours, "banded").init({"k": jax.random.key(0)})


def test_float8_gradients_get_no_noise_of_another_dtype_either():
    privatizer = gaussian_privatizer(stddev=1.0, prng_key=0, dtype=jnp.float32)
    with pytest.raises(TypeError, match=r"gradients of dtype.*float8_e4m3fn"):
        privatizer.init(jnp.ones(100, jnp.float8_e4m3fn))


@pytest.mark.parametrize("matrix", KINDS)
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float8_e4m3fn, jnp.complex64, "float33"])
def test_noise_dtype_that_cannot_be_sampled(matrix, dtype):
    found = getattr(dtype, "__name__", dtype)
    with pytest.raises(TypeError, match=rf"expected dtype to be one of float16, .*found .*{found}"):
        build(Ours, matrix, dtype=dtype)


def test_states_that_are_not_the_privatizers():
    privatizer = build(Ours, "banded")
    grads = {"a": jnp.zeros(4), "b": jnp.zeros(2)}
    state = privatizer.init(grads)
    cases = [
        (privatizer, {"a": jnp.zeros(4)}, state, r"noise_state.*\['b'\]"),
        (privatizer, {"a": jnp.zeros(4), "c": jnp.zeros(2)}, state, r"\['c'\]"),
        (privatizer, {"a": jnp.zeros(5), "b": jnp.zeros(2)}, state, r"\(3, 5\).*found.*\(3, 4\)"),
        (privatizer, {"a": jnp.zeros((2, 2)), "b": jnp.zeros(2)}, state, r"\(3, 2, 2\)"),
        (
            privatizer,
            grads,
            build(Ours, "identity").init(grads),
            "noise_state to be of kind.*found one of kind",
        ),
        (privatizer, grads, build(Ours, "product").init(grads), "noise_state"),
        (privatizer, grads, build(Ours, "banded inverse").init(grads), "noise_state"),
        (build(Ours, "banded inverse"), grads, state, "noise_state"),
        (privatizer, grads, build(Ours, "dense").init(grads), "noise_state"),
        (build(Ours, "product"), grads, state, "noise_state"),
        (build(Ours, "product"), {"a": jnp.zeros(4)}, build(Ours, "product").init(grads), "b"),
        (build(Ours, "dense"), grads, state, "noise_state"),
        (privatizer, grads, None, "noise_state to be a NoiseState.* found a NoneType"),
        (privatizer, grads, tuple(state), "noise_state to be a NoiseState.* found a tuple"),
        (privatizer, [*grads.values()], state, "noise_state"),
    ]
    other_bands = matrix_factorization_privatizer(
        toeplitz.inverse_as_streaming_matrix(jnp.array([1.0, 0.5, 0.2])), stddev=1.0, prng_key=0
    )
    cases.append((other_bands, grads, state, "noise_state to be of kind.*found one of kind"))
    for owner, gradients, foreign, message in cases:
        with pytest.raises(ValueError, match=message):
            owner.update(gradients, foreign)
        # Shapes are checked inside a trace as well.
        with pytest.raises(ValueError, match=message):
            jax.jit(owner.update)(gradients, foreign)


@pytest.mark.parametrize("matrix", ["identity", "banded", "product", "dense"])
def test_implementation_that_does_not_exist(matrix):
    with pytest.raises(ValueError, match="one of jax, cpp, pallas, triton, found 'fortran'"):
        build(Ours, matrix, implementation="fortran")


@needs_cpp
@pytest.mark.parametrize("matrix", ["identity", "banded", "product"])
def test_implementation_that_cannot_take_the_noise(matrix):
    grads = jnp.zeros(3)
    privatizer = build(Ours, matrix, implementation="cpp", dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match=r"cpp.*bfloat16"):
        privatizer.update(grads, privatizer.init(grads))


@pytest.mark.each_value
@pytest.mark.parametrize("matrix", [*KINDS, "prefix_sum"])
@pytest.mark.parametrize("gradients", [jnp.float16, jnp.float32])
def test_small_noise_of_16_bits_is_not_rounded_away(matrix, gradients):
    """1e-8 is zero in float16: noise must be scaled in more."""
    stddev, grads = 1e-8, jnp.zeros(20_000, jnp.float32)
    lib_matrix = (
        (MATRICES | BEYOND_THE_REFERENCE)[matrix](Ours) if matrix != "dense" else jnp.eye(3)
    )
    if matrix == "banded":
        coef = jnp.array([1.0, 0.5], gradients)  # with 16-bit coefficients too
        lib_matrix = toeplitz.inverse_as_streaming_matrix(coef)
    privatizer = matrix_factorization_privatizer(
        lib_matrix, stddev=stddev, prng_key=0, dtype=jnp.float16
    )
    noisy, _ = privatizer.update(grads, privatizer.init(grads))
    # Row 0 of every one of these is within 12 % of a unit vector.
    np.testing.assert_allclose(np.std(noisy), stddev, rtol=0.15)


def test_dense_noise_is_only_made_again_under_the_same_conditions():
    """All rows share their samples: what changes the samples must not go unseen."""
    grads = {"a": jnp.zeros(50), "b": jnp.zeros(3)}

    def build_dense(**kwargs):
        return build(Ours, "dense", **kwargs)

    state = build_dense().init(grads)
    others = [
        (build_dense(), jax.tree.map(lambda g: g.astype(jnp.bfloat16), grads)),
        (build_dense(dtype=jnp.float16), grads),
        (build_dense(), {"c": grads["a"], "b": grads["b"]}),
        (build_dense(), {**grads, "c": jnp.zeros(2)}),
        (build_dense(), {"a": jnp.zeros(51), "b": jnp.zeros(3)}),
    ]
    for privatizer, changed in others:
        with pytest.raises(ValueError, match="noise_state"):
            privatizer.update(changed, state)
    with jax.threefry_partitionable(False), pytest.raises(ValueError, match="kind"):
        build_dense().update(grads, state)
    rbg, unsafe_rbg = (
        build_dense(prng_key=jax.random.key(0, impl=i)) for i in ("rbg", "unsafe_rbg")
    )
    with pytest.raises(ValueError, match="kind"):
        rbg.update(grads, unsafe_rbg.init(grads))


@pytest.mark.parametrize("look_ahead", [0, None])
def test_past_samples_are_only_made_again_under_the_same_conditions(look_ahead):
    """Else they would not cancel what they cancel."""
    matrix = banded_inverse(Ours, look_ahead)
    grads = {"a": jnp.zeros(50), "b": jnp.zeros(3)}

    def privatizer(**kwargs):
        return matrix_factorization_privatizer(matrix, stddev=1.0, prng_key=0, **kwargs)

    state = privatizer().init(grads)
    others = [
        (privatizer(), jax.tree.map(lambda g: g.astype(jnp.bfloat16), grads)),
        (privatizer(dtype=jnp.float16), grads),
        (privatizer(), {"c": grads["a"], "b": grads["b"]}),
        (privatizer(), {**grads, "c": jnp.zeros(2)}),
        (privatizer(), {"a": jnp.zeros(51), "b": jnp.zeros(3)}),
    ]
    for other, changed in others:
        with pytest.raises(ValueError, match="noise_state"):
            other.update(changed, state)
    with jax.threefry_partitionable(False), pytest.raises(ValueError, match="kind"):
        privatizer().update(grads, state)


def test_no_key_is_drawn_inside_a_trace():
    with pytest.raises(ValueError, match="prng_key inside a trace"):
        jax.jit(lambda g: gaussian_privatizer(stddev=1.0).init(g))(jnp.zeros(3))


def noise_at(privatizer, step):
    """One update from a state whose counter reads ``step``, in a trace."""
    grads = jnp.zeros(2000)
    state = privatizer.init(grads)

    def noise(step):
        changed = state._replace(clock=state.clock._replace(step=step))
        return privatizer.update(grads, changed)[0]

    return jax.block_until_ready(jax.jit(noise)(jnp.int32(step)))


@pytest.mark.parametrize("matrix", ["identity", "banded", "dense", "banded inverse"])
def test_a_negative_step_gives_nan(matrix):
    """As the counter would read after 2^31 steps."""
    privatizer = build(Ours, matrix, implementation="jax")
    assert np.isfinite(noise_at(privatizer, 1)).all()
    assert np.isnan(noise_at(privatizer, -1)).all()


@needs_cpp
@pytest.mark.parametrize("matrix", ["identity", "banded"])
def test_a_negative_step_gives_nan_in_the_compiled_kernel(matrix):
    assert np.isnan(noise_at(build(Ours, matrix, implementation="cpp"), -1)).all()


# -- Noise that would vanish --------------------------------------------------------------------


@pytest.mark.each_value
@pytest.mark.parametrize("stddev", [1e-42, -1.0, np.nan, np.inf])
@pytest.mark.parametrize("matrix", KINDS)
def test_a_traced_stddev_that_is_none_gives_nan(matrix, stddev):
    @jax.jit
    def first(stddev):
        privatizer = build(Ours, matrix, stddev=stddev)
        return privatizer.update(jnp.zeros(50), privatizer.init(jnp.zeros(50)))[0]

    for x64 in (False, True):  # where the stddev is converted
        with jax.enable_x64(x64):
            assert np.isnan(first(jnp.float32(stddev))).all()
            assert np.isfinite(first(jnp.float32(2.0))).all()


def test_dense_noise_that_vanishes_is_seen():
    """The product of the row and the stddev is 0 in 32 bits, and neither of the two is."""
    tiny = np.float32(1e-20) * np.eye(4, dtype=np.float32)
    privatizer = Ours.noise.matrix_factorization_privatizer(tiny, stddev=1e-25, prng_key=1)
    assert np.isnan(privatizer.update(jnp.zeros(9), privatizer.init(jnp.zeros(9)))[0]).all()


@pytest.mark.parametrize("matrix", KINDS)
def test_leaves_that_are_not_arrays(matrix):
    privatizer = build(Ours, matrix)
    with pytest.raises(TypeError, match=r"\['b'\].*an array.*1.5"):
        privatizer.init({"a": jnp.zeros(3), "b": "1.5"})


@pytest.mark.parametrize("matrix", KINDS)
def test_leaves_that_are_python_numbers(matrix):
    privatizer = build(Ours, matrix)
    number, array = {"w": 1.0}, {"w": jnp.float32(1)}
    expected, _ = privatizer.update(array, privatizer.init(array))
    for update in (privatizer.update, jax.jit(privatizer.update)):
        assert_same_noise(update(number, privatizer.init(number))[0], expected)
    with pytest.raises(TypeError, match=r"\['w'\].*gradients of dtype.*int32"):
        privatizer.init({"w": 1})


@pytest.mark.parametrize("matrix", KINDS)
def test_strict_ranks(matrix):
    privatizer, grads = build(Ours, matrix), {"w": jnp.zeros((3, 1500))}
    with jax.numpy_rank_promotion("raise"):
        jax.jit(privatizer.update)(grads, privatizer.init(grads))


@pytest.mark.parametrize("matrix", KINDS)
def test_debug_modes(matrix):
    privatizer, grads = build(Ours, matrix), {"w": jnp.zeros((3, 40))}
    expected, _ = privatizer.update(grads, privatizer.init(grads))
    with jax.debug_nans(True), jax.disable_jit():
        out, _ = privatizer.update(grads, privatizer.init(grads))
    assert_same_noise(out, expected)


@pytest.mark.parametrize("matrix", KINDS)
def test_strict_dtypes(matrix):
    privatizer, grads = build(Ours, matrix), {"w": jnp.zeros(1500, jnp.bfloat16)}
    expected, _ = privatizer.update(grads, privatizer.init(grads))
    with jax.numpy_dtype_promotion("strict"):
        for update in (privatizer.update, jax.jit(privatizer.update)):
            out, _ = update(grads, privatizer.init(grads))
            jax.tree.map(np.testing.assert_array_equal, out, expected)


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize("implementation", [None, "jax", pytest.param("cpp", marks=needs_cpp)])
class TestTwoDevices:
    WHOLE = np.zeros((64, 300), np.float32)

    @pytest.fixture
    def mesh(self):
        return jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))

    def privatizer(self, implementation, key=0):
        coef = toeplitz.optimal_max_error_strategy_coefs(4)
        matrix = toeplitz.inverse_as_streaming_matrix(coef)
        return matrix_factorization_privatizer(
            matrix, stddev=1.0, prng_key=key, implementation=implementation
        )

    def noise(self, implementation, grads, wrap=lambda update: update):
        """That of the last of five steps."""
        privatizer = self.privatizer(implementation)
        state, update = privatizer.init(grads), jax.jit(wrap(privatizer.update))
        for _ in range(5):
            out, state = update(grads, state)
        return out

    def expected(self):
        return np.asarray(self.noise("jax", self.WHOLE))

    def test_noise_is_that_of_one_device(self, implementation, mesh):
        sharded = jax.device_put(self.WHOLE, NamedSharding(mesh, P("x", None)))
        np.testing.assert_allclose(self.noise(implementation, sharded), self.expected(), atol=1e-5)

    def test_replicas_make_the_same_noise(self, implementation, mesh):
        def wrap(update):
            return jax.shard_map(update, mesh=mesh, in_specs=P(), out_specs=P())

        found = self.noise(implementation, self.WHOLE, wrap)
        np.testing.assert_allclose(found, self.expected(), atol=1e-5)

    @pytest.mark.parametrize("out_specs", [P("x"), P()], ids=str)
    def test_shards_that_would_share_their_noise(self, implementation, mesh, out_specs):
        privatizer = self.privatizer(implementation)
        state = privatizer.init(self.WHOLE[:32])

        def step(grads):
            return privatizer.update(grads, state)[0]

        local = jax.shard_map(step, mesh=mesh, in_specs=P("x"), out_specs=out_specs)
        with pytest.raises(ValueError, match=r"same over the axes \['x'\]"):
            jax.jit(local)(self.WHOLE)

    def test_shards_with_keys_of_their_own(self, implementation, mesh):
        def step(grads):
            key = jax.random.fold_in(jax.random.key(0), jax.lax.axis_index("x"))
            privatizer = self.privatizer(implementation, key)
            return privatizer.update(grads, privatizer.init(grads))[0]

        local = jax.shard_map(step, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
        out = jax.jit(local)(self.WHOLE)
        assert len(np.unique(out)) > 0.99 * out.size


@pytest.mark.parametrize("strategy", ["ZERO", None, 1])
def test_strategy_that_is_none(strategy):
    for factory in (gaussian_privatizer, functools.partial(matrix_factorization_privatizer, 1.0)):
        with pytest.raises(TypeError, match=f"intermediate_strategy.*ZERO.*{strategy!r}"):
            factory(stddev=1.0, prng_key=0, intermediate_strategy=strategy)
