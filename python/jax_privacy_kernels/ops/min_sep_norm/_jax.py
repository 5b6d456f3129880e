"""The min-sep norm in plain JAX: the oracle, and what runs where no kernel does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_privacy_kernels.ops import _coefficients

__all__ = ["curvature", "norm", "run"]


def norm(
    window_sums: Callable[[jax.Array, int, int], jax.Array],
    coef: jax.Array,
    *,
    n: int,
    min_sep: int,
    max_participations: int,
    differentiate: bool,
) -> list[jax.Array]:
    """Value and gradient, by a function for the sums of windows such as `_window_sums`."""
    *batch, m = coef.shape
    sizes = jnp.abs(coef)
    p = jax.lax.cummax(sizes, axis=sizes.ndim - 1, reverse=True)
    pad = [(0, 0)] * len(batch) + [(0, n - m)]
    v = window_sums(jnp.pad(p, pad), min_sep, max_participations)
    value = jnp.sum(v * v, axis=-1)
    if not differentiate:
        return [value]
    # 2 W^T v, where W^T is W between reversed vectors.
    p_bar = 2 * window_sums(v[..., ::-1], min_sep, max_participations)[..., ::-1][..., :m]
    # The derivative of an element of p goes to the first coefficient behind it that equals it.
    t = jnp.broadcast_to(jnp.arange(m), coef.shape)
    to = jax.lax.cummin(jnp.where(sizes == p, t, m), axis=t.ndim - 1, reverse=True)
    rows = jnp.indices(coef.shape)[:-1]
    # At 0 the derivative to the right.
    gradient = jnp.zeros_like(coef).at[(*rows, to)].add(p_bar) * jnp.where(coef < 0, -1, 1)
    return [value, jnp.where(jnp.isnan(value)[..., None], jnp.nan, gradient)]


def _window_sums(x: jax.Array, min_sep: int, k: int) -> jax.Array:
    """Entry t is ``x[t] + x[t - min_sep] + ...``, k terms.

    Lay x out in rows of ``min_sep``, and cut the rows into blocks of k: a window of k rows is the
    head of one block and the tail of the block before. Nothing is subtracted.
    """
    *batch, n = x.shape
    k = min(k, -(-n // min_sep))
    pad = [(0, 0)] * len(batch) + [(0, -n % (k * min_sep))]
    blocks = jnp.pad(x, pad).reshape(*batch, -1, k, min_sep)
    axis = blocks.ndim - 2
    head = jax.lax.cumsum(blocks, axis=axis)
    tail = jax.lax.cumsum(blocks, axis=axis, reverse=True)
    tail = jnp.pad(tail[..., :-1, 1:, :], [(0, 0)] * len(batch) + [(1, 0), (0, 1), (0, 0)])
    return (head + tail).reshape(*batch, -1)[..., :n]


def curvature(
    coef: jax.Array, d_coef: jax.Array, n: int, min_sep: int, max_participations: int
) -> jax.Array:
    """The derivative of the gradient along ``d_coef``, ``[m]``: the norm is piecewise quadratic."""
    m = coef.size
    sizes, t = jnp.abs(coef), jnp.arange(m)
    signs = jnp.where(coef < 0, -jnp.ones_like(coef), jnp.ones_like(coef))
    p = jax.lax.cummax(sizes, reverse=True)
    to = jax.lax.cummin(jnp.where(sizes == p, t, m - 1), reverse=True)
    d_p = jnp.pad((signs * d_coef)[to], (0, n - m))
    v = _window_sums(d_p, min_sep, max_participations)
    p_bar = 2 * _window_sums(v[::-1], min_sep, max_participations)[::-1][:m]
    return jnp.zeros_like(p_bar).at[to].add(p_bar) * signs


@_coefficients.in_float64
def run(coef: jax.Array, **static: Any) -> list[jax.Array]:
    """Value and gradient."""
    return norm(_window_sums, coef, **static)
