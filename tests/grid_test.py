"""Exact noise as users see it: clipping, coefficients, privatizers and what they refuse."""

from __future__ import annotations

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_privacy_kernels import grid, noise_addition, random
from jax_privacy_kernels.matrix_factorization import (
    banded,
    buffered_toeplitz,
    streaming_matrix,
    toeplitz,
)
from jax_privacy_kernels.ops import _chacha20, _ffi
from jax_privacy_kernels.ops._chacha20 import Domain

KEY = random.secure_key(bytes(range(32)))
COEF = grid.round_coefs(toeplitz.optimal_max_error_strategy_coefs(5), 8)
BANDED = toeplitz.inverse_as_streaming_matrix(COEF)
MODEL = {"w": jnp.zeros((9, 700), jnp.int32), "b": jnp.zeros((), jnp.int32)}
ONE_LEAF = {"w": MODEL["w"]}  # plain JAX takes seconds for every leaf that it compiles


def privatizer(matrix=BANDED, **options):
    return grid.privatizer(matrix, **{"stddev": 1000.0, "prng_key": KEY, **options})


def run(privatizer, grads, steps, state=None, donate=(), update=None):
    update = update or jax.jit(privatizer.update, donate_argnums=donate)
    state, outs = privatizer.init(grads) if state is None else state, []
    for _ in range(steps):
        out, state = update(grads, state)
        outs.append(jax.tree.map(np.asarray, out))
    return outs, state


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


# -- Clipping ---------------------------------------------------------------------------------


def squared_norm(tree):
    return sum(int(x) ** 2 for leaf in jax.tree.leaves(tree) for x in np.asarray(leaf).reshape(-1))


magnitudes = st.sampled_from([1e-30, 1e-20, 1e-3, 1.0, 1e5, 1e20, 3e38])


