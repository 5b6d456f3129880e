"""The state of correlated noise: where its stream stands, and what the leaves keep."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_privacy_kernels.ops import _partition
from jax_privacy_kernels.ops._leaves import Leaf
from jax_privacy_kernels.ops.correlated_noise._filters import (
    BufferedFilter,
    Filter,
    InverseBufferedFilter,
    MovingAverageFilter,
    RecurrenceFilter,
)

__all__ = ["Clock", "NoiseState", "abstract_state", "init_state", "tick"]

_FILTERS: tuple[type[Filter] | None, ...] = (
    RecurrenceFilter,
    MovingAverageFilter,
    None,  # once dense rows
    BufferedFilter,
    InverseBufferedFilter,
)


class Clock(NamedTuple):
    """Where the noise stream stands before step t. Plain arrays, kw words of key data per key.

    Attributes:
      step: int32 scalar, t.
      key: ``[kw]`` uint32, data of the key that steps t + max(S, 1) and later are split from (t and
        later, for the plain schedule).
      subkeys: ``[behind + max(S, 1), kw]`` uint32, data of the keys of steps t - behind ..
        t + max(S, 1) - 1 (``[behind, kw]``, up to step t - 1, for the plain schedule); zeros for
        steps before the first.
    """

    step: jax.Array
    key: jax.Array
    subkeys: jax.Array


class NoiseState(NamedTuple):
    """State of a correlated-noise privatizer before a step.

    The rings hold noise of steps to come, and the clock says which: they belong together, and to
    one noising matrix. Save and restore them as one. Clocks and rings of different steps, or of
    matrices of one kind and size with other coefficients, fit and cannot be told apart.

    Attributes:
      kind: an empty array whose shape says what kind of noising matrix and key the state is of.
      clock: the `Clock`.
      buffers: mirrors the parameters; each leaf the ring, ``(rows,) + shape``.
      samples: mirrors the parameters, each leaf an empty array of the dtype that its noise is
        sampled as, where samples of the past are made again; there they must be the same. Else ().
    """

    kind: jax.Array
    clock: Clock
    buffers: Any
    samples: Any


def abstract_state(
    tree: Any, leaves: tuple[Leaf, ...], filter: Filter, key_impl: Any
) -> NoiseState:
    """Shapes and dtypes of a state, for leaves of a tree of that structure."""
    struct: Any = jax.ShapeDtypeStruct
    rings = [struct((filter.rows, *leaf.shape), leaf.dtype) for leaf in leaves]
    samples = [struct((0,), leaf.noise_dtype) for leaf in leaves]
    return NoiseState(
        _abstract_kind(key_impl, filter),
        _abstract_clock(key_impl, filter),
        jax.tree.unflatten(tree, rings),
        jax.tree.unflatten(tree, samples) if filter.behind else (),
    )


def init_state(model: Any, leaves: tuple[Leaf, ...], filter: Filter, key: jax.Array) -> NoiseState:
    """The state before step 0, its rings laid out as the leaves of the model are."""
    expected = abstract_state(jax.tree.structure(model), leaves, filter, jax.random.key_impl(key))

    def ring(leaf: Any, ring: jax.ShapeDtypeStruct) -> jax.Array:
        return _partition.zeros(ring.shape, ring.dtype, _partition.rows_like(leaf))

    return NoiseState(
        jnp.zeros(expected.kind.shape, expected.kind.dtype),
        _init_clock(key, filter),
        jax.tree.map(ring, model, expected.buffers),
        jax.tree.map(lambda empty: jnp.zeros(empty.shape, empty.dtype), expected.samples),
    )


def tick(clock: Clock, key_impl: Any, filter: Filter) -> tuple[jax.Array, Clock]:
    """The keys to sample step t with, and the clock before step t + 1.

    The keys are typed, ``[behind + filter.steps]``: those of steps t - behind ..
    t + filter.steps - 1.
    """
    key, subkey = jax.random.split(jax.random.wrap_key_data(clock.key, impl=key_impl))
    known = jnp.concatenate([clock.subkeys, jax.random.key_data(subkey)[None]])
    now = clock.subkeys if filter.ahead else known
    keys = jax.random.wrap_key_data(now, impl=key_impl)
    return keys, Clock(clock.step + 1, jax.random.key_data(key), known[1:])


def _abstract_kind(key_impl: Any, filter: Filter) -> Any:
    key_type = zlib.crc32(str(key_impl).encode()) % 2**16
    index = _FILTERS.index(type(filter))
    numbers = int(filter.ahead), filter.slots, filter.buffers, filter.behind
    return jax.ShapeDtypeStruct((0, index, *numbers, key_type), jnp.float32)


def _abstract_clock(key_impl: Any, filter: Filter) -> Clock:
    words = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=key_impl))).shape
    stored = filter.behind + (filter.steps if filter.ahead else 0)
    struct: Any = jax.ShapeDtypeStruct
    return Clock(
        struct((), jnp.int32), struct(words, jnp.uint32), struct((stored, *words), jnp.uint32)
    )


def _init_clock(key: jax.Array, filter: Filter) -> Clock:
    clock = _abstract_clock(jax.random.key_impl(key), filter)
    subkeys = jnp.zeros(clock.subkeys.shape, clock.subkeys.dtype)

    def split(key: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        key, subkey = jax.random.split(key)
        return key, jax.random.key_data(subkey)

    if filter.ahead:
        key, to_come = jax.lax.scan(split, key, length=filter.steps)
        subkeys = subkeys.at[filter.behind :].set(to_come)
    # A copy: the state is there to be donated, the caller's key is not.
    return Clock(jnp.zeros((), jnp.int32), jnp.copy(jax.random.key_data(key)), subkeys)
