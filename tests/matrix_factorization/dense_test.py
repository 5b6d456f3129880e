from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_privacy_kernels.matrix_factorization import dense, optimization, sensitivity, toeplitz

N = 8


@pytest.fixture(scope="module")
def reference():
    return pytest.importorskip("jax_privacy.matrix_factorization.dense")


@pytest.fixture(params=[False, True], ids=["float32 mode", "x64 mode"])
def x64(request):
    with jax.enable_x64(request.param):
        yield request.param


def strategy(n, seed=0):
    """Lower-triangular and well-conditioned."""
    rng = np.random.default_rng(seed)
    return np.tril(rng.normal(size=(n, n)) / n, -1) + np.diag(rng.uniform(0.5, 2, n))


def workload(n):
    return np.tril(np.random.default_rng(9).normal(size=(n, n)))


def prefix(n):
    return np.tril(np.ones((n, n)))


def errors(A, C):
    return np.sum((A @ np.linalg.inv(np.asarray(C, np.float64))) ** 2, axis=1)


def mean_error(C, A=None):
    return np.mean(errors(prefix(len(C)) if A is None else A, C))


def skewed_mean(errors):
    return jnp.mean(errors**2)


# -- Errors of queries ------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 7])
@pytest.mark.parametrize("A", [None, workload])
def test_error_is_the_definition(n, A):
    C = strategy(n)
    given, full = (None, prefix(n)) if A is None else (A(n), A(n))
    expected = errors(full, C)
    with jax.enable_x64(True):
        by_strategy = dense.per_query_error(strategy_matrix=C, workload_matrix=given)
        by_inverse = dense.per_query_error(noising_matrix=np.linalg.inv(C), workload_matrix=given)
    np.testing.assert_allclose(by_strategy, expected, rtol=1e-12)
    np.testing.assert_allclose(by_inverse, expected, rtol=1e-12)


def test_error_by_hand():
    C = jnp.array([[1.0, 0.0], [1.0, 0.5]])  # its inverse is [[1, 0], [-2, 2]]
    np.testing.assert_allclose(dense.per_query_error(strategy_matrix=C), [1, 5], rtol=1e-6)
    A = jnp.array([[3.0, 0.0], [1.0, 1.0]])
    actual = dense.per_query_error(strategy_matrix=C, workload_matrix=A)
    np.testing.assert_allclose(actual, [9, 5], rtol=1e-6)


@pytest.mark.parametrize("columns", [4, 7])
def test_error_of_noising_matrices_that_are_not_square(columns):
    noising = np.random.default_rng(0).normal(size=(5, columns))
    A = workload(5)
    for given, full in ((None, prefix(5)), (A, A)):
        actual = dense.per_query_error(noising_matrix=noising, workload_matrix=given)
        np.testing.assert_allclose(actual, np.sum((full @ noising) ** 2, axis=1), rtol=1e-5)


def test_error_agrees_with_reference(reference, x64):
    A, C = jnp.asarray(workload(6)), jnp.asarray(strategy(6))
    for matrices in (
        {"strategy_matrix": C},
        {"strategy_matrix": C, "workload_matrix": A},
        {"noising_matrix": jnp.ones((6, 2)), "workload_matrix": A},
    ):
        actual = dense.per_query_error(**matrices)
        expected = reference.per_query_error(**matrices)
        assert actual.dtype == expected.dtype
        np.testing.assert_allclose(actual, expected, rtol=1e-12 if x64 else 1e-4)


def test_error_agrees_with_that_of_toeplitz_strategies():
    coef = np.array([1.0, 0.5, 0.25])
    C = sum(c * np.eye(9, k=-lag) for lag, c in enumerate(coef))
    actual = dense.per_query_error(strategy_matrix=C)
    np.testing.assert_allclose(actual, toeplitz.per_query_error(strategy_coef=coef, n=9), rtol=1e-5)


