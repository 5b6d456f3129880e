"""What the machine can do at best, and what a reader needs to place a number."""

from __future__ import annotations

import datetime
import os
import pathlib
import platform
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels import noise_addition
from jax_privacy_kernels._bench.timing import chain, clock
from jax_privacy_kernels._version import __version__
from jax_privacy_kernels.ops import _ffi

__all__ = [
    "copy_bandwidth",
    "cores",
    "device_limits",
    "environment",
    "free_memory",
    "machine_limits",
    "sampling_rates",
]

CHAIN = 8  # calls that follow each other, so that launching one hides behind another


def cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def copy_bandwidth(megabytes: int = 256, repeats: int = 20) -> float:
    """Bytes read plus bytes written per second by memcpy on all cores, the best of some runs.

    Both arrays have been touched before: no page faults. They are larger than a core's own caches;
    a server's shared one may still hold some of them.
    """
    size = megabytes * 10**6
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    # Pieces outnumber cores, so that a core that lags does not hold the others up.
    pieces = np.linspace(0, size, 16 * cores() + 1).astype(int)

    def copy(i: int) -> None:  # numpy copies without the interpreter's lock
        np.copyto(target[pieces[i] : pieces[i + 1]], source[pieces[i] : pieces[i + 1]])

    with ThreadPoolExecutor(cores()) as pool:
        best = min(
            clock(lambda: list(pool.map(copy, range(len(pieces) - 1)))) for _ in range(repeats)
        )
    return 2 * size / best


def sampling_rates(dtype: Any = jnp.float32, repeats: int = 20) -> dict[str, float]:
    """Gaussian samples per second on all cores, the best of some runs, of two samplers.

    Of the kernel, as independent noise for a leaf that fits in the second-level caches, and of
    jax.random.normal.
    """
    size, steps = 2**17, 50
    zeros = jnp.zeros(size, dtype)
    privatizer = noise_addition.gaussian_privatizer(stddev=1.0, prng_key=0)
    state = privatizer.init(zeros)

    @jax.jit  # A scan: buffers stay in the cache, and there is one dispatch for all steps.
    def kernel() -> jax.Array:
        def step(carry: Any, _: None) -> tuple[Any, None]:
            return privatizer.update(zeros, carry[1]), None

        return jax.lax.scan(step, (zeros, state), length=steps)[0][0]

    normal = jax.jit(lambda key: jax.random.normal(key, (size,), dtype))
    key = jax.random.key(0)
    # The first of the runs compiles; the best of them does not.
    return {
        "kernel": size * steps / min(clock(kernel) for _ in range(repeats)),
        "jax.random.normal": size / min(clock(lambda: normal(key)) for _ in range(repeats)),
    }


def machine_limits(dtypes: Sequence[str], megabytes: int, repeats: int) -> dict[str, Any]:
    """Copy bandwidth, and the sampling rates of some dtypes.

    Measure before and after a benchmark, and keep the better with ``jax.tree.map(max, ...)``: a
    limit is what the machine can do at best.
    """
    rates = {}
    for dtype in dtypes:
        with jax.enable_x64(dtype == "float64"):
            rates[dtype] = sampling_rates(dtype, repeats)
    return {"copy_bytes_per_s": copy_bandwidth(megabytes, repeats), "samples_per_s": rates}


def device_limits(size: int, repeats: int) -> dict[str, float]:
    """Of the default device: bytes read plus written per second by a copy, and samples per second.

    The samples are those of jax.random.normal, in one kernel with their sum: nobody keeps them.
    """
    x = jnp.zeros(size, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    sample = jax.jit(lambda key: jnp.sum(jax.random.normal(key, (size,))))
    key = jax.random.key(0)
    calls = {"copy": lambda: copy(x), "sample": lambda: sample(key)}
    for call in calls.values():
        clock(call)
    best = {n: min(chain(call, CHAIN) for _ in range(repeats)) for n, call in calls.items()}
    return {"copy_bytes_per_s": 8 * size / best["copy"], "samples_per_s": size / best["sample"]}


def free_memory(device: Any) -> int:
    """Bytes that arrays on a device may still take, roughly; 4 GB where nobody says."""
    statistics = device.memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)
    meminfo = pathlib.Path("/proc/meminfo")
    if device.platform == "cpu" and meminfo.exists():
        found = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(found["MemAvailable"].split()[0]) * 1024
    return 4 * 10**9


def environment() -> dict[str, Any]:
    """What a reader needs to place the numbers; nothing that names the machine. Call it first: the
    load is that of others only before the benchmark adds its own.
    """
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": models[0] if models else platform.machine(),
        "cores": cores(),
        "load before": f"{os.getloadavg()[0]:.2f}",
        "simd": "none" if _ffi.unavailable() else _ffi.simd_target(),
        "python": platform.python_version(),
        **{name: _installed(name) for name in ("jax", "jaxlib", "jax-privacy")},
        "jax-privacy-kernels": __version__,
    }


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
