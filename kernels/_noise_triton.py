# mypy: ignore-errors
# Triton's language looks like Python, and has other types.
"""What the noise kernels in Triton share: samples, and a part of a leaf.

Arithmetic rounds as it is written, if compiled without fusion of multiplications and additions: the
ones that are to be fused say so.
"""

import triton
import triton.language as tl

from jax_privacy_kernels.kernels import _runs

__all__ = ["COLUMNS", "PHASE", "PLACE", "emit", "normal", "place"]

# The columns of runs, as the language wants them.
HIGH, LOW = tl.constexpr(_runs.HIGH), tl.constexpr(_runs.LOW)
PHASE, PLACE = tl.constexpr(_runs.PHASE), tl.constexpr(_runs.PLACE)
COLUMNS = tl.constexpr(_runs.COLUMNS)

# -- Samples, as jax.random.normal makes them ---------------------------------------------------


@triton.jit
def _round(x0, x1, rotation: tl.constexpr):
    x0 += x1
    return x0, ((x1 << rotation) | (x1 >> (32 - rotation))) ^ x0


@triton.jit
def _four_rounds(x0, x1, a: tl.constexpr, b: tl.constexpr, c: tl.constexpr, d: tl.constexpr):
    x0, x1 = _round(x0, x1, a)
    x0, x1 = _round(x0, x1, b)
    x0, x1 = _round(x0, x1, c)
    return _round(x0, x1, d)


@triton.jit
def _threefry2x32(k0, k1, x0, x1):
    """Threefry-2x32 with 20 rounds, Salmon et al., SC'11."""
    k2 = k0 ^ k1 ^ 0x1BD11BDA
    x0, x1 = _four_rounds(x0 + k0, x1 + k1, 13, 15, 26, 6)
    x0, x1 = _four_rounds(x0 + k1, x1 + (k2 + 1), 17, 29, 16, 24)
    x0, x1 = _four_rounds(x0 + k2, x1 + (k0 + 2), 13, 15, 26, 6)
    x0, x1 = _four_rounds(x0 + k0, x1 + (k1 + 3), 17, 29, 16, 24)
    x0, x1 = _four_rounds(x0 + k1, x1 + (k2 + 4), 13, 15, 26, 6)
    return x0 + k2, x1 + (k0 + 5)


@triton.jit
def _sqrt2_erf_inv(u, ACCURATE: tl.constexpr):
    """sqrt(2) erf_inv(u), by the polynomials of M. Giles (GPU Computing Gems, 2011), as in XLA."""
    # XLA rounds u^2 before it takes log(1 - u^2), unless jax_accurate_erf_inv is set.
    if ACCURATE:
        w = -0.693147181 * tl.log2((1.0 - u) * (1.0 + u))
    else:
        w = -0.693147181 * tl.log2(1.0 - u * u)
    x = w - 2.5
    p = tl.fma(x, 2.81022636e-08, 3.43273939e-07)
    p = tl.fma(p, x, -3.5233877e-06)
    p = tl.fma(p, x, -4.39150654e-06)
    p = tl.fma(p, x, 0.00021858087)
    p = tl.fma(p, x, -0.00125372503)
    p = tl.fma(p, x, -0.00417768164)
    p = tl.fma(p, x, 0.246640727)
    p = tl.fma(p, x, 1.50140941)
    x = tl.sqrt(w) - 3.0
    q = tl.fma(x, -0.000200214257, 0.000100950558)
    q = tl.fma(q, x, 0.00134934322)
    q = tl.fma(q, x, -0.00367342844)
    q = tl.fma(q, x, 0.00573950773)
    q = tl.fma(q, x, -0.0076224613)
    q = tl.fma(q, x, 0.00943887047)
    q = tl.fma(q, x, 1.00167406)
    q = tl.fma(q, x, 2.83297682)
    return tl.where(w < 5.0, p, q) * u * 1.41421356


@triton.jit
def normal(key, index, lane, ACCURATE: tl.constexpr):
    """Elements index + lane of a leaf's samples, of one tile."""
    high, low = (index >> 32).to(tl.uint32), index.to(tl.uint32)  # no carry from low + lane
    x0, x1 = _threefry2x32(tl.load(key), tl.load(key + 1), high, low + lane.to(tl.uint32))
    unit = (((x0 ^ x1) >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    lowest = -0.99999994  # the float32 above -1
    return _sqrt2_erf_inv(tl.maximum(unit * 2.0 + lowest, lowest), ACCURATE)


# -- A tile, or a part of one -------------------------------------------------------------------


@triton.jit
def place(first, run, runs, length, BLOCK: tl.constexpr, TILE: tl.constexpr, WHOLE: tl.constexpr):
    """Where elements first .. first + BLOCK - 1 of a run's tiles are, as far as they are of it.

    The first of the tiles may begin before the run.

    Returns:
      The index of the first that is here; its index in the leaf; and how many follow in the run's
      part of the tile, or in all of the leaf. Not more than 0 if there is none.
    """
    if WHOLE:
        return first, first, length - first
    else:
        high, low = tl.load(runs + HIGH).to(tl.int64), tl.load(runs + LOW).to(tl.int64)
        start = first - low % TILE
        begin = tl.maximum(start, 0)
        left = tl.minimum(start + BLOCK, length) - begin
        return run * length + begin, (high << 32) + low + begin, left


@triton.jit
def emit(grad, out, scale, x, mask):
    """out = grad + scale x, added in the wider of the two dtypes."""
    total = tl.load(grad, mask=mask) + tl.load(scale) * x
    if out.dtype.element_ty.primitive_bitwidth == 16:
        total = total.to(tl.float32)  # there is no way from 64 bits to 16 but by these
    tl.store(out, total.to(out.dtype.element_ty), mask=mask)
