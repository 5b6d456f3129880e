"""Toeplitz products as XLA custom calls, in C++ (csrc/toeplitz.h, csrc/toeplitz_fft.h)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jax_privacy_kernels.ops import _coefficients

__all__ = ["run"]

# Coefficients, and rows, from which on blocks and FFTs are faster than the plain sums.
FFT_FROM = 2**14


def run(coef: jax.Array, rhs: jax.Array, *, transpose: bool, rows: int) -> jax.Array:
    """The product."""
    if min(coef.shape[0], rows) >= FFT_FROM and rhs.shape[1] == 1:
        x = rhs[::-1, 0] if transpose else rhs[:, 0]
        y = _multiply_by_fft(coef, x)
        return (y[::-1] if transpose else y)[:rows, None]
    out = jax.ShapeDtypeStruct((rows, rhs.shape[1]), jnp.result_type(coef, rhs))
    call = jax.ffi.ffi_call("jpk_toeplitz_multiply", out, vmap_method="broadcast_all")
    return call(coef, rhs, transpose=transpose)


@_coefficients.in_float64
def _multiply_by_fft(coef: jax.Array, x: jax.Array) -> jax.Array:
    """The product of ``[m]`` coefficients and ``[n]`` elements, by blocks.

    XLA transforms the blocks, of the values and of their absolute values; the custom calls multiply
    the spectra, add the first blocks, and mend what the FFT could not hold.
    """
    *batch, n = x.shape
    size = 2 ** round(math.log2(4 * math.sqrt(n)))
    blocks = -(-n // size)

    def spectra(x: jax.Array) -> jax.Array:
        count = -(-x.shape[-1] // size)
        both = jnp.stack([x, jnp.abs(x)], axis=-2)
        edge = [(0, 0, 0)] * (both.ndim - 1)
        both = jax.lax.pad(both, 0.0, [*edge, (0, count * size - x.shape[-1], 0)])
        return jax.lax.fft(
            jax.lax.pad(
                both.reshape(*batch, 2, count, size), 0.0, [*edge, (0, 0, 0), (0, size, 0)]
            ),
            jax.lax.FftType.RFFT,
            (2 * size,),
        )

    left, right = spectra(coef), spectra(x)
    sums = jax.ffi.ffi_call("jpk_toeplitz_spectra", jax.ShapeDtypeStruct(right.shape, right.dtype))
    products = jax.lax.fft(sums(left, right), jax.lax.FftType.IRFFT, (2 * size,))
    products = products.reshape(*batch, 2, blocks, 2, size)
    # The second half of a product belongs to the next block.
    late = products[..., :-1, 1, :]
    far = products[..., 0, :].at[..., 1:, :].add(late).reshape(*batch, 2, blocks * size)[..., :n]
    finish = jax.ffi.ffi_call("jpk_toeplitz_finish", jax.ShapeDtypeStruct(x.shape, x.dtype))
    return finish(coef, x, far, block=size)
