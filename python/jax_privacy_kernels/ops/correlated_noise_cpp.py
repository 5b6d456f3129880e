"""Correlated noise as one XLA custom call for the whole tree, in C++ (csrc/correlated_noise.h)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels.ops._lookahead import Leaf

__all__ = ["refuse", "run"]


def refuse(leaf: Leaf, ahead: bool) -> str | None:
    """Why this implementation cannot take the leaf, or None."""
    if not ahead:
        return "it samples threefry2x32 keys with jax_threefry_partitionable only"
    if leaf.noise_dtype not in (jnp.float32, jnp.float64):
        return f"it samples float32 and float64, not {leaf.noise_dtype}"
    return None


def run(
    leaves: Sequence[Leaf],
    ahead: bool,
    step: jax.Array,
    keys: jax.Array,
    coef: jax.Array,
    scale: jax.Array,
    grads: Sequence[jax.Array],
    rings: Sequence[jax.Array],
) -> tuple[list[jax.Array], list[jax.Array]]:
    """One step; the contract stands in correlated_noise.py, above its table."""
    assert ahead
    # Without history there is nothing to carry: rings of no slots do not travel.
    per_leaf = [(g,) if coef.shape[0] == 1 else (g, r) for g, r in zip(grads, rings, strict=True)]
    operands = [step, jax.random.key_data(keys), coef, scale]
    buffers = [buffer for leaf in per_leaf for buffer in leaf]
    stride, first = len(per_leaf[0]), len(operands)
    results = jax.ffi.ffi_call(
        "jpk_correlated_noise",
        [jax.ShapeDtypeStruct(buffer.shape, buffer.dtype) for buffer in buffers],
        input_output_aliases={first + i: i for i in range(1, len(buffers), 2)}
        if stride == 2
        else {},
        vmap_method="sequential",
    )(
        *operands,
        *buffers,
        leaf_index=np.array([leaf.index for leaf in leaves], np.int64),
        first_tile=np.array([leaf.first_tile for leaf in leaves], np.int64),
        noise_bits=np.array([8 * leaf.noise_dtype.itemsize for leaf in leaves], np.int64),
        accurate=bool(getattr(jax.config, "jax_accurate_erf_inv", False)),
    )
    return list(results[::stride]), list(results[1::2]) if stride == 2 else list(rings)