@pytest.mark.parametrize(
    ("C", "A", "in_x64", "expected"),
    [
        ("float32", None, False, "float32"),
        ("bfloat16", None, False, "float32"),
        ("int32", None, False, "float32"),
        ("float32", "float32", False, "float32"),
        ("float32", "float32", True, "float32"),
        ("bfloat16", "bfloat16", False, "float32"),
        ("float16", "float32", False, "float32"),
        ("float32", "float64", True, "float64"),
        ("float64", "float32", True, "float64"),
        ("float32", None, True, "float64"),
    ],
)
@pytest.mark.parametrize("name", ["strategy_matrix", "noising_matrix"])
def test_dtype_of_the_error(name, C, A, in_x64, expected):
    with jax.enable_x64(in_x64):
        matrix = jnp.array([[1, 0], [1, 1]], C)
        A = None if A is None else jnp.tri(2, dtype=A)
        actual = dense.per_query_error(**{name: matrix}, workload_matrix=A)
        assert actual.dtype == expected
        # The inverse is [[1, 0], [-1, 1]].
        expected_errors = [1, 1] if name == "strategy_matrix" else [1, 5]
        np.testing.assert_allclose(np.asarray(actual, np.float64), expected_errors)


def test_error_in_traces():
    C, A = (jnp.asarray(M, jnp.float32) for M in (strategy(5), workload(5)))
    error = jax.jit(lambda C, A: dense.per_query_error(strategy_matrix=C, workload_matrix=A))
    np.testing.assert_allclose(error(C, A), errors(A, C), rtol=1e-5)
    stacked = jnp.stack([C, 2 * C])
    mapped = jax.vmap(lambda C: dense.per_query_error(strategy_matrix=C))(stacked)
    np.testing.assert_allclose(mapped[1], mapped[0] / 4, rtol=1e-5)
    not_lower = jnp.ones((5, 5)) + jnp.eye(5)  # values are not looked at
    np.testing.assert_allclose(error(not_lower, A), errors(A, not_lower), rtol=1e-4)


def test_gradient_of_the_error():
    C, weights = strategy(4), np.arange(1.0, 5)
    lower = [np.outer(np.eye(4)[i], np.eye(4)[j]) for i in range(4) for j in range(i + 1)]
    with jax.enable_x64(True):
        total = lambda C: weights @ dense.per_query_error(strategy_matrix=C)  # noqa: E731
        gradient = np.asarray(jax.grad(total)(jnp.asarray(C)))
    step = 1e-6
    for E in lower:
        above, below = (weights @ errors(prefix(4), C + sign * step * E) for sign in (1, -1))
        np.testing.assert_allclose(np.sum(gradient * E), (above - below) / (2 * step), rtol=1e-6)


@pytest.mark.parametrize(
    ("given", "found"), [({}, "neither"), ({"strategy_matrix": 1, "noising_matrix": 1}, "both")]
)
@pytest.mark.parametrize("skip_checks", [False, True])
def test_error_needs_one_matrix(given, found, skip_checks):
    given = {name: jnp.eye(2) for name in given}
    with pytest.raises(ValueError, match=f"strategy_matrix and noising_matrix, found {found}"):
        dense.per_query_error(**given, skip_checks=skip_checks)


UPPER = np.array([[1.0, 0.5], [0.0, 1.0]])
NOT_FINITE = np.array([[1.0, 0.0], [np.nan, 1.0]])


@pytest.mark.parametrize("name", ["strategy_matrix", "noising_matrix"])
@pytest.mark.parametrize(
    ("M", "message"),
    [
        (UPPER, "lower-triangular"),
        (NOT_FINITE, "finite"),
        (np.full((2, 2), np.inf), r"finite|triangular"),
    ],
)
def test_error_checks_values(name, M, message):
    with pytest.raises(ValueError, match=message):
        dense.per_query_error(**{name: M})
    with pytest.raises(ValueError, match=message):
        dense.per_query_error(**{name: np.eye(2)}, workload_matrix=M)


@pytest.mark.parametrize("name", ["strategy_matrix", "noising_matrix"])
def test_skip_checks_leaves_values_alone(name):
    actual = dense.per_query_error(**{name: UPPER}, skip_checks=True)
    inverse = UPPER if name == "noising_matrix" else np.linalg.inv(UPPER)
    np.testing.assert_allclose(actual, np.sum((prefix(2) @ inverse) ** 2, axis=1), rtol=1e-6)
    assert np.isnan(dense.per_query_error(**{name: NOT_FINITE}, skip_checks=True)).any()


