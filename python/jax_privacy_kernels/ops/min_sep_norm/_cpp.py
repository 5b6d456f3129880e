"""The min-sep norm as an XLA custom call, in C++ (csrc/min_sep_norm.h)."""

from __future__ import annotations

from collections.abc import Sequence

import jax

__all__ = ["run"]


def run(
    coef: jax.Array, *, n: int, min_sep: int, max_participations: int, differentiate: bool
) -> Sequence[jax.Array]:
    """Value and gradient."""
    shapes = [(), coef.shape][: 1 + differentiate]
    outs = [jax.ShapeDtypeStruct(shape, coef.dtype) for shape in shapes]
    call = jax.ffi.ffi_call("jpk_min_sep_norm", outs, vmap_method="broadcast_all")
    return call(coef, n=n, min_sep=min_sep, max_participations=max_participations)
