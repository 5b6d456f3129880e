"""What samples of exact noise are rounded to."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import numpy as np

__all__ = ["FURTHEST", "LARGEST", "SMALLEST", "Rounding"]

# Samples further out than this many standard deviations, less than 2^-125 of them, are cut off.
FURTHEST = 13.0

# Of the scale. Below, a sample is hardly ever anything but 0; above, float64 settles too few.
SMALLEST, LARGEST = 2.0**-3, 2.0**42

_FRACTION_BITS = 192


@dataclasses.dataclass(frozen=True)
class Rounding:
    """How samples z become integers, R(scale z) with R(y) = floor(y + 1/2). Static.

    Attributes:
      scale: the standard deviation in units of the integers, stddev / delta.
    """

    scale: float

    @property
    def most(self) -> int:
        """No sample is further from 0."""
        return int(FURTHEST * self.scale)

    @property
    def spacing(self) -> int:
        """1 / (2 scale) times 2^192, rounded down."""
        return int(Fraction(2**_FRACTION_BITS) / (2 * Fraction(self.scale)))

    def words(self, bits: int, count: int) -> np.ndarray:
        """The spacing as words of 32 or 64 bits, the lowest first."""
        words = [self.spacing >> bits * i & 2**bits - 1 for i in range(count)]
        return np.array(words, np.uint64)
