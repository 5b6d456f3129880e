"""What noise costs in a training step: the time with it minus the time without.

    python bench/in_step.py            # the full run: a quarter of an hour, 12 GB of memory
    python bench/in_step.py --quick    # a check that it works

A step is jitted with everything that it changes donated: gradients of a linear layer for every
leaf, x^T dy over a few rows, summed up over two microbatches in a scan, as clipped gradients are;
noise; and Adam by optax. The same step without noise takes turns with those whose noise is made by
jax_privacy, by this library in plain JAX and by its C++ kernel. After every switch a call is not
timed: what the one before gave back to the system would count against the next. At least b steps
pass before any is timed. Temporary memory is what XLA has planned. Models:

  one          a matrix of 10,000,000 parameters
  transformer  the 148 leaves of twelve layers, of 10,000,000 parameters in all
  small        400 leaves of 1,000 parameters
  bfloat16     as `one`, with gradients and parameters of 16 bits and noise of 32
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import harness
import jax
import jax.numpy as jnp
import matplotlib
import optax
from jax_privacy import matrix_factorization as peer_mechanisms
from jax_privacy import noise_addition as peer_noise_addition

from jax_privacy_kernels import matrix_factorization, noise_addition

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MICROBATCHES, ROWS = 2, 4  # that a gradient sums over
NAMES = ("none", *harness.NAMES)
Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, and the band counts that it is measured with."""

    shapes: Callable[[int], Shapes]  # of a size: parameters in all, or layers or leaves
    size: int
    quick: int
    bands: tuple[int, ...] = (1, 8, 32)
    dtype: str = "float32"


