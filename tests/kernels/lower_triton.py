"""Lowers a step of correlated noise in Triton for CUDA and prints what XLA gets.

Needs a jaxlib with CUDA's plugin, but no GPU: exits with 77 where jax-triton cannot be loaded.
"""

from __future__ import annotations

import sys
from unittest import mock

import jax
import jax.export
import jax.numpy as jnp

from jax_privacy_kernels.ops import BandedRecurrence, correlated_noise, init_correlated_noise
from jax_privacy_kernels.ops.correlated_noise import IMPLEMENTATIONS

try:
    from jax_triton import triton_lib
except ImportError as error:
    print(error)
    sys.exit(77)

TARGET = "triton_kernel_call"
KEY = jax.random.key(0)
MATRIX = BandedRecurrence(jnp.array([1.0, 0.5, 0.2]))
GRADS = [jax.ShapeDtypeStruct((size,), jnp.float32) for size in (5_000, 7, 2**31 + 9)]


def update(grads, state):
    impl = jax.random.key_impl(KEY)
    return correlated_noise(
        grads, state, MATRIX, stddev=1.0, key_impl=impl, implementation="triton"
    )


def main(platforms):
    entry = IMPLEMENTATIONS["triton"]._replace(unavailable=lambda: None)
    plugin = triton_lib.triton_kernel_call_lib
    with (
        mock.patch.dict(IMPLEMENTATIONS, triton=entry),
        mock.patch.object(plugin, "get_compute_capability", return_value=90),
    ):
        state = jax.eval_shape(lambda: init_correlated_noise(GRADS, MATRIX, key=KEY))
        checks = [jax.export.DisabledSafetyCheck.custom_call(TARGET)]
        function = jax.jit(update, donate_argnums=1)
        export = jax.export.export(function, platforms=platforms, disabled_checks=checks)
        print(export(GRADS, state).mlir_module())


if __name__ == "__main__":
    main(sys.argv[1:])
