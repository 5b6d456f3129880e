# mypy: ignore-errors
# Triton's language looks like Python, and has other types.
"""What the noise kernels in Triton share beside samples: a part of a leaf.

Arithmetic rounds as it is written, if compiled without fusion of multiplications and additions: the
ones that are to be fused say so.
"""

import triton
import triton.language as tl

from jax_privacy_kernels.kernels import _runs

__all__ = ["COLUMNS", "PHASE", "PLACE", "emit", "is_here", "place", "run_of"]

# The columns of runs, as the language wants them.
HIGH, LOW = tl.constexpr(_runs.HIGH), tl.constexpr(_runs.LOW)
PHASE, PLACE = tl.constexpr(_runs.PHASE), tl.constexpr(_runs.PLACE)
COLUMNS = tl.constexpr(_runs.COLUMNS)

# -- A tile, or a part of one -------------------------------------------------------------------


@triton.jit
def run_of(programs, WHOLE: tl.constexpr):
    """The run of a program, and which of the run's programs it is."""
    if WHOLE:
        return 0, tl.program_id(0)
    else:
        return tl.program_id(0) // programs, tl.program_id(0) % programs


@triton.jit
def place(first, run, runs, length, BLOCK: tl.constexpr, TILE: tl.constexpr, WHOLE: tl.constexpr):
    """Where elements first .. first + BLOCK - 1 of a run's tiles are, and which of them are of it.

    The first of the tiles may begin before the run, the last may end behind it.

    Returns:
      The index of the first of them here, and in the leaf, where it is a multiple of BLOCK; and how
      many are before the run, and how many before its end: not more if none is of the run.
    """
    if WHOLE:
        return first, first, 0, tl.minimum(length - first, BLOCK).to(tl.int32)
    else:
        high, low = tl.load(runs + HIGH).to(tl.int64), tl.load(runs + LOW).to(tl.int64)
        start = first - low % TILE
        begin = tl.minimum(tl.maximum(-start, 0), BLOCK).to(tl.int32)
        end = tl.minimum(length - start, BLOCK).to(tl.int32)
        return run * length + start, (high << 32) + low + start, begin, end


@triton.jit
def is_here(lane, begin, end, WHOLE: tl.constexpr):
    """Which of the elements are of the run."""
    if WHOLE:
        return lane < end
    else:
        return (lane >= begin) & (lane < end)


@triton.jit
def emit(grad, out, scale, x, mask):
    """out = grad + scale x, added in the wider of the two dtypes."""
    total = tl.load(grad, mask=mask) + tl.load(scale) * x
    if out.dtype.element_ty.primitive_bitwidth == 16:
        total = total.to(tl.float32)  # there is no way from 64 bits to 16 but by these
    tl.store(out, total.to(out.dtype.element_ty), mask=mask)
