"""Tests that need eight devices run again, in a process that has them."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

_EIGHT = "--xla_force_host_platform_device_count=8"

FLAGS = f"{os.environ.get('XLA_FLAGS', '')} {_EIGHT}"  # of a process that has them
IN_CHILD = _EIGHT in os.environ.get("XLA_FLAGS", "")


def run(file: str) -> None:
    """Runs the class TestEightDevices of a file, and fails with what it says."""
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            f"{file}::TestEightDevices",
        ],
        cwd=pathlib.Path(__file__).parents[2],
        env={**os.environ, "XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
