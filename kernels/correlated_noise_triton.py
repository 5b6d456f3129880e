# mypy: ignore-errors
# Triton's language looks like Python, and has other types.
"""One step of correlated noise on one leaf, in Triton.

ops/correlated_noise/_schedule.py states the schedule.

Arithmetic rounds as it is written, if compiled without fusion of multiplications and additions: the
ones that are to be fused say so.
"""

import triton
import triton.language as tl

from jax_privacy_kernels.kernels import _leaves
from jax_privacy_kernels.kernels._noise_triton import (
    COLUMNS,
    PHASE,
    PLACE,
    emit,
    is_here,
    place,
    run_of,
)
from jax_privacy_kernels.kernels._streams_triton import draw, normal

__all__ = ["recurrence", "recurrences"]

# What a launch for several leaves knows of them, as the language wants it.
LEAVES, LEAF_COLUMNS = tl.constexpr(_leaves.LEAVES), tl.constexpr(_leaves.COLUMNS)
BEGIN, FIRST_KEY = tl.constexpr(_leaves.BEGIN), tl.constexpr(_leaves.FIRST_KEY)
UNITS, FIRST_PHASE = tl.constexpr(_leaves.UNITS), tl.constexpr(_leaves.FIRST_PHASE)
PROGRAMS = tl.constexpr(_leaves.PROGRAMS)
MAGIC, SHIFT = tl.constexpr(_leaves.MAGIC), tl.constexpr(_leaves.SHIFT)


