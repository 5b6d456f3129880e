"""Differentially private training whose noise is exact: BandMF on a grid, beside BandMF in floats.

Trains the classifier of `train_digits.py` twice, at the same epsilon: with gradients that are
clipped and rounded to integers one by one, summed, and given the noise of
`jax_privacy_kernels.grid`; and with floats. That file says what is claimed of the participation of
examples and of the accounting; all of it holds here, and on the grid it holds for the numbers that
come out and not only for real ones.

    pip install "jax_privacy_kernels[examples]"
    python train_exact.py
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import arguments
import jax
import jax.numpy as jnp
import numpy as np
import optax
import train_digits as digits
from matplotlib.figure import Figure

from jax_privacy_kernels import grid, noise_addition, random
from jax_privacy_kernels.matrix_factorization import toeplitz

GRID_SCALE = 2**17  # steps of the grid in the clipping norm: 1,800 times sqrt(d)
FRACTION_BITS = 12
PATHS = ("float", "grid")


@dataclasses.dataclass(frozen=True)
class Row:
    """What training by one path gave.

    Attributes:
      path: "float" or "grid".
      epsilon: that of the whole run.
      stddev: of z, in units of the clipping norm.
      accuracies: ``[seeds, measurements]``, on the test set.
      steps: where they were measured.
      step_seconds: median of a training step.
      noise_seconds: median of one update of the privatizer.
    """

    path: str
    epsilon: float
    stddev: float
    accuracies: np.ndarray
    steps: list[int]
    step_seconds: float
    noise_seconds: float


def rounded_strategy(bands: int) -> jax.Array:
    """C of both paths, on the grid of the coefficients."""
    return grid.round_coefs(digits.strategy_coefs(bands), FRACTION_BITS)


def make_privatizer(path: str, coefs: jax.Array, stddev: float, key: jax.Array) -> Any:
    """Either privatizer; stddev in units of the clipping norm."""
    noising_matrix = toeplitz.inverse_as_streaming_matrix(coefs)
    if path == "grid":
        return grid.privatizer(noising_matrix, stddev=stddev * GRID_SCALE, prng_key=key)
    return noise_addition.matrix_factorization_privatizer(
        noising_matrix, stddev=stddev * digits.CLIP_NORM, prng_key=key
    )


def clip(path: str, gradient: Any) -> Any:
    """The gradient of one example, clipped for its path."""
    if path == "grid":
        return grid.clip_and_round(gradient, digits.CLIP_NORM, GRID_SCALE)[0]
    norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(gradient)))
    factor = jnp.minimum(1.0, digits.CLIP_NORM / (norm + 1e-12))
    return jax.tree.map(lambda g: factor * g, gradient)


def to_float(path: str, tree: Any) -> Any:
    return grid.to_float(tree, digits.CLIP_NORM, GRID_SCALE) if path == "grid" else tree


def shaped_like_sums(path: str, params: Any) -> Any:
    """What the privatizer gets at every step."""
    dtype = jnp.int32 if path == "grid" else jnp.float32
    return jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params)


def make_train_step(
    path: str, privatizer: Any, optimizer: Any, batch_size: int
) -> Callable[[Any, jax.Array, jax.Array], Any]:
    def clipped(params: Any, image: jax.Array, label: jax.Array) -> Any:
        return clip(path, jax.grad(digits.loss_fn)(params, image, label))

    def train_step(state: Any, images: jax.Array, labels: jax.Array) -> Any:
        params, opt_state, noise_state = state
        per_example = jax.vmap(clipped, in_axes=(None, 0, 0))(params, images, labels)
        # Integers add up exactly, in whatever order. In floats this sum has errors of its own, of
        # which no privacy bound knows.
        total = jax.tree.map(lambda g: g.sum(axis=0, dtype=g.dtype), per_example)
        noisy, noise_state = privatizer.update(total, noise_state)
        mean = jax.tree.map(lambda g: g / batch_size, to_float(path, noisy))
        updates, opt_state = optimizer.update(mean, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, noise_state

    return jax.jit(train_step, donate_argnums=0)


def train(
    path: str, coefs: jax.Array, stddev: float, data: Any, *, epochs: int, seeds: int
) -> tuple[list[int], np.ndarray, float]:
    """The steps measured, accuracies [seeds, measurements], and seconds per step."""
    steps_per_epoch, batch_size = data.labels.shape
    num_steps = epochs * steps_per_epoch
    every = max(1, steps_per_epoch // 4)
    steps = [t for t in range(1, num_steps + 1) if t % every == 0 or t == num_steps]
    optimizer = optax.sgd(digits.LEARNING_RATES["bandmf"], momentum=digits.MOMENTUM)
    curves: list[list[float]] = []
    seconds: list[float] = []
    for seed in range(seeds):
        # A key that is given, so that the example repeats. In production leave it out.
        key = random.secure_key(seed.to_bytes(32, "little"))
        privatizer = make_privatizer(path, coefs, stddev, key)
        train_step = make_train_step(path, privatizer, optimizer, batch_size)
        params = digits.init_params(jax.random.key(seed))
        state = (
            params,
            optimizer.init(params),
            privatizer.init(shaped_like_sums(path, params)),
        )
        curves.append([])
        for t in range(1, num_steps + 1):
            batch = (t - 1) % steps_per_epoch
            start = time.perf_counter()
            state = train_step(state, data.images[batch], data.labels[batch])
            jax.block_until_ready(state)
            if t > 1:  # the first compiles
                seconds.append(time.perf_counter() - start)
            if t in steps:
                accuracy = digits.accuracy_fn(state[0], data.test_images, data.test_labels)
                curves[-1].append(float(accuracy))
    return steps, np.array(curves), statistics.median(seconds)


def time_noise(path: str, coefs: jax.Array, stddev: float, repeats: int) -> float:
    """Median seconds of one update of the privatizer."""
    privatizer = make_privatizer(path, coefs, stddev, random.secure_key(bytes(32)))
    grads = shaped_like_sums(path, digits.init_params(jax.random.key(0)))
    update = jax.jit(privatizer.update, donate_argnums=1)
    state = update(grads, privatizer.init(grads))[1]
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        _, state = jax.block_until_ready(update(grads, state))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def format_table(rows: Sequence[Row]) -> str:
    lines = ["path    epsilon   noise std   test accuracy      step        noise"]
    for row in rows:
        last = 100 * row.accuracies[:, -1]
        lines.append(
            f"{row.path:<6}  {row.epsilon:7.3f}   {row.stddev:9.3f}   "
            f"{last.mean():5.1f} +/- {last.std():3.1f} %   "
            f"{1e3 * row.step_seconds:6.2f} ms   {1e6 * row.noise_seconds:6.0f} us"
        )
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: str) -> None:
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    colors = {"float": "#D55E00", "grid": "#0072B2"}
    labels = {"float": "noise in float32", "grid": "exact noise on the grid"}
    for row in rows:
        accuracies = 100 * row.accuracies
        low, mean, high = (f(accuracies, axis=0) for f in (np.min, np.mean, np.max))
        style = "-" if row.path == "grid" else "--"
        axes.plot(row.steps, mean, style, color=colors[row.path], label=labels[row.path])
        axes.fill_between(row.steps, low, high, color=colors[row.path], alpha=0.2, linewidth=0)
    axes.set_xlabel("training step")
    axes.set_ylabel("test accuracy (%)")
    axes.set_ylim(0, 100)
    axes.set_title(f"BandMF on digits at epsilon = {rows[0].epsilon:.2f}")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = arguments.Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epsilon", type=arguments.between(0.01, 100), default=4.0, help="(4)")
    parser.add_argument("--delta", type=arguments.between(1e-12, 1), default=1e-5, help="(1e-5)")
    parser.add_argument("--epochs", type=arguments.count, default=16, help="(16)")
    parser.add_argument("--batch-size", type=arguments.count, default=40, help="(40)")
    parser.add_argument("--seeds", type=arguments.count, default=5, help="runs of each path (5)")
    parser.add_argument(
        "--output", type=arguments.output, default="train_exact.png", help="where the plot goes"
    )
    parser.add_argument("--quick", action="store_true", help="two epochs and one seed, as a check")
    args = parser.parse_args(argv)
    if args.quick:
        args.epochs, args.seeds = 2, 1
    digits.check_batch_size(parser, args.batch_size)

    data = digits.load_data(args.batch_size)
    steps_per_epoch = len(data.labels)
    guarantee = digits.calibrate(args.epsilon, args.delta)
    coefs = rounded_strategy(steps_per_epoch)
    squared = toeplitz.minsep_sensitivity_squared(
        coefs,
        min_sep=steps_per_epoch,
        n=args.epochs * steps_per_epoch,
        max_participations=args.epochs,
    )
    # Of the rounded C, and rounded up by more than float32 may have rounded it down.
    stddev = guarantee.noise_multiplier * float(jnp.sqrt(squared)) * (1 + 1e-6)
    print(
        f"Every example takes part {args.epochs} times, {steps_per_epoch} steps apart,\n"
        f"and changes an integer sum by at most {GRID_SCALE} in L2 norm.\n"
        f"Noise multiplier {guarantee.noise_multiplier:.4f}: epsilon = {guarantee.epsilon:.4f} at "
        f"delta = {args.delta:g}."
    )
    rows = []
    for path in PATHS:
        steps, accuracies, step_seconds = train(
            path, coefs, stddev, data, epochs=args.epochs, seeds=args.seeds
        )
        noise_seconds = time_noise(path, coefs, stddev, 20 if args.quick else 300)
        rows.append(
            Row(path, guarantee.epsilon, stddev, accuracies, steps, step_seconds, noise_seconds)
        )
    print(f"\n{format_table(rows)}")
    plot(rows, args.output)
    print(f"\nAccuracy against steps: {args.output}")
    return rows


if __name__ == "__main__":
    main()
