"""Programs that use jax_privacy as it is documented, with and without the swap: the same results.

Each client below is a program of its own that knows nothing of this library. The times of both
runs, compilation included, are printed: ``pytest -s`` shows them.
"""

from __future__ import annotations

import contextlib
import time

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import sweeps

import jax_privacy_kernels

jax_privacy = pytest.importorskip("jax_privacy", reason="install the test extra")

from jax_privacy import auditing, batch_selection, noise_addition  # noqa: E402
from jax_privacy.experimental import execution_plan  # noqa: E402
from jax_privacy.matrix_factorization import (  # noqa: E402
    banded,
    buffered_toeplitz,
    sensitivity,
    streaming_matrix,
    toeplitz,
)

STEPS, BATCH, FEATURES = 24, 16, 5
MIN_SEP, PARTICIPATIONS = 6, 4


def data():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(MIN_SEP * BATCH, FEATURES)).astype(np.float32)
    return features, (features.sum(axis=1) > 0).astype(np.float32)


def loss_fn(params, features, labels):
    logits = features @ params["weights"] + params["bias"]
    return optax.sigmoid_binary_cross_entropy(logits, labels).mean()


def train(privatizer, optimizer):
    """Every epoch visits the batches in the same order."""
    features, labels = data()
    grad_fn = jax_privacy.clipped_grad(loss_fn, l2_clip_norm=1.0, batch_argnums=(1, 2))
    transform = optax.chain(privatizer, optax.scale(1 / BATCH), optimizer)

    @jax.jit
    def step(params, state, features, labels):
        updates, state = transform.update(grad_fn(params, features, labels), state, params)
        return optax.apply_updates(params, updates), state

    params = {"weights": jnp.zeros(FEATURES), "bias": jnp.zeros(())}
    state = transform.init(params)
    history = []
    for t in range(STEPS):
        batch = slice(t % MIN_SEP * BATCH, (t % MIN_SEP + 1) * BATCH)
        params, state = step(params, state, features[batch], labels[batch])
        history.append(params)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *history)


# -- Clients ----------------------------------------------------------------------------------


def dp_sgd():
    privatizer = noise_addition.gaussian_privatizer(stddev=0.7, prng_key=jax.random.key(1))
    return train(privatizer, optax.adam(0.1))


def banded_toeplitz():
    coef = toeplitz.optimize_banded_toeplitz(n=STEPS, bands=4)
    squared = toeplitz.minsep_sensitivity_squared(coef, MIN_SEP, PARTICIPATIONS, STEPS)
    privatizer = noise_addition.matrix_factorization_privatizer(
        toeplitz.inverse_as_streaming_matrix(coef, column_normalize_for_n=STEPS),
        stddev=0.7 * float(jnp.sqrt(squared)),
        prng_key=jax.random.key(2),
    )
    return train(privatizer, optax.sgd(0.2, momentum=0.9))


def dense_matrix():
    # Of a strategy that is given: those that the libraries optimize differ, ours being better.
    coef = toeplitz.optimal_max_error_strategy_coefs(STEPS)
    C = toeplitz.materialize_lower_triangular(coef)
    privatizer = noise_addition.matrix_factorization_privatizer(
        jnp.linalg.inv(C),
        stddev=0.7 * float(sensitivity.fixed_epoch_sensitivity(C, PARTICIPATIONS)),
        prng_key=3,
        dtype=jnp.float32,
    )
    return train(privatizer, optax.sgd(0.2))


def column_normalized():
    A = streaming_matrix.momentum_sgd_matrix(0.9)
    C = banded.optimize(STEPS, bands=4, A=A, max_optimizer_steps=20)
    squared = banded.minsep_sensitivity_squared(C, MIN_SEP, PARTICIPATIONS)
    privatizer = noise_addition.matrix_factorization_privatizer(
        C.inverse_as_streaming_matrix(), stddev=0.7 * np.sqrt(squared), prng_key=4
    )
    return train(privatizer, optax.sgd(0.2))


