"""One step of correlated noise for one leaf, in Pallas: sample, correlate, add to the gradients.

A program takes a tile, or what a run of elements has of it if not all of the leaf is here, and
most tiles only read the slot of the step. In the others (ops/correlated_noise/_schedule.py states
the schedule) a program makes terms for some elements at a time; _streams_pallas.py says how many.
The ring is its memory, and no noise is kept anywhere else. If these are one for each of its
threads, what a thread reads back is what it wrote itself. If they are more, how they are shared out
may differ from one access to the next, and threads wait for each other.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jax_privacy_kernels.kernels import _pallas
from jax_privacy_kernels.kernels._noise_pallas import (
    Elements,
    Place,
    emit,
    loop,
    place,
    programs,
    visit,
    weighted_samples,
)
from jax_privacy_kernels.kernels._streams_pallas import Width, samples, width

__all__ = ["Static", "correlated_noise"]

# Terms of a recurrence are made in groups of this many. The terms of the past are read as many at a
# time, once for a group, and their products are added up in registers. For 64 bands of float32 that
# takes 56 registers on sm_90, by ptxas, and 2.4 instructions for a product; in groups of 16, 127
# registers and 1.8 instructions.
GROUP = 8


class Static(NamedTuple):
    """What is static.

    Attributes:
      filter: how x is made of the samples, by its name in csrc/correlated_noise.h.
      tile: how many elements share a place in the schedule.
      slots: how many terms a visit makes, if it is not 0.
      buffers: how many rows of the ring come before its slots.
      behind: how many samples before that of the step there are in its term.
      noise_dtype: float32 or float64, the dtype that is sampled.
      whole: whether all of the leaf is here.
      stream: the type of the keys.
    """

    filter: str
    tile: int
    slots: int
    buffers: int
    behind: int
    noise_dtype: Any
    whole: bool
    stream: str

    @property
    def rows(self) -> int:
        """Of the ring."""
        return self.buffers + self.slots

    @property
    def draws(self) -> int:
        """How many samples of an element are made at once."""
        if not self.rows:
            return 1
        if self.stream == "threefry2x32" and self.filter != "recurrence":
            return 1  # in a loop: programs are smaller, and hardly slower
        return min(max(self.slots, 1) + self.behind, GROUP)

    @property
    def width(self) -> Width:
        """What a program that makes terms works on at a time."""
        keys = max(self.draws, pl.cdiv(self.buffers, 4))  # so that many buffers fit into registers
        found = width(self.stream, keys, self.noise_dtype, self.tile)
        return found if self.rows else found._replace(elements=self.tile)  # nothing is read back


def correlated_noise(
    static: Static,
    step: jax.Array,
    runs: jax.Array,
    keys: jax.Array,
    coef: jax.Array,
    scale: jax.Array,
    grad: jax.Array,
    ring: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """The gradients with noise, and the ring after the step, in place.

    Args:
      static: static.
      step: int32 scalar, t.
      runs: see _runs.py.
      keys: ``[samples, words]`` uint32, those of the leaf.
      coef: of the ring's dtype. Recurrences: ``[rows, slots + 1]``, the factors of z_t, x_{t-1} ..
        in x_t, one row for all steps or one for each of a visit. Moving averages: ``[behind + 1]``,
        in the order of time. Buffers: ``[2, buffers]``, the decays and the output scales.
      scale: scalar of the ring's dtype.
      grad: ``[size]``, size >= 1, of any floating dtype.
      ring: ``[buffers + slots, size]``, float32 or float64; None if it has no rows.
    """
    now, (elements, warps) = step % max(static.slots, 1), static.width
    numbers = jnp.stack([step, now, jnp.full_like(step, elements)]).astype(jnp.int32)
    arrays = [numbers, runs, keys, coef, scale[None], grad]
    outs = [jax.ShapeDtypeStruct(grad.shape, grad.dtype)]
    aliases = {}
    if ring is not None:
        aliases = {len(arrays): len(outs)}
        arrays.append(ring)
        outs.append(jax.ShapeDtypeStruct(ring.shape, ring.dtype))

    def correlated_noise(
        numbers: Any, runs: Any, keys: Any, coef: Any, scale: Any, *leaf: Any
    ) -> None:
        read_elements = lambda: numbers[2]  # noqa: E731
        step = _Step(static, numbers[0], numbers[1], read_elements, keys, coef, scale[0])
        # The ring that went in is the one that comes out.
        grad, *_, out, ring = leaf if aliases else (*leaf, None)
        _tile(
            step,
            place(static.slots, static.tile, static.whole, runs, grad.shape[0]),
            grad,
            out,
            ring,
        )

    grid = (programs(grad.size, runs.shape[0], static.tile, static.whole),)
    results = _pallas.call(correlated_noise, outs, grid, *arrays, warps=warps, aliases=aliases)
    return results[0], results[1] if aliases else None


class _Step(NamedTuple):
    """What the tiles share: references to arrays, and numbers."""

    static: Static
    t: jax.Array
    now: jax.Array  # the slot of x_t
    read_elements: Callable[[], jax.Array]  # how many there are at a time
    keys: Any
    coef: Any
    scale: jax.Array

    def row(self, ahead: int | jax.Array) -> jax.Array:
        """The row of the ring that x of so many steps ahead goes to."""
        slot, slots = self.now + ahead, self.static.slots
        return self.static.buffers + jnp.where(slot < slots, slot, slot - slots)


def _tile(step: _Step, here: Place, grad: Any, out: Any, ring: Any) -> None:
    static = step.static

    def advance(steps: int) -> None:
        def some(at: Elements) -> None:
            x = _ADVANCE[static.filter](step, _Visit(step, at, ring), steps)
            emit(at, step.scale, x, grad, out)

        visit(here, static.tile, static.width.elements, step.read_elements, some)

    if static.slots == 0:
        return advance(1)
    refreshed = here.phase == step.now
    starting = ~refreshed & (step.t < here.phase)
    pl.when(refreshed)(lambda: advance(static.slots))
    pl.when(starting)(lambda: advance(1))

    @pl.when(~refreshed & ~starting)
    def _read() -> None:
        at = Elements(here, np.int32(0), static.tile)
        emit(at, step.scale, at.load(ring, step.row(0)), grad, out)


# -- Terms ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Visit:
    """Some elements on which terms are made."""

    step: _Step
    at: Elements
    ring: Any

    def load(self, row: Any) -> jax.Array:
        return self.at.load(self.ring, row)

    def store(self, row: Any, values: jax.Array) -> None:
        self.at.store(values, self.ring, row)

    def zeros(self) -> jax.Array:
        return jnp.zeros(self.at.count, self.step.coef.dtype)

    def samples(self, first: Any, count: int) -> list[jax.Array]:
        """Those of so many keys, in the dtype of the coefficients."""
        static = self.step.static
        z = samples(
            static.stream,
            self.step.keys,
            first,
            count,
            self.at.index,
            self.at.count,
            static.noise_dtype,
        )
        return [x.astype(self.step.coef.dtype) for x in z]

    def wait(self) -> None:
        """Until all threads have read or written what is above."""
        if self.at.count > 32 * self.step.static.width.warps:
            plgpu.debug_barrier()


# Each of the following makes x_t .. x_{t+steps-1}, steps being ``slots`` or 1, in the ring's slots,
# and gives x_t.


def _recurrence(step: _Step, at: _Visit, steps: int) -> jax.Array:
    slots = step.static.slots
    if slots and steps == slots:
        return _recurrence_ahead(step, at)

    def add(lag: jax.Array, x: jax.Array) -> list[jax.Array]:
        return [x + step.coef[0, lag] * at.load(step.row(slots - lag))]

    (z,) = at.samples(0, 1)
    x = step.coef[0, 0] * z
    if slots:
        (x,) = loop(1, jnp.minimum(step.t, slots) + 1, add, x)
        at.store(step.row(0), x)
    return x


def _recurrence_ahead(step: _Step, at: _Visit) -> jax.Array:
    slots, by_row = step.static.slots, step.coef.shape[0] > 1
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
        z = at.samples(first, terms)
        x = [step.coef[first + j if by_row else 0, 0] * z[j] for j in range(terms)]
        x = loop(0, mine, new, *x)
        if terms == GROUP:
            x = loop(mine + 1, groups, old, *x)
            if rest:
                x = add(groups * GROUP, rest, slots + first - groups * GROUP, *x)

        # The group itself: up to its own place, a term meets new ones.
        of_new, of_old = factors(first, 0), factors(first, slots)
        past = [at.load(step.row(first + p)) for p in range(terms)]
        at.wait()
        for j in range(terms):
            total = x[j]
            for p in range(terms):
                total = total + (of_new if p < j else of_old)(j, p) * past[p]
            past[j] = total
            at.store(step.row(first + j), total)
        at.wait()

    jax.lax.fori_loop(0, groups, lambda group, _: make(group * GROUP, GROUP), None)
    if rest:
        make(groups * GROUP, rest)
    return at.load(step.row(0))


def _moving_average(step: _Step, at: _Visit, steps: int) -> jax.Array:
    slots, behind, draws = step.static.slots, step.static.behind, step.static.draws
    if slots == 0:
        return weighted_samples(step.coef, at.zeros(), lambda key: at.samples(key, 1)[0])

    def make(group: Any, *terms: jax.Array) -> Sequence[jax.Array]:
        """Adds samples to the terms that they may be part of, the oldest first."""
        for i, z in enumerate(at.samples(group * draws, draws)):
            key = group * draws + i
            z = jnp.where(key < behind - step.t, 0, z)  # nothing came before step 0
            terms = *terms[1:], at.zeros()
            terms = tuple(x + step.coef[behind - lag] * z for lag, x in enumerate(terms))
            store = functools.partial(at.store, step.row(key - behind), terms[0])
            pl.when((key >= behind) & (key < behind + steps))(store)
        return terms

    loop(0, pl.cdiv(behind + steps, draws), make, *[at.zeros()] * (behind + 1))
    at.wait()
    return at.load(step.row(0))


def _buffers(inverse: bool, step: _Step, at: _Visit, steps: int) -> jax.Array:
    slots, buffers, draws = step.static.slots, step.static.buffers, step.static.draws
    groups, rest = divmod(steps, draws)

    def make(first: Any, terms: int, *u: jax.Array) -> list[jax.Array]:
        for ahead, z in enumerate(at.samples(first, terms)):
            read = sum(step.coef[1, i] * u[i] for i in range(buffers))
            x = z - read if inverse else z + read
            if slots:
                at.store(step.row(first + ahead), x)
            u = tuple(step.coef[0, i] * u[i] + (x if inverse else z) for i in range(buffers))
        return [x, *u]

    u = [at.load(np.int32(i)) for i in range(buffers)]
    at.wait()
    x, *u = loop(0, groups, lambda group, _, *u: make(group * draws, draws, *u), u[0], *u)
    if rest:
        x, *u = make(groups * draws, rest, *u)
    for i in range(buffers):
        at.store(np.int32(i), u[i])
    at.wait()
    return at.load(step.row(0)) if slots else x


_ADVANCE: dict[str, Callable[[_Step, _Visit, int], jax.Array]] = {
    "recurrence": _recurrence,
    "moving_average": _moving_average,
    "buffers": functools.partial(_buffers, False),
    "inverse_buffers": functools.partial(_buffers, True),
}
