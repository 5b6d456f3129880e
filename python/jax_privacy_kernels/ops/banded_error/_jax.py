"""Errors of banded strategies in plain JAX: the oracle, and what runs where no kernel does."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_privacy_kernels.ops import _coefficients

__all__ = ["errors", "run", "tangent"]


@_coefficients.in_float64
def run(*arrays: jax.Array) -> Any:
    """Errors or derivatives."""
    if len(arrays) == 4:
        return errors(*arrays)
    *operands, g = arrays
    return list(jax.vjp(errors, *operands)[1](g))


@_coefficients.in_float64
def tangent(*arrays: jax.Array) -> jax.Array:
    """The derivative of the errors at the first four arrays, along the others."""
    return jax.jvp(errors, arrays[:4], arrays[4:])[1]


def errors(rows: jax.Array, scale: jax.Array, rates: jax.Array, momentum: jax.Array) -> jax.Array:
    """One scan over the steps, with the covariance of (x_{t-1} .. x_{t-b+1}, m, y) as carry."""
    *batch, _, b = rows.shape
    w = b - 1
    m, y = w, w + 1
    shift = jnp.eye(b + 1, k=-1).at[:1].set(0).at[m:].set(0).at[y, y].set(1)

    def step(K: jax.Array, now: Any) -> tuple[jax.Array, jax.Array]:
        row, scale, rate = now
        h = jnp.zeros((*batch, b + 1)).at[..., :w].set(-row[..., 1:] / row[..., :1])
        c = jnp.zeros((*batch, b + 1)).at[..., 0].set(1 if w else 0)
        c = c.at[..., m].set(scale).at[..., y].set(rate * scale)
        S = jnp.broadcast_to(shift, (*batch, b + 1, b + 1))
        S = S.at[..., m, m].set(momentum).at[..., y, m].set(rate * momentum)
        F = S + c[..., :, None] * h[..., None, :]
        K = jnp.einsum("...ij,...jk,...lk->...il", F, K, F, precision="highest")
        K = K + c[..., :, None] * c[..., None, :] / (row[..., :1] ** 2)[..., None]
        return K, K[..., y, y]

    K = jnp.zeros((*batch, b + 1, b + 1))
    by_step = (jnp.moveaxis(rows, -2, 0), jnp.moveaxis(scale, -1, 0), jnp.moveaxis(rates, -1, 0))
    _, errors = jax.lax.scan(step, K, by_step)
    return jnp.moveaxis(errors, 0, -1).astype(rows.dtype)
