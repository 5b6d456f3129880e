"""What the ops on coefficients share: arrays of 32 or 64 bits in and out, 64 bits inside."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_privacy_kernels._checks import (
    check_real,
    promote_types,
)
from jax_privacy_kernels.ops import _dispatch

__all__ = ["call", "in_float64", "real", "refuse_long"]

LONGEST = 2**30  # rows, for kernels whose indices of 32 bits may be sums of two


def real(x: Any) -> jax.Array:
    """x as an array of float32 or float64: the narrowest of them that holds it.

    Raises a TypeError unless x holds real numbers.
    """
    x = check_real("real numbers", jnp.asarray(x))
    return x.astype(promote_types(x.dtype, jnp.float32))


def call(
    op: str, table: _dispatch.Table, name: str | None, *arrays: jax.Array, **static: Any
) -> Any:
    """Runs the implementation of the platform, which is called as ``run(*arrays, **static)``."""
    chosen, refusals = _dispatch.candidates(table, name, *arrays, **static)
    if not chosen:
        raise ValueError(f"no implementation of {op} takes these arguments: {refusals}")
    refusal = f"{op}: implementation {name!r} runs on {sorted(chosen)} only; {refusals}"
    runs = {n: functools.partial(table[n].run, **static) for n in set(chosen.values())}
    return _dispatch.per_platform({on: runs[n] for on, n in chosen.items()}, refusal, *arrays)


def refuse_long(*arrays: jax.Array, n: int = 0, **_: Any) -> str | None:
    """Why a kernel with indices of 32 bits cannot take the arguments, or None."""
    rows = max(n, *(len(x) for x in arrays))
    return f"{rows} rows, but it takes at most {LONGEST}" if rows > LONGEST else None


def in_float64(fun: Callable[..., Any]) -> Callable[..., Any]:
    """Makes ``fun(*arrays, **static)`` compute in float64, also where x64 mode is off.

    Args:
      fun: takes and gives float64 arrays that all have the same leading dimensions, any number of
        them, and uses `jax.lax` with care: what is traced after ``fun`` returns is not in x64 mode.

    Returns:
      A function of floating arrays whose results have their common dtype.
    """

    @functools.wraps(fun)
    def wrapped(*arrays: jax.Array, **static: Any) -> Any:
        dtype = jnp.result_type(*arrays)

        # Batched here and not by the rules of its operations, which would leave x64 mode.
        @jax.custom_batching.custom_vmap
        def run(*arrays: jax.Array) -> Any:
            with jax.enable_x64(True):
                wide = [jax.lax.convert_element_type(x, jnp.float64) for x in arrays]
                out = fun(*wide, **static)
                return jax.tree.map(lambda y: jax.lax.convert_element_type(y, dtype), out)

        @run.def_vmap
        def batch(axis_size: int, in_batched: Any, *arrays: jax.Array) -> Any:
            full = [
                x if is_batched else jnp.broadcast_to(x, (axis_size, *x.shape))
                for x, is_batched in zip(arrays, in_batched, strict=True)
            ]
            out = run(*full)
            return out, jax.tree.map(lambda _: True, out)

        return run(*arrays)

    return wrapped
