"""What the command ``bench`` measures: steps of noise, Toeplitz algebra and a plan.

A row is a dictionary: what it is about, the times of every contestant that took part, and why the
others did not.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from jax_privacy_kernels import noise_addition
from jax_privacy_kernels._bench import algebra, steps, timing
from jax_privacy_kernels.matrix_factorization import toeplitz
from jax_privacy_kernels.ops import _registry

__all__ = ["ALGEBRA", "PLAN", "algebra_rows", "contestants", "most_parameters", "noise_rows"]

PLAN = {"n": 10_000, "bands": 32, "max_optimizer_steps": 250}
ALGEBRA = {  # and the op whose implementations take part
    algebra.Size("multiply", 10_000): "toeplitz_multiply",
    algebra.Size("inverse", 100_000, 32): "toeplitz_solve",
    algebra.Size("min_sep", 100_000, min_sep=100): "min_sep_norm",
    algebra.Size("error", 100_000, 32): "toeplitz_solve",
}
PLANNING = ("toeplitz_multiply", "toeplitz_solve", "min_sep_norm")  # the ops of the plan
ROUND = 0.25  # seconds that a round of a contestant should take
ROUNDS = 5
NO_TIME = "no time left (--seconds gives more)"


def contestants(op: str, asked: Sequence[str], peer: ModuleType | None) -> list[str]:
    """jax_privacy if it is installed, and the implementations on the default device, slowest first.

    Args:
      op: whose implementations.
      asked: those that are wanted, or nothing for all.
      peer: jax_privacy.
    """
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    table = _registry.table(op)
    names = [n for n, e in table.items() if platform in e.platforms and not e.unavailable()]
    wanted = [n for n in reversed(names) if not asked or n in asked]
    return ["peer", *wanted] if peer else wanted


def most_parameters(bands: int, names: int, free: int) -> int:
    """How many float32 parameters fit, with the states of all contestants in memory at once.

    The peer's step makes a second copy of its state.
    """
    models = names * (bands - 1) + (bands - 1) + 2 * names + 2
    return free // (4 * models)


def noise_rows(
    parameters: int,
    bands: Sequence[int],
    names: Sequence[str],
    peer: ModuleType | None,
    deadline: float,
) -> Iterator[dict[str, Any]]:
    """One step of correlated noise for a leaf of float32 parameters, its state donated."""
    grads = {"leaf": jax.random.normal(jax.random.key(1), (parameters,), jnp.float32)}
    for b in bands:
        coef = toeplitz.optimal_max_error_strategy_coefs(b)

        def runner(name: str, coef: jax.Array = coef) -> steps.Runner:
            if name == "peer":
                assert peer is not None
                matrix = peer.matrix_factorization.toeplitz.inverse_as_streaming_matrix(coef)
                make: Any = peer.noise_addition.matrix_factorization_privatizer
                return steps.Runner(make(matrix, stddev=1.0, prng_key=0), grads)
            privatizer = noise_addition.matrix_factorization_privatizer(
                toeplitz.inverse_as_streaming_matrix(coef),
                stddev=1.0,
                prng_key=0,
                implementation=name,
            )
            return steps.Runner(privatizer, grads)

        def prepare(name: str, b: int = b) -> tuple[Callable[[], float], float]:
            run = runner(name)
            first = timing.clock(run)
            # The first b - 1 steps of the schedule differ, and it repeats after b - 1.
            cycle = 1 if name == "peer" else max(b - 1, 1)
            timing.clock(run)
            once = timing.chain(run, max(cycle - 1, 1))
            chained = cycle * max(1, math.ceil(ROUND / (once * cycle)))
            return (lambda: timing.chain(run, chained)), first

        traffic = steps.bytes_per_step((parameters, 4, 4), steps.look_ahead_passes(b))
        row = {"what": f"{b} band{'s' if b > 1 else ''}", "bands": b, "parameters": parameters}
        yield {**row, "bytes_per_step": traffic, **_measure(names, prepare, deadline)}


def algebra_rows(asked: Sequence[str], peer: ModuleType | None, deadline: float) -> Iterator[Any]:
    """Functions of strategies, called eagerly, and one plan; what they find is compared."""
    for size, op in ALGEBRA.items():
        calls = {
            name: timing.contestant(
                name, algebra.call(size, algebra.peer() if name == "peer" else algebra.OURS)
            )
            for name in contestants(op, asked, peer)
        }
        what = f"{algebra.TITLES[size.function]}, {size.label}"
        yield {"what": what, **_measure(list(calls), _eager(calls), deadline)}

    tables = [contestants(op, asked, peer) for op in PLANNING]
    names = [name for name in tables[0] if all(name in table for table in tables)]

    def plan(name: str) -> Callable[[], Any]:
        library = algebra.peer() if name == "peer" else algebra.OURS
        return timing.contestant(name, lambda: library.toeplitz.optimize_banded_toeplitz(**PLAN))

    what = f"optimize_banded_toeplitz, n = {PLAN['n']:,}, b = {PLAN['bands']}"
    yield {"what": what, **_measure(names, _eager({n: plan(n) for n in names}), deadline)}


def _eager(calls: dict[str, Callable[[], Any]]) -> Callable[[str], tuple[Any, float]]:
    def prepare(name: str) -> tuple[Callable[[], float], float]:
        first = timing.clock(calls[name])
        return (lambda: timing.clock(calls[name])), first

    return prepare


def _measure(
    names: Sequence[str],
    prepare: Callable[[str], tuple[Callable[[], float], float]],
    deadline: float,
) -> dict[str, Any]:
    """Times of contestants that take turns, of each as many as the time that is left allows.

    Args:
      names: of the contestants.
      prepare: makes one ready; gives a timer and the seconds of the first call.
      deadline: of time.monotonic(), after which none begins.
    """
    timers: dict[str, Callable[[], float]] = {}
    first: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name in names:
        if time.monotonic() > deadline:
            missing[name] = NO_TIME
            continue
        try:
            timers[name], first[name] = prepare(name)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            missing[name] = "out of memory"
    # A contestant whose first call was slow is not called as often as the others.
    rounds = {name: ROUNDS if first[name] < 2 else 2 for name in timers}
    left = max(deadline - time.monotonic(), 0)
    if left < sum(min(first[name], 2) * rounds[name] for name in timers):
        rounds = dict.fromkeys(timers, 1)
    seconds = timing.take_turns(timers, rounds)
    times = {name: timing.summary(seconds[name], first[name]) for name in timers}
    del timers
    jax.clear_caches()
    gc.collect()
    return {
        "implementations": times,
        "missing": missing,
        "speedup": timing.speedups(times, "median_s"),
    }
