from __future__ import annotations

import dataclasses
import functools
import gc
import sys
import typing
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_privacy_kernels
from jax_privacy_kernels.matrix_factorization import (
    banded,
    buffered_toeplitz,
    dense,
    optimization,
    sensitivity,
    toeplitz,
)
from jax_privacy_kernels.matrix_factorization.streaming_matrix import momentum_sgd_matrix
from jax_privacy_kernels.ops import _fingerprint


@pytest.fixture(scope="module")
def reference():
    return pytest.importorskip("jax_privacy.matrix_factorization.optimization")


@pytest.fixture(params=[False, True], ids=["float32 mode", "x64 mode"])
def x64(request):
    """The mode of the caller."""
    with jax.enable_x64(request.param):
        yield request.param


def never(_):
    """A callback, so that every step is a call."""


CALLBACKS = [None, never]

# One step finds the minimum of a sum of squares. It compiles faster than the default optimizer.
SGD = optax.with_extra_args_support(optax.sgd(0.5))


def square(params):
    return sum(jnp.sum((leaf - 3) ** 2) for leaf in jax.tree.leaves(params))


def rosenbrock(params):
    x, y = params["x"], params["y"]
    return jnp.sum(100 * (y - x**2) ** 2 + (1 - x) ** 2)


ROSENBROCK_START = {"x": np.array([-1.2]), "y": np.array([1.0])}


def log_sum_exp(x):
    """Smooth and convex; its only minimum has A x = 0, that is, x = 0."""
    A = np.array([[1.0, 2.0], [-3.0, 1.0], [2.0, -3.0]])
    return jax.nn.logsumexp(A @ x)


class CountsCalls:
    """A loss that counts how often JAX traces it."""

    def __init__(self, loss_fn=square):
        self.loss_fn, self.calls = loss_fn, 0

    def __call__(self, params):
        self.calls += 1
        return self.loss_fn(params)


class Pair(typing.NamedTuple):
    first: object
    rest: list


# -- Minima -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        np.array(7.0),
        {"a": np.ones((2, 2)), "b": [np.zeros(1), np.array(-1.0)]},
        Pair(np.ones(2), [np.zeros((1, 3))]),
    ],
)
def test_minimum_of_a_quadratic(params):
    actual = optimization.optimize(square, params)
    assert jax.tree.structure(actual) == jax.tree.structure(params)
    for leaf, start in zip(jax.tree.leaves(actual), jax.tree.leaves(params), strict=True):
        assert leaf.shape == start.shape
        np.testing.assert_allclose(leaf, 3, rtol=1e-12)


@pytest.mark.parametrize("callback", CALLBACKS)
@pytest.mark.parametrize("grad", [False, True])
def test_minimum_of_rosenbrock(grad, callback):
    loss_fn = jax.value_and_grad(rosenbrock) if grad else rosenbrock
    actual = optimization.optimize(loss_fn, ROSENBROCK_START, grad=grad, callback=callback)
    assert set(actual) == {"x", "y"}
    np.testing.assert_allclose(actual["x"], [1], rtol=1e-7)
    np.testing.assert_allclose(actual["y"], [1], rtol=1e-7)


def test_a_gradient_given_is_the_one_used():
    def loss_and_grad(x):
        return jnp.sum((x - 3) ** 2), (2 * (x - 3)).at[1].set(0)

    actual = optimization.optimize(loss_and_grad, np.zeros(3), grad=True)
    np.testing.assert_allclose(actual, [3, 0, 3], rtol=1e-12)


@pytest.mark.parametrize("loss_fn", [log_sum_exp, lambda c: toeplitz.loss(c, 30)])
def test_with_and_without_callback_the_result_is_the_same(loss_fn):
    def both(steps):
        return [
            optimization.optimize(
                loss_fn, np.array([1.0, 0.25]), max_optimizer_steps=steps, callback=callback
            )
            for callback in CALLBACKS
        ]

    np.testing.assert_allclose(*both(4), rtol=1e-12)
    with jax.enable_x64(True):  # where the minimum is flat, its value says more
        np.testing.assert_allclose(*(loss_fn(x) for x in both(100)), rtol=1e-13)


