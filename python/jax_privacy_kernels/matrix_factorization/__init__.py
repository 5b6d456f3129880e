"""Correlated-noise mechanisms: strategies, their noising matrices and their privacy.

Planning a mechanism takes three numbers: the error of a strategy C, its sensitivity, and so the
noise that a privacy guarantee asks for. C^-1 is the noising matrix, which a privatizer takes.

    >>> from jax_privacy_kernels.matrix_factorization import toeplitz
    >>> n, bands = 100, 10
    >>> coef = toeplitz.optimize_banded_toeplitz(n=n, bands=bands)
    >>> error = toeplitz.per_query_error(strategy_coef=coef, n=n).mean() ** 0.5
    >>> # An example takes part up to 5 times, at least 10 steps apart.
    >>> squared = toeplitz.minsep_sensitivity_squared(coef, min_sep=10, n=n, max_participations=5)
    >>> sensitivity = squared**0.5
    >>> print(f"{error:.3f} x {sensitivity:.3f}")
    2.947 x 2.236
    >>> noising_matrix = toeplitz.inverse_as_streaming_matrix(coef)
"""

from __future__ import annotations

from jax_privacy_kernels.matrix_factorization import (
    banded,
    buffered_toeplitz,
    checks,
    dense,
    optimization,
    sensitivity,
    streaming_matrix,
    toeplitz,
)
from jax_privacy_kernels.matrix_factorization.streaming_matrix import StreamingMatrix

__all__ = [
    "StreamingMatrix",
    "banded",
    "buffered_toeplitz",
    "checks",
    "dense",
    "optimization",
    "sensitivity",
    "streaming_matrix",
    "toeplitz",
]


def __dir__() -> list[str]:  # for completion: no imported names
    return sorted(__all__)
