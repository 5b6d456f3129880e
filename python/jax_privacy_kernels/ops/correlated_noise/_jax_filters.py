"""What plain JAX computes for each filter: a step of all elements, and the look-ahead of a tile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import jax.scipy.linalg

from jax_privacy_kernels.ops._jax_noise import Here, weighted_samples
from jax_privacy_kernels.ops.correlated_noise._filters import (
    BufferedFilter,
    Filter,
    InverseBufferedFilter,
    MovingAverageFilter,
    RecurrenceFilter,
)

__all__ = ["VISITS", "Matrices", "Visits"]

Matrices = tuple[jax.Array, jax.Array | None]  # P, and Q unless it is zero


class OneStep(Protocol):
    """Makes x_t of all elements: gives x_t ``[size]`` and the buffers after the step.

    ``stddevs`` are those of the samples of ``keys``. ``ring`` is ``[rows, size]``; terms of steps
    before step 0 are zero.
    """

    def __call__(
        self,
        filter: Any,
        here: Here,
        step: jax.Array,
        keys: jax.Array,
        coef: jax.Array,
        stddevs: jax.Array,
        ring: jax.Array,
        /,
    ) -> tuple[jax.Array, jax.Array]: ...


class VisitMatrices(Protocol):
    """P ``[rows, behind + S]`` and Q ``[rows, rows]`` of a visit at step t: x' = P z + Q x."""

    def __call__(self, filter: Any, step: jax.Array, coef: jax.Array, /) -> Matrices: ...


class Visits(NamedTuple):
    """The two ways of making the terms of a filter."""

    one_step: OneStep
    matrices: VisitMatrices


# -- Recurrences ------------------------------------------------------------------------------


def _recurrence_step(
    filter: RecurrenceFilter,
    here: Here,
    step: jax.Array,
    keys: jax.Array,
    coef: jax.Array,
    stddevs: jax.Array,
    ring: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    z = stddevs[0] * here.sample(keys[0])
    past = jnp.zeros_like(z)
    if filter.slots:
        # Slot m holds the term of lag (now - m) mod S, and of lag S if m = now.
        lags = jnp.roll(coef[0, 1:][::-1], step % filter.slots)
        past = jnp.einsum("s,sn->n", lags, ring, precision=jax.lax.Precision.HIGHEST)
    return (z - past) / coef[0, 0], ring[:0]


def _recurrence_matrices(filter: RecurrenceFilter, step: jax.Array, coef: jax.Array) -> Matrices:
    """The terms to come x' of a recurrence, T x' + H x = z for two triangular matrices."""
    slots, now = filter.slots, step % filter.slots
    padded = jnp.pad(jnp.broadcast_to(coef, (slots, slots + 1)), ((0, 0), (0, slots)))
    row, column = jnp.arange(slots)[:, None], jnp.arange(slots)[None, :]
    # In time order x_{t+i} meets x_{t+j} with lag i - j, and x_{t-S+j} with lag S + i - j <= S.
    to_come = jnp.where(column <= row, padded[row, row - column], 0)
    in_ring = jnp.where(column >= row, padded[row, slots + row - column], 0)
    rhs = jnp.concatenate([jnp.eye(slots, dtype=coef.dtype), -in_ring], axis=1)
    of_noise, of_ring = jnp.split(
        jax.scipy.linalg.solve_triangular(to_come, rhs, lower=True), 2, axis=1
    )
    # From the order of time to the order of slots, which is `now` places on.
    return jnp.roll(of_noise, now, 0), jnp.roll(jnp.roll(of_ring, now, 0), now, 1)


# -- Moving averages --------------------------------------------------------------------------


def _moving_average_step(
    filter: MovingAverageFilter,
    here: Here,
    step: jax.Array,
    keys: jax.Array,
    coef: jax.Array,
    stddevs: jax.Array,
    ring: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    weights = filter.happened(step, coef[0]) * stddevs[: filter.samples]
    return weighted_samples(here, lambda j: keys[j], weights), ring[:0]


def _moving_average_matrices(
    filter: MovingAverageFilter, step: jax.Array, coef: jax.Array
) -> Matrices:
    slots, behind = filter.slots, filter.behind
    lag = jnp.arange(behind + slots)[None, :] - jnp.arange(slots)[:, None]
    weights = jnp.where((lag >= 0) & (lag <= behind), coef[0, jnp.clip(lag, 0, behind)], 0)
    return jnp.roll(filter.happened(step, weights), step % slots, 0), None


# -- Buffers ----------------------------------------------------------------------------------


def _advance_buffers(
    filter: BufferedFilter, coef: jax.Array, z: jax.Array, buffers: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """x of a step, and the buffers after it."""
    inverse = isinstance(filter, InverseBufferedFilter)
    decay, weight = coef
    read = jnp.einsum("m,mn->n", weight, buffers, precision=jax.lax.Precision.HIGHEST)
    x = z - read if inverse else z + read
    return x, decay[:, None] * buffers + (x if inverse else z)


def _buffered_step(
    filter: BufferedFilter,
    here: Here,
    step: jax.Array,
    keys: jax.Array,
    coef: jax.Array,
    stddevs: jax.Array,
    ring: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    del step
    z = stddevs[0] * here.sample(keys[0])
    return _advance_buffers(filter, coef, z, ring[: filter.buffers])


def _buffered_matrices(filter: BufferedFilter, step: jax.Array, coef: jax.Array) -> Matrices:
    """Buffers and terms after S steps, as linear forms in the buffers before and the samples."""
    slots, rows, now = filter.slots, filter.rows, step % filter.slots
    forms = jnp.eye(rows, dtype=coef.dtype)  # of each buffer, then of each sample

    def advance(buffers: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, buffers = _advance_buffers(filter, coef, z, buffers)
        return buffers, x

    buffers, x = jax.lax.scan(advance, forms[: filter.buffers], forms[filter.buffers :])
    of_buffers, of_noise = jnp.split(jnp.concatenate([buffers, x]), [filter.buffers], axis=1)
    in_slots = filter.buffers + (jnp.arange(slots) - now) % slots
    order = jnp.concatenate([jnp.arange(filter.buffers), in_slots])
    nothing = jnp.zeros((rows, slots), coef.dtype)  # the slots as they were have no part in it
    return of_noise[order], jnp.concatenate([of_buffers[order], nothing], axis=1)


VISITS: Mapping[type[Filter], Visits] = {
    RecurrenceFilter: Visits(_recurrence_step, _recurrence_matrices),
    MovingAverageFilter: Visits(_moving_average_step, _moving_average_matrices),
    BufferedFilter: Visits(_buffered_step, _buffered_matrices),
    InverseBufferedFilter: Visits(_buffered_step, _buffered_matrices),
}
