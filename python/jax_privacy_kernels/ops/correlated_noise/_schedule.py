"""The look-ahead schedule and the state of correlated noise, shared by all implementations.

A strategy of b bands needs S = b - 1 terms of history. Each leaf keeps them in a ring of S slots,
x_tau in slot tau mod S. Computing x_t needs every slot; but once they are loaded, x_t .. x_{t+S-1}
can be computed too, each into the slot whose term it no longer needs, and the next S steps read
one slot each. The visits are spread over the steps:

* A leaf is cut, in row-major order, into tiles of ``TILE`` elements (the last may be shorter). If
  it is spread over devices, these are the tiles of all of it, and a device may have parts of them.
  Tile q has phase ``(q + floor(q / S) + first_tile) mod S``, where first_tile counts the tiles of
  the leaves before it: every S tiles have all phases, and where rows are split over devices, each
  device has tiles of all phases, though a row have S tiles.
* At step t the tiles with phase ``t mod S`` are *refreshed*: their slots get x_t .. x_{t+S-1}.
* At the first S - 1 steps, tiles with phase > t *warm up*: slot t gets x_t. Slots not yet written
  are 0.
* Then x_t stands in slot ``t mod S`` of every tile.

Other noising matrices follow the same schedule, for as many slots as one likes: a moving average
makes its terms from samples alone, some of them of steps gone by, made again from their keys;
buffers stand in rows of the ring before the slots, as they are before the first step that the tile
has not made yet. Without slots, all tiles make x_t at step t and nothing of it is kept.

A key whose bits are not a function of the element's index alone (any but threefry2x32 with
``jax_threefry_partitionable``) cannot be sampled tile by tile. Its schedule is the plain one: at
every step all tiles compute x_t, recurrences into slot ``t mod S``, the others without slots. The
state then has no keys of future steps, so the two kinds of state have different shapes.

What a slot holds at step t therefore depends on this schedule: it is the meaning of the state, and
every implementation follows it exactly.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_privacy_kernels.ops._counter_prng import looks_ahead
from jax_privacy_kernels.ops._shards import Shard, Words
from jax_privacy_kernels.ops.correlated_noise._matrices import Layout

__all__ = [
    "TILE",
    "Clock",
    "Leaf",
    "NoiseState",
    "abstract_clock",
    "abstract_kind",
    "init_clock",
    "looks_ahead",
    "plan",
    "tick",
    "tile_of",
]

TILE = 1024
_FILTERS = ("recurrence", "moving_average", "row", "buffers", "inverse_buffers")


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

    The buffers hold noise of steps to come, and the clock says which: they belong together, and to
    one noising matrix. Save and restore them as one. Clocks and buffers of different steps, or of
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


def abstract_kind(key_impl: Any, layout: Layout) -> jax.ShapeDtypeStruct:
    """`NoiseState.kind` for keys of a type."""
    key_type = zlib.crc32(str(key_impl).encode()) % 2**16
    _, ahead, slots, hidden, behind = layout
    index = _FILTERS.index(layout.filter)
    shape = (0, index, int(ahead), slots, hidden, behind, key_type)
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What is static about one leaf of the tree.

    Attributes:
      index: its position among the leaves, in flattening order.
      count: the number of leaves in the tree.
      shape: of all of it.
      first_tile: the number of tiles in the leaves before it.
      noise_dtype: what its noise is sampled as.
      shard: what is here of it.
    """

    index: int
    count: int
    shape: tuple[int, ...]
    first_tile: int
    noise_dtype: jnp.dtype
    shard: Shard

    @property
    def size(self) -> int:
        """The number of elements of all of it."""
        return math.prod(self.shape)

    @property
    def whole(self) -> bool:
        """Whether all of it is here."""
        return self.shard == Shard(self.size)


def plan(shapes: Sequence[tuple[int, ...]], noise_dtypes: Sequence[jnp.dtype]) -> tuple[Leaf, ...]:
    """The leaves of a tree, from their shapes and noise dtypes in flattening order."""
    leaves: list[Leaf] = []
    first_tile = 0
    for index, (shape, dtype) in enumerate(zip(shapes, noise_dtypes, strict=True)):
        size = math.prod(shape)
        leaves.append(Leaf(index, len(shapes), shape, first_tile, jnp.dtype(dtype), Shard(size)))
        first_tile += -(-size // TILE)
    return tuple(leaves)


def tile_of(index: Words) -> jax.Array:
    """The tiles that elements of a leaf are in, uint32, by their indices of less than 2^42."""
    return index[0] * (2**32 // TILE) + index[1] // TILE


def abstract_clock(key_impl: Any, layout: Layout) -> Clock:
    """Shapes and dtypes of a clock."""
    words = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=key_impl))).shape
    stored = layout.behind + (layout.steps if layout.ahead else 0)
    struct: Any = jax.ShapeDtypeStruct
    return Clock(
        struct((), jnp.int32), struct(words, jnp.uint32), struct((stored, *words), jnp.uint32)
    )


def init_clock(key: jax.Array, layout: Layout) -> Clock:
    """The clock before step 0, for a typed key of shape ()."""
    clock = abstract_clock(jax.random.key_impl(key), layout)
    subkeys = jnp.zeros(clock.subkeys.shape, clock.subkeys.dtype)

    def split(key: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        key, subkey = jax.random.split(key)
        return key, jax.random.key_data(subkey)

    if layout.ahead:
        key, to_come = jax.lax.scan(split, key, length=layout.steps)
        subkeys = subkeys.at[layout.behind :].set(to_come)
    # A copy: the state is there to be donated, the caller's key is not.
    return Clock(jnp.zeros((), jnp.int32), jnp.copy(jax.random.key_data(key)), subkeys)


def tick(clock: Clock, key_impl: Any, layout: Layout) -> tuple[jax.Array, Clock]:
    """The keys to sample step t with, and the clock before step t + 1.

    The keys are typed, ``[behind + layout.steps]``: those of steps t - behind .. t + max(S, 1) - 1,
    or up to t for the plain schedule.
    """
    key, subkey = jax.random.split(jax.random.wrap_key_data(clock.key, impl=key_impl))
    known = jnp.concatenate([clock.subkeys, jax.random.key_data(subkey)[None]])
    now = clock.subkeys if layout.ahead else known
    keys = jax.random.wrap_key_data(now, impl=key_impl)
    return keys, Clock(clock.step + 1, jax.random.key_data(key), known[1:])
