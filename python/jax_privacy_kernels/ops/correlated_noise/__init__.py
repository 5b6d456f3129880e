"""One step of a correlated-noise privatizer: sample, correlate, add to the gradients."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from jax_privacy_kernels._checks import check_like, leaf_name
from jax_privacy_kernels.ops import _dispatch, _ffi, _jax_pallas, _jax_triton, _shards
from jax_privacy_kernels.ops.correlated_noise import _cpp, _jax, _pallas, _schedule, _triton
from jax_privacy_kernels.ops.correlated_noise._matrices import Layout, NoisingMatrix
from jax_privacy_kernels.ops.correlated_noise._schedule import Clock, Leaf, NoiseState

__all__ = [
    "IMPLEMENTATIONS",
    "NoiseState",
    "check_noise_dtype",
    "check_shared",
    "correlated_noise",
    "dense_kind",
    "dense_noise",
    "init_correlated_noise",
]

# Fastest first. An implementation is a module with two functions:
#
#   refuse(leaf, layout) -> why it cannot take what is here of the leaf in this layout, or None
#   run(layout, leaves, step, keys, coef, scale, base, grads, rings) -> (outs, rings)
#
# run takes step t of some or all leaves of the tree, or of shards of them, in the schedule of
# _schedule.py, and gives outs = grads + scale x_t and the rings after the step, which hold the x
# of unit variance.
#
#   layout   the Layout (static)
#   leaves   a Leaf for each of grads, rings and outs (static)
#   step     int32 scalar, t
#   keys     typed keys of the steps that are sampled, [layout.behind + layout.steps]; for a "row"
#            one, [1], and the key of sample j of a leaf is fold_in(key of the leaf, j)
#   coef     as coef_at of _recurrence.py gives it, float32 or float64
#   scale    scalar
#   base     uint32 [leaves, 2], the high and the low word of the index, in the whole leaf, of the
#            first element that is here; the others are those of leaf.shard
#   grads    any shapes, not empty, and floating dtypes
#   rings    (layout.rows,) + shape; their dtype is the one x is computed in
IMPLEMENTATIONS: _dispatch.Table = {
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
        platforms=_dispatch.PLATFORMS,
        refuse=_jax.refuse,
        run=_jax.run,
    ),
}

_FLOATS = ("float16", "bfloat16", "float32", "float64")


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

    def ring(leaf: Any, ring: jax.ShapeDtypeStruct) -> jax.Array:
        return _shards.zeros(ring.shape, ring.dtype, _shards.rows_like(leaf))

    layout = _layout(matrix, jax.random.key_impl(key))
    expected = _abstract_state(model, layout, matrix, jax.random.key_impl(key), dtype)
    return NoiseState(
        jnp.zeros(expected.kind.shape, expected.kind.dtype),
        _schedule.init_clock(key, layout),
        jax.tree.map(ring, model, expected.buffers),
        jax.tree.map(lambda empty: jnp.zeros(empty.shape, empty.dtype), expected.samples),
    )


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
    layout = _layout(matrix, key_impl)
    matrix = jax.tree.map(_canonical, matrix)
    expected = _abstract_state(grads, layout, matrix, key_impl, dtype)
    kind = jnp.shape(getattr(state, "kind", expected.kind))
    if kind != expected.kind.shape:
        raise ValueError(
            "expected noise_state to be of this kind of noising matrix and key, noise_state.kind "
            f"of shape {expected.kind.shape}, found that of another, of shape {kind}"
        )
    check_like("noise_state", state, expected)
    check_shared(grads, state.clock.key)
    jax.tree_util.tree_map_with_path(_check_layout, grads, state.buffers)
    tree: Any
    grad_leaves, tree = jax.tree.flatten(grads)
    outs, clock, buffers = _step(
        _plan(grads, dtype, implementation),
        layout,
        key_impl,
        matrix,
        jnp.asarray(stddev, jnp.result_type(float)),
        grad_leaves,
        state.clock,
        jax.tree.leaves(state.buffers),
    )
    return tree.unflatten(outs), state._replace(clock=clock, buffers=tree.unflatten(buffers))


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
    ahead = _schedule.looks_ahead(jax.random.key_impl(key))
    layout = Layout("row", ahead, slots=0, behind=row.shape[0] - 1)
    check_shared(grads, key)
    tree: Any
    grad_leaves, tree = jax.tree.flatten(grads)
    buffers = jax.tree.leaves(_abstract_buffers(grads, 0, row.dtype, dtype))
    rings = [
        _shards.zeros(buffer.shape, buffer.dtype, _shards.rows_like(grad))
        for buffer, grad in zip(buffers, grad_leaves, strict=True)
    ]
    outs = _dense(
        _plan(grads, dtype, implementation),
        layout,
        row,
        key[None],
        grad_leaves,
        rings,
    )
    return tree.unflatten(outs)


def dense_kind(key_impl: Any) -> jax.Array:
    """An empty array whose shape says what type of key `dense_noise` makes its samples of."""
    layout = Layout("row", _schedule.looks_ahead(key_impl), slots=0)
    return jnp.zeros(_schedule.abstract_kind(key_impl, layout).shape)


class _Plan(NamedTuple):
    """What is known of a step when it is traced. Static."""

    name: str | None  # of the implementation asked for
    leaves: tuple[Leaf, ...]
    paths: tuple[str, ...]


def _plan(grads: Any, dtype: Any, implementation: str | None) -> _Plan:
    name = _dispatch.requested("correlated_noise", IMPLEMENTATIONS, implementation)
    paths_and_grads = jax.tree_util.tree_leaves_with_path(grads)
    leaves = _schedule.plan(
        [grad.shape for _, grad in paths_and_grads],
        [check_noise_dtype(path, grad, dtype) for path, grad in paths_and_grads],
    )
    return _Plan(name, leaves, tuple(leaf_name(path) for path, _ in paths_and_grads))


class _Choices(NamedTuple):
    """For every platform, the implementation of every leaf. Static."""

    platforms: dict[str, tuple[str, ...]]
    refusal: str  # the message on other platforms


def _choose(plan: _Plan, layout: Layout) -> _Choices:
    choices: dict[str, list[str]] = {platform: [] for platform in _dispatch.PLATFORMS}
    refusals: list[str] = []
    for leaf, path in zip(plan.leaves, plan.paths, strict=True):
        chosen, refused = _dispatch.candidates(IMPLEMENTATIONS, plan.name, leaf, layout)
        where = f"leaf {path}"
        if not chosen:
            raise ValueError(f"no implementation of correlated_noise takes {where}: {refused}")
        refusals += [f"{where}: {reason}" for reason in refused]
        for platform, candidate in chosen.items():
            choices[platform].append(candidate)
    static = {p: tuple(names) for p, names in choices.items() if len(names) == len(plan.leaves)}
    asked = f"implementation {plan.name!r}" if plan.name else "no implementation"
    refusal = (
        f"correlated_noise: {asked} runs on this platform; it would on {sorted(static)}"
        + "".join(f"; {reason}" for reason in refusals)
    )
    return _Choices(static, refusal)


# Jitted, so that a call outside jit compiles once.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _step(
    plan: _Plan,
    layout: Layout,
    key_impl: Any,
    matrix: NoisingMatrix,
    stddev: jax.Array,
    grads: list[jax.Array],
    clock: Clock,
    rings: list[jax.Array],
) -> tuple[list[jax.Array], Clock, list[jax.Array]]:
    step = clock.step
    keys, clock = _schedule.tick(clock, key_impl, layout)
    # The rings hold noise of standard deviation 1, so that a stddev that changes over time takes
    # effect at once, also on the terms that are ahead.
    row_scale = matrix.row_scale
    scale = stddev if row_scale is None else stddev * row_scale.at[step].get(mode="clip")
    coef = matrix.coef_at(step, layout)
    # Either the step has overflowed, or it is not one; or traced coefficients hid what is refused
    # where it is seen. NaN is seen; no noise would not be.
    valid = (step >= 0) & jnp.isfinite(coef).all() & matrix.invertible(coef)
    scale = jnp.where(valid, scale, jnp.nan)
    outs, rings = _run(plan, layout, [step, keys, coef, scale], grads, rings)
    return outs, clock, rings


@functools.partial(jax.jit, static_argnums=(0, 1))
def _dense(
    plan: _Plan,
    layout: Layout,
    row: jax.Array,
    keys: jax.Array,
    grads: list[jax.Array],
    rings: list[jax.Array],
) -> list[jax.Array]:
    step, scale = jnp.zeros((), jnp.int32), jnp.ones((), row.dtype)
    return _run(plan, layout, [step, keys, row[None], scale], grads, rings)[0]


def _run(
    plan: _Plan, layout: Layout, common: list[Any], grads: list[jax.Array], rings: list[jax.Array]
) -> tuple[list[jax.Array], list[jax.Array]]:
    """The step, on all devices that the leaves are spread over."""
    # Leaves without elements stay as they are.
    mine = [i for i, leaf in enumerate(plan.leaves) if leaf.size]
    plan = _Plan(plan.name, tuple(plan.leaves[i] for i in mine), tuple(plan.paths[i] for i in mine))
    step, keys, coef, scale = common
    # Kernels take coefficients of 32 or 64 bits; the rings' dtype was settled before.
    common = [step, keys, coef.astype(jnp.promote_types(coef.dtype, jnp.float32)), scale]
    run = functools.partial(_run_here, plan, layout)
    some = [grads[i] for i in mine], [rings[i] for i in mine]
    meshes = map(_shards.explicit_mesh, [*grads, *rings])
    mesh = next((mesh for mesh in meshes if mesh is not None), None)
    if mesh is not None:
        results = _shards.over_explicit_axes(run, mesh, common, *some)
    else:
        results = run([[0] * grad.ndim for grad in some[0]], common, *some)
    outs, rings = list(grads), list(rings)
    for i, out, ring in zip(mine, *results, strict=True):
        outs[i], rings[i] = out, ring
    return outs, rings


def _run_here(
    plan: _Plan, layout: Layout, places: Any, common: Any, grads: Any, rings: Any
) -> tuple[list[jax.Array], list[jax.Array]]:
    """The step on what is here, by the implementations that are chosen for the platform."""
    leaves = [
        dataclasses.replace(leaf, shard=_shards.shard(leaf.shape, grad.shape))
        for leaf, grad in zip(plan.leaves, grads, strict=True)
    ]
    first = [
        _shards.first(leaf.shape, grad.shape, place)
        for leaf, grad, place in zip(leaves, grads, places, strict=True)
    ]
    base = jnp.array(first, jnp.uint32).reshape(-1, 2)
    choices = _choose(plan._replace(leaves=tuple(leaves)), layout)

    def run(names: tuple[str, ...], common: Any, base: Any, grads: Any, rings: Any) -> Any:
        outs, rings = list(grads), list(rings)
        for name in dict.fromkeys(names):
            mine = [i for i, other in enumerate(names) if other == name]
            results = IMPLEMENTATIONS[name].run(
                layout,
                [leaves[i] for i in mine],
                *common,
                base[np.array(mine)],
                [grads[i] for i in mine],
                [rings[i] for i in mine],
            )
            for i, out, ring in zip(mine, *results, strict=True):
                outs[i], rings[i] = out, ring
        return outs, rings

    # In a shard_map, ours or another, the arrays have been split already.
    manual = AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types

    def spread(common: Any, _: Any, grads: Any, rings: Any) -> Any:
        from jax_privacy_kernels import __version__

        described = repr((__version__, plan, layout))
        here = functools.partial(_run_here, plan, layout)
        return _shards.over_automatic_axes(here, described, common, grads, rings)

    shared = {names: functools.partial(run, names) for names in choices.platforms.values()}
    return _dispatch.per_platform(
        {platform: shared[names] for platform, names in choices.platforms.items()},
        choices.refusal,
        common,
        base,
        grads,
        rings,
        spread=None if manual else spread,
    )


def check_noise_dtype(path: Any, leaf: Any, dtype: Any) -> jnp.dtype:
    """What the noise of a leaf is sampled as: ``dtype``, or the leaf's own if that is None.

    Raises a TypeError, which names the leaf by its path, unless leaf and noise have dtypes of 16 to
    64 bits. As everywhere in JAX, 64 bits mean 32 outside x64 mode.
    """
    if not hasattr(leaf, "dtype"):
        raise TypeError(f"expected leaf {leaf_name(path)} to be an array, found {leaf!r}")
    noise_dtype = jax.dtypes.canonicalize_dtype(leaf.dtype if dtype is None else dtype)
    for what, found in (("gradients", jnp.dtype(leaf.dtype)), ("noise", noise_dtype)):
        if found.name not in _FLOATS:
            raise TypeError(
                f"expected leaf {leaf_name(path)} to have {what} of dtype {', '.join(_FLOATS)}, "
                f"found {found}"
            )
    return noise_dtype


def _canonical(x: Any) -> Any:
    """x, of 32 bits where JAX has no 64; a copy, as JAX remembers what it made of NumPy arrays."""
    known = isinstance(x, np.ndarray)
    return np.array(x, jax.dtypes.canonicalize_dtype(x.dtype)) if known else x


def _layout(matrix: NoisingMatrix, key_impl: Any) -> Layout:
    return matrix.layout(_schedule.looks_ahead(key_impl))


def _abstract_state(
    model: Any, layout: Layout, matrix: NoisingMatrix, key_impl: Any, dtype: Any
) -> NoiseState:
    def empty(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((0,), check_noise_dtype(path, leaf, dtype))

    kind: Any = _schedule.abstract_kind(key_impl, layout)
    return NoiseState(
        kind,
        _schedule.abstract_clock(key_impl, layout),
        _abstract_buffers(model, layout.rows, matrix.dtype, dtype),
        jax.tree_util.tree_map_with_path(empty, model) if layout.behind else (),
    )


def _abstract_buffers(model: Any, rows: int, coef_dtype: Any, dtype: Any) -> Any:
    def ring(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        noise_dtype = check_noise_dtype(path, leaf, dtype)
        # Noise is correlated and scaled in 32 bits at least: in 16, small noise rounds to none.
        ring_dtype = jnp.result_type(noise_dtype, coef_dtype, jnp.float32)
        return jax.ShapeDtypeStruct((rows, *leaf.shape), ring_dtype)

    return jax.tree_util.tree_map_with_path(ring, model)


def check_shared(grads: Any, key: Any) -> None:
    """Raises a ValueError if in a shard_map gradients differ where the key of their noise does not.

    The shards of such a leaf would have the same noise.
    """
    shared = _dispatch.varying_axes(key)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        if axes := _dispatch.varying_axes(grad) - shared:
            raise ValueError(
                f"expected leaf {leaf_name(path)} to be the same over the axes {sorted(axes)} of a "
                "shard_map, as its noise would be, found it to vary: shards of a leaf need noise "
                "of their own, which it has outside of shard_map, or from a key for each"
            )


def _check_layout(path: Any, grad: Any, ring: Any) -> None:
    """Raises a ValueError unless the types of a ring and its gradient lay them out alike."""
    if axes := _shards.unreduced(grad):
        raise ValueError(
            f"expected the gradient of leaf {leaf_name(path)} to be summed up, found it unreduced "
            f"over the mesh axes {sorted(axes)}"
        )
    on_mesh = [_shards.explicit_mesh(x) for x in (grad, ring)]
    specs = PartitionSpec(None, *_shards.spec(grad)), _shards.spec(ring)
    # What is on no mesh yet will be replicated.
    if (None not in on_mesh and on_mesh[0] != on_mesh[1]) or specs[0] != specs[1]:
        described = [
            "no explicit mesh" if mesh is None else f"{dict(mesh.shape)} as {spec}"
            for mesh, spec in zip(on_mesh, specs, strict=True)
        ]
        raise ValueError(
            f"expected the noise_state of leaf {leaf_name(path)} to be laid out as its gradient "
            f"is, over {described[0]}; found it over {described[1]}"
        )
