"""Correlated noise as one launch for every leaf, in Triton (kernels/correlated_noise_triton.py)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jax_privacy_kernels.ops import _gpu_noise, _jax_triton
from jax_privacy_kernels.ops.correlated_noise._matrices import Layout
from jax_privacy_kernels.ops.correlated_noise._schedule import TILE, Leaf

__all__ = ["refuse", "run"]

# Terms made together, at most, and elements of a tile to a program that makes them. With twice as
# many of either, the compiler spills registers for some dtypes and sizes.
GROUP = 8
PART = 256


def refuse(leaf: Leaf, layout: Layout) -> str | None:
    """Why this implementation cannot take the leaf, or None."""
    if reason := _gpu_noise.refuse(leaf, layout):
        return reason
    if leaf.noise_dtype != jnp.float32:
        return f"it samples float32, not {leaf.noise_dtype}"
    if layout.filter != "recurrence" and layout.rows:
        return f"it keeps no state of a {layout.filter}"
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
    # What is left over of a division has the sign of the step here. Its noise is NaN already.
    step = jnp.maximum(step, 0)
    leaf_keys = _leaf_keys(layout, keys, leaves[0].count)
    outs, new_rings = [], []
    for leaf, first, grad, ring in zip(leaves, base, grads, rings, strict=True):
        weights = _weights(layout, step, coef.astype(ring.dtype))
        runs = _gpu_noise.runs(leaf, first, layout.slots)
        arrays = [leaf_keys, weights, scale.astype(ring.dtype), grad, runs]
        first_key = leaf_keys[0].size * leaf.index
        if layout.slots:
            out, ring = _recurrence(layout.slots, leaf, first_key, [step, *arrays, ring])
        else:
            out = _weighted_samples(leaf, first_key, arrays)
        outs.append(out)
        new_rings.append(ring)
    return outs, new_rings


def _recurrence(
    slots: int, leaf: Leaf, first_key: int, arrays: Sequence[jax.Array]
) -> Sequence[jax.Array]:
    from jax_privacy_kernels.kernels import correlated_noise_triton

    *_, weights, _, grad, runs, ring = arrays
    unit = _jax_triton.divisor(leaf.shard.run)
    tiles = _tiles_of_run(leaf)
    # Of every S tiles that have all phases; the first of them may begin before the run.
    groups = -(-(tiles + (0 if leaf.whole else slots - 1)) // slots)
    group = TILE // PART + -(-tiles // groups)
    programs = groups * group
    return _jax_triton.call(
        correlated_noise_triton.recurrence,
        arrays,
        [first_key, leaf.shard.run // unit, runs.shape[0], programs, group],
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (grad, ring)],
        programs=runs.shape[0] * programs,
        aliases={len(arrays) - 1: 1},
        UNIT=unit,
        SLOTS=slots,
        ROWS=weights.shape[0],
        WIDTH=weights.shape[1],
        GROUP=_group(slots),
        PART=PART,
        TILE=TILE,
        ACCURATE=_accurate(),
        WHOLE=leaf.whole,
    )


def _weighted_samples(leaf: Leaf, first_key: int, arrays: Sequence[jax.Array]) -> jax.Array:
    from jax_privacy_kernels.kernels import correlated_noise_triton

    _, weights, _, grad, runs = arrays
    unit = _jax_triton.divisor(leaf.shard.run)
    tiles = _tiles_of_run(leaf)
    # Several runs have two tiles each, at least: 1 would be compiled in.
    (out,) = _jax_triton.call(
        correlated_noise_triton.weighted_samples,
        arrays,
        [first_key, weights.size, leaf.shard.run // unit, max(tiles, 2)],
        [jax.ShapeDtypeStruct(grad.shape, grad.dtype)],
        programs=runs.shape[0] * tiles,
        UNIT=unit,
        TILE=TILE,
        ACCURATE=_accurate(),
        WHOLE=leaf.whole,
    )
    return out


def _tiles_of_run(leaf: Leaf) -> int:
    """How many tiles a run can have elements of; the first may begin before it."""
    return -(-(leaf.shard.run + (0 if leaf.whole else TILE - 1)) // TILE)


def _leaf_keys(layout: Layout, keys: jax.Array, count: int) -> jax.Array:
    """``[count, samples, 2]`` uint32, the keys of every leaf's samples."""
    leaf_keys = jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(keys)
    if layout.filter == "row":
        samples = jnp.arange(layout.behind + 1)
        fold_in = jax.vmap(jax.random.fold_in, (None, 0))
        leaf_keys = jax.vmap(fold_in, (0, None))(leaf_keys[:, 0], samples)
    return jax.random.key_data(leaf_keys)


def _weights(layout: Layout, step: jax.Array, coef: jax.Array) -> jax.Array:
    """The coefficients as the kernels take them."""
    weights = _gpu_noise.factors(layout, step, coef)
    if layout.filter != "recurrence":
        return weights
    if not layout.slots:
        return weights[0]
    # Behind the last lag, zeros for what the groups at either end reach beyond it.
    group = _group(layout.slots)
    width = -(-layout.slots // group) * group + group
    return jnp.pad(weights, ((0, 0), (0, width - weights.shape[1])))


def _group(slots: int) -> int:
    """The size of a group: as many as there must be, and these as equal as can be."""
    return -(-slots // -(-slots // GROUP))


def _accurate() -> bool:
    return bool(getattr(jax.config, "jax_accurate_erf_inv", False))
