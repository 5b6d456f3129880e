"""One step of a privatizer that is exact: correlated noise of integers, added to integers."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels._checks import is_concrete, leaf_name
from jax_privacy_kernels.ops import (
    _dispatch,
    _ffi,
    _fingerprint,
    _memory,
    _noise,
    _once,
    _partition,
)
from jax_privacy_kernels.ops._chacha20 import CHACHA20
from jax_privacy_kernels.ops._leaves import TILE, Leaf
from jax_privacy_kernels.ops._memory import Origins
from jax_privacy_kernels.ops._shards import Shard
from jax_privacy_kernels.ops._state import (
    Clock,
    NoiseState,
    abstract_kind,
    check_kind,
    has_fingerprint,
    key_words,
    kind_of,
)
from jax_privacy_kernels.ops.correlated_noise import _state
from jax_privacy_kernels.ops.grid_noise import _cpp, _jax
from jax_privacy_kernels.ops.grid_noise._contract import Inputs, Run
from jax_privacy_kernels.ops.grid_noise._matrices import GridMatrix, GridSums

__all__ = ["IMPLEMENTATIONS", "grid_noise", "init_grid_noise"]

# Fastest first; _contract.py says what an implementation is.
IMPLEMENTATIONS: Mapping[str, _dispatch.Implementation[Run]] = {
    "cpp": _dispatch.Implementation(platforms=("cpu",), unavailable=_ffi.unavailable, run=_cpp.run),
    # The estimates need float64 as IEEE 754 has it, which TPUs do not.
    "jax": _dispatch.Implementation(
        platforms=("cpu", "cuda", "rocm"), refuse=_jax.refuse, run=_jax.run
    ),
}


def init_grid_noise(model: Any, matrix: GridMatrix, *, key: jax.Array) -> NoiseState:
    """The state before step 0.

    Args:
      model: tree of arrays or ShapeDtypeStructs, int32 or int64, shaped like the gradients.
      matrix: the terms.
      key: typed chacha20 key, shape ().

    Returns:
      A `NoiseState`, as for correlated noise. Rings are int32 if the terms fit, else int64.

    Raises:
      TypeError: a leaf is not int32 or int64.
      ValueError: terms do not fit into a leaf; the model is mapped over an axis (vmap) that the key
        is not mapped over.
    """
    leaves = _plan(model, matrix)
    fingerprint = _fingerprint_of(matrix, leaves)
    if not _is_dense(matrix):
        return _state.init_state(model, leaves, matrix.filter, key, fingerprint)
    words, _ = _once.mark_tree(jax.random.key_data(key), model)
    words = jnp.copy(words)[None]  # to be donated
    kind = {_dense_kind(leaves): jnp.asarray(fingerprint)}
    return NoiseState(Clock(jnp.zeros((), jnp.int32), words, (), kind), ())


def grid_noise(
    grads: Any, state: NoiseState, matrix: GridMatrix, *, implementation: str | None = None
) -> tuple[Any, NoiseState]:
    """Adds the terms x_t of a noising matrix of integers to integer gradients.

    Args:
      grads: tree of int32 or int64 arrays.
      state: from `init_grid_noise` or the step before, for this tree and matrix.
      matrix: the terms.
      implementation: "jax", "cpp", or None for the fastest that takes the arguments.

    Returns:
      The noisy gradients, of the gradients' dtypes, and the next state. Where a trace has hidden
      that the state is of another matrix, or that the step is beyond the last row, all gradients
      are the least number of their dtype, which `grid.to_float` takes for NaN.

    Raises:
      TypeError, ValueError: as `init_grid_noise`.
      ValueError: the state is not one of this tree and matrix, or is laid out over another mesh or
        in another way; a step beyond the last row; the implementation asked for cannot run here or
        cannot take a leaf; gradients are mapped over an axis (vmap) that the state is not mapped
        over.
      NotImplementedError: when lowered, no implementation runs on the platform.
    """
    name = _dispatch.requested("grid_noise", IMPLEMENTATIONS, implementation)
    leaves = _plan(grads, matrix)
    tree: Any
    grad_leaves, tree = jax.tree.flatten(grads)
    filter = matrix.filter
    check_kind(state, _abstract_state(tree, leaves, matrix))
    step = state.clock.step
    if matrix.steps is not None and is_concrete(step) and not 0 <= int(step) < matrix.steps:
        raise ValueError(
            f"expected at most {matrix.steps} steps, the rows of noising_matrix, found step {step}"
        )
    once = _once.check_devices(grads, state.clock.keys)
    _partition.check_summed_up(grads)
    if filter.rows:
        jax.tree_util.tree_map_with_path(_partition.check_laid_out, grads, state.inner)
    _partition.check_mesh(grads, state.clock.keys)
    valid = has_fingerprint(state, _fingerprint_of(matrix, leaves)) & once
    outs, clock, rings = _step(
        leaves,
        name,
        matrix,
        valid,
        grad_leaves,
        state.clock._replace(kind={}),
        jax.tree.leaves(state.inner),
    )
    inner = tree.unflatten(rings) if filter.rows else ()
    return tree.unflatten(outs), NoiseState(clock._replace(kind=state.clock.kind), inner)


# Jitted, so that a call outside jit compiles once. Inline, as in correlated_noise.
@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=_memory.EARLY)
def _step(
    leaves: tuple[Leaf, ...],
    name: str | None,
    matrix: GridMatrix,
    valid: jax.Array,
    grads: list[jax.Array],
    clock: Clock,
    rings: list[jax.Array],
) -> tuple[list[jax.Array], Clock, list[jax.Array]]:
    before = clock.step
    step = jnp.maximum(before, 0)  # below 0 it is not valid, which kernels need not know
    valid &= before >= 0
    if matrix.steps is not None:
        valid &= before < matrix.steps
    origins = Origins()
    grads, rings = _memory.note(origins, grads, rings)
    keys, once = _once.mark(clock.keys, grads)
    valid &= once
    clock = clock._replace(keys=keys)
    coef = matrix.coef_at(step)
    if _is_dense(matrix):
        # Samples are numbered by columns: all of them are there at every step.
        keys, step = _column_keys(clock.keys, matrix), jnp.int32(matrix.filter.samples)
        clock = clock._replace(step=before + 1)
    else:
        keys, _, clock = _state.tick(clock, CHACHA20, matrix.filter, jnp.float32(1))
    # Either the step has overflowed, or it is not one; or a traced state hid what is refused where
    # it is seen. The least number is seen; no noise would not be.
    step = jnp.where(valid, step, -1)
    inputs = Inputs(
        leaves,
        None,
        grads,
        rings,
        matrix.filter,
        matrix.rounding,
        matrix.in_doubles,
        step,
        keys,
        coef,
        origins=origins,
    )
    results = _noise.run("grid_noise", IMPLEMENTATIONS, name, inputs)
    return results.outs, clock, results.rings


def _plan(grads: Any, matrix: GridMatrix) -> tuple[Leaf, ...]:
    """The leaves of a tree of integer gradients, in flattening order, all of them here."""
    paths_and_grads = jax.tree_util.tree_leaves_with_path(grads)
    ring = np.dtype(np.int32 if _fits(matrix, np.int32) else np.int64)
    leaves: list[Leaf] = []
    first_tile = 0
    for index, (path, grad) in enumerate(paths_and_grads):
        name, dtype = leaf_name(path), getattr(grad, "dtype", None)
        found = type(grad).__name__ if dtype is None else dtype
        if dtype not in (np.int32, np.int64):
            raise TypeError(
                f"expected leaf {name} to have gradients of dtype int32 or int64, as "
                f"grid.clip_and_round gives them, found {found}"
            )
        if dtype != jax.dtypes.canonicalize_dtype(dtype):
            raise TypeError(
                f"expected leaf {name} to have gradients of dtype int32 outside of JAX's 64-bit "
                f"mode, which would cut numbers and noise down to 32 bits, found {found}"
            )
        if not _fits(matrix, dtype):
            raise ValueError(
                f"expected noise that fits into the {dtype} of leaf {name}, found terms of up to "
                f"{matrix.largest_term:.3g}: gradients of int64 (in x64 mode), or a smaller stddev "
                "and grid_scale, leave room for them"
            )
        size = int(np.prod(grad.shape, dtype=np.int64))
        leaves.append(
            Leaf(
                name,
                index,
                len(paths_and_grads),
                tuple(grad.shape),
                first_tile,
                ring,
                ring,
                Shard(size),
            )
        )
        first_tile += -(-size // TILE)
    return tuple(leaves)


def _is_dense(matrix: GridMatrix) -> TypeGuard[GridSums]:
    return isinstance(matrix, GridSums) and matrix.dense


def _abstract_state(tree: Any, leaves: tuple[Leaf, ...], matrix: GridMatrix) -> NoiseState:
    """Shapes and dtypes of a state."""
    if not _is_dense(matrix):
        return _state.abstract_state(tree, leaves, matrix.filter, CHACHA20)
    struct: Any = jax.ShapeDtypeStruct
    keys = struct((1, *key_words(CHACHA20)), jnp.uint32)
    kind = abstract_kind(_dense_kind(leaves))
    return NoiseState(Clock(struct((), jnp.int32), keys, (), kind), ())


def _dense_kind(leaves: tuple[Leaf, ...]) -> str:
    return kind_of("dense_counted", CHACHA20, leaves)


def _column_keys(words: jax.Array, matrix: GridSums) -> jax.Array:
    """The keys of the samples of all columns."""
    key = jax.random.wrap_key_data(words[0], impl=CHACHA20)
    columns = jnp.arange(matrix.filter.samples, dtype=jnp.uint32)
    return jax.vmap(lambda column: jax.random.fold_in(key, column))(columns)


def _fits(matrix: GridMatrix, dtype: Any) -> bool:
    """Whether terms leave half of the range of a dtype to the gradients."""
    return matrix.largest_term <= np.iinfo(dtype).max // 2


def _fingerprint_of(matrix: GridMatrix, leaves: tuple[Leaf, ...]) -> Any:
    shape_of_rows = [matrix.weights.shape] if isinstance(matrix, GridSums) else []
    shapes = [*shape_of_rows, *(leaf.shape for leaf in leaves)]
    of_shapes = _fingerprint.fingerprint_of_shapes(shapes)
    return _fingerprint.fingerprint(matrix.numbers()) + of_shapes
