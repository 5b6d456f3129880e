from __future__ import annotations

import inspect
import itertools
import warnings
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_privacy_kernels.matrix_factorization import toeplitz


def dense(coef, n):
    return sum(c * np.eye(n, k=-lag) for lag, c in enumerate(np.asarray(coef, np.float64)))


def unit_columns(C):
    return C / np.linalg.norm(C, axis=0)


def patterns(n, min_sep, max_participations):
    """All sets of rounds that a user may take part in."""
    for chosen in itertools.product([False, True], repeat=n):
        rounds = np.flatnonzero(chosen)
        if np.all(np.diff(rounds) >= min_sep) and len(rounds) <= (max_participations or n):
            yield rounds


def brute_force_sensitivity_squared(C, min_sep, max_participations):
    """For a non-negative C, where contributions of one sign are the worst."""
    return max(
        np.sum(C[:, rounds].sum(axis=1) ** 2)
        for rounds in patterns(len(C), min_sep, max_participations)
    )


def numeric_gradient(f, x, step=1e-6):
    x = np.asarray(x, np.float64)
    return [(f(x + e) - f(x - e)) / (2 * step) for e in step * np.eye(len(x))]


@pytest.fixture(scope="module")
def reference():
    return pytest.importorskip("jax_privacy.matrix_factorization.toeplitz")


coefs = st.lists(st.floats(-0.5, 0.5, width=32), max_size=4).map(lambda tail: [1.0, *tail])


# -- Coefficients -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "expected"), [(None, [3, 2, 1]), (5, [3, 2, 1, 0, 0]), (3, [3, 2, 1]), (1, [3])]
)
@pytest.mark.parametrize("kind", [list, np.array, jnp.array, lambda c: np.array(c, np.float32)])
def test_pad_coefs(reference, kind, n, expected):
    actual = toeplitz.pad_coefs_to_n(kind([3, 2, 1]), n)
    np.testing.assert_array_equal(actual, expected)
    assert actual.dtype == jnp.float32
    np.testing.assert_array_equal(actual, reference.pad_coefs_to_n(jnp.array([3, 2, 1]), n))


def test_pad_coefs_never_narrows():
    assert toeplitz.pad_coefs_to_n(jnp.ones(2, jnp.bfloat16), 3).dtype == jnp.float32
    with jax.enable_x64(True):
        third = np.array([1 / 3])
        assert toeplitz.pad_coefs_to_n(third, 2)[0] == 1 / 3
        assert toeplitz.pad_coefs_to_n(jnp.ones(1, jnp.float32), 2).dtype == jnp.float64


def exact_strategy_coefs(n):
    result = [Fraction(1)]
    for k in range(1, n):
        result.append(result[-1] * Fraction(2 * k - 1, 2 * k))
    return result


def test_optimal_coefs_are_exact():
    strategy = exact_strategy_coefs(200)
    noising = [Fraction(1), *(b - a for a, b in itertools.pairwise(strategy))]
    for dtype, x64 in ((np.float32, False), (np.float64, True)):
        with jax.enable_x64(x64):
            for actual, expected in (
                (toeplitz.optimal_max_error_strategy_coefs(200), strategy),
                (toeplitz.optimal_max_error_noising_coefs(200), noising),
            ):
                assert actual.dtype == dtype
                np.testing.assert_allclose(
                    actual,
                    [float(f) for f in expected],
                    rtol=40 * np.finfo(np.float64).eps if x64 else np.finfo(np.float32).eps / 2,
                )


def test_optimal_coefs_keep_their_digits_at_large_n():
    n = 10**5
    k = np.arange(1.0, n)
    # Stirling's series of binom(2k, k) / 4^k; the next term is below 1 / k^5.
    series = 1 - 1 / (8 * k) + 1 / (128 * k**2) + 5 / (1024 * k**3) - 21 / (32768 * k**4)
    strategy = series / np.sqrt(np.pi * k)
    tail = slice(1000, None)
    actual = toeplitz.optimal_max_error_strategy_coefs(n)[1:]
    np.testing.assert_allclose(actual[tail], strategy[tail], rtol=1e-7)
    actual = toeplitz.optimal_max_error_noising_coefs(n)[1:]
    np.testing.assert_allclose(actual[tail], (-strategy / (2 * k - 1))[tail], rtol=1e-7)


def test_optimal_coefs_agree_with_reference(reference):
    for n in (1, 2, 30):
        for name in ("optimal_max_error_strategy_coefs", "optimal_max_error_noising_coefs"):
            actual, expected = getattr(toeplitz, name)(n), getattr(reference, name)(n)
            assert actual.shape == (n,)
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)


