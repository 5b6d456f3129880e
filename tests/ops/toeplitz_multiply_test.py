"""Every implementation of toeplitz_multiply against its definition.

Sums of m products, in any order, err by at most (m + 2) units of the sum of their sizes.
"""

from __future__ import annotations

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from hypothesis import given
from support import coefficients, implementations, sweeps

from jax_privacy_kernels.matrix_factorization import toeplitz
from jax_privacy_kernels.ops import toeplitz_multiply
from jax_privacy_kernels.ops.toeplitz_multiply import IMPLEMENTATIONS

implementation = implementations.fixture(IMPLEMENTATIONS)


@functools.lru_cache(maxsize=64)  # of the cases that all implementations are checked with
def definition(case):
    """The product, and how far off a computed one may be."""
    multiply = functools.partial(coefficients.product, transpose=case.transpose)
    sizes = multiply(np.abs(case.coef), np.abs(case.rhs))
    error = (min(case.m, case.n) + 2) * coefficients.UNIT * sizes
    return multiply(case.coef, case.rhs)[: case.rows], error[: case.rows]


def check(case, implementation):
    with jax.enable_x64(case.x64):
        actual = toeplitz_multiply(
            *case.arrays(), transpose=case.transpose, rows=case.rows, implementation=implementation
        )
    assert actual.dtype == case.dtype
    coefficients.close(actual, *definition(case))


@functools.cache  # one function for all implementations
def dense(transpose, rows):
    """The definition with a dense matrix."""

    def multiply(coef, rhs):
        T = coefficients.matrix(coef, len(rhs))
        return jnp.tensordot(T.T if transpose else T, rhs, axes=1)[:rows]

    return multiply


def pair(implementation, n, m, shape=(), transpose=False, rows=None):
    """The op, its definition, and float64 arguments of both."""

    def multiply(coef, rhs):
        return toeplitz_multiply(
            coef, rhs, transpose=transpose, rows=rows, implementation=implementation
        )

    arguments = coefficients.Case(n, m, shape, coef_dtype="float64", rhs_dtype="float64")
    return multiply, dense(transpose, rows), arguments


DERIVATIVES = [  # n, m, shape, transpose, rows
    (5, 7, (2, 2), False, None),
    (6, 4, (), True, 4),
]


def _gapped(rng, n):  # every other entry of the product is zero
    even = np.arange(n) % 2 == 0
    return even * rng.normal(size=n), even * rng.normal(size=n)


def _steep(rng, n):  # terms from 1 down to 1e-24, in an order that puts large before small
    return 10.0 ** (-12 * np.arange(n) / n), 10.0 ** (-12 * np.arange(n) / n) * rng.normal(size=n)


