"""The contract between grid_noise and its implementations."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Protocol

import jax

from jax_privacy_kernels.ops._noise import NoiseInputs, NoiseOutputs, register
from jax_privacy_kernels.ops.correlated_noise._filters import (
    MovingAverageFilter,
    RecurrenceFilter,
)
from jax_privacy_kernels.ops.grid_noise._rounding import Rounding

__all__ = ["Inputs", "Run"]


@register
@dataclasses.dataclass(frozen=True)
class Inputs(NoiseInputs):
    """Step t of some or all leaves of a tree of int32 and int64, or of shards of them.

    Attributes:
      filter: of the terms, static.
      rounding: what samples are rounded to, static; its scale is the stddev of moving averages.
      in_doubles: whether float64 holds all sums of integers exactly, static.
      step: int32 scalar, t; negative for a step that is not valid.
      keys: typed chacha20 keys of steps t - filter.behind .. t + filter.steps - 1. The key of a
        leaf is the one of ``split(key, count)`` at its index.
      coef: of a recurrence int32, ``[1, b]`` or ``[filter.steps, b]``, c_0 not 0; of a moving
        average uint32, ``[filter.behind + 1, 2]``, the low and the high words of float64 weights
        of z_{t - filter.behind} .. z_t.
    """

    static_fields: ClassVar[tuple[str, ...]] = (
        *NoiseInputs.static_fields,
        "filter",
        "rounding",
        "in_doubles",
    )
    filter: RecurrenceFilter | MovingAverageFilter
    rounding: Rounding
    in_doubles: bool
    step: jax.Array
    keys: jax.Array
    coef: jax.Array

    @property
    def choice(self) -> RecurrenceFilter | MovingAverageFilter:
        return self.filter

    @property
    def stream(self) -> str:
        return "chacha20"


class Run(Protocol):
    """An implementation: one step, in the schedule of correlated_noise/_schedule.py.

    It gives ``grads + x_t``, and the rings after the step; of one that is not valid the least
    integers, and any rings. Rings are ``[filter.rows, *shape]`` of
    ``leaf.dtype``; there are none if the filter has no rows. The sample of an element at a step is
    that of exact_normal.h for these bits, in the leaf's key of that step: 64 bits of
    ``Domain.GRID`` at the index of the element in the leaf, and the first four words of the block
    of ``Domain.GRID_EXTENSION`` with that number.
    """

    def __call__(self, inputs: Inputs, /) -> NoiseOutputs: ...
