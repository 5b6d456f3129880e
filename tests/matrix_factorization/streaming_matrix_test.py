from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sweeps import examples

from jax_privacy_kernels.matrix_factorization import streaming_matrix, toeplitz
from jax_privacy_kernels.matrix_factorization.streaming_matrix import StreamingMatrix
from jax_privacy_kernels.ops.correlated_noise._matrices import BandedRecurrence

N = 6
COEF = np.array([0.8, 0.5, 0.33])
NORMALIZED = COEF / np.linalg.norm(COEF)
ROWS = np.array([1.0, 2.0, 0.5])
LONG_ROWS = np.array([1.0, 2.0, 0.5, 2.0, 2.0, 3.0, 4.0])
RATES = np.array([1.0, 0.5, 0.25, 2.0])

# Each case builds a matrix from a `streaming_matrix` module and a `toeplitz` module.
CASES = {
    "identity": lambda s, t: s.identity(),
    "prefix_sum": lambda s, t: s.prefix_sum(),
    "diagonal": lambda s, t: s.diagonal(jnp.asarray(ROWS)),
    "sgd": lambda s, t: s.momentum_sgd_matrix(),
    "momentum": lambda s, t: s.momentum_sgd_matrix(0.9),
    "schedule": lambda s, t: s.momentum_sgd_matrix(0.9, jnp.asarray(RATES)),
    "one_band": lambda s, t: t.inverse_as_streaming_matrix(jnp.asarray([2.0])),
    "banded": lambda s, t: t.inverse_as_streaming_matrix(jnp.asarray(COEF)),
    "normalized": lambda s, t: t.inverse_as_streaming_matrix(jnp.asarray(NORMALIZED), N),
    "product": lambda s, t: s.prefix_sum() @ t.inverse_as_streaming_matrix(jnp.asarray(COEF)),
    "times_scalar": lambda s, t: s.prefix_sum() * 2.5,
    "scaled_rows": lambda s, t: s.scale_rows_and_columns(
        s.prefix_sum(), row_scale=jnp.asarray(ROWS)
    ),
    "scaled_both": lambda s, t: s.prefix_sum().scale_rows_and_columns(
        jnp.asarray(ROWS), jnp.asarray(RATES)
    ),
}


def extend(scale, n):
    return np.asarray(scale, np.float64)[np.minimum(np.arange(n), len(scale) - 1)]


def dense_strategy(coef, n):
    return sum(c * np.eye(n, k=-lag) for lag, c in enumerate(coef))


def dense_momentum(momentum, rates, n):
    buffers = np.tril(float(momentum) ** (np.arange(n)[:, None] - np.arange(n)).clip(0))
    return np.tril(np.ones((n, n))) @ np.diag(extend(rates, n)) @ buffers


def dense(case, n):
    prefix = np.tril(np.ones((n, n)))
    normalized = dense_strategy(NORMALIZED, n)
    return {
        "identity": np.eye(n),
        "prefix_sum": prefix,
        "diagonal": np.diag(extend(ROWS, n)),
        "sgd": prefix,
        "momentum": dense_momentum(0.9, [1.0], n),
        "schedule": dense_momentum(0.9, RATES, n),
        "one_band": np.eye(n) / 2,
        "banded": np.linalg.inv(dense_strategy(COEF, n)),
        "normalized": np.linalg.inv(normalized / np.linalg.norm(normalized, axis=0)),
        "product": prefix @ np.linalg.inv(dense_strategy(COEF, n)),
        "times_scalar": 2.5 * prefix,
        "scaled_rows": np.diag(extend(ROWS, n)) @ prefix,
        "scaled_both": np.diag(extend(ROWS, n)) @ prefix @ np.diag(extend(RATES, n)),
    }[case]


def structured_rows(structure, z):
    """The rows that a BandedRecurrence describes, solved one by one in float64."""
    coef = np.asarray(structure.coef, np.float64)
    scale = [1.0] if structure.row_scale is None else structure.row_scale
    x = np.zeros(z.shape)
    for t in range(len(z)):
        history = sum(coef[lag] * x[t - lag] for lag in range(1, min(len(coef), t + 1)))
        x[t] = (z[t] - history) / coef[0]
    return extend(scale, len(z)).reshape(-1, *[1] * (z.ndim - 1)) * x


