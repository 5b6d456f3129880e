from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sweeps import examples

from jax_privacy_kernels.matrix_factorization import sensitivity


@pytest.fixture(scope="module")
def reference():
    return pytest.importorskip("jax_privacy.matrix_factorization.sensitivity")


def longest_pattern(n, min_sep, limit):
    """Picks rounds greedily, which no other pattern beats."""
    rounds = range(0, n, min_sep)
    return len(rounds) if limit is None else min(len(rounds), limit)


@pytest.mark.parametrize("limit", [None, 0, 1, 2, 5, 100])
def test_max_participations_counts_the_longest_pattern(limit):
    for n in range(1, 12):
        for min_sep in range(1, 15):
            actual = sensitivity.minsep_true_max_participations(n, min_sep, limit)
            assert actual == longest_pattern(n, min_sep, limit)
            assert type(actual) is int


def test_max_participations_agrees_with_reference(reference):
    for arguments in [(10, 3), (10, 3, 2), (10, 20), (1, 1, 1), (9, 3, 7), (9, 3, 0)]:
        expected = reference.minsep_true_max_participations(*arguments)
        assert sensitivity.minsep_true_max_participations(*arguments) == expected


def test_max_participations_takes_numpy_integers():
    assert sensitivity.minsep_true_max_participations(np.int64(10), np.int32(3), np.int8(2)) == 2


def test_max_participations_of_traced_integers():
    count = sensitivity.minsep_true_max_participations
    assert jax.jit(count)(10, 3) == 4
    assert jax.jit(count)(10, 3, 2) == 2
    assert jax.jit(lambda n: count(n, 3, 2))(10) == 2
    assert jax.jit(lambda n: count(n, 3, 20))(10) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1), "n >= 1, found n=0"),
        ((5, 0), "min_sep >= 1, found min_sep=0"),
        ((5, -2), "min_sep >= 1, found min_sep=-2"),
        ((5, 1, -1), "max_participations >= 0, found max_participations=-1"),
    ],
)
def test_max_participations_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        sensitivity.minsep_true_max_participations(*arguments)


@pytest.mark.parametrize("arguments", [(5.5, 1), (5, 1.5), (5, 1, 2.5), ("5", 1)])
def test_max_participations_of_non_integers(arguments):
    with pytest.raises(TypeError, match="to be an integer"):
        sensitivity.minsep_true_max_participations(*arguments)


# -- Brute force ------------------------------------------------------------------------------

LIMITS = list(itertools.product([1, 2, 3, 7, 20], [None, 1, 2, 30]))  # min_sep, k


@functools.cache
def patterns(n, min_sep, k):
    """Indicators of all participation patterns, in rows."""
    rows = itertools.product([0, 1], repeat=n)
    rows = np.array([row for row in rows if sum(row) <= (n if k is None else k)])
    for lag in range(1, min(min_sep, n)):
        rows = rows[~np.any(rows[:, lag:] & rows[:, :-lag], axis=1)]
    return rows


def brute_force_sensitivity(C, rows):
    """Over contributions of either sign in the rounds of a pattern."""
    n = np.shape(C)[1]
    signs = np.array(list(itertools.product([-1, 1], repeat=n)))
    contributions = np.unique((rows[:, None] * signs).reshape(-1, n), axis=0)
    return np.linalg.norm(contributions @ np.asarray(C, np.float64).T, axis=1).max()


def gram(C):
    return np.asarray(C).T @ np.asarray(C)


def lower(n, bands=None, seed=0):
    """A lower-triangular strategy of entries of either sign."""
    C = np.tril(np.random.default_rng(seed).normal(size=(n, n)))
    return C if bands is None else np.triu(C, 1 - bands)


# -- Linear functions -------------------------------------------------------------------------


@pytest.mark.parametrize(("min_sep", "k"), LIMITS)
def test_linear_function_by_brute_force(min_sep, k):
    for n in (1, 6, 12) if min_sep < 4 else (9,):
        x = np.random.default_rng(n).normal(size=n)
        with jax.enable_x64(True):
            actual = sensitivity.max_participation_for_linear_fn(x, min_sep, k)
        expected = (patterns(n, min_sep, k) @ x).max()
        np.testing.assert_allclose(actual, expected, rtol=1e-14)


