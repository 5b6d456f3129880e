# mypy: ignore-errors
# Triton's language looks like Python, and has other types.
"""One step of correlated noise on one leaf, in Triton.

ops/correlated_noise/_schedule.py states the schedule.

Arithmetic rounds as it is written, if compiled without fusion of multiplications and additions: the
ones that are to be fused say so.
"""

import triton
import triton.language as tl

__all__ = ["recurrence", "weighted_samples"]

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
def _normal(key, index, lane, ACCURATE: tl.constexpr):
    """Elements index + lane of a leaf's samples, of one tile."""
    high, low = (index >> 32).to(tl.uint32), index.to(tl.uint32)  # no carry from low + lane
    x0, x1 = _threefry2x32(tl.load(key), tl.load(key + 1), high, low + lane.to(tl.uint32))
    unit = (((x0 ^ x1) >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    lowest = -0.99999994  # the float32 above -1
    return _sqrt2_erf_inv(tl.maximum(unit * 2.0 + lowest, lowest), ACCURATE)


# -- A tile, or a part of one -------------------------------------------------------------------


@triton.jit
def _place(first, run, runs, length, BLOCK: tl.constexpr, TILE: tl.constexpr, WHOLE: tl.constexpr):
    """Where elements first .. first + BLOCK - 1 of a run's tiles are, as far as they are of it.

    The first of the tiles may begin before the run.

    Returns:
      The index of the first that is here; its index in the leaf; and how many follow in the run's
      part of the tile, or in all of the leaf. Not more than 0 if there is none.
    """
    if WHOLE:
        return first, first, length - first
    else:
        high, low = tl.load(runs).to(tl.int64), tl.load(runs + 1).to(tl.int64)
        start = first - low % TILE
        begin = tl.maximum(start, 0)
        left = tl.minimum(start + BLOCK, length) - begin
        return run * length + begin, (high << 32) + low + begin, left


@triton.jit
def _emit(grad, out, scale, x, mask):
    """out = grad + scale x, added in the wider of the two dtypes."""
    total = tl.load(grad, mask=mask) + tl.load(scale) * x
    if out.dtype.element_ty.primitive_bitwidth == 16:
        total = total.to(tl.float32)  # there is no way from 64 bits to 16 but by these
    tl.store(out, total.to(out.dtype.element_ty), mask=mask)


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
    ACCURATE: tl.constexpr,
):
    """Overwrites the slots with x_t .. x_{t+S-1}, a group of GROUP terms at a time.

    The S terms before a group are read once for all of it, from the last to the first; those of the
    group itself stay in registers.
    """
    for done in range(0, SLOTS, GROUP):
        first = (now + done) % SLOTS
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
            z = _normal(keys + 2 * tl.minimum(done + k, SLOTS - 1), index, lane, ACCURATE)
            x = tl.fma(z.to(column.dtype.element_ty), tl.load(weight), past[k])
            for i in tl.static_range(k):
                x = tl.fma(group[i], tl.load(weight + (k - i)), x)
            group = group + (x,)
            tl.store(column + (first + k) % SLOTS * size, x, mask=mask & (done + k < SLOTS))
        tl.debug_barrier()  # what one thread has written another may read


@triton.jit
def _warm_up(t, keys, weights, column, size, index, lane, mask, ACCURATE: tl.constexpr):
    """Writes x_t, from the t terms before it."""
    x = _normal(keys, index, lane, ACCURATE).to(column.dtype.element_ty) * tl.load(weights)
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
    left,
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
    ACCURATE: tl.constexpr,
):
    lane = tl.arange(0, BLOCK)
    mask = lane < tl.minimum(left, BLOCK).to(tl.int32)
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
            ACCURATE,
        )
    else:
        if phase > t:
            _warm_up(t, keys, weights, column, size, index, lane, mask, ACCURATE)
    x = tl.load(column + now * size, mask=mask)
    _emit(grad + start + lane, out + start + lane, scale, x, mask)


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
    ACCURATE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """A step of x_t = w_0 z_t + sum_l w_l x_{t-l}, for S >= 1 slots.

    Of S tiles in a row one is refreshed, by TILE / PART programs, and the others are read, by a
    program each. In this order they share a processor, the ones busy computing, the others with
    memory.

    Args:
      step: t >= 0.
      keys: of every leaf for steps t .. t + S - 1, two words each.
      weights: ``[ROWS, WIDTH]``, w_0 .. w_S and zeros up to any w that a group of terms may meet;
        one row, or one for each of the steps.
      scale: of x in what is added to the gradients.
      grad: ``[size]``.
      runs: ``[.., 4]``, of every run of elements that follow each other in the leaf: the index in
        it of the first, the high and the low word; and of the tile that this is in, which is one of
        S that have all phases, the phase of the first of those S, and its place among them. One if
        all of the leaf is here, which is what WHOLE says.
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
    runs += 4 * run
    phase, offset = tl.load(runs + 2).to(tl.int32), tl.load(runs + 3).to(tl.int32)
    nth = tl.program_id(0) % programs // group
    place = tl.program_id(0) % programs % group
    keys += first_key
    if place < PARTS:
        turn = (t % SLOTS + SLOTS - (phase + nth) % SLOTS) % SLOTS  # which of S tiles it is
        tile = nth * SLOTS + turn - offset
        first = tl.cast(tile, tl.int64) * TILE + place * PART
        start, index, left = _place(first, run, runs, length, PART, TILE, WHOLE)
        if left > 0:
            _tile(
                True,
                PART,
                t,
                0,
                start,
                index,
                left,
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
                ACCURATE,
            )
    else:
        tile = nth * (group - PARTS) + place - PARTS
        phase = (tile + offset + (tile + offset) // SLOTS + phase) % SLOTS
        first = tl.cast(tile, tl.int64) * TILE
        start, index, left = _place(first, run, runs, length, TILE, TILE, WHOLE)
        if (left > 0) & (phase != t % SLOTS):
            _tile(
                False,
                TILE,
                t,
                phase,
                start,
                index,
                left,
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
                ACCURATE,
            )


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
    ACCURATE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """out = grad + scale sum_j w_j z_j, by a program for every tile.

    Args:
      keys: of every leaf for each sample, two words each.
      weights: ``[samples]`` w; a sample whose weight is zero is not made.
      scale, grad, runs, first_key, units, programs, out, WHOLE: as of `recurrence`.
      samples: how many there are.
    """
    run, length = tl.program_id(0) // programs, tl.cast(units, tl.int64) * UNIT
    first = tl.cast(tl.program_id(0) % programs, tl.int64) * TILE
    start, index, left = _place(first, run, runs + 4 * run, length, TILE, TILE, WHOLE)
    lane = tl.arange(0, TILE)
    mask = lane < tl.minimum(left, TILE).to(tl.int32)
    x = tl.zeros_like(lane).to(weights.dtype.element_ty)
    for j in range(samples):
        weight = tl.load(weights + j)
        if weight != 0:
            z = _normal(keys + first_key + 2 * j, index, lane, ACCURATE)
            x = tl.fma(z.to(weights.dtype.element_ty), weight, x)
    _emit(grad + start + lane, out + start + lane, scale, x, mask)
