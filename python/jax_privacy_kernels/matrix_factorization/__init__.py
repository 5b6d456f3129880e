"""Correlated-noise mechanisms: strategies, their noising matrices and their privacy."""

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
