"""Toeplitz products in plain JAX: the oracle, and what runs where no kernel does."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels.ops import _coefficients

__all__ = ["refuse", "run"]

BLOCK = 256


def refuse(coef: jax.Array, rhs: jax.Array) -> str | None:
    """Why this implementation cannot take the arguments, or None."""
    del coef, rhs
    return None


@_coefficients.in_float64
def run(coef: jax.Array, rhs: jax.Array, *, transpose: bool, rows: int) -> jax.Array:
    """The product; the contract stands in toeplitz_multiply.py, above its table.

    Cut into blocks, T is made of the matrices K_p with ``K_p[i, j] = coef[p L + i - j]``, twice as
    high as wide: K_p takes block q of rhs to blocks q + p and q + p + 1. One scan over p.
    """
    *batch, n, columns = rhs.shape
    m = coef.shape[-1]
    size = min(BLOCK, n)
    bands, blocks = -(-m // size), -(-n // size)
    if transpose:
        rhs = rhs[..., ::-1, :]
    edge = [(0, 0)] * len(batch)
    coef = jnp.pad(coef, [*edge, (0, bands * size - m)]).reshape(*batch, bands, size)
    x = jnp.pad(rhs, [*edge, (0, blocks * size - n), (0, 0)])
    x = x.reshape(*batch, blocks, size, columns)
    lag = np.arange(2 * size)[:, None] - np.arange(size)
    inside = (lag >= 0) & (lag < size)

    def add(sums: jax.Array, band: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        p, c = band
        K = jnp.where(inside, c[..., np.clip(lag, 0, size - 1)], 0.0)
        product = jnp.einsum("...ij,...qjc->...qic", K, x, precision="highest")
        for i in (0, 1):
            part = product[..., i * size : (i + 1) * size, :]
            at: list[Any] = [*[0] * len(batch), p + i, 0, 0]
            here = jax.lax.dynamic_slice(sums, at, part.shape)
            sums = jax.lax.dynamic_update_slice(sums, here + part, at)
        return sums, None

    sums = jnp.zeros((*batch, blocks + bands, size, columns), rhs.dtype)
    sums, _ = jax.lax.scan(add, sums, (jnp.arange(bands), jnp.moveaxis(coef, -2, 0)))
    out = sums.reshape(*batch, -1, columns)[..., :n, :]
    return (out[..., ::-1, :] if transpose else out)[..., :rows, :]
