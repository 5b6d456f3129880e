"""One step of correlated noise for one leaf, in Pallas: sample, correlate, add to the gradients.

A program takes a tile, or what a run of elements has of it if not all of the leaf is here, and
most tiles only read the slot of the step. In the others (ops/correlated_noise/_schedule.py states
the schedule) a program makes terms for THREADS elements at a time, one for each of its threads.
The ring is its memory, and no noise is kept anywhere else: what a thread reads back is what it
wrote itself, so that threads need not wait for each other. That holds for one element a thread, and
only then: how more of them are shared out may differ from one access to the next.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jax_privacy_kernels.kernels import _pallas
from jax_privacy_kernels.kernels._threefry import threefry2x32

__all__ = ["Shape", "correlated_noise"]

WARPS = 8
THREADS = 32 * WARPS

# Terms of a recurrence are made in groups of this many. The terms of the past are read as many at a
# time, once for a group, and their products are added up in registers. For 64 bands of float32 that
# takes 56 registers on sm_90, by ptxas, and 2.4 instructions for a product; in groups of 16, 127
# registers and 1.8 instructions.
GROUP = 8


class Shape(NamedTuple):
    """What is static.

    Attributes:
      filter: how x is made of the samples, as in csrc/correlated_noise.h.
      tile: how many elements share a place in the schedule.
      slots: how many terms a visit makes, if it is not 0.
      hidden: how many rows of the ring come before its slots.
      behind: how many samples before that of the step there are in its term.
      noise_dtype: float32 or float64, what is sampled.
      whole: whether all of the leaf is here.
    """

    filter: str
    tile: int
    slots: int
    hidden: int
    behind: int
    noise_dtype: Any
    whole: bool


def correlated_noise(
    shape: Shape,
    step: jax.Array,
    runs: jax.Array,
    keys: jax.Array,
    coef: jax.Array,
    scale: jax.Array,
    grad: jax.Array,
    ring: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The gradients with noise, and the ring after the step, in place.

    Args:
      shape: static.
      step: int32 scalar, t.
      runs: ``[n, 4]`` uint32, of each of n equal runs of elements that follow each other in the
        leaf: the index in it of the first, the high and the low word; and of the tile that this is
        in, which is one of S that have all phases, the phase of the first of those S, and its place
        among them. One if all of the leaf is here.
      keys: ``[samples, 2]`` uint32, of the leaf.
      coef: of the ring's dtype. Recurrences: ``[rows, slots + 1]``, the factors of z_t, x_{t-1} ..
        in x_t, one row for all steps or one for each of a visit. Sums of samples: ``[behind + 1]``,
        in the order of time. Buffers: ``[2, hidden]``, the decays and the output scales.
      scale: scalar of the ring's dtype.
      grad: ``[size]``, size >= 1, of any floating dtype.
      ring: ``[hidden + slots, size]``, float32 or float64.
    """
    numbers = jnp.stack([step, step % max(shape.slots, 1)]).astype(jnp.int32)
    arrays = [numbers, runs, keys, coef, scale[None], grad]
    outs = [jax.ShapeDtypeStruct(grad.shape, grad.dtype)]
    aliases = {}
    if ring.shape[0]:
        aliases = {len(arrays): len(outs)}
        arrays.append(ring)
        outs.append(jax.ShapeDtypeStruct(ring.shape, ring.dtype))

    count = runs.shape[0]

    def correlated_noise(
        numbers: Any, runs: Any, keys: Any, coef: Any, scale: Any, *leaf: Any
    ) -> None:
        step = _Step(shape, numbers[0], numbers[1], keys, coef, scale[0])
        # The ring that went in is the one that comes out.
        grad, *_, out, ring = leaf if aliases else (*leaf, None)
        place = (_in_leaf if shape.whole else _in_run)(step, runs, grad.shape[0])
        _tile(step, place, grad, out, ring)

    # The first tile of a run may begin before it.
    most = grad.size // count + (0 if shape.whole else shape.tile - 1)
    grid = (count * pl.cdiv(most, shape.tile),)
    results = _pallas.call(correlated_noise, outs, grid, *arrays, warps=WARPS, aliases=aliases)
    return results[0], results[1] if aliases else ring


