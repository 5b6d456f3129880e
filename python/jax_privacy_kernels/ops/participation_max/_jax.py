"""The participation maximum in plain JAX: the oracle, and what runs where no kernel does."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jax_privacy_kernels._checks import nan_unless
from jax_privacy_kernels.ops import _coefficients

__all__ = ["run"]


@_coefficients.in_float64
def run(
    x: jax.Array, *, min_sep: int, max_participations: int, differentiate: bool
) -> list[jax.Array]:
    """Value and gradient."""
    value = functools.partial(_value, min_sep=min_sep, max_participations=max_participations)
    known = ~jnp.isnan(x).any(axis=-1)
    if not differentiate:
        return [nan_unless(known, value(x))]
    result, pullback = jax.vjp(value, x)
    (gradient,) = pullback(jnp.ones_like(result))
    return [nan_unless(known, result), nan_unless(known[..., None], gradient)]


def _value(x: jax.Array, *, min_sep: int, max_participations: int) -> jax.Array:
    """One scan over i from the last, with the rows F(i + 1 .. i + min_sep, 0 .. k) in a ring."""
    *batch, n = x.shape
    min_sep = min(min_sep, n)
    most = -(-n // min_sep)
    binds = max_participations < most
    width = 1 + max_participations if binds else 1

    def step(
        carry: tuple[jax.Array, jax.Array], row: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        ring, following = carry
        i, x = row
        taken = x[..., None] + jax.lax.dynamic_index_in_dim(ring, i % min_sep, 0, keepdims=False)
        if binds:  # F(i + min_sep, j - 1), and F(i, 0) = 0
            never = jnp.full_like(taken[..., :1], -jnp.inf)
            taken = jnp.concatenate([never, taken[..., :-1]], axis=-1)
        best = jnp.maximum(taken, following)
        ring = jax.lax.dynamic_update_index_in_dim(ring, best, i % min_sep, 0)
        return (ring, best), None

    following = jnp.zeros((*batch, width), x.dtype)
    ring = jnp.zeros((min_sep, *following.shape), x.dtype)
    rows = (jnp.arange(n), jnp.moveaxis(x, -1, 0))
    (_, best), _ = jax.lax.scan(step, (ring, following), rows, reverse=True)
    return best[..., -1]
