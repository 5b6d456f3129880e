"""The hot paths: one public op each, and its implementations."""

from jax_privacy_kernels.ops._counter_prng import normal
from jax_privacy_kernels.ops._dispatch import implementation
from jax_privacy_kernels.ops._lookahead import looks_ahead
from jax_privacy_kernels.ops._recurrence import BandedRecurrence
from jax_privacy_kernels.ops.correlated_noise import (
    NoiseState,
    check_noise_dtype,
    correlated_noise,
    init_correlated_noise,
)

__all__ = [
    "BandedRecurrence",
    "NoiseState",
    "check_noise_dtype",
    "correlated_noise",
    "implementation",
    "init_correlated_noise",
    "looks_ahead",
    "normal",
]
