"""Every implementation of banded_error against its definition.

The variances follow from step to step in sums of 2b + 8 terms at most. Such sums of absolute values
are the variances of the comparison: -|row| off the diagonal, and absolute values elsewhere. What n
steps of sums may round away is relative to those.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import coefficients, implementations, sweeps

from jax_privacy_kernels.ops import banded_error
from jax_privacy_kernels.ops.banded_error import IMPLEMENTATIONS

implementation = implementations.fixture(IMPLEMENTATIONS)

# Of the segments that the derivatives are made in, which are about sqrt(n) long.
SIZES = [1, 2, 3, 4, 5, 9, 10, 16, 17, 50]
ALL = (0, 1, 2, 3)


@functools.cache
def op(implementation):
    return functools.partial(banded_error, implementation=implementation)


def definition(rows, scale, rates, momentum):
    """Row by row of ``A diag(scale) P^-1``, in long double; maps over leading axes."""
    rows, scale, rates, momentum = (
        np.asarray(x, np.longdouble) for x in (rows, scale, rates, momentum)
    )
    *batch, n, b = rows.shape
    x = np.zeros((*batch, n, n), np.longdouble)
    m, y = np.zeros_like(x[..., 0, :]), np.zeros_like(x[..., 0, :])
    errors = np.zeros((*batch, n), np.longdouble)
    for t in range(n):
        x[..., t, t] = 1
        for lag in range(1, min(b - 1, t) + 1):
            x[..., t, :] -= rows[..., t, lag, None] * x[..., t - lag, :]
        x[..., t, :] /= rows[..., t, 0, None]
        m = momentum[..., None] * m + scale[..., t, None] * x[..., t, :]
        y = y + rates[..., t, None] * m
        errors[..., t] = np.sum(y * y, axis=-1)
    return errors


def dense(rows, scale, rates, momentum):
    """The same by dense matrices, for JAX to differentiate and to map."""
    n, b = rows.shape
    lag = np.arange(n)[:, None] - np.arange(n)
    at = np.arange(n)[:, None], np.clip(lag, 0, b - 1)
    P = jnp.where((lag >= 0) & (lag < b), rows[at], 0)
    M = jnp.where(lag >= 0, momentum ** lag.clip(0), 0)
    B = jnp.tri(n) @ (rates[:, None] * M * scale) @ jnp.linalg.inv(P)
    return jnp.sum(B * B, axis=1)


def allowed(rows, scale, rates, momentum):
    """What may be rounded away."""
    n, b = rows.shape
    rows, scale, rates, momentum = (np.abs(x) for x in (rows, scale, rates, momentum))
    signs = np.where(np.arange(b) == 0, 1, -1)
    return n * (2 * b + 8) * coefficients.UNIT * definition(rows * signs, scale, rates, momentum)


def check(actual, arguments):
    coefficients.close(actual, definition(*arguments), allowed(*arguments))


@dataclasses.dataclass(frozen=True)
class Case:
    """sum |rows[t, 1:]| < |rows[t, 0]|, so that errors do not build up."""

    n: int
    b: int
    momentum: float = 0.7
    seed: int = 0

    def arrays(self, dtype="float64"):
        rng = np.random.default_rng(self.seed)
        diagonal = rng.choice([-1, 1], self.n) * rng.uniform(0.5, 2, self.n)
        tail = rng.normal(size=(self.n, self.b - 1))
        tail *= 0.9 * diagonal[:, None] / np.abs(tail).sum(axis=1, initial=0.1)[:, None]
        rows = np.concatenate([diagonal[:, None], tail], axis=1)
        scale, rates = rng.uniform(0.5, 1.5, self.n), rng.normal(size=self.n)
        return tuple(x.astype(dtype) for x in (rows, scale, rates, np.float64(self.momentum)))


def jitted(function):
    return jax.jit(lambda *arguments: function(*arguments))


@functools.cache  # so that equal ones are compiled once
def derivatives(function):
    """The function, and derivatives of its sum with weights, by all arguments."""

    def weighted(weights, *arguments):
        out = function(*arguments)
        return jnp.sum(weights * out), out

    return jax.jit(jax.value_and_grad(weighted, (1, 2, 3, 4), has_aux=True))


def before_the_start(rows):
    """Where rows have entries that are no part of P."""
    n, b = rows.shape
    return np.arange(n)[:, None] < np.arange(b)


class TestImplementation:
    """What holds for every implementation."""

    # -- Values

    def test_dense_matrices(self, implementation):
        n, rows = 5, np.array([[2, 9], [-1, 0.5], [1, -0.3], [4, 1], [0.5, 0.2]])
        scale, rates = np.array([1, 2, -1, 0.5, 3]), np.array([0.5, 1, -2, 0.1, 1])
        P = np.diag(rows[:, 0]) + np.diag(rows[1:, 1], -1)
        M = np.array([[0.9 ** (i - j) if i >= j else 0 for j in range(n)] for i in range(n)])
        A = np.tril(np.ones((n, n))) @ np.diag(rates) @ M
        B = A @ np.diag(scale) @ np.linalg.inv(P)
        with jax.enable_x64(True):
            actual = op(implementation)(rows, scale, rates, 0.9)
        np.testing.assert_allclose(actual, np.sum(B**2, axis=1), rtol=1e-13)

    def test_prefix_sums_by_hand(self, implementation):
        ones = np.ones(4)
        for rows, expected in (
            (np.ones((4, 1)), [1, 2, 3, 4]),
            (np.full((4, 1), -2.0), [0.25, 0.5, 0.75, 1]),
            (np.tile([1.0, -1.0], (4, 1)), [1, 5, 14, 30]),  # sums of prefix sums
            (np.tile([1.0, 1.0, 0, 0, 0, 0], (4, 1)), [1, 1, 2, 2]),  # telescope
        ):
            np.testing.assert_array_equal(op(implementation)(rows, ones, ones, 0), expected)

    @sweeps.compiling(10)
    @given(data=st.data())
    def test_sweep(self, implementation, data):
        n = data.draw(st.one_of(st.sampled_from(SIZES), st.integers(1, 70)))
        b = data.draw(st.one_of(st.integers(1, 9), st.just(1), st.integers(1, min(n, 12) + 3)))
        momentum = data.draw(st.sampled_from([0.0, 0.9, 1.0, -0.5]))
        dtype = data.draw(st.sampled_from(["float32", "float64"]))
        x64 = dtype == "float64" or data.draw(st.booleans())
        arguments = Case(n, b, momentum, data.draw(st.integers(0, 999))).arrays(dtype)
        rows, *others = arguments
        garbage = np.where(before_the_start(rows), np.asarray(1e30, dtype), rows)
        with jax.enable_x64(x64):
            actual = op(implementation)(garbage, *others)
        assert actual.dtype == dtype
        check(actual, arguments)

    @pytest.mark.parametrize("garbage", [-1e30, np.inf, np.nan])
    def test_lags_before_the_start_do_not_matter(self, implementation, garbage):
        rows, *others = Case(6, 4).arrays("float32")
        outside = before_the_start(rows)
        weights = np.arange(1, 7, dtype=np.float32)
        with_zeros, with_garbage = (
            derivatives(op(implementation))(weights, np.where(outside, x, rows), *others)
            for x in (np.float32(0), np.float32(garbage))
        )
        jax.tree.map(np.testing.assert_array_equal, with_garbage, with_zeros)
        rows_bar = with_garbage[1][0]
        assert np.all(rows_bar[outside] == 0)
        assert np.all(rows_bar[~outside] != 0)

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_many_steps(self, implementation, dtype):
        arguments = Case(400, 20).arrays(dtype)
        with jax.enable_x64(dtype == "float64"):
            check(op(implementation)(*arguments), arguments)

    # -- Accuracy

    def test_sums_are_made_in_float64(self, implementation):
        n = 20_000
        scale, ones = np.full(n, 1.1, np.float32), np.ones(n, np.float32)
        exact = np.arange(1, n + 1) * float(scale[0]) ** 2
        assert abs(np.cumsum(scale * scale)[-1] / exact[-1] - 1) > 1e-5
        errors = op(implementation)(ones[:, None], scale, ones, 0)
        assert errors.dtype == jnp.float32
        np.testing.assert_allclose(errors, exact, rtol=1e-7)

    def test_differences_are_made_in_float64(self, implementation):
        # y_1 = scale[1] x_1, what is left of large terms.
        scale, rates = np.array([2.0**13, 1.0], np.float32), np.array([-1.0, 1.0], np.float32)
        errors = op(implementation)(np.ones((2, 1), np.float32), scale, rates, 1)
        np.testing.assert_array_equal(errors, [2.0**26, 1])

    def test_derivatives_are_made_in_float64(self, implementation):
        # Of the last error, which is (scale[0] (rates[0] + rates[1]))^2 + scale[1]^2.
        rows, rates = np.ones((2, 1), np.float32), np.array([-1.0, 1.0], np.float32)
        scale, weights = np.array([2.0**13, 1.0], np.float32), np.array([0, 1], np.float32)
        gradients = derivatives(op(implementation))(weights, rows, scale, rates, np.float32(1))[1]
        rows_bar, scale_bar, rates_bar, momentum_bar = gradients
        np.testing.assert_array_equal(rows_bar, [[0], [-2]])
        np.testing.assert_array_equal(scale_bar, [0, 2])
        np.testing.assert_array_equal(rates_bar, [0, 2])
        assert momentum_bar == 0

    # -- Derivatives

    @pytest.mark.each_value
    @pytest.mark.parametrize("n", SIZES)
    def test_derivatives(self, implementation, n):
        """Against JAX's of dense matrices, and central differences of the definition."""
        arguments = Case(n, min(n, 4) if n % 2 else 3, seed=n).arrays()
        weights = np.random.default_rng(n).normal(size=n)
        with jax.enable_x64(True):
            (_, errors), actual = derivatives(op(implementation))(weights, *arguments)
            (_, _), expected = derivatives(dense)(weights, *arguments)
            check(errors, arguments)
            coefficients.trees_close(actual, expected)
        for i, gradient in enumerate(actual):
            numeric = numeric_derivative(arguments, i, weights)
            assert gradient.shape == numeric.shape
            error = 1e-8 * np.abs(numeric).max(initial=0)
            np.testing.assert_allclose(gradient, numeric.astype(float), rtol=1e-8, atol=error)

    @pytest.mark.each_value
    @pytest.mark.parametrize(
        ("n", "b", "momentum"),
        [(6, 1, 0.9), (2, 5, 0.3), (11, 2, 0.0), (7, 7, -0.4)],
    )
    def test_derivatives_of_other_bands(self, implementation, n, b, momentum):
        arguments = Case(n, b, momentum).arrays()
        weights = np.cos(np.arange(n))
        with jax.enable_x64(True):
            _, actual = derivatives(op(implementation))(weights, *arguments)
            _, expected = derivatives(dense)(weights, *arguments)
            coefficients.trees_close(actual, expected)

    def test_derivatives_in_float32_are_rounded_once(self, implementation):
        arguments, weights = Case(17, 4).arrays("float32"), np.sin(np.arange(17, dtype="float32"))
        narrow = derivatives(op(implementation))(weights, *arguments)
        with jax.enable_x64(True):
            wide = (x.astype(np.float64) for x in arguments)
            wide = derivatives(op(implementation))(weights.astype(np.float64), *wide)
            for actual, expected in zip(narrow[1], wide[1], strict=True):
                assert actual.dtype == jnp.float32
                error = 1e-10 * np.abs(expected).max()
                coefficients.close(actual, expected, error)

    # -- Not a number

    @pytest.mark.parametrize("i", ALL)
    def test_nan(self, implementation, i):
        """From its step on, and not before."""
        arguments = [np.array(x) for x in Case(6, 3).arrays("float32")]
        before = op(implementation)(*arguments)
        step = 3 if i < 3 else 1  # momentum: of m_0, which is first used at step 1
        arguments[i][(3, 1)[: arguments[i].ndim] if i < 3 else ()] = np.nan
        errors = op(implementation)(*arguments)
        if i < 3:
            np.testing.assert_array_equal(errors[:step], before[:step])
        np.testing.assert_array_equal(errors[step:], np.full(6 - step, np.nan))

    # -- Transformations

    def test_jit(self, implementation):
        arguments = Case(9, 3).arrays("float32")
        function = op(implementation)
        check(jitted(function)(*arguments), arguments)
        shared = jitted(lambda x, rate: function(x, x[:, 0], x[:, 1], rate))
        rows = arguments[0]
        check(shared(rows, 0.5), (rows, rows[:, 0], rows[:, 1], np.float64(0.5)))

    def problems(self, dtype):
        """Four of them, of errors below 1."""
        cases = [Case(4, 3, 0.1 * seed, seed).arrays(dtype) for seed in range(4)]
        rows, scale, rates, momentum = (jnp.stack(x) for x in zip(*cases, strict=True))
        return rows, 0.2 * scale, rates, momentum

    def test_vmap_over_one_argument(self, implementation):
        stacked = self.problems("float32")
        cases = [
            (
                [tuple(0 if i == j else None for j in ALL)],
                *(x if i == j else x[0] for j, x in enumerate(stacked)),
            )
            for i in ALL
        ]
        coefficients.check_vmap(op(implementation), dense, *cases)

    def test_vmap_over_several_arguments(self, implementation):
        with jax.enable_x64(True):
            rows, scale, rates, momentum = self.problems("float64")
            coefficients.check_vmap(
                op(implementation),
                dense,
                ([(2, 1, None, 0)], jnp.moveaxis(rows, 0, 2), scale.T, rates[0], momentum),
                ([(0, None, 0, None), (None, 0, None, 0)], rows, scale, rates, momentum),
            )

    @pytest.mark.parametrize("axes", [(0, None, None, None, None), (None, None, None, 0, None)])
    def test_vmap_of_the_derivatives(self, implementation, axes):
        """Over their weights alone, and over one argument alone."""
        values = [np.cos(np.arange(5)), *Case(5, 2).arrays()]
        mapped = axes.index(0)
        values[mapped] = np.random.default_rng(0).normal(size=(3, 5))
        with jax.enable_x64(True):
            functions = [jax.vmap(derivatives(f), axes) for f in (op(implementation), dense)]
            coefficients.trees_close(*(function(*values) for function in functions))

    def test_no_problems(self, implementation):
        others = Case(4, 2).arrays("float32")[1:]
        none = jax.vmap(op(implementation), (0, None, None, None))(np.ones((0, 4, 2)), *others)
        assert none.shape == (0, 4)

    def test_many_problems(self, implementation):
        cases = [Case(12, 3, seed=seed).arrays("float32") for seed in range(100)]
        stacked = [np.stack(x) for x in zip(*cases, strict=True)]
        weights = np.ones((100, 12), np.float32)
        (_, errors), gradients = jax.vmap(derivatives(op(implementation)))(weights, *stacked)
        for problem in (0, 1, 50, 99):
            check(errors[problem], cases[problem])
            for i in ALL:
                numeric = numeric_derivative(cases[problem], i, weights[0]).astype(float)
                error = 1e-6 * np.abs(numeric).max()
                np.testing.assert_allclose(gradients[i][problem], numeric, rtol=1e-6, atol=error)

    def test_scan(self, implementation):
        rows, *others = (jnp.asarray(x) for x in Case(5, 2).arrays("float32"))
        functions = op(implementation), dense
        coefficients.check_scan(
            *(lambda s, *a, f=f: s / (1 + f(rows, s, *a)) for f in functions), *others
        )

    # -- Types

    @pytest.mark.parametrize(
        ("dtypes", "x64", "out"),
        [
            (("float32", "float32", "float32", "float32"), True, "float32"),
            (("float32", "float64", "float32", "float32"), True, "float64"),
            (("bfloat16", "float16", "bfloat16", "bfloat16"), False, "float32"),
            (("float16", "float32", "int8", "bfloat16"), False, "float32"),
            (("float32", "float32", "int32", "float32"), True, "float64"),
        ],
    )
    def test_dtypes(self, implementation, dtypes, x64, out):
        with jax.enable_x64(x64):
            rows, scale = [[2.3, 7.0], [1.4, 0.4], [-1.8, 1.1]], [1.2, 0.3, 1.4]
            values = rows, scale, [1.5, 2.5, 1.1], 0.6
            coefficients.check_dtypes(op(implementation), dtypes, out, *values)

    @pytest.mark.parametrize("x64", [False, True])
    def test_python_numbers(self, implementation, x64):
        with jax.enable_x64(x64):
            actual = op(implementation)([[1, 0], [1, -1]], [1, 1], [1, 1], 0)
            assert actual.dtype == (jnp.float64 if x64 else jnp.float32)
            np.testing.assert_array_equal(actual, [1, 5])


