from __future__ import annotations

import functools
import inspect
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_privacy_kernels import noise_addition, optimizers
from jax_privacy_kernels.optimizers import (
    AugmentedGradientTransformation,
    as_augmented_optimizer,
    scale_then_privatize,
)

PARAMS = {"w": np.ones((2, 3), np.float32), "b": np.full(2, -0.5, np.float32)}

adam = optax.scale_by_adam


def variance(state):
    return jax.tree.map(lambda nu, mu: nu - mu * mu, state.nu, state.mu)


# Optimizers, and where their states keep the second moments.
ADAPTIVE = {
    "adam": (optax.adam(0.1), lambda s: s[0].nu),
    "adamw": (optax.adamw(0.1), lambda s: s[0].nu),
    "amsgrad": (optax.amsgrad(0.1), lambda s: s[0].nu_max),
    "rmsprop": (optax.rmsprop(0.1), lambda s: s[0].nu),
    "rmsprop with momentum": (optax.rmsprop(0.1, momentum=0.9), lambda s: s[0].nu),
    "rmsprop with bias correction": (
        optax.rmsprop(0.1, bias_correction=True, eps_in_sqrt=False),
        lambda s: s[0].nu,
    ),
    "centered rmsprop": (optax.rmsprop(0.1, centered=True), lambda s: variance(s[0])),
    "centered rmsprop with bias correction": (
        optax.rmsprop(0.1, eps=1e-2, centered=True, bias_correction=True),
        lambda s: variance(s[0]),
    ),
    "adagrad": (optax.adagrad(0.1), lambda s: s[0].sum_of_squares),
    "alone": (adam(), lambda s: s.nu),
    "after states without moments": (
        optax.chain(optax.clip(100.0), optax.trace(0.9), adam(), optax.scale(-0.1)),
        lambda s: s[2].nu,
    ),
    "nested": (
        optax.chain(
            optax.chain(optax.identity(), optax.trace(0.5)),
            optax.chain(optax.clip(1e3), optax.chain(optax.scale_by_rms())),
            optax.scale(-0.1),
        ),
        lambda s: s[1][1][0].nu,
    ),
    "the first of two": (optax.chain(optax.scale_by_rms(), adam()), lambda s: s[0].nu),
    "hyperparameters": (
        optax.inject_hyperparams(optax.adam)(learning_rate=optax.constant_schedule(0.1)),
        lambda s: s.inner_state[0].nu,
    ),
    "named": (
        optax.named_chain(("momentum", optax.trace(0.9)), ("scaling", optax.chain(adam()))),
        lambda s: s["scaling"][0].nu,
    ),
    "masked": (optax.masked(adam(), True), lambda s: s.inner_state.nu),
    "finite": (optax.apply_if_finite(optax.adam(0.1), 3), lambda s: s.inner_state[0].nu),
}


