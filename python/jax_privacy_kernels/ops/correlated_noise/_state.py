"""The state of correlated noise: the keys that its filter needs, and a ring for every leaf."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jax_privacy_kernels.ops import _once, _partition
from jax_privacy_kernels.ops._leaves import Leaf
from jax_privacy_kernels.ops._state import Clock, NoiseState, abstract_kind, key_words, kind_of
from jax_privacy_kernels.ops.correlated_noise._filters import Filter

__all__ = ["abstract_state", "init_state", "kind", "tick", "unstarted"]


def kind(filter: Filter, key_impl: Any, leaves: tuple[Leaf, ...]) -> str:
    """The name of the kind of a state."""
    schedule = "ahead" if filter.ahead else "plain"
    sizes = f"slots{filter.slots}"
    if filter.buffers:
        sizes += f"_buffers{filter.buffers}"
    if filter.behind:
        sizes += f"_samples{filter.behind + 1}"
    changing = "_changing_stddev" if filter.varying else ""
    return kind_of(f"{filter.name}_{schedule}_{sizes}{changing}", key_impl, leaves)


def abstract_state(
    tree: Any, leaves: tuple[Leaf, ...], filter: Filter, key_impl: Any
) -> NoiseState:
    """Shapes and dtypes of a state, for leaves of a tree of that structure."""
    struct: Any = jax.ShapeDtypeStruct
    stddevs: Any = ()
    if filter.varying and filter.behind:
        dtype = jnp.result_type(jnp.float32, *(leaf.dtype for leaf in leaves))
        stddevs = struct((filter.behind,), dtype)
    rings = [struct((filter.rows, *leaf.shape), leaf.dtype) for leaf in leaves]
    clock = Clock(
        step=struct((), jnp.int32),
        keys=struct((filter.keys + 1, *key_words(key_impl)), jnp.uint32),
        stddevs=stddevs,
        kind=abstract_kind(kind(filter, key_impl, leaves)),
    )
    return NoiseState(clock, jax.tree.unflatten(tree, rings) if filter.rows else ())


def init_state(
    model: Any, leaves: tuple[Leaf, ...], filter: Filter, key: jax.Array, fingerprint: Any
) -> NoiseState:
    """The state before step 0, its rings laid out as the leaves of the model are."""
    key_impl = jax.random.key_impl(key)
    data, _ = _once.mark_tree(jax.random.key_data(key), model)
    keys = _first_keys(filter.behind, filter.keys, key_impl, data)
    return _at_rest(model, leaves, filter, key_impl, keys, jnp.zeros((), jnp.int32), fingerprint)


def unstarted(
    state: NoiseState,
    grads: Any,
    leaves: tuple[Leaf, ...],
    filter: Filter,
    key_impl: Any,
    fingerprint: Any,
) -> NoiseState:
    """A state before step 0 of the filter with look-ahead, as one of the filter without.

    Before step 0 a state holds nothing but keys, of which both have the same.
    """
    keys, step = state.clock.keys, state.clock.step
    return _at_rest(grads, leaves, filter, key_impl, keys, step, fingerprint)


def _at_rest(
    model: Any,
    leaves: tuple[Leaf, ...],
    filter: Filter,
    key_impl: Any,
    keys: jax.Array,
    step: jax.Array,
    fingerprint: Any,
) -> NoiseState:
    """A state that remembers no samples."""
    expected = abstract_state(jax.tree.structure(model), leaves, filter, key_impl)

    def ring(leaf: Any, ring: jax.ShapeDtypeStruct) -> jax.Array:
        return _partition.zeros(ring.shape, ring.dtype, _partition.rows_like(leaf))

    ((name, _),) = expected.clock.kind.items()
    clock = Clock(
        step=step,
        keys=keys,
        stddevs=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), expected.clock.stddevs),
        kind={name: jnp.asarray(fingerprint)},
    )
    return NoiseState(clock, jax.tree.map(ring, model, expected.inner) if filter.rows else ())


def tick(
    clock: Clock, key_impl: Any, filter: Filter, stddev: jax.Array
) -> tuple[jax.Array, jax.Array | None, Clock]:
    """The keys and stddevs to sample step t with, and the clock before step t + 1.

    The keys are typed, ``[behind + filter.steps]``: those of steps t - behind ..
    t + filter.steps - 1. The stddevs are those of the same steps, for a stddev that may change;
    else None.
    """
    key, subkey = jax.random.split(jax.random.wrap_key_data(clock.keys[-1], impl=key_impl))
    stored, subkey, key = clock.keys[:-1], jax.random.key_data(subkey), jax.random.key_data(key)
    known = jnp.concatenate([stored, subkey[None]])
    keys = jax.random.wrap_key_data(known[: filter.behind + filter.steps], impl=key_impl)
    stddevs, history = None, clock.stddevs
    if filter.varying:
        stddevs = stddev[None]
        if filter.behind:
            stddevs = jnp.concatenate([history, stddevs.astype(history.dtype)])
            history = stddevs[1:]
    after = Clock(clock.step + 1, jnp.concatenate([known[1:], key[None]]), history, clock.kind)
    return keys, stddevs, after


# Jitted, so that all states of a size share what is compiled.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _first_keys(behind: int, stored: int, key_impl: Any, data: jax.Array) -> jax.Array:
    def split(key: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        key, subkey = jax.random.split(key)
        return key, jax.random.key_data(subkey)

    key = jax.random.wrap_key_data(data, impl=key_impl)
    before = jnp.zeros((behind, *data.shape), data.dtype)
    if stored == behind:  # no scan of no steps where jit is disabled
        return jnp.concatenate([before, jax.random.key_data(key)[None]])
    key, to_come = jax.lax.scan(split, key, length=stored - behind)
    return jnp.concatenate([before, to_come, jax.random.key_data(key)[None]])
