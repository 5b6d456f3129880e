"""Numbers that others have published, for what this library computes.

A row is what is computed, the value and how far off it may be; its source stands above it. Nothing
but values: how they come about is tested elsewhere.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_privacy_kernels.matrix_factorization import buffered_toeplitz, dense, toeplitz


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


# The root of maximum error times squared sensitivity of the square root of prefix sums, which is
# the sum of its squared coefficients: Theorem 1 of https://arxiv.org/abs/2202.11205.
@pytest.mark.parametrize(
    ("n", "value", "rtol"),
    [(2, 1.25, 1e-14), (3, 1.390625, 1e-14), (10, 1.7913439, 5e-8), (1024, 3.2725542, 5e-8)],
)
def test_square_root_of_prefix_sums(n, value, rtol):
    loss = toeplitz.loss(toeplitz.optimal_max_error_strategy_coefs(n), n, jnp.max)
    np.testing.assert_allclose(np.sqrt(loss), value, rtol=rtol)


def momentum_sgd(n, decay, momentum):
    """The workload of https://arxiv.org/abs/2405.13763, equation 3."""
    k = np.arange(n)
    return np.convolve(decay**k, momentum**k)[:n]


# Sensitivities at 781 steps, 78 apart, of SGD with momentum .9 and weight decay .9999: independent
# noise, the banded square root (https://arxiv.org/abs/2405.13763) and the banded inverse square
# root (https://arxiv.org/abs/2505.12128), both of 4 bands.
@pytest.mark.parametrize(
    ("factorization", "value"), [("SGD", 3.31662488), ("BSR", 5.96654081), ("BISR", 10.61496830)]
)
def test_sensitivity_of_momentum_sgd(factorization, value):
    n, min_sep = 781, 78
    noising = toeplitz.banded_inverse_square_root_noising_coefs(n, momentum_sgd(n, 0.9999, 0.9))
    if factorization == "BISR":
        squared = toeplitz.compute_banded_inverse_sensitivity_squared(n, noising[:4], min_sep)
    else:
        bands = 4 if factorization == "BSR" else 1
        coef = toeplitz.inverse_coef(noising)[:bands] if bands > 1 else jnp.ones(1)
        squared = toeplitz.minsep_sensitivity_squared(coef, min_sep, n=n)
    np.testing.assert_allclose(np.sqrt(squared), value, rtol=1e-7)


# zCDP of a banded strategy of 2,000 rounds, 1,000 bands and unit norm, with noise of 8.35 and two
# participations: rho = sensitivity^2 / (2 stddev^2), https://arxiv.org/abs/1605.02065.
def test_zero_concentrated_privacy():
    coef = toeplitz.optimal_max_error_strategy_coefs(1000)
    coef = coef / jnp.linalg.norm(coef)
    squared = toeplitz.minsep_sensitivity_squared(coef, 1000, n=2000, max_participations=2)
    np.testing.assert_allclose(squared / (2 * 8.35**2), 0.014342572340349278, rtol=1e-14)


# Mean squared errors of optimal dense factorizations of sensitivity 1:
# https://arxiv.org/abs/2211.06530.
@pytest.mark.parametrize(
    ("epochs", "value"),
    [
        (1, 6.372668),
        (4, 27.164367),
        pytest.param(16, 176.986808, marks=pytest.mark.nightly),  # takes more than a minute
    ],
)
def test_optimal_factorization(epochs, value):
    C = dense.optimize(256, epochs=epochs)
    error = dense.per_query_error(strategy_matrix=C).mean()
    np.testing.assert_allclose(error, value, rtol=1e-5)
    assert error > value * (1 - 1e-7)


# The same where every user takes part in all 64 rounds; the sum of the errors.
def test_optimal_factorization_of_full_participation():
    C = dense.optimize(64, epochs=64)
    error = dense.per_query_error(strategy_matrix=C).sum()
    np.testing.assert_allclose(error, 119115.169, rtol=1e-6)


# The BLT of two buffers for the maximum error of 10^5 prefix sums and one participation:
# https://arxiv.org/abs/2404.16706, as computed for https://arxiv.org/abs/2408.08868.
def test_buffered_toeplitz():
    blt = buffered_toeplitz.optimize(n=10**5, min_buffers=2, max_buffers=2)
    np.testing.assert_allclose(blt.buf_decay, [0.99995289, 0.98570687], rtol=1e-5)
    np.testing.assert_allclose(blt.output_scale, [0.01228532, 0.18783937], rtol=1e-5)
