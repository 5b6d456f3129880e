"""Toeplitz systems in plain JAX: the oracle, and what runs where no kernel does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels.ops import _coefficients

__all__ = ["run"]

BLOCK = 128


@_coefficients.in_float64
def run(coef: jax.Array, rhs: jax.Array, *, transpose: bool) -> jax.Array:
    """The solution.

    Forward substitution by blocks of L rows: what lies before a block goes to the right-hand side,
    and the block itself is a triangular system. The scan carries the last m - 1 rows of x, rounded
    up to whole blocks.
    """
    *batch, n, columns = rhs.shape
    m = coef.shape[-1]
    size = min(BLOCK, n)
    blocks, past = -(-n // size), -(-(m - 1) // size) * size
    if transpose:
        rhs = rhs[..., ::-1, :]
    edge = [(0, 0)] * len(batch)
    u = jnp.pad(rhs, [*edge, (0, blocks * size - n), (0, 0)])
    u = jnp.moveaxis(u.reshape(*batch, blocks, size, columns), -3, 0)

    def matrix(lag: np.ndarray) -> jax.Array:
        return jnp.where((lag >= 0) & (lag < m), coef[..., np.clip(lag, 0, m - 1)], 0.0)

    row = np.arange(size)[:, None]
    T, before = matrix(row - np.arange(size)), matrix(row + past - np.arange(past))

    def block(history: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
        u = u - jnp.einsum("...ij,...jc->...ic", before, history, precision="highest")
        x = jax.lax.linalg.triangular_solve(T, u, left_side=True, lower=True)
        history = jnp.concatenate([history, x], axis=-2)[..., size:, :] if past else history
        return history, x

    history = jnp.zeros((*batch, past, columns), rhs.dtype)
    _, x = jax.lax.scan(block, history, u)
    x = jnp.moveaxis(x, 0, -3).reshape(*batch, blocks * size, columns)[..., :n, :]
    return x[..., ::-1, :] if transpose else x
