"""Noise of one step: Opacus and pfl in PyTorch, beside this library on the same cores.

    pip install '.[bench]' torch opacus pfl     # an environment of its own
    python bench/peers.py            # five minutes, 4 GB of memory
    python bench/peers.py --quick    # a check that it works

All add noise to 10,000,000 float32 gradients in one tensor, with as many threads, and take turns;
after every switch a call is not timed. Cases, of 1, 2, 8 and 32 bands:

  plain    independent noise: Opacus' default generator; here a threefry2x32 key
  secure   independent noise: Opacus' secure mode, which adds up four draws of PyTorch's generator
           (a cryptographic one, which it would come from, needs a package that is not maintained);
           here a chacha20 key, and exact noise of integers beside it
  banded   correlated noise: what pfl's BandedMatrixFactorizationMechanism does at a step, a sample
           and a forward substitution; here look-ahead
"""

from __future__ import annotations

import argparse
import gc
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import harness
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from jax_privacy_kernels import grid, matrix_factorization, noise_addition, random
from jax_privacy_kernels._bench.steps import Runner

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CASES = {"plain": (1,), "secure": (1,), "banded": (2, 8, 32)}
BITS = 12  # of coefficients of exact noise


class Torch:
    """A step in PyTorch: the gradients, which are given, and new noise in a new tensor."""

    def __init__(self, grads: np.ndarray, noise: Callable[[Any], Any]):
        import torch

        self._grads, self._noise = torch.from_numpy(grads), noise

    def __call__(self) -> None:
        self._out = self._grads + self._noise(self._grads)


def opacus(secure: bool) -> Callable[[Any], Any]:
    from opacus.optimizers import optimizer

    make = optimizer._generate_noise
    return lambda grads: make(std=1.0, reference=grads, generator=None, secure_mode=secure)


def pfl(bands: int) -> Callable[[Any], Any]:
    from pfl.internal.ops import pytorch_ops
    from pfl.internal.ops.selector import set_framework_module
    from pfl.privacy import ftrl_mechanism

    set_framework_module(pytorch_ops)
    coef = matrix_factorization.toeplitz.optimal_max_error_strategy_coefs(bands)
    strategy = matrix_factorization.toeplitz.materialize_lower_triangular(jnp.asarray(coef), 200)
    solve = ftrl_mechanism.ForwardSubstitution(np.asarray(strategy, np.float32), bands)
    draw = ftrl_mechanism.BandedMatrixFactorizationMechanism._generate_flattened_noise

    def step(grads: Any) -> Any:
        return solve.step(draw(grads.numel(), 1.0, None)).reshape(grads.shape)

    return step


def ours(bands: int, key: jax.Array, grads: np.ndarray, exact: bool = False) -> Runner:
    coef = matrix_factorization.toeplitz.optimal_max_error_strategy_coefs(bands)
    toeplitz = matrix_factorization.toeplitz
    if exact:
        coef = grid.round_coefs(coef, BITS)
        matrix = toeplitz.inverse_as_streaming_matrix(coef)
        return Runner(
            grid.privatizer(matrix, stddev=2.0**20, prng_key=key),
            {"w": jnp.round(1000 * jnp.asarray(grads)).astype(jnp.int32)},
        )
    matrix = toeplitz.inverse_as_streaming_matrix(coef)
    privatizer = noise_addition.matrix_factorization_privatizer(matrix, stddev=1.0, prng_key=key)
    return Runner(privatizer, {"w": jnp.asarray(grads)})


def measure(case: str, bands: int, size: int, repeats: int) -> dict[str, Any]:
    """Times the contestants of a case."""
    grads = np.random.default_rng(0).standard_normal(size, np.float32)
    threefry, chacha = jax.random.key(0), random.secure_key(bytes(32))
    calls: dict[str, Callable[[], Any]] = {}
    if case == "banded":
        calls["pfl"] = Torch(grads, pfl(bands))
        calls["ours"] = ours(bands, threefry, grads)
    else:
        calls["opacus"] = Torch(grads, opacus(case == "secure"))
        calls["ours"] = ours(1, chacha if case == "secure" else threefry, grads)
    if case == "secure":
        calls["ours, exact"] = ours(1, chacha, grads, exact=True)
    times = harness.interleave(calls, warmup=bands + 2, repeats=repeats, settle=True)
    peer = next(iter(calls))
    return {
        "case": case,
        "bands": bands,
        "parameters": size,
        "peer": peer,
        "speedup": {
            n: times[peer]["median_s"] / t["median_s"] for n, t in times.items() if n != peer
        },
        "implementations": times,
    }


def acceptance(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The floor that a release must hold."""
    return [
        harness.floor("secure: exact noise, times Opacus", row["speedup"]["ours, exact"], ">=", 8)
        for row in rows
        if row["case"] == "secure"
    ]


def describe(report: dict[str, Any]) -> str:
    """The report as text."""
    header = ["case", "bands", "parameters", "who", "ms (p90)", "times"]
    lines = [
        [
            row["case"],
            row["bands"],
            f"{row['parameters']:.0e}",
            name,
            f"{t['median_s'] * 1e3:.1f} ({t['p90_s'] * 1e3:.1f})",
            f"{row['speedup'][name]:.1f}" if name in row["speedup"] else "-",
        ]
        for row in report["rows"]
        for name, t in row["implementations"].items()
    ]
    return harness.text(report, harness.table(header, lines))


def plot(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """A bar for every contestant."""
    bars = [
        (f"{row['case']}, {row['bands']}: {name}", t["median_s"] * 1e3, name == row["peer"])
        for row in rows
        for name, t in row["implementations"].items()
    ]
    names, milli, peers = zip(*bars, strict=True)
    figure, axes = plt.subplots(figsize=(7, 1 + 0.32 * len(bars)), layout="constrained")
    colors = [harness.style("peer" if peer else "cpp")["color"] for peer in peers]
    axes.barh(range(len(bars)), milli, color=colors)
    axes.set_yticks(range(len(bars)), names)
    axes.invert_yaxis()
    axes.set_xlabel(f"milliseconds per step of {rows[0]['parameters']:,} parameters")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    import opacus
    import torch

    parser = harness.options(__doc__ or "", CASES)
    parser.add_argument("--repeats", type=int, help="timed steps (15)")
    args: argparse.Namespace = parser.parse_args(argv)
    torch.set_num_threads(harness.cores())
    environment = harness.environment() | {
        "torch": torch.__version__,
        "opacus": opacus.__version__,
    }
    rows = []
    for case in args.cases:
        for bands in CASES[case]:
            size = 10_000 if args.quick else 10_000_000
            rows.append(measure(case, bands, size, args.repeats or (3 if args.quick else 15)))
            print(f"{case}, {bands} bands: done", flush=True)
            gc.collect()
    return harness.publish("peers", environment, rows, acceptance, describe, plot, args)


if __name__ == "__main__":
    main()
