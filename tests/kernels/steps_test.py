"""XLA's program for a step adds nothing to the kernel: no copy of the state, no memory for one."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys

import compile_steps
import pytest

NEEDED = {"jax-triton", "jax-cuda13-plugin", "jax-cuda13-pjrt"}
installed = {found.name.replace("_", "-").lower() for found in importlib.metadata.distributions()}
if missing := NEEDED - installed:
    pytest.skip(f"not installed: {', '.join(sorted(missing))}", allow_module_level=True)

pytestmark = [pytest.mark.subprocess, pytest.mark.triton]

# As XLA writes the step of jax_privacy for 3 bands, without what is smaller than the model.
PROGRAM = """
ENTRY %main.1 (g: f32[67108864], ring: f32[2,67108864]) -> (f32[67108864], f32[2,67108864]) {
  %ring = f32[2,67108864]{1,0} parameter(1)
  %dot = f32[1,67108864]{1,0} fusion(%c, %ring), kind=kCustom, calls=%gemm
  %g = f32[67108864]{0} parameter(0)
  %sums = (f32[67108864]{0}, f32[67108864]{0}) fusion(%g, %dot, %key), kind=kLoop, calls=%add
  %shifted = f32[2,67108864]{1,0} fusion(%ring), kind=kInput, calls=%fused_concatenate
  %new = f32[67108864]{0} get-tuple-element(%sums), index=1
  %s = (f32[2,67108864], u32[]) fusion-start(%shifted, %new), calls=%fused_dynamic_update_slice
  %d = f32[2,67108864]{1,0} fusion-done(%s)
  %copy.1 = f32[2,67108864]{1,0} copy(%d)
  %out = f32[67108864]{0} get-tuple-element(%sums), index=0
  ROOT %tuple.1 = (f32[67108864]{0}, f32[2,67108864]{1,0}) tuple(%out, %copy.1)
}
"""


def test_passes_of_a_program():
    """Product 2 + 1, sums 2 + 2, shift 2 + 2, the new row 1 + 1, copy 2 + 2."""
    assert compile_steps.moved(PROGRAM) == {"kernels": 0, "own": 17, "copied": 2}
    assert compile_steps.passes("(bf16[2,67108864]{1,0}, u32[2]{0}, s32[])") == pytest.approx(1)


def test_steps():
    """Whole steps with a donated state, in a process that has not told Triton to interpret."""
    result = subprocess.run(
        [sys.executable, compile_steps.__file__], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    steps = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(steps) == len(compile_steps.IMPLEMENTATIONS) * len(compile_steps.STEPS)
    for step in steps:
        # Leaves that do not fill a GPU share launches in Triton, eight at a time.
        launches = -(-step["leaves"] // (8 if step["implementation"] == "triton" else 1))
        nothing = {"own": 0, "copied": 0, "temporary": 0}
        moved = {**nothing, "kernels": launches, "aliased": step["bands"] - 1}
        assert step == {**step, **moved}
