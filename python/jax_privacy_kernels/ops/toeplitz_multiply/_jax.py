"""Toeplitz products in plain JAX: the oracle, and what runs where no kernel does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels.ops import _coefficients

__all__ = ["run"]

BLOCK = 256


@_coefficients.in_float64
def run(coef: jax.Array, rhs: jax.Array, *, transpose: bool, rows: int) -> jax.Array:
    """The product.

    Cut into blocks of L rows, T is made of the matrices K_p with ``K_p[i, j] = coef[p L + i - j]``,
    0 <= i < 2 L: the upper half takes block q of rhs to block q + p, the lower half to the next.
    One scan over p, for the blocks that hold wanted rows.
    """
    *batch, n, columns = rhs.shape
    m = coef.shape[-1]
    size = min(BLOCK, n)
    bands, blocks = -(-m // size), -(-n // size)
    if transpose:  # T between vectors that begin with their last row
        rhs = rhs[..., ::-1, :]
    first = (n - rows) // size if transpose else 0
    edge = [(0, 0)] * len(batch)
    coef = jnp.pad(coef, [*edge, (0, bands * size - m)]).reshape(*batch, bands, size)
    x = jnp.pad(rhs, [*edge, (bands * size, blocks * size - n), (0, 0)])
    x = x.reshape(*batch, bands + blocks, size, columns)
    lag = np.arange(2 * size)[:, None] - np.arange(size)
    inside = (lag >= 0) & (lag < size)
    wanted = blocks - first

    def add(sums: jax.Array, band: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        p, c = band
        K = jnp.where(inside, c[..., np.clip(lag, 0, size - 1)], 0.0)
        from_block = first + bands - 1 - p
        here = jax.lax.dynamic_slice_in_dim(x, from_block, wanted + 1, axis=len(batch))
        for half, part in ((K[..., :size, :], here[..., 1:, :, :]), (K[..., size:, :], here)):
            product = jnp.einsum("...ij,...qjc->...qic", half, part, precision="highest")
            sums = sums + product[..., :wanted, :, :]
        return sums, None

    sums = jnp.zeros((*batch, wanted, size, columns), rhs.dtype)
    sums, _ = jax.lax.scan(add, sums, (jnp.arange(bands), jnp.moveaxis(coef, -2, 0)))
    out = sums.reshape(*batch, wanted * size, columns)[..., : n - first * size, :]
    return (out[..., ::-1, :] if transpose else out)[..., :rows, :]
