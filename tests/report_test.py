"""The capability report."""

from __future__ import annotations

import subprocess
import sys

import jax
import pytest

from jax_privacy_kernels._report import report
from jax_privacy_kernels.ops import _dispatch, _registry
from jax_privacy_kernels.ops.correlated_noise import IMPLEMENTATIONS


def words(text, key):
    """The words of the lines that begin with the key."""
    return [line.split() for line in text.splitlines() if line.strip().startswith(key)]


def test_what_it_says(monkeypatch):
    monkeypatch.delenv(_dispatch.ENVIRONMENT, raising=False)
    text = report()
    assert max(map(len, text.splitlines())) <= 80
    assert ["jax", jax.__version__] in words(text, "jax")
    ops = [line[0] for line in words(text, "") if line[-1] == "takes"]
    assert "correlated_noise" in ops
    assert "toeplitz_solve" in ops
    kernels = [op for op in ops if "pallas" in _registry.table(op)]
    assert {"correlated_noise", "dense_noise", "toeplitz_solve"} <= set(kernels)
    assert list(_registry.OPS) == ops
    usable = [name for name in ("triton", "pallas") if not IMPLEMENTATIONS[name].unavailable()]
    first = [*usable, "jax"][0]
    assert [line[-1] for line in words(text, "on cuda")] == [
        first if op in kernels else "jax" for op in ops
    ]


@pytest.mark.parametrize("name", ["jax", "nonsense"])
def test_it_heeds_the_environment(monkeypatch, name):
    monkeypatch.setenv(_dispatch.ENVIRONMENT, name)
    text = report()
    if name == "jax":
        on_cpu = words(text, "on cpu")
        assert on_cpu == [["on", "cpu", "jax"]] * len(on_cpu)
    else:
        assert "nothing: implementation 'nonsense' of correlated_noise was asked for" in text


@pytest.mark.subprocess
def test_python_m():
    command = [sys.executable, "-m", "jax_privacy_kernels"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "correlated_noise takes" in result.stdout