@pytest.mark.parametrize("skip_checks", [False, True])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (3, 2), (2, 2, 2)])
def test_error_checks_that_a_strategy_is_square(shape, skip_checks):
    with pytest.raises(
        ValueError, match=r"expected.*strategy_matrix.*found.*" + re.escape(str(shape))
    ):
        dense.per_query_error(strategy_matrix=jnp.ones(shape), skip_checks=skip_checks)


@pytest.mark.parametrize("skip_checks", [False, True])
@pytest.mark.parametrize("shape", [(), (3,), (2, 2, 2)])
def test_error_checks_that_a_noising_matrix_is_a_matrix(shape, skip_checks):
    with pytest.raises(
        ValueError, match=r"expected.*noising_matrix.*found.*" + re.escape(str(shape))
    ):
        dense.per_query_error(noising_matrix=jnp.ones(shape), skip_checks=skip_checks)


@pytest.mark.parametrize("skip_checks", [False, True])
@pytest.mark.parametrize("name", ["strategy_matrix", "noising_matrix"])
@pytest.mark.parametrize("shape", [(3, 3), (3, 2), (2, 3), (2,), ()])
def test_error_checks_shapes_of_workloads(name, shape, skip_checks):
    A = np.tri(*shape) if len(shape) == 2 else np.ones(shape)
    with pytest.raises(ValueError, match=None if skip_checks else "expected"):
        dense.per_query_error(**{name: np.eye(2)}, workload_matrix=A, skip_checks=skip_checks)