@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([1, 2, 5, 300, 2000]),
    of=magnitudes,
    clip=st.sampled_from([1e-30, 1e-3, 1.0, 77.7, 1e10]),
    scale=st.sampled_from([50, 1000, 2**16 + 1, 2**24 + 1, 2**30 - 1]),
    sparse=st.booleans(),
)
def test_clipped_norm_is_at_most_the_scale(seed, size, of, clip, scale, sparse):
    rng = np.random.default_rng(seed)
    values = rng.uniform(-1, 1, size) * of
    if sparse:
        values *= rng.uniform(size=size) < 0.05
    gradient = {
        "a": jnp.asarray(values[: size // 2], jnp.float32),
        "b": jnp.asarray(values[size // 2 :], jnp.float32),
    }
    clipped, norm = grid.clip_and_round(gradient, clip, scale)
    assert all(x.dtype == jnp.int32 for x in jax.tree.leaves(clipped))
    assert squared_norm(clipped) <= scale**2
    exact = np.sqrt(sum(np.square(np.asarray(x, np.float64)).sum() for x in gradient.values()))
    with np.errstate(over="ignore"):  # a norm beyond float32 is infinite
        np.testing.assert_allclose(norm, np.float32(exact), rtol=1e-4)


@pytest.mark.parametrize("value", [0.5, 1.0, 1.5])
def test_worst_rounding_stays_within_the_scale(value):
    """All elements alike, half way between integers: nothing averages out."""
    d = 10_000
    for scale in (101, 150, 5000):
        gradient = jnp.full(d, value)
        clipped, _ = grid.clip_and_round(gradient, 1e-3, scale)
        assert squared_norm(clipped) <= scale**2


def test_what_is_not_clipped_is_rounded_to_the_nearest():
    gradient = {"a": jnp.array([0.125, -0.25, 0.3, 0.0]), "b": jnp.array(-0.5, jnp.float16)}
    clipped, norm = grid.clip_and_round(gradient, 2.0, 2**20)
    assert np.asarray(clipped["a"]).tolist() == [2**16, -(2**17), round(0.3 * 2**19), 0]
    assert int(clipped["b"]) == -(2**18)
    np.testing.assert_allclose(norm, np.sqrt(0.125**2 + 0.25**2 + 0.3**2 + 0.5**2), rtol=1e-3)
    back = grid.to_float(clipped, 2.0, 2**20)
    np.testing.assert_allclose(back["a"], gradient["a"], atol=2**-19)
    assert back["a"].dtype == jnp.float32


def test_clipping_keeps_the_direction():
    gradient = jnp.asarray(np.random.default_rng(0).normal(size=1000), jnp.float32)
    clipped, norm = grid.clip_and_round(gradient, 1.0, 2**16)
    back = grid.to_float(clipped, 1.0, 2**16)
    np.testing.assert_allclose(back, gradient / norm, atol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_gradients_that_are_not_finite_count_for_nothing(bad):
    clipped, norm = grid.clip_and_round({"a": jnp.array([1.0, bad]), "b": jnp.ones(3)}, 1.0, 100)
    assert squared_norm(clipped) == 0
    assert np.isnan(norm) if np.isnan(bad) else np.isinf(norm)


def test_clipping_maps_over_examples_and_in_x64_mode():
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        examples = {"w": jnp.asarray(rng.normal(size=(16, 10, 3))), "b": jnp.ones((16, 3))}
        clip = functools.partial(grid.clip_and_round, l2_clip_norm=1.0, grid_scale=2**40)
        clipped, norms = jax.jit(jax.vmap(clip))(examples)
        assert norms.shape == (16,)
        for i in range(16):
            one, _ = clip(jax.tree.map(lambda x, i=i: x[i], examples))
            assert all(x.dtype == jnp.int64 for x in jax.tree.leaves(one))
            assert squared_norm(one) <= 2**80
            jax.tree.map(
                lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=2**10), clipped, one
            )


def test_nothing_to_clip():
    clipped, norm = grid.clip_and_round({"a": jnp.zeros(0), "b": jnp.zeros(3)}, 1.0, 10)
    assert squared_norm(clipped) == 0
    assert norm == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gradient": jnp.ones(3, jnp.int32)}, TypeError, "expected leaf .* floating array, found"),
        ({"grid_scale": 0}, ValueError, "grid_scale"),
        ({"grid_scale": 2.5}, (TypeError, ValueError), "grid_scale"),
        ({"grid_scale": 2**30}, ValueError, r"grid_scale < 2\^30, found 1073741824"),
        ({"grid_scale": 3, "gradient": jnp.ones(9)}, ValueError, "grid_scale > 3, .* found 3"),
        ({"l2_clip_norm": 0.0}, ValueError, "l2_clip_norm to be positive and finite in float32"),
        ({"l2_clip_norm": np.nan}, ValueError, "l2_clip_norm"),
        ({"l2_clip_norm": np.inf}, ValueError, "l2_clip_norm"),
        ({"l2_clip_norm": "one"}, TypeError, "l2_clip_norm"),
        ({"l2_clip_norm": np.complex64(1)}, TypeError, "l2_clip_norm"),
        ({"l2_clip_norm": 1e39}, ValueError, "positive and finite in float32, found .*1e[+]39"),
        ({"l2_clip_norm": 1e-50}, ValueError, "positive and finite in float32, found .*1e-50"),
        ({"gradient": {"a": "b"}}, TypeError, r"leaf \['a'\] to be a floating array, found str"),
        ({"gradient": {"a": 10**30}}, TypeError, r"leaf \['a'\] to be a floating array, found int"),
        ({"gradient": np.ones(3, object)}, TypeError, "to be a floating array, found ndarray"),
    ],
)
def test_what_clipping_refuses(change, error, message):
    arguments = {"gradient": jnp.ones(3), "l2_clip_norm": 1.0, "grid_scale": 100, **change}
    with pytest.raises(error, match=message):
        grid.clip_and_round(**arguments)


@pytest.mark.parametrize("of", [1e-45, 2.0**-126, 1e-20, 1.0, 1e20, 3e38])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_clipping_holds_at_the_ends_of_floats_inside_jit(of, dtype):
    """Compiled, too, no product of factors overflows: gradients all over the range of a dtype."""
    rng = np.random.default_rng(4)
    with np.errstate(over="ignore"):
        values = (rng.uniform(-1, 1, (4, 300)) * of).astype(jnp.dtype(dtype))
    for scale in (50, 2**30 - 1):
        clip = jax.jit(jax.vmap(lambda g, c, s=scale: grid.clip_and_round(g, c, s)[0], (0, None)))
        for norm in (1e-45, 1e-38, 1.0, 3e38):
            for one in clip(jnp.asarray(values), norm):
                assert squared_norm(one) <= scale**2


def test_a_clipping_norm_is_one_number():
    with pytest.raises(TypeError, match=r"l2_clip_norm to be one number, found shape \(3,\)"):
        jax.jit(lambda c: grid.clip_and_round(jnp.ones(3), c, 100))(jnp.ones(3))


def test_to_float_refuses_floats_and_shows_what_is_not_valid():
    with pytest.raises(TypeError, match="int32 or int64, found float32"):
        grid.to_float({"a": jnp.ones(3)}, 1.0, 100)
    for text in ("word", "b"):  # which is the name of a dtype, too
        with pytest.raises(TypeError, match=rf"leaf \['a'\] to be of int32 or int64, found {text}"):
            grid.to_float({"a": text}, 1.0, 100)
    for norm in (1e39, 1e-50):
        with pytest.raises(ValueError, match="l2_clip_norm to be positive and finite in float32"):
            grid.to_float(jnp.ones(3, jnp.int32), norm, 100)
    with pytest.raises(TypeError, match="found 1000000000000"):
        grid.to_float({"a": 10**30}, 1.0, 100)
    for large in (np.array([7, 2**40]), np.int64(2**40)):
        with pytest.raises(TypeError, match="int64 with numbers that int32 does not hold"):
            grid.to_float({"a": large}, 1.0, 100)
    np.testing.assert_allclose(grid.to_float(np.array([7, -50]), 1.0, 100), [0.07, -0.5])
    least = jnp.array([jnp.iinfo(jnp.int32).min, 50], jnp.int32)
    np.testing.assert_array_equal(grid.to_float(least, 1.0, 100), [np.nan, 0.5])


# -- Coefficients -----------------------------------------------------------------------------


@given(
    st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=8).filter(lambda c: abs(c[0]) > 0.5),
    st.integers(0, 16),
)
def test_rounded_coefficients(coef, bits):
    rounded = grid.round_coefs(jnp.asarray(coef, jnp.float32), bits)
    for c, r in zip(coef, np.asarray(rounded).tolist(), strict=True):
        assert Fraction(r) == Fraction(
            (Fraction(c) * 2**bits + Fraction(1, 2)).__floor__(), 2**bits
        )


@pytest.mark.parametrize("bands", [4, 16, 64])
@pytest.mark.parametrize(("bits", "most"), [(8, 2e-3), (12, 1e-4), (16, 1e-5)])
def test_rounding_costs_little_error(bands, bits, most):
    with jax.enable_x64(True):
        coef = toeplitz.optimal_max_error_strategy_coefs(bands).astype(jnp.float64)
        errors = [
            toeplitz.per_query_error(strategy_coef=c, n=1000).max()
            * toeplitz.minsep_sensitivity_squared(c, min_sep=bands, max_participations=4, n=1000)
            for c in (coef, grid.round_coefs(coef, bits))
        ]
        assert errors[1] / errors[0] - 1 < most


@pytest.mark.parametrize(
    ("coef", "bits", "message"),
    [
        ([1.0, np.nan], 8, "finite"),
        ([0.001, 1.0], 8, r"diagonal of C to be at least 2\^-9, found 0.001"),
        ([1.0], 21, "fraction_bits <= 20, found 21"),
        ([1e308], 20, r"coef to be below 2\^31, found 1e\+308"),
        ([1.0], -1, "fraction_bits >= 0, found fraction_bits=-1"),
        ([2.0**10 + 0.3], 20, "that float32 holds with 20 bits"),
        ([[[1.0]]], 3, r"shape \[b\] or \[n, b\], found \(1, 1, 1\)"),
    ],
)
def test_what_rounding_refuses(coef, bits, message):
    with pytest.raises(ValueError, match=message):
        grid.round_coefs(np.array(coef), bits)


@pytest.mark.parametrize(
    ("coef", "message"),
    [
        ([[1j]], "array of numbers"),
        (np.array([[1j]]), "real numbers, found complex128"),
        (np.array([[True]]), "real numbers, found bool"),
        ([[1.0], [1.0, 2.0]], "array of numbers"),
        (np.array([[None]]), "real numbers, found object"),
        ("abc", "array of numbers"),
    ],
)
def test_what_is_no_strategy(coef, message):
    for function in (lambda c: grid.round_coefs(c, 8), grid.inverse_as_streaming_matrix):
        with pytest.raises(TypeError, match=message):
            function(coef)


def test_coefficients_of_a_toeplitz_strategy_are_told_where_they_belong():
    with pytest.raises(ValueError, match=r"found \(3,\): .* toeplitz.inverse_as_streaming_matrix"):
        grid.inverse_as_streaming_matrix([1.0, 0.5, 0.25])


def test_a_strategy_that_a_trace_hides_is_refused():
    for function in (lambda c: grid.round_coefs(c, 8), grid.inverse_as_streaming_matrix):
        with pytest.raises(TypeError, match="coef that is known, found one that is traced"):
            jax.jit(lambda c, f=function: jnp.zeros(()) if f(c) is None else 0)(jnp.ones((2, 2)))


# -- Privatizers ------------------------------------------------------------------------------


needs_cpp = pytest.mark.skipif(bool(_ffi.unavailable()), reason=f"{_ffi.unavailable()}")
each = pytest.mark.parametrize("implementation", [pytest.param("cpp", marks=needs_cpp), "jax"])


@each
def test_noise_has_the_covariance_of_the_mechanism(implementation):
    """C x is white, of the variance of a rounded normal and of what the quotient adds."""
    grads = jnp.zeros(20_000, jnp.int32)
    outs, _ = run(privatizer(stddev=50.0, implementation=implementation), grads, 8)
    x, coef = np.stack(outs).astype(np.float64), np.asarray(COEF, np.float64)
    u = np.stack([sum(c * x[t - lag] for lag, c in enumerate(coef) if lag <= t) for t in range(8)])
    covariance = np.cov(u)
    np.testing.assert_allclose(covariance, 2500 * np.eye(8), atol=2500 * 6 / np.sqrt(20_000))
    assert abs(u.mean()) < 50 * 5 / np.sqrt(u.size)


@needs_cpp
@pytest.mark.slow
@pytest.mark.parametrize("stddev", [0.4, 1.0, 3.0])
def test_the_law_of_a_hundred_million_samples(stddev):
    """Chi-square against the exact probabilities of rounded normals."""
    size, steps = 10_000_000, 10
    p = privatizer(streaming_matrix.identity(), stddev=stddev, implementation="cpp")
    zeros, cut = jnp.zeros(size, jnp.int32), int(5 * stddev)
    state, update = p.init(zeros), jax.jit(p.update, donate_argnums=1)
    found = np.zeros(2 * cut + 3, np.int64)
    for _ in range(steps):
        out, state = update(zeros, state)
        inside = np.clip(np.asarray(out), -cut - 1, cut + 1) + cut + 1
        found += np.bincount(inside, minlength=found.size)
    edges = (np.arange(-cut - 1, cut + 1) + 0.5) / stddev
    below = np.array([float(mpmath.ncdf(x)) for x in edges])
    law = np.diff(np.concatenate([[0.0], below, [1.0]]))
    expected = size * steps * law
    statistic = (np.square(found - expected) / expected).sum()
    degrees = law.size - 1
    assert abs(statistic - degrees) < 5 * np.sqrt(2 * degrees)


def test_low_order_bits_tell_nothing():
    """Every integer comes out, and the last bits are uniform, however large the noise is."""
    zeros, identity = jnp.zeros(2**20, jnp.int32), streaming_matrix.identity()
    (few,), _ = run(privatizer(identity, stddev=30.0), zeros, 1)
    assert set(range(-90, 91)) <= set(few.tolist())
    (noise,), _ = run(privatizer(identity, stddev=2.0**20), zeros, 1)
    for part in (noise, noise[np.abs(noise) < 2**18], noise[np.abs(noise) > 2**21]):
        found = np.bincount(part % 64, minlength=64)
        expected = part.size / 64
        statistic = np.square(found - expected).sum() / expected
        assert abs(statistic - 63) < 5 * np.sqrt(2 * 63)


@functools.cache  # it takes long to compile
def update_in_jax():
    return jax.jit(privatizer(implementation="jax").update)


@functools.cache
def run_in_jax():
    return run(privatizer(implementation="jax"), MODEL, 10, update=update_in_jax())


@needs_cpp
@pytest.mark.parametrize("donate", [(), (1,), (0, 1)])
def test_implementations_agree_donated_or_not(donate):
    expected, state = run_in_jax()
    grads = jax.tree.map(jnp.copy, MODEL)
    update = jax.jit(privatizer(implementation="cpp").update, donate_argnums=donate)
    kept = privatizer().init(grads)
    for want in expected:
        fresh = jax.tree.map(jnp.copy, grads)
        out, kept = update(fresh, kept)
        assert_same(out, want)
    assert_same(kept, state)


@needs_cpp
def test_a_state_goes_on_in_the_other_implementation():
    expected, _ = run(privatizer(implementation="cpp"), MODEL, 9)
    first, state = run(privatizer(implementation="jax"), MODEL, 5, update=update_in_jax())
    restored = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), state)
    second, _ = run(privatizer(implementation="cpp"), MODEL, 4, restored)
    assert_same([*first, *second], expected)