@pytest.fixture(autouse=True)
def _promotion_of_optax():
    """optax promotes dtypes, and fails where JAX has been told to refuse that."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def trees_close(actual, expected, rtol=1e-6, atol=0.0):
    def check(a, b):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)

    jax.tree.map(check, actual, expected)


def gradients(seed, like=PARAMS):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), like)


@functools.cache
def trained(name):
    """An optimizer and its state after some steps, where second moments differ."""
    optimizer = ADAPTIVE[name][0]
    state, update = optimizer.init(PARAMS), jax.jit(optimizer.update)
    for step in range(3):
        _, state = update(gradients(step), state, PARAMS)
    return optimizer, state


def moments_of(v):
    """A state of Adam that has the second moments v."""
    return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, v), v)


# -- The transform ----------------------------------------------------------------------------


@pytest.mark.parametrize(("eps", "eps_root"), [(1e-8, 0.0), (0.3, 0.5)])
@pytest.mark.parametrize("name", ADAPTIVE)
def test_scale(name, eps, eps_root):
    optimizer, state = trained(name)
    transform = scale_then_privatize(optimizer, eps, eps_root).pre_clipping_transform
    grads, v = gradients(7), ADAPTIVE[name][1](state)
    assert len(np.unique(np.asarray(v["w"]))) == 6
    s = jax.tree.map(lambda v: 1 / (np.sqrt(np.asarray(v, np.float64) + eps_root) + eps), v)

    def expected(by):
        product = jax.tree.map(lambda g, s: np.asarray(g) * by(s), grads, s)
        return jax.tree.map(lambda x: x.astype(np.float32), product)

    trees_close(transform(state)(grads), expected(lambda s: s))
    trees_close(transform(state, inverse=True)(grads), expected(lambda s: 1 / s))


def test_defaults():
    parameters = inspect.signature(scale_then_privatize).parameters
    defaults = {name: p.default for name, p in parameters.items()}
    assert defaults == {
        "base_optimizer": inspect.Parameter.empty,
        "eps": 1e-8,
        "eps_root": 0.0,
        "extract_preconditioner_from_state_fn": None,
    }
    fields = AugmentedGradientTransformation._fields
    assert fields == ("init", "update", "pre_clipping_transform")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_round_trip_is_exact_but_for_rounding(dtype):
    with jax.enable_x64(dtype == "float64"):
        # Scaled numbers stay between 1e-3 and 1e4, where float16 is accurate.
        rng = np.random.default_rng(0)
        v = jnp.asarray(10.0 ** rng.uniform(-4, 4, 1000), dtype)
        g = jnp.asarray(rng.choice([-1, 1], 1000) * 10.0 ** rng.uniform(-1, 1, 1000), dtype)
        transform = scale_then_privatize(adam(), 1e-3, 1e-6).pre_clipping_transform
        there = transform(moments_of(v))(g)
        back = transform(moments_of(v), inverse=True)(there)
        assert there.dtype == back.dtype == dtype
        wide = np.asarray(g, np.longdouble)
        error = np.abs(np.asarray(back, np.longdouble) - wide)
        assert np.all(error <= 2 * float(jnp.finfo(dtype).eps) * np.abs(wide))
        assert np.any(np.abs(np.asarray(there, np.longdouble) / wide - 1) > 0.5)


@pytest.mark.parametrize(
    ("dtype", "moments"), [("float16", "float32"), ("float32", "bfloat16"), ("bfloat16", "float16")]
)
def test_dtypes_of_gradients_and_moments_may_differ(dtype, moments):
    g, v = jnp.array([3.0, -0.5], dtype), jnp.array([4.0, 0.0], moments)
    transform = scale_then_privatize(adam(), eps=0.5).pre_clipping_transform
    there = transform(moments_of(v))(g)
    back = transform(moments_of(v), inverse=True)(there)
    assert there.dtype == back.dtype == dtype
    np.testing.assert_allclose(np.asarray(there, np.float64), [1.2, -1], rtol=1e-2)
    np.testing.assert_allclose(np.asarray(back, np.float64), [3, -0.5], rtol=1e-2)


def test_scale_is_made_in_float32_at_least():
    g, v = jnp.array([1e-5, 0.0], jnp.float16), jnp.zeros(2, jnp.float16)
    assert np.float16(1e-8) == 0
    actual = scale_then_privatize(adam()).pre_clipping_transform(moments_of(v))(g)
    np.testing.assert_allclose(actual, [float(g[0]) * 1e8, 0], rtol=1e-3)


def test_moments_of_other_trees():
    v = [jnp.array(3.0), (jnp.array([8.0]), {"x": jnp.array([[0.0]])})]
    g = jax.tree.map(jnp.ones_like, v)
    actual = scale_then_privatize(adam(), 1, 1).pre_clipping_transform(moments_of(v))(g)
    expected = [np.float32(1 / 3), (np.array([0.25]), {"x": np.array([[0.5]])})]
    trees_close(actual, jax.tree.map(lambda x: x.astype(np.float32), expected))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_variances_are_not_negative(dtype):
    mu = jnp.asarray(np.random.default_rng(0).uniform(0.5, 1, 1000), dtype)
    state = optax.ScaleByRStdDevState(mu=mu, nu=mu * mu)  # of constant gradients
    transform = scale_then_privatize(optax.rmsprop(0.1, centered=True), eps=1e-2)
    scaled = np.asarray(transform.pre_clipping_transform(state)(jnp.ones(1000)))
    assert np.all((scaled > 9) & (scaled <= 100))


def test_leaves_that_are_numbers():
    state = moments_of({"w": jnp.array(8.0), "v": jnp.array(0.0)})
    optimizer = scale_then_privatize(adam(), 1, 1)
    scaled = optimizer.pre_clipping_transform(state)({"w": 3.0, "v": np.float32(-0.5)})
    assert scaled == {"w": 0.75, "v": -0.25}
    optimizer.update(scaled, state)
    for huge in (10**400, "3", object()):
        with pytest.raises((TypeError, ValueError), match=r"expected updates\['w'\]"):
            optimizer.pre_clipping_transform(state)({"w": huge, "v": 1.0})


def test_strict_modes():
    g, v = jnp.array([3.0, -0.5], jnp.bfloat16), jnp.array([8.0, 0.0], jnp.float16)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        optimizer = scale_then_privatize(adam(), 1, 1)
        scaled = optimizer.pre_clipping_transform(moments_of(v))(g)
        updates, _ = optimizer.update(g, moments_of(v))
    assert scaled.dtype == g.dtype
    np.testing.assert_array_equal(scaled.astype(np.float32), [0.75, -0.25])
    assert np.isfinite(updates.astype(np.float32)).all()


# -- Where v is 0 -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADAPTIVE)
def test_first_step_is_finite(name):
    base = ADAPTIVE[name][0]
    optimizer, grads = scale_then_privatize(base), gradients(0)
    state = optimizer.init(PARAMS)

    @jax.jit
    def step(grads, state):
        scaled = optimizer.pre_clipping_transform(state)(grads)
        return scaled, *optimizer.update(scaled, state, PARAMS)

    scaled, updates, state = step(grads, state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((scaled, state)))
    expected, _ = base.update(grads, base.init(PARAMS), PARAMS)
    trees_close(updates, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "eps", "g", "expected"),
    [
        ("float32", 1e-8, [1.0, -2.0, 0.0], [1e8, -2e8, 0]),
        ("float32", 1e-30, [1e5, -1e9, 1e10], [1e35, -3.4028235e38, 3.4028235e38]),
        ("float16", 1e-8, [1.0, -1e-3, 0.0], [65504, -65504, 0]),
        ("bfloat16", 1e-8, [1.0, -1e31, 3e30], [1e8, -3.3895314e38, 3e38]),
        ("float32", 0.0, [2.0, -2.0, 0.0], [3.4028235e38, -3.4028235e38, 0]),
        ("float16", 0.0, [6e-8, -1.0, 0.0], [65504, -65504, 0]),
        ("bfloat16", 0.0, [2.0, -2.0, 0.0], [3.3895314e38, -3.3895314e38, 0]),
        ("float32", 1e-45, [2.0, -2.0, 0.0], [3.4028235e38, -3.4028235e38, 0]),
    ],
)
def test_gradients_saturate(dtype, eps, g, expected):
    g = jnp.asarray(g, dtype)
    state = moments_of(jnp.zeros(3, dtype))
    actual = scale_then_privatize(adam(), eps).pre_clipping_transform(state)(g)
    assert actual.dtype == dtype
    rtol = 2 * float(jnp.finfo(dtype).eps) if eps else 1e-7
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=rtol)


def test_gradients_saturate_in_float64():
    with jax.enable_x64(True):
        g, state = jnp.array([2.0, -2.0, 0.0]), moments_of(jnp.zeros(3))
        transform = scale_then_privatize(adam(), eps=0).pre_clipping_transform
        largest = np.finfo(np.float64).max
        np.testing.assert_array_equal(transform(state)(g), [largest, -largest, 0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_inverse_stays_finite(dtype, eps):
    g = jnp.asarray([1.0, -65504, 1e-3, 0], dtype)
    state = moments_of(jnp.asarray([0, 0, 6e4, 6e4], dtype))
    transform = scale_then_privatize(adam(), eps).pre_clipping_transform
    actual = np.asarray(transform(state, inverse=True)(g), np.float64)
    expected = np.asarray(g, np.float64) * (np.sqrt(np.asarray(state.nu, np.float64)) + eps)
    np.testing.assert_allclose(actual, expected, rtol=1e-2, atol=1e-3)
    large = transform(moments_of(jnp.full(1, 6e4, dtype)), inverse=True)(g[1:2])
    assert np.isfinite(np.asarray(large, np.float64)).all()


def test_without_eps_gradients_of_zero_moments_come_back():
    g, state = jnp.array([1.0, -0.25, 1e-3, 0.0]), moments_of(jnp.zeros(4))
    transform = scale_then_privatize(adam(), eps=0).pre_clipping_transform
    back = transform(state, inverse=True)(transform(state)(g))
    np.testing.assert_allclose(back, g, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("eps", [0.0, 1e-8, 1e8])
@pytest.mark.parametrize("inverse", [False, True])
def test_what_is_not_finite_stays(dtype, eps, inverse):
    """Otherwise clipping would not find it."""
    transform = scale_then_privatize(adam(), eps).pre_clipping_transform
    g = jnp.array([np.nan, np.inf, -np.inf, 1], dtype)
    for v in (0.0, 1.0, 6e4):
        actual = transform(moments_of(jnp.full(4, v, dtype)), inverse=inverse)(g)
        assert actual.dtype == dtype
        np.testing.assert_array_equal(np.asarray(actual, np.float32)[:3], [np.nan, np.inf, -np.inf])
        assert np.isfinite(np.asarray(actual, np.float32)[3])


def test_small_numbers_may_vanish():
    """Of narrow dtypes, with large eps."""
    transform = scale_then_privatize(adam(), eps=1e4).pre_clipping_transform
    state, g = moments_of(jnp.zeros(2)), jnp.array([1.0, 1e-4], jnp.float16)
    np.testing.assert_allclose(transform(state)(g), [1e-4, 0], rtol=1e-2)
    back = transform(state, inverse=True)(transform(state)(g))
    np.testing.assert_allclose(back, [1, 0], rtol=1e-2)
    wide = g.astype(jnp.float32)
    back = transform(state, inverse=True)(transform(state)(wide))
    np.testing.assert_allclose(back, wide, rtol=1e-6)


def test_clipping_in_float16():
    """Clipping drops what is too large for it, and not what was converted before."""
    clip_pytree = pytest.importorskip("jax_privacy.clipping").clip_pytree
    state, g = moments_of(jnp.zeros(2)), jnp.array([3.0, -4.0], jnp.float16)
    transform = scale_then_privatize(adam()).pre_clipping_transform(state)
    clipped, norm = clip_pytree(transform(g), clip_norm=1.0)
    np.testing.assert_array_equal(clipped, [0, 0])
    assert norm == np.inf
    clipped, norm = clip_pytree(transform(optax.tree.cast(g, jnp.float32)), clip_norm=1.0)
    np.testing.assert_allclose(clipped, [0.6, -0.8], rtol=1e-6)
    clipped, _ = clip_pytree(transform(g.at[0].set(jnp.inf)), clip_norm=1.0)
    assert clipped[0] == 0


# -- Updates ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADAPTIVE)
def test_update_is_that_of_the_optimizer(name):
    """On what was scaled, but for rounding."""
    base, state = trained(name)
    optimizer = scale_then_privatize(base, eps=1e-3)
    trees_close(optimizer.init(PARAMS), base.init(PARAMS))
    grads = gradients(5)
    scaled = optimizer.pre_clipping_transform(state)(grads)
    assert np.all(scaled["w"] != grads["w"])
    actual = jax.jit(optimizer.update)(scaled, state, PARAMS)
    trees_close(actual, jax.jit(base.update)(grads, state, PARAMS), rtol=1e-5, atol=1e-6)


def test_params_are_optional():
    optimizer = scale_then_privatize(optax.adam(0.1), eps=1e-3)
    state, grads = optimizer.init(PARAMS), gradients(0)
    expected = optimizer.update(grads, state, PARAMS)
    trees_close(optimizer.update(grads, state), expected)
    trees_close(optimizer.update(updates=grads, state=state, params=None), expected)


def test_params_reach_the_optimizer():
    optimizer = scale_then_privatize(optax.adamw(0.1, weight_decay=0.5))
    state, zero = optimizer.init(PARAMS), jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = optimizer.update(zero, state, PARAMS)
    trees_close(updates, jax.tree.map(lambda p: -0.05 * p, PARAMS))
    with pytest.raises(ValueError, match="params"):
        optimizer.update(zero, state)


def with_loss(seen):
    """A transformation that takes an extra argument."""

    def update(updates, state, params=None, *, loss, **extra_args):
        seen.append((loss, extra_args))
        return jax.tree.map(lambda u: u * loss, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


@pytest.mark.parametrize("augment", [scale_then_privatize, as_augmented_optimizer])
def test_extra_arguments_are_passed_on(augment):
    seen = []
    base = optax.chain(with_loss(seen), optax.adam(0.1))
    optimizer, grads = augment(base), gradients(0)
    state = optimizer.init(PARAMS)
    optimizer.update(grads, state, PARAMS, loss=3.0, other="x")
    assert seen == [(3.0, {"other": "x"})]
    with pytest.raises(TypeError, match="loss"):
        optimizer.update(grads, state, PARAMS)


@pytest.mark.parametrize("augment", [scale_then_privatize, as_augmented_optimizer])
def test_extra_arguments_that_an_optimizer_does_not_take(augment):
    optimizer = augment(optax.GradientTransformation(*adam()))
    state = optimizer.init(PARAMS)
    plain = optax.GradientTransformation(optimizer.init, lambda updates, state, params=None: 0)
    with pytest.raises(TypeError, match="loss"):
        augment(plain).update(gradients(0), state, PARAMS, loss=3.0)


# -- Where the second moments are -------------------------------------------------------------


def test_custom_extractor():
    seen = []

    def extract(state):
        seen.append(state)
        return jax.tree.map(lambda m: 4 * jnp.ones_like(m), state[0].mu)

    base = optax.adam(0.1)
    optimizer = scale_then_privatize(base, eps=0.5, extract_preconditioner_from_state_fn=extract)
    state, grads = optimizer.init(PARAMS), gradients(0)
    trees_close(
        optimizer.pre_clipping_transform(state)(grads), jax.tree.map(lambda g: g / 2.5, grads)
    )
    assert seen == [state]
    unscaled = jax.tree.map(lambda g: g * 2.5, grads)
    trees_close(optimizer.update(grads, state), base.update(unscaled, state), rtol=1e-5)
    assert len(seen) == 2


def test_custom_extractor_for_other_optimizers():
    """For one whose state keeps no second moments by a name that is known."""
    belief = scale_then_privatize(
        optax.adabelief(0.1), eps=1, extract_preconditioner_from_state_fn=lambda state: state[0].nu
    )
    state = belief.init(PARAMS)
    trees_close(belief.pre_clipping_transform(state)(gradients(0)), gradients(0))
    constant = jax.tree.map(jnp.ones_like, PARAMS)
    sgd = scale_then_privatize(
        optax.sgd(1.0), eps=1, extract_preconditioner_from_state_fn=lambda state: constant
    )
    updates, _ = sgd.update(gradients(0), sgd.init(PARAMS))
    trees_close(updates, jax.tree.map(lambda g: -2 * g, gradients(0)))


def test_moments_in_lists_and_dicts():
    v = {"w": jnp.full((2, 3), 3.0), "b": jnp.full(2, 15.0)}
    inner = [optax.EmptyState(), {"empty": (), "state": [moments_of(v)]}, None, jnp.ones(3), "name"]
    transform = scale_then_privatize(adam(), 0, 1).pre_clipping_transform
    for state in (inner, tuple(inner), {"x": 1.0, "y": inner}):
        actual = transform(state)(jax.tree.map(jnp.ones_like, v))
        trees_close(actual, {"w": np.full((2, 3), 0.5, "f"), "b": np.full(2, 0.25, "f")})


DEEP = {"a": {"w": np.ones(3, np.float32), "b": np.ones(2, np.float32)}, "c": np.ones(2, "f")}


@pytest.mark.parametrize(
    ("base", "moments"),
    [
        (  # of a leaf
            optax.masked(adam(), {"a": {"w": False, "b": True}, "c": True}),
            lambda s: {"b": s.inner_state.nu["a"]["b"], "c": s.inner_state.nu["c"]},
        ),
        (  # of a part of the tree
            optax.chain(optax.masked(adam(), {"a": False, "c": True}), optax.scale(-0.1)),
            lambda s: {"c": s[0].inner_state.nu["c"]},
        ),
        (
            optax.chain(
                optax.masked(adam(), {"a": False, "c": True}),
                optax.masked(optax.scale_by_rms(), {"a": {"w": True, "b": False}, "c": True}),
            ),
            lambda s: {"w": s[1].inner_state.nu["a"]["w"], "c": s[0].inner_state.nu["c"]},
        ),
        (
            optax.chain(
                optax.masked(adam(), {"a": True, "c": False}), optax.scale_by_rms(), adam()
            ),
            lambda s: {**s[0].inner_state.nu["a"], "c": s[1].nu["c"]},
        ),
        (
            optax.multi_transform(
                {"adam": optax.adam(0.1), "rss": optax.adagrad(0.1), "sgd": optax.sgd(0.1)},
                {"a": {"w": "sgd", "b": "adam"}, "c": "rss"},
            ),
            lambda s: {
                "b": s.inner_states["adam"].inner_state[0].nu["a"]["b"],
                "c": s.inner_states["rss"].inner_state[0].sum_of_squares["c"],
            },
        ),
        (
            optax.multi_transform(
                {"train": optax.amsgrad(0.1), "freeze": optax.set_to_zero()},
                {"a": "freeze", "c": "train"},
            ),
            lambda s: {"c": s.inner_states["train"].inner_state[0].nu_max["c"]},
        ),
        (optax.masked(optax.rmsprop(0.1, centered=True), False), lambda s: {}),
    ],
)
def test_masked_leaves_are_not_scaled(base, moments):
    optimizer, grads = scale_then_privatize(base, 0.1), gradients(3, DEEP)
    _, state = base.update(gradients(0, DEEP), base.init(DEEP), DEEP)

    def scales(state):
        found = {name: np.sqrt(v) + 0.1 for name, v in moments(state).items()}
        return {"a": {k: found.get(k, 1) for k in "wb"}, "c": found.get("c", 1)}

    expected = jax.tree.map(lambda g, s: g / s, grads, scales(state))
    actual = jax.jit(lambda state, g: optimizer.pre_clipping_transform(state)(g))(state, grads)
    trees_close(actual, expected)
    actual = jax.jit(optimizer.update)(actual, state, DEEP)
    trees_close(actual, base.update(grads, state, DEEP), rtol=1e-5)


@pytest.mark.parametrize(
    "v", [1.0, [1.0], {"a": 1.0, "c": 1.0}, {"a": {"w": 1.0, "b": 1.0}}], ids=str
)
def test_second_moments_have_to_fit(v):
    """Only a MaskedNode stands for a part of the tree."""
    optimizer = scale_then_privatize(adam(), extract_preconditioner_from_state_fn=lambda _: v)
    with pytest.raises(ValueError, match=r"[Tt]ree|structure|[Mm]ismatch"):
        optimizer.pre_clipping_transform(())(gradients(0, DEEP))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    ("w", "error", "message"),
    [
        (np.ones(3, np.float32), ValueError, r"updates\['w'\].*\(2, 3\).*found shape \(3,\)"),
        (np.float32(1), ValueError, r"updates\['w'\].*found shape \(\)"),
        (np.ones((3, 2), np.float32), ValueError, r"found shape \(3, 2\)"),
        (np.ones((2, 3, 1), np.float32), ValueError, r"found shape \(2, 3, 1\)"),
        (np.ones((2, 3), np.int32), TypeError, r"updates\['w'\] to be floating, found dtype int32"),
    ],
)
def test_updates_have_to_fit(inverse, w, error, message):
    optimizer = scale_then_privatize(optax.adam(0.1))
    transform = optimizer.pre_clipping_transform(optimizer.init(PARAMS), inverse=inverse)
    with pytest.raises(error, match=message):
        transform(PARAMS | {"w": w})
    batched = jax.tree.map(lambda x: np.stack([x] * 4), PARAMS)
    scaled = transform(batched)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[3], y), scaled, transform(PARAMS))


def test_custom_extractor_may_mask():
    v = {"a": optax.MaskedNode(), "c": jnp.full(2, 4.0)}
    optimizer = scale_then_privatize(
        optax.sgd(0.1), 0, extract_preconditioner_from_state_fn=lambda _: v
    )
    g = gradients(0, DEEP)
    trees_close(optimizer.pre_clipping_transform(())(g), {"a": g["a"], "c": g["c"] / 2})


@pytest.mark.parametrize(
    ("base", "found"),
    [
        (optax.sgd(0.1), r"\(EmptyState, EmptyState\)"),
        (optax.sgd(0.1, momentum=0.9), r"\(TraceState, EmptyState\)"),
        (optax.identity(), "EmptyState"),
        (
            optax.chain(optax.clip(1.0), optax.chain(optax.trace(0.9))),
            r"\(EmptyState, \(TraceState\)\)",
        ),
        (optax.lion(0.1), r"\(ScaleByLionState"),
        (optax.inject_hyperparams(optax.sgd)(learning_rate=0.1), "InjectStatefulHyperparamsState"),
        (optax.named_chain(("a", optax.trace(0.9))), "[A-Za-z]*[Dd]ict"),
    ],
)
def test_optimizers_that_are_not_adaptive(base, found):
    optimizer = scale_then_privatize(base)
    state, message = optimizer.init(PARAMS), f"found no second moments in {found}"
    with pytest.raises(ValueError, match=message):
        optimizer.pre_clipping_transform(state)
    with pytest.raises(ValueError, match=message):
        optimizer.update(gradients(0), state, PARAMS)


@pytest.mark.parametrize(
    "base",
    [
        optax.scale_by_adamax(),
        optax.adamax(0.1),
        optax.adamaxw(0.1),
        optax.chain(optax.clip(1.0), optax.chain(optax.trace(0.9), optax.adamax(0.1))),
        optax.named_chain(("a", optax.adamax(0.1))),
        optax.masked(optax.adamax(0.1), True),
        optax.multi_transform({"a": adam(), "b": optax.adamax(0.1)}, {"w": "a", "b": "b"}),
        optax.inject_hyperparams(optax.adamax)(learning_rate=0.1),
        optax.apply_if_finite(optax.adamax(0.1), 3),
        optax.MultiSteps(optax.adamax(0.1), 2).gradient_transformation(),
        optax.GradientTransformation(*optax.adamax(0.1)),
    ],
)
def test_adamax_is_not_taken_for_adam(base):
    message = "found optax.adamax, which keeps an infinity norm.*pass extract_preconditioner"
    with pytest.raises(ValueError, match=message):
        scale_then_privatize(base)


class AsATuple(NamedTuple):
    inner: optax.GradientTransformation

    def init(self, params):
        return self.inner.init(params)

    def update(self, updates, state, params=None):
        return self.inner.update(updates, state, params)


class WithSlots:
    __slots__ = ("inner",)
    init, update = AsATuple.init, AsATuple.update

    def __init__(self, inner):
        self.inner = inner


class WithOneSlot(WithSlots):
    __slots__ = "more"  # which Python takes for one name


class WithADict:
    init, update = AsATuple.init, AsATuple.update

    def __init__(self, inner):
        self.inner = inner


@pytest.mark.parametrize("kind", [AsATuple, WithSlots, WithOneSlot, WithADict])
def test_optimizers_of_methods(kind):
    def methods(inner):
        made = kind(inner)
        return optax.GradientTransformation(made.init, made.update)

    scale_then_privatize(methods(optax.adam(0.1)))
    with pytest.raises(ValueError, match=r"found optax\.adamax"):
        scale_then_privatize(methods(optax.adamax(0.1)))


def test_adam_from_a_function_of_that_name_is_adam():
    def not_adamax():
        inner = optax.adam(0.1)
        return optax.GradientTransformation(inner.init, lambda *args: inner.update(*args))

    scale_then_privatize(not_adamax())


def test_adamax_by_what_the_error_says():
    def squares(state):
        return jax.tree.map(jnp.square, state[0].nu)

    base = optax.adamax(0.1)
    optimizer = scale_then_privatize(base, 0.1, extract_preconditioner_from_state_fn=squares)
    _, state = base.update(gradients(0), base.init(PARAMS))
    actual = optimizer.pre_clipping_transform(state)(gradients(1))
    expected = jax.tree.map(lambda g, n: g / (n + 0.1), gradients(1), state[0].nu)
    trees_close(actual, expected)


def test_optimizers_may_refer_to_themselves():
    """And to what they do not have: neither ends or fails the search for AdaMax."""
    base = optax.adam(0.1)

    def update(updates, state, params=None):
        assert callable(update)
        return base.update(updates, state, params) if params is None else missing

    scale_then_privatize(optax.GradientTransformation(base.init, update))
    missing = None


@pytest.mark.parametrize(
    "base", [None, 2.0, {}, optax.sgd, NamedTuple("Half", [("init", object)])(len)]
)
@pytest.mark.parametrize("augment", [scale_then_privatize, as_augmented_optimizer])
def test_what_is_no_optimizer(augment, base):
    with pytest.raises(TypeError, match="optimizer to be a GradientTransformation, found"):
        augment(base)


@pytest.mark.parametrize("value", [-1e-9, -1.0, np.nan, np.inf, -np.inf, 10**400])
@pytest.mark.parametrize("name", ["eps", "eps_root"])
def test_eps_is_checked(name, value):
    message = re.escape(f"expected {name} to be in [0, inf), found {name}={value}")
    with pytest.raises(ValueError, match=message):
        scale_then_privatize(optax.adam(0.1), **{name: value})
    with pytest.raises(TypeError, match=f"expected {name} to be"):
        scale_then_privatize(optax.adam(0.1), **{name: str(value)})


# -- Plain optimizers -------------------------------------------------------------------------


def test_augmented_optimizers_stay_as_they_are():
    for optimizer in (
        scale_then_privatize(optax.adam(0.1)),
        as_augmented_optimizer(optax.sgd(0.1)),
        AugmentedGradientTransformation(len, len, len),
    ):
        assert as_augmented_optimizer(optimizer) is optimizer


@pytest.mark.parametrize("base", [optax.sgd(0.1, momentum=0.9), optax.adamw(0.1)])
def test_plain_optimizers_get_the_identity(base):
    optimizer = as_augmented_optimizer(base)
    assert isinstance(optimizer, AugmentedGradientTransformation)
    state, grads = optimizer.init(PARAMS), gradients(0)
    assert optimizer.pre_clipping_transform(state)(grads) is grads
    assert optimizer.pre_clipping_transform(state, inverse=True)(grads) is grads
    trees_close(optimizer.update(grads, state, PARAMS), base.update(grads, state, PARAMS))
    trees_close(state, base.init(PARAMS))


# -- Training ---------------------------------------------------------------------------------


def loss_fn(params, batch):
    x, y = batch
    return jnp.mean((x @ params["w"].T + params["b"] - y) ** 2)


@functools.cache
def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 3)) * [1, 10, 0.1]
    y = x @ np.array([[1, -1], [0.2, 0.1], [5, 3]]) + rng.normal(size=(16, 2))
    return x.astype(np.float32), y.astype(np.float32)


def clipped_sum(transform, params, batch, clip_norm):
    """By the definition: every example's gradient transformed, clipped, and then the sum."""

    def one(example):
        grads = transform(jax.grad(loss_fn)(params, example))
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
        return jax.tree.map(lambda g: g * jnp.minimum(1, clip_norm / norm), grads)

    by_example = jax.vmap(lambda x, y: one((x[None], y[None])))(*batch)
    return jax.tree.map(lambda g: g.sum(axis=0), by_example)


