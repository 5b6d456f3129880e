"""Dense noise in plain JAX: the oracle of the other implementations, and what TPUs run."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels.ops._jax_bundles import Bundle, bundles, each
from jax_privacy_kernels.ops._jax_noise import Here, refuse, weighted_samples
from jax_privacy_kernels.ops._noise import NoiseOutputs
from jax_privacy_kernels.ops._shards import Shard, Words
from jax_privacy_kernels.ops.dense_noise._contract import Inputs

__all__ = ["refuse", "run"]


def run(inputs: Inputs) -> NoiseOutputs:
    """One row."""
    assert inputs.base is not None
    leaf_keys = jax.random.split(inputs.key, inputs.leaves[0].count)
    outs = list(inputs.grads)
    for group in bundles(inputs.leaves, inputs.ahead):
        leaves = [inputs.leaves[i] for i in group]
        keys = leaf_keys[np.array([leaf.index for leaf in leaves])]
        if len(group) > 1:
            grads = [inputs.grads[i] for i in group]
            results = _bundle(Bundle.of(leaves, inputs.ahead), keys, inputs.row, grads)
        else:
            (leaf,), (i,) = leaves, group
            out = _leaf(
                leaf.noise_dtype,
                leaf.dtype,
                None if leaf.whole else leaf.shard,
                0 if inputs.ahead else leaf.size,
                (inputs.base[i, 0], inputs.base[i, 1]),
                keys[0],
                inputs.row,
                inputs.grads[i],
            )
            results = [out]
        for i, out in zip(group, results, strict=True):
            outs[i] = out
    return NoiseOutputs(outs, [])


def _bundle(
    bundle: Bundle, keys: jax.Array, row: jax.Array, grads: list[jax.Array]
) -> list[jax.Array]:
    key_of: Callable[[jax.Array, jax.Array], jax.Array]
    key_of = jax.vmap(jax.random.fold_in, (0, None))
    if not bundle.counted:  # keys of type unsafe_rbg make others under a vmap
        key_of = lambda keys, j: jax.lax.map(lambda key: jax.random.fold_in(key, j), keys)  # noqa: E731
    noise = weighted_samples(bundle, functools.partial(key_of, keys), row.astype(bundle.dtype))
    begins = each(jnp.asarray(bundle.begins), len(grads))
    return [_add(grad, noise, begin) for grad, begin in zip(grads, begins, strict=True)]


@jax.jit
def _add(grad: jax.Array, noise: jax.Array, begin: jax.Array) -> jax.Array:
    noise = jax.lax.dynamic_slice(noise, (begin,), (grad.size,))
    return (grad + noise.reshape(grad.shape)).astype(grad.dtype)


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
