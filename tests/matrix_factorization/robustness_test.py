"""What callers do besides: write to their arrays, ask for too much, interrupt, differentiate."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import sweeps

from jax_privacy_kernels.matrix_factorization import (
    banded,
    buffered_toeplitz,
    dense,
    optimization,
    sensitivity,
    streaming_matrix,
    toeplitz,
)


def aligned(values):
    """A NumPy array whose memory JAX would take over."""
    values = np.asarray(values, np.float32)
    raw = np.zeros(values.size + 32, np.float32)
    start = (-raw.ctypes.data % 64) // 4
    view = raw[start : start + values.size].reshape(values.shape)
    view[...] = values
    return view


BUILD = buffered_toeplitz.BufferedToeplitz
OWNERS = {
    "BufferedToeplitz.build": lambda x: BUILD.build(
        [0.9, 0.5, 0.4, 0.3], x, "float32"
    ).inverse_as_streaming_matrix(),
    "BufferedToeplitz": lambda x: BUILD(
        np.float32([0.9, 0.5, 0.4, 0.3]), x
    ).inverse_as_streaming_matrix(),
    "StreamingMatrixBuilder": lambda x: buffered_toeplitz.StreamingMatrixBuilder(
        buf_decay=np.float32([0.9, 0.5, 0.4, 0.3]), output_scale=x
    ).build(),
    "inverse_as_streaming_matrix": toeplitz.inverse_as_streaming_matrix,
    "noising_coef_as_streaming_matrix": toeplitz.noising_coef_as_streaming_matrix,
    "diagonal": streaming_matrix.diagonal,
    "momentum_sgd_matrix": lambda x: streaming_matrix.momentum_sgd_matrix(0.5, x),
    "scale_rows_and_columns": lambda x: streaming_matrix.prefix_sum().scale_rows_and_columns(x, x),
    "ColumnNormalizedBanded": lambda x: banded.ColumnNormalizedBanded(
        x.reshape(4, 1)
    ).inverse_as_streaming_matrix(),
}


@pytest.mark.parametrize("name", OWNERS)
def test_matrices_own_their_numbers(name):
    x = aligned([0.4, 0.3, 0.2, 0.1])
    matrix = OWNERS[name](x)
    before = np.array(matrix.materialize(4))
    leaves = [np.array(leaf) for leaf in jax.tree.leaves(matrix.structure)]
    x[...] = -7
    np.testing.assert_array_equal(matrix.materialize(4), before)
    for leaf, old in zip(jax.tree.leaves(matrix.structure), leaves, strict=True):
        np.testing.assert_array_equal(leaf, old)


def test_strategies_own_their_parameters():
    x = aligned([[1.0, 0.5], [1.0, 0.0]])
    C = banded.ColumnNormalizedBanded(x)
    x[...] = 0
    np.testing.assert_array_equal(C.params, [[1.0, 0.5], [1.0, 0.0]])


HUGE = 2**31 - 1
BEYOND_MEMORY = {
    "banded_lower_triangular_mask": lambda: sensitivity.banded_lower_triangular_mask(HUGE, 2),
    "banded_symmetric_mask": lambda: sensitivity.banded_symmetric_mask(HUGE, 2),
    "get_orthogonal_mask": lambda: dense.get_orthogonal_mask(HUGE),
    "dense.optimize": lambda: dense.optimize(HUGE),
    "materialize": lambda: streaming_matrix.identity().materialize(HUGE),
    "row_norms_squared": lambda: streaming_matrix.identity().row_norms_squared(10**15),
    "BufferedToeplitz.materialize": lambda: BUILD.build([0.5], [0.1], "float32").materialize(HUGE),
    "BufferedToeplitz.toeplitz_coefs": lambda: BUILD.build([0.5], [0.1], "float32").toeplitz_coefs(
        10**15
    ),
    "materialize_lower_triangular": lambda: toeplitz.materialize_lower_triangular([1.0], HUGE),
    "optimal_max_error_strategy_coefs": lambda: toeplitz.optimal_max_error_strategy_coefs(10**15),
    "pad_coefs_to_n": lambda: toeplitz.pad_coefs_to_n([1.0], 10**15),
    "minsep_sensitivity_squared": lambda: toeplitz.minsep_sensitivity_squared([1.0], 1, n=10**15),
    "optimize_banded_toeplitz": lambda: toeplitz.optimize_banded_toeplitz(10**15, 3),
    "ColumnNormalizedBanded": lambda: banded.ColumnNormalizedBanded.default(10**15, 3),
    "LossFn.build_min_sep": lambda: buffered_toeplitz.LossFn.build_min_sep(
        10**15, workload_coef=[1.0]
    ),
    "column_normalize_for_n": lambda: toeplitz.inverse_as_streaming_matrix([1.0], 10**15),
}


@pytest.mark.parametrize("name", BEYOND_MEMORY)
def test_sizes_beyond_memory_are_errors(name):
    with pytest.raises(ValueError, match=r"n.* of which the arrays fit into .* takes \d+ bytes"):
        BEYOND_MEMORY[name]()


def test_a_size_that_overflows_does_not_end_the_process():
    code = (
        "from jax_privacy_kernels.matrix_factorization import sensitivity\n"
        f"try: sensitivity.banded_lower_triangular_mask({HUGE}, 2)\n"
        "except ValueError: print('refused')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "refused", result.stderr


def test_loops_hand_control_back(monkeypatch):
    waits = []

    def run():
        turns = []
        in_turns = optimization._in_turns

        def counted(loop, *arguments):
            def one_turn(*args):
                turns.append(1)
                return loop(*args)

            return in_turns(one_turn, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(optimization, "_in_turns", counted)
            coef = toeplitz.optimize_banded_toeplitz(50, 4)
        waits.append(len(turns))
        return np.asarray(coef)

    often = run()
    monkeypatch.setattr(optimization, "_SECONDS", 0.0)
    np.testing.assert_array_equal(run(), often)
    assert waits[1] > waits[0]


def test_counts_are_whole_numbers_of_any_kind():
    X = np.tril(np.ones((6, 6)))
    expected = sensitivity.get_min_sep_sensitivity_upper_bound(X, 2, 2)
    for two in (2.0, np.array(2), np.float32(2), jnp.int32(2), jnp.float32(2)):
        assert sensitivity.get_min_sep_sensitivity_upper_bound(X, two, two) == expected
        assert toeplitz.pad_coefs_to_n([1.0, 1.0, 1.0], two).shape == (2,)
        assert streaming_matrix.identity().materialize(two).shape == (2, 2)
    with pytest.raises(TypeError, match="min_sep to be an integer"):
        sensitivity.get_min_sep_sensitivity_upper_bound(X, np.array([2]))


@pytest.mark.parametrize(
    ("scale", "dtype"), [(1e-20, "float32"), (1e19, "float32"), (1e-200, "float64")]
)
def test_losses_do_not_depend_on_scale(scale, dtype):
    with jax.enable_x64(dtype == "float64"):
        coef = jnp.array([1.0, 0.5, 0.25], dtype)
        expected = toeplitz.loss(coef, 9)
        for loss in (toeplitz.loss, jax.jit(toeplitz.loss, static_argnums=1)):
            np.testing.assert_allclose(loss(coef * scale, 9), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        lambda c: toeplitz.sensitivity_squared(c),
        lambda c: toeplitz.minsep_sensitivity_squared(c, 1, n=3),
        lambda c: toeplitz.per_query_error(noising_coef=c)[-1],
        lambda c: toeplitz.per_query_error(strategy_coef=1 / c[:1])[-1],
        lambda c: toeplitz.compute_banded_inverse_sensitivity_squared(3, 1 / c[:1], 1),
    ],
)
def test_results_that_float32_does_not_hold_are_refused(function):
    ordinary = jnp.array([1.0, 0.5, 0.25])
    for scale in (1e-25, 1e25):
        with pytest.raises(ValueError, match="within the range of float32"):
            function(ordinary * scale)
        traced = float(jax.jit(function)(ordinary * scale))
        assert np.isnan(traced) or np.isinf(traced)
        with jax.enable_x64(True):
            wide = float(function(ordinary.astype(jnp.float64) * scale))
        assert 0.1 < wide / scale**2 < 100


def test_the_sensitivity_of_a_blt_is_refused_where_float32_does_not_hold_it():
    blt = BUILD.build([0.5], [1e30], "float32")
    with pytest.raises(ValueError, match="within the range of float32"):
        buffered_toeplitz.sensitivity_squared(blt, 3)


LOSSES = {
    "toeplitz.loss": lambda c: toeplitz.loss(c, 9),
    "minsep_sensitivity_squared": lambda c: toeplitz.minsep_sensitivity_squared(c, 2, n=9),
    "banded inverse": lambda c: toeplitz.compute_banded_inverse_sensitivity_squared(9, c, 2),
    "max_loss": lambda c: buffered_toeplitz.max_loss(BUILD(c[1:], c[1:] / 9), 9),
    "banded": lambda c: banded.per_query_error(
        banded.ColumnNormalizedBanded(jnp.broadcast_to(c, (5, 3)))
    ).sum(),
    "dense": lambda c: dense.per_query_error(strategy_matrix=c[0] * jnp.eye(3)).sum(),
    "participations": lambda c: sensitivity.max_participation_for_linear_fn(c**2, 2),
}


@pytest.mark.parametrize("name", LOSSES)
def test_forward_and_reverse_derivatives_agree(name):
    with jax.enable_x64(True):
        c = jnp.array([1.0, 0.75, 0.375])
        loss = jax.jit(LOSSES[name])  # outside of jit, XLA compiles every operation by itself
        grad = jax.jit(jax.grad(loss))
        reverse = grad(c)
        np.testing.assert_allclose(jax.jit(jax.jacfwd(loss))(c), reverse, rtol=1e-9, atol=1e-12)
        along = jnp.array([1.0, -2.0, 3.0])
        tangent = jax.linearize(loss, c)[1](along)
        np.testing.assert_allclose(tangent, reverse @ along, rtol=1e-9, atol=1e-12)
        hessian = jax.jit(jax.hessian(loss))(c)
        np.testing.assert_allclose(hessian, hessian.T, rtol=1e-7, atol=1e-9)
        step = 1e-5 * jnp.array([1.0, -1.0, 0.5])
        change = grad(c + step) - grad(c - step)
        np.testing.assert_allclose(2 * hessian @ step, change, rtol=1e-4, atol=1e-9)


# -- JAX's debug mode -------------------------------------------------------------------------

DEBUGGED = LOSSES | {
    "sensitivity_squared": toeplitz.sensitivity_squared,
    "per_query_error": lambda c: toeplitz.per_query_error(noising_coef=c, n=9).sum(),
    "sensitivity of a BLT": lambda c: buffered_toeplitz.sensitivity_squared(
        BUILD(c[1:], c[1:] / 9), jnp.inf
    ),
    "inverse": lambda c: (toeplitz.inverse_as_streaming_matrix(c) @ jnp.arange(5.0)).sum(),
    "normalized": lambda c: (toeplitz.inverse_as_streaming_matrix(c, 5) @ jnp.arange(5.0)).sum(),
    "solve": lambda c: toeplitz.solve_banded(c, jnp.arange(1.0, 6.0)).sum(),
    "product": lambda c: (
        streaming_matrix.prefix_sum()
        @ banded.ColumnNormalizedBanded(jnp.broadcast_to(c, (5, 3))).inverse_as_streaming_matrix()
        @ jnp.arange(5.0)
    ).sum(),
}


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    "name", sweeps.cases(list(DEBUGGED), ("sensitivity of a BLT", "normalized", "product"))
)
def test_where_jax_looks_for_nan_it_finds_none(name, compiled):
    """A NaN that stands for what is refused, and is not taken, is no fault."""
    f, c = DEBUGGED[name], jnp.array([1.0, 0.75, 0.375])

    def results():
        return jax.grad(f)(c), jax.vmap(f)(c[None])

    with jax.debug_nans(True), jax.disable_jit(not compiled):
        actual = results()
    for x, want in zip(actual, results(), strict=True):
        np.testing.assert_allclose(x, want, rtol=1e-4, atol=1e-5)
