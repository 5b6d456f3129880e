"""The hot paths: one public op each, and its implementations."""

from jax_privacy_kernels.ops._dispatch import asked, implementation
from jax_privacy_kernels.ops._fingerprint import fingerprint_of_function, is_fingerprint
from jax_privacy_kernels.ops._leaves import check_noise_dtype, check_shared
from jax_privacy_kernels.ops._once import mark_tree
from jax_privacy_kernels.ops._partition import check_mesh, sharding_of
from jax_privacy_kernels.ops._partition import zeros as zeros_on_mesh
from jax_privacy_kernels.ops._state import NoiseState, key_words
from jax_privacy_kernels.ops._stddev import LEAST as LEAST_STDDEV
from jax_privacy_kernels.ops._stddev import MOST as MOST_STDDEV
from jax_privacy_kernels.ops._stddev import is_usable as is_usable_stddev
from jax_privacy_kernels.ops.banded_error import Momentum, banded_error
from jax_privacy_kernels.ops.correlated_noise import (
    correlated_noise,
    init_correlated_noise,
)
from jax_privacy_kernels.ops.correlated_noise._matrices import (
    BandedRecurrence,
    BufferedToeplitz,
    MovingAverage,
    NoisingMatrix,
)
from jax_privacy_kernels.ops.dense_noise import dense_noise, init_dense_noise
from jax_privacy_kernels.ops.min_sep_norm import min_sep_norm
from jax_privacy_kernels.ops.participation_max import participation_max
from jax_privacy_kernels.ops.privacy_loss_sums import privacy_loss_sums
from jax_privacy_kernels.ops.toeplitz_multiply import toeplitz_multiply
from jax_privacy_kernels.ops.toeplitz_solve import toeplitz_solve

__all__ = [
    "LEAST_STDDEV",
    "MOST_STDDEV",
    "BandedRecurrence",
    "BufferedToeplitz",
    "Momentum",
    "MovingAverage",
    "NoiseState",
    "NoisingMatrix",
    "asked",
    "banded_error",
    "check_mesh",
    "check_noise_dtype",
    "check_shared",
    "correlated_noise",
    "dense_noise",
    "fingerprint_of_function",
    "implementation",
    "init_correlated_noise",
    "init_dense_noise",
    "is_fingerprint",
    "is_usable_stddev",
    "key_words",
    "mark_tree",
    "min_sep_norm",
    "participation_max",
    "privacy_loss_sums",
    "sharding_of",
    "toeplitz_multiply",
    "toeplitz_solve",
    "zeros_on_mesh",
]