def assert_structure_matches(matrix, n):
    z = np.random.default_rng(n).normal(size=(n, 2))
    expected = structured_rows(matrix.structure, z)
    np.testing.assert_allclose(matrix @ jnp.asarray(z), expected, rtol=2e-5, atol=2e-5)


def build(case):
    return CASES[case](streaming_matrix, toeplitz)


@pytest.fixture(scope="module")
def reference():
    return pytest.importorskip("jax_privacy.matrix_factorization")


# -- Products ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_materialize_is_the_dense_matrix(case):
    np.testing.assert_allclose(build(case).materialize(N), dense(case, N), atol=2e-6)
    with jax.enable_x64(True):
        actual = build(case).materialize(N)
        assert actual.dtype == jnp.float64
        np.testing.assert_allclose(actual, dense(case, N), atol=1e-13)


@pytest.mark.parametrize("case", CASES)
def test_row_norms_squared_are_those_of_the_dense_matrix(case):
    expected = (dense(case, N) ** 2).sum(axis=1)
    np.testing.assert_allclose(build(case).row_norms_squared(N), expected, rtol=1e-5)


# The state of prefix_sum has the dtype of the rows, so a factor to its right must not widen them.
WIDENING = ("product", "times_scalar", "scaled_both")


@pytest.mark.each_value
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, "float32") for case in CASES]
    + [(case, dtype) for case in CASES if case not in WIDENING for dtype in ("int32", "bfloat16")],
)
@pytest.mark.parametrize("shape", [(), (2, 3), (0,)])
def test_products_agree_with_reference(reference, case, dtype, shape):
    theirs = CASES[case](reference.streaming_matrix, reference.toeplitz)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(N, *shape)) * 5, dtype)
    expected, actual = theirs @ x, build(case) @ x
    assert actual.dtype == expected.dtype
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), np.asarray(expected, np.float64), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("case", CASES)
def test_states_agree_with_reference(reference, case):
    theirs = CASES[case](reference.streaming_matrix, reference.toeplitz)
    ours = build(case)
    x = {"a": jnp.arange(3.0), "b": jnp.ones((2, 2))}
    their_state, our_state = theirs.init_multiply(x), ours.init_multiply(x)
    for _ in range(N):
        expected, their_state = theirs.multiply_next(x, their_state)
        actual, our_state = ours.multiply_next(x, our_state)
        assert jax.tree.structure(actual) == jax.tree.structure(expected)
        assert jax.tree.structure(our_state) == jax.tree.structure(their_state)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
            (actual, our_state),
            (expected, their_state),
        )


@pytest.mark.parametrize("case", CASES)
def test_init_needs_only_shapes(case):
    x = {"a": jnp.ones(3), "b": jnp.ones((2, 2), jnp.bfloat16)}
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), x)
    matrix = build(case)
    expected, actual = matrix.init_multiply(x), matrix.init_multiply(shapes)
    assert jax.tree.map(jnp.shape, actual) == jax.tree.map(jnp.shape, expected)
    assert jax.tree.map(jnp.result_type, actual) == jax.tree.map(jnp.result_type, expected)


