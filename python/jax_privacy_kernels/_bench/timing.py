"""Interleaved timing: a change in the machine's load or clock hits all contestants alike."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jax_privacy_kernels.ops import implementation

__all__ = ["chain", "clock", "contestant", "interleave", "speedups", "summary", "take_turns"]


def contestant(name: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call, on the implementation of that name; the peer's as it is."""
    if name == "peer":
        return call

    def chosen() -> Any:
        with implementation(name):
            return call()

    return chosen


def clock(call: Callable[[], Any]) -> float:
    """Seconds until the arrays that a call returns are ready."""
    start = time.perf_counter()
    result = call()
    jax.block_until_ready(result)
    seconds = time.perf_counter() - start
    del result  # Freed off the clock, and before the next call.
    return seconds


def chain(call: Callable[[], Any], steps: int) -> float:
    """Seconds for each of some calls, one after the other; only the last is waited for."""

    def run() -> Any:
        for _ in range(steps):
            out = call()
        return out

    return clock(run) / steps


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    *,
    warmup: int,
    repeats: int | Mapping[str, int],
    fresh: bool = False,
    settle: bool = False,
) -> dict[str, dict[str, float]]:
    """Times callables in turn; each holds its own state and must not share buffers with another.

    Args:
      calls: by name, none called before: the first call is taken to be the one that compiles.
      warmup: rounds that are not timed, the first calls among them.
      repeats: rounds that are timed, each call once in every round; or their number by name, where
        0 is for a call so slow that the first has to do.
      fresh: whether JAX forgets what it has compiled before each first call, so that none finds
        there what another has paid for. The second call then compiles too: take a warmup of 2.
      settle: whether every turn begins with a call that is not timed. A call after that of another,
        which has given much memory back to the system, may take several times as long as the next.

    Returns:
      By name, in seconds: median, p90, min and max of a call, and the first, which compiles; and
      the number of rounds.
    """
    names = list(calls)
    rounds = {name: repeats if isinstance(repeats, int) else repeats[name] for name in names}
    first = {}
    for name in names:
        if fresh:
            jax.clear_caches()
        first[name] = clock(calls[name])
    for _ in range(warmup - 1):
        for name in names:
            if rounds[name]:
                clock(calls[name])
    timers = {name: functools.partial(_turn, calls[name], settle) for name in names}
    times = take_turns(timers, rounds)
    return {name: summary(times[name] or [first[name]], first[name]) for name in names}


def _turn(call: Callable[[], Any], settle: bool) -> float:
    if settle:
        clock(call)
    return clock(call)


def take_turns(
    timers: Mapping[str, Callable[[], float]], rounds: Mapping[str, int]
) -> dict[str, list[float]]:
    """What each timer says in its rounds."""
    names = list(timers)
    gc.collect()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(max(rounds.values(), default=0)):
        # Nobody always runs on the caches and the clock rate that the same other left.
        for name in names[i % len(names) :] + names[: i % len(names)]:
            if i < rounds[name]:
                seconds[name].append(timers[name]())
    return seconds


def summary(times: Sequence[float], first: float) -> dict[str, float]:
    """Of the times of the rounds, in seconds, and that of the first call, which compiled."""
    return {
        "median_s": float(np.median(times)),
        "p90_s": float(np.percentile(times, 90)),
        "min_s": min(times),
        "max_s": max(times),
        "first_call_s": first,
        "rounds": len(times),
    }


def speedups(times: Mapping[str, Mapping[str, float]], key: str) -> dict[str, float]:
    """By name, how often what the others take goes into what the peer takes, if that is known."""
    peer = times.get("peer", {})
    return {n: peer[key] / t[key] for n, t in times.items() if key in peer and n != "peer"}
