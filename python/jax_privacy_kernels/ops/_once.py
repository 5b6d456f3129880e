"""A key is used once: what would make the same noise for several gradients is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core
import numpy as np
from jax.interpreters import ad, batching, mlir

__all__ = ["mark", "mark_tree"]


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
