"""One step of a correlated-noise privatizer: sample, correlate, add to the gradients."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jax_privacy_kernels._checks import check_like
from jax_privacy_kernels.ops import (
    _cpp,
    _dispatch,
    _lookahead,
    correlated_noise_cpp,
    correlated_noise_jax,
)
from jax_privacy_kernels.ops._lookahead import Leaf, NoiseState
from jax_privacy_kernels.ops._recurrence import BandedRecurrence

__all__ = [
    "IMPLEMENTATIONS",
    "NoiseState",
    "check_noise_dtype",
    "correlated_noise",
    "init_correlated_noise",
]

# Fastest first. An implementation is a module with two functions:
#
#   refuse(leaf, ahead) -> why it cannot take the leaf under this schedule, or None
#   run(leaves, ahead, step, keys, coef, scale, grads, rings) -> (outs, rings)
#
# run takes step t of some or all leaves of the tree, in the schedule of _lookahead.py, and gives
# outs = grads + scale x_t and the rings after the step, which hold the x of unit variance.
#
#   leaves   a Leaf for each of grads, rings and outs (static)
#   ahead    whether the look-ahead schedule or the plain one is followed (static)
#   step     int32 scalar, t
#   keys     typed keys of steps t .. t + S - 1 by slot, [max(S, 1)]; plain schedule: t's, [1]
#   coef     [b], float32 or float64
#   scale    scalar
#   grads    any shapes, not empty, and floating dtypes
#   rings    (S,) + shape; their dtype is the one x is computed in
IMPLEMENTATIONS: _dispatch.Table = {
    "cpp": _dispatch.Implementation(
        platforms=("cpu",),
        unavailable=_cpp.unavailable,
        refuse=correlated_noise_cpp.refuse,
        run=correlated_noise_cpp.run,
        limits="to jax: noise of 16 bits; keys other than partitionable threefry2x32",
    ),
    "jax": _dispatch.Implementation(
        platforms=_dispatch.PLATFORMS,
        unavailable=lambda: None,
        refuse=correlated_noise_jax.refuse,
        run=correlated_noise_jax.run,
    ),
}

_FLOATS = ("float16", "bfloat16", "float32", "float64")


def init_correlated_noise(
    model: Any, recurrence: BandedRecurrence, *, key: jax.Array, dtype: Any = None
) -> NoiseState:
    """The state before step 0.

    Args:
      model: tree of arrays or ShapeDtypeStructs, shaped and typed like the gradients.
      recurrence: the rows of ``C^-1``, b bands.
      key: typed key, shape ().
      dtype: what noise is sampled as; None for each leaf's own dtype.

    Returns:
      A `NoiseState`: b - 1 slots for every parameter, and some hundred bytes.

    Raises:
      TypeError: a leaf is not floating, or its noise dtype is not one that can be sampled.
    """

    def ring(leaf: Any, ring: jax.ShapeDtypeStruct) -> jax.Array:
        zero = jnp.zeros_like(leaf, dtype=ring.dtype)  # keeps the leaf's sharding
        return jnp.broadcast_to(zero, ring.shape)

    expected = _abstract_state(model, recurrence, jax.random.key_impl(key), dtype)
    return NoiseState(
        _lookahead.init_clock(key, recurrence.coef.shape[0] - 1),
        jax.tree.map(ring, model, expected.buffers),
    )


def correlated_noise(
    grads: Any,
    state: NoiseState,
    recurrence: BandedRecurrence,
    *,
    stddev: jax.typing.ArrayLike,
    key_impl: Any,
    dtype: Any = None,
    implementation: str | None = None,
) -> tuple[Any, NoiseState]:
    """Adds row t of ``C^-1 Z`` to the gradients, Z with i.i.d. rows of Gaussian noise.

    The samples are those of ``jax.random.normal`` on keys split from the state's as jax_privacy
    splits them. Time and memory traffic per step do not depend on the number of bands (see
    _lookahead.py), if the state is donated; otherwise XLA first copies it, b - 1 times the model.

    Args:
      grads: tree of floating arrays.
      state: from `init_correlated_noise` or the step before, for this tree, recurrence and dtype.
      recurrence: the rows of ``C^-1``.
      stddev: standard deviation of Z. May change from step to step: row t of ``C^-1 Z / stddev``
        is scaled by that of step t.
      key_impl: `jax.random.key_impl` of the key that the state was made from.
      dtype: what noise is sampled as; None for each leaf's own dtype.
      implementation: "jax", "cpp", ..., or None for the fastest that takes the arguments.

    Returns:
      The noisy gradients, of the gradients' dtypes, and the next state.

    Raises:
      TypeError: as `init_correlated_noise`.
      ValueError: the state is not one of this tree and recurrence, or the implementation asked for
        cannot run here or cannot take a leaf.
      NotImplementedError: a leaf is sharded over explicit mesh axes; or, when lowered, the
        implementation asked for does not run on the platform.
    """
    name = _dispatch.requested("correlated_noise", IMPLEMENTATIONS, implementation)
    tree: Any
    paths_and_grads, tree = jax.tree_util.tree_flatten_with_path(grads)
    check_like("noise_state", state, _abstract_state(grads, recurrence, key_impl, dtype))
    leaves = _lookahead.plan(
        [grad.shape for _, grad in paths_and_grads],
        [check_noise_dtype(path, grad, dtype) for path, grad in paths_and_grads],
    )
    for path, grad in paths_and_grads:
        _check_sharding(path, grad)
    ahead = _lookahead.looks_ahead(key_impl)

    # For every platform, the implementation of every leaf.
    choices: dict[str, list[str | None]] = {platform: [] for platform in _dispatch.PLATFORMS}
    refusals: list[str] = []
    for leaf, (path, _) in zip(leaves, paths_and_grads, strict=True):
        chosen, refused = _dispatch.candidates(IMPLEMENTATIONS, name, leaf, ahead)
        where = f"leaf {_path(path)}"
        if not chosen:
            raise ValueError(f"no implementation of correlated_noise takes {where}: {refused}")
        refusals += [f"{where}: {reason}" for reason in refused]
        for platform, names in choices.items():
            names.append(chosen.get(platform))
    static = {platform: tuple(names) for platform, names in choices.items() if None not in names}
    asked = f"implementation {name!r}" if name else "no implementation"
    refusal = (
        f"correlated_noise: {asked} runs on this platform; it would on {sorted(static)}"
        + "".join(f"; {reason}" for reason in refusals)
    )

    outs, state = _step(
        leaves,
        ahead,
        key_impl,
        tuple(static.items()),
        refusal,
        # Kernels take coefficients of 32 or 64 bits; the rings' dtype was settled above.
        recurrence.coef.astype(jnp.promote_types(recurrence.coef.dtype, jnp.float32)),
        recurrence.row_scale,
        jnp.asarray(stddev, jnp.result_type(float)),
        [grad for _, grad in paths_and_grads],
        NoiseState(state.clock, jax.tree.leaves(state.buffers)),
    )
    return tree.unflatten(outs), NoiseState(state.clock, tree.unflatten(state.buffers))


# Jitted, so that a call outside jit compiles once.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _step(
    leaves: tuple[Leaf, ...],
    ahead: bool,
    key_impl: Any,
    choices: tuple[tuple[str, tuple[str, ...]], ...],
    refusal: str,
    coef: jax.Array,
    row_scale: jax.Array | None,
    stddev: jax.Array,
    grads: list[jax.Array],
    state: NoiseState,
) -> tuple[list[jax.Array], NoiseState]:
    step = state.clock.step
    keys, clock = _lookahead.tick(state.clock, key_impl)
    # The rings hold noise of standard deviation 1, so that a stddev that changes over time takes
    # effect at once, also on the terms that are ahead.
    scale = stddev if row_scale is None else stddev * row_scale.at[step].get(mode="clip")
    scale = jnp.where(step >= 0, scale, jnp.nan)  # the step has overflowed, or is not one

    def run(names: tuple[str, ...], *arrays: Any) -> tuple[list[jax.Array], list[jax.Array]]:
        *common, grads, rings = arrays
        outs, rings = list(grads), list(rings)
        for name in dict.fromkeys(names):
            # Leaves without elements stay as they are.
            mine = [i for i, leaf in enumerate(leaves) if names[i] == name and leaf.size]
            if not mine:
                continue
            some = ([tree[i] for i in mine] for tree in (leaves, grads, rings))
            some_leaves, some_grads, some_rings = some
            results = IMPLEMENTATIONS[name].run(some_leaves, ahead, *common, some_grads, some_rings)
            for i, out, ring in zip(mine, *results, strict=True):
                outs[i], rings[i] = out, ring
        return outs, rings

    shared = {names: functools.partial(run, names) for _, names in choices}
    outs, rings = _dispatch.per_platform(
        {platform: shared[names] for platform, names in choices},
        refusal,
        step,
        keys,
        coef,
        scale,
        grads,
        state.buffers,
    )
    return outs, NoiseState(clock, rings)


def check_noise_dtype(path: Any, leaf: Any, dtype: Any) -> jnp.dtype:
    """What the noise of a leaf is sampled as: ``dtype``, or the leaf's own if that is None.

    Raises a TypeError, which names the leaf by its path, unless leaf and noise have dtypes of 16 to
    64 bits. As everywhere in JAX, 64 bits mean 32 outside x64 mode.
    """
    if not hasattr(leaf, "dtype"):
        raise TypeError(f"expected leaf {_path(path)} to be an array, found {leaf!r}")
    noise_dtype = jax.dtypes.canonicalize_dtype(leaf.dtype if dtype is None else dtype)
    for what, found in (("gradients", jnp.dtype(leaf.dtype)), ("noise", noise_dtype)):
        if found.name not in _FLOATS:
            raise TypeError(
                f"expected leaf {_path(path)} to have {what} of dtype {', '.join(_FLOATS)}, "
                f"found {found}"
            )
    return noise_dtype


def _abstract_state(
    model: Any, recurrence: BandedRecurrence, key_impl: Any, dtype: Any
) -> NoiseState:
    slots = recurrence.coef.shape[0] - 1

    def ring(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        noise_dtype = check_noise_dtype(path, leaf, dtype)
        # Noise is correlated and scaled in 32 bits at least: in 16, small noise rounds to none.
        ring_dtype = jnp.result_type(noise_dtype, recurrence.coef.dtype, jnp.float32)
        return jax.ShapeDtypeStruct((slots, *leaf.shape), ring_dtype)

    buffers = jax.tree_util.tree_map_with_path(ring, model)
    return NoiseState(_lookahead.abstract_clock(key_impl, slots), buffers)


def _check_sharding(path: Any, leaf: Any) -> None:
    sharding: Any = getattr(jax.typeof(leaf), "sharding", None)
    if any(axis is not None for axis in getattr(sharding, "spec", ())):
        raise NotImplementedError(
            f"leaf {_path(path)} is sharded over explicit mesh axes, {sharding.spec}, which this "
            "version does not support yet; automatic axes work"
        )


def _path(path: Any) -> str:
    return jax.tree_util.keystr(path) or "(the only one)"