class _Step(NamedTuple):
    """What the tiles share: references to arrays, and numbers."""

    shape: Shape
    t: jax.Array
    now: jax.Array  # the slot of x_t
    keys: Any
    coef: Any
    scale: jax.Array

    def row(self, ahead: int | jax.Array) -> jax.Array:
        """The row of the ring that x of so many steps ahead goes to."""
        slot = self.now + ahead
        return self.shape.hidden + jnp.where(slot < self.shape.slots, slot, slot - self.shape.slots)


class _Place(NamedTuple):
    """What is here of a tile: elements that follow each other, here and in the leaf."""

    phase: jax.Array
    here: jax.Array  # where the first is here
    in_leaf: tuple[Any, jax.Array]  # and in the leaf, the high and the low word
    left: jax.Array  # how many there are from it on, also in other tiles
    unit: int  # which this divides


def _in_leaf(step: _Step, runs: Any, size: int) -> _Place:
    """The tile of this program, of a leaf that is here."""
    shape, tile = step.shape, pl.program_id(0)
    first = tile * shape.tile
    phase = _phase(shape.slots, runs[0, 2], tile)
    return _Place(phase, first, (np.uint32(0), first.astype(jnp.uint32)), size - first, size)


def _in_run(step: _Step, runs: Any, size: int) -> _Place:
    """What this program's run has of its tile, if anything."""
    shape, (count, _) = step.shape, runs.shape
    length = size // count
    tiles = pl.cdiv(length + shape.tile - 1, shape.tile)
    run, tile = pl.program_id(0) // tiles, pl.program_id(0) % tiles
    hi, lo, first_phase, place = (runs[run, i] for i in range(4))
    start = tile * shape.tile - (lo % shape.tile).astype(jnp.int32)  # of the tile, in the run
    offset = jnp.maximum(start, 0)
    index_lo = lo + offset.astype(jnp.uint32)
    index_hi = hi + (index_lo < lo).astype(jnp.uint32)
    phase = _phase(shape.slots, first_phase, tile + place.astype(jnp.int32))
    left = jnp.minimum(length - offset, start - offset + shape.tile)
    return _Place(phase, run * length + offset, (index_hi, index_lo), left, 1)


