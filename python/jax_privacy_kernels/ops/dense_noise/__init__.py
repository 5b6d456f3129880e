"""Noise of a dense noising matrix: sums of samples that are made again at every step."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jax_privacy_kernels._checks import is_concrete, nan_unless
from jax_privacy_kernels.ops import (
    _counter_prng,
    _dispatch,
    _ffi,
    _fingerprint,
    _jax_pallas,
    _jax_triton,
    _leaves,
    _memory,
    _noise,
    _once,
    _partition,
    _stddev,
)
from jax_privacy_kernels.ops._leaves import Leaf
from jax_privacy_kernels.ops._memory import Origins
from jax_privacy_kernels.ops._noise import NoiseOutputs
from jax_privacy_kernels.ops._state import (
    Clock,
    NoiseState,
    abstract_kind,
    check_kind,
    has_fingerprint,
    key_words,
    kind_of,
)
from jax_privacy_kernels.ops.dense_noise import _cpp, _jax, _pallas, _triton
from jax_privacy_kernels.ops.dense_noise._contract import Inputs, Run

__all__ = ["IMPLEMENTATIONS", "dense_noise", "init_dense_noise"]

# Fastest first; _contract.py says what an implementation is.
IMPLEMENTATIONS: Mapping[str, _dispatch.Implementation[Run]] = {
    "cpp": _dispatch.Implementation(
        platforms=("cpu",),
        unavailable=_ffi.unavailable,
        refuse=_cpp.refuse,
        run=_cpp.run,
        limits="to jax: noise of 16 bits; keys other than chacha20 and partitionable threefry2x32",
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
        limits="to jax: as cpp, and more than 2^31 - 1024 elements on a device, "
        "shards in runs of less than 256",
    ),
    "jax": _dispatch.Implementation(
        platforms=_dispatch.PLATFORMS, refuse=_jax.refuse, run=_jax.run
    ),
}


def init_dense_noise(
    model: Any, matrix: jax.Array, *, key: jax.Array, dtype: Any = None
) -> NoiseState:
    """The state before step 0: the step, and the key that every row makes its samples from.

    Args:
      model: tree of arrays or ShapeDtypeStructs, shaped and typed like the gradients.
      matrix: ``C^-1``, ``[n, m]``.
      key: typed key, shape ().
      dtype: what noise is sampled as; None for each leaf's own dtype.

    Raises:
      TypeError: a leaf is not floating, or its noise dtype is not one that can be sampled.
      ValueError: the model is mapped over an axis (vmap) that the key is not mapped over.
    """
    leaves = _leaves.plan(model, matrix.dtype, dtype)
    kind = _kind(leaves, jax.random.key_impl(key))
    fingerprint = jnp.asarray(_fingerprint_of(matrix, leaves))
    words, _ = _once.mark_tree(jax.random.key_data(key), model)
    words = jnp.copy(words)[None]  # the state is there to be donated
    return NoiseState(Clock(jnp.zeros((), jnp.int32), words, (), {kind: fingerprint}), ())


def dense_noise(
    grads: Any,
    state: NoiseState,
    matrix: jax.Array,
    *,
    stddev: jax.typing.ArrayLike,
    key_impl: Any,
    dtype: Any = None,
    implementation: str | None = None,
) -> tuple[Any, NoiseState]:
    """Adds row t of ``C^-1 Z``, times stddev, to the gradients, for a dense matrix ``C^-1``.

    The samples are those that jax_privacy makes for a dense noising matrix: leaf l is sampled with
    the keys ``fold_in(split(key, leaves)[l], j)``. Only the samples of non-zero entries are made, a
    pass over the model in all that keeps none of them. See Approach 2 of Section 4.4.5 of
    https://arxiv.org/abs/2506.08201.

    Args:
      grads: tree of floating arrays.
      state: from `init_dense_noise` or the step before, for this tree, matrix and dtype.
      matrix: ``[n, m]`` floating array.
      stddev: standard deviation of Z. One that changes from step to step scales rows of C^-1 Z.
      key_impl: `jax.random.key_impl` of the key that the state was made from.
      dtype: what noise is sampled as; None for each leaf's own dtype.
      implementation: as for `correlated_noise`.

    Returns:
      The noisy gradients, of the gradients' dtypes, and the next state. NaN for noise beyond the
      last row where a trace hides the step.

    Raises:
      As `correlated_noise`; ValueError for a step beyond the last row that can be seen.
    """
    name = _dispatch.requested("dense_noise", IMPLEMENTATIONS, implementation)
    leaves = _leaves.plan(grads, matrix.dtype, dtype)
    struct: Any = jax.ShapeDtypeStruct
    words = struct((1, *key_words(key_impl)), jnp.uint32)
    kind = abstract_kind(_kind(leaves, key_impl))
    expected = NoiseState(Clock(struct((), jnp.int32), words, (), kind), ())
    check_kind(state, expected)
    step, n = state.clock.step, matrix.shape[0]
    if is_concrete(step) and not 0 <= int(step) < n:
        raise ValueError(
            f"expected at most {n} steps, the rows of noising_matrix, found step {step}"
        )
    once = _once.check_devices(grads, state.clock.keys, stddev, matrix)
    _partition.check_summed_up(grads)
    _partition.check_mesh(grads, state.clock.keys)
    valid = has_fingerprint(state, _fingerprint_of(matrix, leaves))
    # A trace cannot raise. NaN is seen; the noise of row n - 1 again would not be.
    valid &= (step >= 0) & (step < n) & once
    scale, row = jnp.asarray(stddev, jnp.result_type(float)), matrix[step]
    # Not the row: those of several steps are of the same samples.
    keys, alone = _once.mark(state.clock.keys, [scale, matrix])
    valid &= alone
    largest = jnp.abs(row).max()
    made = _stddev.is_normal(largest, scale)
    valid &= _stddev.is_usable(scale) & (made | (largest == 0) | _stddev.is_zero(scale))
    scale = nan_unless(valid, scale)
    tree: Any
    grad_leaves, tree = jax.tree.flatten(grads)
    outs = _add(leaves, name, key_impl, row, scale, keys, grad_leaves)
    return tree.unflatten(outs), state._replace(clock=state.clock._replace(step=step + 1))


def _kind(leaves: tuple[Leaf, ...], key_impl: Any) -> str:
    counted = "counted" if _counter_prng.looks_ahead(key_impl) else "whole"
    return kind_of(f"dense_{counted}", key_impl, leaves)


def _fingerprint_of(matrix: jax.Array, leaves: tuple[Leaf, ...]) -> Any:
    shapes = [matrix.shape, *(leaf.shape for leaf in leaves)]
    of_shapes = _fingerprint.fingerprint_of_shapes(shapes)
    return _fingerprint.fingerprint([matrix]) + of_shapes


# Jitted, so that a call outside jit compiles once. Inline, as in correlated_noise.
@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=_memory.EARLY)
def _add(
    leaves: tuple[Leaf, ...],
    name: str | None,
    key_impl: Any,
    row: jax.Array,
    scale: jax.Array,
    keys: jax.Array,
    grads: list[jax.Array],
) -> list[jax.Array]:
    ahead = _counter_prng.looks_ahead(key_impl)
    origins = Origins()
    grads, _ = _memory.note(origins, grads, [])
    keys, once = _once.mark(keys, grads)
    scale = nan_unless(once, scale)
    key = jax.random.wrap_key_data(keys[0], impl=key_impl)

    def add(grads: list[jax.Array], scale: jax.Array, rest: Any) -> NoiseOutputs:
        key, row = rest
        weights = row * scale.astype(row.dtype)
        weights = weights.astype(jnp.promote_types(row.dtype, jnp.float32))
        inputs = Inputs(leaves, None, grads, [], ahead, key, weights, origins=origins)
        return _noise.run("dense_noise", IMPLEMENTATIONS, name, inputs)

    return _noise.differentiable(add, grads, scale, (key, row)).outs