@pytest.mark.each_value
@each
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=["explicit", "automatic"])
def test_meshes_give_the_same_integers(eight_devices, implementation, kind):
    model = {
        "rows": jnp.zeros((16, 700), jnp.int32),
        "thin": jnp.zeros((1000, 8), jnp.int32),
        "odd": jnp.zeros((7, 5), jnp.int32),
    }
    layouts = {"rows": P("x"), "thin": P(None, "x"), "odd": P()}
    steps = 6
    if implementation == "jax":
        model = {"rows": model["rows"]}
    expected, _ = run(privatizer(implementation=implementation), model, steps)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    spread = {k: jax.device_put(x, NamedSharding(mesh, layouts[k])) for k, x in model.items()}
    actual, state = run(privatizer(implementation=implementation), spread, steps)
    assert_same(actual, expected)
    assert state.inner["rows"].sharding.is_equivalent_to(
        NamedSharding(mesh, P(None, "x")), state.inner["rows"].ndim
    )


def test_rings_are_as_large_as_those_of_floats():
    state = privatizer().init(MODEL)
    assert {x.dtype for x in jax.tree.leaves(state.inner)} == {jnp.dtype(jnp.int32)}
    assert state.inner["w"].shape == (4, 9, 700)
    assert privatizer(streaming_matrix.identity()).init(MODEL).inner == ()


