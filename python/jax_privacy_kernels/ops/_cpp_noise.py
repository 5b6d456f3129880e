"""What the C++ implementations of the noise ops share: leaves as attributes of a custom call."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels.ops._leaves import Leaf
from jax_privacy_kernels.ops._memory import Memory, Origins
from jax_privacy_kernels.ops._noise import NoiseInputs, NoiseOutputs

__all__ = ["call", "refuse"]

# Leaves of one call. XLA's time to compile a call grows with the square of its operands, or faster.
MOST = 128


def refuse(leaf: Leaf, ahead: bool, stream: str) -> str | None:
    """Why C++ cannot take the leaf, or None."""
    del stream  # of those that look ahead it has all
    if not ahead:
        return (
            "it looks ahead, which takes chacha20 keys, or threefry2x32 keys with "
            "jax_threefry_partitionable, and a stddev that is not traced"
        )
    if leaf.noise_dtype not in (jnp.float32, jnp.float64):
        return f"it samples float32 and float64, not {leaf.noise_dtype}"
    return None


def call(
    target: str, operands: list[jax.Array], inputs: NoiseInputs, **static: Any
) -> NoiseOutputs:
    """Calls a handler of csrc/ on all leaves, once for up to MOST of them.

    Its operands are ``operands``, the leaves' base, then the gradient and the ring of each leaf;
    its results the output and the ring of each, in the memory of the gradient or the ring that went
    in where it may be written to. Rings that have no rows do not travel.

    Args:
      target: the name of the handler.
      operands: those that the leaves share.
      inputs: the leaves.
      **static: attributes that the leaves share.
    """
    assert inputs.base is not None
    if len(inputs.leaves) > MOST:
        together = NoiseOutputs([], [])
        for first in range(0, len(inputs.leaves), MOST):
            some = inputs.some(range(first, min(first + MOST, len(inputs.leaves))))
            outs, rings = call(target, operands, some, **static)
            together.outs.extend(outs)
            together.rings.extend(rings)
        return together
    operands = [*operands, inputs.base]
    per_leaf = [inputs.grads, inputs.rings] if inputs.rings else [inputs.grads]
    buffers = [buffer for leaf in zip(*per_leaf, strict=True) for buffer in leaf]
    stride, first = len(per_leaf), len(operands)
    leaves = inputs.leaves
    shards = [leaf.shard for leaf in leaves]
    results = jax.ffi.ffi_call(
        target,
        [jax.ShapeDtypeStruct(buffer.shape, buffer.dtype) for buffer in buffers],
        input_output_aliases={first + i: i for i in _in_place(inputs)},
        vmap_method="sequential",
    )(
        *operands,
        *buffers,
        leaf_index=np.array([leaf.index for leaf in leaves], np.int64),
        first_tile=np.array([leaf.first_tile for leaf in leaves], np.int64),
        run=np.array([shard.run for shard in shards], np.int64),
        axis_count=np.array([len(shard.axes) for shard in shards], np.int64),
        axes=np.array([x for shard in shards for axis in shard.axes for x in axis], np.int64),
        noise_bits=np.array([8 * leaf.noise_dtype.itemsize for leaf in leaves], np.int64),
        ring_bits=np.array([8 * leaf.dtype.itemsize for leaf in leaves], np.int64),
        accurate=bool(getattr(jax.config, "jax_accurate_erf_inv", False)),
        **static,
    )
    return NoiseOutputs(list(results[::stride]), list(results[1::2]) if inputs.rings else [])


def _in_place(inputs: NoiseInputs) -> list[int]:
    """Which buffers of the leaves the results may lie in."""
    origins = inputs.origins or Origins()
    per_leaf = []
    for leaf in inputs.leaves:
        per_leaf.append(origins.grad(leaf.index) is Memory.OWN)
        if inputs.rings:  # one that is unknown is in a loop, as a rule, which owns it
            per_leaf.append(origins.ring(leaf.index) is not Memory.GIVEN)
    return [i for i, in_place in enumerate(per_leaf) if in_place]
