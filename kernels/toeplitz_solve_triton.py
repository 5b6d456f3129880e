# mypy: ignore-errors
# Triton's language looks like Python, and has other types.
"""Lower-triangular Toeplitz systems, in Triton."""

import triton
import triton.language as tl

__all__ = ["solve"]


@triton.jit
def solve(
    coef,
    rhs,
    m,
    n,
    columns,
    out,
    TRANSPOSE: tl.constexpr,
    ROWS: tl.constexpr,
    LAGS: tl.constexpr,
):
    """Forward substitution; a program solves for one column of a problem, ROWS rows at a time.

    Args:
      coef: ``[problems, m]`` float64.
      rhs: ``[problems, n, columns]`` float64.
      m, n, columns: the sizes.
      out: like rhs, x with T x = rhs or T^T x = rhs.
    """
    problem = tl.cast(tl.program_id(0) // columns, tl.int64)
    coef += problem * m
    top = problem * n * columns + tl.program_id(0) % columns
    c_0 = tl.load(coef)
    i = tl.arange(0, ROWS)
    for first in range(0, n, ROWS):
        row = first + i
        if TRANSPOSE:
            place = top + (n - 1 - row).to(tl.int64) * columns
        else:
            place = top + row.to(tl.int64) * columns
        # What lies before these rows.
        sums = tl.zeros([ROWS, LAGS], tl.float64)
        for near in range(0, tl.minimum(first, m - 1), LAGS):
            before = first - 1 - near - tl.arange(0, LAGS)
            if TRANSPOSE:
                known = top + (n - 1 - before).to(tl.int64) * columns
            else:
                known = top + before.to(tl.int64) * columns
            lag = row[:, None] - before[None, :]
            inside = (before >= 0)[None, :] & (lag < m)
            x = tl.load(out + known, mask=before >= 0, other=0.0)
            c = tl.load(coef + lag, mask=inside, other=0.0)
            sums += tl.where(inside, c * x[None, :], 0.0)
        u = tl.load(rhs + place, mask=row < n, other=0.0) - tl.sum(sums, axis=1)
        # The rows themselves, one after the other.
        for j in range(ROWS):
            x = tl.sum(tl.where(i == j, u, 0.0)) / c_0
            below = (i > j) & (i - j < m)
            c = tl.load(coef + i - j, mask=below, other=0.0)
            u = tl.where(i == j, x, tl.where(below, u - c * x, u))
        tl.store(out + place, u, mask=row < n)
        tl.debug_barrier()  # what one thread has written others read