def train(optimizer, clip_norm, stddev, gradient_fn=clipped_sum, steps=12):
    privatizer = noise_addition.gaussian_privatizer(stddev=stddev, prng_key=jax.random.key(1))

    @jax.jit
    def step(params, state, noise_state):
        transform = optimizer.pre_clipping_transform(state)
        grads = gradient_fn(transform, params, data(), clip_norm)
        noisy, noise_state = privatizer.update(grads, noise_state)
        updates, state = optimizer.update(noisy, state, params)
        return optax.apply_updates(params, updates), state, noise_state

    params = jax.tree.map(jnp.asarray, PARAMS)
    carry = params, optimizer.init(params), privatizer.init(params)
    for _ in range(steps):
        carry = step(*carry)
    return carry[0]


def test_large_eps_is_plain_training_up_to_scale():
    base, eps = optax.chain(adam(eps=1e-3), optax.scale(-0.1)), 1e6
    expected = train(as_augmented_optimizer(base), clip_norm=3.0, stddev=0.5)
    scaled = scale_then_privatize(base, eps)
    actual = train(scaled, clip_norm=3.0 / eps, stddev=0.5 / eps)
    trees_close(actual, expected, rtol=1e-3, atol=1e-4)
    assert np.abs(expected["w"] - PARAMS["w"]).max() > 0.1
    small = train(scale_then_privatize(base, 1e-3), clip_norm=3.0, stddev=0.5)
    assert np.abs(small["w"] - expected["w"]).max() > 1e-2