# -- Masks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "epochs"), [(1, 1), (4, 1), (4, 2), (6, 3), (6, 2), (5, 5)])
def test_orthogonal_mask(reference, x64, n, epochs):
    mask = dense.get_orthogonal_mask(n, epochs)
    assert mask.dtype == (jnp.float64 if x64 else jnp.float32)
    for i in range(n):
        for j in range(n):
            same_user = i % (n // epochs) == j % (n // epochs)
            assert mask[i, j] == (i == j or not same_user)
    np.testing.assert_array_equal(mask, reference.get_orthogonal_mask(n, epochs))


def test_orthogonal_mask_by_default_is_for_one_epoch():
    np.testing.assert_array_equal(dense.get_orthogonal_mask(3), np.ones((3, 3)))


@pytest.mark.parametrize(
    ("n", "epochs", "message"),
    [
        (0, 1, "n >= 1, found n=0"),
        (4, 0, "epochs >= 1, found epochs=0"),
        (4, -2, "epochs >= 1, found epochs=-2"),
        (4, 3, "epochs to divide n=4, found epochs=3"),
        (4, 8, "epochs to divide n=4, found epochs=8"),
    ],
)
@pytest.mark.parametrize("function", [dense.get_orthogonal_mask, dense.optimize])
def test_numbers_of_rounds_and_epochs_are_checked(function, n, epochs, message):
    with pytest.raises(ValueError, match=message):
        function(n, epochs=epochs)


@pytest.mark.parametrize(("n", "epochs"), [(4.5, 1), (4, 2.5), ("4", 1), (4, None)])
@pytest.mark.parametrize("function", [dense.get_orthogonal_mask, dense.optimize])
def test_types_of_rounds_and_epochs_are_checked(function, n, epochs):
    with pytest.raises(TypeError, match="to be an integer"):
        function(n, epochs=epochs)


# -- Gram matrices ----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 6])
def test_strategy_from_X(reference, n):
    C = strategy(n)
    with jax.enable_x64(True):
        actual = dense.strategy_from_X(jnp.asarray(C.T @ C))
        expected = reference.strategy_from_X(jnp.asarray(C.T @ C))
    np.testing.assert_allclose(actual, C, atol=1e-13)  # there is one with a positive diagonal
    np.testing.assert_allclose(actual, expected, atol=1e-14)
    np.testing.assert_array_equal(actual, np.tril(actual))


def test_strategy_from_X_has_a_positive_diagonal():
    C = -strategy(4)
    actual = dense.strategy_from_X(jnp.asarray(C.T @ C))
    assert np.all(np.diag(actual) > 0)
    np.testing.assert_allclose(actual.T @ actual, C.T @ C, atol=1e-5)


def test_strategy_from_X_that_is_not_positive_definite():
    assert np.isnan(dense.strategy_from_X(jnp.array([[1.0, 2.0], [2.0, 1.0]]))).any()


# -- Optimization -----------------------------------------------------------------------------


def arguments_of_callback(gradient):
    return optimization.CallbackArgs(0, jnp.zeros(()), jnp.asarray(gradient), None, None)


@pytest.mark.parametrize(
    ("gradient", "done"),
    [
        ([[0.0, 0.0], [0.0, 0.0]], True),
        ([[0.0, 5e-4], [-9e-4, 0.0]], True),
        ([[0.0, 2e-3], [0.0, 0.0]], False),
        ([[0.0, 0.0], [0.0, -2e-3]], False),
        ([[np.nan, 0.0], [0.0, 0.0]], False),
    ],
)
def test_pg_tol_termination(reference, gradient, done):
    arguments = arguments_of_callback(gradient)
    actual = dense.pg_tol_termination_fn(arguments)
    assert actual is done
    assert actual == reference.pg_tol_termination_fn(arguments)


SCHEMAS = {
    "one participation": {},
    "epochs": {"epochs": 2},
    "min_sep": {"bands": 3, "equal_norm": True},
    "banded epochs": {"epochs": 2, "bands": 4, "equal_norm": True},
    "workload": {"A": workload(N) + 3 * np.eye(N), "reduction_fn": skewed_mean},
}


@functools.cache
def optimized(schema):
    return dense.optimize(N, **SCHEMAS[schema])


@pytest.mark.parametrize("schema", SCHEMAS)
def test_optimum_is_that_of_the_reference(reference, schema):
    options = SCHEMAS[schema]
    A, reduce = options.get("A", prefix(N)), options.get("reduction_fn", np.mean)
    with jax.enable_x64(True):
        theirs = {k: jnp.asarray(v) if k == "A" else v for k, v in options.items()}
        expected = reference.optimize(N, **theirs)
    actual = optimized(schema)
    assert float(reduce(errors(A, actual))) <= float(reduce(errors(A, expected))) * (1 + 1e-5)
    np.testing.assert_allclose(actual, expected, atol=2e-3)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_sensitivity_is_one(schema):
    options, C = SCHEMAS[schema], optimized(schema)
    np.testing.assert_array_equal(C, np.tril(C))
    epochs = options.get("epochs", 1)
    assert sensitivity.fixed_epoch_sensitivity(C, epochs) == pytest.approx(1, rel=1e-6)
    norms = np.linalg.norm(C, axis=0) ** 2
    by_user = norms.reshape(epochs, -1).sum(axis=0)
    np.testing.assert_allclose(by_user, 1, rtol=1e-5)
    if options.get("equal_norm") or epochs == 1:
        np.testing.assert_allclose(norms, 1 / epochs, rtol=1e-5)


def test_sensitivity_with_a_minimum_separation():
    """Is the root of the number of participations; columns at least that apart are orthogonal."""
    C = optimized("min_sep")
    assert np.all(np.tril(C, -3) == 0)
    for k, participations in ((1, 1), (2, 2), (None, 3)):
        actual = sensitivity.get_sensitivity_banded(C, 3, k)
        assert actual == pytest.approx(participations**0.5, rel=1e-6)


@pytest.mark.parametrize("schema", ["epochs", "banded epochs"])
def test_rounds_of_one_user_are_orthogonal(schema):
    C = optimized(schema)
    X = C.T @ C
    np.testing.assert_allclose(np.diag(X, 4), 0, atol=1e-6)


def test_more_freedom_is_no_worse():
    losses = [
        mean_error(optimized(schema))
        for schema in ("one participation", "min_sep", "epochs", "banded epochs")
    ]
    assert losses[0] < losses[1]
    assert losses[2] < losses[3]
    assert mean_error(np.eye(N)) > losses[1]


def test_equal_norms_make_no_difference_to_one_epoch():
    for bands, schema in ((3, "min_sep"), (100, "one participation")):
        actual = dense.optimize(N, bands=bands, equal_norm=bands > N)
        np.testing.assert_allclose(actual, optimized(schema), atol=1e-3)


def test_optimum_of_two_rounds():
    """Against all C = [[cos, 0], [sin, 1]]."""
    C = dense.optimize(2, callback=None)
    angles = np.linspace(-1.5, 1.5, 100_001)
    matrices = np.zeros((angles.size, 2, 2))
    matrices[:, 0, 0], matrices[:, 1, 0], matrices[:, 1, 1] = np.cos(angles), np.sin(angles), 1
    B = prefix(2) @ np.linalg.inv(matrices)
    best = np.sum(B**2, axis=(1, 2)).min() / 2
    np.testing.assert_allclose(mean_error(C), best, rtol=1e-6)


def test_one_round():
    np.testing.assert_array_equal(dense.optimize(1), [[1]])


def test_no_steps():
    C = dense.optimize(8, epochs=4, max_optimizer_steps=0)
    np.testing.assert_allclose(C, np.eye(8) / 2, rtol=1e-6)


def test_optimum_is_made_in_float64_and_rounded_once():
    optima = []
    for x64, dtype in ((False, jnp.float32), (True, jnp.float64)):
        with jax.enable_x64(x64):
            optima.append(dense.optimize(3, callback=None, max_optimizer_steps=50))
            assert optima[-1].dtype == dtype
            assert jax.config.jax_enable_x64 == x64
    np.testing.assert_array_equal(optima[0], np.asarray(optima[1]).astype(np.float32))


def test_mode_is_restored_after_an_error(x64):
    def fails(errors):
        assert errors.dtype == jnp.float64
        raise RuntimeError("no loss today")

    with pytest.raises(RuntimeError, match="no loss today"):
        dense.optimize(3, reduction_fn=fails)
    assert jax.config.jax_enable_x64 == x64


def test_callback():
    seen = []

    def callback(args):
        assert isinstance(args, optimization.CallbackArgs)
        seen.append(args)
        return args.step == 2

    C = dense.optimize(6, epochs=2, bands=2, callback=callback)
    assert [args.step for args in seen] == [0, 1, 2]
    X = np.asarray(seen[-1].params)
    assert X.dtype == np.float64
    np.testing.assert_allclose(C.T @ C, X, atol=1e-6)
    np.testing.assert_allclose(seen[0].loss, mean_error(np.eye(6) / 2**0.5), rtol=1e-12)
    # Exchanges between rounds of one user, and nothing outside of the bands.
    gradient = np.asarray(seen[1].grad)
    diagonal = np.diag(gradient)
    np.testing.assert_allclose(diagonal[:3] + diagonal[3:], 0, atol=1e-12)
    lag = np.abs(np.arange(6)[:, None] - np.arange(6))
    assert np.all(gradient[lag >= 2] == 0)
    assert np.all(gradient[lag == 1] != 0)


def test_gradient_is_the_projection_of_the_derivative():
    seen = []
    A = workload(4) + 3 * np.eye(4)
    dense.optimize(4, A=A, reduction_fn=skewed_mean, max_optimizer_steps=2, callback=seen.append)
    X, step = np.asarray(seen[0].params), 1e-6  # which the second step starts from

    def loss(X):
        return np.mean(np.diag(A @ np.linalg.inv(X) @ A.T) ** 2)

    assert len(seen) == 2
    gradient = np.asarray(seen[1].grad)
    np.testing.assert_allclose(seen[1].loss, loss(X), rtol=1e-10)
    np.testing.assert_allclose(gradient, gradient.T, rtol=1e-10, atol=1e-10)
    np.testing.assert_array_equal(np.diag(gradient), 0)
    for i, j in ((1, 0), (2, 0), (3, 2)):
        E = np.zeros((4, 4))
        E[i, j] = E[j, i] = step
        numeric = (loss(X + E) - loss(X - E)) / (2 * step)
        np.testing.assert_allclose(gradient[i, j] + gradient[j, i], numeric, rtol=1e-6)


def test_default_callback_ends_once_the_gradient_is_small():
    seen = []

    def callback(args):
        seen.append(args)
        return dense.pg_tol_termination_fn(args)

    stepwise = dense.optimize(6, callback=callback)
    np.testing.assert_allclose(dense.optimize(6), stepwise, atol=2e-3)
    *before, after = [np.abs(args.grad).max() for args in seen]
    assert min(before) > 1e-3 >= after


def test_without_callback_it_goes_on():
    def largest_derivative(C):
        H = np.linalg.solve(C.T @ C, prefix(6).T)
        return np.abs(np.tril(H @ H.T / 6, -1)).max()

    with jax.enable_x64(True):
        ended, longer = (np.asarray(dense.optimize(6, **c)) for c in ({}, {"callback": None}))
    assert mean_error(longer) <= mean_error(ended)
    assert largest_derivative(ended) > 1e-5 > largest_derivative(longer)


def test_workload_of_another_dtype():
    A = 2 * jnp.tri(4, dtype=jnp.bfloat16)
    np.testing.assert_allclose(dense.optimize(4, A=A), dense.optimize(4), atol=1e-3)


@pytest.mark.parametrize(
    ("A", "message"),
    [
        (np.tril(np.ones((3, 3))), r"A of shape \(4, 4\), found \(3, 3\)"),
        (np.ones((4, 4)), "lower-triangular"),
        (np.diag([1, np.nan, 1, 1]), "finite"),
        (np.ones(4), "expected"),
        (np.ones((4, 3)), "expected"),
    ],
)
def test_workload_is_checked(A, message):
    with pytest.raises(ValueError, match=message):
        dense.optimize(4, A=A)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bands": 0}, ValueError, "bands >= 1, found"),
        ({"bands": -1}, ValueError, "bands >= 1, found"),
        ({"bands": 1.5}, TypeError, "bands to be an integer"),
        ({"max_optimizer_steps": -1}, ValueError, "max_optimizer_steps >= 0"),
        ({"max_optimizer_steps": 1.5}, TypeError, "max_optimizer_steps to be an integer"),
    ],
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        dense.optimize(4, **options)


