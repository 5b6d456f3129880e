"""Shards of leaves that the tests of the noise ops share."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_privacy_kernels.ops import _leaves
from jax_privacy_kernels.ops._shards import Shard

__all__ = ["PARTS", "Part", "base_of", "leaves_of"]


class Part(NamedTuple):
    """A shard of a leaf of ``size`` elements, and the index of its first element that is here."""

    size: int
    shard: Shard
    base: int


PARTS = (
    # From the middle of a tile, over the end of a high word.
    Part(2**33, Shard(1300), 2**32 - 500),
    Part(30_000, Shard(300, ((2, 5000), (2, 900))), 11),
    Part(2**35 + 1, Shard(1100, ((2, 3000),)), 2**33 + 5),
)


def leaves_of(parts):
    """Leaves of float32 of which these parts are here."""
    structs = [jax.ShapeDtypeStruct((part.size,), jnp.float32) for part in parts]
    return tuple(
        dataclasses.replace(leaf, shard=part.shard)
        for leaf, part in zip(_leaves.plan(structs, jnp.float32, None), parts, strict=True)
    )


def base_of(parts):
    """The words of the indices of the parts' first elements."""
    return jnp.array([divmod(part.base, 2**32) for part in parts], jnp.uint32)
