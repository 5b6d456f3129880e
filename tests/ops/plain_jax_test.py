"""Plain JAX samples many leaves at once: what that must not change, and what it is for."""

from __future__ import annotations

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from jax_privacy_kernels import random
from jax_privacy_kernels.ops import (
    BandedRecurrence,
    BufferedToeplitz,
    MovingAverage,
    _leaves,
    correlated_noise,
    dense_noise,
    init_correlated_noise,
    init_dense_noise,
)
from jax_privacy_kernels.ops._jax_bundles import SMALL, bundles
from jax_privacy_kernels.ops._leaves import TILE
from jax_privacy_kernels.ops.correlated_noise import IMPLEMENTATIONS
from jax_privacy_kernels.ops.correlated_noise._contract import Inputs
from jax_privacy_kernels.ops.correlated_noise._filters import MovingAverageFilter, RecurrenceFilter

KEY = jax.random.key(5)
MATRICES = {
    "no history": lambda: BandedRecurrence(jnp.array([2.0])),
    "recurrence": lambda: BandedRecurrence(jnp.array([1.0, 0.5, 0.25])),
    "moving average": lambda: MovingAverage(jnp.array([1.0, -0.5]), 2, None),
    "moving average without state": lambda: MovingAverage(jnp.array([1.0, -0.5]), 0, None),
    "buffers": lambda: BufferedToeplitz(jnp.array([0.9]), jnp.array([0.3]), True, 2, None),
}


def structs(count, shapes):
    return [jax.ShapeDtypeStruct(shapes[i % len(shapes)], jnp.float32) for i in range(count)]


def correlated(matrix, grads):
    """A step, and what it takes."""
    state = jax.eval_shape(lambda: init_correlated_noise(grads, matrix, key=KEY))

    def update(grads, state):
        options = {"stddev": 1.0, "key_impl": jax.random.key_impl(KEY), "implementation": "jax"}
        return correlated_noise(grads, state, matrix, **options)

    return update, state


def dense(grads):
    matrix = jnp.array([[1.0, 0.5]])
    state = jax.eval_shape(lambda: init_dense_noise(grads, matrix, key=KEY))

    def update(grads, state):
        options = {"stddev": 1.0, "key_impl": jax.random.key_impl(KEY), "implementation": "jax"}
        return dense_noise(grads, state, matrix, **options)

    return update, state


@pytest.mark.parametrize("name", [*MATRICES, "dense"])
def test_samplers_in_a_program_do_not_grow_with_the_number_of_leaves(name):
    counts = []
    for leaves in (4, 12):
        grads = structs(leaves, [(300 * (i + 1),) for i in range(leaves)])
        update, state = dense(grads) if name == "dense" else correlated(MATRICES[name](), grads)
        counts.append(jax.jit(update).lower(grads, state).as_text().count("erf_inv"))
    assert counts[0] == counts[1] > 0


KEYS = {
    "threefry2x32": lambda: jax.random.key(5),
    "chacha20": lambda: random.secure_key(bytes(range(32))),
    "rbg": lambda: jax.random.key(5, impl="rbg"),
    "unsafe_rbg": lambda: jax.random.key(5, impl="unsafe_rbg"),
}


@pytest.mark.parametrize("filter", ["recurrence", "moving average"])
@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_leaves_have_the_noise_that_they_have_alone(key, filter):
    """Samples bit for bit; XLA may contract the sums of several where it does not for another."""
    key, tolerance = key(), 0.0 if filter == "recurrence" else 1e-6
    counted = str(jax.random.key_impl(key)) in ("threefry2x32", "chacha20")
    if filter == "recurrence":
        filter, coef = RecurrenceFilter(counted, 0, counted=counted), jnp.array([[2.0]])
    else:
        filter = MovingAverageFilter(counted, 0, 2, counted=counted)
        coef = jnp.array([[-0.5, 1.0]])
    shapes = [(3, 5), (1500,), (15,), (2, 1500), (1500,)]
    grads = [jnp.full(shape, i, jnp.float32) for i, shape in enumerate(shapes)]
    leaves = _leaves.plan(grads, jnp.float32, None)
    assert max(map(len, bundles(leaves, counted))) == (5 if counted else 2)
    inputs = Inputs(
        leaves,
        jnp.zeros((5, 2), jnp.uint32),
        grads,
        [],
        filter,
        jnp.int32(3),
        jax.random.split(key, filter.behind + filter.steps),
        coef,
        None,
        jnp.float32(1.0),
    )
    run = jax.jit(IMPLEMENTATIONS["jax"].run)
    together = run(inputs).outs
    for i, out in enumerate(together):
        alone = run(inputs.some([i])).outs[0]
        np.testing.assert_allclose(out, alone, rtol=0, atol=tolerance)


def test_large_leaves_stay_alone_and_bundles_are_bounded():
    shapes = [(SMALL + 1,), *((SMALL,) for _ in range(90)), (5,)]
    leaves = _leaves.plan(structs(len(shapes), shapes), jnp.float32, None)
    groups = bundles(leaves, True)
    assert sorted(i for group in groups for i in group) == list(range(len(shapes)))
    assert [0] in groups
    assert all(sum(leaves[i].size for i in group) <= 2**20 for group in groups)
    assert len(groups) == 4


def test_two_hundred_leaves_lower_for_tpus():
    """No array of the size of a leaf's ring is made but in place."""
    shapes = ((257, 127), (30_001,), (64, 512), (5 * TILE,), (77,))
    grads = structs(200, shapes)
    update, state = correlated(MATRICES["recurrence"](), grads)
    text = jax.export.export(jax.jit(update), platforms=["tpu"])(grads, state).mlir_module()
    rings = {f"tensor<2x{np.prod(shape)}xf32>" for shape in shapes}
    assert all(ring in text for ring in rings)
    for line in text.splitlines():
        result = line.rpartition("->")[2] if "->" in line else line.rpartition(":")[2]
        if any(ring in result for ring in rings):
            assert not any(f"stablehlo.{op}" in line for op in ("transpose", "concatenate", "pad"))
    assert text.count("erf_inv") < 10


@pytest.mark.parametrize("name", ["recurrence", "buffers"])
def test_noise_is_the_same_inside_and_outside_of_jit(name):
    """Bit for bit, for leaves that are sampled together."""
    grads = [jnp.ones(shape) for shape in ((3, 5), (1500,), (4 * TILE + 7,), (1500,))]
    matrix = MATRICES[name]()
    update, _ = correlated(matrix, grads)
    eager = jitted = init_correlated_noise(grads, matrix, key=KEY)
    jit = jax.jit(update)
    for _ in range(4):
        outs, eager = update(grads, eager)
        expected, jitted = jit(grads, jitted)
        jax.tree.map(np.testing.assert_array_equal, (outs, eager), (expected, jitted))