@each
@pytest.mark.slow
def test_x64_mode_changes_nothing(implementation):
    model = ONE_LEAF if implementation == "jax" else MODEL
    expected, _ = run(privatizer(implementation=implementation), model, 6)
    with jax.enable_x64(True):
        actual, _ = run(privatizer(implementation=implementation), model, 6)
        wide = jax.tree.map(lambda x: x.astype(jnp.int64), model)
        in_64_bits, state = run(privatizer(implementation=implementation), wide, 6)
    assert_same(actual, expected)
    assert_same(in_64_bits, expected)
    assert state.inner["w"].dtype == jnp.int32


def test_gradients_are_added_in_integers():
    noise, _ = run(privatizer(), MODEL, 3)
    grads = jax.tree.map(lambda x: x + 12345, MODEL)
    noisy, _ = run(privatizer(), grads, 3)
    assert_same(noisy, jax.tree.map(lambda x: x + 12345, noise))


@each
@pytest.mark.slow
def test_scan_and_vmap_over_keys(implementation):
    def steps(key):
        p = grid.privatizer(BANDED, stddev=30.0, prng_key=key, implementation=implementation)
        grads = {"w": jnp.zeros(300, jnp.int32)}

        def body(state, _):
            out, state = p.update(grads, state)
            return state, out

        return jax.lax.scan(body, p.init(grads), length=5)[1]

    keys = jax.random.split(KEY, 3)
    mapped = jax.jit(jax.vmap(steps))(keys)
    for i in range(3):
        assert_same(jax.tree.map(lambda x, i=i: x[i], mapped), jax.jit(steps)(keys[i]))


