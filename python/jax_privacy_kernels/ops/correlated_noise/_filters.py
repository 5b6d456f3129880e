"""Filters: how a noising matrix makes terms x of samples z, and what of them a ring keeps.

A filter is static. It owns the rows of a ring, says which coefficients it takes at a step and what
kernels for GPUs take in their place. What an implementation does for each filter stands in the
implementation.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

__all__ = [
    "BufferedFilter",
    "Filter",
    "InverseBufferedFilter",
    "MovingAverageFilter",
    "RecurrenceFilter",
]


@dataclasses.dataclass(frozen=True)
class Filter:
    """How terms x are made of samples z. Static.

    Attributes:
      name: what the C++ and Pallas kernels call it.
      ahead: whether terms are made ahead, tile by tile (see _schedule.py).
      slots: S, the number of terms in a ring.
      counted: whether the bits of a sample are a function of the key and the index of its element.
        Only then can terms be made ahead.
      varying: whether the stddev of the samples may change from step to step. Then terms are of the
        stddev of their samples, and none are made ahead; else they are of stddev 1.
      kept_ahead: the number of steps to come whose keys a state keeps though no terms are made
        ahead.
    """

    name: ClassVar[str]
    ahead: bool
    slots: int
    counted: bool = dataclasses.field(default=True, kw_only=True)
    varying: bool = dataclasses.field(default=False, kw_only=True)
    kept_ahead: int = dataclasses.field(default=0, kw_only=True)

    @property
    def buffers(self) -> int:
        """The number of buffers of a BLT; they are the rows of a ring before its slots."""
        return 0

    @property
    def behind(self) -> int:
        """The number of samples before z_t that x_t is made of."""
        return 0

    @property
    def rows(self) -> int:
        """The number of rows of a ring: the buffers, then the slots."""
        return self.buffers + self.slots

    @property
    def remembers(self) -> bool:
        """Whether a term depends on samples of steps before."""
        return self.rows > 0 or self.behind > 0

    @property
    def steps(self) -> int:
        """The number of terms that a visit to a tile makes, at most."""
        return max(self.slots, 1) if self.ahead else 1

    @property
    def keys(self) -> int:
        """The number of keys that a state keeps beside the one that later ones are split from."""
        return self.behind + (self.steps if self.ahead else self.kept_ahead)

    def factors(self, step: jax.Array, coef: jax.Array) -> jax.Array:
        """The coefficients at a step as kernels for GPUs take them."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class RecurrenceFilter(Filter):
    """x_t = (z_t - sum_{l=1}^{S} c_l x_{t-l}) / c_0.

    Coefficients are ``[1, S + 1]``, or a row for each of steps t .. t + steps - 1.
    """

    name: ClassVar[str] = "recurrence"

    def factors(self, step: jax.Array, coef: jax.Array) -> jax.Array:
        """``[rows, S + 1]``, the factors of z_t, x_{t-1} .. x_{t-S} in x_t."""
        del step
        return jnp.concatenate([jnp.ones_like(coef[:, :1]), -coef[:, 1:]], axis=1) / coef[:, :1]


@dataclasses.dataclass(frozen=True)
class MovingAverageFilter(Filter):
    """x_t = sum_{l=0}^{p-1} w_l z_{t-l}.

    Coefficients are ``[1, p]``, the weights of z_{t-p+1} .. z_t.

    Attributes:
      samples: p.
    """

    name: ClassVar[str] = "moving_average"
    samples: int

    @property
    def behind(self) -> int:
        return self.samples - 1

    def factors(self, step: jax.Array, coef: jax.Array) -> jax.Array:
        """``[p]``, the weights of z_{t-p+1} .. z_t; without slots, 0 for those before step 0."""
        # With slots, the kernel sees to samples that never were.
        return coef[0] if self.slots else self.happened(step, coef[0])

    def happened(self, step: jax.Array, weights: jax.Array) -> jax.Array:
        """Weights of the samples of steps t - p + 1 .. t and on, 0 for those before step 0."""
        steps = step - self.behind + jnp.arange(weights.shape[-1])
        return jnp.where(steps >= 0, weights, 0)


@dataclasses.dataclass(frozen=True)
class BufferedFilter(Filter):
    """x_t = z_t + sum_i w_i u_{t,i} with u_{t+1,i} = d_i u_{t,i} + z_t.

    Coefficients are ``[2, buffers]``, the decays d and the output scales w.

    Attributes:
      buffer_count: the number of buffers u.
    """

    name: ClassVar[str] = "buffers"
    buffer_count: int

    @property
    def buffers(self) -> int:
        return self.buffer_count

    def factors(self, step: jax.Array, coef: jax.Array) -> jax.Array:
        """``[2, buffers]``, as they are."""
        del step
        return coef


@dataclasses.dataclass(frozen=True)
class InverseBufferedFilter(BufferedFilter):
    """The inverse, x_t = z_t - sum_i w_i u_{t,i} with u_{t+1,i} = d_i u_{t,i} + x_t."""

    name: ClassVar[str] = "inverse_buffers"
