"""Buffered linear Toeplitz (BLT) strategies: n x n, but a few buffers to multiply a stream by.

A BLT is lower-triangular Toeplitz, with ones on its diagonal and, below it, a sum of a few decaying
exponentials. So is its inverse: https://arxiv.org/abs/2404.16706. With the m decays
``theta = buf_decay`` and ``omega = output_scale``, the notation of all that follows,
``c_0 = 1`` and ``c_t = sum_j omega_j theta_j^(t-1)``. Both multiply a stream with m slots of state,
whatever n is. :func:`optimize` finds a good one.

    >>> import jax.numpy as jnp
    >>> blt = BufferedToeplitz.build([0.9, 0.5], [0.2, 0.1], dtype=jnp.float32)
    >>> noising_matrix = blt.inverse_as_streaming_matrix()
    >>> noising_matrix
    StreamingMatrix(inverse of a BLT of 2 buffers, look_ahead = 0)

What is computed from values that are known is computed in NumPy, in float64: nothing is compiled,
and what a float32 BLT is said to cost does not depend on rounding. Inside a trace it is computed in
the dtype of the BLT, or the default one if that is wider.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import jax

from jax_privacy_kernels.matrix_factorization.buffered_toeplitz._losses import (
    LossFn,
    iteration_error,
    limit_max_error,
    limit_max_loss,
    max_error,
    max_loss,
    require_buf_decay_less_eq_one,
    require_output_scale_gt_zero,
    sensitivity_squared,
)
from jax_privacy_kernels.matrix_factorization.buffered_toeplitz._matrix import (
    BufferedToeplitz,
    StreamingMatrixBuilder,
    blt_pair_from_theta_pair,
    check_float64_dtype,
    min_buf_decay_gap,
)
from jax_privacy_kernels.matrix_factorization.buffered_toeplitz._optimization import (
    Parameterization,
    _blts_of_decay_pair,
    _blts_of_interlaced,
    _decay_pair,
    _interlaced,
    _same,
    _with_inverse,
    get_init_blt,
    optimize,
    optimize_loss,
)
from jax_privacy_kernels.matrix_factorization.buffered_toeplitz._sums import (
    geometric_sum,
    robust_max_error_Gamma_j,
    robust_max_error_Gamma_jk,
)

ScalarFloat: TypeAlias = jax.typing.ArrayLike
"""A real number, or an array of shape ()."""

ThetaPairType: TypeAlias = tuple[jax.Array, jax.Array]
"""Decays of C, and of ``C^-1``."""

__all__ = [
    "BufferedToeplitz",
    "LossFn",
    "Parameterization",
    "ScalarFloat",
    "StreamingMatrixBuilder",
    "ThetaPairType",
    "blt_pair_from_theta_pair",
    "check_float64_dtype",
    "geometric_sum",
    "get_init_blt",
    "iteration_error",
    "limit_max_error",
    "limit_max_loss",
    "max_error",
    "max_loss",
    "min_buf_decay_gap",
    "optimize",
    "optimize_loss",
    "require_buf_decay_less_eq_one",
    "require_output_scale_gt_zero",
    "robust_max_error_Gamma_j",
    "robust_max_error_Gamma_jk",
    "sensitivity_squared",
]

# Pickles name this module, whichever file of it a name is written in: classes and functions by
# their own names, a Parameterization by those of its functions too.
_aliases = {"ScalarFloat", "ThetaPairType"}
_named: list[Any] = [globals()[name] for name in __all__ if name not in _aliases]
_named += [_same, _with_inverse, _decay_pair, _blts_of_decay_pair, _interlaced, _blts_of_interlaced]
for _object in _named:
    _object.__module__ = __name__


def __dir__() -> list[str]:  # for completion: no imported names
    return sorted(__all__)
