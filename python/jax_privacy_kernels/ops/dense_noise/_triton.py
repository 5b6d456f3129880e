"""Dense noise as one launch for every leaf, in Triton (kernels/dense_noise_triton.py)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_privacy_kernels.ops import _gpu_noise, _jax_triton
from jax_privacy_kernels.ops._gpu_noise import refuse_triton as refuse
from jax_privacy_kernels.ops._leaves import TILE, Leaf
from jax_privacy_kernels.ops._noise import NoiseOutputs
from jax_privacy_kernels.ops.dense_noise._contract import Inputs

__all__ = ["refuse", "run", "weighted_samples"]


def run(inputs: Inputs) -> NoiseOutputs:
    """One row."""
    assert inputs.ahead
    assert inputs.base is not None
    leaf_keys = jax.random.split(inputs.key, inputs.leaves[0].count)
    of_samples = jax.vmap(jax.random.fold_in, (None, 0))
    samples = jnp.arange(inputs.row.size)
    keys = jax.random.key_data(jax.vmap(of_samples, (0, None))(leaf_keys, samples))
    outs = []
    for leaf, first, grad in zip(inputs.leaves, inputs.base, inputs.grads, strict=True):
        row, one = inputs.row.astype(leaf.dtype), jnp.ones((), leaf.dtype)
        outs.append(weighted_samples(leaf, first, inputs.stream, keys, row, one, grad))
    return NoiseOutputs(outs, [])


def weighted_samples(
    leaf: Leaf,
    first: jax.Array,
    stream: str,
    keys: jax.Array,
    weights: jax.Array,
    scale: jax.Array,
    grad: jax.Array,
) -> jax.Array:
    """grad + scale sum_j weights[j] z_j of what is here of a leaf.

    Args:
      leaf: static.
      first: the index in the leaf of the first element that is here, the high and the low word.
      stream: the type of the keys, static.
      keys: ``[leaves, samples, words]`` uint32, those of every leaf of the tree.
      weights: ``[samples]`` of ``leaf.dtype``.
      scale: scalar of ``leaf.dtype``.
      grad: of any shape.
    """
    from jax_privacy_kernels.kernels import dense_noise_triton

    runs = _gpu_noise.runs(leaf, first, 0)
    unit = _jax_triton.divisor(leaf.shard.run)
    tiles = _gpu_noise.tiles_of_run(leaf)
    # Several runs have two tiles each, at least: 1 would be compiled in.
    (out,) = _jax_triton.call(
        dense_noise_triton.weighted_samples,
        [keys, weights, scale, grad, runs],
        [keys[0].size * leaf.index, weights.size, leaf.shard.run // unit, max(tiles, 2)],
        [jax.ShapeDtypeStruct(grad.shape, grad.dtype)],
        programs=runs.shape[0] * tiles,
        warps=_gpu_noise.warps(TILE, stream),
        UNIT=unit,
        TILE=TILE,
        ALONE=weights.size == 1,
        STREAM=stream,
        ACCURATE=_jax_triton.accurate(),
        WHOLE=leaf.whole,
    )
    return out