def test_optimal_strategy_is_the_square_root_of_prefix_sums():
    with jax.enable_x64(True):
        C = dense(toeplitz.optimal_max_error_strategy_coefs(50), 50)
        Cinv = dense(toeplitz.optimal_max_error_noising_coefs(50), 50)
    np.testing.assert_allclose(C @ C, np.tril(np.ones((50, 50))), atol=1e-13)
    np.testing.assert_allclose(C @ Cinv, np.eye(50), atol=1e-13)


def test_optimal_coefs_inside_jit():
    actual = jax.jit(lambda: toeplitz.optimal_max_error_strategy_coefs(3))()
    np.testing.assert_array_equal(actual, [1, 0.5, 0.375])


# -- Matrices ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [None, 1, 2, 3, 7])
def test_materialize(reference, n):
    coef = jnp.array([1.0, -0.5, 0.25])
    actual = toeplitz.materialize_lower_triangular(coef, n)
    np.testing.assert_array_equal(actual, dense(coef, n or 3))
    np.testing.assert_array_equal(actual, reference.materialize_lower_triangular(coef, n))
    assert actual.dtype == jnp.float32


def test_materialize_gradient_jit_and_vmap():
    weight = jnp.arange(16.0).reshape(4, 4)

    def f(coef):
        return jnp.vdot(weight, toeplitz.materialize_lower_triangular(coef, 4))

    coef = jnp.array([1.0, 2.0])
    expected = [np.trace(weight, offset=-lag) for lag in range(2)]
    np.testing.assert_array_equal(jax.grad(f)(coef), expected)
    np.testing.assert_array_equal(jax.jit(f)(coef), f(coef))
    np.testing.assert_array_equal(jax.vmap(f)(jnp.stack([coef, 2 * coef])), [f(coef), 2 * f(coef)])


@settings(deadline=None, max_examples=30)
@given(coef=coefs, n=st.sampled_from([1, 3, 8]), normalize=st.booleans())
def test_inverse_is_the_dense_inverse(coef, n, normalize):
    coef = np.asarray(coef) / np.linalg.norm(coef[: n if normalize else None])
    C = dense(coef, n)
    with jax.enable_x64(True):
        Cinv = toeplitz.inverse_as_streaming_matrix(coef, n if normalize else None)
        expected = np.linalg.inv(unit_columns(C) if normalize else C)
        np.testing.assert_allclose(Cinv.materialize(n), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n", [None, 3, 4, 10])
@pytest.mark.parametrize("bands", [1, 2, 4])
def test_inverse_agrees_with_reference(reference, bands, n):
    coef = toeplitz.optimal_max_error_strategy_coefs(bands)
    coef = coef / jnp.linalg.norm(coef[:n])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(12, 3)), jnp.float32)
    actual = toeplitz.inverse_as_streaming_matrix(coef, n) @ x
    expected = reference.inverse_as_streaming_matrix(coef[:n], n) @ x
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_inverse_state_is_the_history_newest_first():
    Cinv = toeplitz.inverse_as_streaming_matrix([1.0, 0.5, 0.25])
    state = Cinv.init_multiply(jnp.zeros(2))
    np.testing.assert_array_equal(state, np.zeros((2, 2)))
    first, state = Cinv.multiply_next(jnp.ones(2), state)
    second, state = Cinv.multiply_next(jnp.ones(2), state)
    np.testing.assert_array_equal(state, [second, first])


