"""The discrete Gaussian in NumPy, for comparison: exact noise of another law, by rejection.

Algorithm 3 of Canonne, Kamath and Steinke, "The discrete Gaussian for differential privacy",
https://arxiv.org/abs/2004.00010, with floats in place of their rational numbers, which favours it.
"""

from __future__ import annotations

import math

import numpy as np

__all__ = ["discrete_gaussian"]


def discrete_gaussian(rng: np.random.Generator, stddev: float, size: int) -> np.ndarray:
    """``[size]`` int64, each k with a probability proportional to ``exp(-k^2 / (2 stddev^2))``.

    A candidate is discrete Laplace of scale t = floor(stddev) + 1, as the difference of two
    geometric variables, and is accepted with probability
    ``exp(-(|k| - stddev^2 / t)^2 / (2 stddev^2))``, between a half and three quarters in all.
    """
    t = math.floor(stddev) + 1
    success = -math.expm1(-1 / t)
    found = np.empty(size, np.int64)
    have = 0
    while have < size:
        count = int(1.35 * (size - have)) + 16  # once is enough if three quarters are accepted
        candidates = rng.geometric(success, count) - rng.geometric(success, count)
        distance = np.abs(candidates) - stddev**2 / t
        accepted = candidates[rng.random(count) < np.exp(-(distance**2) / (2 * stddev**2))]
        taken = accepted[: size - have]
        found[have : have + taken.size] = taken
        have += taken.size
    return found