@settings(max_examples=examples(30))
@given(x=st.lists(st.floats(-10, 10, width=32), min_size=7, max_size=7), k=st.integers(1, 3))
def test_linear_function_of_any_numbers(x, k):
    actual = sensitivity.max_participation_for_linear_fn(np.array(x, np.float32), 2, k)
    expected = (patterns(7, 2, k) @ np.array(x)).max()
    np.testing.assert_allclose(actual, expected, rtol=1e-7, atol=1e-30)


def test_linear_function_by_hand():
    f = sensitivity.max_participation_for_linear_fn
    assert f([3.0, 5.0, 4.0], 2) == 7
    assert f([3.0, 5.0, 4.0], 2, 1) == 5
    assert f([3.0, 5.0, 4.0]) == 12
    assert f([-3.0, 5.0, -4.0]) == 5
    assert f([-3.0, -5.0], 1) == 0  # the empty pattern
    assert f([3.0, 5.0, 4.0], 10**12) == 5


def test_linear_function_adds_in_float64():
    x = np.array([1, 2**24, 1], np.float32)
    actual = sensitivity.max_participation_for_linear_fn(x)
    assert actual.dtype == jnp.float32
    assert actual == 2**24 + 2


@pytest.mark.parametrize(
    ("dtype", "x64", "expected"),
    [
        ("float32", False, "float32"),
        ("float64", False, "float32"),
        ("bfloat16", False, "float32"),
        ("int32", False, "float32"),
        ("float32", True, "float32"),
        ("float64", True, "float64"),
        ("int32", True, "float64"),
    ],
)
def test_linear_function_dtypes(dtype, x64, expected):
    with jax.enable_x64(x64):
        actual = sensitivity.max_participation_for_linear_fn(np.arange(4).astype(dtype), 2)
        assert actual.dtype == expected
        assert actual.shape == ()
        assert actual == 4


def test_linear_function_gradient():
    def f(x):
        return sensitivity.max_participation_for_linear_fn(x, 2, 2)

    for x, expected in [
        ([3.0, 5.0, 4.0, 1.0], [1, 0, 1, 0]),
        ([3.0, 9.0, 4.0, -1.0], [0, 1, 0, 0]),
        ([-1.0, -2.0, -3.0, -4.0], [0, 0, 0, 0]),
    ]:
        np.testing.assert_array_equal(jax.grad(f)(jnp.array(x)), expected)
    tie = jax.grad(lambda x: sensitivity.max_participation_for_linear_fn(x, 2))
    np.testing.assert_array_equal(tie(jnp.array([7.0, 7.0])), [0.5, 0.5])


def test_linear_function_jit_and_vmap():
    f = functools.partial(
        sensitivity.max_participation_for_linear_fn, min_sep=2, max_participations=2
    )
    x = jnp.array([[3.0, 5.0, 4.0], [-1.0, 8.0, -2.0]])
    np.testing.assert_array_equal(jax.jit(f)(x[0]), 7)
    np.testing.assert_array_equal(jax.vmap(f)(x), [7, 8])
    np.testing.assert_array_equal(jax.vmap(jax.grad(f))(x), [[1, 0, 1], [0, 1, 0]])


@pytest.mark.parametrize("x64", [False, True])
def test_linear_function_agrees_with_reference(reference, x64):
    with jax.enable_x64(x64):
        x = jnp.asarray(np.random.default_rng(0).normal(size=20))
        for limits in [(), (3,), (3, 2), (30,), (1, 5)]:
            actual = sensitivity.max_participation_for_linear_fn(x, *limits)
            expected = reference.max_participation_for_linear_fn(x, *limits)
            assert actual.dtype == expected.dtype
            np.testing.assert_allclose(actual, expected, rtol=1e-13 if x64 else 1e-6)