def buffered():
    blt = buffered_toeplitz.BufferedToeplitz.build([0.9, 0.5], [0.2, 0.1], dtype=jnp.float32)
    coef = blt.toeplitz_coefs(STEPS)
    squared = toeplitz.minsep_sensitivity_squared(coef, MIN_SEP, PARTICIPATIONS)
    privatizer = noise_addition.matrix_factorization_privatizer(
        blt.inverse_as_streaming_matrix(), stddev=0.7 * float(jnp.sqrt(squared)), prng_key=5
    )
    return train(privatizer, optax.sgd(0.2))


def planned():
    """The execution plan with BandMF: sampled batches, padded."""
    features, labels = data()
    plan = execution_plan.BandMFExecutionPlanConfig.default(
        iterations=STEPS,
        num_bands=4,
        epsilon=None,
        delta=None,
        noise_multiplier=0.7,
        sampling_prob=0.5,
        normalize_by=BATCH,
        noise_seed=6,
    ).plan
    grad_fn = plan.clipped_grad(loss_fn, batch_argnums=(1, 2))
    privatizer = plan.noise_addition_transform
    optimizer = optax.sgd(0.2)

    @jax.jit
    def step(params, noise_state, opt_state, features, labels, is_padding_example):
        grads = grad_fn(params, features, labels, is_padding_example=is_padding_example)
        noisy, noise_state = privatizer.update(grads, noise_state)
        updates, opt_state = optimizer.update(noisy, opt_state)
        return optax.apply_updates(params, updates), noise_state, opt_state

    params = {"weights": jnp.zeros(FEATURES), "bias": jnp.zeros(())}
    state = privatizer.init(params), optimizer.init(params)
    for batch in plan.batch_selection_strategy.batch_iterator(len(labels), rng=0):
        index = batch_selection.pad_to_multiple_of(batch, 32)
        params, *state = step(params, *state, features[index], labels[index], index == -1)
    return params


CANARIES, DELTA = 4000, 1e-2


def audit(stddev=2.0):
    """Scores of canaries, of sensitivity 1, from the sum of correlated noise over some steps."""
    coef = toeplitz.optimal_max_error_strategy_coefs(STEPS)
    coef = coef / jnp.linalg.norm(coef)  # sensitivity 1 for one participation
    privatizer = noise_addition.matrix_factorization_privatizer(
        toeplitz.inverse_as_streaming_matrix(coef), stddev=stddev, prng_key=7
    )
    # Canary i of those held in adds C e_0 to what C releases: 1 to step 0 of the gradients.
    inserted = jnp.repeat(jnp.array([1.0, 0.0]), CANARIES)
    state = privatizer.init(inserted)
    update = jax.jit(privatizer.update)
    rows = []
    for t in range(STEPS):
        noisy, state = update(inserted if t == 0 else jnp.zeros_like(inserted), state)
        rows.append(noisy)
    # The best attack projects C (noisy gradients) on the canary's column.
    released = toeplitz.materialize_lower_triangular(coef) @ jnp.stack(rows)
    scores = np.asarray(coef @ released)
    auditor = auditing.CanaryScoreAuditor(scores[:CANARIES], scores[CANARIES:])
    return {
        "epsilon": auditor.epsilon_clopper_pearson(
            significance=0.05, delta=DELTA, threshold_strategy=auditing.Split(seed=0)
        ),
        "gdp": auditor.epsilon_from_gdp(significance=0.05, delta=DELTA),
        "auroc": auditor.attack_auroc(),
    }


