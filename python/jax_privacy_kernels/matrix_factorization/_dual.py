"""Lower bounds on the error of dense strategies, and the optimum for one participation by them.

For ``X = C^T C`` the error is ``tr(M X^-1)``, with ``M = A^T A``. Any positive semidefinite L that
is supported where X is bound gives ``tr(M X^-1) >= T^2 / V``: with T the sum of the roots of the
eigenvalues of ``A L A^T``, and V the largest ``tr(L X)`` of a strategy of sensitivity 1, since
``tr(M X^-1) + tr(L X) >= 2 T`` for every X.

* The diagonal of X is bound for one participation: L is any diagonal, V its sum.
* With several epochs so is what lies between the rounds of one user. L has one value on the
  diagonal for all of them; being semidefinite it is nowhere larger in between, and V is the sum of
  these values: an orthogonality that one may or may not ask of X costs nothing.
* Of b bands, X has no entries beyond them: there L may have any.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Certificate", "Found", "least_for_one", "lower_bound"]


@dataclasses.dataclass(frozen=True)
class Certificate:
    """How good a strategy is, proved.

    Attributes:
      loss: Its mean squared error, times its squared sensitivity.
      lower_bound: No strategy of its kind has a lower loss.
    """

    loss: float
    lower_bound: float

    @property
    def gap(self) -> float:
        """The most that the loss may be above the least, relative to that."""
        return self.loss / self.lower_bound - 1


class Found(NamedTuple):
    """A Gram matrix, and as in `optimization.Report` how it was found."""

    X: jax.Array
    steps: int
    stopped: str
    lower_bound: float = 0.0


@functools.partial(jax.jit, static_argnums=(3, 4))
def lower_bound(
    X: jax.Array, workload: jax.Array, mask: jax.Array, epochs: int, by_column: bool
) -> jax.Array:
    """A bound on the mean squared error, from a Gram matrix X that should be near the best one.

    Args:
      X: ``[n, n]``, positive definite.
      workload: ``[n, n]`` A.
      mask: ``[n, n]``, 0 where X is bound to be 0.
      epochs: The rounds of a user, ``n / epochs`` apart.
      by_column: Whether every entry of the diagonal is bound on its own.

    Returns:
      A scalar. Rounding makes it lower, not higher.
    """
    n = len(X)
    # At the optimum this is L.
    half = jax.scipy.linalg.solve(X, workload.T, assume_a="pos")
    S = jnp.matmul(half, half.T, precision="highest")
    shared = jnp.tile(jnp.diag(S).reshape(epochs, -1).mean(axis=0), epochs)
    diagonal = jnp.diag(S) if by_column else shared
    L = jnp.where(mask == 0, S, 0.0).at[jnp.diag_indices(n)].set(diagonal)
    eps = jnp.finfo(L.dtype).eps
    values = jnp.linalg.eigvalsh(L)
    margin = 16 * n * eps * jnp.abs(values).max()
    shift = jnp.where(values[0] < margin, margin - values[0], 0.0)
    L = L + shift * jnp.eye(n)
    half = jnp.matmul(workload, L, precision="highest")
    product = jnp.matmul(half, workload.T, precision="highest")
    # What rounding may have added to an eigenvalue, in both products and in itself.
    largest = jnp.abs(values).max() + shift
    margin = 8 * n * eps * jnp.sum(workload**2) * largest
    roots = jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(product) - margin, 0.0))
    return roots.sum() ** 2 / (jnp.trace(L) / epochs) / n


def least_for_one(workload: jax.Array, rtol: float, steps: int) -> Found | None:
    """The Gram matrix of the best strategy for one participation, and the mean error.

    The multipliers v of its diagonal are a fixed point of ``v = diag((D M D)^(1/2))`` with
    ``D = diag(v)^(1/2)`` (https://arxiv.org/abs/2202.08312, section 4), which is iterated with
    steps of nearly twice the length. Every iterate gives a strategy and a lower bound.

    Args:
      workload: ``[n, n]`` A, in float64.
      rtol: Ends once the loss is at most this much above the bound, relatively.
      steps: The most iterations, each the eigenvalues of a matrix.

    Returns:
      What was found, or None for a workload that does not determine X.
    """
    M = jnp.matmul(workload.T, workload, precision="highest")
    v = jnp.sqrt(jnp.diag(M))
    best, bound, found = np.inf, 0.0, v
    for i in range(steps):
        loss, of_v, root_diagonal, X = _iterate(v, M)
        # Waiting on a value that is ready lets interrupts through in between.
        loss, of_v = float(loss), float(of_v)
        if not np.isfinite(loss):
            return None
        bound = max(bound, of_v)
        if loss < best:
            best, found = loss, X
        if best <= bound * (1 + rtol):
            return Found(found, i + 1, "proved", bound)
        v = v * (root_diagonal / v) ** 1.9
    return Found(found, steps, "max_optimizer_steps", bound)


@jax.jit
def _iterate(v: jax.Array, M: jax.Array) -> tuple[jax.Array, ...]:
    n = len(v)
    d = jnp.sqrt(v)
    values, vectors = jnp.linalg.eigh(d[:, None] * M * d)
    roots = jnp.sqrt(values)  # NaN if M is singular
    root = jnp.matmul(vectors * roots, vectors.T, precision="highest")
    inverse = jnp.matmul(vectors / roots, vectors.T, precision="highest")
    diagonal = jnp.diag(root)
    # X = D^-1 root D^-1, its diagonal scaled to ones.
    scale = jnp.sqrt(v / diagonal)
    X = root * (scale / d)[:, None] * (scale / d)
    loss = jnp.sum(inverse * M * (d / scale)[:, None] * (d / scale)) / n
    return loss, roots.sum() ** 2 / v.sum() / n, diagonal, X
