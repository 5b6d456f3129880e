"""Exact noise as one XLA custom call for the whole tree (csrc/grid_noise.h, csrc/grid_sums.h)."""

from __future__ import annotations

import jax
import numpy as np

from jax_privacy_kernels.ops import _cpp_noise
from jax_privacy_kernels.ops._noise import NoiseOutputs
from jax_privacy_kernels.ops.correlated_noise._filters import MovingAverageFilter
from jax_privacy_kernels.ops.grid_noise._contract import Inputs

__all__ = ["run"]


def run(inputs: Inputs) -> NoiseOutputs:
    """One step."""
    rounding = inputs.rounding
    if isinstance(inputs.filter, MovingAverageFilter):
        return _cpp_noise.call(
            "jpk_grid_sums",
            [inputs.step, jax.random.key_data(inputs.keys), inputs.coef],
            inputs,
            slots=np.int64(inputs.filter.slots),
            stddev=np.float64(rounding.scale),
        )
    return _cpp_noise.call(
        "jpk_grid_noise",
        [inputs.step, jax.random.key_data(inputs.keys), inputs.coef],
        inputs,
        slots=np.int64(inputs.filter.slots),
        scale=np.float64(rounding.scale),
        spacing=rounding.words(64, 5).view(np.int64),
        in_doubles=inputs.in_doubles,
    )
