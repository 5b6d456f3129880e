"""Workloads other than prefix sums, and participation patterns, wherever there is an optimum."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import sweeps

from jax_privacy_kernels.matrix_factorization import (
    banded,
    buffered_toeplitz,
    streaming_matrix,
    toeplitz,
)

RATES = np.array([1.0, 0.5, 2.0, 0.25])


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def momentum_sgd(n, momentum=0.0, decay=1.0, rates=(1.0,)):
    """By its recursion, on the columns of the identity."""
    A, moment, iterate = np.zeros((n, n)), np.zeros(n), np.zeros(n)
    for t in range(n):
        moment = momentum * moment + np.eye(n)[t]
        iterate = decay * iterate + rates[min(t, len(rates) - 1)] * moment
        A[t] = iterate
    return A


def dense(coef, n):
    return sum(c * np.eye(n, k=-lag) for lag, c in enumerate(np.asarray(coef, np.float64)))


def errors(A, C):
    return np.sum((A @ np.linalg.inv(C)) ** 2, axis=1)


def rmse(coef, n, workload, min_sep, k):
    error = toeplitz.per_query_error(strategy_coef=coef, n=n, workload_coef=workload).mean()
    squared = toeplitz.minsep_sensitivity_squared(coef, min_sep, n=n, max_participations=k)
    return float(np.sqrt(error * squared))


# -- Definitions ------------------------------------------------------------------------------


@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 1.0), (0.9, 1.0), (0.0, 0.9), (0.5, 0.5)])
def test_coefs_are_those_of_the_recursion(momentum, decay):
    coefs = toeplitz.momentum_sgd_coefs(7, momentum=momentum, decay=decay)
    np.testing.assert_allclose(coefs, momentum_sgd(7, momentum, decay)[:, 0], rtol=1e-14)


@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_matrix_is_that_of_the_recursion(decay):
    A = streaming_matrix.momentum_sgd_matrix(0.7, jnp.asarray(RATES), decay=decay)
    np.testing.assert_allclose(A.materialize(6), momentum_sgd(6, 0.7, decay, RATES), rtol=1e-14)


# 1e-60 leaves the range in which iterates are followed: rows are then multiplied one by one.
@pytest.mark.parametrize("decay", [1.0, 0.9, 1e-60])
def test_errors_are_the_definition(decay):
    n, coef = 9, np.array([1.0, 0.4, 0.2])
    A = streaming_matrix.momentum_sgd_matrix(0.7, jnp.asarray(RATES), decay=decay)
    expected = errors(momentum_sgd(n, 0.7, decay, RATES), dense(coef, n))
    found = toeplitz.per_query_error(strategy_coef=coef, n=n, A=A)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    C = banded.ColumnNormalizedBanded.from_banded_toeplitz(n, coef)
    expected = errors(momentum_sgd(n, 0.7, decay, RATES), np.asarray(C.materialize()))
    np.testing.assert_allclose(banded.per_query_error(C, A), expected, rtol=1e-12)


@pytest.mark.parametrize("coef", [[2.0], [2.0, -0.5, 0.25]])
def test_errors_of_a_workload_without_structure(coef):
    A = streaming_matrix.diagonal(jnp.asarray(RATES)) @ streaming_matrix.prefix_sum()
    expected = errors(np.diag([*RATES, RATES[-1]]) @ np.tri(5), dense(coef, 5))
    found = toeplitz.per_query_error(strategy_coef=coef, n=5, A=A)
    np.testing.assert_allclose(found, expected, rtol=1e-13)


def test_loss_is_error_times_squared_sensitivity():
    n, coef = 8, np.array([1.0, 0.5, 0.25])
    A = momentum_sgd(n, 0.5, 0.9)
    C = dense(coef, n)
    squared = np.sum(C[:, [0, 2, 4]].sum(axis=1) ** 2)
    expected = errors(A, C).mean() * squared
    for workload in (
        {"workload_coef": A[:, 0]},
        {"A": streaming_matrix.momentum_sgd_matrix(0.5, decay=0.9)},
    ):
        found = toeplitz.loss(coef, n, **workload, min_sep=2, max_participations=3)
        np.testing.assert_allclose(found, expected, rtol=1e-13)
    gradient = jax.grad(lambda c: toeplitz.loss(c, n, workload_coef=A[:, 0], min_sep=2))(
        jnp.asarray(coef)
    )
    step = 1e-6 * np.eye(3)
    numeric = [
        (
            toeplitz.loss(coef + e, n, workload_coef=A[:, 0], min_sep=2)
            - toeplitz.loss(coef - e, n, workload_coef=A[:, 0], min_sep=2)
        )
        / 2e-6
        for e in step
    ]
    np.testing.assert_allclose(gradient, numeric, rtol=1e-6)


# -- Optima -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "bands", "k", "decay", "prefix", "square_root", "best"),
    [
        (256, 32, 8, 1.0, 68.67, 62.16, 61.86),
        pytest.param(980, 98, 10, 0.9999, 92.82, 86.06, 84.20, marks=pytest.mark.nightly),
    ],
)
def test_optimum_for_momentum(n, bands, k, decay, prefix, square_root, best):
    workload = toeplitz.momentum_sgd_coefs(n, momentum=0.9, decay=decay)
    of_prefix = toeplitz.optimize_banded_toeplitz(n, bands)
    np.testing.assert_allclose(rmse(of_prefix, n, workload, bands, k), prefix, rtol=1e-4)
    noising = toeplitz.banded_inverse_square_root_noising_coefs(bands, workload)
    root = toeplitz.inverse_coef(noising)
    np.testing.assert_allclose(rmse(root, n, workload, bands, k), square_root, rtol=1e-4)
    coef = toeplitz.optimize_banded_toeplitz(n, bands, workload_coef=workload)
    assert rmse(coef, n, workload, bands, k) < best


def test_optimum_for_learning_rates():
    n, bands = 64, 8
    rates = jnp.asarray(0.5 * (1 + np.cos(np.pi * np.arange(n) / n)))
    A = streaming_matrix.momentum_sgd_matrix(0.9, rates, decay=0.999)
    constant = toeplitz.momentum_sgd_coefs(n, momentum=0.9, decay=0.999)
    coef = toeplitz.optimize_banded_toeplitz(n, bands, A=A)
    other = toeplitz.optimize_banded_toeplitz(n, bands, workload_coef=constant)
    assert float(toeplitz.loss(coef, n, A=A)) < (1 - 5e-5) * float(toeplitz.loss(other, n, A=A))
    free = banded.optimize(n, bands=bands, A=A)
    assert float(banded.per_query_error(free, A).mean()) < float(toeplitz.loss(coef, n, A=A))


def test_more_bands_than_steps_between_participations():
    n, min_sep, k = 512, 32, 16
    blind = toeplitz.optimize_banded_toeplitz(n, 64)
    np.testing.assert_allclose(rmse(blind, n, None, min_sep, k), 16.60, rtol=1e-3)
    few = rmse(toeplitz.optimize_banded_toeplitz(n, 32), n, None, min_sep, k)
    np.testing.assert_allclose(few, 15.40, rtol=1e-3)
    coef = toeplitz.optimize_banded_toeplitz(n, 64, min_sep=min_sep, max_participations=k)
    assert coef.shape == (64,)
    np.testing.assert_allclose(jnp.linalg.norm(coef), 1, rtol=1e-14)
    assert rmse(coef, n, None, min_sep, k) <= few * (1 + 1e-12)


def test_separation_that_costs_nothing_changes_nothing():
    free = toeplitz.optimize_banded_toeplitz(50, 8)
    apart = toeplitz.optimize_banded_toeplitz(50, 8, min_sep=8, max_participations=3)
    np.testing.assert_allclose(apart, free, rtol=1e-5)


def test_buffers_for_a_workload():
    n, min_sep, k = 200, 50, 4
    workload = toeplitz.momentum_sgd_coefs(n, momentum=0.9, decay=0.999)
    common = {"n": n, "min_sep": min_sep, "max_participations": k, "error": "mean"}
    blt = buffered_toeplitz.optimize(**common, max_buffers=2, workload_coef=workload)
    of_prefix = buffered_toeplitz.optimize(**common, max_buffers=2)
    loss_fn = buffered_toeplitz.LossFn.build_min_sep(n, "mean", min_sep, k, workload_coef=workload)
    coef = blt.toeplitz_coefs(n)
    np.testing.assert_allclose(
        np.sqrt(loss_fn.loss(blt)), rmse(coef, n, workload, min_sep, k), rtol=1e-9
    )
    assert float(loss_fn.loss(blt)) < 0.99 * float(loss_fn.loss(of_prefix))


def test_amplified_optimum_for_a_workload():
    n = 64
    target = {
        "dataset_size": 2000,
        "expected_batch_size": 50,
        "epsilon": 2.0,
        "delta": 1e-5,
        "progress": None,
    }
    workload = toeplitz.momentum_sgd_coefs(n, momentum=0.9)

    def error(coef, stddev):
        squared = toeplitz.per_query_error(strategy_coef=coef, n=n, workload_coef=workload).mean()
        return stddev * float(squared) ** 0.5

    own = toeplitz.optimize_coefs_for_amplifications(n, **target, workload_coef=workload)
    assert error(*own) < error(*toeplitz.optimize_coefs_for_amplifications(n, **target))


# Ten runs: steps, separation, participations, coefficients, momentum, decay, and the least loss
# that a wide multi-start found: 55 to 2,506 starts of BFGS each.
LEAST_LOSSES = [
    (980, 98, 10, 4, 0.9, 0.9999, 7999.07342),
    (256, 16, 16, 3, 0.95, 0.999, 41946.9538),
    (512, 64, 8, 4, 0.0, 1.0, 109.091949),
    (512, 64, 8, 16, 0.0, 1.0, 96.7083973),
    (600, 150, 2, 12, 0.5, 0.9999, 63.1281763),
    (1000, 100, 10, 8, 0.9, 1.0, 8467.53862),
    (1024, 1024, 1, 4, 0.0, 1.0, 15.8196264),
    (1192, 149, 8, 5, 0.9, 0.9999, 5956.11487),
    (2000, 100, 20, 6, 0.0, 1.0, 499.686705),
    (2048, 512, 4, 8, 0.0, 1.0, 71.4569606),
]


@pytest.mark.parametrize("case", sweeps.cases(LEAST_LOSSES, LEAST_LOSSES[:2]))
def test_banded_inverse_from_several_starts(case):
    n, min_sep, k, p, momentum, decay, least = case
    workload = toeplitz.momentum_sgd_coefs(n, momentum=momentum, decay=decay)

    def loss(coef):
        error = toeplitz.per_query_error(noising_coef=coef, n=n, workload_coef=workload).mean()
        squared = toeplitz.compute_banded_inverse_sensitivity_squared(
            n, coef, min_sep, k, use_matrix_upper_bound=False
        )
        return float(error * squared)

    coef = toeplitz.optimize_banded_inverse_toeplitz(
        n, min_sep, p, workload_coef=workload, max_participations=k
    )
    found = loss(coef)
    assert found <= least * (1 + 1e-5)
    for gamma in (0.5, 0.6, 0.7, 0.8, 0.9):
        assert found <= loss(toeplitz.banded_inverse_power_noising_coefs(p, gamma, workload))


@pytest.mark.parametrize("workload", [[0.0, 1.0, 2.0, 3.0], [-1.0, -1.0, -1.0, -1.0]])
def test_banded_inverse_for_a_workload_without_a_root(workload):
    found = []
    coef = toeplitz.optimize_banded_inverse_toeplitz(
        4, 2, 2, workload_coef=workload, report=found.append
    )
    A, noising = dense(workload, 4), dense(coef, 4)
    squared = toeplitz.compute_banded_inverse_sensitivity_squared(
        4, coef, 2, use_matrix_upper_bound=False
    )
    expected = np.sum((A @ noising) ** 2) / 4 * float(squared)
    np.testing.assert_allclose(found[0].loss, expected, rtol=1e-12)
    independent = np.sum(A**2) / 4 * 2
    assert found[0].loss < independent or workload[0] == 0


def test_sensitivities_of_banded_inverses_are_tight_by_default():
    n, k, min_sep = 980, 10, 98
    coef = toeplitz.optimize_banded_inverse_toeplitz(n, min_sep, 4, max_participations=k)
    squared = [
        float(
            toeplitz.compute_banded_inverse_sensitivity_squared(
                n, coef, min_sep, k, use_matrix_upper_bound=matrix
            )
        )
        for matrix in (None, True, False)
    ]
    assert squared[0] == squared[1] <= squared[2]
    # Coefficients that rise are where they differ.
    rising = [float(x) for x in toeplitz.inverse_coef(jnp.array([1.0, 0.8, 0.9, 0.85]))]
    args = 4, rising, 2, 2
    of_default = toeplitz.compute_banded_inverse_sensitivity_squared(*args)
    loose = toeplitz.compute_banded_inverse_sensitivity_squared(*args, use_matrix_upper_bound=False)
    C = dense([1.0, 0.8, 0.9, 0.85], 4)
    exact = max(np.sum(C[:, r].sum(axis=1) ** 2) for r in ([0, 2], [0, 3], [1, 3], [0], [1]))
    assert exact * (1 - 1e-12) <= float(of_default) < 0.999 * float(loose)


# -- Bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: toeplitz.momentum_sgd_coefs(0), "expected n >= 1"),
        (lambda: toeplitz.momentum_sgd_coefs(3, momentum=1.0), r"momentum to be in \[0, 1\)"),
        (lambda: toeplitz.momentum_sgd_coefs(3, decay=0.0), r"decay to be in \(0, 1\]"),
        (lambda: streaming_matrix.momentum_sgd_matrix(decay=1.5), r"decay to be in \(0, 1\]"),
        (
            lambda: toeplitz.optimize_banded_toeplitz(4, 2, workload_coef=[1.0, np.nan]),
            "workload_coef to be finite",
        ),
        (lambda: toeplitz.optimize_banded_toeplitz(4, 2, min_sep=0), "expected min_sep >= 1"),
        (
            lambda: toeplitz.optimize_banded_toeplitz(4, 2, max_participations=2),
            "expected min_sep with max_participations=2",
        ),
        (
            lambda: toeplitz.optimize_banded_toeplitz(
                4, 2, workload_coef=[1.0], A=streaming_matrix.prefix_sum()
            ),
            "expected workload_coef or A",
        ),
        (
            lambda: toeplitz.per_query_error(noising_coef=[1.0], A=streaming_matrix.prefix_sum()),
            "expected A with strategy_coef alone",
        ),
    ],
)
def test_bad_input_is_told(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_workload_that_is_no_streaming_matrix_is_told():
    with pytest.raises(TypeError, match="expected A to be a StreamingMatrix"):
        toeplitz.optimize_banded_toeplitz(4, 2, A=np.tri(4))
