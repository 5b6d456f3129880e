"""The compiled extension: loaded once, its handlers registered with XLA."""

from __future__ import annotations

import functools
import warnings

import jax

__all__ = ["simd_target", "unavailable"]


@functools.cache
def unavailable() -> str | None:
    """Why the extension cannot be used, or None; loads it at the first call."""
    try:
        from jax_privacy_kernels import _jpk
    except ImportError as error:
        warnings.warn(
            f"jax_privacy_kernels runs without its compiled kernels, on plain JAX: {error}. "
            "Install the package (pip install .) to compile them.",
            RuntimeWarning,
            stacklevel=2,
        )
        return f"the compiled extension cannot be loaded ({error})"
    for name, handler in _jpk.handlers().items():
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return None


def simd_target() -> str:
    """The instruction set that the kernels run on here."""
    from jax_privacy_kernels import _jpk

    return str(_jpk.simd_target())
