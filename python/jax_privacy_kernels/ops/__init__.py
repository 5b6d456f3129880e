"""The hot paths: one public op each, and its implementations."""

from jax_privacy_kernels.ops._chacha20 import CHACHA20
from jax_privacy_kernels.ops._dispatch import asked, check_name, implementation
from jax_privacy_kernels.ops._export import disabled_safety_checks
from jax_privacy_kernels.ops._fingerprint import fingerprint_of_function, is_fingerprint
from jax_privacy_kernels.ops._leaves import FLOATS, check_noise_dtype
from jax_privacy_kernels.ops._once import check_devices, mark_tree
from jax_privacy_kernels.ops._partition import check_mesh, sharding_of
from jax_privacy_kernels.ops._partition import zeros as zeros_on_mesh
from jax_privacy_kernels.ops._state import NoiseState
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
from jax_privacy_kernels.ops.grid_noise import grid_noise, init_grid_noise
from jax_privacy_kernels.ops.grid_noise._matrices import GridMatrix, GridRecurrence, GridSums
from jax_privacy_kernels.ops.grid_noise._rounding import Rounding
from jax_privacy_kernels.ops.min_sep_norm import min_sep_norm
from jax_privacy_kernels.ops.participation_max import participation_max
from jax_privacy_kernels.ops.privacy_loss_sums import privacy_loss_sums
from jax_privacy_kernels.ops.toeplitz_multiply import toeplitz_multiply
from jax_privacy_kernels.ops.toeplitz_solve import toeplitz_solve

__all__ = [
    "CHACHA20",
    "FLOATS",
    "LEAST_STDDEV",
    "MOST_STDDEV",
    "BandedRecurrence",
    "BufferedToeplitz",
    "GridMatrix",
    "GridRecurrence",
    "GridSums",
    "Momentum",
    "MovingAverage",
    "NoiseState",
    "NoisingMatrix",
    "Rounding",
    "asked",
    "banded_error",
    "check_devices",
    "check_mesh",
    "check_name",
    "check_noise_dtype",
    "correlated_noise",
    "dense_noise",
    "disabled_safety_checks",
    "fingerprint_of_function",
    "grid_noise",
    "implementation",
    "init_correlated_noise",
    "init_dense_noise",
    "init_grid_noise",
    "is_fingerprint",
    "is_usable_stddev",
    "mark_tree",
    "min_sep_norm",
    "participation_max",
    "privacy_loss_sums",
    "sharding_of",
    "toeplitz_multiply",
    "toeplitz_solve",
    "zeros_on_mesh",
]
