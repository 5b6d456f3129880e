"""Odd arguments: a TypeError or ValueError names what is wrong, and nothing else is raised."""

from __future__ import annotations

import inspect
import random
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import settings
from support import sweeps

from jax_privacy_kernels import grid, monte_carlo, noise_addition, optimizers, sharding_utils
from jax_privacy_kernels import random as key_types
from jax_privacy_kernels.experimental.monte_carlo import delta_calculation, sample_generation
from jax_privacy_kernels.matrix_factorization import (
    banded,
    buffered_toeplitz,
    checks,
    dense,
    optimization,
    sensitivity,
    streaming_matrix,
    toeplitz,
)

MODULES = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        banded,
        buffered_toeplitz,
        checks,
        delta_calculation,
        dense,
        grid,
        key_types,
        noise_addition,
        optimization,
        optimizers,
        sample_generation,
        sensitivity,
        sharding_utils,
        streaming_matrix,
        toeplitz,
    )
}
CALLED = sweeps.examples(1000)
ALLOWED = (TypeError, ValueError, NotImplementedError)


def blt():
    return buffered_toeplitz.BufferedToeplitz.build([0.9, 0.5], [0.2, 0.1], dtype=jnp.float32)


def strategy(n=4, bands=2):
    return banded.ColumnNormalizedBanded.default(n, bands)


C = np.array([[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.25, 0.5, 1.0]])
COEF = [1.0, 0.5, 0.25]
MODEL = {"w": jnp.ones((2, 3)), "b": jnp.ones(())}
MESH = jax.sharding.Mesh(jax.devices()[:1], "x", axis_types=(jax.sharding.AxisType.Explicit,))
OVER_X = jax.NamedSharding(MESH, jax.sharding.PartitionSpec("x"))
ON_MESH = jax.device_put(jnp.ones((2, 3)), OVER_X)
SAMPLING = {
    "strategy": monte_carlo.BallsInBins(iterations=4, cycle_length=2),
    "noise_multiplier": 1.0,
    "c_col": np.array([1.0, 0.5, 0.25, 0.0]),
}
QUADRATIC = {"loss_fn": lambda x: jnp.sum(x**2), "params": jnp.ones(2)}
FEW = {"max_optimizer_steps": 2}

