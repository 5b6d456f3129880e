"""Correlated noise by its definition: no look-ahead, all terms kept, NumPy float64.

Only the samples come from JAX, from jax.random.normal on keys split as jax_privacy splits them.
"""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from support import golden_schedule

TILE = 1024


@functools.partial(jax.jit, static_argnums=(1, 2))
def _split(key, steps, leaves):
    def step(key, _):
        key, subkey = jax.random.split(key)
        return key, (key, subkey, jax.random.split(subkey, leaves))

    return jax.lax.scan(step, key, length=steps)[1]


def _at_least(steps):
    """A number of steps that many cases share, so that they share what XLA compiles."""
    return next(n for n in itertools.count(16, 16) if n >= steps)


def step_keys(key, steps):
    """Data of the key after each step, and of the key that each step's leaf keys are split from."""
    found = _split(key, _at_least(steps), 1)[:2]
    return tuple(np.asarray(jax.random.key_data(keys))[:steps] for keys in found)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _normal(data, key_impl, shape, dtype):
    # A map and not a vmap, in which keys of type rbg give other bits.
    keys = jax.random.wrap_key_data(data, impl=key_impl)
    return jax.lax.map(lambda key: jax.random.normal(key, shape, dtype), keys)


def independent(key, shapes, dtypes, steps):
    """Z of every leaf, of standard deviation 1, ``[steps, *shape]``."""
    key_impl = jax.random.key_impl(key)
    keys = _split(key, _at_least(steps), max(len(shapes), 1))[2]
    data = np.asarray(jax.random.key_data(keys))
    return [
        np.asarray(_normal(data[:, i], key_impl, shape, jnp.dtype(dtype).name))[:steps].astype(
            np.float64
        )
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    ]


def solve(coef, z):
    """x with C x = z, row by row; coef is ``[b]``, or ``[n, b]`` with those of every row."""
    coef = np.asarray(coef, np.float64)
    x = np.zeros(z.shape)
    for t in range(len(z)):
        c = coef[min(t, len(coef) - 1)] if coef.ndim == 2 else coef
        lags = min(t, len(c) - 1)
        past = np.tensordot(c[1 : lags + 1], x[t - lags : t][::-1], axes=1) if lags else 0.0
        x[t] = (z[t] - past) / c[0]
    return x


def moving_average(weights, z):
    """x_t = sum_l w_l z_{t-l}."""
    x = np.zeros(z.shape)
    for t in range(len(z)):
        for lag, weight in enumerate(weights[: t + 1]):
            x[t] += weight * z[t - lag]
    return x


def buffers(decay, scale, inverse, z):
    """x, and the buffers before every step and after the last, ``[steps + 1, m, ...]``."""
    column = (-1, *[1] * (z.ndim - 1))
    decay, scale = (np.asarray(v, np.float64).reshape(column) for v in (decay, scale))
    x, u = np.zeros(z.shape), np.zeros((len(z) + 1, len(decay), *z.shape[1:]))
    for t in range(len(z)):
        read = (scale * u[t]).sum(axis=0)
        x[t] = z[t] - read if inverse else z[t] + read
        u[t + 1] = decay * u[t] + (x[t] if inverse else z[t])
    return x, u


def gain(matrix):
    """The most that a matrix can magnify an error: the largest L1 norm of a row."""
    return np.abs(matrix).sum(axis=-1).max(initial=0)


def scaled(row_scale, stddev, x):
    """The rows that are added, ``s_{min(t, n-1)} stddev x_t``; NaN where they would be no noise."""
    x = stddev * x
    if row_scale is None:
        return x
    scale = np.asarray(row_scale, np.float64)
    if stddev:  # else no noise is what was asked for
        scale = np.where(scale == 0, np.nan, scale)
    rows = np.minimum(np.arange(len(x)), len(scale) - 1)
    return scale[rows].reshape(-1, *[1] * (x.ndim - 1)) * x


def terms(slots, size, first_tile, step, *, ahead=True):
    """Which x stands in each slot of each element before a step: ``[S, size]``, -1 for zero."""
    tiles = np.full((slots, -(-size // TILE)), -1)
    phases = golden_schedule.phases(slots, first_tile, tiles.shape[1])
    for t in range(step):
        for q, phase in enumerate(phases):
            if not ahead:
                tiles[t % slots, q] = t
            elif phase == t % slots:
                for tau in range(t, t + slots):
                    tiles[tau % slots, q] = tau
            elif t < slots - 1 and phase > t:
                tiles[t, q] = t
    return np.repeat(tiles, TILE, axis=1)[:, :size]


def ring(x, slots, first_tile, step, *, ahead=True, buffers=None):
    """The ring of a leaf before a step, from its x_0 .. x_{step + S - 1}.

    ``buffers`` holds the rows before the slots, as they are before every step.
    """
    shape = x.shape[1:]
    size = math.prod(shape)
    buffers = np.zeros((len(x) + 1, 0, *shape)) if buffers is None else buffers
    if size == 0:
        return np.zeros((buffers.shape[1] + slots, *shape))
    if slots == 0:
        return buffers[step]
    index = terms(slots, size, first_tile, step, ahead=ahead)
    flat = np.concatenate([x.reshape(len(x), size), np.zeros((1, size))])  # row -1
    in_slots = flat[index, np.arange(size)]
    made = index.max(axis=0) + 1  # the first step that each element has not made
    before = buffers.reshape(len(buffers), -1, size)[made, :, np.arange(size)].T
    return np.concatenate([before, in_slots]).reshape(-1, *shape)


def first_tiles(shapes):
    """The number of tiles before each leaf."""
    tiles = [-(-math.prod(shape) // TILE) for shape in shapes]
    return np.cumsum([0, *tiles])[:-1]
