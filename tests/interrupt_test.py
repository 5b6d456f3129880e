"""Ctrl-C ends what takes long, and does not wait for it."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading

import jax.numpy as jnp
import pytest

from jax_privacy_kernels import monte_carlo, planning
from jax_privacy_kernels.matrix_factorization import (
    banded,
    buffered_toeplitz,
    dense,
    optimization,
    toeplitz,
)

AFTER = 1.0  # seconds, in which the last of them are still compiled
LONG = {"max_optimizer_steps": 10**9}


def valley(x):
    return jnp.sum((x[1:] - x[:-1] ** 2) ** 2) + jnp.sum((x - 1) ** 2)


TAKE_LONG = {
    "optimization.optimize": lambda: optimization.optimize(valley, jnp.zeros(10**6), **LONG),
    "toeplitz.optimize_banded_toeplitz": lambda: toeplitz.optimize_banded_toeplitz(
        n=10**6, bands=1000, **LONG
    ),
    "toeplitz.optimize_banded_inverse_toeplitz": lambda: toeplitz.optimize_banded_inverse_toeplitz(
        n=10**5, min_sep=100, num_bands=50, **LONG
    ),
    "toeplitz.optimize_coefs_for_amplifications": (
        lambda: toeplitz.optimize_coefs_for_amplifications(
            2**14, dataset_size=10**6, expected_batch_size=500, epsilon=2.0, delta=1e-7
        )
    ),
    "banded.optimize": lambda: banded.optimize(n=10**4, bands=32, **LONG),
    "buffered_toeplitz.optimize": lambda: buffered_toeplitz.optimize(
        n=10**6, min_sep=1000, max_participations=100, rtol=1.0, **LONG
    ),
    "dense.optimize": lambda: dense.optimize(n=300, callback=None, **LONG),
    "planning.plan": lambda: planning.plan(
        steps=2**14, dataset_size=10**6, batch_size=500, epsilon=2.0, delta=1e-7
    ),
    "monte_carlo.delta": lambda: monte_carlo.delta(
        monte_carlo.BallsInBins(iterations=1000, cycle_length=100),
        [1.0, 0.5],
        noise_multiplier=1.0,
        epsilon=1.0,
        num_samples=10**12,
    ),
}


class Interrupted(KeyboardInterrupt):
    """Ours, and not that of whoever runs the tests."""


@contextlib.contextmanager
def interrupted(monkeypatch):
    """Ends as Ctrl-C does, after some time.

    Python forgets what is raised while it collects garbage, where JAX has a callback: one in some
    fifty interrupts. Whoever presses Ctrl-C then presses it again.
    """

    def interrupt(*_):
        raise Interrupted

    def press():
        signal.setitimer(signal.ITIMER_REAL, AFTER)

    def forgotten(unraisable):
        if isinstance(unraisable.exc_value, Interrupted):
            press()

    monkeypatch.setattr(sys, "unraisablehook", forgotten)
    before = signal.signal(signal.SIGALRM, interrupt)
    press()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(
    not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread(),
    reason="needs timers, and the main thread, which signals go to",
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TAKE_LONG)
def test_interrupts_end_what_takes_long(name, monkeypatch):
    """That the test ends says it: nobody waits for what they would make without the interrupt."""
    with interrupted(monkeypatch), pytest.raises(Interrupted):
        TAKE_LONG[name]()
