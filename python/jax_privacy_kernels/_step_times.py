"""How long a step of noise takes on this machine: measured once, then remembered in a file."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from jax_privacy_kernels._files import write_whole
from jax_privacy_kernels._version import __version__
from jax_privacy_kernels.noise_addition import matrix_factorization_privatizer

__all__ = ["milliseconds"]

_PARAMETERS = 2**20  # that are measured; times grow in proportion
_STEPS = 7


def milliseconds(key: str, noising_matrix: Any, parameters: int) -> float:
    """An estimate of the milliseconds that a step takes, in float32.

    Args:
      key: What the time depends on, apart from this machine: the mechanism and its size.
      noising_matrix: Its noising matrix, which is run if the file has no time for the key.
      parameters: The size of the model.
    """
    measured = min(parameters, _PARAMETERS)
    device = jax.devices()[0]
    full_key = f"{__version__} {device.platform} {device.device_kind} {os.cpu_count()} "
    full_key += f"{measured} {key}"
    times = _read()
    if full_key not in times:
        times[full_key] = _measure(noising_matrix, measured)
        _write(full_key, times[full_key])
    return times[full_key] * parameters / measured


def _measure(noising_matrix: Any, parameters: int) -> float:
    privatizer = matrix_factorization_privatizer(
        noising_matrix, stddev=1.0, prng_key=jax.random.key(0)
    )
    gradients = jnp.zeros(parameters, jnp.float32)
    state = privatizer.init(gradients)
    step = jax.jit(privatizer.update, donate_argnums=1)
    seconds = []
    for _ in range(_STEPS):
        began = time.perf_counter()
        noise, state = step(gradients, state)
        jax.block_until_ready((noise, state))
        seconds.append(time.perf_counter() - began)
    return 1e3 * statistics.median(seconds[2:])  # the first compiles


def _path() -> pathlib.Path:
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(root, "jax_privacy_kernels", "step_times.json").expanduser()


def _read() -> dict[str, float]:
    try:
        times = json.loads(_path().read_text())
        return {str(key): float(value) for key, value in times.items()}
    except (OSError, ValueError, AttributeError, TypeError):  # none yet, or none that can be read
        return {}


def _write(key: str, value: float) -> None:
    """Adds a time to the file."""
    path = _path()
    with contextlib.suppress(OSError):  # times are then measured again
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({**_read(), key: value}).encode())
