"""Differentially private training with correlated noise, from data to accounted result.

Trains a small classifier on scikit-learn's handwritten digits three times over: with BandMF noise
(banded matrix factorization), with independent noise at the same epsilon, and without privacy.

    pip install "jax_privacy_kernels[examples]"
    python train_digits.py

What is claimed, and what is not:

* Mechanism. Examples are put in a fixed order once, and batches cycle through it. Each example
  therefore takes part exactly once per epoch, `steps_per_epoch` steps apart. The noise of the whole
  run is C^-1 z with C banded Toeplitz and z independent Gaussians, so the whole run is ONE Gaussian
  mechanism whose sensitivity is that of C under this participation pattern. Independent noise is
  the special case C = I: same pattern, same accounting.
* Adjacency. Zero-out: neighbouring datasets differ in one training example, whose gradient is
  replaced by zero at every step it takes part in (add-or-remove of one example, with everyone else
  keeping their place in the order). Replace-one adjacency would need twice the noise.
* No amplification by sampling is claimed: nothing here is sampled.
* Epsilon is that of one trained model. The seeds and the two mechanisms are compared on the same
  data; publishing all of those models would cost the sum.
* The training examples are protected. Accuracy is measured on a held-out test set, which has no
  part in training and no protection. Model, clip norm, learning rates and the order of the data are
  taken as fixed and public. They were in fact tuned on a validation part of this dataset (see
  `LEARNING_RATES`), which epsilon does not cover: with data of your own, tune on public data or
  account for the tuning.

Correlated noise earns its keep when a batch is a small part of the dataset, as it is for every
model that is expensive to train. A dataset as small as this one fits into a single batch, and
full-batch training with independent noise, given enough epochs, does as well or better. To see the
gap narrow, try `--batch-size 240 --lr-independent 0.2 --lr-bandmf 0.4`.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import arguments
import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from jax_privacy import clipping
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from jax_privacy_kernels import noise_addition
from jax_privacy_kernels.matrix_factorization import toeplitz

ADJACENCY = dp_accounting.NeighboringRelation.REPLACE_SPECIAL  # dp-accounting's name for zero-out.
TRAIN_SIZE = 1440  # 36 * 40, so that batches come out even; the other 357 are the test set.
PIXELS, CLASSES = 64, 10
HIDDEN_UNITS = 64
CLIP_NORM = 1.0
MOMENTUM = 0.9
IMPLEMENTATIONS = ("jax", "cpp")

# Each is the best of the same grid {0.005, 0.01, 0.02, 0.05, 0.1, 0.2} for its own mechanism: mean
# accuracy over five seeds at the default batch size, epochs and epsilon, on 240 validation examples
# cut from the training set. The test set was not looked at. Other settings of the options may want
# other rates.
LEARNING_RATES = {"bandmf": 0.05, "independent": 0.01, "non-private": 0.1}


class Data(NamedTuple):
    images: jax.Array  # [steps_per_epoch, batch_size, pixels], in the fixed order
    labels: jax.Array  # [steps_per_epoch, batch_size]
    test_images: jax.Array
    test_labels: jax.Array


@dataclasses.dataclass(frozen=True)
class Guarantee:
    """What the accountants say about a Gaussian mechanism of this noise multiplier."""

    noise_multiplier: float
    delta: float
    epsilon: float  # From the PLD accountant: tight, and rounded up rather than down.
    epsilon_rdp: float  # From the RDP accountant: looser, an independent upper bound.


@dataclasses.dataclass(frozen=True)
class Mechanism:
    name: str
    coefs: jax.Array | None  # First column of the strategy C; None adds no noise and does not clip.
    sensitivity: float  # L2, of C under the participation pattern, per unit of clip norm.
    stddev: float  # Standard deviation of z.
    learning_rate: float

    @property
    def is_private(self) -> bool:
        return self.coefs is not None


@dataclasses.dataclass(frozen=True)
class Row:
    mechanism: str
    bands: int | None
    epsilon: float
    delta: float
    sensitivity: float
    stddev: float
    steps: list[int]
    accuracies: np.ndarray  # [seeds, len(steps)], on the test set
    noise_seconds: dict[str, float | None]  # Per step; None where an implementation is unavailable.

    @property
    def accuracy_mean(self) -> float:
        return float(self.accuracies[:, -1].mean())

    @property
    def accuracy_std(self) -> float:
        return float(self.accuracies[:, -1].std())


def load_data(batch_size: int) -> Data:
    images, labels = load_digits(return_X_y=True)
    # Divide by the largest value a pixel can have, a public constant. Standardizing by the training
    # set's own mean and deviation would let every example influence every other's gradient,
    # unclipped.
    images = (images / 16.0).astype(np.float32)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, train_size=TRAIN_SIZE, stratify=labels, random_state=0
    )
    steps_per_epoch = TRAIN_SIZE // batch_size
    # Drawn once and kept for every epoch: `min_sep` below relies on it. Reshuffling between epochs
    # would let an example take part in two steps in a row. A remainder that does not fill a batch
    # is never used.
    order = np.random.default_rng(0).permutation(TRAIN_SIZE)[: steps_per_epoch * batch_size]
    if len(order) < TRAIN_SIZE:
        print(f"Batches of {batch_size} leave out {TRAIN_SIZE - len(order)} examples.")
    return Data(
        images=jnp.asarray(train_x[order].reshape(steps_per_epoch, batch_size, -1)),
        labels=jnp.asarray(train_y[order].reshape(steps_per_epoch, batch_size)),
        test_images=jnp.asarray(test_x),
        test_labels=jnp.asarray(test_y),
    )


def init_params(key: jax.Array) -> dict[str, jax.Array]:
    hidden_key, out_key = jax.random.split(key)
    initializer = jax.nn.initializers.lecun_normal()
    return {
        "hidden_w": initializer(hidden_key, (PIXELS, HIDDEN_UNITS)),
        "hidden_b": jnp.zeros(HIDDEN_UNITS),
        "out_w": initializer(out_key, (HIDDEN_UNITS, CLASSES)),
        "out_b": jnp.zeros(CLASSES),
    }


def logits_fn(params: dict[str, jax.Array], images: jax.Array) -> jax.Array:
    hidden = jnp.tanh(images @ params["hidden_w"] + params["hidden_b"])
    return hidden @ params["out_w"] + params["out_b"]


def loss_fn(params: dict[str, jax.Array], image: jax.Array, label: jax.Array) -> jax.Array:
    """Loss of a single example; `clipped_grad` maps it over the batch."""
    return optax.softmax_cross_entropy_with_integer_labels(logits_fn(params, image), label)


@jax.jit
def accuracy_fn(params: dict[str, jax.Array], images: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(jnp.argmax(logits_fn(params, images), axis=-1) == labels)


def calibrate(epsilon: float, delta: float) -> Guarantee:
    """Smallest noise multiplier of one Gaussian mechanism that is (epsilon, delta)-DP."""
    noise_multiplier = dp_accounting.calibrate_dp_mechanism(
        lambda: PLDAccountant(ADJACENCY), dp_accounting.GaussianDpEvent, epsilon, delta
    )
    event = dp_accounting.GaussianDpEvent(noise_multiplier)
    guarantee = Guarantee(
        noise_multiplier=noise_multiplier,
        delta=delta,
        epsilon=PLDAccountant(ADJACENCY).compose(event).get_epsilon(delta),
        epsilon_rdp=RdpAccountant(neighboring_relation=ADJACENCY).compose(event).get_epsilon(delta),
    )
    # Calibration searches numerically. What counts is what the multiplier it returned achieves.
    if not guarantee.epsilon <= min(epsilon, guarantee.epsilon_rdp):
        raise RuntimeError(f"Calibration to epsilon = {epsilon} gave {guarantee}.")
    return guarantee


def strategy_coefs(bands: int) -> jax.Array:
    """A b-banded Toeplitz strategy for prefix sums, scaled to unit L2 norm; b = 1 is the identity.

    With unit norm and b <= min_sep, the columns of C that one example touches do not overlap, and
    the sensitivity is sqrt(max_participations) whatever b is. The mechanisms then share their
    stddev, and differ only in correlation.
    """
    coefs = toeplitz.optimal_max_error_strategy_coefs(bands)
    return coefs / jnp.linalg.norm(coefs)


def private_mechanism(
    name: str,
    *,
    bands: int,
    steps_per_epoch: int,
    epochs: int,
    noise_multiplier: float,
    learning_rate: float,
) -> Mechanism:
    coefs = strategy_coefs(bands)
    sensitivity_squared = toeplitz.minsep_sensitivity_squared(
        coefs, min_sep=steps_per_epoch, n=epochs * steps_per_epoch, max_participations=epochs
    )
    # Rounded up by more than float32 may have rounded it down.
    sensitivity = float(jnp.sqrt(sensitivity_squared)) * (1 + 1e-6)
    return Mechanism(
        name=name,
        coefs=coefs,
        sensitivity=sensitivity,
        # Noise goes on the sum of clipped gradients, in which one example counts for at most
        # CLIP_NORM.
        stddev=noise_multiplier * CLIP_NORM * sensitivity,
        learning_rate=learning_rate,
    )


def make_privatizer(
    mechanism: Mechanism, prng_key: jax.Array | None, implementation: str | None = None
) -> optax.GradientTransformation:
    if not mechanism.is_private:
        return optax.identity()
    return noise_addition.matrix_factorization_privatizer(
        toeplitz.inverse_as_streaming_matrix(mechanism.coefs),
        stddev=mechanism.stddev,
        prng_key=prng_key,
        implementation=implementation,  # None takes the fastest.
    )


def make_train_step(
    mechanism: Mechanism,
    privatizer: optax.GradientTransformation,
    optimizer: optax.GradientTransformation,
    batch_size: int,
) -> Callable[[Any, jax.Array, jax.Array], Any]:
    clipped_grad_fn = clipping.clipped_grad(
        loss_fn,
        l2_clip_norm=CLIP_NORM if mechanism.is_private else float("inf"),
        batch_argnums=(1, 2),
        keep_batch_dim=False,
    )

    def train_step(state: Any, images: jax.Array, labels: jax.Array) -> Any:
        params, opt_state, noise_state = state
        grad_sum = clipped_grad_fn(params, images, labels)
        noisy_sum, noise_state = privatizer.update(grad_sum, noise_state)
        # Batch size is the same at every step and known to all, so dividing by it reveals nothing.
        noisy_mean = jax.tree.map(lambda g: g / batch_size, noisy_sum)
        # Plain SGD with momentum: it adds gradients up, and the sums are where correlated noise
        # cancels. An optimizer that rescales each gradient by its own size (Adam) would undo much
        # of that.
        updates, opt_state = optimizer.update(noisy_mean, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, noise_state

    # Donation matters: the noise state holds bands - 1 copies of the model, and XLA would copy all
    # of it at every step if the old state had to stay valid. Donated, it is updated in place.
    return jax.jit(train_step, donate_argnums=0)


def train(
    mechanism: Mechanism, data: Data, *, epochs: int, seeds: int, progress: tqdm
) -> tuple[list[int], np.ndarray]:
    """Returns the steps at which test accuracy was measured, and accuracies [seeds, steps]."""
    steps_per_epoch, batch_size = data.labels.shape
    num_steps = epochs * steps_per_epoch
    measure_every = max(1, steps_per_epoch // 4)
    optimizer = optax.sgd(mechanism.learning_rate, momentum=MOMENTUM)

    # Fixed keys are here only so that this example can be reproduced: anyone who has read it can
    # subtract its noise. In production pass prng_key=None, which draws the key from the operating
    # system's entropy.
    init_keys, noise_keys = jax.vmap(jax.random.split, out_axes=1)(
        jax.vmap(jax.random.key)(jnp.arange(seeds))
    )
    privatizers = [make_privatizer(mechanism, key) for key in noise_keys]
    # They differ only in their key, which lives in the noise state, so one compiled step serves
    # every seed.
    train_step = make_train_step(mechanism, privatizers[0], optimizer, batch_size)

    steps = [t for t in range(1, num_steps + 1) if t % measure_every == 0 or t == num_steps]
    curves = []
    for init_key, privatizer in zip(init_keys, privatizers, strict=True):
        params = init_params(init_key)
        state = (params, optimizer.init(params), privatizer.init(params))
        curves.append([])
        for t in range(1, num_steps + 1):
            batch = (t - 1) % steps_per_epoch
            state = train_step(state, data.images[batch], data.labels[batch])
            if t in steps:
                accuracy = float(accuracy_fn(state[0], data.test_images, data.test_labels))
                curves[-1].append(accuracy)
                progress.set_postfix_str(f"{mechanism.name}, {accuracy:.1%}", refresh=False)
            progress.update()
    return steps, np.array(curves)


def time_noise(mechanism: Mechanism, repeats: int) -> tuple[dict[str, float | None], list[str]]:
    """Median seconds of one privatizer update by implementation, and why any was left out."""
    grads = jax.tree.map(jnp.zeros_like, init_params(jax.random.key(0)))
    seconds: dict[str, float | None] = dict.fromkeys(IMPLEMENTATIONS)
    if not mechanism.is_private:
        return seconds, []
    updates, states, reasons = {}, {}, []
    for name in IMPLEMENTATIONS:
        try:
            privatizer = make_privatizer(mechanism, jax.random.key(0), implementation=name)
            updates[name] = jax.jit(privatizer.update, donate_argnums=1)
            # The first call compiles, and is where an implementation that cannot run here says so.
            states[name] = updates[name](grads, privatizer.init(grads))[1]
        except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
            updates.pop(name, None)
            reasons.append(f"{name}: {error}")
    samples: dict[str, list[float]] = {name: [] for name in updates}
    for _ in range(repeats):
        # Interleaved, so that whatever else the computer is doing disturbs all of them alike.
        for name, update in updates.items():
            start = time.perf_counter()
            _, states[name] = jax.block_until_ready(update(grads, states[name]))
            samples[name].append(time.perf_counter() - start)
    return seconds | {name: statistics.median(s) for name, s in samples.items()}, reasons


def format_table(rows: Sequence[Row]) -> str:
    def microseconds(value: float | None) -> str:
        return "-" if value is None else f"{1e6 * value:.0f} us"

    header = ["mechanism", "bands", "epsilon", "delta", "stddev", "test accuracy"]
    table = [header + list(IMPLEMENTATIONS)]
    for row in rows:
        private = row.bands is not None
        table.append(
            [
                row.mechanism,
                str(row.bands) if private else "-",
                f"{row.epsilon:.3f}" if private else "inf",
                f"{row.delta:g}" if private else "-",
                f"{row.stddev:.3f}" if private else "-",
                f"{100 * row.accuracy_mean:.1f} +/- {100 * row.accuracy_std:.1f} %",
                *(microseconds(row.noise_seconds[name]) for name in IMPLEMENTATIONS),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(map(str.rjust, line, widths)) for line in table]
    note = f"{', '.join(IMPLEMENTATIONS)}: one step of noise by that implementation"
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], note])


def plot(rows: Sequence[Row], path: str, *, epsilon: float, delta: float) -> None:
    # Okabe-Ito colours: told apart by colour-blind readers too.
    colors = {"bandmf": "#0072B2", "independent": "#D55E00", "non-private": "#555555"}
    labels = {
        "bandmf": "BandMF noise",
        "independent": "independent noise",
        "non-private": "non-private (epsilon = inf)",
    }
    # A bare Figure, unlike pyplot, draws to a file whatever display there is or is not.
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        color, accuracies = colors[row.mechanism], 100 * row.accuracies
        label = labels[row.mechanism]
        if row.mechanism == "bandmf":
            label += f", {row.bands} bands"
        style = "-" if row.bands is not None else "--"
        low, mean, high = (f(accuracies, axis=0) for f in (np.min, np.mean, np.max))
        axes.plot(row.steps, mean, style, color=color, linewidth=2, label=label)
        axes.fill_between(row.steps, low, high, color=color, alpha=0.2, linewidth=0)
    seeds = len(rows[0].accuracies)
    axes.set_xlabel("training step")
    axes.set_ylabel("test accuracy (%)")
    axes.set_ylim(0, 100)
    axes.set_xlim(left=0)
    axes.set_title(
        f"Digits at epsilon = {epsilon:g}, delta = {delta:g}\n"
        f"mean and range over {seeds} seed{'s' if seeds > 1 else ''}",
        fontsize=12,
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments.Parser(
        description="Private training on digits: BandMF and independent noise at one epsilon.",
    )
    parser.add_argument(
        "--epsilon",
        type=arguments.between(0.01, 100),
        default=4.0,
        help="privacy budget of the whole run (4)",
    )
    # No Gaussian mechanism has a delta of 0, and accountants lose what is far below this one.
    parser.add_argument("--delta", type=arguments.between(1e-12, 1), default=1e-5, help="(1e-5)")
    parser.add_argument(
        "--epochs", type=arguments.count, default=16, help="times each example takes part (16)"
    )
    parser.add_argument("--batch-size", type=arguments.count, default=40, help="(40)")
    parser.add_argument("--bands", type=arguments.count, help="of BandMF (steps per epoch)")
    parser.add_argument("--seeds", type=arguments.count, default=5, help="runs per mechanism (5)")
    parser.add_argument(
        "--output", type=arguments.output, default="train_digits.png", help="where the plot goes"
    )
    for name, rate in LEARNING_RATES.items():
        parser.add_argument(
            f"--lr-{name}", type=arguments.positive, default=rate, help=f"learning rate, {name}"
        )
    parser.add_argument("--quick", action="store_true", help="two epochs and one seed, as a check")
    args = parser.parse_args(argv)
    if args.quick:
        args.epochs, args.seeds = 2, 1
    check_batch_size(parser, args.batch_size)
    # Up to min_sep bands the columns of C that one example touches are orthogonal; beyond,
    # sensitivity grows.
    steps_per_epoch = TRAIN_SIZE // args.batch_size
    args.bands = args.bands or steps_per_epoch
    if args.bands > steps_per_epoch:
        parser.error(
            f"--bands must be between 1 and {steps_per_epoch} (steps per epoch), got {args.bands}"
        )
    return args


def check_batch_size(parser: argparse.ArgumentParser, batch_size: int) -> None:
    """Ends the program if a batch would be larger than the training set."""
    if batch_size > TRAIN_SIZE:
        parser.error(f"--batch-size must be between 1 and {TRAIN_SIZE}, got {batch_size}")


def main(argv: Sequence[str] | None = None) -> list[Row]:
    args = parse_args(argv)
    data = load_data(args.batch_size)
    steps_per_epoch, _ = data.labels.shape
    guarantee = calibrate(args.epsilon, args.delta)
    print(
        f"Every example takes part {args.epochs} times, {steps_per_epoch} steps apart.\n"
        f"Noise multiplier {guarantee.noise_multiplier:.4f} under zero-out adjacency gives\n"
        f"epsilon = {guarantee.epsilon:.4f} at delta = {args.delta:g} by the PLD accountant\n"
        f"(the looser RDP accountant: {guarantee.epsilon_rdp:.4f})."
    )
    pattern = {
        "steps_per_epoch": steps_per_epoch,
        "epochs": args.epochs,
        "noise_multiplier": guarantee.noise_multiplier,
    }
    mechanisms = [
        Mechanism("non-private", None, float("inf"), 0.0, args.lr_non_private),
        private_mechanism("independent", bands=1, learning_rate=args.lr_independent, **pattern),
        private_mechanism("bandmf", bands=args.bands, learning_rate=args.lr_bandmf, **pattern),
    ]

    rows, reasons = [], []
    total_steps = len(mechanisms) * args.seeds * args.epochs * steps_per_epoch
    with tqdm(total=total_steps, unit="step", desc="training", disable=None) as progress:
        for mechanism in mechanisms:
            steps, accuracies = train(
                mechanism, data, epochs=args.epochs, seeds=args.seeds, progress=progress
            )
            noise_seconds, unavailable = time_noise(mechanism, repeats=20 if args.quick else 500)
            reasons += unavailable
            rows.append(
                Row(
                    mechanism=mechanism.name,
                    bands=mechanism.coefs.size if mechanism.is_private else None,
                    epsilon=guarantee.epsilon if mechanism.is_private else float("inf"),
                    delta=guarantee.delta if mechanism.is_private else 0.0,
                    sensitivity=mechanism.sensitivity,
                    stddev=mechanism.stddev,
                    steps=steps,
                    accuracies=accuracies,
                    noise_seconds=noise_seconds,
                )
            )

    print(f"\n{format_table(rows)}\n")
    for reason in dict.fromkeys(reasons):
        print(f"Not timed: {reason}")
    plot(rows, args.output, epsilon=args.epsilon, delta=args.delta)
    print(f"Accuracy against steps: {args.output}")
    return rows


if __name__ == "__main__":
    main()