def test_large_eps_root_is_plain_training_up_to_scale():
    base, eps_root = optax.rmsprop(0.1, eps=1e-3), 1e10
    expected = train(as_augmented_optimizer(base), clip_norm=3.0, stddev=0.5)
    scaled = scale_then_privatize(base, 0, eps_root)
    actual = train(scaled, clip_norm=3.0 / 1e5, stddev=0.5 / 1e5)
    trees_close(actual, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("base", [optax.adamw(0.1), optax.adagrad(0.1), optax.amsgrad(0.1)])
def test_training_by_the_definition(base):
    """Without clipping and noise the transform changes nothing."""
    expected = train(as_augmented_optimizer(base), clip_norm=np.inf, stddev=0.0)
    actual = train(scale_then_privatize(base, 1e-2), clip_norm=np.inf, stddev=0.0)
    trees_close(actual, expected, rtol=1e-2, atol=1e-3)


def test_noise_has_the_size_of_the_moments():
    """Every coordinate gets as much noise as its second moments say."""
    v = {"w": jnp.array([[1.0, 4.0, 0.0], [100.0, 1e4, 9.0]]), "b": jnp.array([0.25, 1.0])}
    # Its updates are the gradients that it gets.
    base = optax.chain(optax.identity())
    optimizer = scale_then_privatize(base, 0.5, extract_preconditioner_from_state_fn=lambda _: v)
    privatizer = noise_addition.gaussian_privatizer(stddev=2.0, prng_key=jax.random.key(0))
    zero = jax.tree.map(jnp.zeros_like, v)
    noise, _ = privatizer.update(zero, privatizer.init(zero))
    updates, _ = optimizer.update(noise, optimizer.init(zero))
    trees_close(updates, jax.tree.map(lambda z, v: z * (jnp.sqrt(v) + 0.5), noise, v))


def test_with_clipped_gradients_of_the_reference():
    clipping = pytest.importorskip("jax_privacy.clipping")

    def by_reference(transform, params, batch, clip_norm):
        clipped = clipping.clipped_grad(
            loss_fn, l2_clip_norm=clip_norm, pre_clipping_transform=transform
        )
        assert clipped.sensitivity() == clip_norm
        return clipped(params, batch)

    optimizer = scale_then_privatize(optax.adamw(0.1), eps=1e-2)
    expected = train(optimizer, clip_norm=2.0, stddev=0.3)
    actual = train(optimizer, clip_norm=2.0, stddev=0.3, gradient_fn=by_reference)
    trees_close(actual, expected, rtol=1e-3, atol=1e-4)
    assert np.abs(expected["w"] - PARAMS["w"]).max() > 0.1


def test_training_in_a_scan():
    optimizer = scale_then_privatize(optax.adam(0.1), eps=1e-2)

    def step(carry, _):
        params, state = carry
        grads = clipped_sum(optimizer.pre_clipping_transform(state), params, data(), 2.0)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    params = jax.tree.map(jnp.asarray, PARAMS)
    start = params, optimizer.init(params)
    (actual, _), _ = jax.jit(lambda start: jax.lax.scan(step, start, length=12))(start)
    expected = train(optimizer, clip_norm=2.0, stddev=0.0)
    trees_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_transform_of_many_gradients():
    """A map over examples scales each as it is scaled alone."""
    _, state = trained("adam")
    transform = scale_then_privatize(optax.adam(0.1)).pre_clipping_transform(state)
    many = [gradients(seed) for seed in range(4)]
    stacked = jax.tree.map(lambda *g: jnp.stack(g), *many)
    mapped = jax.jit(jax.vmap(transform))(stacked)
    for i, grads in enumerate(many):
        trees_close(jax.tree.map(lambda g, i=i: g[i], mapped), transform(grads))


def test_public_names():
    assert set(optimizers.__all__) == {
        "AugmentedGradientTransformation",
        "PreClippingTransform",
        "as_augmented_optimizer",
        "scale_then_privatize",
    }