def numeric_derivative(arguments, i, weights, step=1e-6):
    """Central differences of the definition, in long double, all at once."""
    x = np.asarray(arguments[i], np.longdouble)
    moves = step * np.eye(x.size, dtype=np.longdouble).reshape(x.size, *x.shape)

    def errors(moved):
        full = [np.broadcast_to(a, (x.size, *np.shape(a))) for a in arguments]
        full[i] = moved
        return definition(*full) @ np.asarray(weights, np.longdouble)

    return ((errors(x + moves) - errors(x - moves)) / (2 * step)).reshape(x.shape)


# -- Dispatch ---------------------------------------------------------------------------------

TARGET, GRADIENTS = "jpk_banded_error", "jpk_banded_error_gradients"
ARGUMENTS = tuple(jnp.asarray(x) for x in Case(4, 2).arrays("float32"))


def test_selection(monkeypatch):
    coefficients.check_selection(
        "banded_error", banded_error, IMPLEMENTATIONS, monkeypatch, *ARGUMENTS
    )


@pytest.mark.parametrize("platforms", coefficients.PLATFORMS, ids=" ".join)
def test_export(platforms):
    def export(implementation):
        function = jax.value_and_grad(lambda *a: jnp.sum(op(implementation)(*a)), ALL)
        checks = [jax.export.DisabledSafetyCheck.custom_call(t) for t in (TARGET, GRADIENTS)]
        exporter = jax.export.export(jax.jit(function), platforms=platforms, disabled_checks=checks)
        return exporter(*ARGUMENTS)

    compiled = not IMPLEMENTATIONS["cpp"].unavailable()
    module = export(None).mlir_module()
    for target in (TARGET, GRADIENTS):
        assert (f"@{target}(" in module) == (compiled and "cpu" in platforms)
    assert "@jpk_" not in export("jax").mlir_module()
    if compiled and "cuda" in platforms:
        with pytest.raises(NotImplementedError, match=r"banded_error.*'cpp'.*cpu"):
            export("cpp")


