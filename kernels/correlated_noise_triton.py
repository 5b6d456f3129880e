# mypy: ignore-errors
# Triton's language looks like Python, and has other types.
"""One step of correlated noise on one leaf, in Triton.

ops/correlated_noise/_schedule.py states the schedule.

Arithmetic rounds as it is written, if compiled without fusion of multiplications and additions: the
ones that are to be fused say so.
"""

import triton
import triton.language as tl

from jax_privacy_kernels.kernels._noise_triton import (
    COLUMNS,
    PHASE,
    PLACE,
    emit,
    is_here,
    place,
)
from jax_privacy_kernels.kernels._streams_triton import draw, normal

__all__ = ["recurrence"]


@triton.jit
def _phase(tile, first_phase, SLOTS: tl.constexpr):
    """The phase of a tile, counted from the first of S that have all phases."""
    return (tile + tile // SLOTS + first_phase) % SLOTS


@triton.jit
def _weights_of(weights, ahead, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    if ROWS == 1:
        return weights
    else:
        return weights + tl.minimum(ahead, ROWS - 1) * WIDTH


@triton.jit
def _look_ahead(
    now,
    keys,
    weights,
    column,
    size,
    index,
    lane,
    mask,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    STREAM: tl.constexpr,
    ACCURATE: tl.constexpr,
):
    """Overwrites the slots with x_t .. x_{t+S-1}, a group of GROUP terms at a time.

    The S terms before a group are read once for all of it, from the last to the first; those of the
    group itself stay in registers.
    """
    for done in range(0, SLOTS, GROUP):
        first = (now + done) % SLOTS
        drawn = draw(keys, done, SLOTS, index, GROUP, SIZE, STREAM)
        past = ()
        for _k in tl.static_range(GROUP):
            past = past + (tl.zeros_like(lane).to(column.dtype.element_ty),)
        slot = first
        for back in range(0, SLOTS, GROUP):
            for i in tl.static_range(GROUP):
                slot = tl.where(slot == 0, SLOTS - 1, slot - 1)
                x = tl.load(column + slot * size, mask=mask)
                sums = ()
                for k in tl.static_range(GROUP):
                    weight = _weights_of(weights, done + k, ROWS, WIDTH) + back + (i + 1 + k)
                    sums = sums + (tl.fma(x, tl.load(weight), past[k]),)
                past = sums
        group = ()
        for k in tl.static_range(GROUP):
            weight = _weights_of(weights, done + k, ROWS, WIDTH)
            z = normal(drawn[k], index, lane, STREAM, ACCURATE)
            x = tl.fma(z.to(column.dtype.element_ty), tl.load(weight), past[k])
            for i in tl.static_range(k):
                x = tl.fma(group[i], tl.load(weight + (k - i)), x)
            group = group + (x,)
            tl.store(column + (first + k) % SLOTS * size, x, mask=mask & (done + k < SLOTS))
        tl.debug_barrier()  # what one thread has written another may read


@triton.jit
def _warm_up(
    t,
    keys,
    weights,
    column,
    size,
    index,
    lane,
    mask,
    SIZE: tl.constexpr,
    STREAM: tl.constexpr,
    ACCURATE: tl.constexpr,
):
    """Writes x_t, from the t terms before it."""
    drawn = draw(keys, 0, 1, index, 1, SIZE, STREAM)
    z = normal(drawn[0], index, lane, STREAM, ACCURATE)
    x = z.to(column.dtype.element_ty) * tl.load(weights)
    for lag in range(1, t + 1):
        x = tl.fma(tl.load(column + (t - lag) * size, mask=mask), tl.load(weights + lag), x)
    tl.store(column + t * size, x, mask=mask)
    tl.debug_barrier()


@triton.jit
def _tile(
    REFRESH: tl.constexpr,
    BLOCK: tl.constexpr,
    t,
    phase,
    start,
    index,
    begin,
    end,
    size,
    keys,
    weights,
    scale,
    grad,
    out,
    ring,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    STREAM: tl.constexpr,
    ACCURATE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    lane = tl.arange(0, BLOCK)
    mask = is_here(lane, begin, end, WHOLE)
    column = ring + start + lane
    now = t % SLOTS
    if REFRESH:
        _look_ahead(
            now,
            keys,
            weights,
            column,
            size,
            index,
            lane,
            mask,
            SLOTS,
            ROWS,
            WIDTH,
            GROUP,
            BLOCK,
            STREAM,
            ACCURATE,
        )
    else:
        if phase > t:
            _warm_up(t, keys, weights, column, size, index, lane, mask, BLOCK, STREAM, ACCURATE)
    x = tl.load(column + now * size, mask=mask)
    emit(grad + start + lane, out + start + lane, scale, x, mask)


# -- Kernels ------------------------------------------------------------------------------------


@triton.jit
def recurrence(
    step,
    keys,
    weights,
    scale,
    grad,
    runs,
    _,
    first_key,
    units,
    count,
    programs,
    group,
    out,
    ring,
    UNIT: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
    STREAM: tl.constexpr,
    ACCURATE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """A step of x_t = w_0 z_t + sum_l w_l x_{t-l}, for S >= 1 slots.

    Of S tiles in a row one is refreshed, by TILE / PART programs, and the others are read, by a
    program each. In this order they share a processor, the ones busy computing, the others with
    memory.

    Args:
      step: t >= 0.
      keys: the words of those of every leaf for steps t .. t + S - 1.
      weights: ``[ROWS, WIDTH]``, w_0 .. w_S and zeros up to any w that a group of terms may meet;
        one row, or one for each of the steps.
      scale: of x in what is added to the gradients.
      grad: ``[size]``.
      runs: see _runs.py. WHOLE says that all of the leaf is here.
      _: the ring's buffer as an operand; it is also a result, and used as such.
      first_key: where the leaf's keys begin.
      units: length of a run / UNIT. So the compiler knows what the length is a multiple of.
      count: how many runs there are.
      programs: of a run.
      group: programs that refresh a tile, and those that read others.
      out: ``[size]``.
      ring: ``[S, size]``.
    """
    PARTS: tl.constexpr = TILE // PART
    t, length = tl.load(step), tl.cast(units, tl.int64) * UNIT
    size = length * count
    run = tl.program_id(0) // programs
    runs += COLUMNS * run
    phase, offset = tl.load(runs + PHASE).to(tl.int32), tl.load(runs + PLACE).to(tl.int32)
    nth = tl.program_id(0) % programs // group
    part = tl.program_id(0) % programs % group
    keys += first_key
    if part < PARTS:
        turn = (t % SLOTS + SLOTS - (phase + nth) % SLOTS) % SLOTS  # which of S tiles it is
        tile = nth * SLOTS + turn - offset
        first = tl.cast(tile, tl.int64) * TILE + part * PART
        start, index, begin, end = place(first, run, runs, length, PART, TILE, WHOLE)
        if begin < end:
            _tile(
                True,
                PART,
                t,
                0,
                start,
                index,
                begin,
                end,
                size,
                keys,
                weights,
                scale,
                grad,
                out,
                ring,
                SLOTS,
                ROWS,
                WIDTH,
                GROUP,
                STREAM,
                ACCURATE,
                WHOLE,
            )
    else:
        tile = nth * (group - PARTS) + part - PARTS
        phase = _phase(tile + offset, phase, SLOTS)
        first = tl.cast(tile, tl.int64) * TILE
        start, index, begin, end = place(first, run, runs, length, TILE, TILE, WHOLE)
        if (begin < end) & (phase != t % SLOTS):
            _tile(
                False,
                TILE,
                t,
                phase,
                start,
                index,
                begin,
                end,
                size,
                keys,
                weights,
                scale,
                grad,
                out,
                ring,
                SLOTS,
                ROWS,
                WIDTH,
                GROUP,
                STREAM,
                ACCURATE,
                WHOLE,
            )
