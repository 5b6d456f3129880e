"""Results lie where that saves a copy, and are the same wherever they lie."""

from __future__ import annotations

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_privacy_kernels import grid, noise_addition, random
from jax_privacy_kernels.matrix_factorization import toeplitz
from jax_privacy_kernels.ops import _memory
from jax_privacy_kernels.ops._ffi import unavailable
from jax_privacy_kernels.ops._memory import Memory

pytestmark = pytest.mark.skipif(unavailable() is not None, reason="of the C++ kernels")

STEPS = 5


def correlated():
    coef = toeplitz.optimal_max_error_strategy_coefs(4)
    matrix = toeplitz.inverse_as_streaming_matrix(coef)
    return noise_addition.matrix_factorization_privatizer(
        matrix, stddev=1.0, prng_key=jax.random.key(0)
    )


def dense():
    rows = jnp.tril(jnp.ones((STEPS, STEPS), jnp.float32))
    return noise_addition.matrix_factorization_privatizer(
        rows, stddev=1.0, prng_key=jax.random.key(0)
    )


def exact():
    coef = grid.round_coefs(toeplitz.optimal_max_error_strategy_coefs(4), 12)
    matrix = toeplitz.inverse_as_streaming_matrix(coef)
    return grid.privatizer(matrix, stddev=1000.0, prng_key=random.secure_key(bytes(32)))


PRIVATIZERS = {"correlated": correlated, "dense": dense, "exact": exact}


@pytest.fixture(params=PRIVATIZERS)
def case(request):
    """A privatizer, gradients of two leaves, and its first state."""
    privatizer = PRIVATIZERS[request.param]()
    dtype = jnp.int32 if request.param == "exact" else jnp.float32
    grads = {"a": jnp.arange(3000, dtype=dtype), "b": jnp.ones((50, 7), dtype)}
    return privatizer, grads, privatizer.init(grads)


def train(privatizer, grads, state):
    """A step whose gradients are its own."""
    own = jax.tree.map(lambda g: 2 * g + 1, grads)
    return privatizer.update(own, state)


def aliases(function, *args, donate=()):
    """Which results of the kernel's call lie in which operands of a leaf."""
    text = jax.jit(function, donate_argnums=donate).lower(*args).compile().as_text()
    (call,) = [line for line in text.splitlines() if "custom-call(" in line and "jpk_" in line]
    found = re.findall(r"\{(\d*)\}: \(\d+, \{\}\)", call)
    return {int(index or 0) for index in found}


def exported(function, *args):
    kernels = ("jpk_correlated_noise", "jpk_dense_noise", "jpk_grid_noise")
    allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in kernels]
    return jax.export.export(jax.jit(function), disabled_checks=allowed)(*args)


def test_results_lie_where_it_saves_a_copy(case):
    privatizer, grads, state = case
    rows = bool(jax.tree.leaves(state.inner))
    outs = {0, 2} if rows else {0, 1}
    rings = {1, 3} if rows else set()
    update = privatizer.update
    assert aliases(update, grads, state) == set()
    assert aliases(update, grads, state, donate=(1,)) == rings
    assert aliases(update, grads, state, donate=(0, 1)) == outs | rings
    step = functools.partial(train, privatizer)
    assert aliases(step, grads, state) == outs
    assert aliases(step, grads, state, donate=(1,)) == outs | rings

    def scanned(grads, state):
        return jax.lax.scan(lambda c, _: (step(*c), None), (grads, state), length=3)[0]

    assert aliases(scanned, grads, state) == outs | rings


def test_an_argument_is_known_behind_a_reshape(case):
    privatizer, grads, state = case
    flat = jax.tree.map(jnp.ravel, grads)

    def shaped(flat, state):
        return privatizer.update(jax.tree.map(lambda x, g: x.reshape(g.shape), flat, grads), state)

    assert not aliases(shaped, flat, state, donate=(1,)) & {0, 2}


def test_what_is_exported_updates_rings_in_place(case):
    """Who calls it may donate them; gradients that were given may be anybody's."""
    privatizer, grads, state = case
    words = exported(privatizer.update, grads, state).mlir_module()
    rings = len(jax.tree.leaves(state.inner))
    assert words.count("#stablehlo.output_operand_alias") == rings


@pytest.mark.parametrize("own", [False, True])
def test_the_noise_is_the_same_wherever_it_lies(case, own):
    privatizer, grads, first = case
    step = functools.partial(train, privatizer) if own else privatizer.update
    runs = []
    for donate in ((), (1,), (0, 1)):
        update = jax.jit(step, donate_argnums=donate)
        state, outs = jax.tree.map(jnp.copy, first), []
        for _ in range(STEPS):
            out, state = update(jax.tree.map(jnp.copy, grads), state)
            outs.append(jax.tree.map(np.array, out))
        runs.append((outs, jax.tree.map(np.array, state)))
    for run in runs[1:]:
        jax.tree.map(np.testing.assert_array_equal, run, runs[0])


def test_operands_stay_as_they_are(case):
    """Those that are not donated, in whatever memory the results are."""
    privatizer, grads, state = case
    before = jax.tree.map(np.array, (grads, state))
    for step in (privatizer.update, functools.partial(train, privatizer)):
        jax.block_until_ready(jax.jit(step)(grads, state))
        jax.tree.map(np.testing.assert_array_equal, (grads, state), before)


def test_gradients_that_are_used_again_stay(case):
    privatizer, grads, state = case

    def both(grads, state):
        own = jax.tree.map(lambda g: 2 * g + 1, grads)
        noisy, state = privatizer.update(own, state)
        return own, noisy, state

    own, noisy, _ = jax.jit(both)(grads, state)
    expected, _ = jax.jit(functools.partial(train, privatizer))(grads, state)
    jax.tree.map(np.testing.assert_array_equal, own, jax.tree.map(lambda g: 2 * g + 1, grads))
    jax.tree.map(np.testing.assert_array_equal, noisy, expected)


def test_a_large_state_that_is_not_donated_is_named_once(case, monkeypatch):
    privatizer, grads, state = case
    if not jax.tree.leaves(state.inner):
        return
    monkeypatch.setattr(_memory, "LARGE", 1000)
    monkeypatch.setattr(_memory, "_warned", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.jit(privatizer.update, donate_argnums=1).lower(grads, state)
        exported(privatizer.update, grads, state)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        jax.jit(privatizer.update).lower(grads, state)
        jax.jit(lambda g, s: privatizer.update(g, s)).lower(grads, state)
    (warning,) = found
    assert re.search(r"noise state, .* MiB, .*donate_argnums", str(warning.message))


@pytest.mark.parametrize("donate", [(), (1,), (0, 1)])
def test_origins(donate):
    origins = _memory.Origins()

    def step(x, ring):
        grads = [x, 2 * x, (2 * x).reshape(-1), jax.lax.optimization_barrier(x.reshape(-1))]
        return _memory.note(origins, grads, [ring])

    jax.jit(step, donate_argnums=donate).lower(jnp.ones((2, 3)), jnp.ones(4))
    given = Memory.OWN if 0 in donate else Memory.GIVEN
    assert [origins.grad(i) for i in range(4)] == [given, Memory.OWN, Memory.OWN, given]
    assert origins.ring(0) is (Memory.OWN if donate else Memory.GIVEN)


def test_unknown_is_said_of_what_is_not_noted():
    origins = _memory.Origins()
    assert origins.grad(0) is origins.ring(3) is Memory.UNKNOWN
