"""The export of docs/gpu.md, on a machine that need not have a GPU."""

from __future__ import annotations

import importlib.util
import pathlib
import re
import subprocess
import sys

import jax

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "gpu.md"
CHECK = """
text = exported.mlir_module()
print(text.count("@triton_kernel_call"), text.count("@__gpu$xla.gpu.triton"))
"""


def test_the_documented_export():
    """By Triton where jax-triton can compile, else by Pallas; in a process that has no GPU."""
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    if "platform" not in jax.sharding.AbstractDevice.__dataclass_fields__:  # jax 0.8 and 0.9
        code = code.replace('132, "gpu")', "132)")
    command = [sys.executable, "-c", code + CHECK]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    triton, pallas = map(int, result.stdout.split())
    assert triton + pallas == 1
    plugin = any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))
    if importlib.util.find_spec("jax_triton") and plugin:
        assert triton == 1
