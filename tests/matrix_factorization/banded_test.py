from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_privacy_kernels
from jax_privacy_kernels import noise_addition
from jax_privacy_kernels.matrix_factorization import (
    banded,
    dense,
    optimization,
    sensitivity,
    streaming_matrix,
)
from jax_privacy_kernels.matrix_factorization.banded import ColumnNormalizedBanded

SHAPES = [(1, 1), (3, 1), (2, 2), (7, 3), (6, 6)]
COEFS = np.array([0.8, 0.5, -0.25])
RATES = np.array([1.0, 0.5, 0.25, 2.0])


@pytest.fixture(scope="module")
def reference():
    return pytest.importorskip("jax_privacy.matrix_factorization.banded")


@pytest.fixture(params=[False, True], ids=["float32 mode", "x64 mode"])
def x64(request):
    with jax.enable_x64(request.param):
        yield request.param


def params_of(n, bands, seed=0, dtype="float64"):
    """Parameters of a well-conditioned strategy, zero where they do not matter."""
    rng = np.random.default_rng(seed)
    params = rng.normal(size=(n, bands)) * 0.5 / bands
    params[:, 0] = rng.choice([-1, 1], n) * rng.uniform(0.5, 1.5, n)
    return np.where(outside(n, bands), 0, params).astype(dtype)


def strategy(n, bands, seed=0, dtype="float64"):
    return ColumnNormalizedBanded(jnp.asarray(params_of(n, bands, seed, dtype)))


def outside(n, bands):
    """Where parameters are no entries of C."""
    return np.add.outer(np.arange(n), np.arange(bands)) >= n


def unscaled(params):
    """P: column j of it stands in row j of the parameters."""
    n, bands = params.shape
    P = np.zeros((n, n))
    for j in range(n):
        size = min(bands, n - j)
        P[j : j + size, j] = params[j, :size]
    return P


def matrix(params):
    P = unscaled(np.asarray(params, np.float64))
    return P / np.linalg.norm(P, axis=0)


def prefix(n):
    return np.tril(np.ones((n, n)))


def momentum_matrix(momentum, rates, n):
    lag = np.arange(n)[:, None] - np.arange(n)
    M = np.where(lag >= 0, float(momentum) ** lag.clip(0), 0)
    return prefix(n) @ np.diag(np.asarray(rates)[np.minimum(np.arange(n), len(rates) - 1)]) @ M


def errors(params, A):
    return np.sum((A @ np.linalg.inv(matrix(params))) ** 2, axis=1)


# Workloads: how they are made, and what they are.
sm = streaming_matrix
STRUCTURED = {
    "default": (lambda: None, prefix),
    "prefix sums": (sm.prefix_sum, prefix),
    "sgd": (sm.momentum_sgd_matrix, prefix),
    "momentum": (
        lambda: sm.momentum_sgd_matrix(0.9),
        lambda n: momentum_matrix(0.9, [1.0], n),
    ),
    "some rates": (
        lambda: sm.momentum_sgd_matrix(0.9, jnp.asarray(RATES)),
        lambda n: momentum_matrix(0.9, RATES, n),
    ),
    "many rates": (
        lambda: sm.momentum_sgd_matrix(0.5, jnp.arange(1.0, 100.0)),
        lambda n: momentum_matrix(0.5, np.arange(1, 100), n),
    ),
    "no momentum": (
        lambda: sm.momentum_sgd_matrix(learning_rates=jnp.asarray(RATES)),
        lambda n: momentum_matrix(0.0, RATES, n),
    ),
}
OTHERS = {
    "identity": (sm.identity, np.eye),
    "diagonal": (
        lambda: sm.diagonal(jnp.asarray(RATES)),
        lambda n: np.diag(RATES[np.minimum(np.arange(n), 3)]),
    ),
    "product": (
        lambda: sm.prefix_sum() @ sm.diagonal(jnp.asarray(RATES)),
        lambda n: prefix(n) * RATES[np.minimum(np.arange(n), 3)],
    ),
    "times scalar": (lambda: sm.prefix_sum() * 2.5, lambda n: 2.5 * prefix(n)),
    "times momentum": (
        lambda: sm.momentum_sgd_matrix(0.9) @ sm.prefix_sum(),
        lambda n: momentum_matrix(0.9, [1.0], n) @ prefix(n),
    ),
}
WORKLOADS = STRUCTURED | OTHERS


# Jitted, since a function compiles faster than its operations one by one.


@functools.partial(jax.jit, static_argnums=1)
def error_of(C, A=None):
    return banded.per_query_error(C, A)


@jax.jit
def materialized(C):
    return C.materialize()


@jax.jit
def multiplied(C, x):
    return C.inverse_as_streaming_matrix() @ x


def last(errors):
    return errors[-1]


