"""What `jax.export` wants to be told of compiled kernels."""

from __future__ import annotations

import jax.export

from jax_privacy_kernels.ops import _ffi

__all__ = ["disabled_safety_checks"]

# What kernels are called by jax-triton 0.3 and 0.4, and by Pallas.
_OF_GPUS = "triton_kernel_call", "triton_kernel_call_ffi", "__gpu$xla.gpu.triton"


def disabled_safety_checks() -> list[jax.export.DisabledSafetyCheck]:
    """The checks to disable in order to export a step, or any function here, with its kernels.

    ``jax.export.export(jax.jit(privatizer.update), disabled_checks=disabled_safety_checks())``.
    JAX refuses custom calls that it does not know, since another version of a library may mean
    something else by them. So run what is exported where this version of jax_privacy_kernels is
    imported, or export ``implementation="jax"``, which needs no checks disabled.

    Returns:
      A check for every kernel of the compiled extension, and for those in Triton and Pallas.
    """
    targets = [*_ffi.targets(), *_OF_GPUS]
    return [jax.export.DisabledSafetyCheck.custom_call(target) for target in targets]
