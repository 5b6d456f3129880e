"""Every implementation of participation_max against the definition, by all sets of rounds, and
against the dynamic program as JAX differentiates it.

Both make the same sums in the same order, so values may differ by the rounding of the result only.
Gradients are sums of powers of one half, exact unless ties follow ties.
"""

from __future__ import annotations

import functools
import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import coefficients, implementations, sweeps

from jax_privacy_kernels.ops import participation_max
from jax_privacy_kernels.ops.participation_max import IMPLEMENTATIONS

implementation = implementations.fixture(IMPLEMENTATIONS)


def op(min_sep, k, implementation=None):
    return functools.partial(
        participation_max, min_sep=min_sep, max_participations=k, implementation=implementation
    )


def of_rows(function):
    """Values and gradients of a function, for the rows of an array."""
    return jax.jit(jax.vmap(jax.value_and_grad(function)))


def patterns(n, min_sep, k):
    """All sets of rounds that a user may take part in."""
    for size in range(min(n, k) + 1):
        for rounds in itertools.combinations(range(n), size):
            if np.all(np.diff(rounds) >= min_sep):
                yield list(rounds)


@functools.cache  # one function for all implementations
def dynamic_program(min_sep, k):
    """F(0, k), element by element, for JAX to differentiate."""

    def value(x):
        n = len(x)
        F = [[0.0] * (k + 1) for _ in range(n + min_sep)]
        for i, j in itertools.product(reversed(range(n)), range(1, k + 1)):
            F[i][j] = jnp.maximum(x[i] + F[i + min_sep][j - 1], F[i + 1][j])
        return jnp.asarray(F[0][k], x[0].dtype)

    return value


def tables(x, min_sep, max_participations):
    """Value and gradient for rows x, by the tables of the dynamic program and of its weights."""
    x, k = np.asarray(x, np.float64), max_participations
    rows, n = x.shape
    later = [min(i + min_sep, n) for i in range(n)]
    F, weights = np.zeros((n + 1, rows, k + 1)), np.zeros((n + 1, rows, k + 1))
    for i in reversed(range(n)):
        F[i, :, 1:] = np.maximum(x[:, i, None] + F[later[i], :, :-1], F[i + 1, :, 1:])
    gradient = np.zeros_like(x)
    weights[0, :, k] = 1
    for i in range(n):
        take, skip = x[:, i, None] + F[later[i], :, :-1], F[i + 1, :, 1:]
        part = weights[i, :, 1:] * np.where(take > skip, 1, np.where(take == skip, 0.5, 0))
        weights[later[i], :, :-1] += part
        weights[i + 1, :, 1:] += weights[i, :, 1:] - part
        gradient[:, i] = part.sum(axis=1)
    return F[0, :, k], gradient


def numbers(kind, rows, n, seed):
    rng = np.random.default_rng(seed)
    if kind == "ties":
        return rng.integers(-2, 3, (rows, n))
    sizes = rng.standard_normal((rows, n))
    return {"normal": sizes, "positive": np.abs(sizes), "negative": -np.abs(sizes)}[kind]


# All vectors of -1, 0, 1, and limits that bind and that do not.
TIES = np.array(list(itertools.product([-1.0, 0.0, 1.0], repeat=5)))
LIMITS = [(1, 0), (1, 3), (1, 5), (2, 2), (2, 3), (9, 7)]


@functools.cache
def jax_on_ties(min_sep, k):
    return of_rows(dynamic_program(min_sep, k))(TIES)


