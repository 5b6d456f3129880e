"""Sensitivities and bounds against rational arithmetic: none is below the truth, none vanishes."""

from __future__ import annotations

import decimal
import itertools
import math
import warnings
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_privacy_kernels.matrix_factorization import banded, sensitivity, toeplitz
from jax_privacy_kernels.matrix_factorization import buffered_toeplitz as blts

# Rounding of sums of numbers that are not negative.
TOLERANCE = Fraction(1, 10**12)

entries = st.floats(-1, 1).map(lambda x: round(x, 6))
limits = st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from([None, 1, 2]))
scales = st.sampled_from([1.0, 2.0**-400, 1e-150, 1e150, 2.0**400])


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def exact(x):
    return [Fraction(float(v)) for v in np.ravel(x)]


def toeplitz_matrix(coef, n):
    return [
        [coef[i - j] if 0 <= i - j < len(coef) else Fraction(0) for j in range(n)] for i in range(n)
    ]


def inverse_coefs(coef, n):
    coef = coef[:n]
    result = [1 / coef[0]]
    for t in range(1, n):
        terms = (coef[lag] * result[t - lag] for lag in range(1, min(t, len(coef) - 1) + 1))
        result.append(-sum(terms, Fraction(0)) / coef[0])
    return result


def patterns(n, min_sep, k):
    for size in range(1, (k or n) + 1):
        for rounds in itertools.combinations(range(n), size):
            if all(b - a >= min_sep for a, b in itertools.pairwise(rounds)):
                yield rounds


def gram(C):
    return [
        [sum(x * y for x, y in zip(a, b, strict=True)) for b in zip(*C, strict=True)]
        for a in zip(*C, strict=True)
    ]


def sensitivity_squared(C, min_sep, k):
    """The largest squared norm of a signed sum of columns: what any bound has to reach."""
    X = gram(C)
    best = Fraction(0)
    for rounds in patterns(len(X), min_sep, k):
        for signs in itertools.product((1, -1), repeat=len(rounds) - 1):
            signed = list(zip(rounds, (1, *signs), strict=True))
            best = max(best, sum(s * t * X[i][j] for i, s in signed for j, t in signed))
    return best


def check_bound(actual, truth, at_most=None):
    """A bound on a squared sensitivity, a float, is not below it (nor far above ``at_most``)."""
    if not isinstance(actual, Fraction):
        assert math.isfinite(actual)
        actual = Fraction(float(actual))
    assert actual >= truth * (1 - TOLERANCE)
    assert (actual == 0) == (truth == 0)
    if at_most is not None:
        assert actual <= at_most * (1 + Fraction(1, 10**8))


def squared(bound):
    """The exact square of a float, or of an array of one."""
    return Fraction(float(bound)) ** 2


def check_or_refused(bound, truth, at_most=None):
    """A bound that float64 holds, or a ValueError because it does not."""
    try:
        actual = bound()
    except ValueError:
        assert not Fraction(2) ** -1020 <= truth <= Fraction(2) ** 1020
    else:
        check_bound(actual, truth, at_most)


@settings(deadline=None, max_examples=30)
@given(st.lists(entries, min_size=1, max_size=5), limits, scales)
def test_toeplitz_strategies(coef, limit, scale):
    coef = np.array(coef) * scale
    n, (min_sep, k) = 5, limit
    C = toeplitz_matrix(exact(coef), n)
    one = sum(c**2 for c in exact(coef))
    check_or_refused(lambda: toeplitz.sensitivity_squared(coef, n), one, one)
    check_or_refused(
        lambda: toeplitz.minsep_sensitivity_squared(coef, min_sep, n=n, max_participations=k),
        sensitivity_squared(C, min_sep, k),
    )


@settings(deadline=None, max_examples=30)
@given(st.lists(entries, min_size=1, max_size=4), limits, scales, st.booleans())
def test_banded_inverses(coef, limit, scale, use_matrix):
    coef = np.array([1.0, *coef]) * scale
    n, (min_sep, k) = 5, limit
    truth = sensitivity_squared(toeplitz_matrix(inverse_coefs(exact(coef), n), n), min_sep, k)
    check_or_refused(
        lambda: toeplitz.compute_banded_inverse_sensitivity_squared(
            n, coef, min_sep, k, use_matrix_upper_bound=use_matrix
        ),
        truth,
    )


@pytest.mark.parametrize("use_matrix", [False, True])
@pytest.mark.parametrize("power", [2, 6, 10])
def test_ill_conditioned_banded_inverses(power, use_matrix):
    coef = np.ones(1)
    for _ in range(power):
        coef = np.convolve(coef, [1, -1.0])
    coef *= 1 + 2.0**-40 * np.arange(power + 1)  # no integers
    n = 300
    truth = sum(c**2 for c in inverse_coefs(exact(coef), n))
    actual = toeplitz.compute_banded_inverse_sensitivity_squared(
        n, coef, n, 1, use_matrix_upper_bound=use_matrix
    )
    assert Fraction(float(actual)) >= truth * (1 - TOLERANCE)