@pytest.mark.parametrize(
    ("coef_dtype", "value_dtype", "expected"),
    [
        ("float32", "bfloat16", "float32"),
        ("bfloat16", "float32", "float32"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("int32", "float32", "float32"),
        ("float32", "int32", "float32"),
    ],
)
@pytest.mark.parametrize("bands", [1, 3])
def test_inverse_dtypes(coef_dtype, value_dtype, expected, bands):
    Cinv = toeplitz.inverse_as_streaming_matrix(jnp.ones(bands, coef_dtype))
    x = jnp.ones((4, 2), value_dtype)
    assert Cinv.init_multiply(x[0]).dtype == expected
    assert Cinv.init_multiply(x[0]).shape == (bands - 1, 2)
    assert (Cinv @ x).dtype == expected


def test_inverse_keeps_the_dtype_of_coef_under_x64():
    with jax.enable_x64(True):
        Cinv = toeplitz.inverse_as_streaming_matrix(jnp.ones(2, jnp.float32))
        assert Cinv.structure.coef.dtype == jnp.float32
        assert (Cinv @ jnp.ones(3, jnp.float32)).dtype == jnp.float32


def test_inverse_structure():
    coef = np.array([0.8, 0.6])
    plain = toeplitz.inverse_as_streaming_matrix(coef).structure
    np.testing.assert_allclose(plain.coef, coef, rtol=1e-7)
    assert plain.row_scale is None
    normalized = toeplitz.inverse_as_streaming_matrix(coef, 4).structure
    np.testing.assert_allclose(normalized.coef, coef, rtol=1e-7)
    np.testing.assert_allclose(normalized.row_scale, [1, 1, 1, 0.8], rtol=1e-7)


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-6), ("bfloat16", 2**-8)])
def test_column_norms_are_accurate(dtype, rtol):
    coef = toeplitz.optimal_max_error_strategy_coefs(3000)
    coef = (coef / jnp.linalg.norm(coef.astype(dtype))).astype(dtype)
    row_scale = toeplitz.inverse_as_streaming_matrix(coef, 4000).structure.row_scale
    assert row_scale.dtype == dtype
    expected = np.sqrt(np.cumsum(np.pad(np.asarray(coef, np.float64), (0, 1000)) ** 2))[::-1]
    np.testing.assert_allclose(np.asarray(row_scale, np.float64), expected, rtol=rtol)


def test_normalized_strategy_drops_coefficients_beyond_n():
    Cinv = toeplitz.inverse_as_streaming_matrix([0.8, 0.6, 100.0], 2)
    np.testing.assert_allclose(Cinv.structure.coef, [0.8, 0.6], rtol=1e-7)
    expected = np.linalg.inv(unit_columns(dense([0.8, 0.6], 2)))
    np.testing.assert_allclose(Cinv.materialize(2), expected, rtol=1e-6)


@pytest.mark.parametrize(("coef", "n"), [([2.0], 5), ([1.0, 0.1], 5), ([0.8, 0.6], 1)])
def test_normalizing_other_norms_warns(coef, n):
    with pytest.warns(UserWarning, match="unit columns") as caught:
        toeplitz.inverse_as_streaming_matrix(coef, n)
    assert f"{np.linalg.norm(coef[:n]):.6g}" in str(caught[0].message)
    assert caught[0].filename == __file__


def test_no_warning_without_reason():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        toeplitz.inverse_as_streaming_matrix([2.0])
        toeplitz.inverse_as_streaming_matrix([0.8, 0.6], 5)
        toeplitz.inverse_as_streaming_matrix([0.8, 0.6, 100.0], 2)
        toeplitz.inverse_as_streaming_matrix(jnp.array([0.8, 0.6], jnp.bfloat16), 5)
        jax.jit(lambda c: toeplitz.inverse_as_streaming_matrix(c, 5) @ jnp.ones(5))(jnp.ones(2))


def test_inverse_gradient():
    g = np.array([1.0, -2.0, 3.0, 0.5, 1.0])

    def f(coef, n):
        return jnp.vdot(g, toeplitz.inverse_as_streaming_matrix(coef, n) @ jnp.arange(1.0, 6.0))

    coef = np.array([0.8, 0.5, 0.33166247903554])
    with jax.enable_x64(True):
        for n in (None, 5):
            numeric = numeric_gradient(lambda c, n=n: f(c, n), coef)
            np.testing.assert_allclose(jax.grad(f)(coef, n), numeric, rtol=1e-6)


def test_inverse_maps_over_coefficients():
    coef = jnp.array([[1.0, 0.5], [2.0, -1.0]])
    actual = jax.vmap(lambda c: toeplitz.inverse_as_streaming_matrix(c).materialize(3))(coef)
    for row, c in zip(actual, coef, strict=True):
        np.testing.assert_allclose(row, np.linalg.inv(dense(c, 3)), rtol=1e-6)


# -- Sensitivity ------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [None, 1, 2, 10])
def test_single_participation(reference, n):
    coef = jnp.array([1.0, -0.5, 0.25])
    actual = toeplitz.sensitivity_squared(coef, n)
    np.testing.assert_allclose(actual, (dense(coef, n or 3) ** 2).sum(axis=0).max(), rtol=1e-6)
    np.testing.assert_allclose(actual, reference.sensitivity_squared(coef, n), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(toeplitz.sensitivity_squared)(coef), 2 * coef, rtol=1e-6)


