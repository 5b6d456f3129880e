"""Correlated noise as a GPU kernel for every leaf, in Pallas (kernels/correlated_noise_pallas.py).

Leaves of one shape share a kernel: what tells them apart is data. So a model of many layers
compiles few of them, for which a launch for every leaf is a fair price.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jax_privacy_kernels.ops import _gpu_noise
from jax_privacy_kernels.ops._leaves import TILE, Leaf
from jax_privacy_kernels.ops._noise import NoiseOutputs
from jax_privacy_kernels.ops.correlated_noise._contract import Inputs
from jax_privacy_kernels.ops.correlated_noise._filters import Filter, MovingAverageFilter

__all__ = ["refuse", "run"]

MOST = 32  # terms or buffers that a thread can hold in registers


def refuse(leaf: Leaf, filter: Filter, stream: str) -> str | None:
    """Why this implementation cannot take the leaf, or None."""
    if reason := _gpu_noise.refuse_pallas(leaf, filter.ahead, stream):
        return reason
    if filter.buffers > MOST:
        return f"{filter.buffers} buffers, but it holds at most {MOST}"
    if isinstance(filter, MovingAverageFilter) and filter.slots and filter.samples > MOST:
        return f"moving averages of {filter.samples} samples, but it holds at most {MOST}"
    return None


def run(inputs: Inputs) -> NoiseOutputs:
    """One step."""
    filter, leaves, base = inputs.filter, inputs.leaves, inputs.base
    assert filter.ahead
    assert base is not None
    leaf_keys = jax.vmap(lambda key: jax.random.split(key, leaves[0].count))(inputs.keys)
    factors = filter.factors(inputs.step, inputs.coef)
    outs, rings = [], []
    for i, (leaf, first, grad) in enumerate(zip(leaves, base, inputs.grads, strict=True)):
        out, ring = _leaf_step(
            inputs.stream,
            filter,
            leaf.noise_dtype,
            leaf.dtype,
            leaf.whole,
            inputs.step,
            _gpu_noise.runs(leaf, first, filter.slots),
            leaf_keys[:, leaf.index],
            factors,
            inputs.scale,
            grad,
            inputs.rings[i] if inputs.rings else None,
        )
        outs.append(out)
        rings.append(ring)
    return NoiseOutputs(outs, rings if inputs.rings else [])


# Jitted, so that leaves of one shape are traced once.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _leaf_step(
    stream: str,
    filter: Filter,
    noise_dtype: jnp.dtype,
    dtype: jnp.dtype,
    whole: bool,
    step: jax.Array,
    runs: jax.Array,
    keys: jax.Array,
    factors: jax.Array,
    scale: jax.Array,
    grad: jax.Array,
    ring: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    from jax_privacy_kernels.kernels.correlated_noise_pallas import Static, correlated_noise

    static = Static(
        filter=filter.name,
        tile=TILE,
        slots=filter.slots,
        buffers=filter.buffers,
        behind=filter.behind,
        noise_dtype=noise_dtype,
        whole=whole,
        stream=stream,
    )
    out, new_ring = correlated_noise(
        static,
        step,
        runs,
        jax.random.key_data(keys),
        factors.astype(dtype),
        scale.astype(dtype),
        grad.reshape(-1),
        None if ring is None else ring.reshape(-1, grad.size),
    )
    out = out.reshape(grad.shape)
    return out, None if ring is None or new_ring is None else new_ring.reshape(ring.shape)
