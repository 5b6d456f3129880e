from __future__ import annotations

import functools
import inspect
import itertools
import logging
import math
import re
import warnings
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import sweeps
from support.sweeps import examples

from jax_privacy_kernels.matrix_factorization import streaming_matrix, toeplitz

# Of coefficients that are not ordered, which many tests have.
pytestmark = pytest.mark.filterwarnings("ignore:the bound on the sensitivity may be")


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


class CountsCalls:
    """A reduction that counts how often JAX traces it."""

    def __init__(self):
        self.calls = 0

    def __call__(self, errors):
        self.calls += 1
        return errors.mean()


def last(errors):
    return errors[-1]


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


@settings(max_examples=examples(30))
@given(coef=coefs, n=st.sampled_from([1, 3, 8]), normalize=st.booleans())
def test_inverse_is_the_dense_inverse(coef, n, normalize):
    coef = np.asarray(coef) / np.linalg.norm(coef[: n if normalize else None])
    C = dense(coef, n)
    with jax.enable_x64(True):
        Cinv = toeplitz.inverse_as_streaming_matrix(coef, n if normalize else None)
        expected = np.linalg.inv(unit_columns(C) if normalize else C)
        np.testing.assert_allclose(Cinv.materialize(n), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.each_value
@pytest.mark.parametrize("n", [None, 3, 4, 10])
@pytest.mark.parametrize("bands", [1, 2, 4])
def test_inverse_agrees_with_reference(reference, bands, n):
    coef = toeplitz.optimal_max_error_strategy_coefs(bands)
    coef = coef / jnp.linalg.norm(coef[:n])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(12, 3)), jnp.float32)
    actual = toeplitz.inverse_as_streaming_matrix(coef, n) @ x
    expected = np.array(reference.inverse_as_streaming_matrix(coef[:n], n) @ x)
    if n is not None:
        expected[n:] = np.nan  # the reference goes on, with too little noise for a sensitivity of 1
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
    np.testing.assert_allclose(normalized.row_scale, [1, 1, 1, 0.8, np.nan], rtol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_column_norms_are_accurate(dtype):
    coef = toeplitz.optimal_max_error_strategy_coefs(3000)
    coef = (coef / jnp.linalg.norm(coef.astype(dtype))).astype(dtype)
    row_scale = toeplitz.inverse_as_streaming_matrix(coef, 4000).structure.row_scale
    assert row_scale.dtype == jnp.float32
    expected = np.sqrt(np.cumsum(np.pad(np.asarray(coef, np.float64), (0, 1000)) ** 2))[::-1]
    np.testing.assert_allclose(np.asarray(row_scale[:-1], np.float64), expected, rtol=1e-6)
    assert np.isnan(row_scale[-1])


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

    @functools.partial(jax.jit, static_argnums=1)
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


@pytest.mark.parametrize("p", [1, 2, 5])
def test_noising_coef_as_streaming_matrix(p):
    coef = 0.2 * np.random.default_rng(p).normal(size=p) + np.eye(1, p)[0]
    Cinv = toeplitz.noising_coef_as_streaming_matrix(jnp.asarray(coef))
    np.testing.assert_allclose(Cinv.materialize(8), dense(coef, 8), rtol=1e-6)
    assert Cinv.structure.slots == p - 1
    state = Cinv.init_multiply(jnp.zeros((2, 3)))
    assert state.shape == (p - 1, 2, 3)
    with jax.enable_x64(True):
        coef = jnp.asarray(coef)
        inverse = toeplitz.noising_coef_as_streaming_matrix(coef, look_ahead=4)
        C = toeplitz.inverse_as_streaming_matrix(coef)
        np.testing.assert_allclose((inverse @ C).materialize(8), np.eye(8), atol=1e-12)
        assert inverse.structure.slots == 4


def test_noising_coef_dtypes_and_state():
    Cinv = toeplitz.noising_coef_as_streaming_matrix(jnp.ones(3, jnp.bfloat16))
    assert (Cinv @ jnp.ones((4, 2))).dtype == jnp.float32
    assert (Cinv @ jnp.ones((4, 2), jnp.bfloat16)).dtype == jnp.bfloat16
    state = Cinv.init_multiply(jnp.zeros(2))
    _, state = Cinv.multiply_next(jnp.ones(2), state)
    _, state = Cinv.multiply_next(2 * jnp.ones(2), state)
    np.testing.assert_array_equal(state, [[2, 2], [1, 1]])  # newest first


@pytest.mark.parametrize(("look_ahead", "error"), [(-1, ValueError), (1.5, TypeError)])
def test_look_ahead_that_is_none(look_ahead, error):
    with pytest.raises(error, match="look_ahead"):
        toeplitz.noising_coef_as_streaming_matrix([1.0, -0.5], look_ahead=look_ahead)


# -- Algebra ----------------------------------------------------------------------------------


@settings(max_examples=examples(30))
@given(coef=coefs, n=st.sampled_from([1, 4, 9]))
def test_inverse_times_itself_is_one(coef, n):
    with jax.enable_x64(True):
        inverse = toeplitz.inverse_coef(coef, n)
        product = np.asarray(toeplitz.multiply(inverse, coef, n))
    allowed = 1e-14 * dense(np.abs(coef), n) @ np.abs(np.asarray(inverse))
    assert np.all(np.abs(product - np.eye(n)[0]) <= allowed)


@pytest.mark.parametrize("bands", [1, 3, 9])
@pytest.mark.parametrize("shape", [(6,), (6, 2, 3), (1,), (6, 0)])
def test_solve_banded_is_the_dense_solution(bands, shape):
    rng = np.random.default_rng(0)
    coef = np.array([2.0, *rng.uniform(-0.5, 0.5, bands - 1)])
    rhs = rng.normal(size=shape)
    with jax.enable_x64(True):
        actual = toeplitz.solve_banded(coef, rhs)
    expected = np.linalg.solve(dense(coef, shape[0]), rhs.reshape(shape[0], -1))
    np.testing.assert_allclose(actual, expected.reshape(shape), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("lengths", [(1, 1), (2, 5), (5, 2), (4, 4)])
@pytest.mark.parametrize("n", [1, 3, 5, 12])
def test_multiply_is_the_dense_product(lengths, n):
    lhs, rhs = (np.random.default_rng(length).normal(size=length) for length in lengths)
    with jax.enable_x64(True):
        actual = toeplitz.multiply(lhs, rhs, n)
    expected = (dense(lhs, n) @ dense(rhs, n))[:, 0]
    np.testing.assert_allclose(actual, expected, rtol=1e-13, atol=1e-15)


def test_multiply_without_n_keeps_the_length():
    np.testing.assert_array_equal(toeplitz.multiply([1, 2, 3], [4, 5, 6]), [4, 13, 28])
    with pytest.raises(ValueError, match=r"expected n, or as many .* found 2 and 3"):
        toeplitz.multiply([1, 2], [4, 5, 6])


@pytest.mark.parametrize("n", [None, 2, 4, 9])
def test_inverse_coef_is_the_dense_inverse(n):
    coef = np.array([2.0, -0.5, 0.25, 0.75])
    with jax.enable_x64(True):
        actual = toeplitz.inverse_coef(coef, n)
    expected = np.linalg.inv(dense(coef, n or 4))[:, 0]
    np.testing.assert_allclose(actual, expected, rtol=1e-13, atol=1e-15)


def test_algebra_at_large_n():
    n = 20_000
    t = np.arange(n, dtype=np.longdouble)
    c = np.cumprod(np.concatenate([[1], (2 * t[1:] - 1) / (2 * t[1:])]))
    exact = -c / (2 * t - 1)
    with jax.enable_x64(True):
        coef = toeplitz.optimal_max_error_strategy_coefs(n)
        square = np.asarray(toeplitz.multiply(coef, coef))
        inverse = np.asarray(toeplitz.inverse_coef(coef))
    np.testing.assert_allclose(square, 1, rtol=1e-12)
    assert np.all(np.abs(inverse - exact) <= 1e-15 * (t + 10) * np.abs(exact))


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


@pytest.mark.each_value
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


@settings(max_examples=examples(40))
@given(
    coef=st.lists(st.floats(-2, 2).map(lambda x: round(x, 9)), min_size=1, max_size=8),
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
    is_orthogonal = np.trim_zeros(magnitudes[:n], "b").size <= min_sep
    projected = brute_force_sensitivity_squared(dense(majorant, n), min_sep, k)
    np.testing.assert_allclose(actual, attained if is_orthogonal else projected, rtol=1e-12)


def test_minsep_sensitivity_of_columns_that_do_not_overlap():
    coef = np.array([1.0, -0.2, 0.7, 0.5, 0.0])
    squared = {"min_sep": 4, "n": 12}
    assert toeplitz.minsep_sensitivity_squared(coef, **squared) == pytest.approx(3 * coef @ coef)
    one = toeplitz.minsep_sensitivity_squared(coef, 1, n=12, max_participations=1)
    assert one == pytest.approx(coef @ coef)
    with jax.enable_x64(True):
        traced = jax.jit(lambda c: toeplitz.minsep_sensitivity_squared(c, **squared))
        np.testing.assert_allclose(traced(coef[:4]), 3 * coef @ coef, rtol=1e-12)
        gradient = jax.grad(traced)(coef[:4])
        np.testing.assert_allclose(gradient, 6 * coef[:4], rtol=1e-12)


@pytest.mark.parametrize(
    ("coef", "min_sep", "k"),
    [
        ([1.0, 0.3, 0.2, 0.1], 2, None),  # ordered, so that it is exact
        ([1.0, -0.3, -0.2, 0.1], 4, None),  # without overlap
        ([0.1, 0.9, 0.2, 0.1], 1, 1),  # one participation
        ([1.0, 1.001, 0.2, 0.1], 2, None),  # hardly loose
    ],
)
def test_tight_sensitivities_do_not_warn(coef, min_sep, k, recwarn):
    toeplitz.minsep_sensitivity_squared(coef, min_sep, n=9, max_participations=k)
    assert not recwarn.list


@pytest.mark.parametrize("k", [None, 2, 3])
@pytest.mark.parametrize("coef", [[0.1, 0.9, 0.2, 0.1], [1.0, 0.1, -0.2, 0.8, 0.0]])
def test_a_loose_sensitivity_warns(coef, k):
    """By no less than it is loose."""
    n, min_sep = 9, 2
    with pytest.warns(UserWarning, match="4 coefficients overlap for min_sep=2") as record:
        bound = toeplitz.minsep_sensitivity_squared(coef, min_sep, n=n, max_participations=k)
    (warning,) = record.list
    assert warning.filename == __file__
    told = float(re.search(r"up to (\S+) % too large", str(warning.message))[1])
    C = dense(coef, n)
    attained = max(
        np.sum((C[:, rounds] @ signs) ** 2)
        for rounds in patterns(n, min_sep, k)
        for signs in itertools.product([-1, 1], repeat=len(rounds))
    )
    assert 1 + 0.01 * told >= 0.99 * math.sqrt(float(bound) / attained) > 1


@pytest.mark.each_value
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


@pytest.mark.parametrize("coef", [[1.0, 0.7, 0.5, 0.2], [1.0, -0.2, 0.7, 0.3, 0.0, 0.5]])
def test_minsep_sensitivity_is_monotone(coef):
    values = np.array(
        [
            [
                toeplitz.minsep_sensitivity_squared(coef, min_sep, n=9, max_participations=k)
                for k in (1, 2, 3, 5, 9)
            ]
            for min_sep in (1, 2, 3, 5, 9, 20)
        ]
    )
    assert np.all(np.diff(values, axis=1) >= 0)
    assert np.all(np.diff(values, axis=0) <= 0)
    assert values[0, 0] == values[-1, -1] < values[0, -1]


BOUNDS = pytest.mark.parametrize("use_matrix_upper_bound", [False, True, None])


def worst_contribution_squared(C, min_sep, max_participations):
    """The largest ||C u||^2 over u of entries -1, 0 and 1 that a user may contribute."""
    n = len(C)
    rows = np.array(list(itertools.product([-1, 0, 1], repeat=n)))
    rows = rows[np.abs(rows).sum(axis=1) <= (max_participations or n)]
    for lag in range(1, min(min_sep, n)):
        rows = rows[~np.any(rows[:, lag:] * rows[:, :-lag], axis=1)]
    return np.max(np.sum((rows @ C.T) ** 2, axis=1))


@BOUNDS
@settings(max_examples=examples(20))
@given(
    coef=coefs,
    min_sep=st.sampled_from([1, 2, 3, 10]),
    k=st.sampled_from([None, 1, 2]),
)
def test_banded_inverse_sensitivity_bounds_all_contributions(
    use_matrix_upper_bound, coef, min_sep, k
):
    n = 8
    with jax.enable_x64(True):
        actual = toeplitz.compute_banded_inverse_sensitivity_squared(
            n, coef, min_sep, k, use_matrix_upper_bound
        )
    C = np.linalg.inv(dense(coef, n))
    assert float(actual) >= worst_contribution_squared(C, min_sep, k) * (1 - 1e-12)


@BOUNDS
@pytest.mark.parametrize("noising_coef", [[1.0], [1.0, -0.5], [1.25, -0.5, -0.125, -0.1, -0.08]])
def test_banded_inverse_sensitivity_is_exact_for_decreasing_strategies(
    use_matrix_upper_bound, noising_coef
):
    for n, min_sep, k in [(1, 1, None), (8, 1, None), (8, 3, 2), (8, 2, 3), (8, 20, None)]:
        C = np.linalg.inv(dense(noising_coef, n))
        assert np.all(np.diff(C[:, 0]) <= 0)
        assert np.all(C >= -1e-15)
        with jax.enable_x64(True):
            actual = toeplitz.compute_banded_inverse_sensitivity_squared(
                n, noising_coef, min_sep, k, use_matrix_upper_bound
            )
        expected = worst_contribution_squared(C, min_sep, k)
        np.testing.assert_allclose(actual, expected, rtol=1e-12)


@BOUNDS
@pytest.mark.parametrize("coef", [[1.0, -0.4, -0.2], [1.0, 0.5, -0.7]])
def test_banded_inverse_sensitivity_is_monotone(use_matrix_upper_bound, coef):
    def value(min_sep, k):
        return toeplitz.compute_banded_inverse_sensitivity_squared(
            9, coef, min_sep, k, use_matrix_upper_bound
        )

    with jax.enable_x64(True):
        values = np.array([[value(b, k) for k in (1, 2, 3, None)] for b in (1, 2, 4, 9, 20)])
    assert np.all(np.diff(values, axis=1) >= -1e-9)
    assert np.all(np.diff(values, axis=0) <= 1e-9)
    assert values[0, 0] < values[0, -1]


def test_banded_inverse_sensitivity_is_that_of_the_inverse():
    noising_coef = [1.0, -0.5, 0.3]
    actual = toeplitz.compute_banded_inverse_sensitivity_squared(
        12, noising_coef, 3, 2, use_matrix_upper_bound=False
    )
    C = toeplitz.inverse_coef(noising_coef, 12)
    expected = toeplitz.minsep_sensitivity_squared(C, 3, n=12, max_participations=2)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    dropped = toeplitz.compute_banded_inverse_sensitivity_squared(2, noising_coef, 1)
    np.testing.assert_allclose(dropped, 1 + 1.5**2, rtol=1e-6)


# -- Error ------------------------------------------------------------------------------------

MOMENTUM = 10 - 9 * 0.9 ** np.arange(12)  # 1, 1.9, 2.71, ...


def dense_error(C, workload_coef=None):
    n = len(C)
    A = dense(np.ones(n) if workload_coef is None else workload_coef, n)
    return np.sum((A @ np.linalg.inv(C)) ** 2, axis=1)


@pytest.mark.parametrize("n", [None, 1, 2, 9])
@pytest.mark.parametrize("workload_coef", [None, MOMENTUM, MOMENTUM[:2], [0.5, 0.0, -1.0]])
def test_per_query_error_by_definition(n, workload_coef):
    coef = np.array([2.0, -0.5, 0.75, 0.3])
    options = {"n": n, "workload_coef": workload_coef}
    C = dense(coef, n or 4)
    with jax.enable_x64(True):
        actual = toeplitz.per_query_error(strategy_coef=coef, **options)
        inverse = toeplitz.per_query_error(noising_coef=coef, **options)
    assert actual.shape == inverse.shape == (n or 4,)
    np.testing.assert_allclose(actual, dense_error(C, workload_coef), rtol=1e-12)
    expected = dense_error(np.linalg.inv(C), workload_coef)
    np.testing.assert_allclose(inverse, expected, rtol=1e-12)


@settings(max_examples=examples(25))
@given(coef=coefs, workload_coef=st.none() | coefs, form=st.sampled_from(["strategy", "noising"]))
def test_errors_never_decrease(coef, workload_coef, form):
    errors = toeplitz.per_query_error(**{f"{form}_coef": coef}, n=20, workload_coef=workload_coef)
    assert np.all(np.diff(errors) >= 0)


def test_error_of_the_optimal_factorization():
    """B = C, so the errors add up the squares of C; and a streaming C^-1 has the same."""
    with jax.enable_x64(True):
        coef = toeplitz.optimal_max_error_strategy_coefs(40)
        actual = toeplitz.per_query_error(strategy_coef=coef)
        np.testing.assert_allclose(actual, np.cumsum(coef**2), rtol=1e-13)
        noising_coef = toeplitz.optimal_max_error_noising_coefs(40)
        actual = toeplitz.per_query_error(noising_coef=noising_coef)
        np.testing.assert_allclose(actual, np.cumsum(coef**2), rtol=1e-13)


def test_per_query_error_takes_one_form():
    with pytest.raises(ValueError, match="one of strategy_coef and noising_coef, found neither"):
        toeplitz.per_query_error(n=3)
    with pytest.raises(ValueError, match="one of strategy_coef and noising_coef, found both"):
        toeplitz.per_query_error(strategy_coef=[1.0], noising_coef=[1.0])


REDUCTIONS = {
    "mean": jnp.mean,
    "max": jnp.max,
    "last": last,
    "custom": lambda errors: jnp.sqrt(errors[0] * errors[-1]),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("n", [None, 2, 9])
def test_loss_by_definition(reduction, n):
    coef = np.array([2.0, -0.5, 0.75, 0.3])
    C = dense(coef, n or 4)
    with jax.enable_x64(True):
        actual = toeplitz.loss(coef, n, REDUCTIONS[reduction])
        expected = REDUCTIONS[reduction](dense_error(C)) * np.max(np.sum(C**2, axis=0))
        np.testing.assert_allclose(actual, expected, rtol=1e-12)
        np.testing.assert_allclose(toeplitz.loss(-3 * coef, n, REDUCTIONS[reduction]), expected)


def test_loss_reduces_by_the_mean_unless_told():
    coef = [1.0, 0.5]
    assert toeplitz.loss(coef, 5) == toeplitz.loss(coef, 5, jnp.mean)


def test_gradient_of_the_largest_error_is_that_of_the_last():
    """Where all errors are the same, that of jnp.max would be shared out."""
    coef = jnp.ones(4)
    np.testing.assert_array_equal(toeplitz.per_query_error(strategy_coef=coef), np.ones(4))
    actual, expected = (jax.grad(toeplitz.loss)(coef, 4, f) for f in (jnp.max, last))
    np.testing.assert_array_equal(actual, expected)


# -- All functions: reference, types, transformations -----------------------------------------


def call(module, name, *args, **kwargs):
    """Leaves out checks of the reference that would refuse what is valid here."""
    function = getattr(module, name)
    if "skip_checks" in inspect.signature(function).parameters:
        kwargs["skip_checks"] = True
    return function(*args, **kwargs)


def workload():
    return jnp.asarray(MOMENTUM[:5])


CALLS = {
    "pad_coefs_to_n": lambda run, c: run("pad_coefs_to_n", c, 6),
    "materialize": lambda run, c: run("materialize_lower_triangular", c, 6),
    "solve_banded": lambda run, c: run("solve_banded", c, jnp.arange(9.0)),
    "solve_banded of matrices": lambda run, c: run("solve_banded", c, jnp.ones((9, 2), c.dtype)),
    "multiply": lambda run, c: run("multiply", c, c),
    "multiply with n": lambda run, c: run("multiply", c, jnp.arange(1.0, 7.0), 5),
    "multiply less": lambda run, c: run("multiply", c[:2], c, 3),
    "inverse_coef": lambda run, c: run("inverse_coef", c, 9),
    "inverse_coef of few rows": lambda run, c: run("inverse_coef", c, 2),
    "sensitivity_squared": lambda run, c: run("sensitivity_squared", c, 3),
    "minsep_sensitivity_squared": lambda run, c: run(
        "minsep_sensitivity_squared", c, 2, n=9, max_participations=3
    ),
    "error of C": lambda run, c: run("per_query_error", strategy_coef=c, n=9),
    "error of C, workload": lambda run, c: run(
        "per_query_error", strategy_coef=c, n=9, workload_coef=workload()
    ),
    "error of C^-1": lambda run, c: run("per_query_error", noising_coef=c),
    "error of C^-1, workload": lambda run, c: run(
        "per_query_error", noising_coef=c, n=4, workload_coef=workload()
    ),
    "loss": lambda run, c: run("loss", c, 9),
}
OURS = functools.partial(call, toeplitz)
# Here of the default dtype at least, also where the reference keeps that of coefficients.
AT_LEAST_DEFAULT = {"error of C^-1"}


@pytest.mark.parametrize("name", CALLS)
def test_agrees_with_reference(reference, name):
    coef = [1.0, 0.5, 0.375, 0.25]
    for x64, dtype in ((False, "float32"), (True, "float64"), (True, "float32")):
        with jax.enable_x64(x64):
            coef = jnp.asarray(coef, dtype)
            actual = CALLS[name](OURS, coef)
            expected = CALLS[name](functools.partial(call, reference), coef)
            wanted = expected.dtype
            if name in AT_LEAST_DEFAULT:
                wanted = jnp.promote_types(wanted, jnp.result_type(float))
            assert actual.dtype == wanted
            assert actual.shape == expected.shape
            rtol = 1e-12 if expected.dtype == jnp.float64 else 1e-5
            np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol / 100)


@pytest.mark.parametrize("name", CALLS)
def test_narrow_coefficients_are_widened(name):
    exact = [8.0, 4.0, 2.0, 1.0]
    expected = CALLS[name](OURS, jnp.asarray(exact))
    for dtype in ("bfloat16", "float16", "int32", "int8"):
        actual = CALLS[name](OURS, jnp.asarray(exact, dtype))
        assert actual.dtype == jnp.float32
        np.testing.assert_array_equal(actual, expected)
    with jax.enable_x64(True):
        assert CALLS[name](OURS, jnp.asarray(exact, "int32")).dtype == jnp.float64


OTHER = np.array([2.0, 0.5, -0.25])
FUNCTIONS_OF_COEF = {
    "solve_banded": lambda c: toeplitz.solve_banded(c, np.arange(7.0)),
    "solve_banded of rhs": lambda x: toeplitz.solve_banded(OTHER, x),
    "multiply": lambda c: toeplitz.multiply(c, OTHER, 5),
    "multiply from the left": lambda c: toeplitz.multiply(OTHER, c, 9),
    "inverse_coef": lambda c: toeplitz.inverse_coef(c, 7),
    "minsep_sensitivity_squared": lambda c: toeplitz.minsep_sensitivity_squared(
        c, 2, n=9, max_participations=3
    ),
    "banded_inverse_sensitivity": lambda c: toeplitz.compute_banded_inverse_sensitivity_squared(
        9, c, 2, 3
    ),
    "error of C": lambda c: toeplitz.per_query_error(strategy_coef=c, n=7),
    "error of C, workload": lambda c: toeplitz.per_query_error(
        strategy_coef=c, n=7, workload_coef=MOMENTUM
    ),
    "error of C^-1": lambda c: toeplitz.per_query_error(noising_coef=c, n=7),
    "error of C^-1, workload": lambda c: toeplitz.per_query_error(
        noising_coef=c, n=7, workload_coef=MOMENTUM
    ),
    "error of a workload": lambda c: toeplitz.per_query_error(
        strategy_coef=OTHER, n=7, workload_coef=c
    ),
    "loss": lambda c: toeplitz.loss(c, 7),
    "loss of the last": lambda c: toeplitz.loss(c, 7, jnp.max),
    "square root": lambda c: toeplitz.banded_inverse_square_root_noising_coefs(7, c),
}


@pytest.mark.each_value
@pytest.mark.parametrize("name", FUNCTIONS_OF_COEF)
@pytest.mark.parametrize("coef", [[1.1, -0.4, -0.2, -0.05], [1.1, -0.2, 0.4, 0.1]])
def test_gradients(name, coef):
    weights = np.random.default_rng(0).normal(size=9)

    @jax.jit
    def f(c):
        values = jnp.ravel(FUNCTIONS_OF_COEF[name](c))
        return values @ weights[: values.size]

    with jax.enable_x64(True):
        actual = jax.jit(jax.grad(f))(np.array(coef))
        numeric = numeric_gradient(f, coef)
    np.testing.assert_allclose(actual, numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", FUNCTIONS_OF_COEF)
def test_jit_and_vmap(name):
    f = FUNCTIONS_OF_COEF[name]
    coef = jnp.array([[1.0, -0.4, -0.2, -0.05], [2.0, -0.2, 0.4, 0.1]])
    expected = np.stack([f(c) for c in coef])
    np.testing.assert_allclose(jax.vmap(f)(coef), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(jax.jit(f)(coef[1]), expected[1], rtol=1e-6, atol=1e-6)


# -- Optimization -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "bands", "reduction"),
    [
        (20, 4, "max"),
        pytest.param(20, 4, "custom", marks=pytest.mark.nightly),
        pytest.param(24, 24, "mean", marks=pytest.mark.nightly),
        (6, 9, "last"),
    ],
)
def test_optimized_bands_are_as_good_as_the_reference(reference, n, bands, reduction):
    reduction_fn = REDUCTIONS[reduction]
    with jax.enable_x64(True):
        actual = toeplitz.optimize_banded_toeplitz(n, bands, reduction_fn=reduction_fn)
        expected = reference.optimize_banded_toeplitz(n, bands, reduction_fn=reduction_fn)
        assert actual.shape == (bands,)
        assert actual.dtype == jnp.float64
        np.testing.assert_allclose(np.linalg.norm(actual), 1, rtol=1e-14)
        loss, bound = (toeplitz.loss(c, n, reduction_fn) for c in (actual, expected))
        assert float(loss) <= float(bound) * (1 + 1e-9)


def test_optimized_bands_by_hand():
    """C = A for the last error, n = 2, b = 2: (1 + (1 - c)^2) (1 + c^2) is least at c = 1/2."""
    with jax.enable_x64(True):
        actual = toeplitz.optimize_banded_toeplitz(2, 2, reduction_fn=last)
    np.testing.assert_allclose(actual, np.array([1, 0.5]) / np.sqrt(1.25), rtol=1e-7)
    np.testing.assert_array_equal(toeplitz.optimize_banded_toeplitz(7, 1), [1])


@pytest.mark.parametrize("x64", [False, True])
def test_optimized_bands_from_a_start(x64):
    with jax.enable_x64(x64):
        default = toeplitz.optimize_banded_toeplitz(20, 4)
        assert default.dtype == (jnp.float64 if x64 else jnp.float32)
        for start in ([3.0, 1.0, 0.5, 0.25], [2, 1, 1, 1], jnp.array([1.0, 0, 0, 0], jnp.float32)):
            actual = toeplitz.optimize_banded_toeplitz(20, 4, start)
            np.testing.assert_allclose(actual, default, atol=1e-5)
            is_single = getattr(start, "dtype", None) == jnp.float32
            assert actual.dtype == (jnp.float32 if is_single else default.dtype)
        start = np.array([3.0, 1.0, 0.5, 0.25], np.float32)
        for steps, better in ((0, False), (3, True)):
            actual = toeplitz.optimize_banded_toeplitz(20, 4, start, steps)
            np.testing.assert_allclose(np.linalg.norm(actual), 1, rtol=1e-6)
            assert bool(toeplitz.loss(actual, 20) < toeplitz.loss(start, 20) * 0.999) == better
        assert jax.config.jax_enable_x64 == x64


@pytest.mark.parametrize("x64", [False, True])
def test_optimization_restores_the_mode_after_an_error(x64):
    def fails(errors):
        raise RuntimeError("no reduction today")

    privacy = {"dataset_size": 8, "expected_batch_size": 4, "epsilon": 1.0, "delta": 1e-3}
    with jax.enable_x64(x64):
        for optimize in (
            lambda: toeplitz.optimize_banded_toeplitz(4, 2, reduction_fn=fails),
            lambda: toeplitz.optimize_banded_inverse_toeplitz(4, 2, 2, reduction_fn=fails),
            lambda: toeplitz.optimize_coefs_for_amplifications(4, reduction_fn=fails, **privacy),
        ):
            with pytest.raises(RuntimeError, match="no reduction today"):
                optimize()
            assert jax.config.jax_enable_x64 == x64


def test_optimizations_compile_once():
    workload_coef = np.arange(1.0, 13.0)
    for optimize, other in (
        (functools.partial(toeplitz.optimize_banded_toeplitz, 12, 3), {"max_optimizer_steps": 2}),
        (
            functools.partial(toeplitz.optimize_banded_inverse_toeplitz, 12, 3, 3),
            {"noising_coef": np.array([1.0, -0.5, -0.1], np.float32)},
        ),
        (
            lambda **options: toeplitz.optimize_banded_inverse_toeplitz(
                12, 3, 3, workload_coef=workload_coef.copy(), **options
            ),
            {"strategy_coef": [1.0, 0.5]},
        ),
    ):
        reduction_fn = CountsCalls()
        optimize(reduction_fn=reduction_fn)
        calls = reduction_fn.calls
        assert calls > 0
        optimize(reduction_fn=reduction_fn)
        optimize(reduction_fn=reduction_fn, **other)
        with jax.enable_x64(True):
            optimize(reduction_fn=reduction_fn)
        assert reduction_fn.calls == calls


# -- Noising matrices -------------------------------------------------------------------------


def exact_inverse_square_root(workload_coef, p):
    """Of a power series of fractions that starts with the square of one."""
    w = [*workload_coef, *[Fraction(0)] * p][:p]
    root = [Fraction(round(w[0] ** 0.5))]
    assert root[0] ** 2 == w[0]
    inverse = [1 / root[0]]
    for k in range(1, p):
        rest = w[k] - sum(root[i] * root[k - i] for i in range(1, k))
        root.append(rest / (2 * root[0]))
        inverse.append(-sum(root[i] * inverse[k - i] for i in range(1, k + 1)) / root[0])
    return inverse


@pytest.mark.parametrize(
    "workload_coef",
    [
        [Fraction(1)] * 30,
        [10 - 9 * Fraction(9, 10) ** k for k in range(40)],  # momentum 0.9
        [Fraction(4), Fraction(1), Fraction(0), Fraction(3, 8)],
        [Fraction(9)],
    ],
)
@pytest.mark.parametrize("p", [1, 2, 3, 24])
def test_inverse_square_root_is_exact(workload_coef, p):
    for x64, dtype, rtol in ((False, np.float32, 2e-7), (True, np.float64, 1e-11)):
        rounded = np.array([float(f) for f in workload_coef], dtype)
        with jax.enable_x64(x64):
            actual = toeplitz.banded_inverse_square_root_noising_coefs(p, rounded)
        exact = exact_inverse_square_root([Fraction(w) for w in rounded.tolist()], p)
        assert actual.shape == (p,)
        assert actual.dtype == dtype
        np.testing.assert_allclose(actual, [float(f) for f in exact], rtol=rtol, atol=1e-14)


def test_inverse_square_root_at_large_p():
    """Momentum is the product of two series whose roots are known."""
    p = 3000
    k = np.arange(p)
    with jax.enable_x64(True):
        root = np.asarray(toeplitz.optimal_max_error_noising_coefs(p))
        actual = toeplitz.banded_inverse_square_root_noising_coefs(p, 10 - 9 * 0.9**k)
    expected = np.convolve(root, root * 0.9**k)[:p]
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)


def test_inverse_square_root_of_prefix_sums():
    default = toeplitz.banded_inverse_square_root_noising_coefs(50)
    np.testing.assert_array_equal(default, toeplitz.optimal_max_error_noising_coefs(50))
    given = toeplitz.banded_inverse_square_root_noising_coefs(50, np.ones(50))
    np.testing.assert_allclose(given, default, rtol=1e-5)


def test_inverse_square_root_needs_a_positive_start():
    for bad in (0.0, -1.0):
        message = rf"workload_coef\[0\] > 0, found workload_coef\[0\] = {bad}"
        with pytest.raises(ValueError, match=message):
            toeplitz.banded_inverse_square_root_noising_coefs(3, [bad, 1.0])
    for p in (0, -1):
        with pytest.raises(ValueError, match=f"num_bands >= 1, found num_bands={p}"):
            toeplitz.banded_inverse_square_root_noising_coefs(p)
    with pytest.raises(TypeError, match=r"num_bands to be an integer, found 2\.5"):
        toeplitz.banded_inverse_square_root_noising_coefs(2.5)


def plain_banded_inverse_loss(n, min_sep, k, workload_coef, reduction_fn):
    """The loss that is minimized, of dense matrices."""
    k = min(k or n, -(-n // min_sep))
    lag = np.arange(n)[:, None] - np.arange(n)
    A = jnp.asarray(dense(np.ones(n) if workload_coef is None else workload_coef, n))

    def loss_fn(noising_coef):
        padded = jnp.pad(noising_coef, (0, n))[:n]
        Cinv = jnp.where(lag >= 0, padded[lag], 0)
        errors = jnp.sum((A @ Cinv) ** 2, axis=1)
        c = jax.scipy.linalg.solve_triangular(Cinv, jnp.eye(n)[0], lower=True)
        c = jax.lax.cummax(jnp.abs(c), reverse=True)
        worst = sum(jnp.pad(c, (i * min_sep, 0))[:n] for i in range(k))
        return reduction_fn(errors) * jnp.sum(worst**2)

    return loss_fn


@pytest.mark.parametrize(
    ("n", "min_sep", "p", "k", "workload_coef", "reduction"),
    [
        (20, 5, 4, None, None, "mean"),
        (12, 3, 5, 2, MOMENTUM, "max"),
    ],
)
def test_optimized_noising_coefs(n, min_sep, p, k, workload_coef, reduction):
    reference = pytest.importorskip("jax_privacy.matrix_factorization.optimization")
    reduction_fn = REDUCTIONS[reduction]
    loss_fn = plain_banded_inverse_loss(n, min_sep, k, workload_coef, reduction_fn)
    with jax.enable_x64(True):
        actual = toeplitz.optimize_banded_inverse_toeplitz(
            n,
            min_sep,
            p,
            workload_coef=workload_coef,
            max_participations=k,
            reduction_fn=reduction_fn,
        )
        start = toeplitz.banded_inverse_square_root_noising_coefs(p, workload_coef)
        found = loss_fn(actual)
        assert actual.shape == (p,)
        assert found < loss_fn(start) * 0.999
        assert found <= loss_fn(reference.optimize(loss_fn, start)) * (1 + 1e-6)


def test_optimized_noising_coefs_from_any_start():
    n, min_sep, p = 20, 5, 4
    optimize = functools.partial(toeplitz.optimize_banded_inverse_toeplitz, n, min_sep, p)
    with jax.enable_x64(True):
        loss_fn = jax.jit(plain_banded_inverse_loss(n, min_sep, None, None, jnp.mean))

        def started(**start):
            result = optimize(max_optimizer_steps=0, **start)
            assert loss_fn(optimize(**start)) < loss_fn(result)
            return result

        default = started()
        root = toeplitz.banded_inverse_square_root_noising_coefs(p)
        assert loss_fn(default) <= loss_fn(root)
        np.testing.assert_array_equal(started(noising_coef=[2.0, -1.0]), [1, -0.5, 0, 0])
        long = [1.0, -0.5, -0.25, -0.125, 7.0, 7.0]
        np.testing.assert_array_equal(started(noising_coef=long), long[:p])
        np.testing.assert_allclose(
            started(strategy_coef=[2.0, 1.0]), [1, -0.5, 0.25, -0.125], rtol=1e-14
        )
        np.testing.assert_array_equal(
            started(noising_coef=[1.0, -0.5], strategy_coef=[1.0, 0.1]), [1, -0.5, 0, 0]
        )


# The least losses of a wide multi-start: 50 to 600 runs of BFGS for each, from inverse square
# roots, powers and random changes of them.
@pytest.mark.parametrize(
    ("n", "min_sep", "k", "p", "momentum", "decay", "best"),
    [
        (1192, 149, 8, 5, 0.9, 0.9999, 5956.114870),
        (512, 64, 8, 16, 0.0, 1.0, 96.7083973),
        (600, 150, 2, 12, 0.5, 0.9999, 63.1281763),
    ],
)
def test_optimized_noising_coefs_are_those_of_a_wide_multi_start(
    n, min_sep, k, p, momentum, decay, best
):
    reports = []
    with jax.enable_x64(True):
        workload = toeplitz.momentum_sgd_coefs(n, momentum=momentum, decay=decay)
        toeplitz.optimize_banded_inverse_toeplitz(
            n, min_sep, p, workload_coef=workload, max_participations=k, report=reports.append
        )
    np.testing.assert_allclose(reports[0].loss, best, rtol=1e-7)


@pytest.mark.parametrize("x64", [False, True])
def test_optimized_noising_coefs_start_with_one(x64):
    optimize = toeplitz.optimize_banded_inverse_toeplitz
    with jax.enable_x64(x64):
        np.testing.assert_array_equal(optimize(5, 2, 1), [1])
        for actual in (
            optimize(20, 5, 4),
            optimize(20, 5, 4, noising_coef=[-3.0, 1.0]),
            optimize(3, 20, 5, strategy_coef=[4.0, 2.0], max_optimizer_steps=0),
        ):
            assert actual.dtype == (jnp.float64 if x64 else jnp.float32)
            assert float(actual[0]) == 1


# -- Amplification ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def accounting():
    return pytest.importorskip("dp_accounting")


@pytest.fixture(scope="module")
def rdp_accountant(accounting):
    return pytest.importorskip("dp_accounting.rdp").RdpAccountant


def amplified_event(accounting, n, dataset_size, batch_size, bands, noise_multiplier):
    """What one part of the data goes through; see Theorem 4 of https://arxiv.org/abs/2306.08153."""
    probability = batch_size / (dataset_size // bands)
    step = accounting.PoissonSampledDpEvent(
        probability, accounting.GaussianDpEvent(float(noise_multiplier))
    )
    return accounting.SelfComposedDpEvent(step, -(-n // bands))


def amplified(n, dataset_size, batch_size, epsilon, delta, **options):
    coef, stddev = toeplitz.optimize_coefs_for_amplifications(
        n,
        dataset_size=dataset_size,
        expected_batch_size=batch_size,
        epsilon=epsilon,
        delta=delta,
        **options,
    )
    np.testing.assert_allclose(np.linalg.norm(coef), 1, rtol=1e-6)
    assert type(stddev) is float
    return coef, stddev


def noise_multiplier(coef, stddev):
    return stddev / np.linalg.norm(np.asarray(coef, np.float64))


@pytest.fixture(scope="module")
def pld_accountant(accounting):
    return pytest.importorskip("dp_accounting.pld").PLDAccountant


@pytest.mark.parametrize(("accountant", "expected"), [("pld", 1.9669), ("rdp", 2.0972)])
def test_amplification_of_a_training_run(
    accounting, rdp_accountant, pld_accountant, accountant, expected
):
    size = 1024, 60_000, 500
    coef, stddev = amplified(*size, 2.0, 1e-6, accountant=accountant)
    assert coef.shape == (8,)
    assert coef.dtype == jnp.float32
    np.testing.assert_allclose(stddev, expected, rtol=1e-3)
    event = amplified_event(accounting, *size, 8, noise_multiplier(coef, stddev))
    if accountant == "rdp":
        spent = rdp_accountant().compose(event).get_epsilon(1e-6)
        np.testing.assert_allclose(spent, 2, rtol=1e-5)
    else:
        spent = pld_accountant(value_discretization_interval=2e-4).compose(event).get_epsilon(1e-6)
        np.testing.assert_allclose(spent, 2, rtol=1e-3)
    assert spent <= 2
    assert pld_accountant().compose(event).get_epsilon(1e-6) <= 2


@pytest.mark.parametrize("epsilon", sweeps.cases([0.5, 8.0], [0.5]))
def test_privacy_loss_distributions_ask_for_less_noise(epsilon):
    errors = {}
    for accountant in ("pld", "rdp"):
        coef, stddev = amplified(1024, 60_000, 500, epsilon, 1e-6, accountant=accountant)
        error = toeplitz.per_query_error(strategy_coef=coef, n=1024).mean()
        errors[accountant] = stddev * float(error) ** 0.5
    assert errors["pld"] < 0.945 * errors["rdp"]


@pytest.mark.each_value
@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize(
    ("size", "epsilon", "delta"),
    [
        ((8, 24, 4), 100.0, 1e-6),
        ((8, 24, 4), 0.01, 1e-6),
        ((5, 12, 12), 3.0, 1e-3),
        ((64, 4096, 64), 0.05, 1e-9),
    ],
)
def test_amplification_spends_no_more_than_epsilon(
    accounting, rdp_accountant, pld_accountant, size, epsilon, delta, accountant
):
    coef, stddev = amplified(*size, epsilon, delta, max_optimizer_steps=5, accountant=accountant)
    event = amplified_event(accounting, *size, coef.size, noise_multiplier(coef, stddev))
    fresh = rdp_accountant()
    if accountant == "pld":
        fresh = pld_accountant(value_discretization_interval=1e-4 * epsilon)
    spent = fresh.compose(event).get_epsilon(delta)
    assert spent <= epsilon
    np.testing.assert_allclose(spent, epsilon, rtol=1e-4)


@pytest.mark.parametrize("accountant", sweeps.cases(["pld", "rdp"], ["rdp"]))
def test_amplification_by_brute_force(accounting, rdp_accountant, pld_accountant, accountant):
    size, epsilon, delta = (8, 12, 2), 8.0, 1e-3
    candidates = {}
    with jax.enable_x64(True):
        for b in (1, 2, 3, 4, 6):
            multiplier = accounting.calibrate_dp_mechanism(
                rdp_accountant if accountant == "rdp" else pld_accountant,
                lambda multiplier, b=b: amplified_event(accounting, *size, b, multiplier),
                epsilon,
                delta,
                accounting.ExplicitBracketInterval(0.4, 4),
                tol=1e-3,
            )
            expected = toeplitz.optimize_banded_toeplitz(8, b)
            error = float(toeplitz.loss(expected, 8)) ** 0.5
            candidates[b] = error * multiplier, multiplier, expected
        best = min(candidates, key=lambda b: candidates[b][0])
        coef, stddev = amplified(*size, epsilon, delta, accountant=accountant)
    assert best == 4
    _, multiplier, expected = candidates[best]
    assert coef.dtype == jnp.float64
    np.testing.assert_allclose(coef, expected, atol=1e-6)
    np.testing.assert_allclose(stddev, multiplier, atol=2e-3)


def test_amplification_agrees_with_reference(reference):
    target = {"dataset_size": 8, "expected_batch_size": 4, "epsilon": 8.0, "delta": 1e-3}
    coef, stddev = toeplitz.optimize_coefs_for_amplifications(8, **target, accountant="rdp")
    expected_coef, expected_stddev = reference.optimize_coefs_for_amplifications(8, **target)
    assert coef.dtype == expected_coef.dtype
    np.testing.assert_allclose(coef, expected_coef, rtol=1e-5)
    np.testing.assert_allclose(stddev, expected_stddev, rtol=1e-4)
    assert type(stddev) is type(expected_stddev)


def test_amplification_by_another_accountant_is_told():
    with pytest.raises(ValueError, match="expected accountant to be one of"):
        toeplitz.optimize_coefs_for_amplifications(8, **SMALL, accountant="gdp")


def test_amplification_with_more_bands_than_steps():
    coef, stddev = amplified(3, 8, 1, 8.0, 1e-2, reduction_fn=jnp.max)
    assert coef.shape == (4,)
    np.testing.assert_array_equal(coef[3:], 0)
    expected = toeplitz.optimize_banded_toeplitz(3, 3, reduction_fn=jnp.max)
    np.testing.assert_allclose(coef[:3], expected, rtol=1e-5)
    assert stddev > 0


SMALL = {"dataset_size": 24, "expected_batch_size": 4, "epsilon": 2.0, "delta": 1e-3}


@pytest.mark.parametrize("options", [{}, {"progress": None}])
def test_amplification_is_quiet(accounting, rdp_accountant, caplog, capsys, options):
    caplog.set_level(logging.DEBUG, logger="absl")
    toeplitz.optimize_coefs_for_amplifications(8, **SMALL, **options)
    assert [record for record in caplog.records if record.name == "absl"] == []
    assert capsys.readouterr() == ("", "")
    # The accountant tells as before afterwards.
    rdp_accountant().compose(amplified_event(accounting, 8, 24, 4, 1, 0.3))
    assert any("Excluding" in record.getMessage() for record in caplog.records)


def test_amplification_shows_its_progress():
    seen = []

    def progress(candidates):
        for bands in candidates:
            seen.append(bands)
            yield bands

    shown = toeplitz.optimize_coefs_for_amplifications(8, progress=progress, **SMALL)
    assert seen == [1, 2, 3, 4, 6]
    hidden = toeplitz.optimize_coefs_for_amplifications(8, progress=None, **SMALL)
    np.testing.assert_array_equal(shown[0], hidden[0])
    assert shown[1] == hidden[1]


def test_amplification_reports_what_it_reached():
    reports = []
    with jax.enable_x64(True):
        coef, _ = toeplitz.optimize_coefs_for_amplifications(8, **SMALL, report=reports.append)
        (report,) = reports
        np.testing.assert_allclose(report.loss, toeplitz.loss(coef, 8), rtol=1e-9)
    assert report.stopped == "converged"
    assert report.steps > 0
    assert 0 <= report.gap < 0.5
    with pytest.raises(TypeError, match="report to be a function or None, found 3"):
        toeplitz.optimize_coefs_for_amplifications(8, **SMALL, report=3)


@pytest.mark.slow
def test_amplification_of_a_workload_that_is_a_matrix():
    rates = np.linspace(1, 0.2, 8)
    A = streaming_matrix.momentum_sgd_matrix(0.5, rates)
    found = []
    with jax.enable_x64(True):
        coef, _ = toeplitz.optimize_coefs_for_amplifications(8, **SMALL, A=A, report=found.append)
        least = toeplitz.loss(toeplitz.optimize_banded_toeplitz(8, coef.size, A=A), 8, A=A)
    np.testing.assert_allclose(found[0].loss, least, rtol=1e-9)
    with pytest.raises(ValueError, match="expected workload_coef or A, found both"):
        toeplitz.optimize_coefs_for_amplifications(8, **SMALL, A=A, workload_coef=np.ones(8))


def test_amplification_takes_numpy_numbers():
    sizes = {"dataset_size": np.int32(24), "expected_batch_size": np.int64(4)}
    target = {"epsilon": np.float32(2), "delta": np.float64(1e-3)}
    actual = toeplitz.optimize_coefs_for_amplifications(np.int8(8), **sizes, **target)
    expected = toeplitz.optimize_coefs_for_amplifications(8, **SMALL)
    np.testing.assert_array_equal(actual[0], expected[0])
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n": 0}, "n >= 1, found n=0"),
        ({"dataset_size": 0}, "dataset_size >= 1, found dataset_size=0"),
        (
            {"expected_batch_size": 0},
            "expected_batch_size to be a positive number, found expected_batch_size=0",
        ),
        (
            {"expected_batch_size": 25},
            "expected_batch_size <= dataset_size=24, found expected_batch_size=25",
        ),
        *(
            ({"epsilon": epsilon}, f"0 < epsilon < inf, found epsilon={epsilon}$")
            for epsilon in (0.0, -1.0, np.inf, np.nan)
        ),
        *(
            ({"delta": delta}, f"0 < delta < 1, found delta={float(delta)}$")
            for delta in (0, 1, -0.5, 1.5, np.nan)
        ),
        ({"epsilon": 1e-4, "delta": 1e-6}, r"delta=1e-06.* found epsilon=0\.0001"),
        ({"max_optimizer_steps": -1}, "max_optimizer_steps >= 0"),
    ],
)
def test_amplification_out_of_range(changed, message):
    with pytest.raises(ValueError, match=message):
        toeplitz.optimize_coefs_for_amplifications(**({"n": 8} | SMALL | changed))


@pytest.mark.parametrize("name", ["n", "dataset_size"])
def test_amplification_of_non_integers(name):
    with pytest.raises(TypeError, match=rf"{name} to be an integer, found 8\.5"):
        toeplitz.optimize_coefs_for_amplifications(**({"n": 8} | SMALL | {name: 8.5}))


# -- Arguments --------------------------------------------------------------------------------

# Functions of coefficients and a size.
SIZED = {
    "pad_coefs_to_n": toeplitz.pad_coefs_to_n,
    "materialize_lower_triangular": toeplitz.materialize_lower_triangular,
    "inverse_as_streaming_matrix": lambda c, n=None: (
        toeplitz.inverse_as_streaming_matrix(c, n).structure.coef
    ),
    "sensitivity_squared": toeplitz.sensitivity_squared,
    "minsep_sensitivity_squared": lambda c, n=4: toeplitz.minsep_sensitivity_squared(c, 2, n=n),
    "multiply": lambda c, n=4: toeplitz.multiply(c, [1.0, 2.0], n),
    "multiply from the left": lambda c, n=4: toeplitz.multiply([1.0, 2.0], c, n),
    "inverse_coef": toeplitz.inverse_coef,
    "banded_inverse_sensitivity": lambda c, n=4: (
        toeplitz.compute_banded_inverse_sensitivity_squared(n, c, 2)
    ),
    "error of C": lambda c, n=None: toeplitz.per_query_error(strategy_coef=c, n=n),
    "error of C^-1": lambda c, n=None: toeplitz.per_query_error(noising_coef=c, n=n),
    "error of a workload": lambda c, n=2: toeplitz.per_query_error(
        strategy_coef=[1.0], n=n, workload_coef=c
    ),
    "loss": toeplitz.loss,
}
TRACEABLE = SIZED | {
    "solve_banded": lambda c: toeplitz.solve_banded(c, np.arange(1.0, 4.0)),
    "square root": lambda c: toeplitz.banded_inverse_square_root_noising_coefs(3, c),
    "noising_coef_as_streaming_matrix": lambda c: toeplitz.noising_coef_as_streaming_matrix(
        c
    ).materialize(3),
}
FUNCTIONS = TRACEABLE | {
    "matrix upper bound": lambda c: toeplitz.compute_banded_inverse_sensitivity_squared(
        4, c, 2, use_matrix_upper_bound=True
    ),
    "optimize_banded_toeplitz": lambda c: toeplitz.optimize_banded_toeplitz(4, 2, c),
    "optimize from C": lambda c: toeplitz.optimize_banded_inverse_toeplitz(
        4, 2, 2, strategy_coef=c
    ),
    "optimize from C^-1": lambda c: toeplitz.optimize_banded_inverse_toeplitz(
        4, 2, 2, noising_coef=c
    ),
    "optimize for a workload": lambda c: toeplitz.optimize_banded_inverse_toeplitz(
        2, 1, 2, workload_coef=c
    ),
}
# Functions that divide by the first coefficient.
DIVIDING = [
    "inverse_as_streaming_matrix",
    "inverse_coef",
    "banded_inverse_sensitivity",
    "error of C",
    "loss",
    "solve_banded",
    "matrix upper bound",
    "optimize_banded_toeplitz",
    "optimize from C",
    "optimize from C^-1",
]


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


# A workload is taken in float64, like everything that the optimization computes from it.
@pytest.mark.parametrize("name", sorted(FUNCTIONS.keys() - {"optimize for a workload"}))
def test_values_that_overflow_are_checked(name):
    """In float32 this is infinity."""
    with pytest.raises(ValueError, match="finite"):
        FUNCTIONS[name](np.array([1.0, 1e300]))


@pytest.mark.parametrize("name", TRACEABLE)
def test_traced_values_are_not_checked(name):
    assert not np.isfinite(np.asarray(jax.jit(TRACEABLE[name])(jnp.array([1.0, np.nan])))).all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_concrete_values_are_checked_inside_jit(name):
    with pytest.raises(ValueError, match="finite"):
        jax.jit(lambda: FUNCTIONS[name](np.array([1.0, np.nan])))()


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("coef", [[1.0, 1j], [True, False]])
def test_types_are_checked(name, coef):
    with pytest.raises(TypeError, match="real numbers, found dtype"):
        FUNCTIONS[name](coef)


@pytest.mark.parametrize("name", SIZED)
def test_sizes_are_checked(name):
    for n in (0, -3):
        with pytest.raises(ValueError, match=rf"n >= 1, found \w*n={n}"):
            SIZED[name]([1.0], n)
    for n in (2.5, "2"):
        with pytest.raises(TypeError, match="n to be an integer, found"):
            SIZED[name]([1.0], n)
    with pytest.raises(TypeError, match="n to be an integer, found"):
        jax.jit(SIZED[name])(jnp.ones(1), 2)


@pytest.mark.parametrize("name", DIVIDING)
@pytest.mark.parametrize("coef", [[0.0, 1.0], np.zeros(2), [-0.0, 1.0]])
def test_leading_coefficient_must_not_be_zero(name, coef):
    message = r"coef\[0\] to be nonzero, found \w*coef\[0\] = -?0"
    with pytest.raises(ValueError, match=message):
        FUNCTIONS[name](coef)


@pytest.mark.parametrize("name", [name for name in DIVIDING if "optimize from" not in name])
def test_leading_coefficient_must_not_underflow(name):
    """In float32 this is zero."""
    with pytest.raises(ValueError, match="to be nonzero"):
        FUNCTIONS[name]([1e-60, 1.0])


@pytest.mark.parametrize(
    "function",
    [toeplitz.optimal_max_error_strategy_coefs, toeplitz.optimal_max_error_noising_coefs],
)
def test_optimal_coefs_check_n(function):
    with pytest.raises(ValueError, match="n >= 1, found n=0"):
        function(0)
    with pytest.raises(TypeError, match=r"n to be an integer, found 1\.5"):
        function(1.5)


LIMITED = {
    "minsep_sensitivity_squared": lambda min_sep, k: toeplitz.minsep_sensitivity_squared(
        [1.0], min_sep, n=3, max_participations=k
    ),
    "banded_inverse_sensitivity": lambda min_sep, k: (
        toeplitz.compute_banded_inverse_sensitivity_squared(3, [1.0], min_sep, k)
    ),
    "matrix upper bound": lambda min_sep, k: toeplitz.compute_banded_inverse_sensitivity_squared(
        3, [1.0], min_sep, k, use_matrix_upper_bound=True
    ),
    "optimize_banded_inverse_toeplitz": lambda min_sep, k: (
        toeplitz.optimize_banded_inverse_toeplitz(3, min_sep, 1, max_participations=k)
    ),
}


@pytest.mark.parametrize("name", LIMITED)
def test_limits_are_checked(name):
    for bad in (0, -1):
        with pytest.raises(ValueError, match=f"min_sep >= 1, found min_sep={bad}"):
            LIMITED[name](bad, None)
        with pytest.raises(ValueError, match=f"max_participations >= 1, found .*={bad}"):
            LIMITED[name](1, bad)
    with pytest.raises(TypeError, match=r"min_sep to be an integer, found 1\.5"):
        LIMITED[name](1.5, None)
    with pytest.raises(TypeError, match=r"max_participations to be an integer, found 2\.5"):
        LIMITED[name](1, 2.5)


@pytest.mark.parametrize("rhs", [1.0, [], np.ones((0, 2))])
def test_solve_banded_checks_the_shape_of_rhs(rhs):
    with pytest.raises(ValueError, match=r"rhs of shape \[n, \.\.\.\].* found shape") as error:
        toeplitz.solve_banded([1.0], rhs)
    assert str(np.shape(rhs)) in str(error.value)


@pytest.mark.parametrize("rhs", [[True, False], [1.0, 1j]])
def test_solve_banded_checks_the_type_of_rhs(rhs):
    with pytest.raises(TypeError, match="rhs to hold real numbers, found dtype"):
        toeplitz.solve_banded([1.0], rhs)


OPTIMIZED = {
    "optimize_banded_toeplitz": {"n": 4, "bands": 2},
    "optimize_banded_inverse_toeplitz": {"n": 4, "min_sep": 2, "num_bands": 2},
}


@pytest.mark.parametrize("name", OPTIMIZED)
def test_sizes_of_optimizations_are_checked(name):
    optimize, valid = getattr(toeplitz, name), OPTIMIZED[name]
    for argument in valid:
        for bad in (0, -1):
            with pytest.raises(ValueError, match=f"{argument} >= 1, found {argument}={bad}"):
                optimize(**(valid | {argument: bad}))
        with pytest.raises(TypeError, match=rf"{argument} to be an integer, found 2\.5"):
            optimize(**(valid | {argument: 2.5}))
    with pytest.raises(ValueError, match="max_optimizer_steps >= 0, found"):
        optimize(**valid, max_optimizer_steps=-1)
    with pytest.raises(TypeError, match="max_optimizer_steps to be an integer"):
        optimize(**valid, max_optimizer_steps=1.5)


def test_numbers_of_coefficients_must_fit():
    with pytest.raises(ValueError, match=r"strategy_coef of shape \(3,\), found \(2,\)"):
        toeplitz.optimize_banded_toeplitz(4, 3, [1.0, 0.5])
    for length in (3, 5):
        message = rf"workload_coef of shape \(4,\), found \({length},\)"
        with pytest.raises(ValueError, match=message):
            toeplitz.optimize_banded_inverse_toeplitz(4, 2, 2, workload_coef=np.ones(length))
