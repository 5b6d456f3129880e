"""What the benchmarks share: interleaved timing, the machine's own limits, tables and files.

A benchmark times all its contestants in one process, round-robin, so that a change in the machine's
load or clock hits all of them alike; the limits are measured in the same run for the same reason.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import operator
import os
import pathlib
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_privacy_kernels
from jax_privacy_kernels import noise_addition
from jax_privacy_kernels.ops import _ffi

RESULTS = pathlib.Path(__file__).parent / "results"
# The contestants, as plots call them.
LABELS = {"peer": "jax_privacy", "jax": "this library, jax", "cpp": "this library, cpp"}
NAMES = tuple(LABELS)


def options(doc: str, cases: Iterable[str]) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes: a check, not a measurement"
    )
    parser.add_argument("--cases", nargs="+", choices=cases, default=list(cases))
    parser.add_argument("--output-dir", type=pathlib.Path, default=RESULTS)
    return parser


def contestant(name: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call, on the implementation of that name; the peer's as it is."""
    if name == "peer":
        return call

    def chosen() -> Any:
        with jax_privacy_kernels.implementation(name):
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


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    *,
    warmup: int,
    repeats: int | Mapping[str, int],
    fresh: bool = False,
) -> dict[str, dict[str, float]]:
    """Times callables in turn; each holds its own state and must not share buffers with another.

    Args:
      calls: by name, none called before: the first call is taken to be the one that compiles.
      warmup: rounds that are not timed, the first calls among them.
      repeats: rounds that are timed, each call once in every round; or their number by name, where
        0 is for a call so slow that the first has to do.
      fresh: whether JAX forgets what it has compiled before each first call, so that none finds
        there what another has paid for. The second call then compiles too: take a warmup of 2.

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
    gc.collect()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(max(rounds.values())):
        # Nobody always runs on the caches and the clock rate that the same other left.
        for name in names[i % len(names) :] + names[: i % len(names)]:
            if i < rounds[name]:
                seconds[name].append(clock(calls[name]))
    return {name: _summary(first[name], seconds[name] or [first[name]]) for name in names}


def _summary(first: float, times: Sequence[float]) -> dict[str, float]:
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


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


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
        **{name: _version(name) for name in ("jax", "jaxlib", "jax-privacy")},
        "jax-privacy-kernels": jax_privacy_kernels.__version__,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Text with aligned columns, the first to the left and the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        row[0].ljust(widths[0])
        + "".join(f"  {c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))
        for row in cells
    )


def floor(what: str, value: float | None, sign: str, bound: float) -> dict[str, Any]:
    """An entry of the list of floors that a release must hold; the sign is ">=" or "<=".

    What was not measured, None, does not pass.
    """
    passed = {">=": operator.ge, "<=": operator.le}[sign]
    return {
        "floor": what,
        "value": value,
        "required": f"{sign} {bound:g}",
        "pass": value is not None and bool(passed(value, bound)),
    }


def text(report: Mapping[str, Any], *parts: str) -> str:
    """A report: where it was measured, the parts given, and the floors with what was measured."""
    verdicts = [
        (
            check["floor"],
            "not measured" if check["value"] is None else f"{check['value']:.3g}",
            check["required"],
            "PASS" if check["pass"] else "" if check["value"] is None else "FAIL",
        )
        for check in report["acceptance"]
    ]
    environment = "\n".join(f"{key}: {value}" for key, value in report["environment"].items())
    floors = [table(("floor", "measured", "required", ""), verdicts)] if verdicts else []
    return "\n\n".join([environment, *parts, *floors])


def publish(
    report: dict[str, Any],
    describe: Callable[[dict[str, Any]], str],
    plot: Callable[[Sequence[dict[str, Any]], pathlib.Path], None],
    folder: pathlib.Path,
) -> dict[str, Any]:
    """Prints a report, writes it to folder/<benchmark>-<date>.json and plots its rows beside it."""
    print("\n" + describe(report))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{report['benchmark']}-{report['environment']['date']}.json"
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    plot(report["rows"], path.with_suffix(".png"))
    return report
