"""The contract between correlated_noise and its implementations."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Protocol

import jax

from jax_privacy_kernels.ops._noise import NoiseInputs, NoiseOutputs, register
from jax_privacy_kernels.ops.correlated_noise._filters import Filter

__all__ = ["Inputs", "Run"]


@register
@dataclasses.dataclass(frozen=True)
class Inputs(NoiseInputs):
    """Step t of some or all leaves of a tree, or of shards of them.

    Attributes:
      filter: how terms are made, static.
      step: int32 scalar, t >= 0.
      keys: typed keys of the steps that are sampled, ``[filter.behind + filter.steps]``: those of
        steps t - behind .. t + steps - 1. The key of a leaf is the one of ``split(key, count)`` at
        its index.
      coef: the coefficients at step t, as the filter says, float32 or float64.
      stddevs: those of the samples, one for each of the keys, if ``filter.varying``; else None, for
        samples of variance 1.
      scale: scalar, of x_t in what is added to the gradients.
    """

    static_fields: ClassVar[tuple[str, ...]] = (*NoiseInputs.static_fields, "filter")
    filter: Filter
    step: jax.Array
    keys: jax.Array
    coef: jax.Array
    stddevs: jax.Array | None
    scale: jax.Array

    @property
    def choice(self) -> Filter:
        return self.filter

    @property
    def stream(self) -> str:
        return str(jax.random.key_impl(self.keys))


class Run(Protocol):
    """An implementation: one step, in the schedule of _schedule.py.

    It gives ``grads + scale x_t``, and the rings after the step.
    A ring is ``[filter.rows, *shape]`` of ``leaf.dtype``, the dtype that x is computed in; there
    are none if the filter has no rows.
    """

    def __call__(self, inputs: Inputs, /) -> NoiseOutputs: ...