# What a call takes that is not odd; functions and methods that are not named take nothing odd.
VALID = {
    "banded.ColumnNormalizedBanded.default": {"n": 4, "bands": 2},
    "banded.ColumnNormalizedBanded.from_banded_toeplitz": {"n": 4, "coefs": COEF},
    "banded.minsep_sensitivity_squared": {"strategy": strategy(), "min_sep": 2},
    "banded.optimize": {"n": 4, "bands": 2, **FEW},
    "banded.per_query_error": {"C": strategy()},
    "buffered_toeplitz.BufferedToeplitz.build": {
        "buf_decay": [0.9],
        "output_scale": [0.2],
        "dtype": jnp.float32,
    },
    "buffered_toeplitz.blt_pair_from_theta_pair": {"theta": [0.9], "theta_hat": [0.5]},
    "buffered_toeplitz.BufferedToeplitz.from_rational_approx_to_sqrt_x": {"num_buffers": 2},
    "buffered_toeplitz.LossFn.build_closed_form_single_participation": {"n": 5},
    "buffered_toeplitz.LossFn.build_min_sep": {"n": 5},
    "buffered_toeplitz.StreamingMatrixBuilder": {
        "buf_decay": np.ones(1, np.float32),
        "output_scale": np.ones(1, np.float32),
    },
    "buffered_toeplitz.check_float64_dtype": {"blt": blt()},
    "buffered_toeplitz.geometric_sum": {"a": 1.0, "r": 0.5, "num": 3},
    "buffered_toeplitz.get_init_blt": {"num_buffers": 2},
    "buffered_toeplitz.iteration_error": {"inv_blt": blt(), "i": 3},
    "buffered_toeplitz.limit_max_error": {"inv_blt": blt()},
    "buffered_toeplitz.limit_max_loss": {"blt": blt()},
    "buffered_toeplitz.max_error": {"inv_blt": blt(), "n": 3},
    "buffered_toeplitz.max_loss": {"blt": blt(), "n": 3},
    "buffered_toeplitz.min_buf_decay_gap": {"buf_decay": [0.9, 0.5]},
    "buffered_toeplitz.optimize": {"n": 4, "max_buffers": 1, **FEW},
    "buffered_toeplitz.optimize_loss": {
        "loss_fn": buffered_toeplitz.LossFn.build_closed_form_single_participation(4),
        **FEW,
    },
    "buffered_toeplitz.robust_max_error_Gamma_j": {"omega": 0.1, "theta": 0.5, "n": 3},
    "buffered_toeplitz.robust_max_error_Gamma_jk": {
        "omega1": 0.1,
        "theta1": 0.5,
        "omega2": 0.1,
        "theta2": 0.5,
        "n": 3,
    },
    "buffered_toeplitz.sensitivity_squared": {"blt": blt(), "n": 3},
    "checks.check": {"C": C},
    "checks.check_finite": {"M": C},
    "checks.check_is_matrix": {"M": C},
    "checks.check_lower_triangular": {"M": C},
    "checks.check_square": {"M": C},
    "checks.check_symmetric": {"M": C @ C.T},
    "delta_calculation.delta_from_epsilon_and_samples": {"epsilon": 1.0, "samples": [0.5, 2.0]},
    "delta_calculation.get_base_delta": {"num_samples": 1000, "target_delta": 0.1},
    "delta_calculation.get_overall_delta": {"num_samples": 1000, "base_delta": 0.01},
    "delta_calculation.minimum_samples_to_calibrate": {"base_delta": 0.01, "target_delta": 0.1},
    "delta_calculation.perform_calibration_from_samples": {
        "epsilon": 1.0,
        "delta": 0.1,
        "positive_samples": [np.linspace(0.5, 2.0, 1000), np.linspace(0.1, 0.2, 1000)],
    },
    "dense.certificate": {"strategy_matrix": C},
    "dense.get_orthogonal_mask": {"n": 4, "epochs": 2},
    "dense.honaker_tree": {"n": 3},
    "dense.optimize": {"n": 3, **FEW},
    "dense.per_query_error": {"strategy_matrix": C},
    "dense.pg_tol_termination_fn": {
        "step_info": optimization.CallbackArgs(0, jnp.ones(()), jnp.ones(2), jnp.ones(2), ())
    },
    "dense.strategy_from_X": {"X": C.T @ C},
    "grid.clip_and_round": {"gradient": MODEL, "l2_clip_norm": 1.0, "grid_scale": 100},
    "grid.inverse_as_streaming_matrix": {"coef": [[1.0, 0.0], [1.0, 0.5]]},
    "grid.privatizer": {
        "noising_matrix": toeplitz.inverse_as_streaming_matrix([1.0, 0.5]),
        "stddev": 8.0,
    },
    "grid.round_coefs": {"coef": COEF, "fraction_bits": 4},
    "grid.to_float": {"tree": jnp.ones(2, jnp.int32), "l2_clip_norm": 1.0, "grid_scale": 100},
    "noise_addition.gaussian_privatizer": {"stddev": 1.0},
    "noise_addition.matrix_factorization_privatizer": {"noising_matrix": C, "stddev": 1.0},
    "optimization.optimize": {**QUADRATIC, **FEW},
    "optimizers.as_augmented_optimizer": {"optimizer": optax.adam(0.1)},
    "optimizers.scale_then_privatize": {"base_optimizer": optax.adam(0.1)},
    "random.secure_key": {},
    "sample_generation.compute_privacy_loss": {**SAMPLING, "sample": np.ones(4)},
    "sample_generation.generate_sample": SAMPLING,
    "sample_generation.get_privacy_loss_sample": SAMPLING,
    "sensitivity.banded_lower_triangular_mask": {"n": 4, "num_bands": 2},
    "sensitivity.banded_symmetric_mask": {"n": 4, "num_bands": 2},
    "sensitivity.fixed_epoch_sensitivity": {"C": C, "epochs": 3},
    "sensitivity.fixed_epoch_sensitivity_for_X": {"X": C.T @ C, "epochs": 3},
    "sensitivity.get_min_sep_sensitivity_upper_bound": {"C": C, "min_sep": 2},
    "sensitivity.get_min_sep_sensitivity_upper_bound_for_X": {"X": C.T @ C, "min_sep": 2},
    "sensitivity.get_sensitivity_banded": {"C": np.eye(3), "min_sep": 2},
    "sensitivity.get_sensitivity_banded_for_X": {"X": np.eye(3), "min_sep": 2},
    "sensitivity.max_participation_for_linear_fn": {"x": COEF, "min_sep": 2},
    "sensitivity.minsep_true_max_participations": {"n": 4, "min_sep": 2},
    "sensitivity.single_participation_sensitivity": {"C": C},
    "sharding_utils.compute_early_stopping_order": {"batch_size": 8, "microbatch_size": 4},
    "sharding_utils.flatten_with_zero_redundancy": {"abstract_array": ON_MESH},
    "sharding_utils.local_reshape_add": {"x": ON_MESH, "y": jax.device_put(jnp.ones(6), OVER_X)},
    "sharding_utils.parallel_sample_pytree": {"rng": np.random.default_rng(0), "struct": MODEL},
    "streaming_matrix.diagonal": {"diag": COEF},
    "streaming_matrix.momentum_sgd_matrix": {"momentum": 0.9, "learning_rates": COEF},
    "streaming_matrix.multiply_array": {"A": streaming_matrix.prefix_sum(), "x": jnp.ones(3)},
    "streaming_matrix.multiply_streaming_matrices": {
        "A": streaming_matrix.prefix_sum(),
        "B": streaming_matrix.identity(),
    },
    "streaming_matrix.scale_rows_and_columns": {
        "matrix": streaming_matrix.prefix_sum(),
        "row_scale": COEF,
    },
    "toeplitz.banded_inverse_power_noising_coefs": {"num_bands": 3, "gamma": 0.5},
    "toeplitz.banded_inverse_square_root_noising_coefs": {"num_bands": 3},
    "toeplitz.banded_square_root_strategy_coefs": {"num_bands": 3},
    "toeplitz.compute_banded_inverse_sensitivity_squared": {
        "n": 3,
        "noising_coef": COEF,
        "min_sep": 1,
    },
    "toeplitz.inverse_as_streaming_matrix": {"coef": COEF},
    "toeplitz.inverse_coef": {"coef": COEF},
    "toeplitz.lambda_cgd_as_streaming_matrix": {"n": 3, "lam": 0.5},
    "toeplitz.lambda_cgd_sensitivity_squared": {"n": 3, "lam": 0.5, "min_sep": 1},
    "toeplitz.loss": {"strategy_coef": COEF},
    "toeplitz.materialize_lower_triangular": {"coef": COEF},
    "toeplitz.minsep_sensitivity_squared": {"strategy_coef": COEF, "min_sep": 1, "n": 3},
    "toeplitz.momentum_sgd_coefs": {"n": 3},
    "toeplitz.multiply": {"lhs_coef": COEF, "rhs_coef": COEF},
    "toeplitz.noising_coef_as_streaming_matrix": {"noising_coef": COEF},
    "toeplitz.nu_dp_ftrl_noising_coefs": {"num_bands": 3, "nu": 0.1},
    "toeplitz.nu_dp_ftrl_sensitivity_squared": {"nu": 0.1},
    "toeplitz.optimal_max_error_noising_coefs": {"n": 3},
    "toeplitz.optimal_max_error_strategy_coefs": {"n": 3},
    "toeplitz.optimize_banded_inverse_toeplitz": {"n": 3, "min_sep": 1, "num_bands": 2, **FEW},
    "toeplitz.optimize_banded_toeplitz": {"n": 3, "bands": 2, **FEW},
    "toeplitz.optimize_coefs_for_amplifications": {
        "n": 3,
        "dataset_size": 4,
        "expected_batch_size": 2,
        "epsilon": 2.0,
        "delta": 1e-3,
        **FEW,
    },
    "toeplitz.pad_coefs_to_n": {"coef": COEF},
    "toeplitz.per_query_error": {"strategy_coef": COEF},
    "toeplitz.sensitivity_squared": {"coef": COEF},
    "toeplitz.stationary_sensitivity_squared": {"noising_coef": [1.0, -0.5]},
    "toeplitz.solve_banded": {"coef": COEF, "rhs": COEF},
}
PRIVATIZERS = [
    noise_addition.matrix_factorization_privatizer(matrix, stddev=1.0, prng_key=0)
    for matrix in (
        toeplitz.inverse_as_streaming_matrix(COEF),
        blt().inverse_as_streaming_matrix(),
        streaming_matrix.prefix_sum(),
        C,
    )
]
METHODS = [
    (blt(), "canonicalize inverse pillutla_score toeplitz_coefs materialize validate"),
    (blt(), "as_streaming_matrix inverse_as_streaming_matrix"),
    (strategy(), "materialize inverse_as_streaming_matrix"),
    (banded.ColumnNormalizedBanded(np.zeros(3)), "materialize inverse_as_streaming_matrix"),
    (banded.ColumnNormalizedBanded(None), "materialize inverse_as_streaming_matrix"),
    (buffered_toeplitz.BufferedToeplitz(None, "a"), "inverse materialize as_streaming_matrix"),
    (VALID["buffered_toeplitz.optimize_loss"]["loss_fn"], "loss penalized_loss compute_penalties"),
    (buffered_toeplitz.Parameterization.buf_decay_pair(), "get_loss_fn"),
    (streaming_matrix.prefix_sum(), "materialize row_norms_squared scale_rows_and_columns"),
    (streaming_matrix.prefix_sum(), "__mul__ __matmul__"),
]
ODD = [
    None,
    -1,
    0,
    1,
    2,
    3,
    2.0,
    2.5,
    float("nan"),
    float("inf"),
    -float("inf"),
    1e20,
    1e300,
    10**30,
    2**31 - 1,
    2**63,
    True,
    1j,
    "2",
    "",
    b"2",
    [],
    [1.0],
    [0.0, 1.0],
    [1.0, float("nan")],
    [1e-300, 1e300],
    [[1.0, 0.0], [0.5, 1.0]],
    [[1.0], [1.0, 2.0]],
    ["a"],
    [None],
    [10**400],
    {},
    {"a": 1.0},
    (1.0, 0.5),
    object(),
    len,
    lambda *_: None,
    int,
    np.array(2),
    np.array(2.5),
    np.ones(0),
    np.ones((0, 3)),
    np.ones((3, 3)),
    np.ones((2, 2, 2)),
    np.array([1 + 1j]),
    np.array(["a"]),
    np.array([object()]),
    np.array([True, False]),
    np.float16([1.0, 0.5]),
    np.full(3, 1e-30, np.float32),
    np.datetime64("2020-01-01"),
    jnp.int32(2),
    jnp.ones(3, jnp.bfloat16),
    jnp.zeros((2, 2)),
    jax.random.key(0),
    jax.ShapeDtypeStruct((3,), jnp.float32),
    blt(),
    buffered_toeplitz.BufferedToeplitz(None, None),
    strategy(),
    banded.ColumnNormalizedBanded(np.zeros(3)),
    streaming_matrix.prefix_sum(),
    optax.sgd(0.1),
]


