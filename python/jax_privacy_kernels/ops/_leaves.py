"""The leaves of a tree of gradients, as the noise ops and their implementations see them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jax_privacy_kernels._checks import leaf_name
from jax_privacy_kernels.ops._shards import Shard, Words

__all__ = ["FLOATS", "TILE", "Leaf", "check_noise_dtype", "plan", "tile_of"]

# Elements of a leaf that share a place in the schedule of correlated noise; they follow each other
# in row-major order. The unit in which leaves are counted, whatever the schedule.
TILE = 1024

FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What is static about one leaf of the tree.

    Attributes:
      path: what errors call it.
      index: its position among the leaves, in flattening order.
      count: the number of leaves in the tree.
      shape: the shape of the whole leaf, wherever its elements are.
      first_tile: the number of tiles in the leaves before it.
      noise_dtype: the dtype that its noise is sampled as.
      dtype: the dtype that its noise is computed and kept in.
      shard: the elements of it that are here.
    """

    path: str
    index: int
    count: int
    shape: tuple[int, ...]
    first_tile: int
    noise_dtype: jnp.dtype
    dtype: jnp.dtype
    shard: Shard

    @property
    def size(self) -> int:
        """The number of elements of the whole leaf."""
        return math.prod(self.shape)

    @property
    def whole(self) -> bool:
        """Whether all of its elements are here."""
        return self.shard == Shard(self.size)


def plan(grads: Any, coef_dtype: Any, dtype: Any) -> tuple[Leaf, ...]:
    """The leaves of a tree of gradients, in flattening order, all of them here.

    Args:
      grads: tree of arrays or ShapeDtypeStructs.
      coef_dtype: the dtype of the noising matrix.
      dtype: what noise is sampled as; None for each leaf's own dtype.

    Raises:
      TypeError: as `check_noise_dtype`.
    """
    paths_and_grads = jax.tree_util.tree_leaves_with_path(grads)
    leaves: list[Leaf] = []
    first_tile = 0
    for index, (path, grad) in enumerate(paths_and_grads):
        noise_dtype = check_noise_dtype(path, grad, dtype)
        # Noise is correlated and scaled in 32 bits at least: in 16, small noise rounds to none.
        computed = jnp.result_type(noise_dtype, coef_dtype, jnp.float32)
        size = math.prod(grad.shape)
        leaves.append(
            Leaf(
                leaf_name(path),
                index,
                len(paths_and_grads),
                tuple(grad.shape),
                first_tile,
                noise_dtype,
                computed,
                Shard(size),
            )
        )
        first_tile += -(-size // TILE)
    return tuple(leaves)


def tile_of(index: Words) -> jax.Array:
    """The tiles that elements of a leaf are in, uint32, by their indices of less than 2^42."""
    return index[0] * (2**32 // TILE) + index[1] // TILE


def check_noise_dtype(path: Any, leaf: Any, dtype: Any) -> jnp.dtype:
    """The dtype that the noise of a leaf is sampled as: ``dtype``, or the leaf's own for None.

    As everywhere in JAX, 64 bits mean 32 outside x64 mode.

    Raises:
      TypeError: leaf or noise have another dtype than a floating one of 16 to 64 bits. The error
        names the leaf by its path of jax.tree_util.
    """
    if not hasattr(leaf, "dtype"):
        raise TypeError(f"expected leaf {leaf_name(path)} to be an array, found {leaf!r}")
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        raise TypeError(f"expected leaf {leaf_name(path)} to hold numbers, found {leaf.dtype}")
    noise_dtype = jax.dtypes.canonicalize_dtype(leaf.dtype if dtype is None else dtype)
    for what, found in (("gradients", jnp.dtype(leaf.dtype)), ("noise", noise_dtype)):
        if found.name not in FLOATS:
            raise TypeError(
                f"expected leaf {leaf_name(path)} to have {what} of dtype {', '.join(FLOATS)}, "
                f"found {found}"
            )
    return noise_dtype
