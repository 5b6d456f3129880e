"""Kernels in Triton, launched through jax-triton; both are optional, and imported when needed."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jax_privacy_kernels.ops import _gpu

__all__ = ["accurate", "call", "divisor", "unavailable"]


def unavailable() -> str | None:
    """Why kernels in Triton cannot be used, or None."""
    if reason := _missing():
        return reason
    # jax-triton compiles while JAX lowers.
    if not _gpu.targets():
        return (
            "it is compiled for the GPU that is there, or that an abstract mesh names, and there "
            "is none"
        )
    return _gpu.too_old() or _broken()


@functools.cache
def _missing() -> str | None:
    missing = [name for name in ("triton", "jax_triton") if not importlib.util.find_spec(name)]
    if missing:
        return f"not installed: {', '.join(missing)} (extra cuda; Python 3.12 or newer)"
    found = {name: importlib.metadata.version(name) for name in ("jax-triton", "triton")}
    if _family(*map(_version, found.values())) is None:
        return (
            f"jax-triton {found['jax-triton']} with triton {found['triton']} was not tried; it "
            f"takes {_gpu.families()}"
        )
    return None


@functools.cache
def _broken() -> str | None:
    try:
        import jax_triton  # noqa: F401
        import triton
        from jaxlib import gpu_triton
    except Exception as error:  # of versions that do not go together, more than ImportError
        return f"jax-triton cannot be loaded ({error!r})"
    if not hasattr(gpu_triton, "TritonKernel"):
        return "jaxlib has no plugin for CUDA (jax[cuda13])"
    if triton.knobs.runtime.interpret:
        return "TRITON_INTERPRET is set"
    return None


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)[:3]))


def _family(jax_triton: tuple[int, ...], triton: tuple[int, ...]) -> _gpu.TritonFamily | None:
    for family in _gpu.FAMILIES:
        (first, end), (oldest, newest) = family
        if first <= jax_triton < end and oldest <= triton < newest:
            return family
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
      aliases: from operands to the results that take their place. The kernel uses the result, which
        begins as the operand, and leaves the operand alone.
      **constants: arguments that are compiled in.
    """
    import jax_triton

    launch = _launch_0_3 if jax_triton.__version_info__ < (0, 4) else _launch_0_4
    gpu = _gpu.named()
    options = {
        "kernel": kernel,
        "grid": programs,
        "num_warps": warps,
        "compute_capability": None if gpu is None else gpu.capability,
        **constants,
    }

    @jax.custom_batching.sequential_vmap
    def run(*arrays: jax.Array) -> list[jax.Array]:
        return launch(arrays, numbers, list(outs), dict(aliases or {}), options)

    return run(*arrays)


def _launch_0_3(
    arrays: Sequence[jax.Array], numbers: Sequence[int], outs: Any, aliases: Any, options: Any
) -> list[jax.Array]:
    import jax_triton

    return jax_triton.triton_call(
        *arrays,
        *numbers,
        out_shape=outs,
        enable_fp_fusion=False,
        input_output_aliases=aliases,
        **options,
    )


def _launch_0_4(
    arrays: Sequence[jax.Array], numbers: Sequence[int], outs: Any, aliases: Any, options: Any
) -> list[jax.Array]:
    """Gives an aliased operand as the parameter of its result.

    Since 0.4 the two are one parameter. The other, which the kernel does not use, becomes a
    constant.
    """
    import jax_triton

    first = len(arrays) + len(numbers)  # parameter of the results
    names = [parameter.name for parameter in options["kernel"].params]
    operands: list[Any] = [*arrays, *numbers]
    by_name, places = {}, {}
    for place, (operand, out) in enumerate(sorted(aliases.items(), key=lambda pair: pair[1])):
        by_name[names[first + out]] = arrays[operand]
        operands[operand] = 1
        places[first + place] = out
    # It asks JAX for the types of numbers too, which have 32 bits outside of x64 mode.
    with jax.enable_x64(True), warnings.catch_warnings():
        # Aliases are deprecated there, but what replaces them is not in the older family.
        warnings.filterwarnings("ignore", "input_output_aliases", DeprecationWarning)
        return jax_triton.triton_call(
            *operands,
            out_type=outs,
            backend_options={"enable_fp_fusion": False},
            input_output_aliases=places,
            **by_name,
            **options,
        )


def divisor(size: int) -> int:
    """What a kernel may know that the size of its rows is a multiple of, for wide accesses."""
    return 8 if size % 8 == 0 else 1


def accurate() -> bool:
    """Whether JAX is configured to compute erf_inv accurately in its tails."""
    return bool(getattr(jax.config, "jax_accurate_erf_inv", False))
