"""Kernels in Triton, launched through jax-triton; both are optional, and imported when needed."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jax_privacy_kernels.ops import _gpu

__all__ = ["call", "divisor", "unavailable"]


@functools.cache
def unavailable() -> str | None:
    """Why kernels in Triton cannot be used in this process, or None."""
    missing = [name for name in ("triton", "jax_triton") if not importlib.util.find_spec(name)]
    if missing:
        return f"not installed: {', '.join(missing)} (extra cuda; Python 3.12 or newer)"
    # jax-triton compiles while JAX lowers, and for the GPU of the process.
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        return "it is compiled for the GPU that is there, and there is none"
    if reason := _gpu.too_old(devices):
        return reason
    try:
        import jax_triton  # noqa: F401
        import triton
    except Exception as error:  # of versions that do not go together, more than ImportError
        return f"jax-triton cannot be loaded ({error!r})"
    if triton.knobs.runtime.interpret:
        return "TRITON_INTERPRET is set"
    return None


def call(
    kernel: Any,
    arrays: Sequence[jax.Array],
    numbers: Sequence[int],
    outs: Sequence[jax.ShapeDtypeStruct],
    *,
    programs: int,
    warps: int = 4,
    aliases: Mapping[int, int] | None = None,
    **constants: Any,
) -> list[jax.Array]:
    """Launches ``kernel(*arrays, *numbers, *outs, **constants)``.

    A kernel is compiled once for all numbers but 1, which jax-triton makes a constant, and once
    more for those from 2^31 on, which are unsigned, and from 2^32 on, of 64 bits.

    Args:
      kernel: a function of `triton.jit`.
      arrays: operands.
      numbers: arguments that are compiled in only if they are 1.
      outs: the results.
      programs: how many there are.
      warps: of a program.
      aliases: from operands to the results that take their place.
      **constants: arguments that are compiled in.
    """
    import jax_triton

    @jax.custom_batching.sequential_vmap
    def launch(*arrays: jax.Array) -> list[jax.Array]:
        return jax_triton.triton_call(
            *arrays,
            *numbers,
            kernel=kernel,
            out_shape=list(outs),
            grid=programs,
            num_warps=warps,
            enable_fp_fusion=False,
            input_output_aliases=dict(aliases or {}),
            **constants,
        )

    return launch(*arrays)


def divisor(size: int) -> int:
    """What a kernel may know that the size of its rows is a multiple of, for wide accesses."""
    return 8 if size % 8 == 0 else 1
