"""Correlated noise as one XLA custom call for the whole tree, in C++ (csrc/correlated_noise.h)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels.ops.correlated_noise._matrices import Layout
from jax_privacy_kernels.ops.correlated_noise._schedule import Leaf

__all__ = ["refuse", "run"]


def refuse(leaf: Leaf, layout: Layout) -> str | None:
    """Why this implementation cannot take the leaf, or None."""
    if not layout.ahead:
        return "it samples threefry2x32 keys with jax_threefry_partitionable only"
    if leaf.noise_dtype not in (jnp.float32, jnp.float64):
        return f"it samples float32 and float64, not {leaf.noise_dtype}"
    return None


def run(
    layout: Layout,
    leaves: Sequence[Leaf],
    step: jax.Array,
    keys: jax.Array,
    coef: jax.Array,
    scale: jax.Array,
    base: jax.Array,
    grads: Sequence[jax.Array],
    rings: Sequence[jax.Array],
) -> tuple[list[jax.Array], list[jax.Array]]:
    """One step; the contract stands in the op, above its table."""
    assert layout.ahead
    # Where nothing is kept there is nothing to carry: rings of no rows do not travel.
    kept = layout.rows > 0
    per_leaf = [(g, r) if kept else (g,) for g, r in zip(grads, rings, strict=True)]
    operands = [step, jax.random.key_data(keys), coef, scale, base]
    shards = [leaf.shard for leaf in leaves]
    buffers = [buffer for leaf in per_leaf for buffer in leaf]
    stride, first = len(per_leaf[0]), len(operands)
    results = jax.ffi.ffi_call(
        "jpk_correlated_noise",
        [jax.ShapeDtypeStruct(buffer.shape, buffer.dtype) for buffer in buffers],
        input_output_aliases={first + i: i for i in range(1, len(buffers), 2)} if kept else {},
        vmap_method="sequential",
    )(
        *operands,
        *buffers,
        filter=layout.filter,
        slots=np.int64(layout.slots),
        leaf_index=np.array([leaf.index for leaf in leaves], np.int64),
        first_tile=np.array([leaf.first_tile for leaf in leaves], np.int64),
        run=np.array([shard.run for shard in shards], np.int64),
        axis_count=np.array([len(shard.axes) for shard in shards], np.int64),
        axes=np.array([x for shard in shards for axis in shard.axes for x in axis], np.int64),
        noise_bits=np.array([8 * leaf.noise_dtype.itemsize for leaf in leaves], np.int64),
        ring_bits=np.array([8 * ring.dtype.itemsize for ring in rings], np.int64),
        accurate=bool(getattr(jax.config, "jax_accurate_erf_inv", False)),
    )
    return list(results[::stride]), list(results[1::2]) if kept else list(rings)
