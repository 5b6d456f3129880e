"""Every implementation of min_sep_norm against its definition.

All terms of the sums are positive, so value and gradient err by a few units of themselves.
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

from jax_privacy_kernels.ops import min_sep_norm
from jax_privacy_kernels.ops.min_sep_norm import IMPLEMENTATIONS

implementation = implementations.fixture(IMPLEMENTATIONS)


def op(n, min_sep, k, implementation=None):
    return functools.partial(
        min_sep_norm, n=n, min_sep=min_sep, max_participations=k, implementation=implementation
    )


def both(function):
    return jax.jit(jax.value_and_grad(function))


def definition(coef, n, min_sep, k):
    """Value and gradient: an element of p goes with the first |c| behind it that equals it."""
    coef = np.asarray(coef, np.longdouble)
    used = np.abs(coef[:n])
    p = np.zeros(n, np.longdouble)
    p[: used.size] = np.maximum.accumulate(used[::-1])[::-1]
    v, p_bar = np.zeros_like(p), np.zeros_like(p)
    shifts = range(0, min(n, k * min_sep), min_sep)
    for shift in shifts:
        v[shift:] += p[: n - shift]
    for shift in shifts:
        p_bar[: n - shift] += 2 * v[shift:]
    gradient = np.zeros_like(coef)
    source = used.size
    for t in reversed(range(used.size)):
        source = t if used[t] == p[t] else source
        gradient[source] += p_bar[t]
    return np.sum(v**2), np.where(coef < 0, -gradient, gradient)  # at 0 the one to the right


def check(actual, coef, n, min_sep, k):
    units = (n + 3 * min(k, -(-n // min_sep)) + 10) * coefficients.UNIT
    for out, expected in zip(actual, definition(coef, n, min_sep, k), strict=True):
        coefficients.close(out, expected, units * np.abs(expected))


@functools.cache  # one function for all implementations
def plain(n, min_sep, k):
    """The definition for coefficients that are not increasing, for JAX to differentiate."""

    def value(coef):
        p = jnp.zeros(n, coef.dtype).at[: len(coef)].set(coef[:n])
        shifts = range(0, min(n, k * min_sep), min_sep)
        return jnp.sum(sum(jnp.pad(p, (shift, 0))[:n] for shift in shifts) ** 2)

    return value


def numbers(kind, m, seed):
    rng = np.random.default_rng(seed)
    return {
        "any": rng.standard_normal(m),
        "ties": rng.integers(-2, 3, m),
        "decreasing": np.sort(rng.uniform(0.1, 1, m))[::-1],
        "increasing": -np.sort(rng.uniform(0.1, 1, m)),
        "constant": np.full(m, 0.7),
        "zero": np.zeros(m),
        "zero tail": np.where(np.arange(m) < m / 2, rng.standard_normal(m), 0),
    }[kind]


KINDS = ["any", "ties", "decreasing", "increasing", "constant", "zero", "zero tail"]


class TestImplementation:
    """What holds for every implementation."""

    @pytest.mark.parametrize(
        ("n", "m", "min_sep", "k"),
        [(1, 1, 1, 1), (2, 5, 1, 2), (7, 7, 2, 2), (8, 3, 3, 9), (8, 8, 1, 3), (6, 6, 6, 2)],
    )
    def test_columns_are_the_worst(self, implementation, n, m, min_sep, k):
        """All sets of rounds, against the matrix whose coefficients are p."""
        coef = np.random.default_rng(n).integers(-5, 6, m)
        p = [max(np.abs(coef[t:n]), default=0) for t in range(n)]
        C = np.array([[p[i - j] if i >= j else 0 for j in range(n)] for i in range(n)])
        worst = max(
            np.sum(C[:, rounds].sum(axis=1) ** 2)
            for size in range(1, k + 1)
            for rounds in map(list, itertools.combinations(range(n), size))
            if np.all(np.diff(rounds) >= min_sep)
        )
        assert op(n, min_sep, k, implementation)(coef) == worst

    @sweeps.compiling(12)
    @given(data=st.data())
    def test_sweep(self, implementation, data):
        n = data.draw(coefficients.sizes)
        m = data.draw(st.integers(1, n + 3) | st.just(n))
        min_sep = data.draw(st.integers(1, n) | st.integers(1, min(n, 5)))
        k = data.draw(st.integers(1, 6) | st.integers(1, -(-n // min_sep) + 2))
        dtype = data.draw(st.sampled_from(["float32", "float64"]))
        x64 = dtype == "float64" or data.draw(st.booleans())
        coef = numbers(data.draw(st.sampled_from(KINDS)), m, data.draw(st.integers(0, 999)))
        coef = coef.astype(dtype)
        with jax.enable_x64(x64):
            function = op(n, min_sep, k, implementation)
            (value, gradient), alone = jax.jit(lambda c: (both(function)(c), function(c)))(coef)
        np.testing.assert_array_equal(alone, value)
        assert value.dtype == gradient.dtype == dtype
        check((value, gradient), coef, n, min_sep, k)

    def test_kinds(self, implementation):
        function = both(op(29, 4, 3, implementation))
        for kind in KINDS:
            coef = numbers(kind, 23, 0).astype(np.float32)
            check(function(coef), coef, 29, 4, 3)

    @pytest.mark.parametrize(
        ("n", "m", "min_sep", "k"), [(4097, 4097, 1, 512), (4096, 4000, 64, 64), (513, 600, 512, 2)]
    )
    def test_corner(self, implementation, n, m, min_sep, k):
        coef = numbers("decreasing", m, 0).astype(np.float32)
        check(both(op(n, min_sep, k, implementation))(coef), coef, n, min_sep, k)

    def test_limit_beyond_all_columns(self, implementation):
        coef = jnp.array([3.0, 2.0, 1.0])
        check(both(op(4, 1, 2**40, implementation))(coef), coef, 4, 1, 4)

    # -- Accuracy

    def test_sums_are_made_in_float64(self, implementation):
        n = 2**21
        coef = np.full(n, 1.1, np.float32)
        naive = np.cumsum(coef * coef)[-1]
        exact = n * float(coef[0]) ** 2
        assert abs(naive / exact - 1) > 1e-3
        value = op(n, n, 1, implementation)(coef)
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, exact, rtol=1e-7)

    @pytest.mark.parametrize("k", [3, 99])
    def test_small_terms_are_not_rounded_away(self, implementation, k):
        coef = 10.0 ** -np.arange(0, 120, 4)
        n = coef.size + 5
        with jax.enable_x64(True):
            check(both(op(n, 2, k, implementation))(coef), coef, n, 2, k)

    @pytest.mark.interpreted_nightly
    @pytest.mark.parametrize(("min_sep", "k"), [(1, 3), (4, 2), (3, 9)])
    def test_rationals(self, implementation, min_sep, k):
        n, coef = 13, np.random.default_rng(0).standard_normal(11)
        p = [max((Fraction(abs(c)) for c in coef[t:]), default=Fraction(0)) for t in range(n)]
        v = [sum(p[s] for s in range(t, -1, -min_sep)[:k]) for t in range(n)]
        exact = sum(term**2 for term in v)
        with jax.enable_x64(True):
            value = op(n, min_sep, k, implementation)(coef)
        assert abs(Fraction(float(value)) / exact - 1) <= 30 * coefficients.UNIT

    # -- Derivatives

    @pytest.mark.interpreted_nightly
    @pytest.mark.parametrize(("n", "m", "min_sep", "k"), [(9, 7, 2, 2), (6, 8, 3, 5)])
    def test_derivative_of_decreasing_coefficients(self, implementation, n, m, min_sep, k):
        functions = both(op(n, min_sep, k, implementation)), both(plain(n, min_sep, k))
        with jax.enable_x64(True):
            for kind in ("decreasing", "constant"):
                coef = numbers(kind, m, 0)
                coefficients.trees_close(*(function(coef) for function in functions))

    @pytest.mark.parametrize("kind", ["any", "increasing", "decreasing"])
    def test_numeric_derivative(self, implementation, kind):
        with jax.enable_x64(True):
            coef = jnp.asarray(numbers(kind, 7, 1))
            function = op(9, 2, 3, implementation)
            jax.test_util.check_grads(function, (coef,), 1, ["rev"], rtol=1e-6, atol=1e-8)

    def test_derivative_of_ties(self, implementation):
        # p is 3, 2, 2, 2, 1, and entries 1 to 3 of it go with coefficients 2, 2 and 3.
        value, gradient = both(op(5, 5, 1, implementation))(jnp.array([3.0, 1.0, -2.0, 2.0, 1.0]))
        assert value == 9 + 3 * 4 + 1
        np.testing.assert_array_equal(gradient, [6, 0, -8, 4, 2])

    # -- Not a number, infinite

    def test_nan(self, implementation):
        coef = np.ones((4, 4), np.float32)
        np.fill_diagonal(coef, np.nan)
        value, gradient = jax.vmap(both(op(5, 2, 2, implementation)))(coef)
        np.testing.assert_array_equal(value, np.full(4, np.nan))
        np.testing.assert_array_equal(gradient, np.full((4, 4), np.nan))

    def test_nan_behind_the_last_row(self, implementation):
        coef = jnp.array([2.0, 1.0, jnp.nan])
        value, gradient = both(op(2, 2, 1, implementation))(coef)
        assert value == 5
        np.testing.assert_array_equal(gradient, [4, 2, 0])

    @pytest.mark.parametrize("infinite", [np.inf, -np.inf])
    def test_infinities(self, implementation, infinite):
        coef = np.array([2.0, infinite, 1.0, 0.5], np.float32)
        value, gradient = both(op(5, 2, 2, implementation))(coef)
        assert value == np.inf
        assert gradient[1] == infinite

    # -- Transformations

    @pytest.mark.interpreted_nightly
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_vmap(self, implementation, dtype):
        with jax.enable_x64(dtype == "float64"):
            coef = -np.sort(-np.random.default_rng(0).uniform(0.1, 0.5, (3, 6, 4)), axis=1)
            coef = jnp.asarray(coef, dtype)
            coefficients.check_vmap(
                op(7, 2, 3, implementation),
                plain(7, 2, 3),
                ([(0,)], coef[:, :, 0]),
                ([(1,)], coef[0]),
                ([(0,), (2,)], coef),
            )

    @pytest.mark.interpreted_nightly
    def test_many_rows(self, implementation):
        rows = 30 if implementations.is_slow(IMPLEMENTATIONS, implementation) else 300
        coef = np.random.default_rng(0).standard_normal((rows, 30)).astype(np.float32)
        value, gradient = jax.vmap(both(op(40, 3, 4, implementation)))(coef)
        for row in (0, 1, rows // 2, rows - 1):
            check((value[row], gradient[row]), coef[row], 40, 3, 4)

    @pytest.mark.interpreted_nightly
    def test_scan(self, implementation):
        coef = jnp.asarray(numbers("decreasing", 6, 0), jnp.float32)
        functions = op(7, 2, 3, implementation), plain(7, 2, 3)
        coefficients.check_scan(*(lambda c, f=f: c / (1 + f(c)) for f in functions), coef)

    # -- Types

    @pytest.mark.interpreted_nightly
    @pytest.mark.parametrize(("dtype", "x64", "out"), coefficients.DTYPES_OF_ONE)
    def test_dtypes(self, implementation, dtype, x64, out):
        with jax.enable_x64(x64):
            coefficients.check_dtypes(
                op(6, 2, 2, implementation), (dtype,), out, [2.3, 1.4, -1.8, 1.1]
            )


# -- Dispatch ---------------------------------------------------------------------------------

TARGET = "jpk_min_sep_norm"
STATIC = {"n": 5, "min_sep": 2, "max_participations": 2}
OP = "min_sep_norm", functools.partial(min_sep_norm, **STATIC), IMPLEMENTATIONS
COEF = jnp.array([3.0, 1.0, 2.0])


def test_selection(monkeypatch):
    coefficients.check_selection(*OP, monkeypatch, COEF)


@pytest.mark.parametrize("platforms", coefficients.PLATFORMS, ids=" ".join)
def test_export(monkeypatch, platforms):
    coefficients.check_export(*OP, monkeypatch, platforms, COEF)


def test_pallas_lowers_for_cuda():
    coefficients.check_pallas_lowers(*OP[1:], COEF)


def test_long_ones_are_refused(monkeypatch):
    def shapes(rows):
        return functools.partial(min_sep_norm, **{**STATIC, "n": rows}), (3,)

    coefficients.check_long_ones_are_refused(OP[0], OP[2], monkeypatch, shapes)


F = "float32"
WRONG = {
    **coefficients.WRONG_ROWS,
    r"needs coefficients \[..., m\], m <= n": [
        ([((6,), F)], [((), F)]),
        ([((2, 6), F)], [((2,), F), ((2, 6), F)]),
    ],
}


@pytest.mark.parametrize("message", WRONG)
def test_handler_checks_what_it_is_given(message):
    for arguments, results in WRONG[message]:
        coefficients.check_refusal(TARGET, message, arguments, results, **STATIC)


@pytest.mark.parametrize(
    "static", [(5, 0, 1), (5, -1, 1), (5, 6, 1), (5, 1, 0), (5, 1, -1), (-5, 1, 1), (4, 1, 1)]
)
def test_handler_checks_limits(static):
    attributes = dict(zip(STATIC, static, strict=True))
    message = "1 <= min_sep <= n and max_participations >= 1"
    coefficients.check_refusal(TARGET, message, [((5,), F)], [((), F)], **attributes)


@pytest.mark.parametrize("rows", [1, 8])
def test_handler_reports_exceptions(rows):
    """Of any thread: there is no memory for so many rounds."""
    attributes, coef = {**STATIC, "n": 2**60}, [((rows, 5), F)]
    message = "RESOURCE_EXHAUSTED.*min_sep_norm"
    for results in ([((rows,), F)], [((rows,), F), ((rows, 5), F)]):
        coefficients.check_refusal(TARGET, message, coef, results, **attributes)
    test_handler_takes_leading_dimensions((rows,))


def test_handler_refuses_sizes_that_overflow():
    attributes = {**STATIC, "n": (2**64 + 2) // 3, "min_sep": 1}
    results = [((), F), ((3,), F)]
    coefficients.check_refusal(TARGET, "m <= n", [((3,), F)], results, **attributes)


def test_handler_needs_its_attributes():
    for attributes in ({}, {"n": 5, "min_sep": 2}, {**STATIC, "n": 5.0}):
        coefficients.check_refusal(TARGET, "attribute|S64", [((5,), F)], [((), F)], **attributes)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_handler_takes_leading_dimensions(batch):
    results = [(batch, "float64"), ((*batch, 4), F)]
    with jax.enable_x64(True):
        actual = coefficients.call_handler(TARGET, [((*batch, 4), F)], results, **STATIC)
    expected = definition(np.ones(4), 5, 2, 2)
    for out, row in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(out, np.broadcast_to(row, out.shape))