def test_banded_by_row_and_its_end():
    strategy = banded.ColumnNormalizedBanded.default(6, 3)
    dense = np.asarray(strategy.materialize(), np.float64)
    rows = np.stack([[dense[t, t - lag] if lag <= t else 0 for lag in range(3)] for t in range(6)])
    rounded = np.asarray(grid.round_coefs(rows, 10))
    strategy = grid.inverse_as_streaming_matrix(rounded)
    p = privatizer(strategy, stddev=100.0)
    outs, state = run(p, {"w": jnp.zeros(2000, jnp.int32)}, 6)
    x = np.stack([out["w"] for out in outs]).astype(np.float64)
    u = np.stack(
        [sum(rounded[t, lag] * x[t - lag] for lag in range(3) if lag <= t) for t in range(6)]
    )
    np.testing.assert_allclose(u.std(axis=1), 100, rtol=0.1)
    np.testing.assert_allclose(
        np.asarray(strategy @ jnp.eye(6)), np.linalg.inv(as_dense(rounded)), atol=1e-5
    )
    with pytest.raises(
        ValueError, match="at most 6 steps, the rows of noising_matrix, found step 6"
    ):
        p.update({"w": jnp.zeros(2000, jnp.int32)}, state)
    hidden, _ = jax.jit(p.update)({"w": jnp.zeros(2000, jnp.int32)}, state)
    assert (np.asarray(hidden["w"]) == np.iinfo(np.int32).min).all()
    assert np.isnan(grid.to_float(hidden, 1.0, 100)["w"]).all()


def as_dense(rows):
    n, b = rows.shape
    return np.array([[rows[t, t - j] if 0 <= t - j < b else 0 for j in range(n)] for t in range(n)])


BANDED_INVERSE = np.array([1.0, -0.37, 0.11, 1 / 3])
DENSE = np.tril(np.random.default_rng(0).normal(size=(8, 8))) * (np.arange(8) % 3 != 1)


@pytest.mark.parametrize(
    ("implementation", "slots"),
    [pytest.param("cpp", slots, marks=needs_cpp) for slots in (0, 1, 3)] + [("jax", 3)],
)
def test_banded_inverses(implementation, slots):
    with jax.enable_x64(True):
        matrix = toeplitz.noising_coef_as_streaming_matrix(
            jnp.asarray(BANDED_INVERSE), look_ahead=slots
        )
        check_sums(privatizer(matrix, implementation=implementation), toeplitz_rows(8))