def test_default_is_no_callback():
    start = ROSENBROCK_START
    default = optimization.optimize(rosenbrock, start, max_optimizer_steps=30)
    without = optimization.optimize(rosenbrock, start, max_optimizer_steps=30, callback=None)
    assert default == without


@pytest.mark.parametrize("callback", CALLBACKS)
def test_number_of_steps(callback):
    def descend(steps):
        return optimization.optimize(
            square,
            np.zeros(1),
            max_optimizer_steps=steps,
            callback=callback,
            optimizer=slow,
        )

    slow = optax.with_extra_args_support(optax.sgd(0.25))
    for steps in (0, 1, 2, np.int64(7)):  # each step halves the distance to 3
        np.testing.assert_allclose(descend(steps), [3 - 3 * 0.5**steps], rtol=1e-14)
    with pytest.raises(ValueError, match="max_optimizer_steps >= 0, found max_optimizer_steps=-1"):
        descend(-1)
    with pytest.raises(TypeError, match=r"max_optimizer_steps to be an integer, found 2\.5"):
        descend(2.5)


def test_no_steps_change_nothing():
    start = {"a": np.array([1.0, -2.0], np.float32), "b": jnp.array([[0.1]], jnp.bfloat16)}
    for callback in CALLBACKS:
        actual = optimization.optimize(square, start, max_optimizer_steps=0, callback=callback)
        for key, value in start.items():
            np.testing.assert_array_equal(actual[key], value)
            assert actual[key].dtype == value.dtype


def test_the_loop_ends_when_it_has_converged():
    evaluations = []

    def loss_fn(x):
        jax.debug.callback(lambda: evaluations.append(1))
        return jnp.sum((x - 3) ** 2)

    actual = optimization.optimize(loss_fn, np.zeros(2), max_optimizer_steps=2000)
    jax.effects_barrier()
    np.testing.assert_allclose(actual, 3, rtol=1e-12)
    assert 0 < len(evaluations) < 1000


@pytest.mark.parametrize(
    ("loss_fn", "start"),
    [
        (rosenbrock, ROSENBROCK_START),
        (log_sum_exp, np.array([1.0, 0.5])),
        (lambda c: toeplitz.loss(c, 50), np.array([1.0, 0.5, 0.375, 0.3])),
    ],
)
def test_as_low_as_the_reference(reference, loss_fn, start):
    actual = optimization.optimize(loss_fn, start)
    with jax.numpy_dtype_promotion("standard"):  # which optax needs
        expected = reference.optimize(loss_fn, jax.tree.map(np.asarray, start))
    with jax.enable_x64(True):
        assert float(loss_fn(actual)) <= float(loss_fn(expected)) * (1 + 1e-12) + 1e-15


# -- Callback ---------------------------------------------------------------------------------


def test_callback_arguments(x64, reference):
    fields = [field.name for field in dataclasses.fields(optimization.CallbackArgs)]
    assert fields == [field.name for field in dataclasses.fields(reference.CallbackArgs)]

    seen = []
    start = {"x": np.array([1.0], np.float32), "y": np.array([2.0], np.float32)}
    optimization.optimize(rosenbrock, start, max_optimizer_steps=4, callback=seen.append)
    assert [args.step for args in seen] == [0, 1, 2, 3]
    before = start
    with jax.enable_x64(True):
        for args in seen:
            assert isinstance(args, optimization.CallbackArgs)
            assert args.loss.dtype == jnp.float64
            assert args.loss.shape == ()
            loss, grad = jax.value_and_grad(rosenbrock)(
                jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), before)
            )
            np.testing.assert_allclose(args.loss, loss, rtol=1e-14)
            for key in start:
                assert args.grad[key].dtype == args.params[key].dtype == jnp.float64
                np.testing.assert_allclose(args.grad[key], grad[key], rtol=1e-12)
            before = args.params
        assert seen[-1].loss < seen[0].loss


