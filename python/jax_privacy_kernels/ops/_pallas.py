"""Pallas, as far as this process has it."""

from __future__ import annotations

import functools

__all__ = ["unavailable"]

OLDEST = 8.0  # compute capability, of Ampere


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
    for device in devices:
        kind, capability = device.device_kind, float(device.compute_capability)
        if capability < OLDEST:
            return f"it needs compute capability {OLDEST}, but {kind} has {capability}"
    return None
