"""Training on a mesh over two processes is training on the same mesh in one, bit for bit.

This file is also the program that the processes run.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import pathlib
import re
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_privacy_kernels.matrix_factorization import toeplitz
from jax_privacy_kernels.noise_addition import (
    SupportedStrategies,
    matrix_factorization_privatizer,
)

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "checkpointing.md"
DEVICES = 8
STEPS = 20
SAVED = 9  # so many steps have been made
BATCH, FEATURES, HIDDEN, CLASSES = 64, 24, 40, 5
FAILSAFE = 3600  # seconds, for programs that wait for each other

SHAPES = {"w": (FEATURES, HIDDEN), "b": (HIDDEN,), "v": (HIDDEN, CLASSES), "c": (CLASSES,)}
REPLICATED = {name: P(*[None] * len(shape)) for name, shape in SHAPES.items()}
SHARDED = {"w": P(None, "x"), "b": P("x"), "v": P("x", None), "c": P(None)}

# How noise is laid out, the mesh axes, and where parameters, gradients and DEFAULT states are.
CASES = {
    "zero": (SupportedStrategies.ZERO, AxisType.Explicit, REPLICATED),
    "zero, sharded": (SupportedStrategies.ZERO, AxisType.Explicit, SHARDED),
    "default, sharded": (SupportedStrategies.DEFAULT, AxisType.Explicit, SHARDED),
    "default, automatic": (SupportedStrategies.DEFAULT, AxisType.Auto, SHARDED),
}


# -- The program ------------------------------------------------------------------------------


def data_and_params():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((STEPS, BATCH, FEATURES)).astype(np.float32)
    labels = np.argmax(x @ rng.standard_normal((FEATURES, CLASSES)), axis=-1)
    params = {
        name: (0.2 * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }
    return x, labels, params


def loss(params, x, label):
    hidden = jnp.tanh(x @ params["w"] + params["b"])
    return -jax.nn.log_softmax(hidden @ params["v"] + params["c"])[label]


def clipped_grad(params, x, label):
    """The gradient of one example, clipped to norm 1, in multiples of 2^-16.

    Sums over the batch, of 6 + 16 bits, are then exact. Processes add up in another order than the
    devices of one process do, and anything but an exact sum would depend on it.
    """
    grad = jax.grad(loss)(params, x, label)
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grad)))
    return jax.tree.map(lambda g: jnp.round(g / jnp.maximum(norm, 1.0) * 2**16) / 2**16, grad)


def through_orbax(state, folder):
    """The state, saved and restored by all processes, as the page on checkpoints does it."""
    (code,) = re.findall(r"^```python\n(import orbax.*?)^```$", PAGE.read_text(), re.M | re.S)
    names = {"jax": jax, "jnp": jnp, "np": np}
    exec(compile(code, PAGE, "exec"), names)
    with names["ocp"].CheckpointManager(folder) as manager:
        names["save"](manager, SAVED, {"noise": state})
        return names["restore"](manager, SAVED, {"noise": state})["noise"]


def train(strategy, axis_type, specs, folder):
    """The noisy gradients of all steps and the parameters after the last, as NumPy arrays.

    Unless ``folder`` is None, the noise state is saved and restored on the way.
    """
    mesh = jax.make_mesh((DEVICES,), ("x",), axis_types=(axis_type,))
    x, labels, params = data_and_params()
    privatizer = matrix_factorization_privatizer(
        toeplitz.inverse_as_streaming_matrix(toeplitz.optimal_max_error_strategy_coefs(6)),
        stddev=0.5,
        prng_key=1,
        intermediate_strategy=strategy,
    )

    def put(array, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    def move(tree, specs):
        if axis_type == AxisType.Explicit:
            return jax.tree.map(jax.sharding.reshard, tree, specs)
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        return jax.lax.with_sharding_constraint(tree, shardings)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, x, labels):
        whole = move(params, REPLICATED)
        grads = jax.vmap(clipped_grad, in_axes=(None, 0, 0))(whole, x, labels)
        grads = move(jax.tree.map(lambda g: jnp.sum(g, axis=0), grads), REPLICATED)
        noisy, state = privatizer.update(move(grads, specs), state)
        params = jax.tree.map(lambda p, g: p - (4 / BATCH) * g, params, noisy)
        return params, state, move(noisy, REPLICATED)

    with jax.set_mesh(mesh):
        params = {name: put(array, specs[name]) for name, array in params.items()}
        state = privatizer.init(params)
        noisy = []
        for t in range(STEPS):
            if t == SAVED and folder:
                state = through_orbax(state, folder)
            params, state, grads = step(
                params, state, put(x[t], P("x", None)), put(labels[t], P("x"))
            )
            noisy.append(grads)
        params = jax.jit(lambda tree: move(tree, REPLICATED))(params)
    results = {f"params/{name}": np.asarray(p) for name, p in params.items()}
    for name in SHAPES:
        results[f"noisy/{name}"] = np.stack([grads[name] for grads in noisy])
    return results


def main(port, processes, process, out):
    jax.config.update("jax_platforms", "cpu")
    if int(processes) > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            f"127.0.0.1:{port}", int(processes), int(process), initialization_timeout=FAILSAFE
        )
    assert jax.process_count() == int(processes)
    assert jax.device_count() == DEVICES
    results = {}
    for case, arguments in CASES.items():
        save = int(processes) > 1 and importlib.util.find_spec("orbax")
        folder = pathlib.Path(out).with_name(case) if save else None
        for name, array in train(*arguments, folder).items():
            results[f"{case}/{name}"] = array
    np.savez(out, **results)
    if int(processes) > 1:
        jax.distributed.shutdown()


# -- The test ---------------------------------------------------------------------------------

pytestmark = pytest.mark.subprocess


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(folder, processes):
    """What each of that many processes found, each with its part of the devices."""
    folder.mkdir()
    port = free_port()
    count = f"--xla_force_host_platform_device_count={DEVICES // processes}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    env["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}"
    deadline = time.monotonic() + FAILSAFE
    outs = [folder / f"{process}.npz" for process in range(processes)]
    logs = [folder / f"{process}.log" for process in range(processes)]
    children = []
    try:
        for process, (out, log) in enumerate(zip(outs, logs, strict=True)):
            arguments = [str(a) for a in (port, processes, process, out)]
            with log.open("w") as f:
                children.append(
                    subprocess.Popen(
                        [sys.executable, __file__, *arguments], env=env, stdout=f, stderr=f
                    )
                )
        # One that fails leaves the other waiting for it.
        while any(child.poll() is None for child in children):
            if any(child.poll() for child in children) or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        codes = [child.poll() for child in children]
    finally:
        for child in children:
            child.kill()  # does nothing to one that has ended
            child.wait()
    said = "\n".join(f"-- {log.name}\n{log.read_text()}" for log in logs)
    assert codes == [0] * processes, f"exit codes {codes} (None: killed)\n{said}"
    return [dict(np.load(out)) for out in outs]


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    (one,) = run(folder / "one", 1)
    return one, run(folder / "two", 2)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one_does(one_and_two, case):
    one, two = one_and_two
    for name, expected in one.items():
        if name.startswith(f"{case}/"):
            assert np.isfinite(expected).all()
            for results in two:
                np.testing.assert_array_equal(results[name], expected, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_something_is_trained_and_noisy(one_and_two, case):
    results, _ = one_and_two
    _, _, params = data_and_params()
    for name, shape in SHAPES.items():
        noisy = results[f"{case}/noisy/{name}"]
        assert noisy.shape == (STEPS, *shape)
        assert np.unique(noisy).size > 0.99 * noisy.size
        # Gradients are multiples of 2^-16, noise is not.
        assert np.mean(noisy * 2**16 == np.round(noisy * 2**16)) < 0.1
        assert np.abs(results[f"{case}/params/{name}"] - params[name]).min() > 0


if __name__ == "__main__":
    main(*sys.argv[1:])
