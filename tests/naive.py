"""Correlated noise by its definition: no look-ahead, all terms kept, NumPy float64.

Only the samples come from JAX, from jax.random.normal on keys split as jax_privacy splits them.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

TILE = 1024


@functools.partial(jax.jit, static_argnums=(1, 2))
def _split(key, steps, leaves):
    def step(key, _):
        key, subkey = jax.random.split(key)
        return key, (key, subkey, jax.random.split(subkey, leaves))

    return jax.lax.scan(step, key, length=steps)[1]


def step_keys(key, steps):
    """Data of the key after each step, and of the key that each step's leaf keys are split from."""
    after, of_step, _ = _split(key, steps, 1)
    return np.asarray(jax.random.key_data(after)), np.asarray(jax.random.key_data(of_step))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(keys, shape, dtype):
    # A map and not a vmap, in which keys of type rbg give other bits.
    return jax.lax.map(lambda key: jax.random.normal(key, shape, dtype), keys)


def independent(key, shapes, dtypes, steps):
    """Z of every leaf, of standard deviation 1, ``[steps, *shape]``."""
    keys = _split(key, steps, max(len(shapes), 1))[2]
    return [
        np.asarray(_normal(keys[:, i], shape, jnp.dtype(dtype).name)).astype(np.float64)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    ]


def solve(coef, z):
    """x with C x = z, row by row."""
    coef = np.asarray(coef, np.float64)
    x = np.zeros(z.shape)
    for t in range(len(z)):
        lags = min(t, len(coef) - 1)
        past = np.tensordot(coef[1 : lags + 1], x[t - lags : t][::-1], axes=1) if lags else 0.0
        x[t] = (z[t] - past) / coef[0]
    return x


def gain(coef, steps):
    """The most that ``C^-1`` can magnify an error in z: the L1 norm of its last row."""
    return np.abs(solve(coef, np.eye(steps, 1))).sum()


def scaled(row_scale, stddev, x):
    """The rows that are added, ``s_{min(t, n-1)} stddev x_t``."""
    x = stddev * x
    if row_scale is None:
        return x
    scale = np.asarray(row_scale, np.float64)
    rows = np.minimum(np.arange(len(x)), len(scale) - 1)
    return scale[rows].reshape(-1, *[1] * (x.ndim - 1)) * x


def terms(slots, size, first_tile, step, *, ahead=True):
    """Which x stands in each slot of each element before a step: ``[S, size]``, -1 for zero."""
    tiles = np.full((slots, -(-size // TILE)), -1)
    for t in range(step):
        for q in range(tiles.shape[1]):
            phase = (q + first_tile) % slots
            if not ahead:
                tiles[t % slots, q] = t
            elif phase == t % slots:
                for tau in range(t, t + slots):
                    tiles[tau % slots, q] = tau
            elif t < slots - 1 and phase > t:
                tiles[t, q] = t
    return np.repeat(tiles, TILE, axis=1)[:, :size]


def ring(x, slots, first_tile, step, *, ahead=True):
    """The ring of a leaf before a step, from its x_0 .. x_{step + S - 1}."""
    shape = x.shape[1:]
    size = math.prod(shape)
    if slots == 0 or size == 0:
        return np.zeros((slots, *shape))
    index = terms(slots, size, first_tile, step, ahead=ahead)
    flat = np.concatenate([x.reshape(len(x), size), np.zeros((1, size))])  # row -1
    return flat[index, np.arange(size)].reshape(slots, *shape)


def first_tiles(shapes):
    """The number of tiles before each leaf."""
    tiles = [-(-math.prod(shape) // TILE) for shape in shapes]
    return np.cumsum([0, *tiles])[:-1]