def test_callback_sees_the_state_after_the_step():
    states = []
    optimization.optimize(
        square,
        np.zeros(2),
        max_optimizer_steps=3,
        optimizer=optax.with_extra_args_support(optax.sgd(lambda count: 0.1)),
        callback=lambda args: states.append(args.state),
    )
    assert [int(optax.tree.get(state, "count")) for state in states] == [1, 2, 3]


@pytest.mark.parametrize("truth", [True, 1, np.True_, "stop"])
def test_a_true_result_ends_the_optimization(truth):
    seen = []

    def callback(args):
        seen.append(args)
        return truth if args.step == 2 else None

    slow = optax.with_extra_args_support(optax.sgd(0.25))
    actual = optimization.optimize(square, np.array(0.0), callback=callback, optimizer=slow)
    assert len(seen) == 3
    assert float(actual) == float(seen[-1].params) == 3 - 3 / 8


@pytest.mark.parametrize("untruth", [None, False, 0])
def test_other_results_do_not(untruth):
    steps = []

    def callback(args):
        steps.append(args.step)
        return untruth

    optimization.optimize(
        square, np.zeros(2), max_optimizer_steps=20, callback=callback, optimizer=SGD
    )
    assert steps == list(range(20))


# -- Types and modes --------------------------------------------------------------------------


@pytest.mark.parametrize("callback", CALLBACKS)
def test_dtypes_are_kept(x64, callback):
    start = {
        "numpy": np.zeros(1, np.float32),
        "wide": np.zeros(2),
        "single": jnp.zeros(3, jnp.float32),
        "half": jnp.zeros(1, jnp.bfloat16),
        "scalar": np.float32(1),
    }
    actual = optimization.optimize(
        square, start, max_optimizer_steps=2, callback=callback, optimizer=SGD
    )
    for key, value in start.items():
        assert isinstance(actual[key], jax.Array)
        assert actual[key].dtype == value.dtype, key
        np.testing.assert_allclose(np.asarray(actual[key], np.float64), 3, rtol=1e-7)


def test_dtypes_of_weakly_typed_arrays_are_kept(x64):
    for start in (jnp.asarray(1.0), jnp.full(2, 1.0)):
        assert start.weak_type
        actual = optimization.optimize(square, start, max_optimizer_steps=2, optimizer=SGD)
        assert actual.dtype == start.dtype


@pytest.mark.parametrize("callback", CALLBACKS)
def test_everything_runs_in_float64(x64, callback):
    def loss_fn(x):
        assert x.dtype == jnp.float64
        assert jnp.ones(1).dtype == jnp.float64
        return jnp.sum((x - 1 / 3) ** 2)

    actual = optimization.optimize(
        loss_fn, np.zeros(1), max_optimizer_steps=2, callback=callback, optimizer=SGD
    )
    np.testing.assert_allclose(actual, 1 / 3, rtol=1e-14)
    assert jax.config.jax_enable_x64 == x64


@pytest.mark.parametrize("callback", CALLBACKS)
def test_mode_is_restored_after_an_error(x64, callback):
    def fails(x):
        raise RuntimeError("no loss today")

    with pytest.raises(RuntimeError, match="no loss today"):
        optimization.optimize(fails, np.zeros(1), callback=callback)
    assert jax.config.jax_enable_x64 == x64
    assert jnp.ones(1).dtype == (jnp.float64 if x64 else jnp.float32)


def test_mode_is_restored_after_an_error_of_the_callback(x64):
    def fails(args):
        raise RuntimeError("no callback today")

    with pytest.raises(RuntimeError, match="no callback today"):
        optimization.optimize(square, np.zeros(1), callback=fails, optimizer=SGD)
    assert jax.config.jax_enable_x64 == x64


def test_decorator_enables_x64(x64):
    @optimization.jax_enable_x64
    def double(x, *, by=2):
        """Doubles."""
        return jnp.asarray(x) * by

    assert double(np.array([0.1])).dtype == jnp.float64
    np.testing.assert_array_equal(double(np.array([0.1]), by=3), [np.float64(0.1) * 3])
    assert double.__name__ == "double"
    assert double.__doc__ == "Doubles."
    assert double.__wrapped__(np.array([0.1])).dtype == (jnp.float64 if x64 else jnp.float32)
    with pytest.raises(TypeError):
        double()
    assert jax.config.jax_enable_x64 == x64


