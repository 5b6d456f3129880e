"""Trains with jax_privacy's `DPTrainer`, with and without the swap: the same parameters, and when.

    git clone https://github.com/google-deepmind/jax_privacy
    python tools/reference_training.py jax_privacy

The argument is a checkout of jax_privacy's main branch, or of a version with `training` (2.2 has it
in `experimental`). Every case is a program that knows nothing of this library. It runs twice, in
processes of their own, and the table says whether its last parameters agree, and what it took:
planning (optimizing the strategy, making the trainer), all of `fit`, and the fastest step.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import _checkout

TOLERANCE = 2e-5
FEATURES, CLASSES, EXAMPLES, BATCH = 64, 10, 512, 32


@dataclasses.dataclass(frozen=True)
class Case:
    """A way to train.

    Attributes:
      bands: of the strategy.
      microbatch: None, or "autotuned" for `AutotuneMicrobatch`.
      resume_at: a step, from whose `TrainingState` a second `fit` goes on to the end.
      devices: of the host; more than one are a mesh, with noise laid out by ``ZERO``.
    """

    bands: int
    microbatch: str | None = None
    resume_at: int | None = None
    devices: int = 1


CASES = {
    "1 band (DP-SGD)": Case(1),
    "6 bands": Case(6),
    "16 bands": Case(16),
    "32 bands": Case(32),
    "16 bands, AutotuneMicrobatch": Case(16, microbatch="autotuned"),
    "16 bands, resumed": Case(16, resume_at=20),
    "16 bands, ZERO on 8 devices": Case(16, devices=8),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkout", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--parameters", type=int, default=100_000)
    parser.add_argument(
        "--case", action="append", choices=CASES, help="may be repeated; all by default"
    )
    parser.add_argument("--child", nargs=3, metavar=("CASE", "SWAPPED", "FOLDER"))
    options = parser.parse_args()
    if options.child:
        name, swapped, folder = options.child
        train(CASES[name], swapped == "True", options, pathlib.Path(folder))
        return 0

    chosen = options.case or list(CASES)
    print(
        f"{options.parameters} parameters, {options.steps} steps; seconds without -> with the swap"
    )
    print(f"{'':<30} {'parameters':>12} {'planning':>16} {'fit':>16} {'step':>18}")
    failed = 0
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            runs = [child(name, swapped, options, folder) for swapped in (False, True)]
        if None in runs:
            failed += 1
            print(f"{name:<30} {'fails':>12} {'unswapped' if runs[0] is None else 'swapped'}")
            continue
        plain, swap = runs
        apart = max(
            abs(a - b) for a, b in zip(plain["parameters"], swap["parameters"], strict=True)
        )
        failed += not apart <= TOLERANCE
        print(
            f"{name:<30} {apart:>12.1e}"
            + "".join(f" {plain[k]:>7.2f} -> {swap[k]:<5.2f}" for k in ("planning", "fit"))
            + f" {plain['step']:>8.4f} -> {swap['step']:<6.4f}",
            flush=True,
        )
    return int(failed > 0)


def child(name: str, swapped: bool, options: argparse.Namespace, folder: str) -> dict | None:
    """What `train` found out, in a process of its own."""
    command = [sys.executable, __file__, str(options.checkout)]
    command += ["--steps", str(options.steps), "--parameters", str(options.parameters)]
    command += ["--child", name, str(swapped), folder]
    flags = f"--xla_force_host_platform_device_count={CASES[name].devices}"
    environment = _checkout.environment(options.checkout, XLA_FLAGS=flags, JAX_PLATFORMS="cpu")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
        return None
    return json.loads((pathlib.Path(folder) / f"{swapped}.json").read_text())


def train(case: Case, swapped: bool, options: argparse.Namespace, folder: pathlib.Path) -> None:
    _checkout.prepare()
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    if swapped:
        import jax_privacy_kernels

        jax_privacy_kernels.install()

    from jax_privacy import execution_plan, noise_addition, training
    from jax_privacy.matrix_factorization import toeplitz

    rng = np.random.default_rng(0)
    hidden = max(1, options.parameters // (FEATURES + CLASSES))
    params = {
        "in": rng.normal(size=(FEATURES, hidden)).astype(np.float32) / 8,
        "out": rng.normal(size=(hidden, CLASSES)).astype(np.float32) / hidden**0.5,
    }
    inputs = rng.normal(size=(EXAMPLES, FEATURES)).astype(np.float32)
    dataset = {"x": inputs, "y": inputs[:, :CLASSES].argmax(axis=1)}

    def loss_fn(params, data, prng):
        del prng
        logits = jnp.tanh(data["x"] @ params["in"]) @ params["out"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, data["y"]).mean(), ()

    layout = noise_addition.SupportedStrategies.DEFAULT
    if case.devices > 1:
        layout = noise_addition.SupportedStrategies.ZERO
        kinds = (jax.sharding.AxisType.Explicit,)
        mesh = jax.make_mesh((case.devices,), ("devices",), axis_types=kinds)
        jax.set_mesh(mesh)
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        params = jax.device_put(params, whole)
    params = jax.tree.map(jnp.asarray, params)

    start = time.perf_counter()
    strategy = toeplitz.optimize_banded_toeplitz(n=options.steps, bands=case.bands)
    config = training.BandMFConfig(
        iterations=options.steps,
        expected_participations=min(options.steps * BATCH / EXAMPLES, options.steps // case.bands),
        strategy=strategy,
        noise_multiplier=1.0,
        normalize_by=float(BATCH),
    )
    more = {}
    if case.microbatch:
        more["compilation_strategy"] = training.AutotuneMicrobatch()
    trainer = training.DPTrainer(
        config=config,
        performance_flags=execution_plan.PerformanceFlags(
            noise_seed=1, intermediate_strategy=layout
        ),
        loss_fn=loss_fn,
        optimizer=optax.sgd(0.1, momentum=0.9),
        **more,
    )
    planning = time.perf_counter() - start

    times, kept = [], {}

    def callback(step, state, aux):
        jax.block_until_ready(state)
        times.append(time.perf_counter())
        if step == case.resume_at:
            kept["state"] = jax.tree.map(jnp.copy, state)

    start = time.perf_counter()
    state = trainer.fit(dataset, params, rng_or_seed=2, callback=callback)
    if case.resume_at:
        state = trainer.fit(dataset, kept["state"], rng_or_seed=2, callback=callback)
    jax.block_until_ready(state)
    result = {
        "parameters": np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.params)]).tolist(),
        "planning": planning,
        "fit": time.perf_counter() - start,
        "step": float(np.diff(times).min()),
    }
    (folder / f"{swapped}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
