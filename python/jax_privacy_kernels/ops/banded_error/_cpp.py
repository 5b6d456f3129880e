"""Errors of banded strategies as XLA custom calls, in C++ (csrc/banded_error.h)."""

from __future__ import annotations

from typing import Any

import jax

__all__ = ["run"]


def run(*arrays: jax.Array) -> Any:
    """Errors or derivatives."""
    if len(arrays) == 4:
        name, shapes = "jpk_banded_error", arrays[1]
        out: Any = jax.ShapeDtypeStruct(shapes.shape, shapes.dtype)
    else:
        name = "jpk_banded_error_gradients"
        out = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays[:4]]
    return jax.ffi.ffi_call(name, out, vmap_method="broadcast_all")(*arrays)
