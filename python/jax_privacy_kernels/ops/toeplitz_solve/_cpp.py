"""Toeplitz systems as an XLA custom call, in C++ (csrc/toeplitz.h)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

__all__ = ["run"]


def run(coef: jax.Array, rhs: jax.Array, *, transpose: bool) -> jax.Array:
    """The solution."""
    out = jax.ShapeDtypeStruct(rhs.shape, jnp.result_type(coef, rhs))
    call = jax.ffi.ffi_call("jpk_toeplitz_solve", out, vmap_method="broadcast_all")
    return call(coef, rhs, transpose=transpose)
