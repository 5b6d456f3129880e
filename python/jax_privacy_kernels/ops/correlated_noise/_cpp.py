"""Correlated noise as one XLA custom call for the whole tree, in C++ (csrc/correlated_noise.h)."""

from __future__ import annotations

import jax
import numpy as np

from jax_privacy_kernels.ops import _cpp_noise
from jax_privacy_kernels.ops._leaves import Leaf
from jax_privacy_kernels.ops._noise import NoiseOutputs
from jax_privacy_kernels.ops.correlated_noise._contract import Inputs
from jax_privacy_kernels.ops.correlated_noise._filters import Filter

__all__ = ["refuse", "run"]


def refuse(leaf: Leaf, filter: Filter, stream: str) -> str | None:
    """Why this implementation cannot take the leaf, or None."""
    return _cpp_noise.refuse(leaf, filter.ahead, stream)


def run(inputs: Inputs) -> NoiseOutputs:
    """One step."""
    filter = inputs.filter
    assert filter.ahead
    shared = [inputs.step, jax.random.key_data(inputs.keys), inputs.coef, inputs.scale]
    return _cpp_noise.call(
        "jpk_correlated_noise", shared, inputs, filter=filter.name, slots=np.int64(filter.slots)
    )
