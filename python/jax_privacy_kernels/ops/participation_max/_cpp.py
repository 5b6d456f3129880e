"""The participation maximum as an XLA custom call, in C++ (csrc/participation_max.h)."""

from __future__ import annotations

from collections.abc import Sequence

import jax

__all__ = ["run"]


def run(
    x: jax.Array, *, min_sep: int, max_participations: int, differentiate: bool
) -> Sequence[jax.Array]:
    """Value and gradient."""
    shapes = [x.shape[:-1], x.shape][: 1 + differentiate]
    outs = [jax.ShapeDtypeStruct(shape, x.dtype) for shape in shapes]
    call = jax.ffi.ffi_call("jpk_participation_max", outs, vmap_method="broadcast_all")
    return call(x, min_sep=min_sep, max_participations=max_participations)