@pytest.fixture
def handlers():
    if reason := IMPLEMENTATIONS["cpp"].unavailable():
        pytest.skip(reason)


F = "float32"
GOOD = [((5, 2), F), ((5,), F), ((5,), F), ((), F)]  # rows, scale, rates, momentum


def replaced(i, shape, dtype=F):
    return [*GOOD[:i], (shape, dtype), *GOOD[i + 1 :]]


WRONG_OPERANDS = {
    r"needs rows \[..., n, b\]": [
        replaced(0, (10,)),
        replaced(0, ()),
        replaced(0, (5, 0)),
        [((0, 2), F), ((0,), F), ((0,), F), ((), F)],
    ],
    "needs float32 or float64 scale": [
        replaced(0, (5, 2), "int32"),
        replaced(0, (5, 2), "bfloat16"),
        replaced(0, (2, 5, 2)),
        replaced(1, (4,)),
        replaced(1, (6,)),
        replaced(1, (0,)),
        replaced(1, (5,), "int32"),
        replaced(2, (4,)),
        replaced(2, (5, 2)),
        replaced(2, ()),
        replaced(2, (5,), "float16"),
        replaced(3, (2,)),
        replaced(3, (0,)),
        replaced(3, (), "int32"),
        [((2, 5, 2), F), ((2, 5), F), ((2, 5), F), ((), F)],
        [((2, 5, 2), F), ((5,), F), ((2, 5), F), ((2,), F)],
    ],
}


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("message", WRONG_OPERANDS)
def test_handlers_check_operands(message):
    for operands in WRONG_OPERANDS[message]:
        coefficients.check_refusal(TARGET, message, operands, [GOOD[1]])
        coefficients.check_refusal(GRADIENTS, message, [*operands, GOOD[1]], GOOD)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("result", [((4,), F), ((), F), ((2, 5), F), ((5,), "int32")])
