"""Arrays made evenly on all devices of a mesh, and brought to where they are wanted.

Noise is sampled for every parameter, and its history takes several times the model's memory. Where
parameters are replicated, so would noise be. With zero redundancy (ZeRO,
https://arxiv.org/abs/1910.02054) each device makes and keeps its share of the whole once, and hands
over what the gradients need:

    >>> devices = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(AxisType.Explicit,))
    >>> with jax.set_mesh(devices):
    ...     grad = jnp.zeros((8, 3))
    ...     like = flatten_with_zero_redundancy(grad)  # 1-D, split over all devices
    ...     key = jax.random.key(0)
    ...     noise = jax.random.normal(key, like.shape, like.dtype, out_sharding=like.sharding)
    ...     noisy_grad = local_reshape_add(grad, noise)
    >>> noisy_grad.shape
    (8, 3)

https://arxiv.org/abs/2405.15913 and https://arxiv.org/abs/2506.08201 distribute correlated noise in
this way. Shardings are read from types, so mesh axes have to be explicit:
https://docs.jax.dev/en/latest/notebooks/explicit-sharding.html.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jax_privacy_kernels._checks import check_int, check_memory, is_tracing, type_of

__all__ = [
    "PartitionSpecPyTree",
    "PyTree",
    "compute_early_stopping_order",
    "flatten_with_zero_redundancy",
    "local_reshape_add",
    "parallel_sample_pytree",
]

PyTree: TypeAlias = Any
"""A tree of arrays, or of what has their shapes, dtypes and shardings."""

PartitionSpecPyTree: TypeAlias = Any
"""A tree of `jax.sharding.PartitionSpec`."""


def flatten_with_zero_redundancy(
    abstract_array: jax.ShapeDtypeStruct | jax.Array,
) -> jax.ShapeDtypeStruct:
    """The array flattened, padded, and split evenly over all devices of its mesh; no data.

    Args:
      abstract_array: anything with a shape, a dtype and a sharding over explicit mesh axes, any of
        which the array may be sharded over. Values are not looked at: a tracer will do.

    Returns:
      A 1-D ShapeDtypeStruct of the same dtype. Its size is the array's, rounded up to a multiple of
      the number of devices; it is sharded over all mesh axes, in the mesh's order.

    Raises:
      ValueError: the array has no mesh, or has yet to be summed up over mesh axes.
      RuntimeError: a mesh axis is not explicit.
    """
    info = type_of("abstract_array", abstract_array)
    mesh = _check_mesh("abstract_array", info.sharding.mesh)
    if axes := info.sharding.spec.unreduced:
        raise ValueError(
            f"expected abstract_array to be summed up, found it unreduced over {sorted(axes)}"
        )
    return jax.ShapeDtypeStruct(
        (_padded(info.size, mesh),), info.dtype, sharding=_over_all_axes(mesh)
    )


def local_reshape_add(x: jax.Array, y: jax.Array) -> jax.Array:
    """Adds to every element of ``x`` an element of ``y`` of its own.

    Which one does not matter where y holds independent samples, so it is one nearby: shard i of x,
    in the order of its spec's axes, takes the first elements of the i-th of equal parts of y. That
    is ``x + y[:x.size].reshape(x.shape)`` for x replicated, and another assignment, jax_privacy's,
    for x sharded. No element of y goes to two of x.

    Nothing is communicated if x is sharded over all mesh axes, and its spec names them in the
    mesh's order. In another order, every device sends its part of y to one other device. Each mesh
    axis that x is not sharded over costs an all-gather of y over that axis, since replicas have to
    agree.

    Args:
      x: an array of any shape, sharded over explicit mesh axes, or replicated over them.
      y: 1-D, on the same mesh, laid out as `flatten_with_zero_redundancy` says. Any size from
        x.size on that splits evenly over the shards of x will do, and any layout, at the price of
        moving it.

    Returns:
      An array with the shape, dtype and sharding of x. It is added in the dtype that JAX promotes
      the two to.

    Raises:
      ValueError: x has no mesh, or y another one; y is not 1-D, smaller than x, or does not split.
      RuntimeError: a mesh axis is not explicit.
    """
    sharding, info = type_of("x", x).sharding, type_of("y", y)
    mesh = _check_mesh("x", sharding.mesh)
    found = info.sharding.mesh
    if found.empty:  # made before the mesh was set
        found = jax.sharding.get_abstract_mesh()
    if found != mesh:
        raise ValueError(
            f"expected y to be on the mesh of x, {_describe(mesh)}; found {_describe(found)}"
        )
    if info.ndim != 1:
        raise ValueError(f"expected y to be 1-D, found shape {info.shape}")
    size = math.prod(x.shape)
    if info.size < size:
        raise ValueError(f"expected y to have at least the {size} elements of x, found {info.size}")
    shards = math.prod(mesh.shape[axis] for axis in _axes(sharding.spec))
    if info.size % shards:
        raise ValueError(
            f"expected y.size to be a multiple of the {shards} shards of x, found {info.size}"
        )
    return (x + _reshape(y, x.shape, sharding)).astype(x.dtype)


def compute_early_stopping_order(batch_size: int, microbatch_size: int | None) -> np.ndarray:
    """The order to put examples in for microbatches to take them from first to last.

    Microbatching that keeps examples on their devices (`optax.microbatching`) gives microbatch i of
    k the examples i, i + k, i + 2k, ... of the batch. Of ``batch[order]``, it gives microbatch i
    ``batch[i * microbatch_size : (i + 1) * microbatch_size]``. Padding at the end of a batch then
    fills the last microbatches, which need not be computed.

        >>> print(compute_early_stopping_order(batch_size=6, microbatch_size=2))
        [0 2 4 1 3 5]

    Args:
      batch_size: the number of examples, padding included. Poisson sampling makes it 0 at times.
      microbatch_size: how many are processed at a time; None for all, in the order they have.

    Returns:
      A permutation of ``range(batch_size)``, int64: ``order[j * k + i] = i * microbatch_size + j``
      with ``k = batch_size // microbatch_size``.

    Raises:
      TypeError: a size that is not an integer.
      ValueError: ``batch_size`` below 0 or beyond memory, ``microbatch_size`` below 1, or a batch
        that does not divide into microbatches.
    """
    batch_size = check_int("batch_size", batch_size, minimum=0)
    check_memory("batch_size", batch_size, 16 * batch_size)
    order = np.arange(batch_size)
    if microbatch_size is None:
        return order
    microbatch_size = check_int("microbatch_size", microbatch_size)
    if batch_size % microbatch_size:
        raise ValueError(
            f"expected batch_size to be a multiple of microbatch_size, found {batch_size=}, "
            f"{microbatch_size=}"
        )
    return order.reshape(-1, microbatch_size).T.ravel()


def parallel_sample_pytree(
    rng: np.random.Generator,
    struct: Any,
    sampler: Callable[..., np.ndarray] = np.random.Generator.standard_normal,
) -> Any:
    """A tree of independent samples that NumPy draws, sharded as asked.

    It takes randomness from outside of JAX, such as a hardware generator's, to where JAX computes.
    NumPy's own generators are not cryptographic: they suit simulations, not privacy.

    Every device of a leaf's mesh gets an equal part of it to draw, whatever the leaf's sharding,
    with a generator of its own: no number is drawn twice, not on many hosts either. A host draws
    the parts of its devices, in threads. What goes to other devices then does as in
    `local_reshape_add`. For the same ``rng`` the values depend on meshes and shardings.

    Args:
      rng: a generator with ``spawn``. Only generators spawned of it are used, one per leaf, which
        spawn one per device; a further call spawns others. Where it is seeded, every host has to
        give the same seed.
      struct: a tree of arrays or ShapeDtypeStructs, with shardings over explicit axes of a mesh of
        devices. A leaf with a sharding on one device, or none, is drawn whole, by every host.
      sampler: ``sampler(generator, size=..., dtype=...)``, which returns independent samples of
        that size (an int, or a shape for a leaf that is drawn whole), in the dtype of the leaf, or
        one to be cast to it. Threads call it at the same time, with different generators.
        ``Generator.standard_normal`` knows float32 and float64 alone.

    Returns:
      A tree like ``struct``, with its shapes, dtypes (as far as ``jax_enable_x64`` allows them) and
      shardings.

    Raises:
      TypeError: ``rng`` cannot spawn; leaves without shape and dtype, or with a sharding of another
        kind; from ``sampler``, a dtype that it does not know.
      ValueError: a shape that its sharding does not divide; a mesh without devices; samples of a
        wrong shape.
      RuntimeError: a mesh axis is not explicit; called inside a trace, where samples would become
        constants, the same at every call.
    """
    if is_tracing():
        raise RuntimeError(
            "expected to be called outside of jit and other traces: samples would be constants"
        )
    if not hasattr(rng, "spawn"):
        raise TypeError(f"expected rng to be a numpy.random.Generator, found {rng!r}")
    leaves, tree = jax.tree_util.tree_flatten_with_path(struct)
    for path, leaf in leaves:
        _check_leaf("struct" + jax.tree_util.keystr(path), leaf)

    with ThreadPoolExecutor() as threads:
        samples = [
            _sample(generator, leaf, sampler, threads)
            for generator, (_, leaf) in zip(rng.spawn(len(leaves)), leaves, strict=True)
        ]
    return jax.tree.unflatten(tree, samples)


def _sample(
    rng: np.random.Generator,
    leaf: Any,
    sampler: Callable[..., np.ndarray],
    threads: ThreadPoolExecutor,
) -> jax.Array:
    """The samples of one leaf."""

    def draw(rng: np.random.Generator, size: Any, shape: tuple[int, ...]) -> np.ndarray:
        sample = np.asarray(sampler(rng, size=size, dtype=leaf.dtype))
        if sample.shape != shape:
            raise ValueError(f"expected sampler to return shape {shape}, found {sample.shape}")
        return sample

    sharding = getattr(leaf, "sharding", None)
    dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
    if not isinstance(sharding, NamedSharding) or 0 in leaf.shape:
        whole = draw(rng, leaf.shape, leaf.shape)
        return jax.device_put(jnp.asarray(whole, dtype), sharding)

    mesh = sharding.mesh
    flat = _over_all_axes(mesh)
    size = _padded(math.prod(leaf.shape), mesh)
    part = size // mesh.size
    draws = {
        device: threads.submit(draw, generator, part, (part,))
        for generator, device in zip(rng.spawn(mesh.size), mesh.devices.flat, strict=True)
        if device in flat.addressable_devices
    }
    # Not in the threads, which do not see this one's jax.enable_x64.
    parts = [jax.device_put(drawn.result(), device) for device, drawn in draws.items()]
    y = jax.make_array_from_single_device_arrays((size,), flat, parts)
    z = _reshape(y, leaf.shape, NamedSharding(mesh.abstract_mesh, sharding.spec))
    return jax.device_put(z.astype(dtype), sharding)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _reshape(y: jax.Array, shape: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
    """An array of that shape and sharding, every shard of which is a stretch of ``y``."""
    local = sharding.shard_shape(shape)
    flat = PartitionSpec(_axes(sharding.spec))
    reshape = jax.shard_map(
        lambda y: y[: math.prod(local)].reshape(local),
        mesh=sharding.mesh,
        in_specs=flat,
        out_specs=sharding.spec,
    )
    return reshape(jax.sharding.reshard(y, NamedSharding(sharding.mesh, flat)))


def _check_leaf(name: str, leaf: Any) -> None:
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        raise TypeError(f"expected {name} to have a shape and a dtype, found {leaf!r}")
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding):
        _check_mesh(name, sharding.mesh)
        if isinstance(sharding.mesh, AbstractMesh):
            raise ValueError(f"expected the mesh of {name} to have devices, found {sharding.mesh}")
        sharding.shard_shape(leaf.shape)  # raises, if it does not divide
    elif sharding is not None and not isinstance(sharding, jax.sharding.SingleDeviceSharding):
        raise TypeError(f"expected {name} to have a NamedSharding, found {sharding}")


def _check_mesh(name: str, mesh: Any) -> Any:
    """Returns a mesh, given that it has axes and that all are explicit."""
    if mesh.empty:
        raise ValueError(
            f"expected {name} to have a sharding over a mesh, found none; "
            "jax.device_put(..., jax.NamedSharding(mesh, spec)) gives it one"
        )
    if any(kind != AxisType.Explicit for kind in mesh.axis_types):
        raise RuntimeError(
            f"expected the mesh of {name} to have explicit axes only, found {_describe(mesh)}; "
            "jax.make_mesh takes axis_types=(jax.sharding.AxisType.Explicit, ...)"
        )
    return mesh


def _describe(mesh: Mesh | AbstractMesh) -> str:
    kinds = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return ", ".join(f"{name}: {size} ({kind})" for name, size, kind in kinds) or "no mesh"


def _over_all_axes(mesh: Mesh | AbstractMesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def _padded(size: int, mesh: Mesh | AbstractMesh) -> int:
    return -(-size // mesh.size) * mesh.size


def _axes(spec: PartitionSpec) -> tuple[str, ...]:
    """The mesh axes that a spec names, from the first dimension to the last."""
    axes: list[str] = []
    for entry in spec:
        axes.extend(entry if isinstance(entry, tuple) else () if entry is None else (entry,))
    return tuple(axes)


def __dir__() -> list[str]:  # for completion: no imported names
    return sorted(__all__)