@each
def test_dense_rows(implementation):
    p = privatizer(DENSE, implementation=implementation)
    grads, state = check_sums(p, DENSE)
    with pytest.raises(ValueError, match="at most 8 steps, the rows of noising_matrix"):
        p.update(grads, state)


def toeplitz_rows(n):
    padded = np.append(BANDED_INVERSE, np.zeros(n))
    return np.array([[padded[t - j] if t >= j else 0 for j in range(n)] for t in range(n)])


def check_sums(p, rows):
    """The covariance over time; gives the gradients back, and the state after all steps."""
    grads = {"w": jnp.zeros(20_000, jnp.int32)}
    outs, state = run(p, grads, 8)
    x = np.stack([out["w"] for out in outs]).astype(np.float64)
    expected = 1e6 * rows @ rows.T
    np.testing.assert_allclose(np.cov(x), expected, atol=6 * expected.max() / np.sqrt(20_000))
    return grads, state


@pytest.mark.each_value
@needs_cpp
@pytest.mark.parametrize("slots", [None, 3])
@pytest.mark.parametrize("stddev", [3.0, 2.0**38])
@pytest.mark.slow
def test_sums_agree_and_most_of_them_settle_later(slots, stddev):
    """At the larger stddev, one sum in a few takes all bits of its samples."""
    with jax.enable_x64(True):
        if slots is None:
            matrix = DENSE
        else:
            matrix = toeplitz.noising_coef_as_streaming_matrix(
                jnp.asarray(BANDED_INVERSE), look_ahead=slots
            )
        model = {"a": jnp.zeros((3, 500), jnp.int64), "b": jnp.zeros((), jnp.int64)}
        outs, states = zip(
            *(
                run(privatizer(matrix, stddev=stddev, implementation=name), model, 8)
                for name in ("cpp", "jax")
            ),
            strict=True,
        )
    assert_same(*outs)
    assert_same(*states)


@each
@pytest.mark.parametrize("power", [-900, 60, 150, 900])
def test_factors_of_any_size_give_the_noise_of_their_product(implementation, power):
    """Many of these sums draw bits; C^-1 and stddev are far from 1, in either direction."""
    with jax.enable_x64(True):
        grads = jnp.zeros(200, jnp.int64)
        rows = np.array([[0.7, 0.0, -1 / 3]])
        expected, _ = run(privatizer(rows, stddev=2.0**41), grads, 1)
        p = privatizer(
            np.ldexp(rows, power), stddev=2.0 ** (41 - power), implementation=implementation
        )
        actual, _ = run(p, grads, 1)
    assert_same(actual, expected)


def test_sums_are_rounded_correctly():
    """Against mpmath, by the bits of their samples."""
    with jax.enable_x64(True):
        stddev, row = 2.0**38, [0.7, 0.0, -1 / 3]
        p = privatizer(np.array([row]), stddev=stddev)
        grads = jnp.zeros(300, jnp.int64)
        state = p.init(grads)
        (out,), _ = run(p, grads, 1, state)
        keys = [jax.random.split(jax.random.fold_in(KEY, j), 1)[0] for j in range(3)]
        uniform = [uniforms(jax.random.key_data(key), 300) for key in keys]
    with mpmath.workprec(240):
        for i, x in enumerate(out.tolist()):
            z = [
                sign * mpmath.sqrt(2) * mpmath.erfinv(1 - v) for sign, v in (u[i] for u in uniform)
            ]
            total = sum(mpmath.mpf(w) * s for w, s in zip(row, z, strict=True)) * stddev
            assert x == int(mpmath.floor(total + mpmath.mpf(1) / 2))


def uniforms(key, size):
    """Sign and V of the samples of a leaf, by the plain layout of bits."""
    bits = np.asarray(_chacha20.bits(key, Domain.GRID, 64, size)).tolist()
    number = jnp.zeros(size, jnp.uint32), jnp.arange(size, dtype=jnp.uint32)
    words = np.stack(_chacha20.blocks(key, Domain.GRID_EXTENSION, number)[:4], axis=1).tolist()
    with mpmath.workprec(240):
        return [
            (
                -1 if b & 1 else 1,
                mpmath.mpf((b >> 1) * 2**129 + sum(w << 97 - 32 * k for k, w in enumerate(ws)) + 1)
                / mpmath.mpf(2) ** 192,
            )
            for b, ws in zip(bits, words, strict=True)
        ]


def test_without_a_key_every_state_begins_elsewhere():
    p = privatizer(prng_key=None)
    keys = [np.asarray(p.init(MODEL).clock.keys) for _ in range(2)]
    assert (keys[0] != keys[1]).any()
    assert keys[0].shape[-1] == 8


