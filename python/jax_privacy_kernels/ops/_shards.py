"""Leaves that are spread over devices: which elements are here, and how a step runs on them.

The noise of an element is a function of its index in the leaf, so that every device makes the noise
of its own shards, and no device needs to hear of another.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    SdyShardingRule,
    custom_partitioning,
)
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

__all__ = [
    "Shard",
    "Words",
    "explicit_mesh",
    "first",
    "indices",
    "over_automatic_axes",
    "over_explicit_axes",
    "plus",
    "rows_like",
    "shard",
    "sharding_of",
    "spec",
    "unreduced",
    "zeros",
]

Words = tuple[jax.Array, jax.Array]  # the high and the low 32 bits of numbers, uint32


class Shard(NamedTuple):
    """Some elements of a leaf, but for the first of them. Static.

    They are runs of elements that follow each other in the leaf, one for each place on the axes.

    Attributes:
      run: the elements of a run.
      axes: the outermost first, how many places, and how many elements of the leaf from each to
        the next.
    """

    run: int
    axes: tuple[tuple[int, int], ...] = ()

    @property
    def size(self) -> int:
        return self.run * math.prod(count for count, _ in self.axes)


def shard(shape: Sequence[int], local: Sequence[int]) -> Shard:
    """The shard that a block of shape ``local`` is of a leaf of ``shape``, both in row-major order.

    Blocks may reach beyond the leaf, as the last one does where blocks do not divide it.
    """
    axes: list[tuple[int, int]] = []
    run = stride = 1
    whole = True  # so far, from the innermost dimension on
    for size, count in zip(reversed(shape), reversed(local), strict=True):
        if whole:
            run *= count
        elif axes and axes[-1][0] * axes[-1][1] == stride:
            axes[-1] = (axes[-1][0] * count, axes[-1][1])
        elif count > 1:
            axes.append((count, stride))
        whole = whole and count == size
        stride *= size
    return Shard(run, tuple(reversed(axes)))


def first(shape: Sequence[int], local: Sequence[int], place: Sequence[Any]) -> Words:
    """The index in the leaf of the first element of a block, at that place among the blocks."""
    total = (jnp.uint32(0), jnp.uint32(0))
    stride = 1
    for size, count, at in zip(reversed(shape), reversed(local), reversed(place), strict=True):
        if not isinstance(at, int) or at:
            total = plus(total, _times(jnp.asarray(at).astype(jnp.uint32), count * stride))
        stride *= size
    return total


def indices(shard: Shard, first: Words) -> Words:
    """The indices in the leaf of all elements of a shard, ``[shard.size]``."""
    shape = (*(count for count, _ in shard.axes), shard.run)
    total = first
    for dimension, stride in enumerate([*(stride for _, stride in shard.axes), 1]):
        place = jax.lax.broadcasted_iota(jnp.uint32, shape, dimension)
        total = plus(total, _times(place, stride))
    return total[0].reshape(-1), total[1].reshape(-1)


def plus(x: Words, y: Words) -> Words:
    """x + y modulo 2^64."""
    lo = x[1] + y[1]
    return x[0] + y[0] + (lo < y[1]).astype(jnp.uint32), lo


def _times(x: jax.Array, factor: int) -> Words:
    """x factor modulo 2^64, by halves of words."""
    high, low = np.uint32(factor >> 32), np.uint32(factor & 0xFFFFFFFF)
    x0, x1, y0, y1 = x & 0xFFFF, x >> 16, low & 0xFFFF, low >> 16
    middle = ((x0 * y0) >> 16) + ((x0 * y1) & 0xFFFF) + ((x1 * y0) & 0xFFFF)
    carried = x1 * y1 + ((x0 * y1) >> 16) + ((x1 * y0) >> 16) + (middle >> 16)
    return carried + x * high, x * low


# -- Over the devices of a mesh ---------------------------------------------------------------

# A step on what is here: run(places, common, grads, rings) -> (outs, rings). Places are those of
# the blocks of each leaf, a number for every dimension; common is the same on all devices.
_Run = Callable[[Sequence[Any], Any, list[jax.Array], list[jax.Array]], Any]


def explicit_mesh(x: Any) -> Any:
    """The mesh that the type of x is spread over explicit axes of, or None."""
    mesh = jax.typeof(x).sharding.mesh
    return mesh if AxisType.Explicit in mesh.axis_types else None


def spec(x: Any) -> PartitionSpec:
    """How an array is laid out over explicit axes, an entry for every dimension."""
    if explicit_mesh(x) is None:
        return PartitionSpec(*[None] * np.ndim(x))
    return _full(jax.typeof(x).sharding.spec, np.ndim(x))


def sharding_of(x: Any) -> NamedSharding | None:
    """How x, an array or a ShapeDtypeStruct, is laid out over a mesh, as far as that is known."""
    if isinstance(x, jax.core.Tracer):
        return None if explicit_mesh(x) is None else jax.typeof(x).sharding
    sharding = getattr(x, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def rows_like(x: Any) -> NamedSharding | None:
    """The sharding of ``[.., *x.shape]`` with every row laid out as x, as far as that is known."""
    sharding = sharding_of(x)
    if sharding is None:
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))


def zeros(shape: Sequence[int], dtype: Any, sharding: NamedSharding | None) -> jax.Array:
    """Zeros that are laid out so, inside of traces and outside."""
    if sharding is None or isinstance(sharding.mesh, Mesh):
        return jnp.zeros(shape, dtype, device=sharding)
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), sharding)
    # jnp.zeros would forget it where no mesh is set.
    return jax.sharding.reshard(jnp.zeros(shape, dtype), sharding)


def over_explicit_axes(run: _Run, mesh: Any, common: Any, grads: Any, rings: Any) -> Any:
    """The step on every device's own shards, which the types of the gradients say."""
    specs = [spec(grad) for grad in grads]
    ring_specs = [PartitionSpec(None, *entries) for entries in specs]
    axes = {
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    }

    def here(common: Any, grads: Any, rings: Any) -> Any:
        return run([_place(entries) for entries in specs], common, grads, rings)

    mapped = jax.shard_map(
        here,
        mesh=mesh,
        axis_names=axes,
        in_specs=(PartitionSpec(), specs, ring_specs),
        out_specs=(specs, ring_specs),
        check_vma=False,
    )
    return mapped(common, grads, rings)