def test_handler_checks_its_result(result):
    coefficients.check_refusal(TARGET, r"needs results \[..., n\]", GOOD, [result])


@pytest.mark.usefixtures("handlers")
def test_handler_checks_its_gradients():
    message = r"needs g \[..., n\], and results shaped like the operands"
    for g in (((4,), F), ((6,), F), ((), F), ((5,), "int32")):
        coefficients.check_refusal(GRADIENTS, message, [*GOOD, g], GOOD)
    for i, shapes in enumerate([[(5,), (4, 2), (5, 3)], [(4,), ()], [(6,)], [(2,), (5,)]]):
        for shape in shapes:
            coefficients.check_refusal(GRADIENTS, message, [*GOOD, GOOD[1]], replaced(i, shape))
        wrong = replaced(i, GOOD[i][0], "int32")
        coefficients.check_refusal(GRADIENTS, message, [*GOOD, GOOD[1]], wrong)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(
    ("target", "arguments", "results"),
    [
        (TARGET, GOOD[:3], [GOOD[1]]),
        (TARGET, [*GOOD, GOOD[1]], [GOOD[1]]),
        (TARGET, GOOD, []),
        (GRADIENTS, GOOD, GOOD),
        (GRADIENTS, [*GOOD, GOOD[1]], GOOD[:3]),
    ],
)
def test_handlers_check_how_many(target, arguments, results):
    coefficients.check_refusal(target, "[Ww]rong number of", arguments, results)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_handlers_take_leading_dimensions_and_both_types(batch):
    shapes = [(*batch, 3, 2), (*batch, 3), (*batch, 3), batch]
    operands = list(zip(shapes, ["float32", "float64", "float32", "float64"], strict=True))
    values = [np.ones(shape) for shape in shapes]
    expected = definition(*values)
    with jax.enable_x64(True):
        (errors,) = coefficients.call_handler(TARGET, operands, [(shapes[1], "float32")])
        g = (shapes[1], "float64")
        results = [(shape, "float64") for shape in shapes]
        actual = coefficients.call_handler(GRADIENTS, [*operands, g], results)
        one = [jnp.ones(shape[len(batch) :]) for shape in shapes]
        gradients = derivatives(dense)(jnp.ones(3), *one)[1]
    np.testing.assert_array_equal(errors, expected)
    for out, gradient in zip(actual, gradients, strict=True):
        np.testing.assert_allclose(out, np.broadcast_to(gradient, out.shape), atol=1e-12)
