# mypy: ignore-errors
# Triton's language looks like Python, and has other types.
"""Weighted sums of samples added to one leaf, in Triton: dense noise, and filters without slots."""

import triton
import triton.language as tl

from jax_privacy_kernels.kernels._noise_triton import COLUMNS, emit, is_here, place, run_of
from jax_privacy_kernels.kernels._streams_triton import draw, normal

__all__ = ["weighted_samples"]


@triton.jit
def weighted_samples(
    keys,
    weights,
    scale,
    grad,
    runs,
    first_key,
    samples,
    units,
    programs,
    out,
    UNIT: tl.constexpr,
    TILE: tl.constexpr,
    ALONE: tl.constexpr,
    STREAM: tl.constexpr,
    ACCURATE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """out = grad + scale sum_j w_j z_j, by a program for every tile.

    Args:
      keys: the words of those of every leaf for each sample.
      weights: ``[samples]`` w; among several, a sample whose weight is zero is not made.
      scale: of the sum in what is added to the gradients.
      grad, runs, first_key, units, programs, out, WHOLE: as of `recurrence` in
        correlated_noise_triton.py.
      samples: how many there are.
      ALONE: whether there is one sample.
    """
    run, program = run_of(programs, WHOLE)
    length = tl.cast(units, tl.int64) * UNIT
    first = tl.cast(program, tl.int64) * TILE
    start, index, begin, end = place(first, run, runs + COLUMNS * run, length, TILE, TILE, WHOLE)
    lane = tl.arange(0, TILE)
    mask = is_here(lane, begin, end, WHOLE)
    if ALONE:
        drawn = draw(keys + first_key, 0, 1, index, 1, TILE, STREAM)
        z = normal(drawn[0], index, lane, STREAM, ACCURATE)
        x = z.to(weights.dtype.element_ty) * tl.load(weights)
    else:
        x = tl.zeros_like(lane).to(weights.dtype.element_ty)
        for j in range(samples):
            weight = tl.load(weights + j)
            if weight != 0:
                drawn = draw(keys + first_key, j, samples, index, 1, TILE, STREAM)
                z = normal(drawn[0], index, lane, STREAM, ACCURATE)
                x = tl.fma(z.to(weights.dtype.element_ty), weight, x)
    emit(grad + start + lane, out + start + lane, scale, x, mask)
