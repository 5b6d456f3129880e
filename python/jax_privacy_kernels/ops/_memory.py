"""What memory the results of a step may lie in, as far as XLA's input tells.

A custom call may say that a result lies in the memory of an operand. Where the program made the
operand itself, as a train step makes gradients, that saves memory, and the time to touch it first.
Where the program was given the operand and may not change it, XLA copies it before the call, which
costs more than a result elsewhere. Which of them it is shows when a program is lowered, outside of
the functions that it calls: `note` is what is lowered there.
"""

from __future__ import annotations

import enum
import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core
import numpy as np
from jax.interpreters import ad, batching, mlir
from jaxlib.mlir import ir

__all__ = ["EARLY", "Memory", "Origins", "note"]

# For ``inline`` of `jax.jit`: into the caller's program when that is traced.
EARLY: Any = getattr(getattr(jax, "Inline", None), "JAX_EARLY", True)  # True in older JAX


class Memory(enum.Enum):
    """Where an operand lies."""

    OWN = "made by the program, or donated to it"
    GIVEN = "an argument of the program that is not donated"
    UNKNOWN = "seen from within a function or a loop"


class Origins:
    """Of each leaf where its gradient and its ring lie, once the step is lowered.

    A static value, which is equal to itself only. It never decides what a step computes.
    """

    def __init__(self) -> None:
        self._found: dict[str, list[Memory]] = {}

    def set(self, grads: list[Memory], rings: list[Memory]) -> None:
        """What was found."""
        self._found = {"grads": grads, "rings": rings}

    def grad(self, leaf: int) -> Memory:
        """Of the gradient of the leaf at that position in the tree."""
        return self._of("grads", leaf)

    def ring(self, leaf: int) -> Memory:
        """Of the ring of the leaf at that position in the tree."""
        return self._of("rings", leaf)

    def _of(self, which: str, leaf: int) -> Memory:
        found = self._found.get(which, [])
        return found[leaf] if leaf < len(found) else Memory.UNKNOWN


def note(
    origins: Origins, grads: Sequence[jax.Array], rings: Sequence[jax.Array]
) -> tuple[list[jax.Array], list[jax.Array]]:
    """The gradients and the rings, whose origins will be known when what follows is lowered.

    A UserWarning, once, if a large ring is an argument that is not donated.
    """
    leaves = _note_p.bind(*grads, *rings, origins=origins, grads=len(grads))
    return leaves[: len(grads)], leaves[len(grads) :]


_note_p = jax.extend.core.Primitive("jax_privacy_kernels_note")
_note_p.multiple_results = True


@_note_p.def_impl
def _now(*leaves: Any, origins: Origins, grads: int) -> list[Any]:
    del origins, grads
    return list(leaves)


@_note_p.def_abstract_eval
def _shapes(*leaves: Any, origins: Origins, grads: int) -> list[Any]:
    del origins, grads
    return list(leaves)


def _batch(leaves: Any, dims: Any, *, origins: Origins, grads: int) -> tuple[list[Any], Any]:
    del origins, grads  # what is one array here is a part of it in the program
    return list(leaves), dims


def _jvp(primals: Any, tangents: Any, *, origins: Origins, grads: int) -> tuple[Any, Any]:
    return _note_p.bind(*primals, origins=origins, grads=grads), list(tangents)


batching.primitive_batchers[_note_p] = _batch
ad.primitive_jvps[_note_p] = _jvp


def _lower(ctx: Any, *leaves: Any, origins: Origins, grads: int) -> list[Any]:
    found = [_memory_of(leaf) for leaf in leaves]
    if ctx.module_context.lowering_parameters.for_export:  # part of a program yet unknown
        found = [Memory.UNKNOWN if memory is Memory.GIVEN else memory for memory in found]
    origins.set(found[:grads], found[grads:])
    given = [
        math.prod(aval.shape) * np.dtype(aval.dtype).itemsize
        for aval, memory in zip(ctx.avals_in[grads:], found[grads:], strict=True)
        if memory is Memory.GIVEN
    ]
    _warn(sum(given))
    return list(leaves)


# JAX would lower it once as a function of its own, and see nothing around it.
mlir.register_lowering(_note_p, _lower, cacheable=False)

# Operations whose result XLA lays where the operand is.
_SEEN_THROUGH = ("stablehlo.reshape", "stablehlo.optimization_barrier")


def _memory_of(value: Any) -> Memory:
    # Older bindings do not tell results from arguments by their types.
    while not isinstance(value.owner, ir.Block):
        operation = value.owner.operation
        if operation.name not in _SEEN_THROUGH:
            return Memory.OWN
        value = operation.operands[list(operation.results).index(value)]
    function: Any = value.owner.owner.operation
    # A function that is called is given what may be either.
    about: Any = function.attributes
    if function.name != "func.func" or about["sym_name"].value != "main":
        return Memory.UNKNOWN
    attributes = about["arg_attrs"][ir.BlockArgument(value).arg_number]
    donated = any(name in attributes for name in ("tf.aliasing_output", "jax.buffer_donor"))
    return Memory.OWN if donated else Memory.GIVEN


LARGE = 2**26  # bytes of rings

_warned = False


def _warn(given: int) -> None:
    global _warned
    if given < LARGE or _warned:
        return
    _warned = True
    warnings.warn(
        f"the noise state, {given / 2**20:,.0f} MiB, is an argument of a jitted function that does "
        "not donate it, so that every step copies it whole. Donate it where the step is jitted, "
        "jax.jit(step, donate_argnums=...) or donate_argnames, and it is updated in place",
        UserWarning,
        stacklevel=2,
    )
