"""The one list of ops. The report, the tests and the interpreters derive theirs from it."""

from __future__ import annotations

import importlib

from jax_privacy_kernels.ops._dispatch import Table

__all__ = ["OPS", "table"]

# Each is a folder of this name here, which exports a function of this name and IMPLEMENTATIONS.
OPS = (
    "correlated_noise",
    "dense_noise",
    "grid_noise",
    "toeplitz_multiply",
    "toeplitz_solve",
    "min_sep_norm",
    "participation_max",
    "banded_error",
    "privacy_loss_sums",
)


def table(op: str) -> Table:
    """The implementations of an op, fastest first."""
    implementations: Table = importlib.import_module(f"{__package__}.{op}").IMPLEMENTATIONS
    return implementations
