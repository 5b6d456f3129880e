"""Dense noise in plain JAX: the oracle of the other implementations, and what TPUs run."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jax_privacy_kernels.ops._jax_noise import Here, refuse, weighted_samples
from jax_privacy_kernels.ops._noise import NoiseOutputs
from jax_privacy_kernels.ops._shards import Shard, Words
from jax_privacy_kernels.ops.dense_noise._contract import Inputs

__all__ = ["refuse", "run"]


def run(inputs: Inputs) -> NoiseOutputs:
    """One row."""
    assert inputs.base is not None
    leaf_keys = jax.random.split(inputs.key, inputs.leaves[0].count)
    outs = [
        _leaf(
            leaf.noise_dtype,
            leaf.dtype,
            None if leaf.whole else leaf.shard,
            0 if inputs.ahead else leaf.size,
            (first[0], first[1]),
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
    noise_dtype: jnp.dtype,
    dtype: jnp.dtype,
    shard: Shard | None,
    leaf_size: int,
    first: Words,
    key: jax.Array,
    row: jax.Array,
    grad: jax.Array,
) -> jax.Array:
    here = Here(shard, first, leaf_size, grad.size, noise_dtype, dtype)
    key_of = functools.partial(jax.random.fold_in, key)
    noise = weighted_samples(here, key_of, row.astype(dtype))
    return (grad + noise.reshape(grad.shape)).astype(grad.dtype)
