"""Noise of a dense noising matrix: sums of samples that are made again at every step."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jax_privacy_kernels.ops import (
    _counter_prng,
    _dispatch,
    _ffi,
    _jax_pallas,
    _jax_triton,
    _leaves,
    _noise,
    _partition,
)
from jax_privacy_kernels.ops._leaves import Leaf
from jax_privacy_kernels.ops.dense_noise import _cpp, _jax, _pallas, _triton
from jax_privacy_kernels.ops.dense_noise._contract import Inputs, Run

__all__ = ["IMPLEMENTATIONS", "dense_kind", "dense_noise"]

# Fastest first; _contract.py says what an implementation is.
IMPLEMENTATIONS: Mapping[str, _dispatch.Implementation[Run]] = {
    "cpp": _dispatch.Implementation(
        platforms=("cpu",),
        unavailable=_ffi.unavailable,
        refuse=_cpp.refuse,
        run=_cpp.run,
        limits="to jax: noise of 16 bits; keys other than partitionable threefry2x32",
    ),
    # Nobody has measured GPU kernels yet: that they come before jax, and in this order, is a guess.
    "triton": _dispatch.Implementation(
        platforms=("cuda",),
        unavailable=_jax_triton.unavailable,
        refuse=_triton.refuse,
        run=_triton.run,
        limits="to the next: as cpp, noise of 64 bits, shards in runs of less than 256 elements",
    ),
    "pallas": _dispatch.Implementation(
        platforms=("cuda",),
        unavailable=_jax_pallas.unavailable,
        refuse=_pallas.refuse,
        run=_pallas.run,
        limits="to jax: as cpp, and more than 2^31 - 1024 elements on a device, shards in runs of "
        "less than 256",
    ),
    "jax": _dispatch.Implementation(
        platforms=_dispatch.PLATFORMS, refuse=_jax.refuse, run=_jax.run
    ),
}


def dense_noise(
    grads: Any,
    row: jax.Array,
    *,
    key: jax.Array,
    dtype: Any = None,
    implementation: str | None = None,
) -> Any:
    """Adds ``sum_j row[j] z_j`` to the gradients, z_j Gaussian noise of the j-th key.

    The samples are those that jax_privacy makes for a dense noising matrix: leaf l is sampled with
    the keys ``fold_in(split(key, leaves)[l], j)``. Only the samples of non-zero entries are made, a
    pass over the model in all that keeps none of them.

    Args:
      grads: tree of floating arrays.
      row: ``[m]`` floating array, stddev included.
      key: typed key, shape ().
      dtype: what noise is sampled as; None for each leaf's own dtype.
      implementation: as for `correlated_noise`.

    Returns:
      The noisy gradients, of the gradients' dtypes.

    Raises:
      As `correlated_noise`.
    """
    name = _dispatch.requested("dense_noise", IMPLEMENTATIONS, implementation)
    leaves = _leaves.plan(grads, row.dtype, dtype)
    _leaves.check_shared(grads, key)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        _partition.check_summed_up(path, grad)
    tree: Any
    grad_leaves, tree = jax.tree.flatten(grads)
    return tree.unflatten(_add(leaves, name, row, key, grad_leaves))


# Jitted, so that a call outside jit compiles once.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _add(
    leaves: tuple[Leaf, ...],
    name: str | None,
    row: jax.Array,
    key: jax.Array,
    grads: list[jax.Array],
) -> list[jax.Array]:
    inputs = Inputs(
        leaves=leaves,
        base=None,
        grads=grads,
        rings=[],
        ahead=_counter_prng.looks_ahead(jax.random.key_impl(key)),
        key=key,
        row=row.astype(jnp.promote_types(row.dtype, jnp.float32)),
    )
    return _noise.run("dense_noise", IMPLEMENTATIONS, name, inputs).outs


def dense_kind(key_impl: Any) -> jax.Array:
    """An empty array whose shape says what type of key `dense_noise` makes its samples of."""
    key_type = zlib.crc32(str(key_impl).encode()) % 2**16
    return jnp.zeros((0, 2, int(_counter_prng.looks_ahead(key_impl)), 0, 0, 0, key_type))