@pytest.mark.parametrize("x", [[], 1.0, [[1.0, 2.0]]])
def test_linear_function_checks_shapes(x):
    f = sensitivity.max_participation_for_linear_fn
    with pytest.raises(ValueError, match="x to be a non-empty 1-D array, found shape"):
        f(x)
    with pytest.raises(ValueError, match="x to be a non-empty 1-D array, found shape"):
        jax.jit(f)(jnp.asarray(x))


def test_linear_function_checks_values():
    f = sensitivity.max_participation_for_linear_fn
    with pytest.raises(ValueError, match=r"x not to hold NaN, found x\[1\] = nan"):
        f([1.0, np.nan])
    with pytest.raises(ValueError, match="NaN"):
        jax.jit(lambda: f(np.array([np.nan])))()
    assert np.isnan(jax.jit(f)(jnp.array([1.0, np.nan])))
    assert f([1.0, np.inf]) == np.inf
    assert f([1.0, -np.inf]) == 1


@pytest.mark.parametrize("x", [[1.0, 2j], [True, False]])
def test_linear_function_checks_types(x):
    with pytest.raises(TypeError, match="real"):
        sensitivity.max_participation_for_linear_fn(x)


# -- Masks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 2, 5])
@pytest.mark.parametrize("bands", [1, 2, 4, 9])
def test_masks(reference, n, bands):
    lag = np.arange(n)[:, None] - np.arange(n)
    for name, expected in (
        ("banded_lower_triangular_mask", (lag >= 0) & (lag < bands)),
        ("banded_symmetric_mask", np.abs(lag) < bands),
    ):
        actual = getattr(sensitivity, name)(n, bands)
        np.testing.assert_array_equal(actual, expected)
        assert actual.shape == (n, n)
        assert actual.dtype == jnp.int32
        np.testing.assert_array_equal(actual, getattr(reference, name)(n, bands))


@pytest.mark.parametrize(
    "mask", [sensitivity.banded_lower_triangular_mask, sensitivity.banded_symmetric_mask]
)
def test_masks_check_their_sizes(mask):
    for bands in (0, -1):
        with pytest.raises(ValueError, match=f"num_bands >= 1, found num_bands={bands}"):
            mask(3, bands)
    with pytest.raises(ValueError, match="n >= 0, found n=-1"):
        mask(-1, 1)
    for arguments in ((3.5, 1), (3, 1.5)):
        with pytest.raises(TypeError, match="to be an integer"):
            mask(*arguments)


# -- One participation ------------------------------------------------------------------------


@pytest.mark.parametrize("C", [lower(5), np.arange(6.0).reshape(2, 3), -np.ones((3, 1))])
def test_single_participation(reference, C):
    actual = sensitivity.single_participation_sensitivity(C)
    np.testing.assert_allclose(actual, np.sqrt((C**2).sum(axis=0)).max(), rtol=1e-6)
    expected = reference.single_participation_sensitivity(jnp.asarray(C))
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    assert type(actual) is type(expected)
    assert actual.dtype == expected.dtype == jnp.float32


def test_single_participation_dtypes():
    single = sensitivity.single_participation_sensitivity
    assert single(jnp.eye(2, dtype=jnp.bfloat16)).dtype == jnp.float32
    assert single([[1, 0], [2, 3]]).dtype == jnp.float32
    with jax.enable_x64(True):
        C = lower(4)
        assert single(jnp.asarray(C, jnp.float32)).dtype == jnp.float32
        np.testing.assert_allclose(single(C), np.linalg.norm(C, axis=0).max(), rtol=1e-14)


def test_single_participation_transforms():
    single = sensitivity.single_participation_sensitivity
    C = jnp.array([[3.0, 0.0], [4.0, 2.0]])
    np.testing.assert_allclose(jax.jit(single)(C), 5)
    np.testing.assert_allclose(jax.vmap(single)(jnp.stack([C, 2 * C])), [5, 10])
    np.testing.assert_allclose(jax.grad(single)(C), [[0.6, 0], [0.8, 0]], rtol=1e-6)


# -- Minimum separation -----------------------------------------------------------------------


