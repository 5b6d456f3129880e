"""Lower bounds on what banded and Toeplitz optimizers can reach, from the dense problem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels.matrix_factorization import dense, optimization, sensitivity

__all__ = ["dense_bound"]

_MOST_ROWS = 128  # of a matrix that is optimized for a bound: some seconds


def dense_bound(
    n: int,
    bands: int,
    reduction_fn: Callable[[jax.Array], jax.Array],
    workload: np.ndarray | None,
    A: Any,
    min_sep: int | None,
    max_participations: int | None,
) -> float | None:
    """A bound on mean error times squared sensitivity, or None where there is none at hand.

    It is that of the dense problem, solved to 1e-3 or as far as 300 steps get. Whoever may take
    part ``min_sep`` steps apart may take part once in every epoch of that length: a bound for the
    latter is one for the former.

    Args:
      n: The number of steps.
      bands: The most bands of the strategies that it bounds.
      reduction_fn: Of the errors of the queries: there is a bound for `jax.numpy.mean` alone.
      workload: ``[n]`` coefficients of A, or None for prefix sums; unless there is
      A: a StreamingMatrix, or None.
      min_sep, max_participations: The pattern.
    """
    if reduction_fn is not jnp.mean or n > _MOST_ROWS:
        return None
    epochs = 1
    if min_sep is not None and min_sep < n:
        epochs = sensitivity.participations(n, min_sep, max_participations)
        if epochs > 1 and epochs * min_sep != n:
            return None
    reports: list[optimization.Report] = []
    with jax.enable_x64(True):
        matrix: Any = None
        if A is not None:
            matrix = A.materialize(n)
        elif workload is not None:
            lag = np.arange(n)[:, None] - np.arange(n)
            matrix = np.where(lag >= 0, workload[np.maximum(lag, 0)], 0.0)
        dense.optimize(
            n,
            epochs=epochs,
            bands=bands if bands < n else None,
            A=matrix,
            max_optimizer_steps=300,
            rtol=1e-3,
            report=reports.append,
        )
    return reports[0].lower_bound
