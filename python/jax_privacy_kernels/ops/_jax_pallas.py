"""Pallas, as far as this process has it."""

from __future__ import annotations

import functools

from jax_privacy_kernels.ops import _gpu

__all__ = ["unavailable"]


@functools.cache
def unavailable() -> str | None:
    """Why kernels in Pallas cannot be used, or None; without a GPU they can still be exported."""
    try:
        # Deprecated since jax 0.11: it may go.
        import jax.experimental.pallas
        import jax.experimental.pallas.triton
    except ImportError as error:
        return f"this jax has no Pallas for GPUs ({error})"
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        return None
    return _gpu.too_old(devices)
