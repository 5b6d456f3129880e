"""A small transformer learns to write like the Python documentation, privately; kill it, go on.

It predicts the next byte of the language reference that Python itself carries (`pydoc_data.topics`,
under the PSF licence): nothing is downloaded. Examples are windows of 64 bytes, and an example is
what the guarantee protects.

    pip install "jax_privacy_kernels[examples]" orbax-checkpoint
    python train_transformer.py --die-at 130    # kills itself there, as a machine may
    python train_transformer.py                 # goes on from the last checkpoint

What is shown:

* Gradients of examples are computed in bfloat16, clipped in float32, and summed in float32 over
  micro-batches in one `lax.scan`: only one micro-batch of gradients is ever in memory. The sum is
  not rounded to 16 bits before the noise: rounding could move two neighbouring sums apart by more
  than the clip norm, and the noise was not calibrated for that.
* Noise is correlated (BandMF): batches cycle through the data in a fixed order, so that an example
  takes part every `steps_per_epoch` steps, and one Gaussian mechanism describes the whole run.
* The checkpoint holds parameters, optimizer and noise state as one tree, with orbax. The noise
  state is donated at every step, so it is saved before the next one. Who resumes continues the same
  noise; the steps since the last checkpoint are repeated exactly, and release nothing new.

Adjacency is zero-out, as in train_digits.py, and epsilon is that of one run. Losses are measured on
text that is held out, which has no protection.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import pydoc_data.topics
import signal
from collections.abc import Sequence
from typing import Any, NamedTuple

import arguments
import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from dp_accounting.pld import PLDAccountant
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

from jax_privacy_kernels import noise_addition
from jax_privacy_kernels.matrix_factorization import toeplitz

ADJACENCY = dp_accounting.NeighboringRelation.REPLACE_SPECIAL  # dp-accounting's name for zero-out
WINDOW = 64  # bytes of an example that are predicted
WIDTH, HEADS, LAYERS, BYTES = 64, 4, 2, 128
HELD_OUT = 256  # windows
CLIP_NORM = 1.0


class Run(NamedTuple):
    """All that a checkpoint holds."""

    params: Any
    optimizer: Any
    noise: Any
    losses: jax.Array  # [steps], after each step that was measured; NaN at others


def load_text() -> tuple[np.ndarray, np.ndarray]:
    """Windows of WINDOW + 1 bytes, ``[examples, WINDOW + 1]`` int32, in an order drawn once."""
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int32)
    size = WINDOW + 1
    windows = codes[: codes.size // size * size].reshape(-1, size)
    windows = windows[np.random.default_rng(0).permutation(len(windows))]
    return windows[HELD_OUT:], windows[:HELD_OUT]


def init_params(key: jax.Array) -> dict[str, Any]:
    keys = iter(jax.random.split(key, 2 + 4 * LAYERS))

    def dense(rows: int, columns: int) -> jax.Array:
        return jax.random.normal(next(keys), (rows, columns)) / np.sqrt(rows)

    blocks = [
        {
            "attend": dense(WIDTH, 3 * WIDTH),
            "project": dense(WIDTH, WIDTH),
            "up": dense(WIDTH, 4 * WIDTH),
            "down": dense(4 * WIDTH, WIDTH),
        }
        for _ in range(LAYERS)
    ]
    return {"bytes": dense(BYTES, WIDTH), "places": dense(WINDOW, WIDTH), "blocks": blocks}


def loss_fn(params: dict[str, Any], window: jax.Array) -> jax.Array:
    """Mean cross-entropy of one example, in nats per byte; computed in the dtype of the params."""
    x = params["bytes"][window[:-1]] + params["places"]
    for block in params["blocks"]:
        q, k, v = jnp.split(normed(x) @ block["attend"], 3, axis=-1)
        heads = (y.reshape(1, WINDOW, HEADS, WIDTH // HEADS) for y in (q, k, v))
        attended = jax.nn.dot_product_attention(*heads, is_causal=True)
        x = x + attended.reshape(WINDOW, WIDTH) @ block["project"]
        x = x + jax.nn.gelu(normed(x) @ block["up"]) @ block["down"]
    logits = (normed(x) @ params["bytes"].T).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, window[1:]).mean()


def normed(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


def clipped_gradient(params: Any, window: jax.Array) -> Any:
    """Of an example: computed in bfloat16, clipped in float32."""
    grads = jax.grad(loss_fn)(optax.tree.cast(params, jnp.bfloat16), window)
    grads = optax.tree.cast(grads, jnp.float32)
    norm = optax.tree.norm(grads)
    # Rounded down by more than float32 may have rounded it up; a gradient that is not finite is 0.
    scale = jnp.where(jnp.isfinite(norm), (1 - 1e-6) / jnp.maximum(1, norm / CLIP_NORM), 0)
    return jax.tree.map(lambda g: jnp.where(jnp.isfinite(norm), g * scale, 0), grads)


@functools.partial(jax.jit, static_argnames=("privatizer", "optimizer"), donate_argnums=0)
def train_step(run: Run, batch: jax.Array, *, privatizer: Any, optimizer: Any) -> Run:
    """One step on ``[micro-batches, examples, WINDOW + 1]``."""
    per_example = jax.vmap(clipped_gradient, in_axes=(None, 0))

    def accumulate(total: Any, micro: jax.Array) -> tuple[Any, None]:
        grads = per_example(run.params, micro)
        return jax.tree.map(lambda t, g: t + g.sum(axis=0), total, grads), None

    total, _ = jax.lax.scan(accumulate, optax.tree.zeros_like(run.params), batch)
    # Noise once for the whole batch, not once for each micro-batch.
    noisy, noise = privatizer.update(total, run.noise)
    mean = optax.tree.scale(1 / (batch.shape[0] * batch.shape[1]), noisy)
    updates, state = optimizer.update(mean, run.optimizer, run.params)
    return Run(optax.apply_updates(run.params, updates), state, noise, run.losses)


@jax.jit
def held_out_loss(params: Any, windows: jax.Array) -> jax.Array:
    return jax.vmap(loss_fn, in_axes=(None, 0))(params, windows).mean()


def make_privatizer(args: argparse.Namespace) -> tuple[optax.GradientTransformation, float]:
    """The privatizer of the run, and its noise multiplier."""
    coef = toeplitz.optimal_max_error_strategy_coefs(args.bands)
    epochs = -(-args.steps // args.steps_per_epoch)
    squared = toeplitz.minsep_sensitivity_squared(
        coef, min_sep=args.steps_per_epoch, max_participations=epochs, n=args.steps
    )
    # Rounded up by more than float32 may have rounded it down.
    sensitivity = float(jnp.sqrt(squared)) * (1 + 1e-6)
    multiplier = dp_accounting.calibrate_dp_mechanism(
        lambda: PLDAccountant(ADJACENCY), dp_accounting.GaussianDpEvent, args.epsilon, args.delta
    )
    privatizer = noise_addition.matrix_factorization_privatizer(
        toeplitz.inverse_as_streaming_matrix(coef),
        stddev=multiplier * CLIP_NORM * sensitivity,
        prng_key=args.noise_seed,
    )
    return privatizer, multiplier


def train(args: argparse.Namespace) -> tuple[Run, int]:
    """Trains, from the last checkpoint if there is one; gives the run and where it began."""
    train_windows, test_windows = load_text()
    privatizer, multiplier = make_privatizer(args)
    optimizer = optax.adam(args.lr)

    def start() -> Run:
        params = init_params(jax.random.key(0))
        losses = jnp.full(args.steps, jnp.nan)
        return Run(params, optimizer.init(params), privatizer.init(params), losses)

    folder = pathlib.Path(args.checkpoints).resolve() / "steps"
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager(folder, options=options) as manager:
        run, last = start(), manager.latest_step()
        if last is None:
            # Who dies before the next checkpoint repeats steps, with the noise that they had.
            manager.save(0, args=ocp.args.StandardSave(run._asdict()))
        else:
            found = manager.restore(last, args=ocp.args.StandardRestore(run._asdict()))
            run = Run(**found)
            print(f"Goes on from step {last}, of {folder}.")
        first = last or 0
        print(
            f"{sum(x.size for x in jax.tree.leaves(run.params)):,} parameters, "
            f"{len(train_windows):,} examples, {args.steps_per_epoch} steps an epoch.\n"
            f"Noise multiplier {multiplier:.3f}: epsilon = {args.epsilon:g} at delta = "
            f"{args.delta:g} for {args.steps} steps."
        )
        steps = range(first, args.steps)
        with tqdm(steps, initial=first, total=args.steps, unit="step", disable=None) as progress:
            for step in progress:
                at = step % args.steps_per_epoch * args.batch_size
                batch = train_windows[at : at + args.batch_size]
                micro = batch.reshape(-1, args.micro_batch, WINDOW + 1)
                run = train_step(run, micro, privatizer=privatizer, optimizer=optimizer)
                done = step + 1
                if done % args.measure_every == 0 or done == args.steps:
                    loss = held_out_loss(run.params, test_windows)
                    run = run._replace(losses=run.losses.at[step].set(loss))
                    progress.set_postfix_str(f"{float(loss):.3f} nats per byte")
                if done % args.save_every == 0 or done == args.steps:
                    # Before the next step, which takes the memory of this state.
                    manager.save(done, args=ocp.args.StandardSave(run._asdict()))
                if done == args.die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
    return run, first


def plot(run: Run, began: int, args: argparse.Namespace) -> None:
    losses = np.asarray(run.losses)
    steps = np.flatnonzero(np.isfinite(losses))
    # A bare Figure, unlike pyplot, draws to a file whatever display there is or is not.
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps + 1, losses[steps], "o-", color="#0072B2", markersize=4, label="held-out text")
    axes.axhline(
        np.log(BYTES), color="#555555", linewidth=1, linestyle=":", label="a uniform guess"
    )
    if began:
        axes.axvline(began, color="#D55E00", linestyle="--", label=f"resumed from step {began}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("training step")
    axes.set_ylabel("loss, nats per byte")
    axes.set_ylim(bottom=0)
    axes.set_title(f"Transformer at epsilon = {args.epsilon:g}, delta = {args.delta:g}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.output, dpi=150)


# What a run is: a checkpoint of other settings is not continued.
SETTINGS = ("epsilon", "delta", "steps", "batch_size", "micro_batch", "bands", "lr", "noise_seed")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments.Parser(description="Trains a small transformer privately; it can be killed.")
    parser.add_argument("--epsilon", type=arguments.between(0.01, 100), default=8.0, help="(8)")
    parser.add_argument("--delta", type=arguments.between(1e-12, 1), default=1e-5, help="(1e-5)")
    parser.add_argument("--steps", type=arguments.count, default=200, help="(200)")
    parser.add_argument("--batch-size", type=arguments.count, default=256, help="examples (256)")
    parser.add_argument(
        "--micro-batch", type=arguments.count, default=32, help="whose gradients are in memory (32)"
    )
    parser.add_argument("--bands", type=arguments.count, default=16, help="(16)")
    parser.add_argument("--lr", type=arguments.positive, default=3e-3, help="of Adam (0.003)")
    parser.add_argument("--save-every", type=arguments.count, default=50, help="steps (50)")
    parser.add_argument("--measure-every", type=arguments.count, default=10, help="steps (10)")
    parser.add_argument("--checkpoints", default="train_transformer", help="folder")
    parser.add_argument(
        "--output",
        type=arguments.output,
        default="train_transformer.png",
        help="where the plot goes",
    )
    parser.add_argument("--die-at", type=arguments.count, help="step after which it kills itself")
    parser.add_argument(
        "--noise-seed",
        type=arguments.seed,
        help="who knows it knows the noise: only to compare runs",
    )
    args = parser.parse_args(argv)
    if args.batch_size % args.micro_batch:
        parser.error(
            f"expected --batch-size to be a multiple of --micro-batch {args.micro_batch}, "
            f"found {args.batch_size}"
        )
    examples = len(load_text()[0])
    if args.batch_size > examples:
        parser.error(f"expected --batch-size to be at most {examples:,}, found {args.batch_size:,}")
    # A remainder that does not fill a batch is never used.
    args.steps_per_epoch = examples // args.batch_size
    most = min(args.steps_per_epoch, args.steps)
    if args.bands > most:
        parser.error(f"expected --bands to be at most {most}, found {args.bands}")
    folder = pathlib.Path(args.checkpoints)
    settings = {name: getattr(args, name) for name in SETTINGS}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "settings.json"
        if not file.exists():
            file.write_text(json.dumps(settings))
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        parser.error(f"expected a folder that can be written, found {folder}: {error}")
    if found != settings:
        other = [name for name in SETTINGS if found.get(name) != settings[name]]
        parser.error(f"{folder} holds a run with another {', '.join(other)}: use another folder")
    return args


def main(argv: Sequence[str] | None = None) -> Run:
    args = parse_args(argv)
    run, began = train(args)
    measured = np.asarray(run.losses)[np.isfinite(np.asarray(run.losses))]
    print(f"Loss on held-out text: {measured[0]:.3f} at first, {measured[-1]:.3f} nats per byte.")
    plot(run, began, args)
    print(f"Loss against steps: {args.output}")
    return run


if __name__ == "__main__":
    main()
