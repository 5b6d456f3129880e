"""A key is used once: what would make the same noise for several gradients is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType

from jax_privacy_kernels._checks import leaf_name
from jax_privacy_kernels.ops._dispatch import varying_axes
from jax_privacy_kernels.ops._fingerprint import checksum

__all__ = ["check_devices", "mark", "mark_tree"]


def check_devices(grads: Any, keys: Any) -> Any:
    """Whether, inside of a shard_map or a pmap, devices of the same key have the same gradients.

    Shards of a leaf would have the same noise otherwise. Types tell that to a trace, except in a
    pmap and in a ``shard_map(..., check_vma=False)``: there devices exchange their keys and
    checksums of their gradients, and the result is traced. Elsewhere it is True.

    Raises:
      ValueError: types tell that gradients differ over axes that the keys do not differ over.
    """
    shared = varying_axes(keys)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        if axes := varying_axes(grad) - shared:
            raise ValueError(
                f"expected leaf {leaf_name(path)} to be the same over the axes {sorted(axes)} of a "
                "shard_map, as its noise would be, found it to vary: shards of a leaf need noise "
                "of their own, which it has outside of shard_map, or from a key for each"
            )
    axes = _untyped_axes()
    if not axes:
        return True
    found = jnp.append(jnp.ravel(keys), checksum(jax.tree.leaves(grads)))
    of_all = jax.lax.all_gather(found, axes)
    same = of_all == found
    return (same[:, -1] | ~same[:, :-1].all(axis=1)).all()


def _untyped_axes() -> tuple[str, ...]:
    """The manual axes of more than one device over which the types of arrays do not vary."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    axes = tuple(name for name, n, kind in sizes if kind == AxisType.Manual and n > 1)
    return () if axes and varying_axes(jax.lax.axis_index(axes)) else axes


def mark(keys: Any, grads: Sequence[Any]) -> jax.Array:
    """The data of keys, as it is, known to make noise for these gradients.

    Under a vmap that maps gradients and not the keys, a ValueError: all would get the same noise.
    """
    return _mark_p.bind(keys, *grads)


def mark_tree(keys: Any, tree: Any) -> jax.Array:
    """The same for a tree of gradients, or of a model whose noise begins at the keys.

    Leaves that are no arrays, ShapeDtypeStructs for instance, are mapped over nothing.
    """
    return mark(keys, [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array | np.ndarray)])


_mark_p = jax.extend.core.Primitive("jax_privacy_kernels_mark")


@_mark_p.def_impl
def _now(keys: Any, *_: Any) -> Any:
    return keys


@_mark_p.def_abstract_eval
def _shape(keys: Any, *_: Any) -> Any:
    return keys


mlir.register_lowering(_mark_p, lambda _, keys, *__: [keys])


def _batch(args: Any, dims: Any) -> Any:
    mapped = [isinstance(dim, int) for dim in dims]
    if any(mapped[1:]) and not mapped[0]:
        raise ValueError(
            "expected the noise_state, or the key that it begins with, to be mapped over the axis "
            "of a vmap as the gradients are, found it shared: all of them would get the same "
            "noise. Map over states of different keys too, or add noise to the sum outside of vmap"
        )
    return _mark_p.bind(*args), dims[0]


batching.primitive_batchers[_mark_p] = _batch


def _jvp(primals: Any, tangents: Any) -> Any:
    del tangents
    keys = _mark_p.bind(*primals)
    return keys, np.zeros(keys.shape, jax.dtypes.float0)


ad.primitive_jvps[_mark_p] = _jvp
