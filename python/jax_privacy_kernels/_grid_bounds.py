"""How large exact noise can become: what decides the integers that hold it."""

from __future__ import annotations

import math

import numpy as np

from jax_privacy_kernels.ops import GridRecurrence, GridSums, Rounding

__all__ = ["LEAST_SCALE", "MOST_SCALE", "recurrence", "sums"]

# Of the standard deviation, in steps of what is rounded to. Below, noise is hardly anything but
# 0; above, float64 settles too few samples.
LEAST_SCALE, MOST_SCALE = 2.0**-3, 2.0**42

# P(|N| > 14.5) < 2^-155: among 2^55 terms, none is further out but for a probability of 2^-100.
_DEVIATIONS = 14.5
_LONGEST = 2**17  # entries of the inverse of a Toeplitz strategy that are looked at
_MOST_SUM = 2**61  # of what is divided, in int64


def recurrence(coef: np.ndarray, scale: float) -> GridRecurrence:
    """The noising matrix of these coefficients, with bounds on its terms.

    Args:
      coef: int32 ``[b]`` or ``[n, b]``, the rows of 2^k C.
      scale: 2^k stddev.

    Raises:
      ValueError: terms grow without bound, or do not fit into 64 bits.
    """
    rounding = Rounding(scale)
    wide = coef.astype(np.float64)
    normal, rounded = _toeplitz_norms(wide) if coef.ndim == 1 else _row_norms(wide)
    # In units of 2^-k, 2^k C x is a normal sample, its rounding and that of the quotient.
    diagonal = float(np.abs(wide[..., 0]).max())
    largest = _DEVIATIONS * scale * normal + (0.5 + 0.5 * diagonal) * rounded + 1
    lags = float(np.abs(wide[..., 1:]).sum(axis=-1).max()) if coef.shape[-1] > 1 else 0.0
    largest_sum = _DEVIATIONS * scale + lags * largest + 2 * diagonal * largest
    if not largest_sum < _MOST_SUM:
        raise ValueError(
            f"expected noise of sums below 2^61, found sums of up to {largest_sum:.3g}: choose a "
            "smaller stddev and grid_scale, or fewer fraction_bits"
        )
    return GridRecurrence(coef, rounding, math.ceil(largest), math.ceil(largest_sum))


def sums(weights: np.ndarray, stddev: float, slots: int) -> GridSums:
    """The noising matrix with these weights, with a bound on its terms.

    Args:
      weights: float64 ``[p]`` or ``[n, m]``, the rows of C^-1.
      stddev: of the samples.
      slots: how many terms a visit makes.

    Raises:
      ValueError: terms are too small or too large for sums that float64 settles.
    """
    with np.errstate(over="ignore"):
        total = float(np.abs(weights).sum(axis=-1).max()) * stddev
    if not LEAST_SCALE <= total <= MOST_SCALE:
        raise ValueError(
            "expected the largest row of C^-1 to have absolute values that sum up to between 1/8 "
            f"and 2^42 with stddev, found {total:.6g} for stddev={stddev}: choose another "
            "grid_scale"
        )
    # The bounds of fixed point hold for a stddev near 1 and products below 2^42, however small or
    # large the factors are that were given.
    stddev, exponent = math.frexp(stddev)
    weights = np.ldexp(weights, exponent)
    normal = float(np.sqrt(np.square(weights).sum(axis=-1).max())) * stddev
    return GridSums(weights, stddev, slots, math.ceil(1.01 * _DEVIATIONS * normal) + 1)


def _toeplitz_norms(coef: np.ndarray) -> tuple[float, float]:
    """Bounds on the L2 and the L1 norm of all of the inverse's coefficients h.

    Those from M on solve the recurrence that begins with h_{M-b+2} .. h_M. So they are a sum of
    shifts of h, with factors of sizes q in all, and their norms are at most q times those of h.
    """
    c = coef / coef[0]
    order = len(c) - 1
    if order == 0:
        return 1 / abs(coef[0]), 1 / abs(coef[0])
    h = np.zeros(order + 256)
    h[order] = 1.0  # zeros come before
    made = order + 1
    while made <= _LONGEST:
        with np.errstate(over="ignore", invalid="ignore"):
            for i in range(made, len(h)):
                h[i] = -c[1:] @ h[i - order : i][::-1]
        made = len(h)
        # What h_{M-j} adds to the right-hand sides of later rows: c_l h_{M-j} for l > j.
        reach = np.cumsum(np.abs(c[:0:-1]))[::-1]
        q = float(np.abs(h[-order:])[::-1] @ reach)
        if not np.isfinite(h).all():
            break
        if q < 0.25:
            growth = 1.01 / (1 - q) / abs(coef[0])
            return float(np.linalg.norm(h)) * growth, float(np.abs(h).sum()) * growth
        h = np.concatenate([h, np.zeros(len(h))])
    raise ValueError(
        "expected a C whose inverse has coefficients that decay, found some that do not within "
        f"{_LONGEST} steps: noise would grow without bound, and no integer would hold it. Give C "
        "row by row, [n, b], for as many steps as there are"
    )


def _row_norms(coef: np.ndarray) -> tuple[float, float]:
    """Bounds on the L2 and the L1 norm of the rows of the inverse, one after the other.

    By the covariance of the last b - 1 terms of independent samples of variance 1. A visit makes
    b - 1 terms more than there are rows, with the coefficients of the last.
    """
    n, bands = coef.shape
    order = bands - 1
    if order == 0:
        return float((1 / np.abs(coef)).max()), float((1 / np.abs(coef)).max())
    covariance = np.zeros((order, order))  # of the newest term first
    most = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for t in range(n + order):
            row = coef[min(t, n - 1)]
            weights = -row[1:] / row[0]
            with_new = covariance @ weights
            variance = float(1 / row[0] ** 2 + weights @ with_new)
            most = max(most, variance) if math.isfinite(variance) else math.inf
            covariance = np.roll(np.roll(covariance, 1, 0), 1, 1)
            covariance[0, 0] = variance
            covariance[0, 1:] = covariance[1:, 0] = with_new[:-1]
    largest = 1.01 * math.sqrt(most)
    return largest, largest * math.sqrt(n + order)
