"""Leaves that are spread over the devices of a mesh, and noise ops that run on every device's own.

Nothing is communicated: every device makes the noise of the elements that it has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    SdyShardingRule,
    custom_partitioning,
)
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jax_privacy_kernels._checks import leaf_name
from jax_privacy_kernels._version import __version__

__all__ = [
    "check_laid_out",
    "check_mesh",
    "check_summed_up",
    "common_mesh",
    "over_automatic_axes",
    "over_explicit_axes",
    "rows_like",
    "sharding_of",
    "zeros",
]

# run(inputs, places) -> (outs, rings), a noise op on what one device has of the leaves. Inputs are
# NoiseInputs; places are those of the blocks of each leaf, a number for every dimension.
_Run = Callable[[Any, Sequence[Any]], Any]


def common_mesh(xs: Sequence[Any]) -> Any:
    """The first mesh whose explicit axes the type of one of the arrays is spread over, or None."""
    meshes = (_explicit_mesh(x) for x in xs)
    return next((mesh for mesh in meshes if mesh is not None), None)


def _explicit_mesh(x: Any) -> Any:
    """The mesh that the type of x is spread over explicit axes of, or None."""
    mesh = jax.typeof(x).sharding.mesh
    return mesh if AxisType.Explicit in mesh.axis_types else None


def _spec(x: Any) -> PartitionSpec:
    """How an array is laid out over explicit axes, an entry for every dimension."""
    if _explicit_mesh(x) is None:
        return PartitionSpec(*[None] * np.ndim(x))
    return _full(jax.typeof(x).sharding.spec, np.ndim(x))


def sharding_of(x: Any) -> NamedSharding | None:
    """How x, an array or a ShapeDtypeStruct, is laid out over a mesh, as far as that is known."""
    if isinstance(x, jax.core.Tracer):
        return None if _explicit_mesh(x) is None else jax.typeof(x).sharding
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


def check_summed_up(grads: Any) -> None:
    """Raises a ValueError if a gradient has yet to be summed up over explicit mesh axes."""
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        if _explicit_mesh(grad) is not None and (axes := jax.typeof(grad).sharding.spec.unreduced):
            raise ValueError(
                f"expected the gradient of leaf {leaf_name(path)} to be summed up, found it "
                f"unreduced over the mesh axes {sorted(axes)}"
            )


def check_mesh(grads: Any, keys: Any) -> None:
    """Raises a ValueError if the types of a gradient and of the keys name two explicit meshes."""
    found = _explicit_mesh(keys)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        mesh = _explicit_mesh(grad)
        if None not in (mesh, found) and mesh != found:
            raise ValueError(
                f"expected the noise_state to be on the mesh of leaf {leaf_name(path)}, "
                f"{dict(mesh.shape)}, found it on {dict(found.shape)}"
            )


def check_laid_out(path: Any, grad: Any, ring: Any) -> None:
    """Raises a ValueError unless the types of a leaf's gradient and ring lay them out alike."""
    on_mesh = [_explicit_mesh(x) for x in (grad, ring)]
    specs = PartitionSpec(None, *_spec(grad)), _spec(ring)
    # An array that is on no mesh yet will be replicated.
    if (None not in on_mesh and on_mesh[0] != on_mesh[1]) or specs[0] != specs[1]:
        described = [
            "no explicit mesh" if mesh is None else f"{dict(mesh.shape)} as {spec}"
            for mesh, spec in zip(on_mesh, specs, strict=True)
        ]
        raise ValueError(
            f"expected the noise_state of leaf {leaf_name(path)} to be laid out as its gradient "
            f"is, over {described[0]}; found it over {described[1]}"
        )


def over_explicit_axes(run: _Run, mesh: Any, inputs: Any) -> Any:
    """The op on every device's own blocks, as the types of the gradients split them."""
    specs = [_spec(grad) for grad in inputs.grads]
    ring_specs = [PartitionSpec(None, *_spec(grad)) for grad in inputs.grads if inputs.rings]
    axes = {
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    }
    shared = dataclasses.replace(inputs, grads=[], rings=[])

    def here(shared: Any, grads: Any, rings: Any) -> Any:
        places = [_place(entries) for entries in specs]
        return tuple(run(dataclasses.replace(shared, grads=grads, rings=rings), places))

    mapped = jax.shard_map(
        here,
        mesh=mesh,
        axis_names=axes,
        in_specs=(PartitionSpec(), specs, ring_specs),
        out_specs=(specs, ring_specs),
        check_vma=False,
    )
    return mapped(shared, inputs.grads, inputs.rings)


