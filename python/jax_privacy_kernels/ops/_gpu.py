"""What the kernels for GPUs ask of a device, in whatever language they are."""

from __future__ import annotations

from typing import Any

__all__ = ["too_old"]

OLDEST = 8.0  # compute capability, of Ampere


def too_old(devices: Any) -> str | None:
    """Why kernels cannot be used on these CUDA devices, or None."""
    for device in devices:
        kind, capability = device.device_kind, float(device.compute_capability)
        if capability < OLDEST:
            return f"it needs compute capability {OLDEST}, but {kind} has {capability}"
    return None