def test_bounds_hold_in_a_trace_or_are_infinite():
    coef = np.ones(1)
    for _ in range(10):
        coef = np.convolve(coef, [1, -1.0])
    bound = jax.jit(lambda w: toeplitz.compute_banded_inverse_sensitivity_squared(400, w, 400, 1))
    truth = sum(c**2 for c in inverse_coefs(exact(coef), 400))
    assert bound(coef) == np.inf or Fraction(float(bound(coef))) >= truth
    mild = np.array([1.0, -0.5, -0.1])
    truth = sum(c**2 for c in inverse_coefs(exact(mild), 400))
    np.testing.assert_allclose(bound(mild), float(truth), rtol=1e-12)


@settings(deadline=None, max_examples=30)
@given(st.lists(entries, min_size=10, max_size=10), limits, scales)
def test_dense_strategies(values, limit, scale):
    C = np.zeros((4, 4))
    C[np.tril_indices(4)] = np.array(values) * scale
    fractions = [exact(row) for row in C]
    min_sep, k = limit
    truth = sensitivity_squared(fractions, min_sep, k)
    root = sensitivity.get_min_sep_sensitivity_upper_bound
    check_or_refused(lambda: squared(root(C, min_sep, k)), truth)
    one = max(sum(x**2 for x in column) for column in zip(*fractions, strict=True))
    check_or_refused(lambda: squared(sensitivity.single_participation_sensitivity(C)), one, one)
    X = gram(fractions)
    rounds = [(0, 2), (1, 3)]
    epochs = max(sum(abs(X[i][j]) for i in r for j in r) for r in rounds)
    check_or_refused(lambda: squared(sensitivity.fixed_epoch_sensitivity(C, 2)), epochs, epochs)
    two_bands = np.tril(np.triu(C, -1))
    fractions = [exact(row) for row in two_bands]
    truth = sensitivity_squared(fractions, 2, k)
    check_or_refused(
        lambda: squared(sensitivity.get_sensitivity_banded(two_bands, 2, k)),
        truth,
        truth,
    )


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.floats(-1, 1), min_size=1, max_size=3),
    st.lists(entries, min_size=3, max_size=3),
    st.sampled_from([1, 2, 17, 60]),
)
def test_blts(theta, omega, n):
    blt = blts.BufferedToeplitz(np.array(theta), np.array(omega[: len(theta)]))
    decays, weights = exact(theta), exact(blt.output_scale)
    coefs = [Fraction(1)]
    powers = list(weights)
    for _ in range(n - 1):
        coefs.append(sum(powers))
        powers = [p * d for p, d in zip(powers, decays, strict=True)]
    truth = sum(c**2 for c in coefs)
    check_bound(float(blts.sensitivity_squared(blt, n)), truth, truth)
    loss_fn = blts.LossFn.build_min_sep(n, min_sep=n, max_participations=1)
    check_bound(float(loss_fn.sensitivity_squared(blt)), truth)


@pytest.mark.parametrize("n", [10**9, 10**12, 1e15])
def test_blts_of_many_steps(n):
    theta, omega = [1 - 1e-9, 0.5], [0.01, 0.2]
    blt = blts.BufferedToeplitz.build(theta, omega)
    with decimal.localcontext(prec=60):
        d = [decimal.Decimal(float(x)) for x in blt.buf_decay]
        w = [decimal.Decimal(float(x)) for x in blt.output_scale]
        truth = 1 + sum(
            w[i] * w[j] * (1 - (d[i] * d[j]) ** (int(n) - 1)) / (1 - d[i] * d[j])
            for i in range(2)
            for j in range(2)
        )
        actual = decimal.Decimal(float(blts.sensitivity_squared(blt, n)))
        assert truth <= actual <= truth * (1 + decimal.Decimal("1e-12"))


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1.0, 1e30, 1e200])
def test_column_normalized_strategies_have_unit_columns(scale):
    params = jnp.asarray([[2.0, 1.0], [1.0, -1.0], [3.0, 0.0]]) * scale
    C = banded.ColumnNormalizedBanded(params)
    np.testing.assert_allclose(np.linalg.norm(C.materialize(), axis=0), 1, rtol=1e-14)
    expected = banded.per_query_error(banded.ColumnNormalizedBanded(params / scale))
    np.testing.assert_allclose(banded.per_query_error(C), expected, rtol=1e-12)
    noising = C.inverse_as_streaming_matrix().materialize(3)
    np.testing.assert_allclose(noising @ C.materialize(), np.eye(3), atol=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("steep", [False, True])
def test_normalized_toeplitz_strategies_have_noise_to_the_last_row(dtype, steep):
    coef = np.array([1e-30, 1.0] if steep else [1e-25, 5e-26], dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the norm of coef
        matrix = toeplitz.inverse_as_streaming_matrix(coef, column_normalize_for_n=2)
    wide = coef.astype(np.float64)
    norms = [np.hypot(*wide), wide[0]]
    C = np.array([[wide[0] / norms[0], 0], [wide[1] / norms[0], wide[0] / norms[1]]])
    np.testing.assert_allclose(matrix.materialize(2), np.linalg.inv(C), rtol=1e-6)
    assert np.isnan(np.asarray(matrix.materialize(3))[2]).all()
