# mypy: ignore-errors
# Triton's language looks like Python, and has other types.
"""Sums over windows with a stride, in Triton."""

import triton
import triton.language as tl

__all__ = ["window_sums"]


@triton.jit
def window_sums(x, n, min_sep, k, sums, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Entry t is ``x[t] + x[t - min_sep] + ...``, k >= 2 terms. Nothing is subtracted.

    x lies in rows of ``min_sep``, and the rows in groups of k: a window of k rows is the head of
    one group and the tail of the one before. A program takes LANES columns of a group.

    Args:
      x: ``[problems, n]`` float64.
      n, min_sep, k: as said.
      sums: like x.
    """
    blocks = tl.cdiv(min_sep, LANES)
    groups = tl.cdiv(tl.cdiv(n, min_sep), k)
    lane = tl.program_id(0) % blocks * LANES + tl.arange(0, LANES)
    group = tl.program_id(0) // blocks % groups
    problem = tl.cast(tl.program_id(0) // blocks // groups, tl.int64) * n
    x += problem
    sums += problem

    total = tl.zeros([LANES], tl.float64)
    for first in range(0, k, ROWS):
        row = first + tl.arange(0, ROWS)
        t = (tl.cast(group, tl.int64) * k + row)[:, None] * min_sep + lane[None, :]
        inside = (row < k)[:, None] & (lane < min_sep)[None, :] & (t < n)
        terms = tl.load(x + t, mask=inside, other=0.0)
        tl.store(sums + t, total[None, :] + tl.cumsum(terms, axis=0), mask=inside)
        total += tl.sum(terms, axis=0)
    tl.debug_barrier()  # what one thread has written another reads

    # A window that begins in a row of the group before ends k - 1 rows on, in this one.
    total = tl.zeros([LANES], tl.float64)
    for last in range(0, tl.where(group > 0, k - 1, 0), ROWS):
        row = k - 1 - last - tl.arange(0, ROWS)
        t = (tl.cast(group - 1, tl.int64) * k + row)[:, None] * min_sep + lane[None, :]
        end = t + tl.cast(k - 1, tl.int64) * min_sep
        inside = (row > 0)[:, None] & (lane < min_sep)[None, :]
        terms = tl.load(x + t, mask=inside, other=0.0)
        head = tl.load(sums + end, mask=inside & (end < n), other=0.0)
        tail = total[None, :] + tl.cumsum(terms, axis=0)
        tl.store(sums + end, head + tail, mask=inside & (end < n))
        total += tl.sum(terms, axis=0)