# -- Certificates -----------------------------------------------------------------------------


def test_bound_by_hand():
    # The least of (1 / n) sum_j m_j / x_j with x_j <= 1 is reached by ones.
    A = np.diag([3.0, 2.0, 1.0])
    found = dense.certificate(np.eye(3), A=A)
    np.testing.assert_allclose(found.loss, 14 / 3, rtol=1e-14)
    np.testing.assert_allclose(found.lower_bound, 14 / 3, rtol=1e-10)
    # Where all rounds are one user's, with sum x_j <= 1, by (1 / n) (sum_j sqrt(m_j))^2.
    C = np.diag(np.sqrt([3.0, 2.0, 1.0]) / np.sqrt(6))
    found = dense.certificate(C, A=A, epochs=3)
    np.testing.assert_allclose([found.loss, found.lower_bound], 12, rtol=1e-10)


@pytest.mark.each_value
@pytest.mark.parametrize(
    ("epochs", "bands", "equal_norm"), [(1, None, False), (4, None, False), (1, 5, True)]
)
def test_optima_reach_their_bound(x64, epochs, bands, equal_norm):
    kind = {"epochs": epochs, "bands": bands, "equal_norm": equal_norm}
    C = dense.optimize(32, **kind)
    found = dense.certificate(C, **kind)
    # In float32 the bands that are left out are rounded.
    assert 0 <= found.gap <= (1.01e-5 if x64 else 1e-4)


