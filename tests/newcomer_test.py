"""What is seen at a prompt: completion, representations without keys, and what errors propose."""

from __future__ import annotations

import copy
import importlib
import pickle
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from public_api_test import public_modules

import jax_privacy_kernels
from jax_privacy_kernels import grid, noise_addition, ops, random
from jax_privacy_kernels.matrix_factorization import (
    banded,
    buffered_toeplitz,
    streaming_matrix,
    toeplitz,
)

COEF = jnp.asarray([1.0, 0.5, 0.25, 0.125])
BLT = buffered_toeplitz.BufferedToeplitz.build([0.9, 0.5], [0.1, 0.2], dtype=jnp.float32)
BLT_OF_ONE = (
    buffered_toeplitz.BufferedToeplitz.build([0.9], [0.1], dtype=jnp.float32)
).inverse_as_streaming_matrix()
BANDED = banded.ColumnNormalizedBanded.default(9, 3)
# By what a representation has to say.
MATRICES = {
    "banded Toeplitz strategy, b = 4": toeplitz.inverse_as_streaming_matrix(COEF),
    "banded strategy, n = 9, b = 3": BANDED.inverse_as_streaming_matrix(),
    "BLT of 2 buffers": BLT.inverse_as_streaming_matrix(),
    "of 4 coefficients, look_ahead = 3": toeplitz.noising_coef_as_streaming_matrix(COEF),
    "without a fused kernel": streaming_matrix.prefix_sum() @ streaming_matrix.prefix_sum(),
    "dense 5 x 5 matrix": jnp.eye(5),
}
GRADS = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}
SEED = 987_654_321


def words_of_keys(state):
    """The numbers by which one would know a state's noise."""
    return [str(word) for word in np.asarray(state.clock.keys).ravel() if word]


def privatizer(matrix, **options):
    return noise_addition.matrix_factorization_privatizer(
        matrix, stddev=1.5, prng_key=SEED, **options
    )


@pytest.mark.subprocess
def test_imports_are_light_and_start_no_backend():
    """What takes as long to import as JAX is imported where it is used."""
    heavy = ["dp_accounting", "jax_privacy", "matplotlib", "scipy.optimize", "scipy.signal"]
    heavy += ["scipy.special", "scipy.stats"]
    code = (
        "import sys, jax_privacy_kernels; from jax._src import xla_bridge;"
        f"print([m for m in {heavy} if m in sys.modules],"
        "xla_bridge.backends_are_initialized())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "[] False\n", run.stderr


def test_completion_shows_what_is_public():
    for module in public_modules():
        assert dir(module) == sorted(module.__all__), module.__name__


@pytest.mark.parametrize("said", MATRICES)
def test_privatizers_say_what_they_are(said):
    made = privatizer(MATRICES[said], dtype=jnp.bfloat16, implementation="jax")
    for copied in (made, copy.copy(made), optax.GradientTransformation(*made)):
        assert str(SEED) not in repr(copied)
    for text in (said, "stddev=1.5", "dtype=bfloat16", "DEFAULT", "implementation='jax'"):
        assert text in repr(made)
    assert repr(copy.copy(made)) == repr(made)
    assert isinstance(made, optax.GradientTransformation)
    init, update = made
    assert (init, update) == (made.init, made.update)
    # JAX and optax take it apart and put it together.
    assert optax.chain(made, optax.sgd(0.1)).init(GRADS)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (streaming_matrix.prefix_sum(), "StreamingMatrix(prefix sums)"),
        (
            streaming_matrix.momentum_sgd_matrix(0.5, jnp.arange(1.0, 4.0), decay=0.25),
            "StreamingMatrix(prefix sums, momentum 0.5, 3 learning rates, decay 0.25)",
        ),
        (
            streaming_matrix.prefix_sum() @ streaming_matrix.prefix_sum() * 2,
            "StreamingMatrix(((prefix sums) @ (prefix sums)) @ (diagonal, 1 given))",
        ),
        (
            streaming_matrix.StreamingMatrix(lambda x: (), lambda x, state: (x, state)),
            "newcomer_test.<lambda>)",
        ),
        (streaming_matrix.identity(), "StreamingMatrix(multiple of the identity, b = 1)"),
        (MATRICES["BLT of 2 buffers"], "StreamingMatrix(inverse of a BLT of 2 buffers"),
    ],
)
def test_matrices_say_what_they_are(made, said):
    assert said in repr(made)
    assert " at 0x" not in repr(made)


def test_exact_privatizers_say_what_they_are_and_check_names():
    coef = grid.round_coefs(COEF, fraction_bits=8)
    matrix = toeplitz.inverse_as_streaming_matrix(coef)
    key = random.secure_key(bytes(range(32)))
    made = grid.privatizer(matrix, stddev=64.0, prng_key=key, implementation="jax")
    assert repr(made) == (
        "grid.privatizer(<inverse of a banded Toeplitz strategy, b = 4>, stddev=64.0, "
        "implementation='jax', noise stream chacha20)"
    )
    with pytest.raises(ValueError, match=r"implementation to be None or one of .*found 'CPP'"):
        grid.privatizer(matrix, stddev=64.0, implementation="CPP")


def test_long_products_are_not_spelled_out():
    matrix = streaming_matrix.prefix_sum()
    for _ in range(40):
        matrix = matrix @ streaming_matrix.prefix_sum()
    assert "a long product" in repr(matrix)
    assert len(repr(matrix)) < 500