def test_repr_tells_the_stream_and_no_key():
    shown = repr(privatizer())
    assert shown.startswith("grid.privatizer(<inverse of a banded Toeplitz strategy, b = 5>, ")
    assert shown.endswith("noise stream chacha20)")
    secrets = np.asarray(jax.random.key_data(KEY)).tolist()
    for text in (shown, repr(privatizer().init(MODEL))):
        assert not any(str(word) in text for word in secrets)


def test_it_chains_with_optax():
    grads = jax.tree.map(lambda x: x + 5, MODEL)
    to_float = optax.stateless(lambda g, _: grid.to_float(g, 1.0, 1000))
    chain = optax.chain(privatizer(), to_float, optax.sgd(0.1))
    updates, _ = chain.update(grads, chain.init(MODEL))
    assert updates["w"].dtype == jnp.float32


# -- What is refused --------------------------------------------------------------------------


BLT = buffered_toeplitz.BufferedToeplitz.build([0.9], [0.3], dtype=jnp.float32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"noising_matrix": BLT.inverse_as_streaming_matrix()}, NotImplementedError, "a BLT has"),
        ({"noising_matrix": np.ones(3)}, ValueError, r"2-D and not empty, found shape \(3,\)"),
        ({"noising_matrix": np.full((2, 2), np.nan)}, ValueError, "finite, found NaN"),
        ({"noising_matrix": np.ones((2, 2)) * 1j}, TypeError, "real, found dtype complex"),
        ({"noising_matrix": np.ones((2, 2), bool)}, TypeError, "real, found dtype bool"),
        ({"noising_matrix": np.array([["a"]])}, TypeError, "real, found dtype <U1"),
        ({"noising_matrix": np.eye(3) * 1e12}, ValueError, r"between 1/8 and 2\^42"),
        (
            {"noising_matrix": streaming_matrix.prefix_sum()},
            NotImplementedError,
            "has no exact noise, as it is not",
        ),
        ({"noising_matrix": None}, TypeError, "to be an array or a StreamingMatrix, found None"),
        (
            {"noising_matrix": toeplitz.inverse_as_streaming_matrix(jnp.array([1.0, 0.3]))},
            ValueError,
            r"multiples of 2\^-20, found 0.30.*grid.round_coefs",
        ),
        (
            {
                "noising_matrix": banded.ColumnNormalizedBanded.default(
                    6, 3
                ).inverse_as_streaming_matrix()
            },
            ValueError,
            "grid.round_coefs",
        ),
        (
            {"noising_matrix": toeplitz.inverse_as_streaming_matrix(jnp.array([1.0, -1.0]))},
            ValueError,
            "noise would grow without bound",
        ),
        (
            {"noising_matrix": toeplitz.inverse_as_streaming_matrix(jnp.array([1.0, 2.0]))},
            ValueError,
            "noise would grow without bound",
        ),
        ({"stddev": 0.0}, ValueError, "stddev to be positive and finite, found stddev=0.0"),
        ({"stddev": -1.0}, ValueError, "stddev"),
        ({"stddev": np.nan}, ValueError, "stddev"),
        ({"stddev": np.inf}, ValueError, "stddev"),
        ({"stddev": "1"}, TypeError, "stddev"),
        ({"stddev": np.complex64(1)}, TypeError, "stddev"),
        ({"stddev": np.array(True)}, TypeError, "stddev"),
        ({"stddev": 1e308}, ValueError, r"between 1/8 and 2\^42, found inf"),
        ({"implementation": "fast"}, ValueError, "implementation to be None or one of"),
        ({"stddev": 1e-4}, ValueError, r"between 1/8 and 2\^42, found 0.0128"),
        ({"stddev": 2.0**40}, ValueError, r"between 1/8 and 2\^42"),
        ({"prng_key": 3}, TypeError, "key of type random.chacha20.*found a int"),
        ({"prng_key": jax.random.key(3)}, TypeError, "chacha20.*found threefry2x32|fry"),
        ({"prng_key": jax.random.PRNGKey(3)}, TypeError, "chacha20"),
        ({"prng_key": jax.random.split(KEY)}, ValueError, r"one key, found keys of shape \(2,\)"),
    ],
)
def test_what_a_privatizer_refuses(change, error, message):
    arguments = {"noising_matrix": BANDED, "stddev": 1000.0, "prng_key": KEY, **change}
    with pytest.raises(error, match=message):
        grid.privatizer(**arguments)


