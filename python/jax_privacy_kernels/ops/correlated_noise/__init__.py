"""One step of a correlated-noise privatizer: sample, correlate, add to the gradients."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
    check_kind,
    has_fingerprint,
    is_of_kind,
)
from jax_privacy_kernels.ops.correlated_noise import _cpp, _jax, _pallas, _state, _triton
from jax_privacy_kernels.ops.correlated_noise._contract import Inputs, Run
from jax_privacy_kernels.ops.correlated_noise._filters import Filter
from jax_privacy_kernels.ops.correlated_noise._matrices import NoisingMatrix

__all__ = ["IMPLEMENTATIONS", "correlated_noise", "init_correlated_noise"]

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
        limits="to the next: as cpp, and noise of 64 bits, moving averages with "
        "slots, buffers, shards in runs of less than 256 elements",
    ),
    "pallas": _dispatch.Implementation(
        platforms=("cuda",),
        unavailable=_jax_pallas.unavailable,
        refuse=_pallas.refuse,
        run=_pallas.run,
        limits="to jax: as cpp, and moving averages and buffers that need too many "
        "registers, more than 2^31 - 1024 elements on a device, shards in runs of less than 256",
    ),
    "jax": _dispatch.Implementation(
        platforms=_dispatch.PLATFORMS, refuse=_jax.refuse, run=_jax.run
    ),
}


def init_correlated_noise(
    model: Any,
    matrix: NoisingMatrix,
    *,
    key: jax.Array,
    stddev: jax.typing.ArrayLike = 1.0,
    dtype: Any = None,
) -> NoiseState:
    """The state before step 0.

    Args:
      model: tree of arrays or ShapeDtypeStructs, shaped and typed like the gradients.
      matrix: the rows of ``C^-1``.
      key: typed key, shape ().
      stddev: as for `correlated_noise`; one that is traced may change from step to step.
      dtype: what noise is sampled as; None for each leaf's own dtype.

    Returns:
      A `NoiseState`: the rows of the matrix's filter for every parameter (b - 1 slots for b bands),
      the step, and one key more than steps are ahead or behind.

    Raises:
      TypeError: a leaf is not floating, or its noise dtype is not one that can be sampled.
      ValueError: the model is mapped over an axis (vmap) that the key is not mapped over.
    """
    filter = _filters(matrix, jax.random.key_impl(key), stddev)[-1]
    matrix = jax.tree.map(_canonical, matrix)
    leaves = _leaves.plan(model, matrix.dtype, dtype)
    fingerprint = _fingerprint_of(matrix, filter, stddev, leaves)
    return _state.init_state(model, leaves, filter, key, fingerprint)


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
    """Adds row t of ``C^-1 diag(stddev) Z`` to the gradients, Z with i.i.d. N(0, 1) entries.

    The samples are those of ``jax.random.normal`` on keys split from the state's as jax_privacy
    splits them. What a step of a recurrence costs does not depend on the number of its bands (see
    _schedule.py), if the state is donated and stddev is not traced. A stddev that is traced may
    change from step to step; then no terms are made ahead, and a step reads all b - 1 of them.

    The derivative of the noisy gradients with respect to the gradients is the identity, and the
    one with respect to a traced stddev that of row t of ``C^-1 diag(stddev) Z``.

    Args:
      grads: tree of floating arrays.
      state: from `init_correlated_noise` or the step before, for this tree, matrix, stddev and
        dtype. With a traced stddev, one from init may be of a stddev that is known: the state after
        the step is of the other kind.
      matrix: the rows of ``C^-1``.
      stddev: standard deviation of the samples of this step. The same at every step if it is known,
        as it is outside of traces.
      key_impl: `jax.random.key_impl` of the key that the state was made from.
      dtype: what noise is sampled as; None for each leaf's own dtype.
      implementation: "jax", "cpp", ..., or None for the fastest that takes the arguments.

    Returns:
      The noisy gradients, of the gradients' dtypes, and the next state. NaN for noise where a trace
      has hidden that the state is of another matrix or stddev, or what is refused elsewhere.

    Raises:
      TypeError: as `init_correlated_noise`.
      ValueError: the state is not one of this tree, matrix and stddev, or is laid out over another
        mesh or in another way; the implementation asked for cannot run here or cannot take a leaf;
        gradients, stddev or matrix are mapped over an axis (vmap) that the state is not mapped
        over.
      NotImplementedError: when lowered, the implementation asked for does not run on the platform.
    """
    name = _dispatch.requested("correlated_noise", IMPLEMENTATIONS, implementation)
    known, filter = _filters(matrix, key_impl, stddev)
    matrix = jax.tree.map(_canonical, matrix)
    leaves = _leaves.plan(grads, matrix.dtype, dtype)
    fingerprint = _fingerprint_of(matrix, filter, stddev, leaves)
    matrix, unit = matrix.scaled()
    tree: Any
    grad_leaves, tree = jax.tree.flatten(grads)
    valid: Any = True
    if known is not filter and _is_unstarted(state, _state.kind(known, key_impl, leaves)):
        check_kind(state, _state.abstract_state(tree, leaves, known, key_impl))
        state = _state.unstarted(state, grads, leaves, filter, key_impl, fingerprint)
        valid = state.clock.step == 0
    check_kind(state, _state.abstract_state(tree, leaves, filter, key_impl))
    once = _once.check_devices(grads, state.clock.keys, stddev, matrix)
    _partition.check_summed_up(grads)
    if filter.rows:
        jax.tree_util.tree_map_with_path(_partition.check_laid_out, grads, state.inner)
    _partition.check_mesh(grads, state.clock.keys)
    valid &= has_fingerprint(state, fingerprint) & once
    outs, clock, rings = _step(
        leaves,
        name,
        filter,
        key_impl,
        matrix,
        jnp.asarray(unit, jnp.result_type(float)),
        jnp.asarray(stddev, jnp.result_type(float)),
        valid,
        grad_leaves,
        state.clock._replace(kind={}),
        jax.tree.leaves(state.inner),
    )
    inner = tree.unflatten(rings) if filter.rows else ()
    return tree.unflatten(outs), NoiseState(clock._replace(kind=state.clock.kind), inner)


# Jitted, so that a call outside jit compiles once. Inline, so that what is noted of a caller's
# arrays is of the caller's program.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), inline=_memory.EARLY)
def _step(
    leaves: tuple[Leaf, ...],
    name: str | None,
    filter: Filter,
    key_impl: Any,
    matrix: NoisingMatrix,
    unit: jax.Array,
    stddev: jax.Array,
    valid: jax.Array,
    grads: list[jax.Array],
    clock: Clock,
    rings: list[jax.Array],
) -> tuple[list[jax.Array], Clock, list[jax.Array]]:
    step = jnp.maximum(clock.step, 0)  # below 0 it is not valid, which kernels need not know
    origins = Origins()
    grads, rings = _memory.note(origins, grads, rings)
    keys, once = _once.mark(clock.keys, [*grads, stddev, *jax.tree.leaves(matrix)])
    clock = clock._replace(keys=keys)
    before = clock.step
    keys, stddevs, clock = _state.tick(clock, key_impl, filter, stddev)
    factors = [1 / unit] if filter.varying else [stddev / unit]
    if matrix.row_scale is not None:
        factors.append(matrix.row_scale.at[step].get(mode="clip").astype(stddev.dtype))
    scale = functools.reduce(jnp.multiply, factors)
    coef = matrix.coef_at(step, filter)
    # Kernels take coefficients of 32 or 64 bits; what the rings are of was settled before. They
    # refuse some that are not usable, and one lane of a vmap would fail the others.
    usable = jnp.isfinite(coef).all() & matrix.invertible(coef)
    coef = jnp.where(usable, coef, 1).astype(jnp.promote_types(coef.dtype, jnp.float32))
    # Terms are kept, and then scaled: neither may vanish.
    terms = [matrix.diagonal(coef), *([stddev] if filter.varying else [])]
    made = _stddev.is_normal(scale) & _stddev.is_normal(*terms) & _stddev.is_normal(scale, *terms)
    # Either the step has overflowed, or it is not one; or traced coefficients, a traced stddev or a
    # traced state hid what is refused where it is seen. NaN is seen; no noise would not be.
    valid &= usable & (before >= 0) & once
    valid &= _stddev.is_usable(stddev) & (made | _stddev.is_zero(stddev))

    def add(grads: list[jax.Array], scale: jax.Array, rest: Any) -> NoiseOutputs:
        step, keys, coef, stddevs, rings = rest
        inputs = Inputs(
            leaves, None, grads, rings, filter, step, keys, coef, stddevs, scale, origins=origins
        )
        return _noise.run("correlated_noise", IMPLEMENTATIONS, name, inputs)

    scale = nan_unless(valid, scale)
    if filter.varying:  # rings depend on stddevs before: plain JAX is differentiated through
        results = add(grads, scale, (step, keys, coef, stddevs, rings))
    else:
        rest = step, keys, coef, stddevs, jax.lax.stop_gradient(rings)
        results = _noise.differentiable(add, grads, scale, rest)
    return results.outs, clock, results.rings


def _canonical(x: Any) -> Any:
    """x, of 32 bits where JAX has no 64; a copy, as JAX remembers what it made of NumPy arrays."""
    known = isinstance(x, np.ndarray)
    return np.array(x, jax.dtypes.canonicalize_dtype(x.dtype)) if known else x


def _filters(matrix: NoisingMatrix, key_impl: Any, stddev: Any) -> tuple[Filter, Filter]:
    """The filter for a stddev that is known, and the one for this stddev."""
    counted = _counter_prng.looks_ahead(key_impl)
    known = matrix.filter(counted, counted=counted)
    if is_concrete(stddev) or not known.remembers:
        return known, known
    kept = known.keys - known.behind
    return known, matrix.filter(False, counted=counted, varying=True, kept_ahead=kept)


def _is_unstarted(state: Any, kind: str) -> bool:
    """Whether a state is of that kind, and may be one before step 0."""
    step = state.clock.step if is_of_kind(state, kind) else 1
    return not is_concrete(step) or int(step) == 0


def _fingerprint_of(
    matrix: NoisingMatrix, filter: Filter, stddev: Any, leaves: tuple[Leaf, ...]
) -> Any:
    """The fingerprint of all that the terms of a state depend on, beside its keys."""
    numbers = jax.tree.leaves(matrix)
    if filter.remembers and not filter.varying:
        # In two halves of 32 bits, which there are in any mode of JAX.
        high = np.float32(stddev)
        low = float(stddev) - float(high) if jax.config.read("jax_enable_x64") else 0.0
        numbers.append(np.array([high, low], np.float32))
    of_shapes = _fingerprint.fingerprint_of_shapes([leaf.shape for leaf in leaves])
    return _fingerprint.fingerprint(numbers) + of_shapes
