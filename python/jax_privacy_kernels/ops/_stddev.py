"""Which standard deviations noise can have: too small ones would vanish in 32 bits, unseen."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["LEAST", "MOST", "is_normal", "is_usable", "is_zero"]

# The least stddev but 0, and the greatest: noise is kept and scaled in 32 bits.
LEAST, MOST = 1e-30, float(np.finfo(np.float32).max)
_SMALLEST = -110  # the exponent of a scale of which one of 2^16 samples is below 2^-126, and 0


def is_usable(stddev: jax.Array) -> jax.Array:
    """Whether a stddev is 0, or large enough that noise of that standard deviation does not vanish.

    Not negative, infinite or NaN.
    """
    return is_zero(stddev) | ((stddev >= LEAST) & (stddev <= MOST))


def is_normal(*factors: jax.Array) -> jax.Array:
    """Whether noise is finite in 32 bits and does not vanish, for all products of the factors.

    They are a scalar, or arrays of one shape.
    """
    logs = [jnp.log2(jnp.abs(jax.lax.stop_gradient(x))).astype(jnp.float32) for x in factors]
    exponent = functools.reduce(jnp.add, logs)  # the product of factors may be out of range before
    return ((exponent >= _SMALLEST) & (exponent <= np.log2(MOST))).all()


def is_zero(x: jax.Array) -> jax.Array:
    """Whether a number is 0, and not so small that comparisons take it for 0.

    -0.0 is none: compilers make a comparison of floats of one that allows for the sign.
    """
    word: Any = jnp.uint64 if x.dtype == jnp.float64 else jnp.uint32
    return jax.lax.bitcast_convert_type(x, word) == 0