def test_a_traced_stddev_and_traced_coefficients_are_refused():
    with pytest.raises(TypeError, match="stddev that is known, found one that is traced"):
        jax.jit(lambda s: privatizer(stddev=s).init(MODEL))(1000.0)
    with pytest.raises(ValueError, match="coefficients of noising_matrix outside of traces"):
        jax.jit(lambda c: privatizer(toeplitz.inverse_as_streaming_matrix(c)).init(MODEL))(COEF)
    with pytest.raises(ValueError, match="prng_key inside a trace, found None"):
        jax.jit(lambda: privatizer(prng_key=None).init(MODEL))()


def test_leaves_that_are_refused():
    floats = {"w": jnp.zeros(3)}
    with pytest.raises(TypeError, match=r"leaf .*w.* int32 or int64.*found float32"):
        privatizer().init(floats)
    state = privatizer().init({"w": jnp.zeros(3, jnp.int32)})
    with pytest.raises(TypeError, match="int32 or int64"):
        privatizer().update(floats, state)
    with pytest.raises(TypeError, match="found int16"):
        privatizer().init({"w": jnp.zeros(3, jnp.int16)})


@pytest.mark.parametrize("leaf", [np.zeros(3, np.int64), jax.ShapeDtypeStruct((3,), np.int64)])
@pytest.mark.parametrize("matrix", [streaming_matrix.identity(), BANDED, np.eye(3)])
@pytest.mark.parametrize("stddev", [100.0, 2.0**33])
def test_64_bits_outside_of_the_64_bit_mode_are_refused(leaf, matrix, stddev):
    """JAX would cut them down to 32, and noise that does not fit there with them."""
    p = privatizer(matrix, stddev=stddev)
    with pytest.raises(TypeError, match=r"int32 outside of JAX's 64-bit mode.*found int64"):
        p.init({"w": leaf})
    with jax.enable_x64(True):
        state = p.init({"w": leaf})
    with pytest.raises(TypeError, match=r"int32 outside of JAX's 64-bit mode.*found int64"):
        p.update({"w": np.zeros(3, np.int64)}, state)


def test_noise_that_does_not_fit_is_refused():
    large = privatizer(stddev=2.0**28)
    with pytest.raises(ValueError, match=r"fits into the int32 of leaf .*int64 .in x64 mode"):
        large.init(MODEL)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.int64), MODEL)
        assert large.init(wide).inner["w"].dtype == jnp.int64
    growing = grid.inverse_as_streaming_matrix(np.tile([1.0, -2.0], (60, 1)))
    with pytest.raises(ValueError, match=r"sums below 2\^61"):
        privatizer(growing)


def test_states_of_others_are_refused():
    grads = {"w": jnp.zeros(300, jnp.int32)}
    state = privatizer().init(grads)
    with pytest.raises(ValueError, match="another stddev"):
        privatizer(stddev=999.0).update(grads, state)
    with pytest.raises(ValueError, match="noise_state"):
        privatizer(streaming_matrix.identity()).update(grads, state)
    with pytest.raises(ValueError, match="noise_state"):
        privatizer().update({"w": jnp.zeros(301, jnp.int32)}, state)
    floating = noise_addition.matrix_factorization_privatizer(BANDED, stddev=1000.0, prng_key=KEY)
    with pytest.raises(ValueError, match="noise_state"):
        privatizer().update(grads, floating.init({"w": jnp.zeros(300)}))
    hidden, _ = jax.jit(privatizer(stddev=999.0).update)(grads, state)
    assert (np.asarray(hidden["w"]) == np.iinfo(np.int32).min).all()


def test_one_key_for_several_gradients_is_refused():
    p, grads = privatizer(), {"w": jnp.zeros((2, 300), jnp.int32)}
    state = p.init({"w": jnp.zeros(300, jnp.int32)})
    with pytest.raises(ValueError, match="vmap"):
        jax.vmap(p.update, in_axes=(0, None))(grads, state)


@pytest.mark.parametrize("place", [0, 31])
def test_keys_that_differ_in_any_word_are_different(place):
    """Dense rows keep the key that was given, whose words may be alike but for one."""
    data = bytes(32), bytes(i == place for i in range(32))
    keys = jnp.stack([random.secure_key(x) for x in data])
    grads = {"w": jnp.zeros((2, 5), jnp.int32)}

    def noise(key, grad):
        p = privatizer(np.eye(3), prng_key=key)
        return p.update(grad, p.init(grad))[0]

    mapped = jax.vmap(noise)(keys, grads)["w"]
    for i in range(2):
        assert_same(mapped[i], noise(keys[i], {"w": grads["w"][i]})["w"])
    same = jax.vmap(noise)(keys[jnp.array([1, 1])], grads)["w"]
    assert (np.asarray(same) == np.iinfo(np.int32).min).all()


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="triton"):
        run(privatizer(implementation="triton"), MODEL, 1)
