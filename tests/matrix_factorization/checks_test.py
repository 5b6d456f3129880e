from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_privacy_kernels.matrix_factorization import checks

LOWER = np.array([[1.0, 0.0], [2.0, 3.0]])
UPPER = LOWER.T
SYMMETRIC = np.array([[1.0, 2.0], [2.0, 5.0]])
WIDE = np.arange(6.0).reshape(2, 3)

CHECKS = {
    "is_matrix": checks.check_is_matrix,
    "square": checks.check_square,
    "finite": checks.check_finite,
    "lower_triangular": checks.check_lower_triangular,
    "symmetric": checks.check_symmetric,
}


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray, lambda M: M.astype(np.int32)])
@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("is_matrix", WIDE),
        ("square", UPPER),
        ("finite", WIDE),
        ("lower_triangular", LOWER),
        ("lower_triangular", np.tri(2, 3)),
        ("lower_triangular", np.tri(3, 2)),
        ("symmetric", SYMMETRIC),
    ],
)
def test_valid_matrices_pass(kind, name, valid):
    assert CHECKS[name](kind(valid), "M") is None


@pytest.mark.parametrize(
    ("name", "invalid", "message"),
    [
        ("is_matrix", np.ones(3), r"to have 2 dimensions, found shape \(3,\)"),
        ("is_matrix", np.ones((1, 2, 3)), r"to have 2 dimensions, found shape \(1, 2, 3\)"),
        ("square", WIDE, r"to be square, found shape \(2, 3\)"),
        ("square", np.ones(4), r"to be square, found shape \(4,\)"),
        ("square", np.ones((2, 2, 2)), r"to be square, found shape \(2, 2, 2\)"),
        ("finite", np.array([[1, 2], [np.nan, 3]]), r"to be finite, found entry \(1, 0\) = nan"),
        ("finite", np.array([[1, -np.inf]]), r"to be finite, found entry \(0, 1\) = -inf"),
        ("lower_triangular", UPPER, r"to be lower-triangular, found entry \(0, 1\) = 2\.0"),
        (
            "lower_triangular",
            np.array([[1.0, 0, 0], [0, 1, 7]]),
            r"to be lower-triangular, found entry \(1, 2\) = 7\.0",
        ),
        ("symmetric", LOWER, r"to be symmetric, found entry \(0, 1\) = 0\.0"),
    ],
)
def test_errors_name_the_matrix_and_what_was_found(name, invalid, message):
    for M in (invalid, jnp.asarray(invalid)):
        with pytest.raises(ValueError, match="expected matrix Gram " + message):
            CHECKS[name](M, "Gram")
        with pytest.raises(ValueError, match="expected the matrix " + message):
            CHECKS[name](M)


@pytest.mark.parametrize(
    ("name", "nearly"),
    [
        ("lower_triangular", np.array([[1.0, 0.1], [2.0, 1.0]])),
        ("symmetric", np.array([[1.0, 2.1], [2.0, 1.0]])),
    ],
)
def test_tolerances_are_passed_on(name, nearly):
    CHECKS[name](nearly, atol=0.2)
    with pytest.raises(ValueError, match="found entry"):
        CHECKS[name](nearly, atol=0.05, rtol=0.0)
    with pytest.raises(ValueError, match="found entry"):
        CHECKS[name](nearly)


def test_tolerances_are_those_of_allclose():
    nearly = np.array([[1.0, 1e-9], [0.0, 1.0]])
    checks.check_lower_triangular(nearly)
    with pytest.raises(ValueError, match=r"found entry \(0, 1\) = 9\.99"):
        checks.check_lower_triangular(nearly, atol=0.0)
    checks.check_symmetric(np.array([[1.0, 2.0], [2.1, 1.0]]), rtol=0.06)
    holes = np.array([[1.0, np.nan], [np.nan, 1.0]])
    checks.check_symmetric(holes, equal_nan=True)
    with pytest.raises(ValueError, match="to be symmetric"):
        checks.check_symmetric(holes)


def test_float64_entries_are_compared_as_such():
    nearly = np.array([[1.0, 1.0], [1.0 + 1e-12, 1.0]])
    with jax.enable_x64(True):
        with pytest.raises(ValueError, match="to be symmetric"):
            checks.check_symmetric(nearly, rtol=0.0, atol=0.0)
        checks.check_finite(np.array([[1e300]]))


# -- All together -----------------------------------------------------------------------------

A = np.tri(2)
B = np.arange(1.0, 7.0).reshape(2, 3)
C = np.arange(1.0, 7.0).reshape(3, 2)
X = C.T @ C


@pytest.mark.parametrize(
    "matrices",
    [
        {},
        {"A": A},
        {"B": B},
        {"C": C},
        {"X": X},
        {"A": A, "B": B, "C": C, "X": X},
        {"A": A, "B": LOWER, "C": LOWER, "X": SYMMETRIC},
        {"A": np.tri(2, dtype=int), "X": jnp.asarray(X)},
        {"C": np.ones((5, 2)), "X": X},
        {"B": np.ones((2, 5)), "X": X},
    ],
)
def test_valid_factorizations_pass(matrices):
    assert checks.check(**matrices) is None


