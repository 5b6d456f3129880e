"""What plain JAX computes for each filter: a step of all elements, and the look-ahead of a tile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import jax.scipy.linalg

from jax_privacy_kernels.ops._jax_bundles import Bundle
from jax_privacy_kernels.ops._jax_noise import Here, weighted_samples
from jax_privacy_kernels.ops.correlated_noise._filters import (
    BufferedFilter,
    Filter,
    InverseBufferedFilter,
    MovingAverageFilter,
    RecurrenceFilter,
)

__all__ = ["VISITS", "Matrices", "Visits", "put", "read", "visited"]

Matrices = tuple[jax.Array, jax.Array | None]  # P, and Q unless it is zero


class Noise(Protocol):
    """Makes the part of x_t that is of samples alone, ``[size]``, of all elements.

    ``stddevs`` are those of the samples of ``keys``.
    """

    def __call__(
        self,
        filter: Any,
        here: Here | Bundle,
        step: jax.Array,
        keys: jax.Array,
        coef: jax.Array,
        stddevs: jax.Array,
        /,
    ) -> jax.Array: ...


class Term(Protocol):
    """Makes x_t of that part and a ring: gives x_t ``[size]`` and the buffers after the step.

    ``ring`` is ``[rows, size]``; terms of steps before step 0 are zero.
    """

    def __call__(
        self, filter: Any, step: jax.Array, coef: jax.Array, noise: jax.Array, ring: jax.Array, /
    ) -> tuple[jax.Array, jax.Array]: ...


class VisitMatrices(Protocol):
    """P ``[rows, behind + S]`` and Q ``[rows, rows]`` of a visit at step t: x' = P z + Q x."""

    def __call__(self, filter: Any, step: jax.Array, coef: jax.Array, /) -> Matrices: ...


class Visits(NamedTuple):
    """The two ways of making the terms of a filter: one of all elements, or some of a tile."""

    noise: Noise
    term: Term
    matrices: VisitMatrices


# -- Recurrences ------------------------------------------------------------------------------


def _this_sample(
    filter: Filter,
    here: Here | Bundle,
    step: jax.Array,
    keys: jax.Array,
    coef: jax.Array,
    stddevs: jax.Array,
) -> jax.Array:
    del filter, step, coef
    return stddevs[0] * here.sample(keys[0])


def _recurrence_term(
    filter: RecurrenceFilter, step: jax.Array, coef: jax.Array, noise: jax.Array, ring: jax.Array
) -> tuple[jax.Array, jax.Array]:
    past = jnp.zeros_like(noise)
    if filter.slots:
        # Slot m holds the term of lag (now - m) mod S, and of lag S if m = now.
        lags = jnp.roll(coef[0, 1:][::-1], step % filter.slots)
        past = jnp.einsum("s,sn->n", lags, ring, precision=jax.lax.Precision.HIGHEST)
    return (noise - past) / coef[0, 0], ring[:0]


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


def _moving_average(
    filter: MovingAverageFilter,
    here: Here | Bundle,
    step: jax.Array,
    keys: jax.Array,
    coef: jax.Array,
    stddevs: jax.Array,
) -> jax.Array:
    weights = filter.happened(step, coef[0]) * stddevs[: filter.samples]
    return weighted_samples(here, lambda j: keys[j], weights)


def _moving_average_term(
    filter: MovingAverageFilter,
    step: jax.Array,
    coef: jax.Array,
    noise: jax.Array,
    ring: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    del filter, step, coef
    return noise, ring[:0]


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


def _buffered_term(
    filter: BufferedFilter, step: jax.Array, coef: jax.Array, noise: jax.Array, ring: jax.Array
) -> tuple[jax.Array, jax.Array]:
    del step
    return _advance_buffers(filter, coef, noise, ring[: filter.buffers])


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
    RecurrenceFilter: Visits(_this_sample, _recurrence_term, _recurrence_matrices),
    MovingAverageFilter: Visits(_moving_average, _moving_average_term, _moving_average_matrices),
    BufferedFilter: Visits(_this_sample, _buffered_term, _buffered_matrices),
    InverseBufferedFilter: Visits(_this_sample, _buffered_term, _buffered_matrices),
}


# -- Rings ------------------------------------------------------------------------------------


def put(
    filter: Filter, step: jax.Array, ring: jax.Array, x: jax.Array, buffers: jax.Array
) -> jax.Array:
    """The ring with these buffers, and x in the slot of the step."""
    if filter.buffers:
        ring = jax.lax.dynamic_update_slice(ring, buffers, (0, 0))
    if filter.slots:
        row = filter.buffers + step % filter.slots
        ring = jax.lax.dynamic_update_index_in_dim(ring, x, row, 0)
    return ring


def visited(matrices: Matrices, z: jax.Array, ring: jax.Array | None) -> jax.Array:
    """P z + Q x, of samples and rings ``[.., tiles, width]``; no ring is needed if Q is None."""
    of_noise, of_ring = matrices
    new = _matmul(of_noise.astype(z.dtype), z)
    if of_ring is None or ring is None:
        return new
    return new + _matmul(of_ring.astype(z.dtype), ring)


def _matmul(matrix: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.einsum("ij,jtw->itw", matrix, x, precision=jax.lax.Precision.HIGHEST)


def read(ring: jax.Array, start: jax.Array, width: int) -> jax.Array:
    """Columns start[t] .. start[t] + width - 1 of the ring, as ``[rows, t, width]``."""
    return jax.lax.gather(
        ring,
        start[:, None],
        jax.lax.GatherDimensionNumbers(
            offset_dims=(0, 2), collapsed_slice_dims=(), start_index_map=(1,)
        ),
        slice_sizes=(ring.shape[0], width),
        indices_are_sorted=True,
        unique_indices=True,
        mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )
