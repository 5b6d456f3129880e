"""Fingerprints of numbers, by which a state knows the noising matrix that it belongs to.

A fingerprint tells mistakes apart, not attacks: it is a sum over words, each mixed with its place
by the finalizer of MurmurHash3, and computed alike in NumPy and inside a trace.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels._checks import is_concrete

__all__ = [
    "WORDS",
    "checksum",
    "fingerprint",
    "fingerprint_of_function",
    "fingerprint_of_shapes",
    "is_fingerprint",
]

WORDS = 4


def is_fingerprint(x: Any) -> bool:
    """Whether x has the type and the shape of a fingerprint."""
    return isinstance(x, jax.Array | np.ndarray) and x.shape == (WORDS,)


def fingerprint(numbers: Sequence[Any]) -> Any:
    """``[WORDS]`` uint32 of floating arrays: NumPy if all of them are known, else traced.

    It depends on the values, their order and their precision, and not on shapes.
    """
    if is_concrete(list(numbers)):
        return _mixed(np, np.concatenate([np.zeros(0, np.uint32), *map(_of_known, numbers)]))
    traced = [_mixed(jnp, _traced_words(jnp.asarray(x))) for x in numbers]
    return _mixed(jnp, jnp.concatenate(traced))


def fingerprint_of_shapes(shapes: Sequence[Sequence[Any]]) -> Any:
    """The same of shapes: traced if a dimension is symbolic, as it is where sizes are exported."""
    sizes = [size for shape in shapes for size in shape]
    if all(isinstance(size, int) for size in sizes):
        return _mixed(np, np.array([[n & 0xFFFFFFFF, n >> 32] for n in sizes], np.uint32).ravel())
    words = [(size, size >> 32 if isinstance(size, int) else 0) for size in sizes]
    known = [w & 0xFFFFFFFF if isinstance(w, int) else w for pair in words for w in pair]
    return _mixed(jnp, jnp.stack([jnp.asarray(w, jnp.uint32) for w in known]))


def fingerprint_of_function(function: Callable[..., Any], *args: Any) -> Any:
    """The same of all floating numbers that a function of arrays computes with, in any order.

    Args:
      function: what JAX can trace.
      args: arrays or ShapeDtypeStructs.
    """
    total: Any = np.zeros(WORDS, np.uint32)
    for x in _numbers(jax.make_jaxpr(function)(*args)):
        total = total + fingerprint([x])
    return total


def checksum(arrays: Sequence[jax.Array]) -> jax.Array:
    """One uint32 of floating arrays, traced, in one pass over them: equal for equal bits."""
    total = jnp.uint32(0)
    for place, x in enumerate(arrays):
        bits = jnp.dtype(f"uint{min(8 * x.dtype.itemsize, 32)}")
        words = jax.lax.bitcast_convert_type(x, bits).reshape(-1).astype(jnp.uint32)
        at = jax.lax.iota(jnp.uint32, words.size) * jnp.uint32(0x9E3779B9) + jnp.uint32(place)
        total += _finalized(jnp, words ^ at).sum(dtype=jnp.uint32)
    return total


def _numbers(closed: jax.extend.core.ClosedJaxpr) -> Iterator[Any]:
    for x in closed.consts:
        if jnp.issubdtype(x.dtype, jnp.floating):
            yield x
    for equation in closed.jaxpr.eqns:
        literals = [x for x in equation.invars if isinstance(x, jax.extend.core.Literal)]
        for literal in literals:
            if jnp.issubdtype(jnp.result_type(literal.val), jnp.floating):
                yield literal.val
        for value in jax.tree.leaves(equation.params, is_leaf=_is_jaxpr):
            if isinstance(value, jax.extend.core.Jaxpr):
                value = jax.extend.core.ClosedJaxpr(value, ())
            if isinstance(value, jax.extend.core.ClosedJaxpr):
                yield from _numbers(value)


def _is_jaxpr(x: Any) -> bool:
    return isinstance(x, jax.extend.core.Jaxpr | jax.extend.core.ClosedJaxpr)


# Fingerprints of arrays of JAX, which do not change, by their ids, while they live: a step outside
# of jit would read a large matrix otherwise.
_remembered: dict[int, tuple[weakref.ref[Any], np.ndarray]] = {}


def _of_known(x: Any) -> np.ndarray:
    """``[WORDS]``, of one array that is known."""
    found = _remembered.get(id(x))
    if found is not None and found[0]() is x:
        return found[1]
    result: np.ndarray = _mixed(np, _words(np.asarray(x)))
    if isinstance(x, jax.Array):
        place, forget = id(x), _remembered.pop  # globals are None at the end of the program
        gone = weakref.ref(x, lambda _: forget(place, None))
        _remembered[place] = gone, result
    return result


def _words(x: np.ndarray) -> np.ndarray:
    known = jax.dtypes.canonicalize_dtype(x.dtype)  # as a trace would have it
    wide: Any = np.float64 if known == np.float64 else np.float32
    with np.errstate(over="ignore"):
        x = np.asarray(x, wide).reshape(-1)
    words = _unsigned_zeros(np, np.ascontiguousarray(x).view(np.uint32), wide)
    length = np.array([x.size, wide(0).itemsize], np.uint32)
    return np.concatenate([length, words])


def _traced_words(x: jax.Array) -> jax.Array:
    wide: Any = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    words = jax.lax.bitcast_convert_type(x.astype(wide).reshape(-1), jnp.uint32).reshape(-1)
    words = _unsigned_zeros(jnp, words, wide)
    length = np.array([x.size, np.dtype(wide).itemsize], np.uint32)
    return jnp.concatenate([jnp.asarray(length), words])


def _unsigned_zeros(xp: ModuleType, words: Any, dtype: Any) -> Any:
    """The words of numbers, -0 as 0. By bits: compilers take subnormal numbers for 0."""
    each = words.reshape(-1, np.dtype(dtype).itemsize // 4)  # the word with the sign is the last
    negative_zero = (each[:, -1] == np.uint32(0x80000000)) & (each[:, :-1] == 0).all(axis=1)
    return xp.where(negative_zero[:, None], xp.zeros_like(each), each).reshape(-1)


@np.errstate(over="ignore")
def _mixed(xp: ModuleType, words: Any) -> Any:
    place = xp.arange(words.size, dtype=xp.uint32)
    sums = [
        xp.sum(_finalized(xp, words ^ _finalized(xp, place * WORDS + lane)), dtype=xp.uint32)
        for lane in range(WORDS)
    ]
    return xp.stack([xp.asarray(x) for x in sums])


def _finalized(xp: ModuleType, x: Any) -> Any:
    x = xp.asarray(x, xp.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> xp.uint32(shift))) * xp.uint32(factor)
    return x ^ (x >> xp.uint32(16))