# -- Compilation ------------------------------------------------------------------------------


@pytest.mark.parametrize("callback", CALLBACKS)
def test_compiled_once_for_the_same_loss(callback):
    loss_fn = CountsCalls()

    def calls_of(start, steps=2, optimizer=SGD):
        before = loss_fn.calls
        optimization.optimize(
            loss_fn, start, max_optimizer_steps=steps, callback=callback, optimizer=optimizer
        )
        return loss_fn.calls - before

    assert calls_of(np.zeros(2)) > 0
    assert calls_of(np.ones(2)) == 0
    assert calls_of(np.ones(2, np.float32), steps=3) == 0
    with jax.enable_x64(True):
        assert calls_of(np.ones(2)) == 0
    assert calls_of(np.zeros(3)) > 0
    assert calls_of(np.zeros(2)) == 0
    assert calls_of(np.zeros(2), optimizer=optimization.DEFAULT_OPTIMIZER) > 0
    assert calls_of(np.zeros(2), optimizer=optimization.DEFAULT_OPTIMIZER) == 0


def test_losses_of_equal_code_are_not_mixed_up():
    def toward(target):
        return lambda x: jnp.sum((x - target) ** 2)

    for target in (1.0, 2.0):
        actual = optimization.optimize(
            toward(target), np.zeros(1), max_optimizer_steps=2, optimizer=SGD
        )
        np.testing.assert_allclose(actual, target, rtol=1e-12)


@pytest.mark.each_value
@pytest.mark.parametrize("callback", CALLBACKS)
@pytest.mark.parametrize("grad", [False, True])
def test_losses_can_be_garbage_collected(callback, grad):
    class Loss:
        def __call__(self, x):
            return toeplitz.loss(x, 20)

    loss_fn = jax.value_and_grad(Loss()) if grad else Loss()
    alive = weakref.ref(loss_fn)
    optimization.optimize(
        loss_fn, np.array([1.0, 0.5]), max_optimizer_steps=5, callback=callback, grad=grad
    )
    assert alive() is not None
    del loss_fn
    gc.collect()
    assert alive() is None


class Unhashable:
    __hash__ = None

    def __call__(self, x):
        return jnp.sum((x - 2) ** 2)


class WithoutWeakReferences:
    __slots__ = ()

    def __call__(self, x):
        return jnp.sum((x - 2) ** 2)


class Bound:
    def loss(self, x):
        return jnp.sum((x - 2) ** 2)


@pytest.mark.parametrize("callback", CALLBACKS)
@pytest.mark.parametrize(
    "loss_fn",
    [
        Unhashable(),
        WithoutWeakReferences(),
        Bound().loss,
        functools.partial(lambda target, x: jnp.sum((x - target) ** 2), 2.0),
        jax.jit(lambda x: jnp.sum((x - 2) ** 2)),
    ],
    ids=["unhashable", "slots", "bound method", "partial", "jitted"],
)
def test_any_callable_is_a_loss(loss_fn, callback):
    for start in (np.zeros(1), np.zeros(2), np.ones(1)):
        actual = optimization.optimize(
            loss_fn, start, max_optimizer_steps=2, callback=callback, optimizer=SGD
        )
        np.testing.assert_allclose(actual, 2, rtol=1e-12)


def test_equal_losses_live_independently():
    """Every access to a bound method makes a new object, equal to the others."""
    bound = Bound()
    kept = bound.loss
    options = {"max_optimizer_steps": 2, "optimizer": SGD}
    optimization.optimize(kept, np.zeros(1), **options)
    optimization.optimize(bound.loss, np.zeros(1), callback=never, **options)
    gc.collect()
    actual = optimization.optimize(kept, np.zeros(2), callback=never, **options)
    np.testing.assert_allclose(actual, 2, rtol=1e-12)


