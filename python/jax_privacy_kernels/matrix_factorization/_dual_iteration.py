"""The optimum over dense strategies for one participation or one in every epoch, by its dual.

For multipliers L (see `_dual`), positive definite, ``tr(M X^-1) + tr(L X)`` is least at
``X = L^(-1/2) (L^(1/2) M L^(1/2))^(1/2) L^(-1/2)``. X is optimal if it also is of sensitivity 1 and
L fits it: if for the rounds of every user the block of X is a diagonal matrix T of trace 1, and
that of L has one value on its diagonal. For one participation the blocks are numbers, and L is
known to be a fixed point (https://arxiv.org/abs/2202.08312, section 4). So it is here: with
``Y = T^(-1/2) X T^(-1/2)`` of a block, which should be 1, ``K = T^(1/2) L T^(1/2)`` becomes
``Y^(p/2) K Y^(p/2)``, p = 2 being right if M is diagonal; and shares T rise where the diagonal of L
is above its mean. Steps are mixed by Anderson's method (https://doi.org/10.1145/321296.321305), in
logarithms. Every iterate gives a lower bound, and a strategy: X, its blocks made equal to T.

In NumPy: a few eigenvalue problems take less time than to compile for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels.matrix_factorization._dual import Found, rounding_margin

__all__ = ["least"]

_POWER = 1.9  # p: a little less than 2 damps
_MEMORY = 8  # steps that are mixed
_MOST_CHANGE = 0.7  # of a logarithm by mixing, beyond what the step itself changes
_MOST_STEPS = 200


def least(
    workload: Any, epochs: int, by_column: bool, rtol: float, steps: int, near: Any = None
) -> Found | None:
    """The Gram matrix of the best strategy without limits on its bands, and the mean error.

    Args:
      workload: ``[n, n]`` A.
      epochs: The rounds of a user, ``n / epochs`` apart, which divides n.
      by_column: Whether the shares of all rounds of a user are the same.
      rtol: Ends once the loss is at most half of this above the bound, relatively: with the bound
        that follows from the result alone it is then within rtol as a rule.
      steps: The most iterations, each the eigenvalues of a matrix.
      near: ``[n, n]`` a positive definite X to start from.

    Returns:
      What was found, or None for a workload that does not determine X.
    """
    A = np.asarray(workload, np.float64)
    # Rounds of a user lie next to each other.
    order = np.arange(len(A)).reshape(epochs, -1).T.reshape(-1)
    scale = float(np.abs(A).max())
    A = A[:, order] / (scale or 1.0)
    norms = np.linalg.norm(A, axis=0).reshape(-1, epochs)
    if not norms.all():
        return None
    problem = _Problem(A, A.T @ A, by_column)
    L = norms.mean(axis=1)[:, None, None] * np.eye(epochs)
    now = _Multipliers(L, np.full_like(norms, 1 / epochs))
    if near is not None:
        now = _multipliers_of(problem, np.asarray(near, np.float64)[np.ix_(order, order)], epochs)
    mixed, last_gap = _Mixed(by_column), np.inf
    plain: _Multipliers | None = None  # where to go back to, if mixing went astray
    best, bound, stopped, taken = np.inf, 0.0, "max_optimizer_steps", 0
    X: np.ndarray | None = None
    while taken < min(steps, _MOST_STEPS):
        taken += 1
        with np.errstate(all="ignore"):
            reached = _iterate(problem, now)
        gap = np.nan if reached is None else reached.loss / reached.dual - 1
        if plain is not None and not gap <= 2 * last_gap:
            now, plain = plain, None
            mixed, last_gap = _Mixed(by_column), np.inf
            continue
        if reached is None or not np.isfinite(gap):
            break
        bound = max(bound, reached.certain)
        if reached.loss < best:
            best, X = reached.loss, reached.X
        if best <= bound * (1 + rtol / 2):
            stopped = "proved"
            break
        if gap <= 1e-2 * rtol:  # as near as rounding lets one prove it
            stopped = "converged"
            break
        plain, last_gap = reached.next, gap
        with np.errstate(all="ignore"):
            now = mixed.step(now, plain)
    if X is None:
        return None
    in_order = np.empty_like(X)
    in_order[np.ix_(order, order)] = X
    return Found(jnp.asarray(in_order), taken, stopped, bound * scale**2)


class _Problem(NamedTuple):
    """The workload with its rounds in order, and ``A^T A``."""

    A: np.ndarray
    M: np.ndarray
    by_column: bool


class _Multipliers(NamedTuple):
    """L as blocks ``[n / k, k, k]``, and the shares T ``[n / k, k]``, rows of sum 1."""

    L: np.ndarray
    shares: np.ndarray


def _multipliers_of(problem: _Problem, X: np.ndarray, k: int) -> _Multipliers:
    """The blocks of ``X^-1 M X^-1``, which are L if X is optimal, made positive definite."""
    S = np.linalg.solve(X, np.linalg.solve(X, problem.M).T)
    shares = np.diag(X).reshape(-1, k)
    shares = shares / shares.sum(axis=1, keepdims=True)
    values, vectors = np.linalg.eigh(_blocks(S, k))
    values = np.maximum(values, 1e-6 * values.max(axis=1, keepdims=True))
    L = vectors * values[:, None, :] @ np.swapaxes(vectors, 1, 2)
    if problem.by_column:
        return _Multipliers(L, np.full_like(shares, 1 / k))
    return _Multipliers(_balanced(L, shares).L, shares)


def _blocks(matrix: np.ndarray, k: int) -> np.ndarray:
    period = len(matrix) // k
    return matrix.reshape(period, k, period, k)[np.arange(period), :, np.arange(period), :]


class _Iterate(NamedTuple):
    """The loss of the strategy X, the dual, the same less what rounding may do, what follows."""

    loss: float
    dual: float
    certain: float
    X: np.ndarray
    next: _Multipliers


def _iterate(problem: _Problem, at: _Multipliers) -> _Iterate | None:
    """None where numbers are not finite any more."""
    A, M, by_column = problem
    L, shares = at
    period, k, _ = L.shape
    n = period * k

    def times(blocks: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        """A block-diagonal matrix times another one."""
        return np.matmul(blocks, matrix.reshape(period, k, -1)).reshape(n, -1)

    def both_sides(blocks: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        """B matrix B^T, of a symmetric matrix."""
        return times(blocks, times(blocks, matrix).T)

    root, inverse_root = _functions(L, np.sqrt, lambda w: 1 / np.sqrt(w))
    product = both_sides(root, M)
    if not np.isfinite(product).all():
        return None
    try:
        values, vectors = np.linalg.eigh((product + product.T) / 2)
    except np.linalg.LinAlgError:  # does not converge
        return None
    if not values[0] > 0:  # M is singular
        return None
    roots = np.sqrt(values)
    R = (vectors * roots) @ vectors.T
    inverse_R = (vectors / roots) @ vectors.T
    most = np.diagonal(L, axis1=1, axis2=2)
    volume = most.sum() / k if by_column else most.max(axis=1).sum()
    # Half of it: products with blocks have few terms, so that M alone is a product of n of them.
    margin = rounding_margin(A, np.abs(L).sum(axis=2).max()) / 2

    X_blocks = inverse_root @ _blocks(R, k) @ inverse_root
    root_X, inverse_root_X = _functions(X_blocks, np.sqrt, lambda w: 1 / np.sqrt(w))
    root_T = np.sqrt(shares)
    # B^T X B has the blocks T, and its inverse is B^-1 L^(1/2) R^-1 L^(1/2) B^-T.
    B = inverse_root @ inverse_root_X * root_T[:, None, :]
    X = both_sides(np.swapaxes(B, 1, 2), R)
    inverse_B = root_X @ root / root_T[:, :, None]
    error = np.sum(both_sides(inverse_B, inverse_R) * M)
    # Exactly: of these blocks nothing is left but their diagonals.
    i = np.arange(n)
    X = np.where(i[:, None] // k == i // k, np.diag(shares.reshape(-1)), X)

    outer_T = root_T[:, :, None] * root_T[:, None, :]
    (step,) = _functions(X_blocks / outer_T, lambda w: w ** (_POWER / 2))
    new_L = step @ (L * outer_T) @ step / outer_T
    return _Iterate(
        loss=float(error / n),
        dual=float(roots.sum() ** 2 / volume / n),
        certain=float(np.sqrt(np.maximum(values - margin, 0)).sum() ** 2 / volume / n),
        X=(X + X.T) / 2,
        next=_Multipliers(new_L, shares) if by_column else _balanced(new_L, shares),
    )


def _balanced(L: np.ndarray, shares: np.ndarray) -> _Multipliers:
    """Blocks with one value on their diagonals, and shares that rise where it was above that."""
    diagonal = np.diagonal(L, axis1=1, axis2=2)
    mean = np.sum(shares * diagonal, axis=1, keepdims=True)
    off = np.sqrt(diagonal / mean)
    shares = np.maximum(shares * off, 1e-100)
    L = L / off[:, :, None] / off[:, None, :]
    return _Multipliers(L, shares / shares.sum(axis=1, keepdims=True))


def _functions(
    blocks: np.ndarray, *functions: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, ...]:
    """Functions of symmetric matrices, by their eigenvalues; NaN if blocks are not finite."""
    if blocks.shape[-1] == 1:
        return tuple(function(blocks) for function in functions)
    if not np.isfinite(blocks).all():
        return tuple(np.full_like(blocks, np.nan) for _ in functions)
    values, vectors = np.linalg.eigh((blocks + np.swapaxes(blocks, 1, 2)) / 2)
    transposed = np.swapaxes(vectors, 1, 2)
    return tuple(vectors * f(values)[:, None, :] @ transposed for f in functions)


class _Mixed:
    """Anderson's method: the combination of the last steps that should end at a fixed point."""

    def __init__(self, by_column: bool) -> None:
        self.by_column = by_column
        self.before: list[np.ndarray] = []
        self.after: list[np.ndarray] = []

    def step(self, now: _Multipliers, plain: _Multipliers) -> _Multipliers:
        """Where to go on, given where the plain step from here leads."""
        after = _logarithms(plain)
        self.before = [*self.before, _logarithms(now)][-_MEMORY - 1 :]
        self.after = [*self.after, after][-_MEMORY - 1 :]
        if len(self.after) == 1:
            return plain
        changes = np.subtract(self.after, self.before)
        of_changes, of_after = np.diff(changes, axis=0), np.diff(self.after, axis=0)
        gram = of_changes @ of_changes.T
        gram += (1e-10 * np.trace(gram) + 1e-300) * np.eye(len(gram))
        correction = np.linalg.solve(gram, of_changes @ changes[-1]) @ of_after
        correction *= min(1.0, _MOST_CHANGE / max(np.abs(correction).max(), 1e-300))
        period, k = plain.shares.shape
        logs = after - correction
        shares = np.exp(logs[-period * k :]).reshape(period, k)
        (L,) = _functions(logs[: -period * k].reshape(period, k, k), np.exp)
        shares /= shares.sum(axis=1, keepdims=True)
        return _Multipliers(L if self.by_column else _balanced(L, shares).L, shares)


def _logarithms(x: _Multipliers) -> np.ndarray:
    (log_L,) = _functions(x.L, np.log)
    return np.concatenate([log_L.reshape(-1), np.log(x.shares).reshape(-1)])
