"""What ops need to know about noising matrices.

A noising matrix makes the terms x of correlated noise from independent samples z, row by row. Those
with a fused kernel are described by the dataclasses below, which are pytrees. Each has

    row_scale       ``[n]`` floating array, or None for all ones; row t of the matrix gives
                    ``row_scale[min(t, n - 1)] x_t``
    dtype           of its coefficients
    filter(ahead, **options)   the `Filter` that makes its terms, with or without look-ahead
    scaled()                the matrix of a multiple of its terms, and which, so that coefficients
                            beyond the range of floats make no terms beyond it
    coef_at(step, filter)   its coefficients at a step, as the filter says
    invertible(coef)        whether the matrix with those coefficients is
    diagonal(coef)          the diagonal of the matrix with those coefficients: what x_t has of z_t
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels._checks import is_concrete
from jax_privacy_kernels.ops.correlated_noise._filters import (
    BufferedFilter,
    Filter,
    InverseBufferedFilter,
    MovingAverageFilter,
    RecurrenceFilter,
)

__all__ = ["BandedRecurrence", "BufferedToeplitz", "MovingAverage", "NoisingMatrix"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BandedRecurrence:
    """The rows of ``C^-1`` for a banded lower-triangular strategy C.

    Row t of the product ``x = C^-1 z`` solves ``x_t = (z_t - sum_{l=1}^{b-1} c_l x_{t-l}) / c_0``,
    for coefficients that may differ from row to row.

    Attributes:
      coef: floating array, ``c_0 != 0``: ``[b]``, the Toeplitz coefficients of C; or ``[n, b]``,
        those of every row of C, ``coef[t, l] = C[t, t - l]``. The last row goes on.
      row_scale: see above.
    """

    coef: jax.Array
    row_scale: jax.Array | None = None

    def __str__(self) -> str:
        *rows, bands = self.coef.shape
        if rows:
            return f"inverse of a banded strategy, n = {rows[0]}, b = {bands}"
        if bands == 1:
            return "multiple of the identity, b = 1"
        return f"inverse of a banded Toeplitz strategy, b = {bands}"

    @property
    def dtype(self) -> jnp.dtype:
        return self.coef.dtype

    def filter(self, ahead: bool, **options: Any) -> Filter:
        return RecurrenceFilter(ahead, self.coef.shape[-1] - 1, **options)

    def scaled(self) -> tuple[BandedRecurrence, jax.typing.ArrayLike]:
        coef, unit = _moderate(self.coef)
        return dataclasses.replace(self, coef=coef), unit  # C / unit makes unit x

    def coef_at(self, step: jax.Array, filter: Filter) -> jax.Array:
        """``[1, b]``, or ``[filter.steps, b]`` for the steps from this one on."""
        if self.coef.ndim == 1:
            return self.coef[None]
        return self.coef.at[step + jnp.arange(filter.steps)].get(mode="clip")

    def invertible(self, coef: jax.Array) -> jax.Array:
        return (coef[:, 0] != 0).all()

    def diagonal(self, coef: jax.Array) -> jax.Array:
        return 1 / coef[:, 0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MovingAverage:
    """The rows of a banded Toeplitz ``C^-1``: ``x_t = sum_{l=0}^{p-1} w_l z_{t-l}``.

    Nothing of the past need be kept: its samples can be made again from their keys. With k slots a
    visit makes k terms of k + p - 1 samples, so that a step costs (k + p - 1) / k samples for every
    parameter; without slots, p samples and no state.

    Attributes:
      coef: ``[p]`` floating array w.
      slots: k.
      row_scale: see above.
    """

    coef: jax.Array
    slots: int = dataclasses.field(metadata={"static": True})
    row_scale: jax.Array | None = None

    def __str__(self) -> str:
        return f"banded C^-1 of {self.coef.shape[0]} coefficients, look_ahead = {self.slots}"

    @property
    def dtype(self) -> jnp.dtype:
        return self.coef.dtype

    def filter(self, ahead: bool, **options: Any) -> Filter:
        slots = self.slots if ahead else 0
        return MovingAverageFilter(ahead, slots, self.coef.shape[0], **options)

    def scaled(self) -> tuple[MovingAverage, jax.typing.ArrayLike]:
        coef, unit = _moderate(self.coef)
        return dataclasses.replace(self, coef=coef), 1 / unit

    def coef_at(self, step: jax.Array, filter: Filter) -> jax.Array:
        """``[1, p]``, the weights of z_{t-p+1} .. z_t."""
        del step, filter
        return self.coef[None, ::-1]

    def invertible(self, coef: jax.Array) -> jax.Array:
        return coef[0, -1] != 0

    def diagonal(self, coef: jax.Array) -> jax.Array:
        return coef[:, -1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BufferedToeplitz:
    """The rows of a buffered linear Toeplitz matrix (BLT), or of its inverse.

    With m buffers u, all zero at first, a BLT is ``x_t = z_t + sum_i w_i u_{t,i}`` with
    ``u_{t+1,i} = d_i u_{t,i} + z_t``; its inverse ``x_t = z_t - sum_i w_i u_{t,i}`` with
    ``u_{t+1,i} = d_i u_{t,i} + x_t``. See https://arxiv.org/abs/2404.16706.

    Attributes:
      buf_decay: ``[m]`` floating array d.
      output_scale: ``[m]`` floating array w.
      inverse: which of the two.
      slots: how many steps a visit looks ahead; 0 reads and writes the buffers at every step.
      row_scale: see above.
    """

    buf_decay: jax.Array
    output_scale: jax.Array
    inverse: bool = dataclasses.field(metadata={"static": True})
    slots: int = dataclasses.field(metadata={"static": True})
    row_scale: jax.Array | None = None

    def __str__(self) -> str:
        which = "inverse of a BLT" if self.inverse else "BLT"
        return f"{which} of {self.buf_decay.shape[0]} buffers, look_ahead = {self.slots}"

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.result_type(self.buf_decay, self.output_scale)

    def filter(self, ahead: bool, **options: Any) -> Filter:
        slots = self.slots if ahead else 0
        kind = InverseBufferedFilter if self.inverse else BufferedFilter
        return kind(ahead, slots, self.buf_decay.shape[0], **options)

    def scaled(self) -> tuple[BufferedToeplitz, jax.typing.ArrayLike]:
        return self, 1.0  # the diagonal is 1

    def coef_at(self, step: jax.Array, filter: Filter) -> jax.Array:
        """``[2, m]``, the decays and the output scales."""
        del step, filter
        return jnp.stack([self.buf_decay, self.output_scale])

    def invertible(self, coef: jax.Array) -> jax.Array:
        del coef
        return jnp.array(True)  # the diagonal is 1

    def diagonal(self, coef: jax.Array) -> jax.Array:
        return jnp.ones(1, coef.dtype)


_MODERATE = 32  # exponents of two up to which numbers are left as they are


def _moderate(x: jax.Array) -> tuple[jax.Array, Any]:
    """x by a power of two that brings its largest element near 1 if it is far from it, and that."""
    known = is_concrete(x)
    xp: Any = np if known else jnp
    values = np.asarray(x, np.float64) if known else x
    largest = xp.max(xp.abs(values), initial=0.0)
    exponent = xp.clip(xp.frexp(largest)[1] - 1, -126, 126)
    far = (xp.abs(exponent) > _MODERATE) & (largest > 0) & xp.isfinite(largest)
    if known and not far:
        return x, 1.0
    exponent = xp.where(far, exponent, 0)
    return jnp.asarray(xp.ldexp(values, -exponent), x.dtype), xp.ldexp(1.0, exponent)


NoisingMatrix = BandedRecurrence | MovingAverage | BufferedToeplitz
