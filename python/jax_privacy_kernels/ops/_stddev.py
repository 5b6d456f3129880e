"""Which standard deviations noise can have: too small ones would vanish in 32 bits, unseen."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["LEAST", "MOST", "is_normal", "is_usable", "is_zero"]

# The least stddev but 0, and the greatest: noise is kept and scaled in 32 bits.
LEAST, MOST = 1e-30, float(np.finfo(np.float32).max)


def is_usable(stddev: jax.Array) -> jax.Array:
    """Whether a stddev is 0, or large enough that noise of that standard deviation does not vanish.

    Not negative, infinite or NaN.
    """
    return is_zero(stddev) | ((stddev >= LEAST) & (stddev <= MOST))


def is_normal(x: jax.Array) -> jax.Array:
    """Whether a number is finite and has not vanished in 32 bits."""
    return (jnp.abs(x) >= np.finfo(np.float32).tiny) & (jnp.abs(x) <= MOST)


def is_zero(x: jax.Array) -> jax.Array:
    """Whether a number is 0, and not so small that comparisons take it for 0."""
    word: Any = jnp.uint64 if x.dtype == jnp.float64 else jnp.uint32
    return jax.lax.bitcast_convert_type(x, word) == 0