def find(name):
    module, *path = name.split(".")
    found = MODULES[module]
    for part in path:
        found = getattr(found, part)
    return found


CALLS = [(name, find(name), valid) for name, valid in VALID.items()]
for privatizer in PRIVATIZERS:
    state = privatizer.init(MODEL)
    CALLS.append(("init", privatizer.init, {"model": MODEL}))
    update = {"sum_of_clipped_grads": MODEL, "noise_state": state}
    CALLS.append(("update", privatizer.update, update))
CALLS += [
    (f"{type(owner).__name__}.{name}", getattr(owner, name), {})
    for owner, names in METHODS
    for name in names.split()
]


def parameters(function):
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = inspect.signature(function).parameters.values()
    return [p.name for p in found if p.kind not in kinds]


def every_odd_call():
    for name, function, valid in CALLS:
        names = parameters(function)
        if not names:
            yield name, function, valid
        for parameter in names:
            for value in ODD:
                yield name, function, valid | {parameter: value}


def raised(function, arguments):
    """The exception that may not be raised, or None."""
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            result = function(**arguments) if arguments or parameters(function) else function()
            jax.block_until_ready(jax.tree.leaves(result))
    except ALLOWED:
        return None
    except RuntimeError as error:
        # Documented: a strategy without an inverse, an optimization without a finite loss.
        documented = "expected the inverse" in str(error) or "finite loss" in str(error)
        return None if documented else error
    except Exception as error:
        return error
    return None


