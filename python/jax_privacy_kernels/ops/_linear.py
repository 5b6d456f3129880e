"""Maps that are linear in some of their arguments, and that JAX differentiates in every order.

A kernel is opaque to JAX. A `Rule` says what its derivatives are: forward in terms of maps of the
same kind, and in reverse by its transpose, which is one too. So orders have no end, and each is as
fast as the kernels are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

from jax_privacy_kernels.ops import _dispatch

__all__ = ["Rule", "apply"]

Arrays = Sequence[jax.Array]
Tangents = Sequence[jax.Array | None]  # None stands for zeros


class Rule(Protocol):
    """A map of residuals and operands, linear in the operands. Hashable."""

    def run(self, residuals: Arrays, operands: Arrays) -> Arrays:
        """The results. Not differentiated through."""

    def jvp(
        self,
        residuals: Arrays,
        operands: Arrays,
        results: Arrays,
        d_residuals: Tangents,
        d_operands: Tangents,
    ) -> Arrays:
        """The derivatives of the results: linear in the tangents, not all of which are None."""

    def transpose(
        self, residuals: Arrays, cotangents: Arrays, like: Sequence[jax.ShapeDtypeStruct]
    ) -> Arrays:
        """The cotangents of the operands, which have the shapes and dtypes of ``like``."""


def apply(rule: Rule, residuals: Arrays, operands: Arrays) -> Arrays:
    """The results of a rule: ``rule.run(residuals, operands)``, differentiable."""
    arrays = [*residuals, *operands]
    # As for the choice of an implementation: results of the primitive are taken for replicated.
    axes = frozenset().union(*(_dispatch.varying_axes(x) for x in arrays))
    arrays = [_dispatch.vary(x, axes) for x in arrays]
    results = _linear_p.bind(*arrays, rule=rule, split=len(residuals))
    return [_dispatch.vary(x, axes) for x in results]


_linear_p = jax.extend.core.Primitive("jax_privacy_kernels_linear")
_linear_p.multiple_results = True


@_linear_p.def_impl
def _run(*arrays: jax.Array, rule: Rule, split: int) -> list[jax.Array]:
    return list(rule.run(arrays[:split], arrays[split:]))


@_linear_p.def_abstract_eval
def _shapes(*arrays: Any, rule: Rule, split: int) -> list[Any]:
    structs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    out = jax.eval_shape(rule.run, structs[:split], structs[split:])
    return [jax.core.ShapedArray(x.shape, x.dtype) for x in out]


mlir.register_lowering(_linear_p, mlir.lower_fun(_run, multiple_results=True))


def _jvp(primals: Any, tangents: Any, *, rule: Rule, split: int) -> Any:
    results = apply(rule, primals[:split], primals[split:])
    given = [None if type(t) is ad.Zero else t for t in tangents]
    return results, list(
        rule.jvp(primals[:split], primals[split:], results, given[:split], given[split:])
    )


ad.primitive_jvps[_linear_p] = _jvp


def _transpose(cotangents: Any, *arguments: Any, rule: Rule, split: int) -> list[Any]:
    operands = arguments[split:]
    like = [
        jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype)
        if ad.is_undefined_primal(x)
        else jax.ShapeDtypeStruct(x.shape, x.dtype)
        for x in operands
    ]
    if all(type(ct) is ad.Zero for ct in cotangents):
        return [None] * len(arguments)
    cotangents = [ad.instantiate_zeros(ct) for ct in cotangents]
    bars = rule.transpose(arguments[:split], cotangents, like)
    wanted = [
        bar if ad.is_undefined_primal(x) else None for bar, x in zip(bars, operands, strict=True)
    ]
    return [None] * split + wanted


ad.primitive_transposes[_linear_p] = _transpose


def _batch(args: Any, dims: Any, *, rule: Rule, split: int) -> tuple[Arrays, list[int]]:
    axes = [dim if isinstance(dim, int) else None for dim in dims]
    size = next(x.shape[axis] for x, axis in zip(args, axes, strict=True) if axis is not None)
    full = [
        jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(args, axes, strict=True)
    ]
    results = apply(_Mapped(rule), full[:split], full[split:])
    return results, [0] * len(results)


batching.primitive_batchers[_linear_p] = _batch


@dataclasses.dataclass(frozen=True)
class _Mapped:
    """A rule along the leading axis of everything."""

    rule: Rule

    def run(self, residuals: Arrays, operands: Arrays) -> Arrays:
        return jax.vmap(lambda *args: list(self.rule.run(*args)))(list(residuals), list(operands))

    def jvp(
        self,
        residuals: Arrays,
        operands: Arrays,
        results: Arrays,
        d_residuals: Tangents,
        d_operands: Tangents,
    ) -> Arrays:
        everything = [residuals, operands, results, d_residuals, d_operands]
        return jax.vmap(lambda args: list(self.rule.jvp(*args)))([list(x) for x in everything])

    def transpose(
        self, residuals: Arrays, cotangents: Arrays, like: Sequence[jax.ShapeDtypeStruct]
    ) -> Arrays:
        one = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in like]
        return jax.vmap(lambda r, ct: list(self.rule.transpose(r, ct, one)))(
            list(residuals), list(cotangents)
        )
