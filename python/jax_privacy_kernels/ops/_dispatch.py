"""Which implementation of an op runs.

The choice falls when XLA lowers for a platform: an op traces the implementations that the
platforms would take into one `jax.lax.platform_dependent`, of which the compiler sees one. A name
asked for, per call, per block or by environment variable, is taken or is an error; without one the
fastest that takes the arguments runs.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.extend.core
from jax.interpreters import mlir

__all__ = [
    "ENVIRONMENT",
    "PLATFORMS",
    "Implementation",
    "Table",
    "candidates",
    "implementation",
    "per_platform",
    "requested",
]

ENVIRONMENT = "JAX_PRIVACY_KERNELS_IMPLEMENTATION"
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


class Implementation(NamedTuple):
    """One implementation of an op; a table of them, fastest first, is the op's.

    Attributes:
      platforms: the XLA platforms it runs on.
      unavailable: says why it cannot run in this process, or gives None.
      refuse: says why it cannot take some arguments, or gives None; its parameters are the op's.
      run: the implementation; its contract is the op's.
      limits: what it leaves to the next in the table, for the capability report.
    """

    platforms: tuple[str, ...]
    unavailable: Callable[[], str | None]
    refuse: Callable[..., str | None]
    run: Callable[..., Any]
    limits: str = ""


Table = Mapping[str, Implementation]

_block: contextvars.ContextVar[str | None] = contextvars.ContextVar("implementation", default=None)


@contextlib.contextmanager
def implementation(name: str | None) -> Iterator[None]:
    """Makes ops called in the block, without a name of their own, take the implementation ``name``.

    What counts is when a call is traced: a function that was jitted and called before the block
    keeps the implementation that it was traced with.

    Args:
      name: "jax", "cpp", "pallas" or "triton", or None for the fastest that takes the arguments.
    """
    token = _block.set(name)
    try:
        yield
    finally:
        _block.reset(token)


def requested(op: str, table: Table, name: str | None) -> str | None:
    """The implementation asked for: by the call, else by the block, else by the environment.

    Raises:
      ValueError: there is no such implementation, or it cannot run in this process.
    """
    if name is None:
        name = _block.get()
    if name is None:
        name = os.environ.get(ENVIRONMENT) or None
    if name is None:
        return None
    reason = "there is none of that name" if name not in table else table[name].unavailable()
    if reason:
        usable = [other for other, entry in table.items() if not entry.unavailable()]
        raise ValueError(
            f"implementation {name!r} of {op} was asked for, but {reason}; available: {usable}"
        )
    return name


def candidates(table: Table, name: str | None, *arguments: Any) -> tuple[dict[str, str], list[str]]:
    """Which implementation each platform takes for these arguments, and why not the others.

    Args:
      table: the op's implementations.
      name: the one asked for, or None for the first that can.
      *arguments: what `Implementation.refuse` looks at.
    """
    chosen: dict[str, str] = {}
    refusals = []
    for candidate, entry in table.items() if name is None else [(name, table[name])]:
        reason = entry.unavailable() or entry.refuse(*arguments)
        if reason:
            refusals.append(f"{candidate}: {reason}")
            continue
        for platform in entry.platforms:
            chosen.setdefault(platform, candidate)
    return chosen, refusals


def per_platform(branches: Mapping[str, Callable[..., Any]], refusal: str, *args: Any) -> Any:
    """Calls the branch of the platform that this is lowered for.

    Args:
      branches: by platform; branches that are the same function are traced once.
      refusal: the message of the NotImplementedError on platforms without a branch.
      *args: arrays or trees of arrays.
    """
    if set(branches) == set(PLATFORMS) and len(set(branches.values())) == 1:
        return branches[PLATFORMS[0]](*args)
    out = jax.eval_shape(next(iter(branches.values())), *args)

    def absent(*_: Any) -> Any:
        leaves, tree = jax.tree.flatten(out)
        avals = tuple(jax.core.ShapedArray(leaf.shape, leaf.dtype) for leaf in leaves)
        return jax.tree.unflatten(tree, _refuse_p.bind(message=refusal, avals=avals))

    axes = frozenset().union(*(_varying_axes(leaf) for leaf in jax.tree.leaves(args)))
    wrapped = {branch: _vary(branch, axes) for branch in (absent, *branches.values())}
    return jax.lax.platform_dependent(
        *args,
        default=wrapped[absent],
        **{platform: wrapped[branch] for platform, branch in branches.items()},
    )


def _varying_axes(x: Any) -> frozenset[str]:
    """The manual mesh axes, inside shard_map, over which x may differ."""
    aval: Any = jax.typeof(x)
    manual = getattr(aval, "manual_axis_type", None)  # jax >= 0.12
    return frozenset(aval.vma if manual is None else manual.varying)


def _vary(branch: Callable[..., Any], axes: frozenset[str]) -> Callable[..., Any]:
    """The branch with outputs that vary over the axes: a custom call's are taken for replicated."""
    if not axes:
        return branch

    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(axes - _varying_axes(x))
        if not missing:
            return x
        lax: Any = jax.lax
        if hasattr(lax, "pcast"):
            return lax.pcast(x, missing, to="varying")
        return lax.pvary(x, missing)  # jax 0.8

    return lambda *args: jax.tree.map(cast, branch(*args))


def _refuse_lowering(ctx: Any, *, message: str, avals: Any) -> Any:
    del ctx, avals
    raise NotImplementedError(message)


# Fails when lowered, with a message of ours: what platform_dependent says itself names no op.
_refuse_p = jax.extend.core.Primitive("jax_privacy_kernels_refusal")
_refuse_p.multiple_results = True
_refuse_p.def_abstract_eval(lambda *, message, avals: list(avals))
mlir.register_lowering(_refuse_p, _refuse_lowering)
