"""BFGS for losses that are differentiable almost everywhere, with minima at kinks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

__all__ = ["bfgs"]

_STILL = 3  # steps in a row that lower the loss by less than this, relatively, are the last
_RTOL = 1e-12


def bfgs(
    value_and_grad: Callable[[np.ndarray], tuple[float, np.ndarray]], x: np.ndarray, steps: int
) -> tuple[np.ndarray, float, int, str]:
    """Minimizes a function with gradients on either side of its kinks.

    A line search for the weak Wolfe conditions makes steps that cross kinks, from which BFGS learns
    where they are: https://doi.org/10.1007/s10107-012-0514-2. L-BFGS with backtracking stops there.

    Args:
      value_and_grad: Gives the loss and its gradient ``[p]``; what is not finite is never accepted.
      x: ``[p]`` where to start, in float64.
      steps: The most steps.

    Returns:
      Where it ends, the loss there, the number of steps, and why it ended, as in
      `optimization.Report`.
    """
    loss, gradient = value_and_grad(x)
    H, still, is_first = _steep(x, gradient), 0, True
    for i in range(steps):
        direction = -H @ gradient
        if not gradient @ direction < 0:
            H, is_first = _steep(x, gradient), True
            direction = -H @ gradient
            if not gradient @ direction < 0:
                return x, loss, i, "converged"
        new, new_loss, new_gradient = _searched(value_and_grad, x, loss, gradient, direction)
        if not new_loss <= loss:
            return x, loss, i + 1, "converged"
        step, change = new - x, new_gradient - gradient
        curvature = float(step @ change)
        if curvature > 0:
            if is_first:
                H, is_first = np.eye(len(x)) * (curvature / (change @ change)), False
            V = np.eye(len(x)) - np.outer(step, change) / curvature
            H = V @ H @ V.T + np.outer(step, step) / curvature
        still = still + 1 if loss - new_loss <= _RTOL * abs(loss) else 0
        x, loss, gradient = new, new_loss, new_gradient
        if still == _STILL:
            return x, loss, i + 1, "converged"
    return x, loss, steps, "max_optimizer_steps"


def _steep(x: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """The first inverse Hessian: a step of a hundredth of x, or of that for small x."""
    length = 0.01 * max(float(np.linalg.norm(x)), 0.1)
    return np.eye(len(x)) * (length / max(float(np.linalg.norm(gradient)), 1e-300))


def _searched(
    value_and_grad: Callable[[np.ndarray], tuple[float, np.ndarray]],
    x: np.ndarray,
    loss: float,
    gradient: np.ndarray,
    direction: np.ndarray,
) -> tuple[np.ndarray, float, np.ndarray]:
    """A point that meets the weak Wolfe conditions, by bisection and doubling."""
    slope = float(gradient @ direction)
    low, high, size = 0.0, np.inf, 1.0
    lower = x, loss, gradient
    for _ in range(50):
        new = x + size * direction
        new_loss, new_gradient = value_and_grad(new)
        if not (np.isfinite(new_gradient).all() and new_loss <= loss + 1e-4 * size * slope):
            high = size
        elif new_gradient @ direction < 0.5 * slope:
            low, lower = size, (new, new_loss, new_gradient)
        else:
            return new, new_loss, new_gradient
        size = (low + high) / 2 if high < np.inf else 2 * low
    return lower
