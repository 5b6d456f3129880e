"""Dense noise as a GPU kernel for every leaf, in Pallas (kernels/dense_noise_pallas.py)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jax_privacy_kernels.ops import _gpu_noise
from jax_privacy_kernels.ops._gpu_noise import refuse_pallas as refuse
from jax_privacy_kernels.ops._leaves import TILE
from jax_privacy_kernels.ops._noise import NoiseOutputs
from jax_privacy_kernels.ops.dense_noise._contract import Inputs

__all__ = ["refuse", "run"]


def run(inputs: Inputs) -> NoiseOutputs:
    """One row."""
    assert inputs.ahead
    assert inputs.base is not None
    leaf_keys = jax.random.split(inputs.key, inputs.leaves[0].count)
    outs = [
        _leaf(
            inputs.stream,
            leaf.noise_dtype,
            leaf.dtype,
            leaf.whole,
            _gpu_noise.runs(leaf, first, 0),
            leaf_keys[leaf.index],
            inputs.row,
            grad,
        )
        for leaf, first, grad in zip(inputs.leaves, inputs.base, inputs.grads, strict=True)
    ]
    return NoiseOutputs(outs, [])


# Jitted, so that leaves of one shape are traced once.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _leaf(
    stream: str,
    noise_dtype: jnp.dtype,
    dtype: jnp.dtype,
    whole: bool,
    runs: jax.Array,
    key: jax.Array,
    row: jax.Array,
    grad: jax.Array,
) -> jax.Array:
    from jax_privacy_kernels.kernels.dense_noise_pallas import dense_noise

    keys = jax.vmap(lambda j: jax.random.fold_in(key, j))(jnp.arange(row.size, dtype=jnp.uint32))
    words = jax.random.key_data(keys)
    flat = grad.reshape(-1)
    out = dense_noise(stream, TILE, noise_dtype, whole, runs, words, row.astype(dtype), flat)
    return out.reshape(grad.shape)
