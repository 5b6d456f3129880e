"""Whether kernels in Pallas can be used, what is said when not, and what they export for."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import pkgutil
import sys
import types

import jax
import jax.export
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support.implementations import CUDA_CALLS, first_on_cuda

from jax_privacy_kernels import ops
from jax_privacy_kernels._report import report
from jax_privacy_kernels.ops import (
    BandedRecurrence,
    _dispatch,
    _gpu,
    _jax_pallas,
    correlated_noise,
    init_correlated_noise,
    toeplitz_multiply,
)
from jax_privacy_kernels.ops.toeplitz_multiply import IMPLEMENTATIONS


@pytest.fixture(autouse=True)
def _asked_anew(monkeypatch):
    monkeypatch.delenv(_dispatch.ENVIRONMENT, raising=False)
    monkeypatch.delitem(IMPLEMENTATIONS, "triton")  # which would come first
    remembered = _jax_pallas._missing, _gpu.here
    for function in remembered:
        function.cache_clear()
    yield
    for function in remembered:
        function.cache_clear()


def gpu(monkeypatch, capability):
    """A process with such a GPU."""
    device = types.SimpleNamespace(device_kind="NVIDIA Thing", compute_capability=capability)
    monkeypatch.setattr(jax, "local_devices", lambda **_: [device])


def on_cuda():
    """The name of the implementation that CUDA takes."""
    return _dispatch.candidates(IMPLEMENTATIONS, None, jnp.ones(2), jnp.ones(2))[0]["cuda"]


def check_refusal(reason):
    assert reason in _jax_pallas.unavailable()
    assert on_cuda() == "jax"
    with pytest.raises(ValueError, match=rf"'pallas' of toeplitz_multiply .*{reason}"):
        toeplitz_multiply(jnp.ones(2), jnp.ones(2), implementation="pallas")
    assert f"not pallas: {_jax_pallas.unavailable()}" in " ".join(report().split())


def test_old_gpu(monkeypatch):
    gpu(monkeypatch, "7.5")
    check_refusal("compute capability 8.0, but NVIDIA Thing has 7.5")


@pytest.mark.parametrize("capability", ["8.0", "9.0", "10.3"])
def test_new_gpu(monkeypatch, capability):
    gpu(monkeypatch, capability)
    assert _jax_pallas.unavailable() is None
    assert on_cuda() == "pallas"


@pytest.mark.parametrize("module", ["jax.experimental.pallas", "jax.experimental.pallas.triton"])
def test_jax_without_it(monkeypatch, module):
    """As it may be one day: the backend is deprecated."""
    monkeypatch.setitem(sys.modules, module, None)
    check_refusal("no Pallas for GPUs")


def tables():
    """The tables of the ops that have kernels in Pallas."""
    names = [f"{ops.__name__}.{module.name}" for module in pkgutil.iter_modules(ops.__path__)]
    found = [getattr(importlib.import_module(name), "IMPLEMENTATIONS", {}) for name in names]
    return [table for table in found if "pallas" in table]


def test_without_it_dispatch_moves_on(monkeypatch):
    """Of every op, to what follows it in the table."""
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    assert len(tables()) >= 4
    for table in tables():
        assert "no Pallas for GPUs" in table["pallas"].unavailable()
        monkeypatch.delitem(table, "triton", raising=False)
        assert first_on_cuda(table) == "jax"


def test_a_step_exports_without_it(monkeypatch):
    """A program for CUDA is plain JAX then, and has no kernel of ours."""
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    step = jax.jit(lambda coef, x: toeplitz_multiply(coef, x))
    text = step.trace(jnp.ones(3), jnp.ones(9)).lower(lowering_platforms=("cuda",)).as_text()
    assert "custom_call" not in text


def test_without_a_gpu_it_is_there_to_be_exported():
    reason = _jax_pallas.unavailable()
    assert reason is None or "compute capability" in reason


def test_it_does_not_run_on_cpus():
    """It is interpreted in tests, and nowhere else."""
    with (
        jax.default_device(jax.devices("cpu")[0]),
        pytest.raises(NotImplementedError, match="cuda"),
    ):
        toeplitz_multiply(jnp.ones(2), jnp.ones(2), implementation="pallas")


# -- Meshes of GPUs that are not here ------------------------------------------------------------

AXES = {
    "automatic": (AxisType.Auto, AxisType.Auto),
    "explicit": (AxisType.Explicit, AxisType.Explicit),
    "explicit and automatic": (AxisType.Explicit, AxisType.Auto),
}


def mesh_of_gpus(kinds):
    fields = [field.name for field in dataclasses.fields(jax.sharding.AbstractDevice)]
    platform = {"platform": "gpu"} if "platform" in fields else {}  # not in jax 0.8 and 0.9
    device = jax.sharding.AbstractDevice("NVIDIA H100", 132, **platform)
    return jax.sharding.AbstractMesh((2, 2), ("x", "y"), kinds, abstract_device=device)


def exported(mesh, grads):
    """The StableHLO of a step whose gradients are such."""
    key, matrix = jax.random.key(0), BandedRecurrence(jnp.array([1.0, 0.5, 0.2]))
    impl = jax.random.key_impl(key)

    def step(grads):
        state = init_correlated_noise(grads, matrix, key=key)
        options = {"stddev": 1.0, "key_impl": impl, "implementation": "pallas"}
        return correlated_noise(grads, state, matrix, **options)

    within = contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh)
    checks = [jax.export.DisabledSafetyCheck.custom_call(CUDA_CALLS["pallas"])]
    with within:
        export = jax.export.export(jax.jit(step), platforms=("cuda",), disabled_checks=checks)
        return export(grads).mlir_module()


@pytest.mark.each_value
@pytest.mark.parametrize("known_by", ["the arrays", "the context", "both"])
@pytest.mark.parametrize("kinds", AXES.values(), ids=AXES)
def test_export_for_a_mesh_that_is_not_here(kinds, known_by):
    """JAX does not lower for such a mesh what has to know its devices."""
    if reason := _jax_pallas.unavailable():
        pytest.skip(reason)
    mesh = mesh_of_gpus(kinds)
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    grads = jax.ShapeDtypeStruct(
        (5000,), jnp.float32, sharding=None if known_by == "the context" else sharding
    )
    text = exported(None if known_by == "the arrays" else mesh, grads)
    assert text.count("@" + CUDA_CALLS["pallas"]) == 1
    split = kinds[0] == AxisType.Explicit and known_by != "the context"
    # Automatic axes are not known, and noise is whole.
    assert ("tensor<2500xf32>" in text) == split


@pytest.mark.parametrize("devices", ["undescribed", "CPUs"])
def test_export_under_automatic_axes_of_what_is_no_gpu(devices):
    if reason := _jax_pallas.unavailable():
        pytest.skip(reason)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), (AxisType.Auto,))
    if devices == "CPUs":
        mesh = jax.make_mesh(
            (1,), ("x",), (AxisType.Auto,), devices=jax.devices("cpu")[:1]
        ).abstract_mesh
    text = exported(mesh, jax.ShapeDtypeStruct((5000,), jnp.float32))
    assert text.count("@" + CUDA_CALLS["pallas"]) == 1