def over_automatic_axes(run: _Run, described: str, inputs: Any) -> Any:
    """The op on every device's own blocks, which XLA's partitioner names when it has chosen them.

    Args:
      run: the op.
      described: all that the op depends on beside the inputs and the configuration. XLA sees
        nothing of it but this, and compares programs by what it sees where it caches them.
      inputs: `NoiseInputs`.
    """
    config = _config()
    shared: Any
    tree: Any
    shared, tree = jax.tree.flatten(dataclasses.replace(inputs, grads=[], rings=[]))
    key_types = [
        jax.random.key_impl(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else None
        for x in shared
    ]
    data = [
        x if kind is None else jax.random.key_data(x)
        for x, kind in zip(shared, key_types, strict=True)
    ]
    constants = [getattr(inputs, name) for name in inputs.static_fields]
    everything = repr((__version__, described, constants, config, key_types))
    name = hashlib.sha256(everything.encode()).digest()
    data.append(jnp.asarray(np.frombuffer(name, np.uint32)))
    # Closures outlive the trace: they must not hold its arrays.
    operands = len(data)

    def here(layouts: Sequence[_Layout], data: Any, grads: Any, rings: Any) -> Any:
        # What is traced here runs on one device: no array has a place on the mesh of the caller.
        with _configured(config), jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
            shared = [
                x if kind is None else jax.random.wrap_key_data(x, impl=kind)
                for x, kind in zip(data[:-1], key_types, strict=True)
            ]
            inputs = dataclasses.replace(tree.unflatten(shared), grads=grads, rings=rings)
            return tuple(run(inputs, [layout.place() for layout in layouts]))

    def partition(mesh: Any, arguments: Any, _: Any) -> Any:
        layouts = [_Layout(grad, mesh) for grad in arguments[1]]
        rows = [layout.rows() for layout in layouts if arguments[2]]
        results = [layout.sharding for layout in layouts], rows
        replicated = [_Layout.whole(mesh)] * operands
        return mesh, functools.partial(here, layouts), results, (replicated, *results)

    def infer(mesh: Any, arguments: Any, _: Any) -> Any:  # Shardy has the rule in its place
        return partition(mesh, arguments, _)[2]

    def shapes_alone(data: Any, grads: Any, rings: Any) -> Any:
        del data
        return grads, rings

    spread = custom_partitioning(shapes_alone)
    # Not decoded: XLA may split a dimension over part of a mesh axis, which no spec can say.
    rule = _rule([x.ndim for x in data], [x.ndim for x in inputs.grads], bool(inputs.rings))
    spread.def_partition(partition, infer, sharding_rule=rule, decode_shardings=False)
    return spread(data, inputs.grads, inputs.rings)


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
    with (
        jax.enable_x64(config[0]),
        jax.threefry_partitionable(config[1]),
        jax.numpy_dtype_promotion("standard"),
    ):
        if _config() != config:
            raise ValueError(
                f"expected jax_accurate_erf_inv={config[2]}, as when the noise was traced, "
                f"found {not config[2]} where it is compiled"
            )
        yield


def _rule(data: Sequence[int], grads: Sequence[int], rings: bool) -> SdyShardingRule:
    """Every leaf may be laid out in its own way, its gradient and the rows of its ring alike.

    ``data`` and ``grads`` are numbers of dimensions.
    """
    factors = [[f"l{leaf}_{d}" for d in range(ndim)] for leaf, ndim in enumerate(grads)]
    rows = [f"r{leaf}" for leaf in range(len(grads)) if rings]
    whole = [[f"c{i}_{d}" for d in range(ndim)] for i, ndim in enumerate(data)]
    leaves = [ArrayMapping(*names) for names in factors]
    leaves += [ArrayMapping(row, *names) for row, names in zip(rows, factors, strict=False)]
    return SdyShardingRule(
        (*(ArrayMapping(*names) for names in whole), *leaves),
        tuple(leaves),
        need_replication_factors=(*(name for names in whole for name in names), *rows),
    )


def _place(entries: PartitionSpec) -> list[Any]:
    """Which block of a leaf is here, along every dimension."""
    return [0 if axes is None else jax.lax.axis_index(axes) for axes in entries]


def _full(entries: PartitionSpec, ndim: int) -> PartitionSpec:
    return PartitionSpec(*entries, *[None] * (ndim - len(entries)))