@pytest.mark.parametrize(("min_sep", "k"), LIMITS)
def test_upper_bound_by_brute_force(min_sep, k):
    n = 7
    for C in (lower(n), np.abs(lower(n)), np.random.default_rng(1).normal(size=(3, n))):
        rows = patterns(n, min_sep, k)
        with jax.enable_x64(True):
            actual = sensitivity.get_min_sep_sensitivity_upper_bound(C, min_sep, k)
            of_X = sensitivity.get_min_sep_sensitivity_upper_bound_for_X(gram(C), min_sep, k)
        assert type(actual) is type(of_X) is float
        assert actual >= brute_force_sensitivity(C, rows) * (1 - 1e-12)
        best_columns = (np.abs(gram(C)) @ rows.T).max(axis=1)
        np.testing.assert_allclose(actual**2, (rows @ best_columns).max(), rtol=1e-12)
        np.testing.assert_allclose(of_X, actual, rtol=1e-12)


@pytest.mark.parametrize(("min_sep", "k"), [(1, None), (2, None), (3, 2), (5, None), (7, 3)])
def test_banded_strategies_by_brute_force(min_sep, k):
    n = 7
    C = lower(n, bands=min_sep)
    expected = brute_force_sensitivity(C, patterns(n, min_sep, k))
    with jax.enable_x64(True):
        actual = sensitivity.get_sensitivity_banded(C, min_sep, k)
        of_X = sensitivity.get_sensitivity_banded_for_X(gram(C), min_sep, k)
    assert type(actual) is type(of_X) is float
    np.testing.assert_allclose([actual, of_X], expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("C", "min_sep"),
    [
        (lower(4, bands=1), 1),
        (np.eye(5) + 0.1 * lower(5, bands=3), 3),
    ],
)
def test_upper_bound_is_exact_for_banded_matrices_of_large_diagonal(C, min_sep):
    expected = brute_force_sensitivity(C, patterns(len(C), min_sep, None))
    with jax.enable_x64(True):
        actual = sensitivity.get_min_sep_sensitivity_upper_bound(C, min_sep)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_upper_bound_may_exceed_the_sensitivity_of_other_banded_matrices():
    C = np.array([[2.0, 0, 0], [0, 1, 0], [0, 2, 1]])
    with jax.enable_x64(True):
        np.testing.assert_allclose(sensitivity.get_sensitivity_banded(C, 2), np.sqrt(5))
        bound = sensitivity.get_min_sep_sensitivity_upper_bound(C, 2)
    # Row 2 picks its neighbour, |X[2, 1]| = 2 > X[2, 2] = 1.
    np.testing.assert_allclose(bound, np.sqrt(6))


def test_large_banded_strategy():
    n, min_sep, k = 12, 3, 3
    C = lower(n, bands=min_sep)
    diagonal = np.diag(gram(C))
    with jax.enable_x64(True):
        actual = sensitivity.get_sensitivity_banded(C, min_sep, k)
    expected = np.sqrt((patterns(n, min_sep, k) @ diagonal).max())
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_columns_out_of_reach_may_be_orthogonal_without_bands():
    X = gram([[1.0, 0.0, 1.0], [0.0, 2.0, 0.0], [1.0, 0.0, -1.0]])
    assert sensitivity.get_sensitivity_banded_for_X(X, 2) == 2
    C = [[1.0, 1.0], [1.0, -1.0], [0.0, 0.0]]  # not square, not banded
    np.testing.assert_allclose(sensitivity.get_sensitivity_banded(C), 2, rtol=1e-6)


@pytest.mark.parametrize("name", ["get_min_sep_sensitivity_upper_bound", "get_sensitivity_banded"])
def test_monotone_in_the_limits(name):
    C = lower(8, bands=2)
    f = getattr(sensitivity, name)
    values = np.array([[f(C, min_sep, k) for k in (1, 2, 3, 4)] for min_sep in (2, 3, 4, 8)])
    assert np.all(np.diff(values, axis=1) >= -1e-6)  # more participations
    assert np.all(np.diff(values, axis=0) <= 1e-6)  # farther apart
    assert values[0, 1] > values[0, 0] > 0
    np.testing.assert_allclose(values[:, 0], values[-1, -1], rtol=1e-6)