@pytest.mark.parametrize(
    ("matrices", "message"),
    [
        ({"A": B}, r"matrix A to be square, found shape \(2, 3\)"),
        ({"A": UPPER}, r"matrix A to be lower-triangular, found entry \(0, 1\) = 2\.0"),
        ({"A": np.array([[np.nan]])}, r"matrix A to be finite, found entry \(0, 0\) = nan"),
        ({"B": np.ones(2)}, r"matrix B to have 2 dimensions, found shape \(2,\)"),
        ({"B": np.ones((2, 2))}, r"matrix B to be lower-triangular, found entry \(0, 1\) = 1\.0"),
        ({"B": np.full((2, 3), np.inf)}, r"matrix B to be finite, found entry \(0, 0\) = inf"),
        ({"C": np.ones((2, 2, 2))}, r"matrix C to have 2 dimensions, found shape \(2, 2, 2\)"),
        ({"C": np.ones((2, 2))}, r"matrix C to be lower-triangular, found entry \(0, 1\) = 1\.0"),
        ({"C": np.full((3, 2), -np.inf)}, r"matrix C to be finite, found entry \(0, 0\) = -inf"),
        ({"X": C}, r"matrix X to be square, found shape \(3, 2\)"),
        ({"X": LOWER}, r"matrix X to be symmetric, found entry \(0, 1\) = 0\.0"),
        ({"X": X * np.nan}, r"matrix X to be finite, found entry \(0, 0\) = nan"),
        ({"A": A, "C": LOWER, "X": LOWER}, "matrix X to be symmetric"),
    ],
)
def test_check_looks_at_every_matrix(matrices, message):
    with pytest.raises(ValueError, match=message):
        checks.check(**matrices)


@pytest.mark.parametrize(
    "matrices",
    [
        {"A": np.tri(3), "B": B},
        {"A": np.tri(3), "C": C},
        {"A": np.tri(3), "X": X},
        {"B": C, "X": X},
        {"C": B, "X": X},
        {"B": B, "C": np.ones((4, 2))},
        {"B": B, "C": B},
        {"B": LOWER, "C": C},
    ],
)
def test_shapes_must_fit_together(matrices):
    with pytest.raises(ValueError, match=r"expected shapes A .*found") as error:
        checks.check(**matrices)
    for name, M in matrices.items():
        assert f"'{name}': {M.shape}" in str(error.value)


def test_check_passes_tolerances_on():
    nearly_lower = np.array([[1.0, 0.1], [2.0, 1.0]])
    nearly_symmetric = np.array([[1.0, 2.1], [2.0, 1.0]])
    checks.check(A=nearly_lower, B=nearly_lower, C=nearly_lower, X=nearly_symmetric, atol=0.2)
    for matrix in ({"A": nearly_lower}, {"B": nearly_lower}, {"C": nearly_lower}):
        with pytest.raises(ValueError, match="to be lower-triangular"):
            checks.check(**matrix, atol=0.05)
    with pytest.raises(ValueError, match="to be symmetric"):
        checks.check(X=nearly_symmetric, atol=0.05, rtol=0.0)


def test_check_takes_keywords_only():
    with pytest.raises(TypeError, match="positional"):
        checks.check(A)


# -- Inside a trace ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["finite", "lower_triangular", "symmetric"])
def test_traced_values_are_not_checked(name):
    def f(M):
        CHECKS[name](M)
        return M

    bad = jnp.array([[jnp.nan, 1.0], [2.0, 3.0]])
    np.testing.assert_array_equal(jax.jit(f)(bad), bad)
    np.testing.assert_array_equal(jax.vmap(f)(bad[None]), bad[None])
    np.testing.assert_array_equal(jax.grad(lambda M: jnp.sum(f(M)))(bad), np.ones((2, 2)))


def test_traced_shapes_are_checked():
    @jax.jit
    def f(**matrices):
        checks.check(**matrices)
        return 0

    assert f(A=UPPER, B=UPPER, C=UPPER, X=LOWER) == 0
    for matrices, message in [
        ({"A": B}, "matrix A to be square"),
        ({"B": np.ones(2)}, "matrix B to have 2 dimensions"),
        ({"C": np.ones(2)}, "matrix C to have 2 dimensions"),
        ({"X": C}, "matrix X to be square"),
        ({"B": B, "C": B}, "expected shapes"),
    ]:
        with pytest.raises(ValueError, match=message):
            f(**matrices)


@pytest.mark.parametrize("name", ["finite", "lower_triangular", "symmetric"])
def test_known_values_are_checked_inside_jit(name):
    valid = {"finite": WIDE, "lower_triangular": LOWER, "symmetric": SYMMETRIC}[name]

    def f(x, M):
        CHECKS[name](M, "M")
        return x

    assert jax.jit(lambda x: f(x, valid))(1.0) == 1
    with pytest.raises(ValueError, match="expected matrix M"):
        jax.jit(lambda x: f(x, np.array([[1, np.inf], [2, 3]])))(1.0)
