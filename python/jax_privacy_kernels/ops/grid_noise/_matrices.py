"""What the op needs to know about noising matrices of integers."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels.ops.correlated_noise._filters import (
    MovingAverageFilter,
    RecurrenceFilter,
)
from jax_privacy_kernels.ops.grid_noise._rounding import Rounding

__all__ = ["EXACT_DOUBLES", "GridMatrix", "GridRecurrence", "GridSums"]

EXACT_DOUBLES = 2**51  # sums of integers below this are exact in float64, and so are their halves


@dataclasses.dataclass(frozen=True, eq=False)
class GridRecurrence:
    """The terms ``x_t = R((n_t - sum_{l=1}^{b-1} c_l x_{t-l}) / c_0)``, R(y) = floor(y + 1/2).

    The n are rounded normals, ``R(scale z)``.

    Attributes:
      coef: int32 array, ``c_0 != 0``: ``[b]``, or ``[n, b]`` for every row t < n. The strategy C in
        units of 2^-k, ``coef[t, l] = 2^k C[t, t - l]``.
      rounding: the scale is 2^k stddev.
      largest_term: all terms are smaller, but for a probability that is negligible.
      largest_sum: so are the sums that they are quotients of.
    """

    coef: np.ndarray
    rounding: Rounding
    largest_term: int
    largest_sum: int

    @property
    def filter(self) -> RecurrenceFilter:
        return RecurrenceFilter(True, self.coef.shape[-1] - 1)

    @property
    def in_doubles(self) -> bool:
        """Whether float64 holds all sums exactly."""
        return self.largest_sum < EXACT_DOUBLES

    @property
    def steps(self) -> int | None:
        """The number of its rows, if it has an end."""
        return self.coef.shape[0] if self.coef.ndim == 2 else None

    def coef_at(self, step: jax.Array) -> jax.Array:
        """``[1, b]``, or ``[filter.steps, b]`` for the steps from this one on."""
        coef = jnp.asarray(self.coef)
        if coef.ndim == 1:
            return coef[None]
        return coef.at[step + jnp.arange(self.filter.steps, dtype=jnp.int32)].get(mode="clip")

    def numbers(self) -> list[np.ndarray]:
        """All that terms depend on, as float32 without loss."""
        return _halves(self.coef.view(np.uint32), _words(np.array(self.rounding.scale)))


@dataclasses.dataclass(frozen=True, eq=False)
class GridSums:
    """The terms ``x_t = R(stddev sum_l w_l z_{t-l})``, rounded correctly.

    Attributes:
      weights: float64 array, ``[p]``, the coefficients w of a banded inverse; or ``[n, m]``, the
        rows of a dense matrix, ``x_t = R(stddev sum_j w[t, j] z_j)``.
      stddev: of the samples.
      slots: how many terms a visit makes, of a banded inverse; 0 keeps none.
      largest_term: all terms are smaller, but for a probability that is negligible.
    """

    weights: np.ndarray
    stddev: float
    slots: int
    largest_term: int

    @property
    def filter(self) -> MovingAverageFilter:
        return MovingAverageFilter(True, self.slots, self.weights.shape[-1])

    @property
    def dense(self) -> bool:
        """Whether samples are numbered by columns, and not by steps."""
        return self.weights.ndim == 2

    @property
    def rounding(self) -> Rounding:
        return Rounding(self.stddev)

    @property
    def in_doubles(self) -> bool:
        return True

    @property
    def steps(self) -> int | None:
        """The number of its rows, if it has an end."""
        return self.weights.shape[0] if self.dense else None

    def coef_at(self, step: jax.Array) -> jax.Array:
        """``[samples, 2]`` uint32, the words of the weights in the order of samples."""
        if not self.dense:
            return jnp.asarray(_words(self.weights[::-1]))
        return jnp.asarray(_words(self.weights)).at[step].get(mode="clip")

    def numbers(self) -> list[np.ndarray]:
        """All that terms depend on, as float32 without loss."""
        return _halves(_words(self.weights), _words(np.array(self.stddev)))


GridMatrix = GridRecurrence | GridSums


def _words(x: np.ndarray) -> np.ndarray:
    """``[*shape, 2]`` uint32, the low and the high words of float64."""
    wide = np.ascontiguousarray(x, "<f8").reshape(*np.shape(x), 1)
    return wide.view("<u4").astype(np.uint32)


def _halves(*words: np.ndarray) -> list[np.ndarray]:
    return [np.asarray(part, np.float32) for x in words for part in (x >> 16, x & 0xFFFF)]