def keras():
    """Its train step makes a privatizer inside a trace, and takes the state apart."""
    keras = pytest.importorskip("keras", reason="keras is missing; it needs KERAS_BACKEND=jax")
    if keras.backend.backend() != "jax":
        pytest.skip("keras runs on another backend; it needs KERAS_BACKEND=jax")
    from jax_privacy import keras_api

    keras.utils.set_random_seed(0)
    features, labels = data()
    model = keras.Sequential([keras.Input((FEATURES,)), keras.layers.Dense(1)])
    config = keras_api.DPKerasConfig(
        epsilon=20.0,
        delta=1e-5,
        clipping_norm=1.0,
        batch_size=BATCH,
        gradient_accumulation_steps=1,
        train_steps=STEPS,
        train_size=len(labels),
        noise_multiplier=0.7,
        seed=8,
    )
    model = keras_api.make_private(model, config)
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.SGD(0.2), loss=loss)
    model.fit(features, labels, batch_size=BATCH, epochs=4, shuffle=False, verbose=0)
    return [np.asarray(weights) for weights in model.trainable_variables]


CLIENTS = (
    dp_sgd,
    banded_toeplitz,
    dense_matrix,
    column_normalized,
    buffered,
    planned,
    audit,
    keras,
)


def swapped(swap):
    return jax_privacy_kernels.installed() if swap else contextlib.nullcontext()


@pytest.mark.parametrize(
    "client",
    [
        pytest.param(client, marks=pytest.mark.nightly)
        if client in (column_normalized, planned)
        else client
        for client in CLIENTS
    ],
    ids=lambda client: client.__name__,
)
def test_the_same_with_and_without(client):
    results, seconds = [], []
    for swap in (False, True):
        start = time.perf_counter()
        with swapped(swap):
            results.append(client())
            ours = noise_addition.gaussian_privatizer.__module__.startswith("jax_privacy_kernels")
        seconds.append(time.perf_counter() - start)
        assert ours == swap
    print(f"{client.__name__}: {seconds[0]:.2f} s, swapped {seconds[1]:.2f} s")
    for path, want in jax.tree.leaves_with_path(results[0]):
        assert np.abs(want).max() > 1e-3, path  # something was trained, or found
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), *results)


# -- Transformations of optax around a privatizer ----------------------------------------------


def banded_privatizer(seed, bands=3, stddev=0.7):
    coef = toeplitz.optimal_max_error_strategy_coefs(bands)
    coef = coef / jnp.linalg.norm(coef)
    return noise_addition.matrix_factorization_privatizer(
        toeplitz.inverse_as_streaming_matrix(coef, column_normalize_for_n=STEPS),
        stddev=stddev,
        prng_key=seed,
    )


def gaussian(stddev, seed):
    return noise_addition.gaussian_privatizer(stddev=stddev, prng_key=jax.random.key(seed))


def by_leaf(combine):
    """Noise of its own for each of two groups of parameters."""
    parts = {"correlated": banded_privatizer(1), "independent": gaussian(0.7, 2)}
    return combine(parts, {"weights": "correlated", "bias": "independent"})


SCHEDULE = optax.linear_schedule(0.9, 0.1, STEPS)
TRANSFORMS = {
    "chain": lambda: optax.chain(banded_privatizer(1), optax.clip(5.0), optax.adam(0.1)),
    "named_chain": lambda: optax.named_chain(("p", banded_privatizer(1)), ("o", optax.sgd(0.2))),
    "MultiSteps": lambda: optax.MultiSteps(
        optax.chain(banded_privatizer(1), optax.sgd(0.2)), every_k_schedule=3
    ),
    "masked": lambda: optax.chain(
        optax.masked(banded_privatizer(1), {"weights": True, "bias": False}), optax.sgd(0.2)
    ),
    "multi_transform": lambda: optax.chain(by_leaf(optax.multi_transform), optax.sgd(0.2)),
    "partition": lambda: optax.chain(by_leaf(optax.partition), optax.sgd(0.2)),
    "inject_hyperparams": lambda: optax.chain(
        banded_privatizer(1), optax.inject_hyperparams(optax.sgd)(learning_rate=SCHEDULE)
    ),
    "inject_hyperparams of the privatizer": lambda: optax.chain(
        optax.inject_hyperparams(noise_addition.gaussian_privatizer, static_args="prng_key")(
            stddev=SCHEDULE, prng_key=3
        ),
        optax.sgd(0.2),
    ),
    "inject_hyperparams of a banded privatizer": lambda: optax.chain(
        optax.inject_hyperparams(banded_privatizer, static_args=("seed", "bands"))(
            1, stddev=SCHEDULE
        ),
        optax.sgd(0.2),
    ),
    "apply_if_finite": lambda: optax.apply_if_finite(
        optax.chain(banded_privatizer(1), gaussian(0.1, 2), optax.sgd(0.2)),
        max_consecutive_errors=3,
    ),
}


