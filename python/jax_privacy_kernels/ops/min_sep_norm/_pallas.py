"""The min-sep norm with a GPU kernel, in Pallas (kernels/min_sep_norm_pallas.py)."""

from __future__ import annotations

import math
from typing import Any

import jax

from jax_privacy_kernels.ops import _coefficients
from jax_privacy_kernels.ops.min_sep_norm import _jax

__all__ = ["run"]


@_coefficients.in_float64
def run(coef: jax.Array, **static: Any) -> list[jax.Array]:
    """Value and gradient."""
    return _jax.norm(_window_sums, coef, **static)


def _window_sums(x: jax.Array, min_sep: int, k: int) -> jax.Array:
    from jax_privacy_kernels.kernels.min_sep_norm_pallas import window_sums

    *batch, n = x.shape
    sums = window_sums(x.reshape(math.prod(batch), n), min_sep, min(k, -(-n // min_sep)))
    return sums.reshape(x.shape)
