"""A key is used once: what would make the same noise for several gradients is refused."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType

from jax_privacy_kernels._checks import is_concrete, leaf_name
from jax_privacy_kernels.ops._dispatch import varying_axes
from jax_privacy_kernels.ops._fingerprint import checksum

__all__ = ["check_devices", "mark", "mark_tree"]


def check_devices(grads: Any, keys: Any, *uses: Any) -> Any:
    """Whether, inside of a shard_map or a pmap, devices of the same key have the same gradients.

    Shards of a leaf would have the same noise otherwise. So it is with the other uses of `mark`.
    Types tell that to a trace, except in a pmap and in a ``shard_map(..., check_vma=False)``: there
    devices exchange their keys and checksums of their gradients, and the result is traced.
    Elsewhere it is True.

    Raises:
      ValueError: types tell that gradients or other uses differ over axes that the keys do not
        differ over.
    """
    shared = varying_axes(keys)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        if axes := varying_axes(grad) - shared:
            raise ValueError(
                f"expected leaf {leaf_name(path)} to be the same over the axes {sorted(axes)} of a "
                "shard_map, as its noise would be, found it to vary: shards of a leaf need noise "
                "of their own, which it has outside of shard_map, or from a key for each"
            )
    if axes := frozenset().union(*map(varying_axes, jax.tree.leaves(uses))) - shared:
        raise ValueError(
            "expected the stddev and the noising_matrix to be the same over the axes "
            f"{sorted(axes)} of a shard_map, as the key is, found them to vary: one gradient with "
            "the same samples at two scales tells what it is"
        )
    untyped = _untyped_axes()
    if not untyped:
        return True
    traced = [x for x in jax.tree.leaves(uses) if not is_concrete(x)]  # others do not vary
    found = jnp.append(jnp.ravel(keys), checksum([*jax.tree.leaves(grads), *traced]))
    of_all = jax.lax.all_gather(found, untyped)
    same = of_all == found
    return (same[:, -1] | ~same[:, :-1].all(axis=1)).all()


def _untyped_axes() -> tuple[str, ...]:
    """The manual axes of more than one device over which the types of arrays do not vary."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    axes = tuple(name for name, n, kind in sizes if kind == AxisType.Manual and n > 1)
    return () if axes and varying_axes(jax.lax.axis_index(axes)) else axes


def mark(keys: Any, uses: Sequence[Any]) -> tuple[jax.Array, jax.Array]:
    """The data of keys, known to make noise for these gradients, and whether no others have it.

    Uses are the gradients, and what noise is scaled and correlated with: one gradient with the same
    samples at two scales tells what it is.

    Under a vmap that maps uses and not the keys, a ValueError: all would get the same noise. Under
    one that maps both, keys may be equal still, as a `jax.lax.cond` whose predicate is mapped maps
    all that it is given. The second result, a boolean, says whether they are not.
    """
    marked, once = _mark_p.bind(keys, *uses, ndim=jnp.ndim(keys))
    return marked, once


def mark_tree(keys: Any, tree: Any) -> tuple[jax.Array, jax.Array]:
    """The same for a tree of gradients, or of a model whose noise begins at the keys.

    Leaves that are no arrays, ShapeDtypeStructs for instance, are mapped over nothing.
    """
    return mark(keys, [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array | np.ndarray)])


_mark_p = jax.extend.core.Primitive("jax_privacy_kernels_mark")
_mark_p.multiple_results = True


@_mark_p.def_impl
def _now(keys: Any, *_: Any, ndim: int) -> Any:
    del ndim
    return [keys, jnp.asarray(True)]


_mark_p.def_abstract_eval(lambda keys, *_, ndim: [keys, jax.core.ShapedArray((), jnp.bool_)])
mlir.register_lowering(_mark_p, mlir.lower_fun(_now, multiple_results=True))


def _batch(args: Any, dims: Any, *, ndim: int) -> Any:
    mapped = [isinstance(dim, int) for dim in dims]
    if any(mapped[1:]) and not mapped[0]:
        raise ValueError(
            "expected the noise_state, or the key that it begins with, to be mapped over the axis "
            "of a vmap as the gradients, the stddev or the noising_matrix are, found it shared: "
            "all of them would get the same noise. Map over states of different keys too, or add "
            "noise to the sum outside of vmap"
        )
    # A vmap around this one finds the axes that were mapped before first.
    keys = jnp.moveaxis(args[0], dims[0], 0)
    keys, once = _mark_p.bind(keys, *args[1:], ndim=ndim)
    if not any(mapped[1:]):
        return [keys, once], [0, None]
    return [keys, once & _are_different(keys, ndim)], [0, 0]


def _are_different(keys: jax.Array, ndim: int) -> jax.Array:
    """Of each of the ``[n, ...]`` lanes of a vmap whether no other has one of its keys.

    The last ``ndim`` axes are those of what one gradient has; those between are of vmaps inside.
    """
    lanes, words = keys.shape[0], keys.shape[-1]
    # What later keys are split from is the last.
    last = keys[(..., *[-1] * (ndim - 1), slice(None))]
    each = math.prod(last.shape[1:-1])
    lane = jnp.repeat(jnp.arange(lanes), each)
    *ordered, lane = jax.lax.sort([*last.reshape(lanes * each, words).T, lane], num_keys=words + 1)
    equal = [x[1:] == x[:-1] for x in ordered]
    shared = functools.reduce(jnp.logical_and, equal) & (lane[1:] != lane[:-1])
    first, second = jnp.append(shared, False), jnp.append(False, shared)
    return jnp.zeros(lanes, jnp.int32).at[lane].add((first | second).astype(jnp.int32)) == 0


batching.primitive_batchers[_mark_p] = _batch


def _jvp(primals: Any, tangents: Any, *, ndim: int) -> Any:
    del tangents
    results = _mark_p.bind(*primals, ndim=ndim)
    return results, [np.zeros(x.shape, jax.dtypes.float0) for x in results]


ad.primitive_jvps[_mark_p] = _jvp
