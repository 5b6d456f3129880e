# mypy: ignore-errors
# Triton's language looks like Python, and has other types.
"""Products with lower-triangular Toeplitz matrices, in Triton."""

import triton
import triton.language as tl

__all__ = ["multiply"]


@triton.jit
def multiply(
    coef,
    rhs,
    m,
    n,
    columns,
    rows,
    out,
    TRANSPOSE: tl.constexpr,
    ROWS: tl.constexpr,
    LAGS: tl.constexpr,
):
    """The first rows of T rhs or T^T rhs; a program takes ROWS of them, of one column of a problem.

    Args:
      coef: ``[problems, m]`` float64.
      rhs: ``[problems, n, columns]`` float64.
      m, n, columns, rows: the sizes.
      out: ``[problems, rows, columns]`` float64.
    """
    column = tl.program_id(0) % columns
    block = tl.program_id(0) // columns % tl.cdiv(rows, ROWS)
    problem = tl.cast(tl.program_id(0) // columns // tl.cdiv(rows, ROWS), tl.int64)
    coef += problem * m
    rhs += problem * n * columns + column
    row = block * ROWS + tl.arange(0, ROWS)
    if TRANSPOSE:
        lags = tl.minimum(m, n - block * ROWS)
    else:
        lags = tl.minimum(m, (block + 1) * ROWS)
    sums = tl.zeros([ROWS, LAGS], tl.float64)
    for first in range(0, lags, LAGS):
        lag = first + tl.arange(0, LAGS)
        if TRANSPOSE:
            source = row[:, None] + lag[None, :]
        else:
            source = row[:, None] - lag[None, :]
        inside = (source >= 0) & (source < n) & (lag < m)[None, :]
        c = tl.load(coef + lag, mask=lag < m, other=0.0)
        x = tl.load(rhs + source.to(tl.int64) * columns, mask=inside, other=0.0)
        sums += tl.where(inside, c[None, :] * x, 0.0)  # infinities stay where they belong
    to = out + problem * rows * columns + row.to(tl.int64) * columns + column
    tl.store(to, tl.sum(sums, axis=1), mask=row < rows)
