"""Correlated noise as a GPU kernel for every leaf, in Pallas (kernels/correlated_noise_pallas.py).

Leaves of one shape share a kernel: what tells them apart is data. So a model of many layers
compiles few of them, for which a launch for every leaf is a fair price.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jax_privacy_kernels.ops import _gpu_noise
from jax_privacy_kernels.ops.correlated_noise._matrices import Layout
from jax_privacy_kernels.ops.correlated_noise._schedule import TILE, Leaf

__all__ = ["refuse", "run"]

MOST = 32  # terms or buffers that a thread can hold in registers


def refuse(leaf: Leaf, layout: Layout) -> str | None:
    """Why this implementation cannot take the leaf, or None."""
    if reason := _gpu_noise.refuse(leaf, layout):
        return reason
    if leaf.noise_dtype not in (jnp.float32, jnp.float64):
        return f"it samples float32 and float64, not {leaf.noise_dtype}"
    if leaf.shard.size > 2**31 - TILE:
        return f"{leaf.shard.size} elements, but its indices are 32 bits wide"
    if layout.hidden > MOST:
        return f"{layout.hidden} buffers, but it holds at most {MOST}"
    if layout.filter == "moving_average" and layout.slots and layout.behind >= MOST:
        return f"moving averages of {layout.behind + 1} samples, but it holds at most {MOST}"
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
    leaf_keys = jax.vmap(lambda key: jax.random.split(key, leaves[0].count))(keys)
    factors = _gpu_noise.factors(layout, step, coef)
    outs, new_rings = [], []
    for leaf, first, grad, ring in zip(leaves, base, grads, rings, strict=True):
        out, ring = _leaf_step(
            layout,
            leaf.noise_dtype,
            leaf.whole,
            step,
            _gpu_noise.runs(leaf, first, layout.slots),
            leaf_keys[:, leaf.index],
            factors,
            scale,
            grad,
            ring,
        )
        outs.append(out)
        new_rings.append(ring)
    return outs, new_rings


# Jitted, so that leaves of one shape are traced once.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _leaf_step(
    layout: Layout,
    noise_dtype: jnp.dtype,
    whole: bool,
    step: jax.Array,
    runs: jax.Array,
    keys: jax.Array,
    coef: jax.Array,
    scale: jax.Array,
    grad: jax.Array,
    ring: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    from jax_privacy_kernels.kernels.correlated_noise_pallas import Shape, correlated_noise

    if layout.filter == "row":
        samples = jnp.arange(layout.behind + 1, dtype=jnp.uint32)
        keys = jax.vmap(lambda j: jax.random.fold_in(keys[0], j))(samples)
    out, new_ring = correlated_noise(
        Shape(
            layout.filter,
            TILE,
            layout.slots,
            layout.hidden,
            layout.behind,
            noise_dtype,
            whole,
        ),
        step,
        runs,
        jax.random.key_data(keys),
        coef.astype(ring.dtype),
        scale.astype(ring.dtype),
        grad.reshape(-1),
        ring.reshape(layout.rows, grad.size),
    )
    return out.reshape(grad.shape), new_ring.reshape(ring.shape)
