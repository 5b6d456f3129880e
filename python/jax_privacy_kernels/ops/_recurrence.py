"""What ops need to know about streaming matrices: noising matrices, and workloads."""

from __future__ import annotations

import dataclasses

import jax

__all__ = ["BandedRecurrence", "Momentum"]


@dataclasses.dataclass(frozen=True)
class BandedRecurrence:
    """The rows of ``C^-1`` for a banded lower-triangular Toeplitz strategy C.

    Row t of the product ``x = C^-1 z`` solves, for coefficients ``c`` and row scales ``s``,

        x_t = (z_t - sum_{l=1}^{b-1} c_l x_{t-l}) / c_0,    output s_{min(t, n-1)} x_t.

    Attributes:
      coef: ``[b]`` floating array, the Toeplitz coefficients of C, ``c_0 != 0``.
      row_scale: ``[n]`` floating array ``s``, or None for all ones.
    """

    coef: jax.Array
    row_scale: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Momentum:
    """The rows of a momentum workload, prefix sums among them.

    Row t of ``y = A x`` is ``y_t = y_{t-1} + r_t m_t`` with ``m_t = beta m_{t-1} + x_t``.

    Attributes:
      momentum: beta, a real scalar.
      learning_rates: ``[m]`` floating array r, whose last entry goes on; None for all ones.
    """

    momentum: jax.typing.ArrayLike = 0.0
    learning_rates: jax.Array | None = None