@pytest.mark.parametrize(
    "transform",
    sweeps.cases(
        list(TRANSFORMS),
        [
            "chain",
            "MultiSteps",
            "multi_transform",
            "inject_hyperparams of a banded privatizer",
            "apply_if_finite",
        ],
    ),
)
def test_the_same_in_optax(transform):
    def run():
        made = TRANSFORMS[transform]()
        params = {"weights": jnp.zeros(FEATURES), "bias": jnp.zeros(())}
        state = made.init(params)
        step = jax.jit(made.update)
        history = []
        for t in range(9):
            # At step 4 a gradient is not finite, which apply_if_finite leaves out.
            bias = jnp.inf if t == 4 and transform == "apply_if_finite" else 0.1
            grads = {"weights": jnp.full(FEATURES, 0.01 * t), "bias": jnp.asarray(bias)}
            updates, state = step(grads, state, params)
            params = optax.apply_updates(params, updates)
            history.append(params)
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *history)

    results = []
    for swap in (False, True):
        with swapped(swap):
            results.append(run())
    assert np.abs(results[0]["weights"][-1]).max() > 0.1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), *results)


# -- Models of other libraries -----------------------------------------------------------------


def of_nnx():
    nnx = pytest.importorskip("flax.nnx", reason="install flax")
    layer = nnx.Linear(FEATURES, 1, rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer, nnx.Param)
    return params, lambda params, x: nnx.merge(graph, params)(x)


def of_equinox():
    eqx = pytest.importorskip("equinox", reason="install equinox")
    layer = eqx.nn.MLP(FEATURES, 1, width_size=4, depth=1, key=jax.random.key(0))
    params, static = eqx.partition(layer, eqx.is_inexact_array)
    return params, lambda params, x: jax.vmap(eqx.combine(params, static))(x)


@pytest.mark.parametrize("model", [of_nnx, of_equinox], ids=lambda model: model.__name__)
def test_the_same_for_models_of_other_libraries(model):
    features, labels = data()

    def loss(params, features, labels):
        logits = apply(params, features)[:, 0]
        return optax.sigmoid_binary_cross_entropy(logits, labels).mean()

    results = []
    for swap in (False, True):
        with swapped(swap):
            params, apply = model()
            grad_fn = jax_privacy.clipped_grad(loss, l2_clip_norm=1.0, batch_argnums=(1, 2))
            transform = optax.chain(banded_privatizer(1), optax.scale(1 / BATCH), optax.adam(0.1))
            state = transform.init(params)

            @jax.jit
            def step(params, state, x, y, grad_fn=grad_fn, transform=transform):
                updates, state = transform.update(grad_fn(params, x, y), state, params)
                return optax.apply_updates(params, updates), state

            for t in range(6):
                batch = slice(t * BATCH, (t + 1) * BATCH)
                params, state = step(params, state, features[batch], labels[batch])
            results.append(jax.tree.leaves(params))
    assert len(results[0]) >= 2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), *results)


@pytest.mark.parametrize("swap", [False, True])
def test_the_audit_finds_what_was_claimed_and_no_more(swap):
    """A lower bound on epsilon: below that of the Gaussian mechanism, unless noise is missing."""
    claimed = dp_accounting.get_epsilon_gaussian(2.0, DELTA)
    with swapped(swap):
        right, wrong = audit(), audit(stddev=0.5)
    for name in ("epsilon", "gdp"):
        assert 0.3 * claimed < right[name] <= claimed
        assert wrong[name] > claimed
