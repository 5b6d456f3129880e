"""Whether kernels in Pallas can be used, and what is said when they cannot."""

from __future__ import annotations

import sys
import types

import jax
import jax.numpy as jnp
import pytest

from jax_privacy_kernels._report import report
from jax_privacy_kernels.ops import _dispatch, _jax_pallas, _jax_triton, toeplitz_multiply
from jax_privacy_kernels.ops.toeplitz_multiply import IMPLEMENTATIONS


@pytest.fixture(autouse=True)
def _asked_anew(monkeypatch):
    monkeypatch.delenv(_dispatch.ENVIRONMENT, raising=False)
    _jax_triton.unavailable()  # remembered from now on: not of the GPU that a test makes up
    monkeypatch.delitem(IMPLEMENTATIONS, "triton")  # which would come first
    _jax_pallas.unavailable.cache_clear()
    yield
    _jax_pallas.unavailable.cache_clear()


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
    assert f"not pallas:          {_jax_pallas.unavailable()}" in report()


def test_old_gpu(monkeypatch):
    gpu(monkeypatch, "7.5")
    check_refusal("compute capability 8.0, but NVIDIA Thing has 7.5")


@pytest.mark.parametrize("capability", ["8.0", "9.0", "10.3"])
def test_new_gpu(monkeypatch, capability):
    gpu(monkeypatch, capability)
    assert _jax_pallas.unavailable() is None
    assert on_cuda() == "pallas"


def test_jax_without_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    check_refusal("no Pallas for GPUs")


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