def test_half_precision_coefficients_are_squared_in_single():
    coef = jnp.full(1000, 0.1, jnp.bfloat16)
    expected = 1000 * float(coef[0]) ** 2
    for actual in (
        toeplitz.sensitivity_squared(coef),
        toeplitz.minsep_sensitivity_squared(coef, 1, n=1000, max_participations=1),
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
@pytest.mark.parametrize("max_participations", [None, 1, 2, 3, 20])
def test_minsep_sensitivity_by_brute_force(n, max_participations):
    rng = np.random.default_rng(n)
    for bands, min_sep in itertools.product([1, 2, 5, 12], [1, 2, 3, 7, 10]):
        coef = np.sort(rng.uniform(size=bands))[::-1]
        expected = brute_force_sensitivity_squared(dense(coef, n), min_sep, max_participations)
        with jax.enable_x64(True):
            actual = toeplitz.minsep_sensitivity_squared(
                coef, min_sep, n=n, max_participations=max_participations
            )
        np.testing.assert_allclose(actual, expected, rtol=1e-12)


@settings(deadline=None, max_examples=40)
@given(
    coef=st.lists(st.floats(-2, 2), min_size=1, max_size=8),
    min_sep=st.sampled_from([1, 2, 3]),
    k=st.sampled_from([None, 2]),
)
def test_minsep_sensitivity_bounds_other_coefficients(coef, min_sep, k):
    n = 6
    magnitudes = np.abs(coef)
    majorant = np.maximum.accumulate(magnitudes[:n][::-1])[::-1]
    with jax.enable_x64(True):
        actual = toeplitz.minsep_sensitivity_squared(coef, min_sep, n=n, max_participations=k)
    attained = brute_force_sensitivity_squared(dense(magnitudes, n), min_sep, k)
    assert float(actual) >= attained * (1 - 1e-12)
    projected = brute_force_sensitivity_squared(dense(majorant, n), min_sep, k)
    np.testing.assert_allclose(actual, projected, rtol=1e-12)


@pytest.mark.parametrize("max_participations", [None, 1, 3, 1000])
@pytest.mark.parametrize("min_sep", [1, 7, 100, 150])
def test_minsep_sensitivity_agrees_with_reference(reference, min_sep, max_participations):
    coef = toeplitz.optimal_max_error_strategy_coefs(60)
    arguments = {"min_sep": min_sep, "n": 100, "max_participations": max_participations}
    # Releases differ in how the reference treats coefficients that are not decreasing.
    checks = inspect.signature(reference.minsep_sensitivity_squared).parameters
    skip = {"skip_checks": True} if "skip_checks" in checks else {}
    expected = reference.minsep_sensitivity_squared(coef, **arguments, **skip)
    actual = toeplitz.minsep_sensitivity_squared(coef, **arguments)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_minsep_sensitivity_does_not_cancel():
    n, min_sep, k = 40_000, 2, 3
    coef = np.linspace(1, 1e-3, n, dtype=np.float32) ** 4
    column = np.asarray(coef, np.float64)
    total = sum(np.pad(column, (i * min_sep, 0))[:n] for i in range(k))
    actual = toeplitz.minsep_sensitivity_squared(coef, min_sep, n=n, max_participations=k)
    np.testing.assert_allclose(actual, total @ total, rtol=1e-6)
    # The small entries at the end, which a difference of running sums would round away.
    gradient = jax.jit(
        jax.grad(
            lambda c: toeplitz.minsep_sensitivity_squared(c, min_sep, n=n, max_participations=k)
        )
    )(jnp.asarray(coef))
    transposed = 2 * sum(np.pad(total, (0, i * min_sep))[i * min_sep :] for i in range(k))
    np.testing.assert_allclose(gradient[-100:], transposed[-100:], rtol=1e-4)


def test_minsep_sensitivity_with_a_huge_separation_is_cheap():
    actual = toeplitz.minsep_sensitivity_squared([2.0, 1.0], 10**12, n=3)
    assert actual == 5


def test_minsep_sensitivity_gradient():
    def f(coef):
        return toeplitz.minsep_sensitivity_squared(coef, 2, n=9, max_participations=3)

    coef = np.array([1.0, 0.7, 0.5, 0.2])
    with jax.enable_x64(True):
        np.testing.assert_allclose(jax.grad(f)(coef), numeric_gradient(f, coef), rtol=1e-6)


def test_minsep_sensitivity_jit_and_vmap():
    def f(coef):
        return toeplitz.minsep_sensitivity_squared(coef, 2, n=9)

    coef = jnp.array([[1.0, 0.7, 0.5], [1.0, 0.1, 0.0]])
    expected = [f(c) for c in coef]
    np.testing.assert_allclose([jax.jit(f)(c) for c in coef], expected, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(f)(coef), expected, rtol=1e-6)


# -- Arguments --------------------------------------------------------------------------------

FUNCTIONS = {
    "pad_coefs_to_n": toeplitz.pad_coefs_to_n,
    "materialize_lower_triangular": toeplitz.materialize_lower_triangular,
    "inverse_as_streaming_matrix": lambda c, n=None: (
        toeplitz.inverse_as_streaming_matrix(c, n).structure.coef
    ),
    "sensitivity_squared": toeplitz.sensitivity_squared,
    "minsep_sensitivity_squared": lambda c, n=4: toeplitz.minsep_sensitivity_squared(c, 2, n=n),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("coef", [[], 1.0, [[1.0, 2.0]]])
def test_shapes_are_checked(name, coef):
    shape = np.shape(coef)
    with pytest.raises(ValueError, match="coef to be a non-empty 1-D array") as error:
        FUNCTIONS[name](coef)
    assert str(shape) in str(error.value)
    with pytest.raises(ValueError, match="non-empty 1-D array"):
        jax.jit(FUNCTIONS[name])(jnp.asarray(coef))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kind", [list, np.array, jnp.array])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_are_checked(name, kind, bad):
    with pytest.raises(ValueError, match=rf"finite.*, found \w*coef\[1\] = {bad}"):
        FUNCTIONS[name](kind([1.0, bad]))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_that_overflow_are_checked(name):
    """In float32 this is infinity."""
    with pytest.raises(ValueError, match="finite"):
        FUNCTIONS[name](np.array([1.0, 1e300]))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_traced_values_are_not_checked(name):
    assert not np.isfinite(np.asarray(jax.jit(FUNCTIONS[name])(jnp.array([1.0, np.nan])))).all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_concrete_values_are_checked_inside_jit(name):
    with pytest.raises(ValueError, match="finite"):
        jax.jit(lambda: FUNCTIONS[name](np.array([1.0, np.nan])))()


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("coef", [[1.0, 1j], [True, False]])
def test_types_are_checked(name, coef):
    with pytest.raises(TypeError, match="real numbers, found dtype"):
        FUNCTIONS[name](coef)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_sizes_are_checked(name):
    for n in (0, -3):
        with pytest.raises(ValueError, match=rf"n >= 1, found \w*n={n}"):
            FUNCTIONS[name]([1.0], n)
    for n in (2.0, "2"):
        with pytest.raises(TypeError, match="n to be an integer, found"):
            FUNCTIONS[name]([1.0], n)
    with pytest.raises(TypeError, match="n to be an integer, found"):
        jax.jit(FUNCTIONS[name])(jnp.ones(1), 2)


@pytest.mark.parametrize("coef", [[0.0, 1.0], np.zeros(1), [1e-60, 1.0]])
def test_inverse_needs_a_leading_coefficient(coef):
    with pytest.raises(ValueError, match=r"coef\[0\] to be nonzero, found coef\[0\] = 0"):
        toeplitz.inverse_as_streaming_matrix(coef)


@pytest.mark.parametrize(
    "function",
    [toeplitz.optimal_max_error_strategy_coefs, toeplitz.optimal_max_error_noising_coefs],
)
def test_optimal_coefs_check_n(function):
    with pytest.raises(ValueError, match="n >= 1, found n=0"):
        function(0)
    with pytest.raises(TypeError, match=r"n to be an integer, found 1\.5"):
        function(1.5)


def test_minsep_sensitivity_checks_its_limits():
    for bad in (0, -1):
        with pytest.raises(ValueError, match=f"min_sep >= 1, found min_sep={bad}"):
            toeplitz.minsep_sensitivity_squared([1.0], bad, n=3)
        with pytest.raises(ValueError, match=f"max_participations >= 1, found .*={bad}"):
            toeplitz.minsep_sensitivity_squared([1.0], 1, n=3, max_participations=bad)
    with pytest.raises(TypeError, match=r"min_sep to be an integer, found 1\.5"):
        toeplitz.minsep_sensitivity_squared([1.0], 1.5, n=3)
    with pytest.raises(TypeError, match=r"max_participations to be an integer, found 2\.0"):
        toeplitz.minsep_sensitivity_squared([1.0], 1, n=3, max_participations=2.0)