@pytest.mark.parametrize("equal_norm", [False, True])
@pytest.mark.parametrize("epochs", [1, 4, 12])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_optima_without_limits_on_bands_take_few_steps(momentum, epochs, equal_norm):
    """From the dual, whatever the number of epochs, and for workloads that are hard for L-BFGS."""
    n, reports = 48, []
    coef = np.asarray(toeplitz.momentum_sgd_coefs(n, momentum=momentum), np.float64)
    A = np.asarray(toeplitz.materialize_lower_triangular(coef))
    kind = {"epochs": epochs, "equal_norm": equal_norm, "A": A}
    with jax.enable_x64(True):
        C = np.asarray(dense.optimize(n, **kind, report=reports.append))
        assert dense.certificate(C, **kind).gap <= 1.01e-5
        # What is asked for is exact, not just near.
        X = C.T @ C
        together = (np.asarray(dense.get_orthogonal_mask(n, epochs)) == 0) & ~np.eye(n, dtype=bool)
        np.testing.assert_allclose(X[together], 0, atol=1e-14)
        shares = np.diag(X).reshape(epochs, -1)
        np.testing.assert_allclose(shares.sum(axis=0), 1, rtol=1e-12)
        if equal_norm:
            np.testing.assert_allclose(shares, 1 / epochs, rtol=1e-12)
    (report,) = reports
    assert report.stopped == "proved"
    assert 0 <= report.gap <= 1.01e-5
    assert report.steps <= 60
    np.testing.assert_allclose(report.loss, np.mean(errors(A, C)), rtol=1e-9)


