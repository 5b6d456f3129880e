"""Dense noise as one XLA custom call for the whole tree, in C++ (csrc/dense_noise.h)."""

from __future__ import annotations

import jax

from jax_privacy_kernels.ops import _cpp_noise
from jax_privacy_kernels.ops._cpp_noise import refuse
from jax_privacy_kernels.ops._noise import NoiseOutputs
from jax_privacy_kernels.ops.dense_noise._contract import Inputs

__all__ = ["refuse", "run"]


def run(inputs: Inputs) -> NoiseOutputs:
    """One row."""
    assert inputs.ahead
    shared = [jax.random.key_data(inputs.key), inputs.row]
    return _cpp_noise.call("jpk_dense_noise", shared, inputs)
