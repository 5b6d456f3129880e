"""Which implementation of an op runs.

The choice falls when XLA lowers for a platform: an op traces the implementations that the
platforms would take into one `jax.lax.platform_dependent`, of which the compiler sees one. A name
asked for, per call, per block or by environment variable, is taken or is an error; without one the
fastest that takes the arguments runs.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.extend.core
from jax.interpreters import ad, batching, mlir

from jax_privacy_kernels._checks import standard_promotion

__all__ = [
    "ENVIRONMENT",
    "NAMES",
    "PLATFORMS",
    "Implementation",
    "Table",
    "asked",
    "candidates",
    "check_name",
    "implementation",
    "per_platform",
    "requested",
    "vary",
    "varying_axes",
]

ENVIRONMENT = "JAX_PRIVACY_KERNELS_IMPLEMENTATION"
NAMES = ("jax", "cpp", "pallas", "triton")
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


_Run = TypeVar("_Run", bound=Callable[..., Any])


class Implementation(NamedTuple, Generic[_Run]):
    """One implementation of an op; a table of them, fastest first, is the op's.

    Attributes:
      platforms: the XLA platforms it runs on.
      run: the implementation, of the type that is the contract of the op.
      unavailable: says why it cannot run in this process, or gives None.
      refuse: says why it cannot take some arguments, or gives None; its parameters are the op's.
      limits: what it leaves to the next in the table, for the capability report.
    """

    platforms: tuple[str, ...]
    run: _Run
    unavailable: Callable[[], str | None] = lambda: None
    refuse: Callable[..., str | None] = lambda *_, **__: None
    limits: str = ""


Table = Mapping[str, Implementation[Any]]

_block: contextvars.ContextVar[str | None] = contextvars.ContextVar("implementation", default=None)


def check_name(name: str | None) -> None:
    """Raises a ValueError unless it is the name of an implementation, of some op, or None."""
    if name is not None and name not in NAMES:
        raise ValueError(
            f"expected implementation to be None or one of {', '.join(NAMES)}, found {name!r}"
        )


def implementation(name: str | None) -> contextlib.AbstractContextManager[None]:
    """Makes ops called in the block, without a name of their own, take the implementation ``name``.

    What counts is when a call is traced: a function that was jitted and called before the block
    keeps the implementation that it was traced with.

    Args:
      name: "jax", "cpp", "pallas" or "triton", or None for the fastest that takes the arguments.

    Raises:
      ValueError: there is no such implementation.
    """
    check_name(name)
    return _in_block(name)


@contextlib.contextmanager
def _in_block(name: str | None) -> Iterator[None]:
    token = _block.set(name)
    try:
        yield
    finally:
        _block.reset(token)


def asked() -> str | None:
    """The implementation that a call without a name asks for: by the block, or the environment."""
    name = _block.get()
    return (os.environ.get(ENVIRONMENT) or None) if name is None else name


def requested(op: str, table: Table, name: str | None) -> str | None:
    """The implementation asked for: by the call, else by the block, else by the environment.

    Raises:
      ValueError: there is no such implementation, or it cannot run in this process.
    """
    name = asked() if name is None else name
    if name is None:
        return None
    reason = "there is none of that name" if name not in table else table[name].unavailable()
    if reason:
        usable = [other for other, entry in table.items() if not entry.unavailable()]
        raise ValueError(
            f"implementation {name!r} of {op} was asked for, but {reason}; available: {usable}"
        )
    return name


def candidates(
    table: Table, name: str | None, *arguments: Any, **static: Any
) -> tuple[dict[str, str], list[str]]:
    """Which implementation each platform takes for these arguments, and why not the others.

    Args:
      table: the op's implementations.
      name: the one asked for, or None for the first that can.
      *arguments, **static: what `Implementation.refuse` looks at.
    """
    chosen: dict[str, str] = {}
    refusals = []
    for candidate, entry in table.items() if name is None else [(name, table[name])]:
        reason = entry.unavailable() or entry.refuse(*arguments, **static)
        if reason:
            refusals.append(f"{candidate}: {reason}")
            continue
        for platform in entry.platforms:
            chosen.setdefault(platform, candidate)
    return chosen, refusals


def per_platform(
    branches: Mapping[str, Callable[..., Any]],
    refusal: str,
    *args: Any,
    spread: Callable[..., Any] | None = None,
) -> Any:
    """Calls the branch of the platform that this is lowered for; only that one is traced further.

    Args:
      branches: by platform; all give results of the same structure, shapes and dtypes. Where they
        are not the same function on all platforms, they are not differentiated through.
      refusal: the message of the NotImplementedError on platforms without a branch.
      *args: arrays or trees of arrays.
      spread: what takes the branch's place where XLA spreads arrays over several devices.
    """
    tree: Any
    leaves, tree = jax.tree.flatten(args)
    axes = frozenset().union(*(varying_axes(leaf) for leaf in leaves))
    leaves = [vary(leaf, axes) for leaf in leaves]  # kernels and loops want all arguments alike
    if spread is None and set(branches) == set(PLATFORMS) and len(set(branches.values())) == 1:
        with standard_promotion():
            return branches[PLATFORMS[0]](*tree.unflatten(leaves))

    def flat(branch: Callable[..., Any]) -> Callable[..., list[jax.Array]]:
        def call(*leaves: Any) -> list[jax.Array]:
            # Lowered where the caller's modes hold, which are not those that it was traced in.
            with standard_promotion():
                return jax.tree.leaves(branch(*tree.unflatten(leaves)))

        return call

    if not _may_have_devices(leaves):
        spread = None  # JAX refuses to lower, for devices that are not there, what has to know them
    with standard_promotion():
        out = jax.eval_shape(next(iter(branches.values())), *tree.unflatten(leaves))
    flattened = {branch: flat(branch) for branch in set(branches.values())}
    results = _select_p.bind(
        *leaves,
        branches=tuple((platform, flattened[branch]) for platform, branch in branches.items()),
        shapes=tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(out)),
        refusal=refusal,
        # A jaxpr, in which JAX sees that this has to know the devices when it is lowered.
        spread=None if spread is None else jax.make_jaxpr(flat(spread))(*leaves),
    )
    return jax.tree.unflatten(jax.tree.structure(out), [vary(x, axes) for x in results])


def _may_have_devices(leaves: list[jax.Array]) -> bool:
    """Whether the mesh of the arrays is not the description of one whose devices are elsewhere.

    A mesh of the devices of this process, and a description of one, look alike in types.
    """
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(x).sharding.mesh for x in leaves)]
    kinds = {mesh.abstract_device.device_kind for mesh in meshes if mesh.abstract_device}
    undescribed = any(not mesh.empty and mesh.abstract_device is None for mesh in meshes)
    return not undescribed and kinds <= _kinds_of_devices()


@functools.cache
def _kinds_of_devices() -> frozenset[str]:
    kinds: set[str] = set()
    for platform in PLATFORMS:
        with contextlib.suppress(RuntimeError):  # there is none
            kinds.update(device.device_kind for device in jax.devices(platform))
    return frozenset(kinds)


def varying_axes(x: Any) -> frozenset[str]:
    """The manual mesh axes, inside shard_map, over which x may differ."""
    aval: Any = jax.typeof(x)
    manual = getattr(aval, "manual_axis_type", None)  # jax >= 0.12
    return frozenset(aval.vma if manual is None else manual.varying)


def vary(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """x, taken to vary over the axes: results of the primitive are taken for replicated."""
    missing = tuple(axes - varying_axes(x))
    if not missing:
        return x
    lax: Any = jax.lax
    if hasattr(lax, "pcast"):
        return lax.pcast(x, missing, to="varying")
    return lax.pvary(x, missing)  # jax 0.8


# `jax.lax.platform_dependent` would trace the branches of all platforms, of which one is used.
_select_p = jax.extend.core.Primitive("jax_privacy_kernels_select")
_select_p.multiple_results = True


def _branch(platform: str, branches: Any, refusal: str) -> Callable[..., list[jax.Array]]:
    chosen = dict(branches).get(platform)
    if chosen is None:
        raise NotImplementedError(refusal)
    return chosen


@_select_p.def_abstract_eval
def _select_shapes(*_: Any, branches: Any, shapes: Any, refusal: str, spread: Any) -> list[Any]:
    del branches, refusal, spread
    return [jax.core.ShapedArray(shape, dtype) for shape, dtype in shapes]


@_select_p.def_impl
def _select_now(
    *args: Any, branches: Any, shapes: Any, refusal: str, spread: Any
) -> list[jax.Array]:
    del shapes, spread
    return _branch(jax.default_backend(), branches, refusal)(*args)  # jit is disabled


def _select_lowering(platform: str) -> Callable[..., Any]:
    def rule(ctx: Any, *args: Any, branches: Any, shapes: Any, refusal: str, spread: Any) -> Any:
        del shapes
        if spread is not None and _is_partitioned(ctx.module_context):
            branch = jax.extend.core.jaxpr_as_fun(spread)
        else:
            branch = _branch(platform, branches, refusal)
        return mlir.lower_fun(branch, multiple_results=True)(ctx, *args)

    return rule


def _is_partitioned(module: Any) -> bool:
    """Whether XLA will spread the program over the devices of a mesh, and here.

    What is exported cannot ask how. It runs the branch, whole, on every device.
    """
    mesh = getattr(module.axis_context, "abstract_mesh", None)
    devices = getattr(module.axis_context, "device_assignment", None)
    several = mesh is not None and not mesh.empty and devices is not None and len(devices) > 1
    return several and not module.lowering_parameters.for_export


for _platform in PLATFORMS:
    mlir.register_lowering(_select_p, _select_lowering(_platform), platform=_platform)


def _select_batch(
    args: Any, dims: Any, *, branches: Any, shapes: Any, refusal: str, spread: Any
) -> tuple[list[jax.Array], list[int]]:
    axes = tuple(dim if isinstance(dim, int) else None for dim in dims)
    size = next(x.shape[axis] for x, axis in zip(args, axes, strict=True) if axis is not None)
    mapped = {branch: jax.vmap(branch, axes, 0, axis_size=size) for _, branch in branches}
    results = _select_p.bind(
        *args,
        branches=tuple((platform, mapped[branch]) for platform, branch in branches),
        shapes=tuple(((size, *shape), dtype) for shape, dtype in shapes),
        refusal=refusal,
        spread=None,
    )
    return results, [0] * len(results)


batching.primitive_batchers[_select_p] = _select_batch


def _select_jvp(
    primals: Any, tangents: Any, *, branches: Any, shapes: Any, refusal: str, spread: Any
) -> Any:
    del shapes, refusal, spread
    several = {branch for _, branch in branches}
    if len(several) > 1 or len(branches) < len(PLATFORMS):
        raise NotImplementedError(
            "kernels are not differentiated through; ask for implementation='jax', which is"
        )
    return jax.jvp(several.pop(), tuple(primals), tuple(map(ad.instantiate_zeros, tangents)))


ad.primitive_jvps[_select_p] = _select_jvp