def _phase(slots: int, first_phase: jax.Array, tile: jax.Array) -> jax.Array:
    """Of a tile, counted from the first of S that have all phases: the next S shift by one."""
    slots = max(slots, 1)
    return (tile + tile // slots + first_phase.astype(jnp.int32)) % slots


def _tile(step: _Step, place: _Place, grad: Any, out: Any, ring: Any) -> None:
    shape = step.shape

    def visit(steps: int) -> None:
        advance = _ADVANCE[shape.filter]
        blocks: Any = pl.cdiv(shape.tile, THREADS)
        if place.unit % shape.tile:
            blocks = jnp.minimum(blocks, (place.left + THREADS - 1) // THREADS)

        def block(i: jax.Array, _: None) -> None:
            at = _Elements(place, i * THREADS, THREADS)
            _emit(step, at, advance(step, _Visit(step, at, ring), steps), grad, out)

        jax.lax.fori_loop(0, blocks, block, None)

    if shape.slots == 0:
        return visit(1)
    refreshed = place.phase == step.now
    starting = ~refreshed & (step.t < place.phase)
    pl.when(refreshed)(lambda: visit(shape.slots))
    pl.when(starting)(lambda: visit(1))

    @pl.when(~refreshed & ~starting)
    def _read() -> None:
        at = _Elements(place, 0, shape.tile)
        _emit(step, at, at.load(ring, step.row(0)), grad, out)


@dataclasses.dataclass(frozen=True)
class _Elements:
    """Elements ``offset`` .. ``offset + count - 1`` of a tile, as far as there are any."""

    place: _Place
    offset: Any
    count: int

    @property
    def index(self) -> tuple[Any, jax.Array]:
        """In the leaf, the high and the low word: a tile has one high word."""
        hi, lo = self.place.in_leaf
        lane = jnp.arange(self.count, dtype=jnp.int32)
        return hi, lo + (self.offset + lane).astype(jnp.uint32)

    def mask(self) -> jax.Array | None:
        if self.place.unit % self.count == 0:
            return None
        return jnp.arange(self.count, dtype=jnp.int32) < self.place.left - self.offset

    def load(self, array: Any, *row: Any) -> jax.Array:
        part, mask = self._part(array, *row), self.mask()
        return plgpu.load(part, mask=mask, other=None if mask is None else 0)

    def store(self, values: jax.Array, array: Any, *row: Any) -> None:
        plgpu.store(self._part(array, *row), values, mask=self.mask())

    def _part(self, array: Any, *row: Any) -> Any:
        return array.at[(*row, pl.ds(self.place.here + self.offset, self.count))]


def _emit(step: _Step, at: _Elements, x: jax.Array, grad: Any, out: Any) -> None:
    at.store((at.load(grad) + step.scale * x).astype(out.dtype), out)


# -- Terms ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Visit:
    """Some elements on which terms are made."""

    step: _Step
    at: _Elements
    ring: Any

    def load(self, row: Any) -> jax.Array:
        return self.at.load(self.ring, row)

    def store(self, row: Any, values: jax.Array) -> None:
        self.at.store(values, self.ring, row)

    def sample(self, key: int | jax.Array) -> jax.Array:
        """Elements of ``jax.random.normal(keys[key], ..)``, in the dtype of the coefficients."""
        keys, (hi, lo) = self.step.keys, self.at.index
        x0, x1 = threefry2x32(keys[key, 0], keys[key, 1], hi, lo)
        z = _normal(x0, x1, self.step.shape.noise_dtype)
        return z.astype(self.step.coef.dtype)


def _normal(x0: jax.Array, x1: jax.Array, dtype: Any) -> jax.Array:
    """What jax.random.normal makes of the two words of a counter."""
    if dtype == jnp.float32:
        bits = ((x0 ^ x1) >> 9) | np.uint32(0x3F800000)
    else:
        bits = (x0.astype(jnp.uint64) << 32) | x1.astype(jnp.uint64)
        bits = (bits >> 12) | np.uint64(0x3FF0000000000000)
    one, lowest = np.ones((), dtype), np.nextafter(np.array(-1, dtype), np.zeros((), dtype))
    unit = jax.lax.bitcast_convert_type(bits, dtype) - one
    uniform = jnp.maximum(lowest, unit * (one - lowest) + lowest)
    return jax.lax.erf_inv(uniform) * np.array(np.sqrt(2), dtype)


def _loop(start: Any, stop: Any, body: Callable[..., Any], *carry: jax.Array) -> Any:
    """``carry = body(i, *carry)`` for i from start to stop, a tuple of arrays."""
    return jax.lax.fori_loop(start, stop, lambda i, carry: tuple(body(i, *carry)), carry)


# Each of the following makes x_t .. x_{t+steps-1}, steps being ``slots`` or 1, in the ring's slots,
# and gives x_t.


def _recurrence(step: _Step, at: _Visit, steps: int) -> jax.Array:
    slots = step.shape.slots
    if slots and steps == slots:
        return _recurrence_ahead(step, at)

    def add(lag: jax.Array, x: jax.Array) -> list[jax.Array]:
        return [x + step.coef[0, lag] * at.load(step.row(slots - lag))]

    x = step.coef[0, 0] * at.sample(0)
    if slots:
        (x,) = _loop(1, jnp.minimum(step.t, slots) + 1, add, x)
        at.store(step.row(0), x)
    return x


def _recurrence_ahead(step: _Step, at: _Visit) -> jax.Array:
    slots, by_row = step.shape.slots, step.coef.shape[0] > 1
    groups, rest = divmod(slots, GROUP)

    def factors(first: Any, lag: Any) -> Callable[[int, int], jax.Array]:
        """(j, p) -> that of lag ``lag + j - p`` in term ``first + j``."""
        if by_row:
            return lambda j, p: step.coef[first + j, lag + j - p]
        of = functools.cache(lambda further: step.coef[0, lag + further])
        return lambda j, p: of(j - p)

    # Place i is the row of the ring that holds x_{t+i-S} until x_{t+i} is made there.
    def make(first: Any, terms: int) -> None:
        """Makes the terms of the places from ``first`` on."""

        def draw(i: Any, *x: jax.Array) -> list[jax.Array]:
            z = step.coef[first + i if by_row else 0, 0] * at.sample(first + i)
            return [jnp.where(i == j, z, x[j]) for j in range(terms)]

        def add(place: Any, places: int, lag: Any, *x: jax.Array) -> list[jax.Array]:
            factor = factors(first, lag)
            past = [at.load(step.row(place + p)) for p in range(places)]
            return [
                sum((factor(j, p) * past[p] for p in range(places)), x[j]) for j in range(terms)
            ]

        def new(group: Any, *x: jax.Array) -> list[jax.Array]:
            return add(group * GROUP, GROUP, first - group * GROUP, *x)

        def old(group: Any, *x: jax.Array) -> list[jax.Array]:
            return add(group * GROUP, GROUP, slots + first - group * GROUP, *x)

        mine = first // GROUP
        x = _loop(0, terms, draw, *[jnp.zeros(THREADS, step.coef.dtype)] * terms)
        x = _loop(0, mine, new, *x)
        if terms == GROUP:
            x = _loop(mine + 1, groups, old, *x)
            if rest:
                x = add(groups * GROUP, rest, slots + first - groups * GROUP, *x)

        # The group itself: up to its own place, a term meets new ones.
        of_new, of_old = factors(first, 0), factors(first, slots)
        past = [at.load(step.row(first + p)) for p in range(terms)]
        for j in range(terms):
            total = x[j]
            for p in range(terms):
                total = total + (of_new if p < j else of_old)(j, p) * past[p]
            past[j] = total
            at.store(step.row(first + j), total)

    jax.lax.fori_loop(0, groups, lambda group, _: make(group * GROUP, GROUP), None)
    if rest:
        make(groups * GROUP, rest)
    return at.load(step.row(0))


def _moving_average(step: _Step, at: _Visit, steps: int) -> jax.Array:
    slots, behind = step.shape.slots, step.shape.behind
    if slots == 0:
        return _weighted_samples(step, at)

    # Terms that a sample may be part of, the oldest first.
    def add(key: Any, *x: jax.Array) -> list[jax.Array]:
        z = at.sample(key)
        return [term + step.coef[behind - lag] * z for lag, term in enumerate(x)]

    zero = jnp.zeros(THREADS, step.coef.dtype)

    def advance(key: Any, *x: jax.Array) -> list[jax.Array]:
        return add(key, *x[1:], zero)

    def make(ahead: Any, *x: jax.Array) -> list[jax.Array]:
        terms = advance(behind + ahead, *x)
        at.store(step.row(ahead), terms[0])
        return terms

    # Nothing came before step 0.
    x = _loop(jnp.maximum(behind - step.t, 0), behind, advance, *[zero] * (behind + 1))
    _loop(0, steps, make, *x)
    return at.load(step.row(0))


def _weighted_samples(step: _Step, at: _Visit, steps: int = 1) -> jax.Array:
    """Samples without weight are not made."""
    del steps

    def add(key: Any, x: jax.Array) -> list[jax.Array]:
        weight = step.coef[key]
        return [jax.lax.cond(weight != 0, lambda: x + weight * at.sample(key), lambda: x)]

    x = jnp.zeros(THREADS, step.coef.dtype)
    return _loop(0, step.coef.shape[0], add, x)[0]


def _buffers(inverse: bool, step: _Step, at: _Visit, steps: int) -> jax.Array:
    hidden = step.shape.hidden

    def make(ahead: Any, _: jax.Array, *u: jax.Array) -> list[jax.Array]:
        z = at.sample(ahead)
        read = sum(step.coef[1, i] * u[i] for i in range(hidden))
        x = z - read if inverse else z + read
        if step.shape.slots:
            at.store(step.row(ahead), x)
        return [x, *(step.coef[0, i] * u[i] + (x if inverse else z) for i in range(hidden))]

    u = [at.load(np.int32(i)) for i in range(hidden)]
    x, *u = _loop(0, steps, make, u[0], *u)
    for i in range(hidden):
        at.store(np.int32(i), u[i])
    return at.load(step.row(0)) if step.shape.slots else x


_ADVANCE: dict[str, Callable[[_Step, _Visit, int], jax.Array]] = {
    "recurrence": _recurrence,
    "moving_average": _moving_average,
    "row": _weighted_samples,
    "buffers": functools.partial(_buffers, False),
    "inverse_buffers": functools.partial(_buffers, True),
}