@triton.jit
def _phase(tile, first_phase, SLOTS: tl.constexpr):
    """The phase of a tile, counted from the first of S that have all phases."""
    return (tile + tile // SLOTS + first_phase) % SLOTS


@triton.jit
def _at(column, row, UNIT: tl.constexpr):
    """Where the elements of a column are in a slot that begins at row UNIT of the ring."""
    return column + tl.cast(row, tl.int64) * UNIT


@triton.jit
def _before(row, stride, last):
    """The row of the slot before one. Neither this nor `_after` multiplies or divides."""
    return row + tl.where(row == 0, last, -stride)


@triton.jit
def _after(row, stride, last):
    """The row of the slot after one."""
    return row + tl.where(row == last, -last, stride)


@triton.jit
def _weights_of(weights, ahead, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    if ROWS == 1:
        return weights
    else:
        return weights + ahead * WIDTH


@triton.jit
def _look_ahead(
    row,
    keys,
    weights,
    column,
    stride,
    last,
    index,
    lane,
    mask,
    UNIT: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    STREAM: tl.constexpr,
    ACCURATE: tl.constexpr,
):
    """Overwrites the slots with x_t .. x_{t+S-1}, a group of GROUP terms at a time.

    The slot of x_t begins at this row. The S terms before a group are read once for all of it, from
    the last to the first; those of the group itself stay in registers.
    """
    FULL: tl.constexpr = (SLOTS - 1) % GROUP + 1  # terms of the last group
    for done in range(0, SLOTS, GROUP):
        drawn = draw(keys, done, SLOTS, index, GROUP, SIZE, STREAM)
        past = ()
        for _k in tl.static_range(GROUP):
            past = past + (tl.zeros_like(lane).to(column.dtype.element_ty),)
        known = row
        for back in range(0, SLOTS, GROUP):
            for i in tl.static_range(GROUP):
                known = _before(known, stride, last)
                x = tl.load(_at(column, known, UNIT), mask=mask)
                sums = ()
                for k in tl.static_range(GROUP):
                    weight = _weights_of(weights, k, ROWS, WIDTH) + back + (i + 1 + k)
                    sums = sums + (tl.fma(x, tl.load(weight), past[k]),)
                past = sums
        group = ()
        for k in tl.static_range(GROUP):
            weight = _weights_of(weights, k, ROWS, WIDTH)
            z = normal(drawn[k], index, lane, STREAM, ACCURATE)
            x = tl.fma(z.to(column.dtype.element_ty), tl.load(weight), past[k])
            for i in tl.static_range(k):
                x = tl.fma(group[i], tl.load(weight + (k - i)), x)
            group = group + (x,)
            if k < FULL:
                tl.store(_at(column, row, UNIT), x, mask=mask)
            else:
                tl.store(_at(column, row, UNIT), x, mask=mask & (done + k < SLOTS))
            row = _after(row, stride, last)
        weights = _weights_of(weights, GROUP, ROWS, WIDTH)
        tl.debug_barrier()  # what one thread has written another may read


@triton.jit
def _warm_up(
    t,
    row,
    keys,
    weights,
    column,
    stride,
    last,
    index,
    lane,
    mask,
    UNIT: tl.constexpr,
    SIZE: tl.constexpr,
    STREAM: tl.constexpr,
    ACCURATE: tl.constexpr,
):
    """Writes x_t, from the t terms before it."""
    drawn = draw(keys, 0, 1, index, 1, SIZE, STREAM)
    z = normal(drawn[0], index, lane, STREAM, ACCURATE)
    x = z.to(column.dtype.element_ty) * tl.load(weights)
    known = row
    for lag in range(1, t + 1):
        known = _before(known, stride, last)
        x = tl.fma(tl.load(_at(column, known, UNIT), mask=mask), tl.load(weights + lag), x)
    tl.store(_at(column, row, UNIT), x, mask=mask)
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
    stride,
    last,
    keys,
    weights,
    scale,
    grad,
    out,
    ring,
    UNIT: tl.constexpr,
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
    row = (t % SLOTS).to(last.dtype) * stride
    if REFRESH:
        _look_ahead(
            row,
            keys,
            weights,
            column,
            stride,
            last,
            index,
            lane,
            mask,
            UNIT,
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
            _warm_up(
                t,
                row,
                keys,
                weights,
                column,
                stride,
                last,
                index,
                lane,
                mask,
                UNIT,
                BLOCK,
                STREAM,
                ACCURATE,
            )
    x = tl.load(_at(column, row, UNIT), mask=mask)
    emit(grad + start + lane, out + start + lane, scale, x, mask)


@triton.jit
def _program(
    t,
    run,
    runs,
    length,
    program,
    phase,
    offset,
    stride,
    last,
    group,
    magic,
    shift,
    keys,
    weights,
    scale,
    grad,
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
    """What a program does that has this number among those of a run; for arguments see below."""
    PARTS: tl.constexpr = TILE // PART
    if SLOTS == 1:
        nth, part = program // PARTS, program % PARTS
    else:
        nth = (program.to(tl.uint64) * magic.to(tl.uint64) >> shift).to(tl.int32)
        part = program - nth * group
    last += tl.full([], 0, tl.int32)  # of a dtype also where 1 is compiled in
    stride = tl.cast(stride, last.dtype)
    if part < PARTS:
        turn = t % SLOTS - (phase + nth) % SLOTS  # which of S tiles it is
        turn = tl.where(turn < 0, turn + SLOTS, turn)
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
                stride,
                last,
                keys,
                weights,
                scale,
                grad,
                out,
                ring,
                UNIT,
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
                stride,
                last,
                keys,
                weights,
                scale,
                grad,
                out,
                ring,
                UNIT,
                SLOTS,
                ROWS,
                WIDTH,
                GROUP,
                STREAM,
                ACCURATE,
                WHOLE,
            )


@triton.jit
def _pick(leaf, p0, p1, p2, p3, p4, p5, p6, p7):
    p = tl.where(leaf == 1, p1, p0)
    p = tl.where(leaf == 2, p2, p)
    p = tl.where(leaf == 3, p3, p)
    p = tl.where(leaf == 4, p4, p)
    p = tl.where(leaf == 5, p5, p)
    p = tl.where(leaf == 6, p6, p)
    return tl.where(leaf == 7, p7, p)


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
    stride,
    last,
    programs,
    group,
    magic,
    shift,
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
        one row, or one for each of the steps, and zeros up to whole groups of these.
      scale: of x in what is added to the gradients.
      grad: ``[size]``.
      runs: see _runs.py. WHOLE says that all of the leaf is here.
      _: the ring's buffer as an operand; it is also a result, and used as such.
      first_key: where the leaf's keys begin.
      units: length of a run / UNIT. So the compiler knows what the length is a multiple of.
      stride: size / UNIT.
      last: (S - 1) stride. Rows of the ring have as many bits as this.
      programs: of a run.
      group: programs that refresh a tile, and those that read others. If S = 1, all tiles are
        refreshed, and it is TILE / PART.
      magic, shift: magic p >> shift is p // group for every program p.
      out: ``[size]``.
      ring: ``[S, size]``.
    """
    t, length = tl.load(step), tl.cast(units, tl.int64) * UNIT
    run, program = run_of(programs, WHOLE)
    runs += COLUMNS * run
    _program(
        t,
        run,
        runs,
        length,
        program,
        tl.load(runs + PHASE).to(tl.int32),
        tl.load(runs + PLACE).to(tl.int32),
        stride,
        last,
        group,
        magic,
        shift,
        keys + first_key,
        weights,
        scale,
        grad,
        out,
        ring,
        UNIT,
        SLOTS,
        ROWS,
        WIDTH,
        GROUP,
        PART,
        TILE,
        STREAM,
        ACCURATE,
        WHOLE,
    )


@triton.jit
def recurrences(
    step,
    keys,
    weights,
    scale,
    leaves,
    grad0,
    grad1,
    grad2,
    grad3,
    grad4,
    grad5,
    grad6,
    grad7,
    _0,
    _1,
    _2,
    _3,
    _4,
    _5,
    _6,
    _7,
    out0,
    out1,
    out2,
    out3,
    out4,
    out5,
    out6,
    out7,
    ring0,
    ring1,
    ring2,
    ring3,
    ring4,
    ring5,
    ring6,
    ring7,
    UNIT: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
    STREAM: tl.constexpr,
    ACCURATE: tl.constexpr,
):
    """`recurrence` of up to eight leaves of one dtype, all of which are here.

    One launch of leaves that are too small to fill a GPU takes as long as one of them.

    Args:
      leaves: see _leaves.py; for other arguments see `recurrence`.
    """
    program = tl.program_id(0)
    leaf = 0
    for i in tl.static_range(1, LEAVES):
        leaf += (program >= tl.load(leaves + i * LEAF_COLUMNS + BEGIN)).to(tl.int32)
    leaves += leaf * LEAF_COLUMNS
    units = tl.load(leaves + UNITS)
    _program(
        tl.load(step),
        0,
        leaves,
        tl.cast(units, tl.int64) * UNIT,
        program - tl.load(leaves + BEGIN),
        tl.load(leaves + FIRST_PHASE),
        0,
        units,
        units * (SLOTS - 1),
        tl.load(leaves + PROGRAMS),
        tl.load(leaves + MAGIC).to(tl.uint32, bitcast=True),
        tl.load(leaves + SHIFT),
        keys + tl.load(leaves + FIRST_KEY),
        weights,
        scale,
        _pick(leaf, grad0, grad1, grad2, grad3, grad4, grad5, grad6, grad7),
        _pick(leaf, out0, out1, out2, out3, out4, out5, out6, out7),
        _pick(leaf, ring0, ring1, ring2, ring3, ring4, ring5, ring6, ring7),
        UNIT,
        SLOTS,
        ROWS,
        WIDTH,
        GROUP,
        PART,
        TILE,
        STREAM,
        ACCURATE,
        True,
    )