def _spikes(rng, n):  # behind which most products are small
    x = rng.normal(size=n)
    x[n // 3] = 1e15
    return np.where(np.arange(n) % 5 == 1, 1e-9, 0) + 1e-15, x


LONG = {
    "normal": lambda rng, n: rng.normal(size=(2, n)),
    "32 bits": lambda rng, n: rng.normal(size=(2, n)).astype(np.float32),
    "gapped": _gapped,
    "steep": _steep,
    "spikes": _spikes,
}


class TestImplementation:
    """What holds for every implementation."""

    @pytest.mark.parametrize("m", [1, 9])
    def test_definition(self, implementation, m):
        n = 7
        coef, x = np.arange(1.0, m + 1), np.arange(2 * n).reshape(n, 2) - 6.0
        T = [[coef[i - j] if 0 <= i - j < m else 0.0 for j in range(n)] for i in range(n)]
        for transpose, matrix in ((False, np.array(T)), (True, np.array(T).T)):
            for rows in (None, 3):
                actual = toeplitz_multiply(
                    coef, x, transpose=transpose, rows=rows, implementation=implementation
                )
                np.testing.assert_array_equal(actual, (matrix @ x)[:rows])

    @pytest.mark.parametrize("case", coefficients.CORNERS, ids=str)
    def test_corner(self, implementation, case):
        check(case, implementation)

    @sweeps.compiling(12)
    @given(case=coefficients.cases())
    def test_sweep(self, implementation, case):
        check(case, implementation)

    @pytest.mark.parametrize(("transpose", "rows"), [(True, 1), (False, 255), (True, 257)])
    def test_rows(self, implementation, transpose, rows):
        check(coefficients.Case(600, 520, (2,), transpose, rows), implementation)

    @pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
    def test_no_columns(self, implementation, shape):
        for transpose in (False, True):
            check(coefficients.Case(5, 3, shape, transpose, 2), implementation)

    def test_no_problems(self, implementation):
        function, _, _ = pair(implementation, 5, 3, transpose=True, rows=2)
        out = jax.vmap(function, (0, None))(jnp.ones((0, 3)), jnp.ones(5))
        assert out.shape == (0, 2)

    def test_zero_coefficients(self, implementation):
        out = toeplitz_multiply(jnp.zeros(9), jnp.ones((20, 2)), implementation=implementation)
        np.testing.assert_array_equal(out, np.zeros((20, 2)))

    # -- Accuracy

    def test_sums_are_made_in_float64(self, implementation):
        x = coefficients.cancelling(1500)
        ones = np.ones(x.size, np.float32)
        expected = np.cumsum(x, dtype=np.longdouble)[2::3]
        naive = np.cumsum(x, dtype=np.float32)[2::3]
        assert np.abs(naive / expected - 1).min() > 1e-3
        for coef, rhs in ((ones, x), (x, ones)):
            for transpose in (False, True):
                sums = toeplitz_multiply(
                    coef,
                    rhs[::-1] if transpose else rhs,
                    transpose=transpose,
                    implementation=implementation,
                )
                assert sums.dtype == jnp.float32
                sums = np.asarray(sums[::-1] if transpose else sums)[2::3]
                np.testing.assert_allclose(sums, expected.astype(np.float64), rtol=1e-6)

    @pytest.mark.interpreted_nightly
    def test_gradients_are_made_in_float64(self, implementation):
        x = coefficients.cancelling(999)
        expected = np.cumsum(x, dtype=np.longdouble)[2::3].astype(np.float64)

        def total(coef, rhs):  # whose derivatives are sums of the other argument
            return toeplitz_multiply(coef, rhs, implementation=implementation).sum()

        ones = np.ones(x.size, np.float32)
        for bar in (jax.grad(total, 0)(ones, x), jax.grad(total, 1)(x, ones)):
            np.testing.assert_allclose(bar[::-1][2::3], expected, rtol=1e-6)

    @pytest.mark.interpreted_nightly
    @pytest.mark.parametrize("transpose", [False, True])
    def test_rationals(self, implementation, transpose):
        n, m, rng = 23, 11, np.random.default_rng(3)
        coef = rng.standard_normal(m) * 10.0 ** rng.integers(-9, 9, m)
        x = rng.standard_normal(n) * 10.0 ** rng.integers(-9, 9, n)
        with jax.enable_x64(True):
            actual = np.asarray(
                toeplitz_multiply(coef, x, transpose=transpose, implementation=implementation)
            )
        for i in range(n):
            pairs = [(lag, i + lag if transpose else i - lag) for lag in range(m)]
            terms = [Fraction(coef[lag]) * Fraction(x[j]) for lag, j in pairs if 0 <= j < n]
            error = Fraction(actual[i]) - sum(terms)
            assert abs(error) <= (len(terms) + 2) * coefficients.UNIT * sum(map(abs, terms))

    def test_square_of_the_optimal_strategy(self, implementation):
        slow = implementations.is_slow(IMPLEMENTATIONS, implementation)
        n = 2000 if implementation == "jax" or slow else 20_000
        with jax.enable_x64(True):
            coef = toeplitz.optimal_max_error_strategy_coefs(n)
            ones = toeplitz_multiply(coef, coef, implementation=implementation)
        np.testing.assert_allclose(ones, np.ones(n), rtol=1e-12)

    # -- Long vectors, where blocks and transforms may come in

    @pytest.mark.each_value
    @pytest.mark.parametrize("kind", LONG)
    @pytest.mark.parametrize(
        ("n", "m", "transpose", "rows"),
        [(2**14, 2**14, False, None), (40_001, 20_000, True, 17_000)],
    )
    def test_long_vectors(self, implementation, kind, n, m, transpose, rows):
        """Entries are accurate relative to their own terms, however small those are."""
        if implementations.is_slow(IMPLEMENTATIONS, implementation):
            pytest.skip("too long for an interpreter")
        coef, x = LONG[kind](np.random.default_rng(0), n)
        coef = coef[:m].astype(np.float32)
        with jax.enable_x64(kind != "32 bits"):
            y = toeplitz_multiply(
                coef, x, transpose=transpose, rows=rows, implementation=implementation
            )
        assert y.dtype == x.dtype
        coef, v = coef.astype(np.longdouble), x[::-1] if transpose else x
        for i in {0, 1, 511, 512, 5000, len(y) - 1, *range(2, len(y), len(y) // 30)}:
            row = n - 1 - i if transpose else i
            lags = min(row + 1, m)
            terms = coef[:lags] * v[row + 1 - lags : row + 1][::-1]
            coefficients.close(y[i], terms.sum(), 2e-13 * np.abs(terms).sum())

    @pytest.mark.interpreted_nightly
    def test_gradients_of_long_vectors(self, implementation):
        if implementations.is_slow(IMPLEMENTATIONS, implementation):
            pytest.skip("too long for an interpreter")
        n, m = 2**14, 2**14 + 3
        rng = np.random.default_rng(0)
        coef, x, weights = rng.normal(size=(2, m)), rng.normal(size=(2, n)), rng.normal(size=n)

        def product(coef, x):
            size = 2 * x.size
            spectra = np.fft.rfft(coef[: x.size], size) * np.fft.rfft(x, size)
            return np.fft.irfft(spectra, size)[: x.size]

        def weighted(coef, x):
            y = toeplitz_multiply(coef, x, implementation=implementation)
            return jnp.vdot(weights, y), y

        with jax.enable_x64(True):
            gradients = jax.grad(weighted, (0, 1), has_aux=True)
            (coef_bar, x_bar), y = jax.jit(jax.vmap(gradients))(coef, x)
        for i in range(2):
            coefficients.trees_close(y[i], product(coef[i], x[i]))
            expected = product(x[i], weights[::-1])[::-1]
            coefficients.trees_close(coef_bar[i], np.pad(expected, (0, m - n)))
            coefficients.trees_close(x_bar[i], product(coef[i], weights[::-1])[::-1])

    # -- Derivatives

    @pytest.mark.interpreted_nightly
    def test_numeric_derivatives(self, implementation):
        multiply, _, case = pair(implementation, 6, 4, transpose=True, rows=4)
        with jax.enable_x64(True):
            jax.test_util.check_grads(multiply, case.arrays(), 1, ["rev"], rtol=1e-6, atol=1e-8)

    @pytest.mark.interpreted_nightly
    @pytest.mark.parametrize("case", DERIVATIVES, ids=str)
    def test_second_derivatives(self, implementation, case):
        coefficients.check_derivatives(*pair(implementation, *case), second=True)

    @pytest.mark.interpreted_nightly
    def test_gradients_of_many_rows(self, implementation):
        coefficients.check_derivatives(*pair(implementation, 520, 530, (3,), rows=515))

    # -- Transformations

    @pytest.mark.interpreted_nightly
    def test_vmap(self, implementation):
        multiply, reference, _ = pair(implementation, 6, 3, transpose=True, rows=4)
        coefficients.check_toeplitz_vmap(multiply, reference)

    @pytest.mark.interpreted_nightly
    def test_scan(self, implementation):
        multiply, reference, case = pair(implementation, 300, 4, (2,))
        coef, rhs = (x.astype("float32") for x in case.arrays())
        coefficients.check_scan(
            lambda x, coef: multiply(coef, x), lambda x, coef: reference(coef, x), rhs, coef
        )

    # -- Types

    @pytest.mark.interpreted_nightly
    @pytest.mark.parametrize(("coef", "rhs", "x64", "out"), coefficients.DTYPES)
    def test_dtypes(self, implementation, coef, rhs, x64, out):
        function = functools.partial(toeplitz_multiply, implementation=implementation)
        with jax.enable_x64(x64):
            coefficients.check_dtypes(
                function, (coef, rhs), out, [1.1, -2.3, 0.7], [[3.2], [4.1], [1.3], [-2.6]]
            )

    @pytest.mark.interpreted_nightly
    def test_x64_mode_may_change(self, implementation):
        function = functools.partial(toeplitz_multiply, implementation=implementation)
        coefficients.check_x64_mode_may_change(function)


# -- Dispatch ---------------------------------------------------------------------------------

OP = "toeplitz_multiply", toeplitz_multiply, IMPLEMENTATIONS
TARGET = "jpk_toeplitz_multiply"
COEF, RHS = jnp.array([1.0, 0.5, 0.25]), jnp.ones((5, 2))


def test_selection(monkeypatch):
    coefficients.check_selection(*OP, monkeypatch, COEF, RHS)


@pytest.mark.parametrize("platforms", coefficients.PLATFORMS, ids=" ".join)
def test_export(monkeypatch, platforms):
    coefficients.check_export(*OP, monkeypatch, platforms, COEF, RHS)


def test_pallas_lowers_for_cuda():
    coefficients.check_pallas_lowers(*OP[1:], COEF, RHS)


def test_long_ones_are_refused(monkeypatch):
    def shapes(rows):
        return toeplitz_multiply, (3,), (rows,)

    coefficients.check_long_ones_are_refused(OP[0], OP[2], monkeypatch, shapes)


F = "float32"
WRONG = {
    "needs float32 or float64 buffers": [
        ([((3,), "int32"), ((5, 2), F)], [((5, 2), F)]),
        ([((3,), F), ((5, 2), "bfloat16")], [((5, 2), F)]),
        ([((3,), F), ((5, 2), F)], [((5, 2), "int32")]),
    ],
    "needs coefficients .*, vectors .* and results": [
        ([((), F), ((5, 2), F)], [((5, 2), F)]),
        ([((1, 3), F), ((5, 2), F)], [((5, 2), F)]),
        ([((3,), F), ((5,), F)], [((5, 2), F)]),
        ([((3,), F), ((5,), F)], [((5,), F)]),
        ([((3,), F), ((), F)], [((), F)]),
        ([((3,), F), ((5, 2), F)], [((5,), F)]),
        ([((3,), F), ((5, 2), F)], [((1, 5, 2), F)]),
    ],
    "needs equal leading dimensions": [
        ([((2, 3), F), ((3, 5, 2), F)], [((3, 5, 2), F)]),
        ([((3, 3), F), ((3, 5, 2), F)], [((2, 5, 2), F)]),
        ([((3, 1, 3), F), ((3, 2, 5, 2), F)], [((3, 2, 5, 2), F)]),
    ],
    "needs m >= 1, 1 <= rows <= n": [
        ([((0,), F), ((5, 2), F)], [((5, 2), F)]),
        ([((3,), F), ((0, 2), F)], [((1, 2), F)]),
        ([((3,), F), ((5, 2), F)], [((6, 2), F)]),
        ([((3,), F), ((5, 2), F)], [((5, 3), F)]),
        ([((2, 3), F), ((2, 5, 2), F)], [((2, 5, 1), F)]),
    ],
}


@pytest.mark.parametrize("message", WRONG)
def test_handler_checks_what_it_is_given(message):
    for arguments, results in WRONG[message]:
        coefficients.check_refusal(TARGET, message, arguments, results, transpose=False)


@pytest.mark.parametrize("batch", [(), (2,), (0,), (2, 3)])
def test_handler_takes_leading_dimensions(batch):
    arguments, results = [((*batch, 7), F), ((*batch, 5, 2), F)], [((*batch, 4, 2), F)]
    (out,) = coefficients.call_handler(TARGET, arguments, results, transpose=False)
    expected = np.broadcast_to(np.arange(1.0, 5.0)[:, None], out.shape)
    np.testing.assert_array_equal(out, expected)


C = "complex128"
WRONG_SPECTRA = {
    "needs complex128 spectra": [
        ([((2, 3), "complex64"), ((4, 3), C)], [((4, 3), C)]),
        ([((2, 3), C), ((4, 3), "float64")], [((4, 3), C)]),
        ([((2, 3), C), ((4, 3), C)], [((4, 3), "float64")]),
    ],
    "needs spectra": [
        ([((2, 3), C), ((0, 3), C)], [((4, 3), C)]),
        ([((2, 3), C), ((4, 0), C)], [((4, 3), C)]),
        ([((0, 3), C), ((4, 3), C)], [((4, 3), C)]),
    ],
    "needs as many problems and frequencies": [
        ([((2, 4), C), ((4, 3), C)], [((4, 3), C)]),
        ([((2, 2, 3), C), ((4, 3), C)], [((4, 3), C)]),
        ([((2, 3), C), ((5, 4, 3), C)], [((5, 4, 3), C)]),
        ([((2, 3), C), ((4, 3), C)], [((5, 3), C)]),
        ([((2, 3), C), ((4, 3), C)], [((3, 3), C)]),
    ],
}
D = "float64"
WRONG_FINISH = {
    "needs float64 buffers": [
        ([((3,), F), ((5,), D), ((2, 5), D)], [((5,), D)]),
        ([((3,), D), ((5,), F), ((2, 5), D)], [((5,), D)]),
        ([((3,), D), ((5,), D), ((2, 5), F)], [((5,), D)]),
        ([((3,), D), ((5,), D), ((2, 5), D)], [((5,), F)]),
    ],
    "needs 1 <= m <= n": [
        ([((0,), D), ((5,), D), ((2, 5), D)], [((5,), D)]),
        ([((6,), D), ((5,), D), ((2, 5), D)], [((5,), D)]),
    ],
    "needs as many problems in all operands": [
        ([((2, 3), D), ((5,), D), ((2, 5), D)], [((5,), D)]),
        ([((3,), D), ((2, 5), D), ((2, 2, 5), D)], [((2, 5), D)]),
        ([((3,), D), ((5,), D), ((5,), D)], [((5,), D)]),
        ([((3,), D), ((5,), D), ((2, 5), D)], [((4,), D)]),
        ([((3,), D), ((5,), D), ((2, 5), D)], [((6,), D)]),
    ],
}


@pytest.mark.parametrize("message", WRONG_SPECTRA)
def test_handler_of_spectra_checks_what_it_is_given(message):
    with jax.enable_x64(True):
        for arguments, results in WRONG_SPECTRA[message]:
            coefficients.check_refusal("jpk_toeplitz_spectra", message, arguments, results)


@pytest.mark.parametrize("message", WRONG_FINISH)
def test_last_handler_checks_what_it_is_given(message):
    with jax.enable_x64(True):
        for arguments, results in WRONG_FINISH[message]:
            coefficients.check_refusal("jpk_toeplitz_finish", message, arguments, results, block=8)


@pytest.mark.parametrize("block", [0, -1, 4, 12, 2**62, -(2**62)])
def test_last_handler_checks_the_block(block):
    arguments, results = [((3,), D), ((5,), D), ((2, 5), D)], [((5,), D)]
    message = "blocks of a multiple of 8"
    with jax.enable_x64(True):
        coefficients.check_refusal("jpk_toeplitz_finish", message, arguments, results, block=block)


@pytest.mark.parametrize("block", [8, 16, 24, 2**60])
def test_last_handler_takes_blocks_of_any_length(block):
    """All of what the transforms made is too inaccurate."""
    arguments, results = [((2, 11), D), ((2, 21), D), ((2, 2, 21), D)], [((2, 21), D)]
    values = [np.ones((2, 11)), np.ones((2, 21)), np.zeros((2, 2, 21))]
    with jax.enable_x64(True):
        (out,) = coefficients.call_handler(
            "jpk_toeplitz_finish", arguments, results, values=values, block=block
        )
    np.testing.assert_array_equal(out, [np.minimum(np.arange(21) + 1, 11)] * 2)


def test_handler_needs_its_attribute():
    arguments, results = [((3,), F), ((5, 2), F)], [((5, 2), F)]
    for attributes in ({}, {"transpose": np.int64(1)}):
        coefficients.check_refusal(TARGET, "attribute|PRED", arguments, results, **attributes)