def test_all_public_functions_are_called():
    named = {name.split(".")[1] for name in VALID}
    for name, module in MODULES.items():
        for public in module.__all__:
            function = getattr(module, public)
            if inspect.isfunction(function) and f"{name}.{public}" not in VALID:
                takes_nothing_odd = {"identity", "prefix_sum", "jax_enable_x64"}
                decorators = {"require_buf_decay_less_eq_one", "require_output_scale_gt_zero"}
                assert public in takes_nothing_odd | decorators, (name, public, named)


def test_odd_arguments_are_type_errors_or_value_errors():
    """One odd argument of every call, then two of some, others every night."""
    seed = 0 if settings().derandomize else random.SystemRandom().randrange(2**32)
    calls = list(every_odd_call())
    rng = random.Random(seed)
    some = rng.sample(calls, min(CALLED, len(calls)))
    for _ in range(CALLED - len(some)):
        name, function, arguments = rng.choice(calls)
        another = rng.choice(parameters(function) or [None])
        more = {} if another is None else {another: rng.choice(ODD)}
        some.append((name, function, arguments | more))
    failures = []
    for name, function, arguments in some:
        error = raised(function, arguments)
        if error is not None:
            failures.append(f"{name}({arguments}): {type(error).__name__}: {error}"[:300])
    assert not failures, f"seed {seed}\n" + "\n".join(failures)