@pytest.mark.parametrize("callback", CALLBACKS)
def test_implementation_of_a_block_is_honoured(callback):
    loss_fn = CountsCalls(lambda c: toeplitz.loss(c, 20))

    def run():
        before = loss_fn.calls
        actual = optimization.optimize(
            loss_fn,
            np.array([1.0, 0.5]),
            max_optimizer_steps=2,
            callback=callback,
            optimizer=slow,
        )
        return actual, loss_fn.calls - before

    slow = optax.with_extra_args_support(optax.sgd(1e-3))
    default, calls = run()
    assert calls > 0
    with jax_privacy_kernels.implementation("jax"):
        inside, calls = run()
        assert calls > 0
        assert run()[1] == 0
    np.testing.assert_allclose(inside, default, rtol=1e-12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_PRIVACY_KERNELS_IMPLEMENTATION", "fortran")
        with pytest.raises(ValueError, match="'fortran' of toeplitz_solve"):
            run()
    assert run()[1] == 0


# -- Other optimizers -------------------------------------------------------------------------


@pytest.mark.parametrize("callback", CALLBACKS)
def test_other_optimizers_run_all_their_steps(callback):
    # Moves at the last step only: before it nothing changes.
    steps = 10
    late = optax.with_extra_args_support(
        optax.chain(
            optax.clip_by_global_norm(100.0),
            optax.sgd(lambda count: jnp.where(count == steps - 1, 0.5, 0.0)),
        )
    )
    actual = optimization.optimize(
        square, np.zeros(2), max_optimizer_steps=steps, optimizer=late, callback=callback
    )
    np.testing.assert_allclose(actual, 3, rtol=1e-12)


def test_adam():
    adam = optax.with_extra_args_support(optax.adam(0.1))
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        expected = jnp.zeros(2)
        state = adam.init(expected)
        for _ in range(15):
            updates, state = adam.update(jax.grad(square)(expected), state, expected)
            expected = optax.apply_updates(expected, updates)
    actual = optimization.optimize(square, np.zeros(2), max_optimizer_steps=15, optimizer=adam)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_the_default_optimizer_is_that_of_the_reference(reference):
    start = ROSENBROCK_START
    with jax.numpy_dtype_promotion("standard"):
        actual, expected = (
            module.optimize(rosenbrock, start, max_optimizer_steps=10, callback=never)
            for module in (optimization, reference)
        )
    for key in start:
        np.testing.assert_allclose(actual[key], expected[key], rtol=1e-10)


def test_dtypes_and_ranks_are_promoted_whatever_the_modes():
    """As optax needs it."""

    def loss(x):
        return jnp.sum((x[:, None] - x + jnp.arange(2)) ** 2) + jnp.sum(x**2)

    expected = optimization.optimize(loss, np.ones(2), max_optimizer_steps=5)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for callback in (None, never):
            actual = optimization.optimize(
                loss, np.ones(2), max_optimizer_steps=5, callback=callback, report=str
            )
            np.testing.assert_allclose(actual, expected, rtol=1e-12)


# -- Reports ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "stopped"),
    [
        ({}, "converged"),
        ({"max_optimizer_steps": 3}, "max_optimizer_steps"),
        ({"callback": lambda args: args.step == 1}, "callback"),
    ],
)
def test_report_says_what_was_reached(options, stopped):
    reports = []
    start = np.array([0.5, -0.25])
    found = optimization.optimize(log_sum_exp, start, report=reports.append, **options)
    (report,) = reports
    with jax.enable_x64(True):
        expected = log_sum_exp(np.asarray(found, np.float64))
    np.testing.assert_allclose(report.loss, expected, rtol=1e-12)
    assert report.stopped == stopped
    assert report.steps == {"callback": 2, "max_optimizer_steps": 3}.get(stopped, report.steps)
    assert 0 < report.steps <= 250
    assert report.gap is None
    assert str(report).startswith(f"loss {report.loss:.8g}: {stopped} after {report.steps}")


def test_report_is_a_function():
    with pytest.raises(TypeError, match="report to be a function or None, found 3"):
        optimization.optimize(square, np.zeros(1), report=3)


N = 24
MOMENTUM = np.asarray(toeplitz.momentum_sgd_coefs(N, momentum=0.5), np.float64)


def of_banded(C, A):
    return banded.per_query_error(C, A).mean()