def test_steps_go_on_where_the_dual_has_too_few():
    """By L-BFGS, from what was reached."""
    reports = []
    for steps in (2, 60):
        dense.optimize(24, epochs=6, max_optimizer_steps=steps, report=reports.append)
    few, more = reports
    assert (few.stopped, few.steps) == ("max_optimizer_steps", 2)
    assert few.lower_bound <= more.loss < few.loss


def test_no_strategy_is_below_the_bound():
    rng = np.random.default_rng(1)
    A = np.tril(rng.uniform(0.5, 1, (12, 12)))
    for epochs in (1, 3):
        bounds, losses = [], []
        for size in (0.0, 0.1, 0.5):
            C = dense.optimize(12, epochs=epochs, A=A, rtol=1e-9)
            C = C + size * np.tril(rng.normal(size=(12, 12))) / 12
            found = dense.certificate(C, epochs=epochs, A=A)
            bounds.append(found.lower_bound)
            losses.append(found.loss)
        assert max(bounds) <= min(losses)
        # Whatever the strategy that it was asked for.
        np.testing.assert_allclose(bounds, min(losses), rtol=1e-4)


def test_banded_strategies_of_other_modules_are_certified():
    with jax.enable_x64(True):
        coef = toeplitz.optimize_banded_toeplitz(64, 8)
        C = toeplitz.materialize_lower_triangular(coef, 64)
        found = dense.certificate(C, bands=8, equal_norm=True)
        np.testing.assert_allclose(found.loss, toeplitz.loss(coef, 64), rtol=1e-9)
        best = dense.certificate(dense.optimize(64, bands=8, equal_norm=True), bands=8)
        assert found.lower_bound <= best.loss <= found.loss


@pytest.mark.parametrize(
    "A", [np.tri(8) * np.arange(1, 9)[:, None] ** 3.0, np.diag([1e-3, 1, 1e3])]
)
def test_optimum_of_skewed_workloads(A):
    with jax.enable_x64(True):
        C = dense.optimize(len(A), A=A)
        assert dense.certificate(C, A=A).gap <= 1.01e-5


def test_a_workload_without_a_unique_optimum_is_optimized():
    A = np.tri(6)
    A[3] = A[2]  # singular
    with jax.enable_x64(True):
        C = dense.optimize(6, A=A, max_optimizer_steps=300)
        error = float(dense.per_query_error(strategy_matrix=C, workload_matrix=A).mean())
        assert np.isfinite(error)
        assert error < float(np.mean(errors(A, np.eye(6))))


def test_certificates_take_any_limit_on_bands():
    assert dense.certificate(np.tri(3), bands=2**70) == dense.certificate(np.tri(3), bands=3)


def test_certificates_of_bad_input_are_told():
    with pytest.raises(ValueError, match="at most 1 bands, found more"):
        dense.certificate(np.tri(3), bands=1)
    with pytest.raises(ValueError, match="epochs must divide n"):
        dense.certificate(np.eye(3), epochs=2)
    with pytest.raises(ValueError, match="rtol to be positive"):
        dense.optimize(3, rtol=0.0)