@pytest.mark.parametrize(
    ("size", "said"),
    [(1, "4 B"), (5_000, "20 kB"), (5_250_000, "21 MB"), (600_000_000, "2.4 GB")],
)
def test_states_say_how_large_they_are_in_a_trace_too(size, said):
    state = jax.eval_shape(privatizer(BLT_OF_ONE).init, jax.ShapeDtypeStruct((size,), jnp.float32))
    assert f"1 array of noise, {said})" in repr(state)


def test_a_traced_stddev_is_not_printed_as_a_tracer():
    texts = []

    def make(stddev):
        made = noise_addition.gaussian_privatizer(stddev=stddev, prng_key=0)
        texts.append(repr(made))
        return stddev

    jax.jit(make)(1.0)
    assert "stddev=traced" in texts[0]


@pytest.mark.parametrize("said", MATRICES)
def test_states_never_print_keys_and_noise(said):
    made = privatizer(MATRICES[said])
    state = made.init(GRADS)
    _, state = made.update(GRADS, state)
    text = repr(state) + repr(state.clock) + str(state)
    assert "step=1" in text
    assert not [word for word in words_of_keys(state) if word in text]
    for leaf in jax.tree.leaves(state.inner):
        assert str(np.asarray(leaf).ravel()[0]) not in text or np.asarray(leaf).ravel()[0] == 0
    with pytest.raises(ValueError, match="static") as error:
        jax.jit(made.update, static_argnums=1)(GRADS, state)
    assert not [word for word in words_of_keys(state) if word in str(error.value)]
    assert pickle.loads(pickle.dumps(state)).clock.kind.keys() == state.clock.kind.keys()


def test_representations_survive_anything():
    """JAX builds trees of whatever it likes, also of tracers and of nothing."""
    state = privatizer(MATRICES["BLT of 2 buffers"]).init(GRADS)
    assert "of 2 buffers" in repr(state)
    of_own_functions = privatizer(MATRICES["without a fused kernel"]).init(GRADS)
    assert "of a StreamingMatrix without a fused kernel; 4 arrays" in repr(of_own_functions)
    independent = noise_addition.gaussian_privatizer(stddev=1.0).init(GRADS)
    assert "of 1 band; 0 arrays" in repr(independent)
    for fill in (None, object(), jnp.zeros(2), "x"):
        assert "NoiseState(" in repr(jax.tree.map(lambda _, fill=fill: fill, state))
    assert "NoiseState(" in repr(ops.NoiseState((), None))
    shown = []
    jax.jit(lambda s: shown.append(repr(s)) or s)(state)
    assert "Tracer" in shown[0]
    assert "ColumnNormalizedBanded(" in repr(banded.ColumnNormalizedBanded(None))


@pytest.mark.parametrize(
    ("matrix", "proposed"),
    [
        (COEF, "toeplitz.inverse_as_streaming_matrix(coef)"),
        (np.asarray(COEF), "toeplitz.noising_coef_as_streaming_matrix(coef)"),
        ([1.0, 0.5], "toeplitz.inverse_as_streaming_matrix(coef)"),
        (BLT, "pass its inverse_as_streaming_matrix()"),
        (BANDED, "pass its inverse_as_streaming_matrix()"),
    ],
)
def test_strategies_in_place_of_noising_matrices(matrix, proposed):
    with pytest.raises((TypeError, ValueError), match=re.escape(proposed)):
        privatizer(matrix)


@pytest.mark.parametrize(
    ("owner", "of_state", "message"),
    [
        (MATRICES["banded Toeplitz strategy, b = 4"], COEF[:2], "2 bands, expected 4 bands"),
        (BANDED.inverse_as_streaming_matrix(), COEF, "4 bands, expected 3 bands"),
        (MATRICES["BLT of 2 buffers"], COEF, "4 bands, expected 2 buffers"),
        (jnp.eye(5), COEF, "4 bands, expected a dense matrix"),
        (
            MATRICES["of 4 coefficients, look_ahead = 3"],
            COEF,
            "4 bands, expected 4 coefficients of C^-1 with 3 slots",
        ),
    ],
)
def test_states_of_another_mechanism_are_told_in_words(owner, of_state, message):
    state = privatizer(toeplitz.inverse_as_streaming_matrix(of_state)).init(GRADS)
    with pytest.raises(ValueError, match=re.escape(f"a state of {message}: expected noise_state")):
        privatizer(owner).update(GRADS, state)


@pytest.mark.parametrize("name", ["CPP", "foo", ""])
@pytest.mark.parametrize("matrix", [MATRICES["BLT of 2 buffers"], np.eye(3)], ids=["blt", "dense"])
def test_implementations_that_there_are_not(name, matrix):
    message = re.escape(f"one of jax, cpp, pallas, triton, found {name!r}")
    with pytest.raises(ValueError, match=message):
        privatizer(matrix, implementation=name)
    with pytest.raises(ValueError, match=message):
        jax_privacy_kernels.implementation(name)


def test_every_implementation_has_a_name():
    registry = importlib.import_module("jax_privacy_kernels.ops._registry")
    dispatch = importlib.import_module("jax_privacy_kernels.ops._dispatch")
    names = {name for op in registry.OPS for name in registry.table(op)}
    assert names == set(dispatch.NAMES)