class TestImplementation:
    """What holds for every implementation."""

    @pytest.mark.parametrize(("min_sep", "k"), LIMITS)
    def test_ties(self, implementation, min_sep, k):
        function = of_rows(op(min_sep, k, implementation))
        value, gradient = function(TIES.astype(np.float32))
        sums = [TIES[:, rounds].sum(axis=1) for rounds in patterns(5, min_sep, k)]
        np.testing.assert_array_equal(value, np.max(sums, axis=0))
        for actual, expected in zip((value, gradient), jax_on_ties(min_sep, k), strict=True):
            np.testing.assert_array_equal(actual, expected)

    @sweeps.compiling(12)
    @given(data=st.data())
    def test_sweep(self, implementation, data):
        n = data.draw(coefficients.sizes)
        min_sep = data.draw(st.integers(1, 5) | st.integers(1, n + 3))
        most = -(-n // min_sep)
        k = data.draw(st.integers(0, 5) | st.integers(0, min(most, 40) + 2))
        kind = data.draw(st.sampled_from(["ties", "normal", "positive", "negative"]))
        dtype = data.draw(st.sampled_from(["float32", "float64"]))
        x64 = dtype == "float64" or data.draw(st.booleans())
        x = numbers(kind, 2, n, data.draw(st.integers(0, 999))).astype(dtype)
        function = op(min_sep, k, implementation)
        with jax.enable_x64(x64):
            (value, gradient), alone = jax.jit(
                lambda x: (of_rows(function)(x), jax.vmap(function)(x))
            )(x)
        expected, expected_gradient = tables(x, min_sep, k)
        assert value.dtype == gradient.dtype == dtype
        np.testing.assert_array_equal(value, expected.astype(dtype))
        np.testing.assert_array_equal(alone, value)
        coefficients.close(gradient, expected_gradient, n * coefficients.UNIT)

    @pytest.mark.parametrize(("n", "min_sep", "k"), [(1, 1, 1), (1, 5, 0), (4097, 64, 70)])
    def test_corner(self, implementation, n, min_sep, k):
        x = numbers("normal", 1, n, 0).astype(np.float32)
        function = jax.jit(jax.value_and_grad(op(min_sep, k, implementation)))
        for actual, expected in zip(function(x[0]), tables(x, min_sep, k), strict=True):
            np.testing.assert_array_equal(actual, expected[0].astype(np.float32))

    def test_limits_beyond_all_rounds(self, implementation):
        x = jnp.array([1.0, 4.0, 2.0])
        for min_sep, k, expected in ((2**40, 2**40, 4), (1, 2**40, 7), (2**40, 1, 4)):
            function = jax.jit(jax.value_and_grad(op(min_sep, k, implementation)))
            assert function(x)[0] == expected
            np.testing.assert_array_equal(function(x)[1], [k > 1 > min_sep - 1, 1, min_sep == 1])

    # -- Accuracy

    @pytest.mark.parametrize(
        ("n", "k", "naive_error"), [(20_000, 20_000, 1e-3), (2000, 1999, 1e-4)]
    )
    def test_sums_are_made_in_float64(self, implementation, n, k, naive_error):
        x = np.full(n, 0.99, np.float32)
        x[-1] = 2**24
        naive = np.cumsum(x[::-1], dtype=np.float32)[-1]
        exact = 2**24 + (k - 1) * float(x[0])
        assert abs(naive / exact - 1) > naive_error
        value = op(1, k, implementation)(x)
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, exact, rtol=1e-7)

    @pytest.mark.parametrize(("min_sep", "k"), [(1, 3), (2, 9), (3, 2)])
    def test_rationals(self, implementation, min_sep, k):
        rng = np.random.default_rng(1)
        x = rng.standard_normal(10) * 10.0 ** rng.integers(-6, 6, 10)
        exact = [Fraction(v) for v in x]
        best = max(sum(exact[i] for i in rounds) for rounds in patterns(10, min_sep, k))
        with jax.enable_x64(True):
            value = op(min_sep, k, implementation)(x)
        assert abs(Fraction(float(value)) / best - 1) <= k * coefficients.UNIT

    # -- Derivatives

    @pytest.mark.parametrize(("min_sep", "k"), [(2, 2), (2, 9)])
    def test_numeric_derivative(self, implementation, min_sep, k):
        with jax.enable_x64(True):
            x = jnp.asarray(numbers("normal", 1, 9, 0)[0])
            function = op(min_sep, k, implementation)
            jax.test_util.check_grads(function, (x,), 1, ["rev"], rtol=1e-6, atol=1e-8)

    # -- Not a number, infinite

    @pytest.mark.parametrize("k", [0, 1, 4])
    def test_nan(self, implementation, k):
        x = np.ones((4, 4), np.float32)
        np.fill_diagonal(x, np.nan)
        value, gradient = of_rows(op(2, k, implementation))(x)
        np.testing.assert_array_equal(value, np.full(4, np.nan))
        np.testing.assert_array_equal(gradient, np.full((4, 4), np.nan))

    @pytest.mark.parametrize(("min_sep", "k"), [(1, 2), (2, 4)])
    def test_infinities(self, implementation, min_sep, k):
        some = np.array(list(itertools.product([0, 1], repeat=4)))
        x = np.concatenate([np.where(some, inf, [1.0, 2, -3, 4]) for inf in (np.inf, -np.inf)])
        actual = of_rows(op(min_sep, k, implementation))(x)
        expected = of_rows(dynamic_program(min_sep, k))(x)
        jax.tree.map(np.testing.assert_array_equal, actual, expected)

    def test_infinities_of_both_signs(self, implementation):
        x = jnp.array([-jnp.inf, jnp.inf, 1.0, -jnp.inf])
        for k in (1, 2, 9):
            _, gradient = jax.value_and_grad(op(1, k, implementation))(x)
            assert gradient.shape == x.shape

    # -- Transformations

    def test_vmap(self, implementation):
        x = np.random.default_rng(0).standard_normal((3, 5, 4)).astype(np.float32)
        coefficients.check_vmap(
            op(2, 2, implementation),
            dynamic_program(2, 2),
            ([(0,)], x[:, :, 0]),
            ([(1,)], x[0]),
            ([(0,), (2,)], x),
        )

    def test_many_rows(self, implementation):
        x = numbers("normal", 1000, 30, 0).astype(np.float32)
        function = of_rows(op(3, 4, implementation))
        value, gradient = tables(x, 3, 4)
        np.testing.assert_array_equal(function(x)[0], value.astype(np.float32))
        np.testing.assert_array_equal(function(x)[1], gradient.astype(np.float32))

    def test_scan(self, implementation):
        x = jnp.asarray(np.random.default_rng(0).standard_normal(5), jnp.float32)
        functions = op(2, 2, implementation), dynamic_program(2, 2)
        coefficients.check_scan(*(lambda x, f=f: x / (1 + f(x)) for f in functions), x)

    # -- Types

    @pytest.mark.parametrize(("dtype", "x64", "out"), coefficients.DTYPES_OF_ONE)
    def test_dtypes(self, implementation, dtype, x64, out):
        with jax.enable_x64(x64):
            coefficients.check_dtypes(
                op(2, 2, implementation), (dtype,), out, [1.3, 2.4, -1.2, 3.1]
            )