def one(parameters: int) -> Shapes:
    side = 1 << (parameters.bit_length() - 1) // 2
    return {"kernel": (parameters // side, side)}


def transformer(layers: int) -> Shapes:
    width = 256
    layer = {
        "attention/query": (width, width),
        "attention/key": (width, width),
        "attention/value": (width, width),
        "attention/out": (width, width),
        "mlp/in": (width, 4 * width),
        "mlp/in_bias": (4 * width,),
        "mlp/out": (4 * width, width),
        "mlp/out_bias": (width,),
        "norm_1/scale": (width,),
        "norm_1/bias": (width,),
        "norm_2/scale": (width,),
        "norm_2/bias": (width,),
    }
    leaves = {f"layer{i:02}/{name}": shape for i in range(layers) for name, shape in layer.items()}
    ends = {"embedding": (1024, width), "positions": (256, width)}
    return ends | leaves | {"norm/scale": (width,), "norm/bias": (width,)}


def small(leaves: int) -> Shapes:
    return {f"leaf{i:03}": (1000,) for i in range(leaves)}


CASES = {
    "one": Case(one, 10_000_000, 4_096),
    "transformer": Case(transformer, 12, 1),
    "small": Case(small, 400, 3),
    "bfloat16": Case(one, 10_000_000, 4_096, dtype="bfloat16"),
}


def noise_of(name: str, bands: int) -> optax.GradientTransformation:
    """The noise of a contestant, float32 whatever the gradients."""
    if name == "none":
        return optax.identity()
    coef = matrix_factorization.toeplitz.optimal_max_error_strategy_coefs(bands)
    options: dict[str, Any] = {"stddev": 1.0, "prng_key": jax.random.key(0), "dtype": jnp.float32}
    if name == "peer":
        matrix = peer_mechanisms.toeplitz.inverse_as_streaming_matrix(coef)
        return peer_noise_addition.matrix_factorization_privatizer(matrix, **options)
    ours = matrix_factorization.toeplitz.inverse_as_streaming_matrix(coef)
    return noise_addition.matrix_factorization_privatizer(ours, implementation=name, **options)


class Trainer:
    """A model in training; a call takes one step and gives the parameters.

    Attributes:
      temporary_bytes: of memory that XLA has planned for a step beside what is donated to it.
    """

    def __init__(self, name: str, case: Case, shapes: Shapes, bands: int):
        noise, adam = noise_of(name, bands), optax.adam(1e-3)
        key = jax.random.key(1)
        self._params = {
            leaf: 0.02 * jax.random.normal(jax.random.fold_in(key, i), shape, case.dtype)
            for i, (leaf, shape) in enumerate(shapes.items())
        }
        widths = {side for shape in shapes.values() for side in shape}
        self._batch = {
            width: jax.random.normal(
                jax.random.fold_in(key, 2**20 + width), (MICROBATCHES, 2, ROWS, width), case.dtype
            )
            for width in widths
        }
        self._state = noise.init(self._params), adam.init(self._params)

        def gradient(batch: Any, shape: tuple[int, ...]) -> jax.Array:
            if len(shape) == 1:
                return batch[shape[0]][0].sum(0)
            return batch[shape[0]][0].T @ batch[shape[1]][1]

        def step(params: Any, state: Any, batch: Any) -> Any:
            def add(sums: Any, rows: Any) -> tuple[Any, None]:
                grads = {leaf: gradient(rows, shape) for leaf, shape in shapes.items()}
                return jax.tree.map(jnp.add, sums, grads), None

            zeros = jax.tree.map(jnp.zeros_like, params)
            grads, _ = jax.lax.scan(add, zeros, batch)
            grads, noise_state = noise.update(grads, state[0])
            updates, adam_state = adam.update(grads, state[1], params)
            return optax.apply_updates(params, updates), (noise_state, adam_state)

        donated = jax.jit(step, donate_argnums=(0, 1))
        self._step = donated.lower(self._params, self._state, self._batch).compile()
        analysis: Any = self._step.memory_analysis()
        self.temporary_bytes = analysis.temp_size_in_bytes

    def __call__(self) -> Any:
        self._params, self._state = self._step(self._params, self._state, self._batch)
        return self._params


def measure(name: str, case: Case, bands: int, quick: bool, repeats: int) -> dict[str, Any]:
    """Times the contestants on one model."""
    shapes = case.shapes(case.quick if quick else case.size)
    trainers = {n: Trainer(n, case, shapes, bands) for n in NAMES}
    times = harness.interleave(trainers, warmup=max(bands, 3), repeats=repeats, settle=True)
    marginal = {n: times[n]["median_s"] - times["none"]["median_s"] for n in NAMES[1:]}
    return {
        "case": name,
        "bands": bands,
        "leaves": len(shapes),
        "parameters": sum(map(math.prod, shapes.values())),
        "dtype": case.dtype,
        "temporary_bytes": {n: trainers[n].temporary_bytes for n in NAMES},
        "marginal_s": marginal,
        # None where noise is lost in the noise of the clock.
        "marginal_speedup": {
            n: marginal["peer"] / marginal[n] if marginal[n] > 0 else None for n in NAMES[2:]
        },
        "speedup": harness.speedups(times, "median_s"),
        "implementations": times,
    }


FLOORS = {("one", 1): 14.0, ("one", 8): 20.0, ("one", 32): 30.0}


def acceptance(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The floors that a release must hold; those whose rows were not measured are left out."""
    found = {(row["case"], row["bands"]): row for row in rows}
    checks = []
    for (case, bands), least in FLOORS.items():
        if (case, bands) in found:
            what = f"{case}: noise of cpp at {bands} bands, times that of the peer"
            ratio = found[case, bands]["marginal_speedup"]["cpp"]
            checks.append(harness.floor(what, ratio, ">=", least))
    for (case, bands), row in found.items():
        if case == "transformer" and ("one", bands) in found:
            one_leaf = found["one", bands]
            per_parameter = [of["marginal_s"]["cpp"] / of["parameters"] for of in (row, one_leaf)]
            what = f"transformer: noise of cpp at {bands} bands per parameter, over one leaf"
            checks.append(harness.floor(what, per_parameter[0] / per_parameter[1], "<=", 1.15))
        if case in ("one", "transformer"):
            temporary = row["temporary_bytes"]
            more = (temporary["cpp"] - temporary["none"]) / row["parameters"]
            what = f"{case}: temporary bytes of cpp at {bands} bands per parameter, beyond none"
            checks.append(harness.floor(what, more, "<=", 0.05))
    return checks


def describe(report: dict[str, Any]) -> str:
    """The report as text."""
    header = ["case", "bands", "parameters", "none ms"]
    header += [f"{n} +ms" for n in harness.NAMES] + ["jax x", "cpp x"]
    header += [f"{n} MB" for n in NAMES]
    lines = []
    for row in report["rows"]:
        ratios = [row["marginal_speedup"][n] for n in harness.NAMES[1:]]
        lines.append(
            [
                row["case"],
                row["bands"],
                f"{row['leaves']} x {row['parameters'] / row['leaves']:.0e}",
                f"{row['implementations']['none']['median_s'] * 1e3:.2f}",
                *(f"{row['marginal_s'][n] * 1e3:.2f}" for n in harness.NAMES),
                *("-" if ratio is None else f"{ratio:.1f}" for ratio in ratios),
                *(f"{row['temporary_bytes'][n] / 1e6:.1f}" for n in NAMES),
            ]
        )
    return harness.text(report, harness.table(header, lines), "MB: temporary memory of a step")


def plot(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """What noise adds to a step, over bands; a panel for every model."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure, panels = plt.subplots(
        1, len(cases), figsize=(3.6 * len(cases), 3.8), squeeze=False, layout="constrained"
    )
    for axes, case in zip(panels[0], cases, strict=True):
        shown = sorted((row for row in rows if row["case"] == case), key=lambda row: row["bands"])
        bands = [row["bands"] for row in shown]
        for name in harness.NAMES:
            axes.plot(
                bands, [row["marginal_s"][name] * 1e3 for row in shown], **harness.style(name)
            )
        harness.over_bands(axes, bands)
        axes.grid(True, which="both", linewidth=0.3)
        row = shown[0]
        leaves = "one leaf" if row["leaves"] == 1 else f"{row['leaves']} leaves"
        axes.set_title(f"{case}\n{leaves}, {row['parameters']:,} parameters")
    panels[0][0].set_ylabel("milliseconds that noise adds to a step")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = harness.options(__doc__ or "", CASES)
    parser.add_argument("--bands", type=int, nargs="+", help="band counts, in place of 1, 8, 32")
    parser.add_argument("--repeats", type=int, help="timed steps (21)")
    args: argparse.Namespace = parser.parse_args(argv)
    repeats = args.repeats or (3 if args.quick else 21)
    environment = harness.environment()
    rows = []
    for name in args.cases:
        case = CASES[name]
        for bands in args.bands or ((1, 3) if args.quick else case.bands):
            rows.append(measure(name, case, bands, args.quick, repeats))
            print(f"{name}, {bands} bands: done", flush=True)
            jax.clear_caches()
            gc.collect()
    return harness.publish("in_step", environment, rows, acceptance, describe, plot, args)


if __name__ == "__main__":
    main()
