"""Programs out of JAX's cache on disk make the noise of those that were compiled, bit for bit.

This file is also the program that two processes run: the first compiles and fills the cache, the
second compiles nothing.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.compilation_cache import decompress_executable
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import sweeps

from jax_privacy_kernels import grid, ops, random
from jax_privacy_kernels.matrix_factorization import (
    banded,
    buffered_toeplitz,
    streaming_matrix,
    toeplitz,
)
from jax_privacy_kernels.noise_addition import (
    SupportedStrategies,
    matrix_factorization_privatizer,
)
from jax_privacy_kernels.ops import _ffi

STEPS = 6
COEF = jnp.array([1.0, 0.5, 0.375, 0.25], jnp.float32)
SHAPES = {"w": (8, 400), "v": (16,), "scalar": ()}
EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"
EVENTS = "/jax/compilation_cache/"
CACHE = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    # Else every process compiles anew what XLA's partitioner spreads over devices.
    "JAX_REMOVE_CUSTOM_PARTITIONING_PTR_FROM_CACHE_KEY": "1",
}


# -- The program ------------------------------------------------------------------------------


def zeros(dtype=jnp.float32):
    return {name: jnp.zeros(shape, dtype) for name, shape in SHAPES.items()}


def last(privatizer, grads, donate=False):
    """What the last of the steps gives, and the state that it leaves."""
    update = jax.jit(privatizer.update, donate_argnums=1 if donate else ())
    state = privatizer.init(grads)
    for _ in range(STEPS):
        out, state = update(grads, state)
    return out, jax.tree.leaves(state)


def built(matrix=None, key=3, **options):
    matrix = toeplitz.inverse_as_streaming_matrix(COEF) if matrix is None else matrix
    return matrix_factorization_privatizer(matrix, **{"stddev": 1.5, "prng_key": key, **options})


SECRET = hashlib.sha256(b"a key").digest()


def secret():
    return random.secure_key(SECRET)


def by_row():
    strategy = banded.ColumnNormalizedBanded.from_banded_toeplitz(STEPS, COEF)
    return strategy.inverse_as_streaming_matrix()


def buffers():
    strategy = buffered_toeplitz.BufferedToeplitz.build([0.9, 0.5], [0.3, 0.2], dtype=jnp.float32)
    return strategy.inverse_as_streaming_matrix()


MATRICES = {
    "banded": lambda: None,
    "identity": streaming_matrix.identity,
    "by row": by_row,
    "buffers": buffers,
    "banded inverse": lambda: toeplitz.noising_coef_as_streaming_matrix(COEF),
    "dense": lambda: jnp.tril(jnp.ones((STEPS, STEPS))),
}


def of_matrix(name):
    return last(built(MATRICES[name]()), zeros(), donate=True)


def not_donated():
    return last(built(), zeros())


def in_a_loop():
    privatizer = built()

    def step(state, _):
        return privatizer.update(zeros(), state)[::-1]

    return jax.jit(lambda state: jax.lax.scan(step, state, length=STEPS))(privatizer.init(zeros()))


def of_sixteen_bits():
    return last(built(dtype=jnp.float32), zeros(jnp.bfloat16), donate=True)


def of_a_secret_key():
    return last(built(key=secret()), zeros(), donate=True)


def on_a_grid():
    strategy = toeplitz.inverse_as_streaming_matrix(grid.round_coefs(COEF, 8))
    privatizer = grid.privatizer(strategy, stddev=1000.0, prng_key=secret())
    return last(privatizer, jax.tree.map(lambda x: x.astype(jnp.int32), zeros()), donate=True)


def mapped():
    keys = jax.random.split(jax.random.key(0), 3)
    grads = jax.tree.map(lambda x: jnp.zeros((3, *x.shape)), zeros())
    state = jax.vmap(lambda key: built(key=key).init(zeros()))(keys)
    update = jax.jit(jax.vmap(built().update), donate_argnums=1)
    for _ in range(STEPS):
        out, state = update(grads, state)
    return out


def derivatives():
    privatizer, grads = built(), zeros()
    state = privatizer.init(grads)

    def noisy(scale):
        return privatizer.update(jax.tree.map(lambda x: scale * (x + 1), grads), state)[0]

    def loss(scale):
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(noisy(scale)))

    return jax.jit(jax.value_and_grad(loss))(2.0), jax.jit(jax.jacfwd(noisy))(2.0)


def of_algebra():
    rhs = jnp.cos(jnp.arange(600.0)).reshape(300, 2)
    results = [
        ops.toeplitz_solve(COEF, rhs),
        ops.toeplitz_multiply(COEF, rhs, rows=300),
        ops.min_sep_norm(COEF, n=40, min_sep=4, max_participations=5),
        ops.participation_max(rhs[:, 0], min_sep=7, max_participations=9),
    ]
    return results, jax.jit(jax.grad(lambda c: toeplitz.loss(c, 40)))(COEF)


def on_eight_devices(kind, strategy):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    specs = {"w": P("x", "y"), "v": P("y"), "scalar": P()}
    grads = zeros()
    with jax.set_mesh(mesh):
        grads = {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in grads.items()}
        return last(built(intermediate_strategy=strategy), grads, donate=True)


CASES = {
    **{name: functools.partial(of_matrix, name) for name in MATRICES},
    "not donated": not_donated,
    "in a loop": in_a_loop,
    "16 bits": of_sixteen_bits,
    "a secret key": of_a_secret_key,
    "on a grid": on_a_grid,
    "mapped": mapped,
    "derivatives": derivatives,
    "algebra": of_algebra,
    "explicit axes": functools.partial(
        on_eight_devices, AxisType.Explicit, SupportedStrategies.DEFAULT
    ),
    "ZERO": functools.partial(on_eight_devices, AxisType.Explicit, SupportedStrategies.ZERO),
    "automatic axes": functools.partial(
        on_eight_devices, AxisType.Auto, SupportedStrategies.DEFAULT
    ),
}


def digest(tree):
    leaves = [x for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in leaves)).hexdigest()[:16]


def noise(implementation):
    events = collections.Counter()
    jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))
    with ops.implementation(implementation):
        digests = {name: digest(case()) for name, case in CASES.items()}
    found = {name: events[EVENTS + name] for name in ("cache_hits", "cache_misses")}
    print(json.dumps({"digests": digests, **found}))


def programs_that_hold(words, directory):
    """Names of programs in the cache in which at least half of these words of 32 bits occur."""
    found = []
    for path in directory.glob("*-cache"):
        program = decompress_executable(path.read_bytes())
        held = [word.tobytes() in program or varint(int(word)) in program for word in words]
        if sum(held) >= len(words) / 2:
            found.append(path.name)
    return found


def varint(n):
    """As XLA writes literals."""
    low = [n >> shift & 127 for shift in range(0, max(n.bit_length(), 1), 7)]
    return bytes([*(part | 128 for part in low[:-1]), low[-1]])


def keys(directory):
    directory, words = pathlib.Path(directory), np.frombuffer(SECRET, np.uint32)
    last(built(key=secret()), zeros())
    held = programs_that_hold(words, directory)
    jax.jit(lambda x: jnp.stack([x ^ word for word in words]))(jnp.uint32(0))
    print(json.dumps([held, programs_that_hold(words, directory)]))


# -- Its tests --------------------------------------------------------------------------------


def run(directory, *arguments):
    result = subprocess.run(
        [sys.executable, __file__, *arguments],
        env={
            **os.environ,
            **CACHE,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(directory),
            "XLA_FLAGS": EIGHT_DEVICES,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.subprocess
@pytest.mark.parametrize("implementation", sweeps.cases(["cpp", "jax"], ["cpp"]))
def test_programs_out_of_the_cache_make_the_same_noise(implementation, tmp_path):
    if implementation == "cpp" and _ffi.unavailable():
        pytest.skip(_ffi.unavailable())
    compiled, loaded = (run(tmp_path, "noise", implementation) for _ in range(2))
    assert loaded["digests"] == compiled["digests"]
    assert loaded["cache_misses"] == 0
    assert loaded["cache_hits"] > len(CASES)


@pytest.mark.subprocess
def test_the_cache_holds_no_key(tmp_path):
    """Unless a program of the user's does, as the one that shows what would be found."""
    of_steps, with_constants = run(tmp_path, "keys", str(tmp_path))
    assert not of_steps
    assert len(with_constants) == 1


if __name__ == "__main__":
    {"noise": noise, "keys": keys}[sys.argv[1]](sys.argv[2])