# -- Dispatch ---------------------------------------------------------------------------------

TARGET = "jpk_participation_max"
LIMIT = {"min_sep": 2, "max_participations": 2}
OP = "participation_max", functools.partial(participation_max, **LIMIT), IMPLEMENTATIONS
X = jnp.array([3.0, 1.0, 2.0])


def test_selection(monkeypatch):
    coefficients.check_selection(*OP, monkeypatch, X)


@pytest.mark.parametrize("platforms", coefficients.PLATFORMS, ids=" ".join)
def test_export(monkeypatch, platforms):
    coefficients.check_export(*OP, monkeypatch, platforms, X)


F = "float32"


@pytest.mark.parametrize("message", coefficients.WRONG_ROWS)
def test_handler_checks_what_it_is_given(message):
    for arguments, results in coefficients.WRONG_ROWS[message]:
        coefficients.check_refusal(TARGET, message, arguments, results, **LIMIT)


@pytest.mark.parametrize("limit", [(0, 1), (-1, 1), (-(2**62), 1), (1, -1)])
def test_handler_checks_limits(limit):
    attributes = dict(zip(LIMIT, limit, strict=True))
    message = "needs min_sep >= 1 and max_participations >= 0"
    coefficients.check_refusal(TARGET, message, [((5,), F)], [((), F)], **attributes)


def test_handler_needs_its_attributes():
    for attributes in ({}, {"min_sep": 2}, {**LIMIT, "min_sep": 2.0}):
        coefficients.check_refusal(TARGET, "attribute|S64", [((5,), F)], [((), F)], **attributes)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_handler_takes_leading_dimensions(batch):
    results = [(batch, "float64"), ((*batch, 4), F)]
    with jax.enable_x64(True):
        value, gradient = coefficients.call_handler(TARGET, [((*batch, 4), F)], results, **LIMIT)
    np.testing.assert_array_equal(value, np.full(batch, 2))
    expected = tables(np.ones((1, 4)), **LIMIT)[1]
    np.testing.assert_array_equal(gradient, np.broadcast_to(expected[0], gradient.shape))
