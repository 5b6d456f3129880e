"""Factorizations in closed form, against definitions; sensitivities against exhaustive search."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_privacy_kernels.matrix_factorization import dense, sensitivity, toeplitz
from jax_privacy_kernels.noise_addition import matrix_factorization_privatizer


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def product(*series):
    n = len(series[0])
    result = np.eye(1, n)[0]
    for coefs in series:
        result = np.convolve(result, np.asarray(coefs, np.float64))[:n]
    return result


def worst(C, min_sep, most):
    """The largest squared norm of a sum of columns at least min_sep apart."""
    n = C.shape[1]
    rounds = (
        r
        for k in range(1, most + 1)
        for r in itertools.combinations(range(n), k)
        if all(b - a >= min_sep for a, b in itertools.pairwise(r))
    )
    return max(np.sum(C[:, list(r)].sum(axis=1) ** 2) for r in rounds)


WORKLOADS = [None, toeplitz.momentum_sgd_coefs(9, momentum=0.5, decay=0.9), [4.0, 1.0, -1.0]]


@pytest.mark.parametrize("workload", WORKLOADS)
def test_banded_square_root(workload):
    n = 9
    root = toeplitz.banded_square_root_strategy_coefs(n, workload)
    padded = np.ones(n) if workload is None else np.pad(workload, (0, n - len(workload)))
    np.testing.assert_allclose(product(root, root), padded, rtol=1e-12, atol=1e-12)
    few = toeplitz.banded_square_root_strategy_coefs(4, workload)
    np.testing.assert_allclose(few, root[:4], rtol=1e-12)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_banded_inverse_power(workload):
    n = 9
    padded = np.ones(n) if workload is None else np.pad(workload, (0, n - len(workload)))
    half = toeplitz.banded_inverse_power_noising_coefs(n, 0.5, workload)
    expected = toeplitz.banded_inverse_square_root_noising_coefs(n, workload)
    np.testing.assert_allclose(half, expected, rtol=1e-11, atol=1e-13)
    for gamma, powers in ((1.0, 1), (0.25, 4), (0.2, 5)):
        noising = toeplitz.banded_inverse_power_noising_coefs(n, gamma, workload)
        one = product(*[noising] * powers, padded)
        np.testing.assert_allclose(one, np.eye(1, n)[0], rtol=1e-11, atol=1e-11)
    few = toeplitz.banded_inverse_power_noising_coefs(4, 0.7, workload)
    whole = toeplitz.banded_inverse_power_noising_coefs(n, 0.7, workload)
    np.testing.assert_allclose(few, whole[:4], rtol=1e-12)


# -- lambda-CGD -------------------------------------------------------------------------------


def lambda_cgd(n, lam):
    """C, by its definition."""
    C = np.linalg.inv(np.eye(n) - lam * np.eye(n, k=-1))
    return C / np.linalg.norm(C, axis=0)


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.95])
def test_lambda_cgd_is_its_definition(lam):
    matrix = toeplitz.lambda_cgd_as_streaming_matrix(7, lam)
    np.testing.assert_allclose(
        matrix.materialize(7), np.linalg.inv(lambda_cgd(7, lam)), rtol=1e-12, atol=1e-14
    )
    assert np.isnan(matrix.materialize(8)[7, 7])


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.95])
@pytest.mark.parametrize(("min_sep", "most"), [(1, 3), (2, 4), (5, 2), (20, 1)])
def test_lambda_cgd_sensitivity_is_a_bound(lam, min_sep, most):
    n = 10
    found = float(toeplitz.lambda_cgd_sensitivity_squared(n, lam, min_sep, most))
    exact = worst(lambda_cgd(n, lam), min_sep, most)
    assert exact * (1 - 1e-14) <= found
    # Tight as long as the last columns do not matter.
    longer = worst(lambda_cgd(14, lam), min_sep, most) if lam < 0.5 else 0
    assert found <= longer * 1.001 or lam > 0.5


def test_lambda_cgd_sensitivity_without_a_limit():
    limit = toeplitz.lambda_cgd_sensitivity_squared(10, 0.3, 4)
    assert limit == toeplitz.lambda_cgd_sensitivity_squared(10, 0.3, 4, 3)
    assert float(toeplitz.lambda_cgd_sensitivity_squared(10, 0.3, 4, 1)) == 1


def test_lambda_cgd_runs_fused():
    matrix = toeplitz.lambda_cgd_as_streaming_matrix(4, 0.5)
    assert matrix.structure is not None
    privatizer = matrix_factorization_privatizer(
        matrix, stddev=1.0, prng_key=jax.random.key(0), dtype=jnp.float64
    )
    state = privatizer.init(jnp.zeros(1000))
    rows = []
    for _ in range(4):
        noise, state = privatizer.update(jnp.zeros(1000), state)
        rows.append(noise)
    z = lambda_cgd(4, 0.5) @ np.stack(rows)
    np.testing.assert_allclose(np.cov(z), np.eye(4), atol=0.2)


# -- nu-DP-FTRL -------------------------------------------------------------------------------


@pytest.mark.parametrize(("nu", "value"), [(0.1, 1.4518427), (0.01, 2.1368783), (0.001, 2.8619856)])
def test_nu_dp_ftrl_sensitivity(nu, value):
    found = float(toeplitz.nu_dp_ftrl_sensitivity_squared(nu))
    np.testing.assert_allclose(found, value, rtol=3e-8)
    n = int(20 / nu)
    noising = toeplitz.nu_dp_ftrl_noising_coefs(n, nu)
    np.testing.assert_allclose(noising[:3], [1, -(1 - nu) / 2, -((1 - nu) ** 2) / 8], rtol=1e-14)
    finite = float(toeplitz.sensitivity_squared(toeplitz.inverse_coef(noising)))
    np.testing.assert_allclose(finite, found, rtol=1e-9)
    assert finite <= found


def test_nu_of_one_is_independent_noise():
    np.testing.assert_array_equal(toeplitz.nu_dp_ftrl_noising_coefs(4, 1), [1, 0, 0, 0])
    np.testing.assert_allclose(toeplitz.nu_dp_ftrl_sensitivity_squared(1), 1, rtol=1e-14)


@pytest.mark.parametrize(
    "noising", [[2.0], [1.0, -0.9], [2.0, 0.5, -0.25, 0.0], [1.0, -1.2, 0.9, -0.3], "nu"]
)
def test_stationary_sensitivity(noising):
    if isinstance(noising, str):
        noising = toeplitz.nu_dp_ftrl_noising_coefs(30, 0.05)
    found = float(toeplitz.stationary_sensitivity_squared(noising))
    coef = toeplitz.inverse_coef(noising, 2000)
    finite = float(np.sum(np.asarray(coef) ** 2))
    np.testing.assert_allclose(found, finite, rtol=1e-12)


@pytest.mark.parametrize("noising", [[1.0, -1.0], [1.0, -2.5, 1.0], [0.5, 0.0, 0.75]])
def test_a_sensitivity_without_limit_is_told(noising):
    with pytest.raises(ValueError, match="whose squares have a finite sum"):
        toeplitz.stationary_sensitivity_squared(noising)


# -- Trees ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 8, 11])
def test_honaker_tree_is_the_best_estimate_of_complete_nodes(n):
    C, noising = (np.asarray(x) for x in dense.honaker_tree(n))
    B = np.tri(n) @ noising
    np.testing.assert_allclose(B @ C, np.tri(n), atol=1e-12)
    for t in range(n):
        complete = C[:, t + 1 :].sum(axis=1) == 0
        least = np.ones(t + 1) @ np.linalg.pinv(C[complete, : t + 1])
        np.testing.assert_allclose(B[t, complete], least, atol=1e-12)
        assert not B[t, ~complete].any()
    error = dense.per_query_error(noising_matrix=noising)
    np.testing.assert_allclose(error, np.sum(B**2, axis=1), rtol=1e-12)
    nodes = n.bit_length()
    np.testing.assert_allclose(sensitivity.single_participation_sensitivity(C) ** 2, nodes)


# -- Bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: toeplitz.banded_square_root_strategy_coefs(0), "expected num_bands >= 1"),
        (lambda: toeplitz.banded_square_root_strategy_coefs(2, [-1.0]), r"workload_coef\[0\] > 0"),
        (lambda: toeplitz.banded_inverse_power_noising_coefs(2, 0.0), r"gamma to be in \(0, 1\]"),
        (lambda: toeplitz.lambda_cgd_as_streaming_matrix(3, 1.0), r"lam to be in \[0, 1\)"),
        (lambda: toeplitz.lambda_cgd_sensitivity_squared(3, 0.5, 0), "expected min_sep >= 1"),
        (lambda: toeplitz.nu_dp_ftrl_noising_coefs(3, 1.5), r"nu to be in \(0, 1\]"),
        (lambda: toeplitz.stationary_sensitivity_squared(np.ones(65)), "at most 64"),
        (lambda: dense.honaker_tree(0), "expected n >= 1"),
    ],
)
def test_bad_input_is_told(call, message):
    with pytest.raises(ValueError, match=message):
        call()