@pytest.mark.parametrize("case", CASES)
def test_jit_and_vmap_agree_with_the_plain_product(case):
    matrix = build(case)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(N, 4)), jnp.float32)
    expected = matrix @ x
    np.testing.assert_allclose(jax.jit(lambda x: matrix @ x)(x), expected, atol=1e-6)
    mapped = jax.vmap(lambda column: matrix @ column, in_axes=1, out_axes=1)(x)
    np.testing.assert_allclose(mapped, expected, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_gradient_of_a_product_is_the_transpose(case):
    matrix, g = build(case), jnp.arange(1.0, N + 1)
    gradient = jax.grad(lambda x: jnp.vdot(g, matrix @ x))(jnp.zeros(N))
    np.testing.assert_allclose(gradient, dense(case, N).T @ g, rtol=1e-5, atol=1e-5)


def test_momentum_matrix_keeps_the_dtype_of_a_wide_momentum():
    with jax.enable_x64(True):
        matrix = streaming_matrix.momentum_sgd_matrix(jnp.float64(0.9), jnp.ones(1, jnp.float32))
        assert (matrix @ jnp.ones(3, jnp.float32)).dtype == jnp.float64


def test_row_norms_squared_uses_the_given_scan():
    calls = []

    def scan(*args):
        calls.append(args)
        return jax.lax.scan(*args)

    matrix = streaming_matrix.prefix_sum()
    np.testing.assert_array_equal(matrix.row_norms_squared(4, scan_fn=scan), [1, 2, 3, 4])
    assert len(calls) == 1


def test_row_norms_squared_is_differentiable():
    def total(rates):
        return streaming_matrix.momentum_sgd_matrix(0.5, rates).row_norms_squared(N).sum()

    with jax.enable_x64(True):
        rates, step = jnp.asarray(RATES), 1e-6
        numeric = [
            (total(rates.at[i].add(step)) - total(rates.at[i].add(-step))) / (2 * step)
            for i in range(len(RATES))
        ]
        np.testing.assert_allclose(jax.grad(total)(rates), numeric, rtol=1e-6)


# -- Pytrees ----------------------------------------------------------------------------------


def test_each_leaf_is_multiplied_on_its_own():
    matrix = toeplitz.inverse_as_streaming_matrix(COEF)
    rows = {"a": jnp.arange(12.0).reshape(N, 2), "b": [jnp.arange(6.0) ** 2], "none": None}
    state = matrix.init_multiply(jax.tree.map(lambda a: a[0], rows))
    for t in range(N):
        output, state = matrix.multiply_next(jax.tree.map(lambda a, t=t: a[t], rows), state)
        np.testing.assert_allclose(output["a"], (matrix @ rows["a"])[t], rtol=1e-6)
        np.testing.assert_allclose(output["b"][0], (matrix @ rows["b"][0])[t], rtol=1e-6)
        assert output["none"] is None


def test_empty_tree_has_empty_output_and_state():
    matrix = streaming_matrix.prefix_sum()
    assert matrix.multiply_next({}, matrix.init_multiply({})) == ({}, {})


def test_state_of_another_tree_is_refused():
    matrix = streaming_matrix.prefix_sum()
    state = matrix.init_multiply({"a": jnp.ones(2)})
    with pytest.raises(ValueError, match="key"):
        matrix.multiply_next({"b": jnp.ones(2)}, state)


# -- Structure --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["identity", "one_band", "banded", "normalized"])
def test_structure_describes_the_rows(case):
    matrix = build(case)
    assert isinstance(matrix.structure, BandedRecurrence)
    assert_structure_matches(matrix, N + 4)


@pytest.mark.parametrize("case", ["diagonal", "product", "times_scalar", "scaled_rows"])
def test_other_matrices_have_no_structure(case):
    assert build(case).structure is None


def test_identity_structure():
    structure = streaming_matrix.identity().structure
    np.testing.assert_array_equal(structure.coef, [1])
    assert structure.coef.dtype == jnp.float32
    assert structure.row_scale is None


def test_scalar_scales_the_structure():
    plain = build("banded") * 2
    np.testing.assert_array_equal(plain.structure.row_scale, [2])
    assert plain.structure.row_scale.dtype == plain.structure.coef.dtype
    assert_structure_matches(plain, N)

    normalized = build("normalized") * jnp.float32(-0.5)
    expected = -0.5 * build("normalized").structure.row_scale
    np.testing.assert_array_equal(normalized.structure.row_scale, expected)
    assert_structure_matches(normalized, N + 4)


def test_row_scale_enters_the_structure():
    scaled = build("banded").scale_rows_and_columns(row_scale=ROWS)
    np.testing.assert_array_equal(scaled.structure.row_scale, ROWS)
    assert_structure_matches(scaled, N)


@pytest.mark.parametrize("first", [[3.0], ROWS])
@pytest.mark.parametrize("second", [[0.5], -ROWS])
def test_row_scales_multiply(first, second):
    scaled = build("banded").scale_rows_and_columns(np.asarray(first))
    scaled = scaled.scale_rows_and_columns(np.asarray(second))
    np.testing.assert_allclose(scaled.structure.row_scale, np.multiply(first, second))
    assert_structure_matches(scaled, N)


@pytest.mark.parametrize(("first", "second"), [(ROWS, LONG_ROWS), (LONG_ROWS, ROWS)])
def test_row_scales_of_different_sizes_multiply(first, second):
    scaled = build("banded").scale_rows_and_columns(first).scale_rows_and_columns(second)
    longest = max(len(first), len(second))
    padded = (np.pad(v, (0, longest - len(v)), mode="edge") for v in (first, second))
    np.testing.assert_allclose(scaled.structure.row_scale, np.multiply(*padded))
    assert_structure_matches(scaled, longest + 2)


def test_structure_is_dropped_where_it_would_be_inexact():
    banded = build("banded")
    assert banded.scale_rows_and_columns(col_scale=ROWS).structure is None
    assert banded.scale_rows_and_columns(ROWS, ROWS).structure is None
    assert banded.scale_rows_and_columns(1j * ROWS).structure is None
    assert (banded @ banded).structure is None


def test_scaling_by_nothing_changes_nothing():
    banded = build("banded")
    assert banded.scale_rows_and_columns() is banded


def test_scaling_leaves_foreign_structures_behind():
    prefix_sum = streaming_matrix.prefix_sum()
    foreign = StreamingMatrix.from_array_implementation(
        prefix_sum.init_multiply, prefix_sum.multiply_next, structure="something else"
    )
    assert foreign.structure == "something else"
    assert foreign.scale_rows_and_columns(ROWS).structure is None
    assert (foreign * 2).structure is None


# Sizes come from short lists, so that XLA compiles few programs.
scales = st.sampled_from([1, 3, 5]).flatmap(
    lambda size: st.lists(st.floats(0.25, 4), min_size=size, max_size=size)
)


@settings(max_examples=examples(30))
@given(
    coef=st.lists(st.floats(-0.4, 0.4), min_size=0, max_size=3),
    n=st.sampled_from([None, 3, 5]),
    operations=st.lists(st.one_of(st.floats(-2, 2), scales), max_size=3),
)
def test_structure_follows_any_chain_of_row_scalings(coef, n, operations):
    coef = np.asarray([1.0, *coef])[:n]
    matrix = toeplitz.inverse_as_streaming_matrix(coef / np.linalg.norm(coef), n)
    for operation in operations:
        if isinstance(operation, float):
            matrix = matrix * operation
        else:
            matrix = matrix.scale_rows_and_columns(np.asarray(operation))
    assert matrix.structure is not None
    assert_structure_matches(matrix, 8)


def test_structure_takes_no_part_in_comparisons():
    matrix = build("banded")
    bare = dataclasses.replace(matrix)
    assert matrix.structure is not None
    assert bare.structure is None
    assert matrix == bare
    assert hash(matrix) == hash(bare)
    assert "structure" not in repr(matrix)


def test_structure_is_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        StreamingMatrix(lambda x: (), lambda x, s: (x, s), None)


def test_structure_inside_jit():
    @jax.jit
    def row_scale(factor, coef):
        return (toeplitz.inverse_as_streaming_matrix(coef) * factor).structure.row_scale

    np.testing.assert_array_equal(row_scale(3.0, jnp.ones(2)), [3])


# -- Operands ---------------------------------------------------------------------------------


def test_numpy_arrays_can_be_multiplied():
    product = streaming_matrix.prefix_sum() @ np.arange(4, dtype=np.float32)
    np.testing.assert_array_equal(product, [0, 1, 3, 6])
    assert isinstance(product, jax.Array)


@pytest.mark.parametrize("other", [[1.0, 2.0], 2.0, "x", None])
def test_matmul_refuses_other_types(other):
    with pytest.raises(ValueError, match=type(other).__name__):
        streaming_matrix.prefix_sum() @ other


@pytest.mark.parametrize("shape", [(), (0,), (0, 3)])
def test_matmul_needs_a_row(shape):
    with pytest.raises(ValueError, match="at least one row") as error:
        streaming_matrix.prefix_sum() @ jnp.zeros(shape)
    assert str(shape) in str(error.value)


@pytest.mark.parametrize(
    "scalar", [2, 2.0, True, np.float32(2), np.int8(2), np.array(2.0), jnp.asarray(2.0)], ids=repr
)
def test_real_scalars_multiply(scalar):
    actual = (streaming_matrix.prefix_sum() * scalar).materialize(3)
    np.testing.assert_array_equal(actual, float(scalar) * np.tril(np.ones((3, 3))))


@pytest.mark.parametrize(
    "other",
    ["2", None, 1j, np.complex64(1), [2.0], np.ones(1), jnp.ones((2, 2)), jnp.asarray(1j)],
    ids=repr,
)
def test_mul_refuses_all_but_real_scalars(other):
    with pytest.raises(TypeError, match="expected a real scalar") as error:
        streaming_matrix.prefix_sum() * other
    assert repr(other) in str(error.value)


def test_mul_refuses_a_matrix():
    with pytest.raises(TypeError, match="StreamingMatrix"):
        streaming_matrix.prefix_sum() * streaming_matrix.prefix_sum()


# -- Arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["materialize", "row_norms_squared"])
def test_sizes_are_checked(method):
    method = getattr(streaming_matrix.identity(), method)
    for n in (0, -1):
        with pytest.raises(ValueError, match=f"n >= 1, found n={n}"):
            method(n)
    with pytest.raises(TypeError, match=r"n to be an integer, found 2\.5"):
        method(2.5)


@pytest.mark.parametrize("bad", [1.0, [], [[1.0]]])
def test_vectors_are_checked(bad):
    shape = np.shape(bad)
    for name, make in {
        "diag": streaming_matrix.diagonal,
        "learning_rates": lambda x: streaming_matrix.momentum_sgd_matrix(0.9, x),
        "row_scale": lambda x: streaming_matrix.identity().scale_rows_and_columns(row_scale=x),
        "col_scale": lambda x: streaming_matrix.identity().scale_rows_and_columns(col_scale=x),
    }.items():
        with pytest.raises(ValueError, match=f"{name} to be a non-empty 1-D array") as error:
            make(np.asarray(bad))
        assert str(shape) in str(error.value)
        with pytest.raises(ValueError, match="non-empty 1-D array"):
            jax.jit(lambda x, make=make: make(x) @ jnp.ones(3))(jnp.asarray(bad))


@pytest.mark.parametrize("bad", [0.0, -0.5, np.nan, np.inf])
def test_learning_rates_must_be_positive_and_finite(bad):
    with pytest.raises(ValueError, match=r"positive and finite, found learning_rates\[1\] = ") as e:
        streaming_matrix.momentum_sgd_matrix(0.9, jnp.asarray([1.0, bad, -1.0]))
    assert str(bad) in str(e.value)


def test_traced_learning_rates_skip_value_checks():
    rates = jnp.asarray([1.0, 0.0])
    actual = jax.jit(lambda r: streaming_matrix.momentum_sgd_matrix(0, r).materialize(2))(rates)
    np.testing.assert_array_equal(actual, [[1, 0], [1, 0]])


def test_concrete_learning_rates_are_checked_inside_jit():
    with pytest.raises(ValueError, match="positive and finite"):
        jax.jit(lambda: streaming_matrix.momentum_sgd_matrix(0, np.zeros(1)) @ jnp.ones(2))()


def test_structure_goes_with_the_functions_it_describes():
    matrix = streaming_matrix.identity()
    assert matrix.structure is not None
    changed = dataclasses.replace(matrix, multiply_next=lambda value, state: (3 * value, state))
    assert changed.structure is None
