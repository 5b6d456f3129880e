"""Privacy loss sums as XLA custom calls, in C++ (csrc/privacy_loss_sums.h)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["run"]

_SCHEMES = ("min_sep", "min_sep_warm", "cyclic")  # as the kernel numbers them


def run(
    key: jax.Array,
    span: jax.Array,
    operands: tuple[jax.Array, ...],
    sigmas: jax.Array,
    margins: jax.Array,
    epsilons: jax.Array,
    /,
    *,
    scheme: str,
    n: int,
    period: int,
    p: float,
) -> Any:
    """Sums, counts and maxima."""
    out = [jax.ShapeDtypeStruct((2, sigmas.size, epsilons.size), jnp.float64)] * 3
    arrays = (key, span, *operands, sigmas, margins, epsilons)
    if scheme == "bins":
        return jax.ffi.ffi_call("jpk_privacy_loss_bins", out)(*arrays)
    static = {"n": n, "period": period, "p": np.float64(p)}
    call = jax.ffi.ffi_call("jpk_privacy_loss_steps", out)
    return call(*arrays, scheme=_SCHEMES.index(scheme), **static)