def test_separation_beyond_n():
    C = lower(4)
    single = float(sensitivity.single_participation_sensitivity(C))
    for min_sep in (5, 10**12):
        actual = sensitivity.get_min_sep_sensitivity_upper_bound(C, min_sep)
        np.testing.assert_allclose(actual, single, rtol=1e-6)
        message = f"1 <= min_sep <= 4, the size of X, found min_sep={min_sep}"
        with pytest.raises(ValueError, match=message):
            sensitivity.get_sensitivity_banded(C, min_sep)
        with pytest.raises(ValueError, match=message):
            sensitivity.get_sensitivity_banded_for_X(gram(C), min_sep)


def test_reached_entries_are_named():
    X = np.eye(4)
    X[0, 3] = X[3, 0] = 0.25
    assert sensitivity.get_sensitivity_banded_for_X(X, 4) == 1
    with pytest.raises(ValueError, match=r"min_sep=3 apart .* found X\[0, 3\] = 0\.25"):
        sensitivity.get_sensitivity_banded_for_X(X, 3)
    with pytest.raises(ValueError, match=r"min_sep=1 apart to be orthogonal"):
        sensitivity.get_sensitivity_banded(np.tri(3), 1)


# -- Fixed epochs -----------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [1, 2, 3, 6])
def test_fixed_epochs_by_brute_force(epochs):
    n = 6
    rows = np.array([np.arange(n) % (n // epochs) == i for i in range(n // epochs)], int)
    for C in (lower(n), np.random.default_rng(1).normal(size=(2, n)), np.abs(lower(n))):
        X = gram(C)
        with jax.enable_x64(True):
            actual = sensitivity.fixed_epoch_sensitivity(C, epochs)
            of_X = sensitivity.fixed_epoch_sensitivity_for_X(X, epochs)
        assert type(actual) is type(of_X) is float
        np.testing.assert_allclose(of_X, actual, rtol=1e-12)
        squares = np.einsum("pi,ij,pj->p", rows, np.abs(X), rows)
        np.testing.assert_allclose(actual**2, squares.max(), rtol=1e-12)
        worst = brute_force_sensitivity(C, rows)
        assert actual >= worst * (1 - 1e-12)
        if np.all(X >= 0):
            np.testing.assert_allclose(actual, worst, rtol=1e-12)


def test_fixed_epochs_must_divide_n():
    for f in (sensitivity.fixed_epoch_sensitivity, sensitivity.fixed_epoch_sensitivity_for_X):
        with pytest.raises(ValueError, match="epochs to divide n=6, found epochs=4"):
            f(np.eye(6), 4)
        for epochs in (0, -1):
            with pytest.raises(ValueError, match=f"epochs >= 1, found epochs={epochs}"):
                f(np.eye(6), epochs)
        with pytest.raises(TypeError, match=r"epochs to be an integer, found 2\.5"):
            f(np.eye(6), 2.5)


# -- Matrices ---------------------------------------------------------------------------------

OF_STRATEGY = {
    "single_participation_sensitivity": (),
    "get_min_sep_sensitivity_upper_bound": (3, 2),
    "get_sensitivity_banded": (3, 2),
    "fixed_epoch_sensitivity": (3,),
}
OF_GRAM = {
    "get_min_sep_sensitivity_upper_bound_for_X": (3, 2),
    "get_sensitivity_banded_for_X": (3, 2),
    "fixed_epoch_sensitivity_for_X": (3,),
}
OF_MATRIX = OF_STRATEGY | OF_GRAM
LIMITED = [name for name in OF_MATRIX if "min_sep" in name or "banded" in name]


def call(module, name, M):
    return getattr(module, name)(M, *OF_MATRIX[name])


def argument_of(name, C):
    return gram(C) if name in OF_GRAM else C


@pytest.mark.each_value
@pytest.mark.parametrize("name", OF_MATRIX)
@pytest.mark.parametrize("x64", [False, True])
def test_agrees_with_reference(reference, name, x64):
    with jax.enable_x64(x64):
        M = jnp.asarray(argument_of(name, lower(6, bands=3)))
        actual, expected = call(sensitivity, name, M), call(reference, name, M)
    assert type(actual) is type(expected)
    np.testing.assert_allclose(actual, expected, rtol=1e-12 if x64 else 1e-5)


@pytest.mark.parametrize("name", OF_MATRIX)
def test_any_matrix_of_numbers(name):
    M = argument_of(name, np.array([[3, 0, 0], [2, 2, 0], [1, 1, 1]]))
    expected = float(call(sensitivity, name, M.astype(np.float32)))
    for kind in (list, jnp.asarray, np.ndarray.tolist, lambda M: M.astype("int8")):
        np.testing.assert_allclose(call(sensitivity, name, kind(M)), expected, rtol=1e-7)
    for half in (jnp.bfloat16, jnp.float16):
        np.testing.assert_allclose(call(sensitivity, name, jnp.asarray(M, half)), expected)


@pytest.mark.parametrize("name", OF_MATRIX)
def test_float64_under_x64(name):
    """A relative change of 1e-12 is seen."""
    C = lower(6, bands=3)
    with jax.enable_x64(True):
        low, high = (
            float(call(sensitivity, name, argument_of(name, C * f))) for f in (1, 1 + 1e-12)
        )
    np.testing.assert_allclose(high / low - 1, 1e-12, rtol=1e-2)


@pytest.mark.parametrize("name", OF_MATRIX)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_entries_must_be_finite(name, bad):
    M = argument_of(name, np.eye(3))
    M[1, 1] = bad
    with pytest.raises(
        ValueError, match=rf"matrix [CX] to be finite, found entry \(1, 1\) = {bad}"
    ):
        call(sensitivity, name, M)


@pytest.mark.parametrize("name", OF_MATRIX)
@pytest.mark.parametrize("shape", [(), (3,), (3, 3, 3)])
def test_matrices_have_two_dimensions(name, shape):
    with pytest.raises(ValueError, match=r"matrix [CX] to .*found shape") as error:
        call(sensitivity, name, np.ones(shape))
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("name", OF_STRATEGY)
def test_square_strategies_are_lower_triangular(name):
    with pytest.raises(ValueError, match="matrix C to be lower-triangular, found entry"):
        call(sensitivity, name, np.ones((3, 3)))


@pytest.mark.parametrize("name", OF_GRAM)
def test_gram_matrices_are_square_and_symmetric(name):
    with pytest.raises(ValueError, match=r"matrix X to be square, found shape \(2, 3\)"):
        call(sensitivity, name, np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"matrix X to be symmetric, found entry \(0, 1\) = 0"):
        call(sensitivity, name, np.tri(3))


@pytest.mark.parametrize("name", OF_MATRIX)
@pytest.mark.parametrize("dtype", [bool, complex])
def test_matrices_are_real(name, dtype):
    with pytest.raises(TypeError, match="matrix of real numbers, found dtype"):
        call(sensitivity, name, np.eye(3, dtype=dtype))


@pytest.mark.parametrize("name", [*LIMITED, "max_participation_for_linear_fn"])
def test_limits_are_checked(name):
    f = getattr(sensitivity, name)
    M = np.ones(3) if name not in OF_MATRIX else np.eye(3)
    for bad in (0, -1):
        with pytest.raises(ValueError, match=f"min_sep.* found min_sep={bad}"):
            f(M, bad)
        message = f"max_participations >= 1, found max_participations={bad}"
        with pytest.raises(ValueError, match=message):
            f(M, 1, bad)
    with pytest.raises(TypeError, match=r"min_sep to be an integer, found 1\.5"):
        f(M, 1.5)
    with pytest.raises(TypeError, match=r"max_participations to be an integer, found 2\.5"):
        f(M, 1, 2.5)
    expected = f(M, 2, 1)
    assert f(M, min_sep=np.int64(2), max_participations=np.int8(1)) == expected
