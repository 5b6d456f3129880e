"""Derivatives of the ops on coefficients: of any order, forward and in reverse, by definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_privacy_kernels import ops
from jax_privacy_kernels.ops.banded_error import _jax as plain_banded_error

RNG = np.random.default_rng(0)
COEF = np.array([2.0, -0.3, 0.7, 0.1])
RHS, WEIGHT = RNG.normal(size=(2, 6, 2))
MODES = {
    "reverse": jax.grad,
    "forward": jax.jacfwd,
    "forward over reverse": jax.hessian,
    "reverse over forward": lambda f: jax.jacrev(jax.jacfwd(f)),
}


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=["jax", "cpp"])
def implementation(request):
    try:
        with ops.implementation(request.param):
            ops.min_sep_norm(jnp.ones(1), n=1, min_sep=1, max_participations=1)
    except ValueError as error:
        pytest.skip(str(error))
    return request.param


def check(function, definition, x, modes=MODES):
    expected = {}  # of the definition, however it is come by
    for derivative in modes.values():
        actual = jax.jit(derivative(function))(x)
        of = jax.grad if actual.ndim == 1 else jax.hessian
        if of not in expected:
            expected[of] = jax.jit(of(definition))(x)
        np.testing.assert_allclose(actual, expected[of], rtol=1e-9, atol=1e-9)


def matrix(coef, transpose):
    T = sum(coef[lag] * jnp.eye(6, k=-lag) for lag in range(len(coef)))
    return T.T if transpose else T


def both(function):
    """A loss of a vector that holds coefficients and right-hand sides: their mixed ones as well."""

    def loss(x):
        out = function(x[:4], x[4:].reshape(6, 2))
        return jnp.sum(WEIGHT[: len(out)] * out**2)

    return loss


@pytest.mark.each_value
@pytest.mark.parametrize("transpose", [False, True])
def test_toeplitz_ops(implementation, transpose):
    options = {"transpose": transpose, "implementation": implementation}
    x = np.concatenate([COEF, RHS.ravel()])
    check(
        both(lambda c, r: ops.toeplitz_multiply(c, r, rows=4, **options)),
        both(lambda c, r: (matrix(c, transpose) @ r)[:4]),
        x,
    )
    check(
        both(lambda c, r: ops.toeplitz_solve(c, r, **options)),
        both(lambda c, r: jnp.linalg.solve(matrix(c, transpose), r)),
        x,
    )


def test_min_sep_norm(implementation):
    window = sum(np.eye(7, k=-2 * j) for j in range(3))

    def norm(c):
        return ops.min_sep_norm(
            c, n=7, min_sep=2, max_participations=3, implementation=implementation
        )

    def of_decreasing(c):
        return jnp.sum((window @ jnp.pad(c, (0, 2))) ** 2)

    check(norm, of_decreasing, np.array([1.0, 0.8, 0.5, 0.3, 0.1]))
    # Coefficients that are not decreasing go with those behind them that are larger.
    check(
        norm,
        lambda c: of_decreasing(jnp.array([c[0], -c[2], -c[2], c[3], c[4]])),
        np.array([1.0, 0.2, -0.5, 0.3, 0.1]),
    )
    # The slope to the right, also where coefficients are 0.
    zeros = np.array([1.0, 0.5, 0.0, 0.0, 0.0])
    check(norm, of_decreasing, zeros, {"reverse": jax.grad, "forward": jax.jacfwd})


def test_participation_max(implementation):
    def largest(x):
        return ops.participation_max(
            x, min_sep=2, max_participations=2, implementation=implementation
        )

    x = np.array([0.3, 1.0, -0.5, 0.7, 0.2])
    check(largest, lambda x: x[1] + x[3], x)
    rows = jax.vmap(jax.jacfwd(largest))(np.stack([x, -x]))
    np.testing.assert_array_equal(rows, [[0, 1, 0, 1, 0], [0, 0, 1, 0, 0]])


@pytest.mark.slow
def test_banded_error(implementation):
    rows = RNG.normal(size=(6, 3)) + np.array([3.0, 0.0, 0.0])
    scale, rates, momentum = 1 + RHS[:, 0] ** 2, 1 + RHS[:, 1] ** 2, 0.3
    started = np.arange(6)[:, None] >= np.arange(3)

    def loss(error, rows, scale, rates, momentum):
        return jnp.sum(WEIGHT[:, 0] * error(rows, scale, rates, momentum) ** 2)

    def function(x):
        return loss(
            lambda *args: ops.banded_error(*args, implementation=implementation),
            *(x[:18].reshape(6, 3), x[18:24], rates, x[24]),
        )

    def definition(x):
        rows = jnp.where(started, x[:18].reshape(6, 3), 0)
        return loss(plain_banded_error.errors, rows, x[18:24], jnp.asarray(rates), x[24])

    check(function, definition, np.concatenate([rows.ravel(), scale, [momentum]]))


def test_derivatives_map_and_linearize(implementation):
    def f(c):
        return jnp.sum(ops.toeplitz_solve(c, RHS, implementation=implementation) ** 2)

    stacked = jnp.stack([COEF, 2 * COEF])
    for derivative in (jax.grad, jax.jacfwd, jax.hessian):
        one_by_one = [derivative(f)(c) for c in stacked]
        np.testing.assert_allclose(jax.vmap(derivative(f))(stacked), one_by_one, rtol=1e-12)
    value, tangent = jax.linearize(f, stacked[0])
    np.testing.assert_allclose(tangent(stacked[0]), jax.grad(f)(stacked[0]) @ stacked[0])
    assert float(value) == pytest.approx(float(f(stacked[0])))
