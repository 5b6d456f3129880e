"""Pallas, as far as this process has it."""

from __future__ import annotations

import functools

from jax_privacy_kernels.ops import _gpu

__all__ = ["unavailable"]


def unavailable() -> str | None:
    """Why kernels in Pallas cannot be used, or None; without a GPU they can still be exported."""
    return _missing() or _gpu.too_old()


@functools.cache
def _missing() -> str | None:
    try:
        # Deprecated since jax 0.11: it may go.
        import jax.experimental.pallas
        import jax.experimental.pallas.triton  # noqa: F401
    except ImportError as error:
        return f"this jax has no Pallas for GPUs ({error})"
    return None
