"""The min-sep norm, its window sums in Triton (kernels/min_sep_norm_triton.py), the rest in XLA."""

from __future__ import annotations

import math
from typing import Any

import jax

from jax_privacy_kernels.ops import _coefficients, _jax_triton
from jax_privacy_kernels.ops.min_sep_norm import _jax

__all__ = ["run"]

# Of a window's rows and columns, what a program adds up at a time.
ROWS = 64
LANES = 16


def _window_sums(x: jax.Array, min_sep: int, k: int) -> jax.Array:
    *batch, n = x.shape
    rows = -(-n // min_sep)
    k = min(k, rows)
    if k == 1 or x.size == 0:
        return x
    from jax_privacy_kernels.kernels.min_sep_norm_triton import window_sums

    (sums,) = _jax_triton.call(
        window_sums,
        [x],
        [n, min_sep, k],
        [jax.ShapeDtypeStruct(x.shape, x.dtype)],
        programs=math.prod(batch) * -(-rows // k) * -(-min_sep // LANES),
        ROWS=ROWS,
        LANES=LANES,
    )
    return sums


@_coefficients.in_float64
def run(coef: jax.Array, **static: Any) -> list[jax.Array]:
    """Value and gradient."""
    return _jax.norm(_window_sums, coef, **static)