def over_automatic_axes(run: _Run, described: str, common: Any, grads: Any, rings: Any) -> Any:
    """The step on every device's own shards, which XLA's partitioner says when it has chosen them.

    Args:
      run: the step.
      described: all that the step depends on beside its arguments and the configuration. XLA sees
        nothing of it but this, and compares programs by what it sees where it caches them.
      common, grads, rings: arguments of run.
    """
    config = _config()
    key_types = [
        jax.random.key_impl(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else None
        for x in common
    ]
    data = [
        x if kind is None else jax.random.key_data(x)
        for x, kind in zip(common, key_types, strict=True)
    ]
    name = hashlib.sha256(repr((described, config, key_types)).encode()).digest()
    data.append(jnp.asarray(np.frombuffer(name, np.uint32)))

    def here(layouts: Sequence[_Layout], data: Any, grads: Any, rings: Any) -> Any:
        with _configured(config):
            common = [
                x if kind is None else jax.random.wrap_key_data(x, impl=kind)
                for x, kind in zip(data[:-1], key_types, strict=True)
            ]
            return run([layout.place() for layout in layouts], common, grads, rings)

    def partition(mesh: Any, arguments: Any, _: Any) -> Any:
        layouts = [_Layout(grad, mesh) for grad in arguments[1]]
        results = [x.sharding for x in layouts], [x.rows() for x in layouts]
        return (
            mesh,
            functools.partial(here, layouts),
            results,
            ([_Layout.whole(mesh) for _ in data], *results),
        )

    def infer(mesh: Any, arguments: Any, _: Any) -> Any:  # what Shardy has the rule for
        return partition(mesh, arguments, _)[2]

    def shapes_alone(data: Any, grads: Any, rings: Any) -> Any:
        del data
        return grads, rings

    spread = custom_partitioning(shapes_alone)
    # Not decoded: XLA may split a dimension over part of a mesh axis, which no spec can say.
    rule = _rule(data, grads)
    spread.def_partition(partition, infer, sharding_rule=rule, decode_shardings=False)
    return spread(data, grads, rings)


class _Layout:
    """How XLA has laid a leaf out over the devices of a mesh."""

    def __init__(self, leaf: Any, mesh: Any) -> None:
        self.sharding, self._mesh, self._ndim = leaf.sharding, mesh, len(leaf.shape)
        self._hlo = leaf.sharding._to_xla_hlo_sharding(self._ndim)
        self._tiled = self._hlo.is_tiled()
        if not self._tiled:
            self.sharding = self.whole(mesh)

    @staticmethod
    def whole(mesh: Any) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec())

    def place(self) -> list[Any]:
        """Which block of the leaf is here, along every dimension."""
        if not self._tiled:
            return [0] * self._ndim
        places = np.zeros((self._mesh.size, self._ndim), np.int32)
        tiles = tuple(self._hlo.tile_assignment_dimensions())  # and then of replicas
        devices = np.reshape(self._hlo.tile_assignment_devices(), tiles)
        for place, device in np.ndenumerate(devices):
            places[device] = place[: self._ndim]
        return list(jnp.asarray(places)[jax.lax.axis_index(self._mesh.axis_names)])

    def rows(self) -> Any:
        """The sharding of a ring, every row of which is laid out as the leaf."""
        if not self._tiled:
            return self.sharding
        proto = self._hlo.to_proto()
        proto.tile_assignment_dimensions = [1, *proto.tile_assignment_dimensions]
        hlo = type(self._hlo).from_proto(proto)
        return type(self.sharding)(tuple(self._mesh.devices.flat), hlo)


