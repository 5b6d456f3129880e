"""The compiled extension: its handlers are registered with XLA when the package is imported.

So a step that another process compiled and serialized can be loaded and run at once. No backend is
initialized by that. The first op that asks whether the extension can be used calls a handler.
"""

from __future__ import annotations

import functools
import threading
import warnings

import jax
import numpy as np

__all__ = ["simd_target", "targets", "unavailable"]


def _register() -> str | None:
    """Registers all handlers; says why that is not possible, or gives None."""
    try:
        from jax_privacy_kernels import _jpk

        for name, handler in _jpk.handlers().items():
            jax.ffi.register_ffi_target(name, handler, platform="cpu")
    except Exception as error:  # of an extension that was built for another jaxlib, anything
        return f"the compiled extension cannot be loaded ({error})"
    return None


_registered = _register()


@functools.cache
def unavailable() -> str | None:
    """Why the extension cannot be used, or None; warns once if it cannot."""
    reason = _registered or _failure()
    if reason:
        warnings.warn(
            f"jax_privacy_kernels runs without its compiled kernels, on plain JAX: {reason}. "
            "Install the package (pip install .) to compile them.",
            RuntimeWarning,
            stacklevel=2,
        )
    return reason


def _failure() -> str | None:
    """Calls a handler: says why that fails, or gives None, also if there is no CPU to call it on.

    Registering can succeed where every call fails, if jaxlib and the handlers disagree.
    """
    found: list[str] = []

    def call() -> None:
        try:
            device = jax.local_devices(backend="cpu")[0]
        except (RuntimeError, AssertionError):  # no CPUs, or nothing at all, by JAX_PLATFORMS
            return
        try:
            out = jax.ShapeDtypeStruct((1, 1), np.float32)
            product = jax.ffi.ffi_call("jpk_toeplitz_multiply", out)

            def one_times_six() -> jax.Array:
                return product(
                    np.ones(1, np.float32), np.full((1, 1), 6, np.float32), transpose=False
                )

            with jax.default_device(device), jax.transfer_guard("allow"):
                value = jax.jit(one_times_six)().item()
        except Exception as error:  # XLA's errors are of many types
            found.append(f"calls of the compiled extension fail ({error})")
        else:
            if value != 6.0:
                found.append(f"the compiled extension computes 1 * 6 = {value}")

    # In a thread of its own: this may be called inside a trace, under any configuration.
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return found[0] if found else None


def targets() -> list[str]:
    """What XLA calls the handlers; none if the extension cannot be loaded."""
    if _registered:
        return []
    from jax_privacy_kernels import _jpk

    return sorted(_jpk.handlers())


def simd_target() -> str:
    """The instruction set that the kernels run on here."""
    from jax_privacy_kernels import _jpk

    return str(_jpk.simd_target())
