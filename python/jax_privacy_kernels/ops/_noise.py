"""How a noise op runs: which implementation takes each leaf, here and over the devices of a mesh.

An op whose noise differs from leaf to leaf describes one call as `NoiseInputs`. `run` splits it
over the devices of a mesh that the types of the gradients name; `_run_here` chooses implementations
for what one device has and calls them; where XLA's partitioner chooses the shards, `_partition`
calls `_run_here` again once it has.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType

from jax_privacy_kernels.ops import _dispatch, _partition, _shards
from jax_privacy_kernels.ops._leaves import Leaf
from jax_privacy_kernels.ops._memory import Origins

__all__ = ["NoiseInputs", "NoiseOutputs", "differentiable", "register", "run"]

_Inputs = TypeVar("_Inputs", bound="NoiseInputs")


def register(cls: type[_Inputs]) -> type[_Inputs]:
    """Makes a class of `NoiseInputs` a pytree whose ``static_fields`` are constants to jit."""
    names = [field.name for field in dataclasses.fields(cls)]
    arrays = [name for name in names if name not in cls.static_fields]
    return jax.tree_util.register_dataclass(cls, arrays, list(cls.static_fields))


@dataclasses.dataclass(frozen=True)
class NoiseInputs:
    """One call of a noise op, as its implementations get it. Each op adds what its leaves share.

    The noise of an element is a function of its index in the whole leaf, of what the leaves share,
    and of nothing else.

    Attributes:
      leaves: a Leaf for each of grads, static; none is empty.
      base: uint32 [leaves, 2], the high and the low word of the index, in the whole leaf, of the
        first element that is here; ``leaf.shard`` says which others are. None before they are
        split over devices.
      grads: arrays of any shapes and floating dtypes.
      rings: arrays ``[rows, *shape]`` of ``leaf.dtype``, what each leaf keeps; or none at all.
      origins: where the memory of gradients and rings comes from, static.
    """

    static_fields: ClassVar[tuple[str, ...]] = ("leaves", "origins")
    leaves: tuple[Leaf, ...]
    base: jax.Array | None
    grads: list[jax.Array]
    rings: list[jax.Array]
    origins: Origins | None = dataclasses.field(default=None, kw_only=True)

    @property
    def choice(self) -> Any:
        """A static value that `Implementation.refuse` gets beside each leaf."""
        raise NotImplementedError

    @property
    def stream(self) -> str:
        """The name of the type of the keys, which `Implementation.refuse` gets after that."""
        raise NotImplementedError

    def some(self, which: Sequence[int]) -> Any:
        """The same call for some of the leaves."""
        return dataclasses.replace(
            self,
            leaves=tuple(self.leaves[i] for i in which),
            base=None if self.base is None else self.base[np.array(which, int)],
            grads=[self.grads[i] for i in which],
            rings=[self.rings[i] for i in which] if self.rings else [],
        )


class NoiseOutputs(NamedTuple):
    """What an implementation gives.

    Attributes:
      outs: the gradients with their noise, of the gradients' shapes and dtypes.
      rings: what the leaves keep after the step, like the rings that went in.
    """

    outs: list[jax.Array]
    rings: list[jax.Array]


def differentiable(
    add: Callable[[list[jax.Array], jax.Array, Any], NoiseOutputs],
    grads: list[jax.Array],
    scale: jax.Array,
    rest: Any,
) -> NoiseOutputs:
    """``add(grads, scale, rest)``, which adds scale times noise that depends on ``rest`` alone.

    The derivative with respect to the gradients is the identity, the one with respect to the scale
    the noise itself. There is none with respect to the rest, a tree of arrays. ``add`` closes over
    no arrays.
    """

    @jax.custom_jvp
    def call(grads: list[jax.Array], scale: jax.Array, rest: Any) -> Any:
        return tuple(add(grads, scale, rest))

    def rule(primals: Any, tangents: Any) -> Any:
        (grads, scale, rest), (grads_dot, scale_dot, rest_dot) = primals, tangents
        if not all(map(_is_zero, jax.tree.leaves(rest_dot, is_leaf=_is_zero))):
            raise NotImplementedError(
                "noise is differentiated with respect to gradients and stddev only, not with "
                "respect to the coefficients of a noising matrix"
            )
        results = call(grads, scale, rest)
        if not _is_zero(scale_dot):
            unit, _ = call([jnp.zeros_like(g) for g in grads], jnp.ones_like(scale), rest)
            grads_dot = [
                scale_dot.astype(noise.dtype) * noise + (0 if _is_zero(dot) else dot)
                for noise, dot in zip(unit, grads_dot, strict=True)
            ]
        return results, (grads_dot, [SymbolicZero(jax.typeof(ring)) for ring in results[1]])

    call.defjvp(rule, symbolic_zeros=True)
    return NoiseOutputs(*call(grads, scale, rest))


def _is_zero(tangent: Any) -> bool:
    """Whether a tangent is known to be zero, as those of integers are."""
    return isinstance(tangent, SymbolicZero) or (
        getattr(tangent, "dtype", None) == jax.dtypes.float0
    )


def run(op: str, table: _dispatch.Table, name: str | None, inputs: Any) -> NoiseOutputs:
    """Calls a noise op on all devices that its leaves are spread over.

    Args:
      op: what errors call it.
      table: its implementations, which take the inputs and give `NoiseOutputs`.
      name: of the implementation asked for, or None.
      inputs: the `NoiseInputs` of the op, with whole leaves.

    Raises:
      ValueError: no implementation takes a leaf.
    """
    full = [i for i, leaf in enumerate(inputs.leaves) if leaf.size]
    here = functools.partial(_run_here, op, table, name)
    outs, rings = list(inputs.grads), list(inputs.rings)
    inputs = inputs.some(full)
    mesh = _partition.common_mesh([*inputs.grads, *inputs.rings])
    if mesh is None:
        places: Sequence[Any] = [[0] * grad.ndim for grad in inputs.grads]
        results = here(inputs, places)
    else:
        results = NoiseOutputs(*_partition.over_explicit_axes(here, mesh, inputs))
    for i, leaf in enumerate(full):  # leaves without elements stay as they are
        outs[leaf] = results.outs[i]
        if rings:
            rings[leaf] = results.rings[i]
    return NoiseOutputs(outs, rings)


def _run_here(
    op: str, table: _dispatch.Table, name: str | None, inputs: Any, places: Sequence[Any]
) -> NoiseOutputs:
    """The call on the blocks of the leaves that one device has, at their places in the leaves."""
    leaves = tuple(
        dataclasses.replace(leaf, shard=_shards.shard(leaf.shape, grad.shape))
        for leaf, grad in zip(inputs.leaves, inputs.grads, strict=True)
    )
    first = [
        _shards.first(leaf.shape, grad.shape, place)
        for leaf, grad, place in zip(leaves, inputs.grads, places, strict=True)
    ]
    spread = _partition_by_xla(op, table, name, inputs.leaves)
    inputs = dataclasses.replace(
        inputs, leaves=leaves, base=jnp.array(first, jnp.uint32).reshape(-1, 2)
    )
    choices = _choose(op, table, name, inputs)
    branches = {
        names: functools.partial(_run_chosen, table, names) for names in choices.platforms.values()
    }
    return _dispatch.per_platform(
        {platform: branches[names] for platform, names in choices.platforms.items()},
        choices.refusal,
        inputs,
        spread=spread,
    )


class _Choices(NamedTuple):
    """For every platform, the implementation of every leaf. Static."""

    platforms: dict[str, tuple[str, ...]]
    refusal: str  # the message on other platforms


def _choose(op: str, table: _dispatch.Table, name: str | None, inputs: NoiseInputs) -> _Choices:
    choices: dict[str, list[str]] = {platform: [] for platform in _dispatch.PLATFORMS}
    refusals: dict[str, None] = {}
    for leaf in inputs.leaves:
        chosen, refused = _dispatch.candidates(table, name, leaf, inputs.choice, inputs.stream)
        where = f"leaf {leaf.path}"
        if not chosen:
            raise ValueError(f"no implementation of {op} takes {where}: {refused}")
        refusals |= {f"; {where}: {reason}": None for reason in refused}
        for platform, candidate in chosen.items():
            choices[platform].append(candidate)
    static = {p: tuple(names) for p, names in choices.items() if len(names) == len(inputs.leaves)}
    asked = f"implementation {name!r}" if name else "no implementation"
    refusal = f"{op}: {asked} runs on this platform; it would on {sorted(static)}"
    return _Choices(static, refusal + "".join(refusals))


def _run_chosen(table: _dispatch.Table, names: tuple[str, ...], inputs: Any) -> NoiseOutputs:
    """The call, by the implementation that is named for each leaf."""
    outs, rings = list(inputs.grads), list(inputs.rings)
    for name in dict.fromkeys(names):
        which = [i for i, other in enumerate(names) if other == name]
        results = table[name].run(inputs.some(which))
        for i, leaf in enumerate(which):
            outs[leaf] = results.outs[i]
            if rings:
                rings[leaf] = results.rings[i]
    return NoiseOutputs(outs, rings)


def _partition_by_xla(
    op: str, table: _dispatch.Table, name: str | None, whole: tuple[Leaf, ...]
) -> Callable[[Any], NoiseOutputs] | None:
    """What takes the branches' place where XLA spreads leaves over devices.

    None inside of a shard_map, ours or another: the arrays have been split already.
    """
    if AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types:
        return None

    def spread(inputs: Any) -> NoiseOutputs:
        inputs = dataclasses.replace(inputs, leaves=whole, base=None, origins=None)
        described = repr((op, name))
        here = functools.partial(_run_here, op, table, name)
        return NoiseOutputs(*_partition.over_automatic_axes(here, described, inputs))

    return spread