def _config() -> tuple[bool, bool, bool]:
    """What of JAX's configuration noise depends on."""
    names = "jax_enable_x64", "jax_threefry_partitionable", "jax_accurate_erf_inv"
    x64, partitionable, accurate = (bool(getattr(jax.config, name, False)) for name in names)
    return x64, partitionable, accurate


@contextlib.contextmanager
def _configured(config: tuple[bool, bool, bool]) -> Iterator[None]:
    """The configuration that a step was traced in, wherever it is compiled."""
    with jax.enable_x64(config[0]), jax.threefry_partitionable(config[1]):
        if _config() != config:
            raise ValueError(
                f"expected jax_accurate_erf_inv={config[2]}, as when correlated_noise was traced, "
                f"found {not config[2]} where it is compiled"
            )
        yield


def _rule(data: Any, grads: Any) -> SdyShardingRule:
    """Every leaf may be laid out in its own way, its gradient and the rows of its ring alike."""
    factors = [[f"l{leaf}_{d}" for d in range(grad.ndim)] for leaf, grad in enumerate(grads)]
    rows = [f"r{leaf}" for leaf in range(len(grads))]
    whole = [[f"c{i}_{d}" for d in range(x.ndim)] for i, x in enumerate(data)]
    leaves = [ArrayMapping(*names) for names in factors]
    leaves += [ArrayMapping(row, *names) for row, names in zip(rows, factors, strict=True)]
    return SdyShardingRule(
        (*(ArrayMapping(*names) for names in whole), *leaves),
        tuple(leaves),
        need_replication_factors=(*(name for names in whole for name in names), *rows),
    )


def unreduced(x: Any) -> frozenset[str]:
    """The explicit mesh axes over which x has yet to be summed up."""
    return frozenset() if explicit_mesh(x) is None else jax.typeof(x).sharding.spec.unreduced


def _place(entries: PartitionSpec) -> list[Any]:
    """Which block of a leaf is here, along every dimension."""
    return [0 if axes is None else jax.lax.axis_index(axes) for axes in entries]


def _full(entries: PartitionSpec, ndim: int) -> PartitionSpec:
    return PartitionSpec(*entries, *[None] * (ndim - len(entries)))
