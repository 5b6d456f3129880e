"""Every implementation of toeplitz_solve against its definition.

Forward substitution errs by as much as a change of T by m + 3 units of each of its entries would
(Higham, Accuracy and Stability of Numerical Algorithms, Theorem 8.5). How far that moves x is
bounded by the inverse of the comparison matrix: ``|c_0|`` on the diagonal, ``-|c_l|`` below.
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
from jax_privacy_kernels.ops import toeplitz_solve
from jax_privacy_kernels.ops.toeplitz_solve import IMPLEMENTATIONS

implementation = implementations.fixture(IMPLEMENTATIONS)


def error_of(coef, x, transpose):
    """How far off a computed x may be."""
    sizes = np.abs(np.asarray(coef, np.longdouble))
    comparison = np.array([sizes[0], *-sizes[1:]])
    moved = coefficients.product(sizes, np.abs(x), transpose=transpose)
    units = (min(len(coef), len(x)) + 3) * coefficients.UNIT
    return coefficients.solution(comparison, units * moved, transpose=transpose)


@functools.lru_cache(maxsize=64)  # of the cases that all implementations are checked with
def definition(case):
    """x, and how far off a computed one may be."""
    x = coefficients.solution(case.coef, case.rhs, transpose=case.transpose)
    return x, error_of(case.coef, x, case.transpose)


def check(case, implementation):
    if implementations.is_slow(IMPLEMENTATIONS, implementation) and case.n > 2000:
        pytest.skip("too long for an interpreter")
    with jax.enable_x64(case.x64):
        actual = toeplitz_solve(
            *case.arrays(), transpose=case.transpose, implementation=implementation
        )
    assert actual.dtype == case.dtype
    coefficients.close(actual, *definition(case))


@functools.cache  # one function for all implementations
def dense(transpose):
    """The definition with a dense matrix."""

    def solve(coef, rhs):
        T = coefficients.matrix(coef, len(rhs))
        columns = rhs.reshape(len(rhs), -1)
        x = jax.scipy.linalg.solve_triangular(T, columns, lower=True, trans=int(transpose))
        return x.reshape(rhs.shape)

    return solve


def pair(implementation, n, m, shape=(), transpose=False):
    """The op, its definition, and float64 arguments of both."""

    def solve(coef, rhs):
        return toeplitz_solve(coef, rhs, transpose=transpose, implementation=implementation)

    arguments = coefficients.Case(n, m, shape, coef_dtype="float64", rhs_dtype="float64")
    return solve, dense(transpose), arguments


class TestImplementation:
    """What holds for every implementation."""

    @pytest.mark.parametrize("m", [1, 9])
    def test_definition(self, implementation, m):
        n = 7
        coef, x = np.array([2.0, *range(1, m)]), np.arange(2 * n).reshape(n, 2) - 6.0
        T = [[coef[i - j] if 0 <= i - j < m else 0.0 for j in range(n)] for i in range(n)]
        for transpose, matrix in ((False, np.array(T)), (True, np.array(T).T)):
            actual = toeplitz_solve(
                coef, matrix @ x, transpose=transpose, implementation=implementation
            )
            np.testing.assert_array_equal(actual, x)

    @pytest.mark.parametrize("case", coefficients.CORNERS, ids=str)
    def test_corner(self, implementation, case):
        check(case, implementation)

    @sweeps.compiling(12)
    @given(case=coefficients.cases())
    def test_sweep(self, implementation, case):
        check(case, implementation)

    @pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
    def test_no_columns(self, implementation, shape):
        for transpose in (False, True):
            check(coefficients.Case(5, 3, shape, transpose), implementation)

    def test_no_problems(self, implementation):
        function, _, _ = pair(implementation, 5, 3, transpose=True)
        out = jax.vmap(function, (0, None))(jnp.ones((0, 3)), jnp.ones(5))
        assert out.shape == (0, 5)

    @pytest.mark.interpreted_nightly
    @pytest.mark.parametrize("coef", [[0.0], [0.0, 1.0], [0.0, 0.0, 2.0]])
    def test_singular(self, implementation, coef):
        x = toeplitz_solve(jnp.array(coef), jnp.ones(4), implementation=implementation)
        assert not np.isfinite(x).any()

    # -- Accuracy

    @pytest.mark.each_value
    @pytest.mark.parametrize("echo", [None, 600])
    @pytest.mark.parametrize("transpose", [False, True])
    def test_sums_are_made_in_float64(self, implementation, transpose, echo):
        coef = np.array([1, -1], np.float32)  # running sums
        if echo:
            coef = np.concatenate([coef, np.zeros(echo - 2, np.float32), coef])
        rhs = coefficients.cancelling(1500)
        naive = np.cumsum(rhs, dtype=np.float32)[2:echo:3]
        x = toeplitz_solve(
            coef,
            rhs[::-1] if transpose else rhs,
            transpose=transpose,
            implementation=implementation,
        )
        assert x.dtype == jnp.float32
        actual = np.asarray(x[::-1] if transpose else x)[2::3]
        expected = coefficients.solution(coef, rhs)[2::3].astype(np.float64)
        assert np.abs(naive / expected[: naive.size] - 1).min() > 1e-3
        np.testing.assert_allclose(actual, expected, rtol=1e-6)

    @pytest.mark.interpreted_nightly
    def test_gradients_are_made_in_float64(self, implementation):
        weights = coefficients.cancelling(999)[::-1]
        sums = np.cumsum(weights[::-1], dtype=np.longdouble)[::-1].astype(np.float64)

        def weighted(coef, rhs):
            return (weights * toeplitz_solve(coef, rhs, implementation=implementation)).sum()

        ones = np.ones(weights.size, np.float32)
        rhs_bar = jax.grad(weighted, 1)(np.array([1, -1], np.float32), ones)
        np.testing.assert_allclose(rhs_bar[0::3], sums[0::3], rtol=1e-6)
        coef_bar = jax.grad(weighted)(np.array([1, 0, 0, 0], np.float32), ones)
        np.testing.assert_allclose(coef_bar[0::3], -sums[[0, 3]], rtol=1e-6)

    @pytest.mark.interpreted_nightly
    @pytest.mark.parametrize("transpose", [False, True])
    def test_rationals(self, implementation, transpose):
        n, rng = 23, np.random.default_rng(3)
        # Of few digits: no operation rounds. Then of many.
        short = np.array([-2.0, 1, 0, -1, 1]), rng.integers(-9, 10, n).astype(np.float64)
        long = rng.standard_normal(11) * 10.0 ** rng.integers(-3, 1, 11), rng.standard_normal(n)
        for coef, rhs in (short, long):
            T, u = [Fraction(c) for c in coef], [Fraction(v) for v in rhs]
            x = []
            for v in u[::-1] if transpose else u:
                past = sum(c * y for c, y in zip(T[1:], x[::-1], strict=False))
                x.append((v - past) / T[0])
            x = x[::-1] if transpose else x
            with jax.enable_x64(True):
                actual = np.asarray(
                    toeplitz_solve(coef, rhs, transpose=transpose, implementation=implementation)
                )
            if coef is short[0]:
                assert [Fraction(y) for y in actual] == x
            error = error_of(coef, np.array(x, np.longdouble), transpose)
            for i in range(n):
                assert abs(Fraction(actual[i]) - x[i]) <= Fraction(float(error[i]))

    def test_inverse_of_the_optimal_strategy(self, implementation):
        # The oracle's blocks are solved as the platform likes to.
        n, error = (2000, 2e-14) if implementation == "jax" else (20_000, 1e-15)
        if implementations.is_slow(IMPLEMENTATIONS, implementation):
            n = 1000
        t = np.arange(n)
        with jax.enable_x64(True):
            coef = toeplitz.optimal_max_error_strategy_coefs(n)
            first = jnp.zeros(n).at[0].set(1)
            actual = np.asarray(toeplitz_solve(coef, first, implementation=implementation))
        exact = -np.asarray(coef) / (2 * t - 1)
        assert np.all(np.abs(actual / exact - 1) < error * (t + 10))

    # -- Derivatives

    @pytest.mark.interpreted_nightly
    def test_numeric_derivatives(self, implementation):
        solve, _, case = pair(implementation, 6, 4, transpose=True)
        with jax.enable_x64(True):
            jax.test_util.check_grads(solve, case.arrays(), 1, ["rev"], rtol=1e-6, atol=1e-8)

    @pytest.mark.interpreted_nightly
    def test_second_derivatives(self, implementation):
        case = pair(implementation, 5, 7, (2, 2), transpose=True)
        coefficients.check_derivatives(*case, second=True)

    @pytest.mark.interpreted_nightly
    def test_gradients_of_many_rows(self, implementation):
        coefficients.check_derivatives(*pair(implementation, 300, 310, (3,), True))

    # -- Transformations

    @pytest.mark.interpreted_nightly
    def test_vmap(self, implementation):
        solve, reference, _ = pair(implementation, 6, 3)
        coefficients.check_toeplitz_vmap(solve, reference)

    @pytest.mark.interpreted_nightly
    def test_scan(self, implementation):
        solve, reference, case = pair(implementation, 300, 4, (2,))
        coef, rhs = (x.astype("float32") for x in case.arrays())
        coef = coef.at[1:].multiply(0.2)  # for three solutions that magnify no errors
        coefficients.check_scan(
            lambda x, coef: solve(coef, x), lambda x, coef: reference(coef, x), rhs, coef
        )

    # -- Types

    @pytest.mark.interpreted_nightly
    @pytest.mark.parametrize(("coef", "rhs", "x64", "out"), coefficients.DTYPES)
    def test_dtypes(self, implementation, coef, rhs, x64, out):
        solve = functools.partial(toeplitz_solve, implementation=implementation)
        with jax.enable_x64(x64):
            coefficients.check_dtypes(
                solve, (coef, rhs), out, [2.1, -2.3, 1.7], [[3.2], [4.1], [1.3], [-2.6]]
            )

    @pytest.mark.interpreted_nightly
    def test_x64_mode_may_change(self, implementation):
        function = functools.partial(toeplitz_solve, implementation=implementation)
        coefficients.check_x64_mode_may_change(function)


# -- Dispatch ---------------------------------------------------------------------------------

OP = "toeplitz_solve", toeplitz_solve, IMPLEMENTATIONS
TARGET = "jpk_toeplitz_solve"
COEF, RHS = jnp.array([1.0, 0.5, 0.25]), jnp.ones((5, 2))


def test_selection(monkeypatch):
    coefficients.check_selection(*OP, monkeypatch, COEF, RHS)


@pytest.mark.parametrize("platforms", coefficients.PLATFORMS, ids=" ".join)
def test_export(monkeypatch, platforms):
    coefficients.check_export(*OP, monkeypatch, platforms, COEF, RHS)


def test_pallas_lowers_for_cuda():
    coefficients.check_pallas_lowers(*OP[1:], COEF, RHS)


def test_threads_in_pallas_wait_for_what_others_have_written():
    """An interpreter runs one thread, and misses no barrier."""
    if reason := IMPLEMENTATIONS["pallas"].unavailable():
        pytest.skip(reason)
    traced = jax.jit(functools.partial(toeplitz_solve, implementation="pallas")).trace(COEF, RHS)
    assert "barrier" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_long_ones_are_refused(monkeypatch):
    def shapes(rows):
        return toeplitz_solve, (3,), (rows,)

    coefficients.check_long_ones_are_refused(OP[0], OP[2], monkeypatch, shapes)


F = "float32"
WRONG = {
    "needs float32 or float64 buffers": [
        ([((3,), "float16"), ((5, 2), F)], [((5, 2), F)]),
        ([((3,), F), ((5, 2), "int32")], [((5, 2), F)]),
        ([((3,), F), ((5, 2), F)], [((5, 2), "int16")]),
    ],
    "needs coefficients .*, vectors .* and results": [
        ([((), F), ((5, 2), F)], [((5, 2), F)]),
        ([((3,), F), ((5,), F)], [((5,), F)]),
        ([((3,), F), ((5, 2), F)], [((5, 2, 1), F)]),
    ],
    "needs equal leading dimensions": [
        ([((2, 3), F), ((3, 5, 2), F)], [((3, 5, 2), F)]),
        ([((3, 3), F), ((3, 5, 2), F)], [((4, 5, 2), F)]),
    ],
    "needs m >= 1, 1 <= rows <= n": [
        ([((0,), F), ((5, 2), F)], [((5, 2), F)]),
        ([((3,), F), ((0, 2), F)], [((1, 2), F)]),
        ([((3,), F), ((5, 2), F)], [((6, 2), F)]),
        ([((3,), F), ((5, 2), F)], [((5, 3), F)]),
    ],
    "solves for all rows": [([((3,), F), ((5, 2), F)], [((4, 2), F)])],
}


@pytest.mark.parametrize("message", WRONG)
def test_handler_checks_what_it_is_given(message):
    for arguments, results in WRONG[message]:
        coefficients.check_refusal(TARGET, message, arguments, results, transpose=False)


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_handler_takes_leading_dimensions(batch):
    arguments, results = [((*batch, 7), F), ((*batch, 5, 2), F)], [((*batch, 5, 2), F)]
    (out,) = coefficients.call_handler(TARGET, arguments, results, transpose=False)
    expected = np.broadcast_to(np.eye(5)[:, :1], out.shape)
    np.testing.assert_array_equal(out, expected)


def test_handler_needs_its_attribute():
    arguments, results = [((3,), F), ((5, 2), F)], [((5, 2), F)]
    for attributes in ({}, {"transpose": np.int64(1)}):
        coefficients.check_refusal(TARGET, "attribute|PRED", arguments, results, **attributes)