class CountsCalls:
    """A function that counts how often it is called."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.function(*args, **kwargs)


# -- The class --------------------------------------------------------------------------------


def test_materialize_by_hand():
    C = ColumnNormalizedBanded(jnp.array([[3.0, 4], [0.6, 0.8], [-8, 6], [2, 99]]))
    expected = [[0.6, 0, 0, 0], [0.8, 0.6, 0, 0], [0, 0.8, -0.8, 0], [0, 0, 0.6, 1]]
    np.testing.assert_allclose(C.materialize(), expected, rtol=1e-6)


@pytest.mark.parametrize(("n", "bands"), SHAPES)
def test_materialize(n, bands):
    C = strategy(n, bands)
    assert (C.n, C.bands) == (n, bands)
    assert type(C.n) is type(C.bands) is int
    actual = materialized(C)
    np.testing.assert_allclose(actual, matrix(C.params), rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(actual, axis=0), 1, rtol=1e-6)


def test_materialize_agrees_with_reference(reference):
    C = strategy(7, 3, dtype="float32")
    actual = C.materialize()
    expected = reference.ColumnNormalizedBanded(params=C.params).materialize()
    assert actual.dtype == expected.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype_of_parameters_is_kept(x64, dtype):
    C = jax.eval_shape(materialized, strategy(4, 2, dtype=dtype))
    assert (C.shape, C.dtype) == ((4, 4), dtype)


def test_columns_of_any_size_are_scaled():
    params = params_of(5, 3, dtype="float32")
    params *= np.array([1e25, 1e-25, 1, 1e25, 1e-25], np.float32)[:, None]
    C, expected = ColumnNormalizedBanded(jnp.asarray(params)), matrix(params)
    np.testing.assert_allclose(materialized(C), expected, rtol=1e-6)
    np.testing.assert_allclose(multiplied(C, jnp.eye(5)), np.linalg.inv(expected), atol=1e-5)
    np.testing.assert_allclose(error_of(C), errors(params, prefix(5)), rtol=1e-5)


@pytest.mark.parametrize("n", [3, 7])
def test_from_banded_toeplitz(reference, x64, n):
    C = ColumnNormalizedBanded.from_banded_toeplitz(n, jnp.asarray(COEFS))
    T = sum(c * np.eye(n, k=-lag) for lag, c in enumerate(COEFS))
    np.testing.assert_allclose(materialized(C), T / np.linalg.norm(T, axis=0), atol=1e-7)
    expected = reference.ColumnNormalizedBanded.from_banded_toeplitz(n, jnp.asarray(COEFS))
    np.testing.assert_allclose(C.params, expected.params, rtol=1e-6)
    assert C.params.dtype == expected.params.dtype
    assert np.all(C.params[outside(n, 3)] == 0)


@pytest.mark.parametrize(
    ("coefs", "dtype"),
    [
        ([2, 1], "float32"),
        (np.array([2, 1], np.float64), "float32"),
        (jnp.array([2, 1], jnp.bfloat16), "bfloat16"),
        (jnp.array([2, 1]), "float32"),
    ],
)
def test_from_banded_toeplitz_takes_any_numbers(coefs, dtype):
    C = ColumnNormalizedBanded.from_banded_toeplitz(np.int64(3), coefs)
    assert C.params.dtype == dtype
    rtol = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        np.asarray(C.params[0], np.float64), np.array([2, 1]) / np.sqrt(5), rtol=rtol
    )


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_from_banded_toeplitz_takes_coefficients_of_any_size(size):
    C = ColumnNormalizedBanded.from_banded_toeplitz(3, np.array([size, size], np.float32))
    np.testing.assert_allclose(C.params, np.sqrt([[0.5, 0.5], [0.5, 0.5], [0.5, 0]]), rtol=1e-6)


def test_from_banded_toeplitz_in_a_trace():
    C = jax.jit(lambda c: ColumnNormalizedBanded.from_banded_toeplitz(5, c))(jnp.asarray(COEFS))
    expected = ColumnNormalizedBanded.from_banded_toeplitz(5, COEFS)
    np.testing.assert_allclose(C.params, expected.params, rtol=1e-6)


@pytest.mark.parametrize(
    ("n", "coefs", "message"),
    [
        (3, [1.0, 0, 0, 0], "at most n=3 coefs, found 4"),
        (0, [1.0], "n >= 1, found n=0"),
        (-2, [1.0], "n >= 1, found n=-2"),
        (3, [], r"coefs to be a non-empty 1-D array, found shape \(0,\)"),
        (3, 1.0, r"coefs to be a non-empty 1-D array, found shape \(\)"),
        (3, [[1.0], [2.0]], r"coefs to be a non-empty 1-D array, found shape \(2, 1\)"),
        (3, [0.0, 1.0], r"coefs\[0\] to be nonzero, found coefs\[0\] = 0"),
        (3, [np.nan, 1.0], r"found coefs\[0\] = nan"),
        (3, [1.0, np.inf], r"found coefs\[1\] = inf"),
    ],
)
def test_from_banded_toeplitz_checks_values(n, coefs, message):
    with pytest.raises(ValueError, match=message):
        ColumnNormalizedBanded.from_banded_toeplitz(n, coefs)


@pytest.mark.parametrize(("n", "coefs"), [(3.5, [1.0]), ("3", [1.0]), (3, [1j]), (3, [True])])
def test_from_banded_toeplitz_checks_types(n, coefs):
    with pytest.raises(TypeError, match=r"to be an integer|real numbers"):
        ColumnNormalizedBanded.from_banded_toeplitz(n, coefs)


@pytest.mark.parametrize(("n", "bands"), [(3, 1), (5, 5)])
def test_default(reference, n, bands):
    actual = ColumnNormalizedBanded.default(n, bands).params
    expected = reference.ColumnNormalizedBanded.default(n, bands).params
    assert actual.shape == (n, bands)
    assert actual.dtype == expected.dtype
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("n", "bands", "message"),
    [(3, 4, "at most n=3"), (3, 0, "bands >= 1, found bands=0"), (0, 1, "n >= 1, found n=0")],
)
def test_default_checks_values(n, bands, message):
    with pytest.raises(ValueError, match=message):
        ColumnNormalizedBanded.default(n, bands)


@pytest.mark.parametrize(("n", "bands"), [(3.5, 2), (3, 2.5), (None, 2), (3, "2")])
def test_default_checks_types(n, bands):
    with pytest.raises(TypeError, match="to be an integer"):
        ColumnNormalizedBanded.default(n, bands)


# -- What does not matter ---------------------------------------------------------------------

garbage = pytest.mark.parametrize("value", [-1e15, np.inf, np.nan])


def with_and_without(value, n=6, bands=4):
    C = strategy(n, bands, dtype="float32")
    return jnp.where(outside(n, bands), value, C.params), C


@garbage
def test_parameters_outside_of_C_do_not_matter_to_the_matrix(value):
    params, C = with_and_without(value)
    D = ColumnNormalizedBanded(params)
    np.testing.assert_array_equal(materialized(D), materialized(C))


@garbage
def test_parameters_outside_of_C_do_not_matter_to_the_inverse(value):
    params, C = with_and_without(value)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2)), jnp.float32)
    actual = multiplied(ColumnNormalizedBanded(params), x)
    np.testing.assert_array_equal(actual, multiplied(C, x))


@functools.cache
def total_error_and_gradient(workload):
    A = WORKLOADS[workload][0]()
    return jax.jit(jax.value_and_grad(lambda C: banded.per_query_error(C, A).sum()))


@garbage
@pytest.mark.parametrize("workload", ["default", "diagonal"])
def test_parameters_outside_of_C_do_not_matter_to_the_error(value, workload):
    params, C = with_and_without(value)
    both = total_error_and_gradient(workload)
    (actual, gradient), (expected, other) = both(ColumnNormalizedBanded(params)), both(C)
    assert actual == expected
    np.testing.assert_array_equal(gradient.params, other.params)
    assert np.all(gradient.params[outside(6, 4)] == 0)


@garbage
def test_parameters_outside_of_C_do_not_matter_to_the_optimization(value):
    params, C = with_and_without(value)
    actual = banded.optimize(6, bands=4, C=ColumnNormalizedBanded(params), max_optimizer_steps=5)
    expected = banded.optimize(6, bands=4, C=C, max_optimizer_steps=5)
    inside = ~outside(6, 4)
    np.testing.assert_array_equal(actual.params[inside], expected.params[inside])
    assert np.any(actual.params[inside] != C.params[inside])


# -- The inverse ------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "bands"), SHAPES)
def test_inverse_is_the_dense_inverse(n, bands):
    with jax.enable_x64(True):
        C = strategy(n, bands)
        actual = multiplied(C, jnp.eye(n))
    np.testing.assert_allclose(actual, np.linalg.inv(matrix(C.params)), atol=1e-13)


@pytest.mark.parametrize(("n", "bands"), [(7, 3), (4, 4)])
def test_inverse_agrees_with_reference(reference, n, bands):
    C = ColumnNormalizedBanded(jnp.asarray(params_of(n, bands, dtype="float32")))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(n, 2, 3)), jnp.float32)
    expected = reference.ColumnNormalizedBanded(params=C.params).inverse_as_streaming_matrix() @ x
    actual = multiplied(C, x)
    assert actual.dtype == expected.dtype
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_state_is_the_step_and_the_last_terms():
    """Newest first, of ``P^-1 z``, before rows are scaled."""
    n, bands = 6, 4
    params, z = params_of(n, bands), np.random.default_rng(1).normal(size=(n, 2))
    x = np.concatenate([np.zeros((bands - 1, 2)), np.linalg.solve(unscaled(params), z)])
    with jax.enable_x64(True):
        inverse = ColumnNormalizedBanded(jnp.asarray(params)).inverse_as_streaming_matrix()
        state = inverse.init_multiply(jax.ShapeDtypeStruct((2,), jnp.float64))
        multiply_next = jax.jit(inverse.multiply_next)
        for t in range(n):
            step, history = state
            assert step == t
            np.testing.assert_allclose(history, x[t : t + bands - 1][::-1], atol=1e-13)
            _, state = multiply_next(jnp.asarray(z[t]), state)


def test_state_of_one_band_is_the_step():
    inverse = strategy(3, 1).inverse_as_streaming_matrix()
    step, history = inverse.init_multiply(jnp.zeros((2, 5)))
    assert (step, history.shape) == (0, (0, 2, 5))
    _, (step, history) = jax.jit(inverse.multiply_next)(jnp.ones((2, 5)), (step, history))
    assert (step, history.shape) == (1, (0, 2, 5))


def test_inverse_of_trees(x64):
    C = strategy(4, 2, dtype="float32")
    inverse = C.inverse_as_streaming_matrix()
    multiply_next = jax.jit(inverse.multiply_next)
    tree = {"a": jnp.ones(2, jnp.bfloat16), "b": [jnp.ones((), jnp.float32), jnp.ones((1, 3))]}
    state = inverse.init_multiply(tree)
    dtypes = [history.dtype for _, history in (state["a"], *state["b"])]
    assert dtypes == [jnp.float32, jnp.float32, jnp.float64 if x64 else jnp.float32]
    outputs = []
    for _ in range(4):
        output, state = multiply_next(tree, state)
        outputs.append(output)
    expected = np.linalg.inv(matrix(C.params)).sum(axis=1)
    for t, output in enumerate(outputs):
        assert jax.tree.structure(output) == jax.tree.structure(tree)
        for leaf, x in zip(jax.tree.leaves(output), jax.tree.leaves(tree), strict=True):
            np.testing.assert_allclose(leaf, np.full(x.shape, expected[t]), rtol=1e-5)


@pytest.mark.parametrize("bands", [1, 3])
def test_rows_beyond_the_size_of_C_are_nan(bands):
    C = strategy(5, bands)
    rows = multiplied(C, jnp.ones((8, 2)))
    np.testing.assert_allclose(
        rows[:5], np.linalg.inv(matrix(C.params)) @ np.ones((5, 2)), rtol=1e-5
    )
    assert np.isnan(rows[5:]).all()


def test_noise_agrees_with_reference(reference):
    theirs = pytest.importorskip("jax_privacy.noise_addition")
    params, steps = params_of(6, 3, dtype="float32"), 6
    noise = []
    for library, kind in ((noise_addition, banded), (theirs, reference)):
        C = kind.ColumnNormalizedBanded(params=jnp.asarray(params))
        privatizer = library.matrix_factorization_privatizer(
            C.inverse_as_streaming_matrix(), stddev=2.0, prng_key=jax.random.key(3)
        )
        zero = {"w": jnp.zeros((2, 3)), "b": jnp.zeros(4)}
        update, state, rows = jax.jit(privatizer.update), privatizer.init(zero), []
        for _ in range(steps):
            noisy, state = update(zero, state)
            rows.append(noisy)
        noise.append(rows)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *noise)
    assert np.std(noise[0][0]["w"]) > 0.1


# -- Bad parameters ---------------------------------------------------------------------------

USES = {
    "inverse": lambda C: C.inverse_as_streaming_matrix(),
    "error": banded.per_query_error,
    "error on a product": lambda C: banded.per_query_error(C, streaming_matrix.identity()),
    "optimization": lambda C: banded.optimize(3, bands=2, C=C, max_optimizer_steps=0),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (3, 0), (0, 0), (3, 2, 1)])
def test_shape_of_parameters_is_checked(use, shape):
    with pytest.raises(ValueError, match=r"shape \[n, b\], 1 <= b <= n, found \("):
        USES[use](ColumnNormalizedBanded(jnp.ones(shape)))


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    ("at", "value"),
    [((0, 0), 0.0), ((2, 0), 0.0), ((1, 0), np.nan), ((1, 1), np.nan), ((0, 1), -np.inf)],
)
def test_parameters_are_checked(use, at, value):
    params = np.array([[1.0, 0.5], [2.0, 0.0], [3.0, 7.0]])
    params[at] = value
    message = rf"finite, and not 0 in the first column, found params\[{at[0]}, {at[1]}\] = {value}"
    with pytest.raises(ValueError, match=message):
        USES[use](ColumnNormalizedBanded(jnp.asarray(params)))


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("dtype", ["bool", "complex64"])
def test_parameters_are_real(use, dtype):
    with pytest.raises((TypeError, ValueError), match=r"float|real"):
        USES[use](ColumnNormalizedBanded(jnp.ones((3, 2), dtype)))


def test_integer_parameters_stand_for_floats():
    """As in jax_privacy; the entries of C are none."""
    integers = ColumnNormalizedBanded(jnp.array([[3, 4], [1, 0], [2, 7]]))
    floats = ColumnNormalizedBanded(jnp.array([[3.0, 4.0], [1.0, 0.0], [2.0, 7.0]]))
    expected = [[0.6, 0, 0], [0.8, 1, 0], [0, 0, 1]]
    np.testing.assert_allclose(integers.materialize(), expected, rtol=1e-6)
    for of in (
        ColumnNormalizedBanded.materialize,
        lambda C: C.inverse_as_streaming_matrix().materialize(3),
        banded.per_query_error,
        lambda C: banded.per_query_error(C, streaming_matrix.diagonal(jnp.arange(1.0, 4))),
        lambda C: banded.optimize(3, bands=2, C=C, max_optimizer_steps=3).params,
    ):
        assert of(integers).dtype == of(floats).dtype
        np.testing.assert_array_equal(of(integers), of(floats))


def test_toeplitz_coefficients_may_be_a_row():
    row, vector = jnp.array([[3, 4]]), jnp.array([3.0, 4.0])
    made = [ColumnNormalizedBanded.from_banded_toeplitz(3, coefs).params for coefs in (row, vector)]
    np.testing.assert_array_equal(*made)
    np.testing.assert_allclose(made[0], [[0.6, 0.8], [0.6, 0.8], [0.6, 0]], rtol=1e-6)


def test_traced_parameters_are_not_checked():
    C = ColumnNormalizedBanded(jnp.array([[1.0], [0.0], [1.0]]))
    assert not np.isfinite(jax.jit(banded.per_query_error)(C)).all()


# -- A pytree ---------------------------------------------------------------------------------


def test_one_leaf():
    C = strategy(4, 2)
    leaves, structure = jax.tree.flatten(C)
    assert len(leaves) == 1
    assert leaves[0] is C.params
    assert jax.tree.unflatten(structure, leaves).params is C.params
    doubled = jax.tree.map(lambda x: 2 * x, C)
    assert isinstance(doubled, ColumnNormalizedBanded)
    np.testing.assert_array_equal(doubled.params, 2 * C.params)
    np.testing.assert_allclose(doubled.materialize(), C.materialize(), rtol=1e-6)


def test_immutable():
    C = strategy(4, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        C.params = C.params
    assert dataclasses.replace(C, params=C.params[:3]).n == 3


def test_argument_and_result_of_jit():
    C = strategy(4, 2)
    calls = CountsCalls(lambda C: ColumnNormalizedBanded(C.materialize()[:, :2]))
    step = jax.jit(calls)
    for seed in (0, 1):
        D = step(strategy(4, 2, seed))
        assert isinstance(D, ColumnNormalizedBanded)
        np.testing.assert_allclose(D.params, matrix(params_of(4, 2, seed))[:, :2], rtol=1e-6)
    assert calls.calls == 1
    assert step(strategy(5, 2)).n == 5
    assert C.n == 4


def test_donated():
    C = strategy(4, 2)
    expected = 2 * np.asarray(C.params)
    D = jax.jit(lambda C: jax.tree.map(lambda x: 2 * x, C), donate_argnums=0)(C)
    np.testing.assert_array_equal(D.params, expected)
    assert C.params.is_deleted()


def test_gradient_is_a_strategy():
    gradient = jax.grad(lambda C: C.materialize()[1, 0])(strategy(4, 2))
    assert isinstance(gradient, ColumnNormalizedBanded)
    assert gradient.params.shape == (4, 2)
    assert np.all(gradient.params[0] != 0)
    assert np.all(gradient.params[1:] == 0)


def test_mapped():
    stacked = jnp.stack([strategy(4, 2, seed).params for seed in range(3)])
    actual = jax.vmap(banded.per_query_error)(ColumnNormalizedBanded(stacked))
    for row, params in zip(actual, stacked, strict=True):
        np.testing.assert_allclose(row, errors(params, prefix(4)), rtol=1e-5)


# -- Errors of queries ------------------------------------------------------------------------


@pytest.mark.parametrize("workload", WORKLOADS)
def test_error_is_that_of_dense_matrices(workload):
    make, definition = WORKLOADS[workload]
    with jax.enable_x64(True):
        for n, bands in SHAPES if workload in ("default", "some rates") else [(7, 3)]:
            C = strategy(n, bands)
            actual = error_of(C, make())
            assert actual.shape == (n,)
            np.testing.assert_allclose(actual, errors(C.params, definition(n)), rtol=1e-12)


@pytest.mark.parametrize(("workload", "rtol"), [("default", 1e-6), ("diagonal", 1e-5)])
@pytest.mark.parametrize(("n", "bands"), [(1, 1), (9, 5)])
def test_error_in_float32(workload, rtol, n, bands):
    make, definition = WORKLOADS[workload]
    C = strategy(n, bands, dtype="float32")
    actual = banded.per_query_error(C, make())
    np.testing.assert_allclose(actual, errors(C.params, definition(n)), rtol=rtol)


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_error_agrees_with_reference(reference, momentum):
    theirs = pytest.importorskip("jax_privacy.matrix_factorization.streaming_matrix")
    C = strategy(9, 3, dtype="float32")
    A, B = (None if momentum is None else m.momentum_sgd_matrix(momentum) for m in (sm, theirs))
    expected = reference.per_query_error(reference.ColumnNormalizedBanded(params=C.params), B)
    actual = banded.per_query_error(C, A)
    assert actual.dtype == expected.dtype
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("workload", ["prefix sums", "some rates"])
def test_error_with_and_without_the_structure_of_a_workload(workload):
    A = STRUCTURED[workload][0]()
    general = streaming_matrix.StreamingMatrix(A.init_multiply, A.multiply_next)
    assert general.structure is None
    C = strategy(6, 3)
    np.testing.assert_allclose(error_of(C, A), error_of(C, general), rtol=1e-5)


def test_error_of_all_implementations():
    C = strategy(9, 4)
    expected = errors(C.params, prefix(9))
    for name in ("cpp", "jax"):
        if name == "cpp" and jax_privacy_kernels.ops._ffi.unavailable():
            continue
        with jax_privacy_kernels.implementation(name):
            lowered = jax.jit(lambda C: banded.per_query_error(C)).lower(C)
            assert ("jpk_banded_error" in lowered.as_text()) == (name == "cpp")
            np.testing.assert_allclose(banded.per_query_error(C), expected, rtol=1e-6)


def test_error_of_many_steps_is_made_in_float64():
    C = ColumnNormalizedBanded.default(3000, 4)
    narrow = banded.per_query_error(C)
    with jax.enable_x64(True):
        wide = banded.per_query_error(ColumnNormalizedBanded(C.params.astype(jnp.float64)))
    np.testing.assert_allclose(narrow, wide, rtol=5e-7)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_scan_fn_runs_other_workloads(workload):
    scan_fn, A = CountsCalls(jax.lax.scan), WORKLOADS[workload][0]()
    jax.eval_shape(lambda C: banded.per_query_error(C, A, scan_fn), strategy(6, 2))
    assert scan_fn.calls == (workload in OTHERS)


@pytest.mark.parametrize("scan_fn", ["nonsense", 3, None])
def test_scan_fn_is_checked(scan_fn):
    for call in (
        lambda: banded.per_query_error(strategy(6, 2), scan_fn=scan_fn),
        lambda: banded.optimize(6, bands=2, scan_fn=scan_fn, max_optimizer_steps=1),
    ):
        with pytest.raises(TypeError, match=f"function like jax.lax.scan, found {scan_fn!r}"):
            call()


def test_scan_fn_that_saves_memory():
    def scan_fn(step, init, xs):
        return jax.lax.scan(jax.checkpoint(step), init, xs)

    def total(scan_fn):
        return jax.value_and_grad(lambda C: banded.per_query_error(C, sm.identity(), scan_fn).sum())

    C = strategy(5, 2)
    (error, actual), (_, expected) = (jax.jit(total(f))(C) for f in (scan_fn, jax.lax.scan))
    np.testing.assert_allclose(error, errors(C.params, np.eye(5)).sum(), rtol=1e-5)
    np.testing.assert_allclose(actual.params, expected.params, rtol=1e-5)


@pytest.mark.parametrize("workload", ["default", "some rates", "product"])
@pytest.mark.parametrize(("n", "bands"), [(7, 3), (4, 1)])
def test_gradient_of_the_error(workload, n, bands):
    make, definition = WORKLOADS[workload]
    params, weights = params_of(n, bands), np.cos(np.arange(n))
    with jax.enable_x64(True):
        A = make()
        weighted = jax.jit(jax.grad(lambda C: weights @ banded.per_query_error(C, A)))
        gradient = weighted(ColumnNormalizedBanded(jnp.asarray(params))).params
    expected = numeric_gradient(lambda p: weights @ errors(p, definition(n)), params)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-7)


def numeric_gradient(f, x, step=1e-6):
    moves = step * np.eye(x.size).reshape(x.size, *x.shape)
    return np.reshape([(f(x + e) - f(x - e)) / (2 * step) for e in moves], x.shape)


def test_gradient_by_the_workload():
    params, arguments = params_of(6, 3), np.array([0.7, *RATES])

    def error(arguments):
        momentum, rates = arguments[0], arguments[1:]
        A = streaming_matrix.momentum_sgd_matrix(momentum, rates)
        return banded.per_query_error(ColumnNormalizedBanded(jnp.asarray(params)), A).sum()

    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(error))(jnp.asarray(arguments))
    expected = numeric_gradient(
        lambda a: errors(params, momentum_matrix(a[0], a[1:], 6)).sum(), arguments
    )
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


@pytest.mark.parametrize("workload", ["default", "some rates", "diagonal"])
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")],
)
def test_dtype_of_the_error(x64, dtype, expected, workload):
    if dtype == "float64" and not x64:
        expected = "float32"
    C, A = strategy(4, 2, dtype=dtype), WORKLOADS[workload][0]()
    assert jax.eval_shape(lambda C: banded.per_query_error(C, A), C).dtype == expected


# -- Sensitivity ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("min_sep", "k"), [(2, None), (2, 2), (3, None), (3, 10), (5, 1), (5, None), (20, None)]
)
def test_sensitivity(reference, min_sep, k):
    C = strategy(7, 2, dtype="float32")
    actual = banded.minsep_sensitivity_squared(C, min_sep, k)
    assert type(actual) is int
    expected = sensitivity.get_sensitivity_banded(materialized(C), min(min_sep, 7), k) ** 2
    assert actual == pytest.approx(expected, rel=1e-6)
    of_reference = reference.ColumnNormalizedBanded(params=C.params)
    assert actual == reference.minsep_sensitivity_squared(of_reference, min_sep, k)


@pytest.mark.parametrize(("bands", "min_sep", "k"), [(1, 1, 3), (2, 2, None), (3, 4, None)])
@pytest.mark.parametrize("rounds", [None, 3, 6])
def test_sensitivity_by_brute_force(bands, min_sep, k, rounds):
    """Over all contributions -1, 0, 1, in the rounds that there are, to all outputs."""
    n = 6
    C = strategy(n, bands)
    columns = matrix(C.params)[:, :rounds]
    largest = 0
    for u in itertools.product([-1, 0, 1], repeat=rounds or n):
        at = np.flatnonzero(u)
        if np.all(np.diff(at) >= min_sep) and len(at) <= (k or n):
            largest = max(largest, np.sum((columns @ u) ** 2))
    actual = banded.minsep_sensitivity_squared(C, min_sep, k, n=rounds)
    np.testing.assert_allclose(actual, largest, rtol=1e-6)


def test_sensitivity_checks_the_strategy():
    C = strategy(7, 3)
    with pytest.raises(
        ValueError, match="min_sep >= 3, the bands of the strategy, found min_sep=2"
    ):
        banded.minsep_sensitivity_squared(C, 2)
    with pytest.raises(ValueError, match="n <= 7, the size of the strategy, found n=8"):
        banded.minsep_sensitivity_squared(C, 3, n=8)
    assert banded.minsep_sensitivity_squared(C, 2, skip_checks=True) == 4
    assert banded.minsep_sensitivity_squared(C, 3, n=100, skip_checks=True) == 34


@pytest.mark.parametrize("skip_checks", [False, True])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), ValueError, "min_sep >= 1, found min_sep=0"),
        ((3, 0), ValueError, "max_participations >= 1, found max_participations=0"),
        ((3, -1), ValueError, "max_participations >= 1, found max_participations=-1"),
        ((3, None, 0), ValueError, "n >= 1, found n=0"),
        ((3.5,), TypeError, "min_sep to be an integer"),
        ((3, 1.5), TypeError, "max_participations to be an integer"),
        ((3, None, 5.5), TypeError, "n to be an integer"),
    ],
)
def test_sensitivity_checks_limits(arguments, error, message, skip_checks):
    with pytest.raises(error, match=message):
        banded.minsep_sensitivity_squared(strategy(7, 3), *arguments, skip_checks=skip_checks)


# -- Optimization -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reduction_fn", "momentum", "rtol"),
    [(jnp.mean, None, 1e-6), (last, 0.9, 1e-6)],
)
def test_as_low_as_the_reference(reference, reduction_fn, momentum, rtol):
    theirs = pytest.importorskip("jax_privacy.matrix_factorization.streaming_matrix")
    A, B = (None if momentum is None else m.momentum_sgd_matrix(momentum) for m in (sm, theirs))
    actual = banded.optimize(60, bands=4, A=A, reduction_fn=reduction_fn)
    expected = reference.optimize(60, bands=4, A=B, reduction_fn=reduction_fn)
    workload = prefix(60) if momentum is None else momentum_matrix(momentum, [1.0], 60)

    def loss(C):
        return float(reduction_fn(errors(C.params, workload)))

    assert loss(actual) <= loss(expected) * (1 + rtol)
    assert loss(actual) < 0.95 * loss(ColumnNormalizedBanded.default(60, 4))


@pytest.mark.parametrize(
    ("bands", "reduction_fn"), [(3, jnp.mean), (8, lambda errors: jnp.mean(errors**2))]
)
def test_as_low_as_dense_matrices(bands, reduction_fn):
    """Which have one minimum."""
    C = dense.optimize(8, bands=bands, equal_norm=True, reduction_fn=reduction_fn)
    D = banded.optimize(8, bands=bands, reduction_fn=reduction_fn)
    expected, actual = (
        reduction_fn(np.sum((prefix(8) @ np.linalg.inv(M)) ** 2, axis=1))
        for M in (np.asarray(C, np.float64), matrix(D.params))
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_maximum_is_lowered():
    C = banded.optimize(9, bands=3, reduction_fn=jnp.max)
    start = ColumnNormalizedBanded.default(9, 3)
    before, after = (errors(M.params, prefix(9)).max() for M in (start, C))
    assert after < 0.95 * before


def test_optimize_for_other_workloads():
    scan_fn = CountsCalls(jax.lax.scan)
    make, definition = OTHERS["product"]
    A = make()
    actual = banded.optimize(5, bands=2, A=A, scan_fn=scan_fn, max_optimizer_steps=15)
    start = ColumnNormalizedBanded.default(5, 2)
    before, after = (np.mean(errors(C.params, definition(5))) for C in (start, actual))
    assert after < 0.99 * before
    assert scan_fn.calls > 0


def test_optimize_starts_from_the_strategy_given():
    given = strategy(6, 2, seed=3, dtype="float32")
    kept = banded.optimize(6, bands=2, C=given, max_optimizer_steps=0)
    np.testing.assert_array_equal(kept.params, given.params)
    seen = []
    banded.optimize(6, bands=2, C=given, max_optimizer_steps=1, callback=seen.append)
    loss = np.mean(errors(given.params, prefix(6)))
    np.testing.assert_allclose(seen[0].loss, loss, rtol=1e-6)
    default = banded.optimize(6, bands=2, max_optimizer_steps=0)
    np.testing.assert_array_equal(default.params, ColumnNormalizedBanded.default(6, 2).params)


def test_optimize_leaves_the_strategy_given():
    given = strategy(6, 2)
    before = np.array(given.params)
    banded.optimize(6, bands=2, C=given, max_optimizer_steps=3)
    np.testing.assert_array_equal(given.params, before)


def test_callback(x64):
    seen = []

    def callback(args):
        seen.append(args)
        return args.step == 2

    result = banded.optimize(6, bands=2, callback=callback)
    assert [args.step for args in seen] == [0, 1, 2]
    for args in seen:
        assert isinstance(args, optimization.CallbackArgs)
        assert isinstance(args.params, ColumnNormalizedBanded)
        assert isinstance(args.grad, ColumnNormalizedBanded)
        assert args.params.params.dtype == jnp.float64
    assert seen[2].loss < seen[0].loss
    np.testing.assert_allclose(result.params, seen[-1].params.params, rtol=1e-7)


@pytest.mark.parametrize("callback", [None, lambda _: None])
def test_with_and_without_callback_the_result_is_the_same(callback):
    default = banded.optimize(6, bands=2, max_optimizer_steps=6)
    actual = banded.optimize(6, bands=2, max_optimizer_steps=6, callback=callback)
    np.testing.assert_allclose(actual.params, default.params, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_optimize_keeps_the_dtype(x64, dtype):
    if dtype == "float64" and not x64:
        dtype = "float32"
    given = strategy(5, 2, dtype=dtype)
    actual = banded.optimize(5, bands=2, C=given, max_optimizer_steps=3)
    assert isinstance(actual, ColumnNormalizedBanded)
    assert actual.params.dtype == dtype
    assert actual.params.shape == (5, 2)
    assert jax.config.jax_enable_x64 == x64


def test_optimize_by_default_gives_the_default_dtype(x64):
    actual = banded.optimize(5, bands=2, max_optimizer_steps=1)
    assert actual.params.dtype == (jnp.float64 if x64 else jnp.float32)


def test_mode_is_restored_after_an_error(x64):
    def fails(errors):
        assert errors.dtype == jnp.float64
        raise RuntimeError("no loss today")

    with pytest.raises(RuntimeError, match="no loss today"):
        banded.optimize(5, bands=2, reduction_fn=fails)
    assert jax.config.jax_enable_x64 == x64


def test_optimize_compiles_once():
    reduction_fn = CountsCalls(jnp.mean)
    A = streaming_matrix.momentum_sgd_matrix(0.5)
    optimize = functools.partial(
        banded.optimize, 5, bands=2, A=A, reduction_fn=reduction_fn, max_optimizer_steps=2
    )
    optimize()
    before = reduction_fn.calls
    optimize()
    optimize(C=strategy(5, 2), max_optimizer_steps=3)
    assert reduction_fn.calls == before
    optimize(A=streaming_matrix.momentum_sgd_matrix(0.6))
    assert reduction_fn.calls > before


def test_optimize_takes_any_reduction():
    class Unhashable:
        __hash__ = None

        def __call__(self, errors):
            return errors.mean()

    actual = banded.optimize(6, bands=2, reduction_fn=Unhashable())
    expected = banded.optimize(6, bands=2)
    np.testing.assert_allclose(actual.params, expected.params, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0, "bands": 1}, "n >= 1, found n=0"),
        ({"n": 5, "bands": 0}, "bands >= 1, found bands=0"),
        ({"n": 5, "bands": 6}, "at most n=5"),
        ({"n": 5, "bands": 2, "max_optimizer_steps": -1}, "max_optimizer_steps >= 0"),
        ({"n": 5, "bands": 2, "C": strategy(5, 3)}, r"shape \(5, 2\), found \(5, 3\)"),
        ({"n": 5, "bands": 2, "C": strategy(4, 2)}, r"shape \(5, 2\), found \(4, 2\)"),
    ],
)
def test_optimize_checks_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        banded.optimize(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"n": 5.5, "bands": 2},
        {"n": 5, "bands": 2.5},
        {"n": 5, "bands": None},
        {"n": 5, "bands": 2, "max_optimizer_steps": 2.5},
    ],
)
def test_optimize_checks_types(arguments):
    with pytest.raises(TypeError, match="to be an integer"):
        banded.optimize(**arguments)
