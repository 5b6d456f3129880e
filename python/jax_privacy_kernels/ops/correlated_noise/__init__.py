"""One step of a correlated-noise privatizer: sample, correlate, add to the gradients."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels._checks import check_like
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
from jax_privacy_kernels.ops.correlated_noise import _cpp, _jax, _pallas, _state, _triton
from jax_privacy_kernels.ops.correlated_noise._contract import Inputs, Run
from jax_privacy_kernels.ops.correlated_noise._filters import Filter
from jax_privacy_kernels.ops.correlated_noise._matrices import NoisingMatrix
from jax_privacy_kernels.ops.correlated_noise._state import Clock, NoiseState

__all__ = ["IMPLEMENTATIONS", "NoiseState", "correlated_noise", "init_correlated_noise"]

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
        limits="to the next: as cpp, and noise of 64 bits, moving averages with slots, buffers, "
        "shards in runs of less than 256 elements",
    ),
    "pallas": _dispatch.Implementation(
        platforms=("cuda",),
        unavailable=_jax_pallas.unavailable,
        refuse=_pallas.refuse,
        run=_pallas.run,
        limits="to jax: as cpp, and moving averages and buffers that need too many registers, "
        "more than 2^31 - 1024 elements on a device, shards in runs of less than 256",
    ),
    "jax": _dispatch.Implementation(
        platforms=_dispatch.PLATFORMS, refuse=_jax.refuse, run=_jax.run
    ),
}


def init_correlated_noise(
    model: Any, matrix: NoisingMatrix, *, key: jax.Array, dtype: Any = None
) -> NoiseState:
    """The state before step 0.

    Args:
      model: tree of arrays or ShapeDtypeStructs, shaped and typed like the gradients.
      matrix: the rows of ``C^-1``.
      key: typed key, shape ().
      dtype: what noise is sampled as; None for each leaf's own dtype.

    Returns:
      A `NoiseState`: the rows of the matrix's layout for every parameter (b - 1 slots for b bands),
      the step, and one key more than steps are ahead or behind.

    Raises:
      TypeError: a leaf is not floating, or its noise dtype is not one that can be sampled.
    """

    leaves = _leaves.plan(model, matrix.dtype, dtype)
    return _state.init_state(model, leaves, _filter(matrix, jax.random.key_impl(key)), key)


def correlated_noise(
    grads: Any,
    state: NoiseState,
    matrix: NoisingMatrix,
    *,
    stddev: jax.typing.ArrayLike,
    key_impl: Any,
    dtype: Any = None,
    implementation: str | None = None,
) -> tuple[Any, NoiseState]:
    """Adds row t of ``C^-1 Z`` to the gradients, Z with i.i.d. rows of Gaussian noise.

    The samples are those of ``jax.random.normal`` on keys split from the state's as jax_privacy
    splits them. What a step of a recurrence costs does not depend on the number of its bands (see
    _schedule.py), if the state is donated; otherwise XLA first copies the state.

    Args:
      grads: tree of floating arrays.
      state: from `init_correlated_noise` or the step before, for this tree, matrix and dtype.
      matrix: the rows of ``C^-1``.
      stddev: standard deviation of Z. May change from step to step: row t of ``C^-1 Z / stddev``
        is scaled by that of step t.
      key_impl: `jax.random.key_impl` of the key that the state was made from.
      dtype: what noise is sampled as; None for each leaf's own dtype.
      implementation: "jax", "cpp", ..., or None for the fastest that takes the arguments.

    Returns:
      The noisy gradients, of the gradients' dtypes, and the next state.

    Raises:
      TypeError: as `init_correlated_noise`.
      ValueError: the state is not one of this tree and matrix, or is laid out over another mesh or
        in another way; or the implementation asked for cannot run here or cannot take a leaf.
      NotImplementedError: when lowered, the implementation asked for does not run on the platform.
    """
    name = _dispatch.requested("correlated_noise", IMPLEMENTATIONS, implementation)
    filter = _filter(matrix, key_impl)
    matrix = jax.tree.map(_canonical, matrix)
    leaves = _leaves.plan(grads, matrix.dtype, dtype)
    tree: Any
    grad_leaves, tree = jax.tree.flatten(grads)
    expected = _state.abstract_state(tree, leaves, filter, key_impl)
    kind = jnp.shape(getattr(state, "kind", expected.kind))
    if kind != expected.kind.shape:
        raise ValueError(
            "expected noise_state to be of this kind of noising matrix and key, noise_state.kind "
            f"of shape {expected.kind.shape}, found that of another, of shape {kind}"
        )
    check_like("noise_state", state, expected)
    _leaves.check_shared(grads, state.clock.key)
    jax.tree_util.tree_map_with_path(_partition.check_laid_out, grads, state.buffers)
    outs, clock, rings = _step(
        leaves,
        name,
        filter,
        key_impl,
        matrix,
        jnp.asarray(stddev, jnp.result_type(float)),
        grad_leaves,
        state.clock,
        jax.tree.leaves(state.buffers),
    )
    return tree.unflatten(outs), state._replace(clock=clock, buffers=tree.unflatten(rings))


# Jitted, so that a call outside jit compiles once.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _step(
    leaves: tuple[Leaf, ...],
    name: str | None,
    filter: Filter,
    key_impl: Any,
    matrix: NoisingMatrix,
    stddev: jax.Array,
    grads: list[jax.Array],
    clock: Clock,
    rings: list[jax.Array],
) -> tuple[list[jax.Array], Clock, list[jax.Array]]:
    step = clock.step
    keys, clock = _state.tick(clock, key_impl, filter)
    # The rings hold noise of standard deviation 1, so that a stddev that changes over time takes
    # effect at once, also on the terms that are ahead.
    row_scale = matrix.row_scale
    scale = stddev if row_scale is None else stddev * row_scale.at[step].get(mode="clip")
    coef = matrix.coef_at(step, filter)
    # Either the step has overflowed, or it is not one; or traced coefficients hid what is refused
    # where it is seen. NaN is seen; no noise would not be.
    valid = (step >= 0) & jnp.isfinite(coef).all() & matrix.invertible(coef)
    inputs = Inputs(
        leaves=leaves,
        base=None,
        grads=grads,
        rings=rings if filter.rows else [],
        filter=filter,
        step=step,
        keys=keys,
        # Kernels take coefficients of 32 or 64 bits; what the rings are of was settled before.
        coef=coef.astype(jnp.promote_types(coef.dtype, jnp.float32)),
        scale=jnp.where(valid, scale, jnp.nan),
    )
    outs, new_rings = _noise.run("correlated_noise", IMPLEMENTATIONS, name, inputs)
    return outs, clock, new_rings or rings


def _canonical(x: Any) -> Any:
    """x, of 32 bits where JAX has no 64; a copy, as JAX remembers what it made of NumPy arrays."""
    known = isinstance(x, np.ndarray)
    return np.array(x, jax.dtypes.canonicalize_dtype(x.dtype)) if known else x


def _filter(matrix: NoisingMatrix, key_impl: Any) -> Filter:
    return matrix.filter(_counter_prng.looks_ahead(key_impl))
