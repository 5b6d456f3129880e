"""Numbers scaled so that their squares neither vanish nor overflow.

Squared sensitivities and errors are homogeneous: those of ``s c`` are ``s^2``, or ``s^-2``, times
those of c. So coefficients are scaled to at most 1 first, and results back, where what a dtype does
not hold is seen: a squared sensitivity of 0 would mean that no noise is needed.
"""

from __future__ import annotations

import decimal
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels._checks import (
    is_concrete,
    nan_unless,
    promote_types,
)

__all__ = [
    "ORDINARY",
    "Scale",
    "Scaled",
    "as_dtype",
    "ending_in_nan",
    "exponent_of_small",
    "restored",
    "scaled",
    "within_range",
]

Scale = int | jax.Array
"""The exponent of a power of two, where values are known; a factor that is traced otherwise."""


class Scaled(NamedTuple):
    """Values, and what they were divided by.

    Attributes:
      values: At most 1 in size. In NumPy and float64 if they are known, or as they were.
      scale: What to multiply by.
    """

    values: Any
    scale: Scale


def scaled(x: jax.Array) -> Scaled:
    """Divides an array by a number near its largest entry, by a power of two if that is known."""
    if is_concrete(x):
        values = np.asarray(x, np.float64)
        exponent = _exponent(values)
        return Scaled(np.ldexp(values, -exponent), exponent)
    largest = jax.lax.stop_gradient(jnp.abs(x).max())
    largest = jnp.where((largest > 0) & (largest < jnp.inf), largest, jnp.ones_like(largest))
    return Scaled(x / largest, largest)


def exponent_of_small(loss: float) -> int:
    """The e of a loss ``m 2^e`` with m from 1/2 to 1, or 0 of one from 1 on.

    The first steps of optimizers are as large as gradients are. Small losses, as those of small
    learning rates are, would make them small.
    """
    return min(math.frexp(loss)[1], 0)


def _exponent(values: np.ndarray) -> int:
    """The e of the largest entry ``m 2^e`` with m from 1/2 to 1; 0 if there is none."""
    return math.frexp(float(np.max(np.abs(values), initial=0.0)))[1]


def restored(
    name: str,
    x: Any,
    dtype: jax.typing.DTypeLike,
    *powers: tuple[Scale, int],
    upward: bool = False,
) -> jax.Array:
    """x, not negative, times powers of scales, in the dtype.

    Args:
      name: What errors call it.
      x: A scalar or an array.
      dtype: Of the result, float32 or float64.
      *powers: Scales of :func:`scaled`, and exponents.
      upward: Whether a known x is rounded up, as bounds are.

    Raises:
      ValueError: If a known result is not 0, and outside of the normal numbers of the dtype. What
        is traced is NaN below them, and infinite above.
    """
    if is_concrete((x, powers)):
        exponent = sum(int(scale) * power for scale, power in powers)
        x = np.asarray(x, np.float64)
        with np.errstate(all="ignore"):
            wide = np.ldexp(x, exponent)
        return as_dtype(name, wide, dtype, upward=upward, of=(x, exponent))
    out = jnp.asarray(x).astype(dtype)
    is_nonzero = out > 0
    for scale, power in powers:
        if isinstance(scale, int) and scale == 0:
            continue
        factor = jnp.asarray(math.ldexp(1.0, scale) if isinstance(scale, int) else scale, dtype)
        for _ in range(abs(power)):
            out = out * factor if power > 0 else out / factor
    lost = is_nonzero & (out < jnp.finfo(dtype).tiny)
    # Added, not chosen: the derivative stays.
    return out + nan_unless(~lost, jnp.zeros_like(out))


def as_dtype(
    name: str,
    wide: Any,
    dtype: jax.typing.DTypeLike,
    *,
    upward: bool = False,
    of: tuple[np.ndarray, int] | None = None,
) -> jax.Array:
    """Known float64 values in a dtype: a ValueError if it does not hold them as normal numbers.

    Args:
      name: What errors call them.
      wide: The values.
      dtype: The dtype, or that which JAX's mode has in its place.
      upward: Whether they are rounded up.
      of: ``(x, e)``: the values are ``x 2^e``, if that is beyond float64.
    """
    wide = np.asarray(wide, np.float64)
    x, exponent = (wide, 0) if of is None else of
    dtype = np.dtype(jax.dtypes.canonicalize_dtype(dtype))
    with np.errstate(all="ignore"):
        out = wide.astype(dtype)
        if upward:
            out = np.where(out < wide, np.nextafter(out, np.array(np.inf, dtype)), out)
        size = np.abs(out)
        fits = (size >= jnp.finfo(dtype).tiny) & (size <= jnp.finfo(dtype).max) | (x == 0)
    if not fits.all():
        value = float(x[~fits].flat[0])
        found = f"{value}"
        if math.isfinite(value):
            with decimal.localcontext(Emax=10**9, Emin=-(10**9)):
                found = f"{decimal.Decimal(value) * decimal.Decimal(2) ** exponent:.6g}"
        raise ValueError(
            f"expected {name} within the range of {dtype}, {jnp.finfo(dtype).tiny:.3g} to "
            f"{jnp.finfo(dtype).max:.3g}, found {found}: scale the strategy, or use float64"
        )
    return jnp.asarray(out, dtype)


def ending_in_nan(scale: jax.Array | np.ndarray, dtype: jax.typing.DTypeLike) -> jax.Array:
    """A scale of rows of which there are no more: the last entry of a scale goes on.

    Where JAX looks for NaN, in its debug mode, this one is no fault.
    """
    with jax.debug_nans(False):
        if is_concrete(scale):
            return jnp.asarray(np.append(np.asarray(scale), np.nan).astype(dtype))
        return jnp.append(scale.astype(dtype), jnp.asarray(jnp.nan, dtype))


# Strategies whose largest entries are within these bounds are taken as they are.
ORDINARY = (2.0**-32, 2.0**32)


def within_range(x: jax.Array, axis: int | None = None) -> jax.Array:
    """x, divided along an axis by a power of two where its largest entry is not ordinary.

    For strategies of which the scale does not matter, since their columns are normalized.
    """
    x = x.astype(promote_types(x.dtype, jnp.float32))
    if is_concrete(x):
        values = np.asarray(x, np.float64)
        largest = np.max(np.abs(values), axis=axis, keepdims=True, initial=0.0)
        exponents = np.frexp(largest)[1] - 1
        ordinary = (largest == 0) | ((largest >= ORDINARY[0]) & (largest <= ORDINARY[1]))
        exponents = np.where(ordinary, 0, exponents)
        return jnp.asarray(np.ldexp(values, -exponents), x.dtype) if exponents.any() else x
    largest = jax.lax.stop_gradient(jnp.abs(x).max(axis=axis, keepdims=True))
    ordinary = (largest == 0) | ((largest >= ORDINARY[0]) & (largest <= ORDINARY[1]))
    ordinary = ordinary | ~jnp.isfinite(largest)
    return x / jnp.where(ordinary, jnp.ones_like(largest), largest)