def of_dense(C, A):
    errors = dense.per_query_error(strategy_matrix=C, workload_matrix=A)
    return errors.mean() * sensitivity.single_participation_sensitivity(C) ** 2


def of_inverse(coef, a):
    squared = toeplitz.compute_banded_inverse_sensitivity_squared(
        N, coef, 6, use_matrix_upper_bound=False
    )
    return toeplitz.per_query_error(noising_coef=coef, n=N, workload_coef=a).mean() * squared


def of_blt(blt, a):
    loss_fn = buffered_toeplitz.LossFn.build_min_sep(N, "mean", 6, workload_coef=a)
    return loss_fn.loss(blt)


# Each optimizer, for a workload times a number, and the loss of what it finds.
OPTIMIZERS = {
    "toeplitz": (
        lambda s, report: toeplitz.optimize_banded_toeplitz(
            N, 4, workload_coef=s * MOMENTUM, report=report
        ),
        lambda coef, s: toeplitz.loss(coef, N, workload_coef=s * MOMENTUM),
    ),
    "banded": (
        lambda s, report: banded.optimize(
            N, bands=4, A=momentum_sgd_matrix(0.5, learning_rates=s * np.ones(N)), report=report
        ),
        lambda C, s: of_banded(C, momentum_sgd_matrix(0.5, learning_rates=s * np.ones(N))),
    ),
    "dense": (
        lambda s, report: dense.optimize(N, A=s * np.tri(N), report=report),
        lambda C, s: of_dense(C, s * np.tri(N)),
    ),
    "BLT": (
        lambda s, report: buffered_toeplitz.optimize(
            n=N,
            min_sep=6,
            max_participations=None,
            error="mean",
            max_buffers=2,
            workload_coef=s * MOMENTUM,
            report=report,
        ),
        lambda blt, s: of_blt(blt, s * MOMENTUM),
    ),
    "banded inverse": (
        lambda s, report: toeplitz.optimize_banded_inverse_toeplitz(
            N, 6, 3, workload_coef=s * MOMENTUM, report=report
        ),
        lambda coef, s: of_inverse(coef, s * MOMENTUM),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_reports_of_optimizers_whatever_the_units(name):
    optimize, loss = OPTIMIZERS[name]
    reports = []
    with jax.enable_x64(True):
        for size in (1.0, 2.0**-20):
            found = optimize(size, reports.append)
            np.testing.assert_allclose(reports[-1].loss, loss(found, size), rtol=1e-9)
    ordinary, small = reports
    np.testing.assert_allclose(small.loss * 2.0**40, ordinary.loss, rtol=1e-7)
    assert ordinary.steps > 0
    assert ordinary.stopped == ("proved" if name == "dense" else "converged")
    if name == "BLT":
        assert ordinary.lower_bound is None
    else:
        assert 0 <= ordinary.gap < (1.01e-5 if name == "dense" else 1.0)


def test_other_reductions_of_dense_strategies_whatever_the_units():
    losses = []
    with jax.enable_x64(True):
        for size in (1.0, 2.0**-20):
            reports = []
            A = size * np.tri(12)
            dense.optimize(12, A=A, reduction_fn=skewed_mean, report=reports.append)
            assert reports[0].lower_bound is None
            losses.append(reports[0].loss)
    np.testing.assert_allclose(losses[1] * 2.0**80, losses[0], rtol=1e-7)


def skewed_mean(errors):
    return jnp.mean(errors**2)


@pytest.mark.parametrize("name", ["loss", "array"])
def test_what_is_remembered_ends_with_the_program(monkeypatch, name):
    """Where globals are None before what they remember goes."""
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    if name == "loss":

        def remembered(x):
            return jnp.sum(x**2)

        optimization.jitted(remembered)
        monkeypatch.setattr(optimization, "_cache", None)
    else:
        remembered = jnp.arange(3.0)
        _fingerprint._of_known(remembered)
        monkeypatch.setattr(_fingerprint, "_remembered", None)
    gone = weakref.ref(remembered)
    del remembered
    gc.collect()
    assert gone() is None
    assert not unraisable
