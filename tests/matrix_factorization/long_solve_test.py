"""Long Toeplitz systems, by halves: as forward substitution solves them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_privacy_kernels import ops
from jax_privacy_kernels.matrix_factorization import _long_solve, toeplitz


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def residual(coef, x, rhs):
    """The largest of ``|C x - rhs|``, relative to the sizes of the terms of each sum."""
    n = len(rhs)
    found = np.asarray(toeplitz.multiply(coef, x, n)) - rhs
    sizes = np.asarray(toeplitz.multiply(np.abs(coef), np.abs(x), n)) + np.abs(rhs)
    return np.max(np.abs(found) / sizes)


@pytest.mark.parametrize("n", [63, 64, 65, 127, 200])
@pytest.mark.parametrize("bands", [1, 5, 64, 150])
def test_halves_of_any_size(monkeypatch, n, bands):
    monkeypatch.setattr(_long_solve, "_LEAF", 16)
    rng = np.random.default_rng(n * bands)
    coef = np.concatenate([[2.0], rng.normal(size=bands - 1) / bands])
    rhs = rng.normal(size=n)
    expected = ops.toeplitz_solve(jnp.asarray(coef[:n]), jnp.asarray(rhs))
    np.testing.assert_allclose(_long_solve.solve(coef, rhs), expected, rtol=1e-11, atol=1e-13)


def test_a_long_inverse_is_exact():
    n = 2**17 + 5
    coef = toeplitz.optimal_max_error_strategy_coefs(n)
    assert _long_solve.is_long(n, n)
    found = np.asarray(toeplitz.inverse_coef(coef))
    expected = np.asarray(toeplitz.optimal_max_error_noising_coefs(n))
    # Forward substitution is bound to n units of the sizes of its terms; it is far better.
    assert residual(np.asarray(coef), found, np.eye(1, n)[0]) < 1e-13
    np.testing.assert_allclose(found[:2000], expected[:2000], rtol=1e-9)


def test_long_systems_keep_their_dtype():
    n = 2**17
    coef = np.zeros(n, np.float32)
    coef[[0, n - 1]] = 2.0, 1.0
    rhs = np.zeros(n, np.float32)
    rhs[0] = 1
    x = toeplitz.solve_banded(coef, rhs)
    assert x.dtype == jnp.float32
    assert x[0] == 0.5
    assert x[-1] == -0.25
    assert jnp.count_nonzero(x) == 2