@pytest.fixture
def strict_modes():
    with (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.debug_nans(True),
        jax.enable_checks(True),
        jax.enable_x64(True),
    ):
        yield


@pytest.mark.usefixtures("strict_modes")
@pytest.mark.parametrize("name", VALID)
def test_jaxs_strict_modes(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = find(name)(**VALID[name])
        if isinstance(found, streaming_matrix.StreamingMatrix):
            found = found.materialize(2)  # as many rows as the shortest has
        jax.block_until_ready(jax.tree.leaves(found))


OF_BLTS = {
    "inverse": lambda blt: blt.inverse().output_scale,
    "inverse_as_streaming_matrix": lambda blt: blt.inverse_as_streaming_matrix().materialize(4),
    "toeplitz_coefs": lambda blt: blt.toeplitz_coefs(7),
    "sensitivity_squared": lambda blt: buffered_toeplitz.sensitivity_squared(blt, 9),
    "max_loss": lambda blt: buffered_toeplitz.max_loss(blt, 9),
    "limit_max_loss": buffered_toeplitz.limit_max_loss,
    "penalized_loss": lambda blt: buffered_toeplitz.LossFn.build_min_sep(
        9, "mean", 3
    ).penalized_loss(blt, blt.inverse()),
    "blt_pair_from_theta_pair": lambda blt: (
        buffered_toeplitz.blt_pair_from_theta_pair(blt.buf_decay, 0.9 * blt.buf_decay)[
            1
        ].output_scale
    ),
    "robust_max_error_Gamma_j": lambda blt: buffered_toeplitz.robust_max_error_Gamma_j(
        blt.output_scale[:, None], blt.buf_decay, 5
    ),
}


@pytest.mark.usefixtures("strict_modes")
@pytest.mark.parametrize("name", OF_BLTS)
def test_jaxs_strict_modes_in_traces(name):
    parameters = buffered_toeplitz.BufferedToeplitz.build([0.9, 0.5], [0.2, 0.1])
    known = OF_BLTS[name](parameters)
    np.testing.assert_allclose(jax.jit(OF_BLTS[name])(parameters), known, rtol=1e-9)
    gradient = jax.grad(lambda blt: jnp.sum(OF_BLTS[name](blt)))(parameters)
    assert np.all(np.isfinite([gradient.buf_decay, gradient.output_scale]))
