"""Lower bounds on the error of dense strategies.

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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["Certificate", "Found", "lower_bound", "rounding_margin"]


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
    largest = jnp.abs(values).max() + shift
    margin = rounding_margin(workload, largest)
    roots = jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(product) - margin, 0.0))
    return roots.sum() ** 2 / (jnp.trace(L) / epochs) / n


def rounding_margin(workload: Any, largest: Any) -> Any:
    """What rounding may have added to an eigenvalue of ``A L A^T``, in both products and in itself.

    Args:
      workload: ``[n, n]`` A, in float64.
      largest: A bound on the eigenvalues of L.
    """
    return 8 * len(workload) * 2.0**-52 * (workload**2).sum() * largest
