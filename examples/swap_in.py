"""A jax_privacy program, run twice: as it is, and with jax_privacy_kernels swapped in.

`train` below is written for jax_privacy alone, as its documentation shows: an execution plan with
BandMF (banded matrix factorization), Poisson-sampled batches, clipped gradients. It classifies
scikit-learn's handwritten digits. The program runs it with and without `installed()`, holds the
parameters of both against each other, and prints what each step took.

    pip install "jax_privacy_kernels[examples]"
    python swap_in.py

To swap the library in under a program of your own, without a change to it:

    python -m jax_privacy_kernels program.py

What to read off:

* The parameters agree to rounding: for the same seed the noise is the same.
* jax_privacy's documentation does not donate the noise state, so that it is copied, b - 1 models
  big, at every step. That is what the swap alone gives. With `donate_argnums` the state is updated
  in place: one argument more, and most of the gain.
* The step is gradients and noise. The swap leaves the gradients as they are.

Seeds are fixed here to compare runs: who knows the seed can subtract the noise. In production leave
`noise_seed` out. The noise multiplier is fixed too, because calibrating it to an epsilon takes the
plan several seconds; the epsilon that it amounts to is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import arguments
import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
from dp_accounting.pld import PLDAccountant
from jax_privacy import batch_selection
from jax_privacy.experimental import execution_plan
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import jax_privacy_kernels

PIXELS, CLASSES, TRAIN_SIZE = 64, 10, 1440
DELTA = 1e-5
PAD_TO = 32  # Batches vary in size; padded to multiples of this, few sizes are compiled.
# Okabe-Ito colours: told apart by colour-blind readers too.
COLORS = {False: "#D55E00", True: "#009E73"}


@dataclasses.dataclass(frozen=True)
class Settings:
    steps: int
    bands: int
    hidden: int
    noise_multiplier: float


@dataclasses.dataclass(frozen=True)
class Run:
    swapped: bool
    donated: bool
    params: Any
    losses: Sequence[float]  # on the test set, by step
    step_times: Sequence[float]  # of every step; those that compile among them
    noise_times: Sequence[float]  # of the privatizer by itself
    plan_seconds: float  # to optimize the strategy, mostly
    dp_event: dp_accounting.DpEvent  # what was released, for the accountant

    @property
    def name(self) -> str:
        return "swapped" if self.swapped else "jax_privacy"

    @property
    def step_seconds(self) -> float:
        return statistics.median(self.step_times)

    @property
    def noise_seconds(self) -> float:
        return statistics.median(self.noise_times)


def load_data() -> list[np.ndarray]:
    """Images and labels to train on, images and labels to test."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0).astype(np.float32)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, train_size=TRAIN_SIZE, stratify=labels, random_state=0
    )
    return [train_x, train_y, test_x, test_y]


def init_params(hidden: int) -> list[tuple[jax.Array, jax.Array]]:
    sizes = (PIXELS, hidden, hidden, CLASSES)
    keys = jax.random.split(jax.random.key(0), len(sizes) - 1)
    weights = jax.nn.initializers.lecun_normal()
    return [
        (weights(key, (fan_in, fan_out)), jnp.zeros(fan_out))
        for key, fan_in, fan_out in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def loss_fn(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    *hidden, (out_w, out_b) = params
    for w, b in hidden:
        images = jnp.tanh(images @ w + b)
    logits = images @ out_w + out_b
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(settings: Settings, *, donate: bool) -> Iterator[Any]:
    """Knows nothing of jax_privacy_kernels. Yields what it plans, then every step."""
    train_x, train_y, test_x, test_y = load_data()
    batch_size = TRAIN_SIZE // settings.bands // 4
    start = time.perf_counter()
    plan = execution_plan.BandMFExecutionPlanConfig.default(
        iterations=settings.steps,
        num_bands=settings.bands,
        epsilon=None,
        delta=None,
        noise_multiplier=settings.noise_multiplier,
        sampling_prob=0.25,
        normalize_by=batch_size,
        noise_seed=0,
    ).plan
    yield time.perf_counter() - start, plan.dp_event
    grad_fn = plan.clipped_grad(loss_fn, batch_argnums=(1, 2))
    privatizer = plan.noise_addition_transform
    optimizer = optax.sgd(0.05, momentum=0.9)

    def step(noise_state, params, opt_state, images, labels, is_padding_example):
        grads = grad_fn(params, images, labels, is_padding_example=is_padding_example)
        noisy_grads, noise_state = privatizer.update(grads, noise_state)
        updates, opt_state = optimizer.update(noisy_grads, opt_state)
        return noise_state, optax.apply_updates(params, updates), opt_state

    step = jax.jit(step, donate_argnums=0 if donate else ())
    update = jax.jit(privatizer.update, donate_argnums=1 if donate else ())
    test_loss = jax.jit(loss_fn)

    params = init_params(settings.hidden)
    state = privatizer.init(params), params, optimizer.init(params)
    # Noise once more by itself, to see what it takes. From a copy: every init of a privatizer of
    # jax_privacy holds the same key, which the first donation deletes.
    alone = jax.tree.map(jnp.copy, state[0])
    for batch in plan.batch_selection_strategy.batch_iterator(TRAIN_SIZE, rng=0):
        index = batch_selection.pad_to_multiple_of(batch, PAD_TO)
        batch = jax.block_until_ready((train_x[index], train_y[index], index == -1))
        start = time.perf_counter()
        state = jax.block_until_ready(step(*state, *batch))
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        _, alone = jax.block_until_ready(update(state[1], alone))
        noise_seconds = time.perf_counter() - start
        params = state[1]
        yield params, float(test_loss(params, test_x, test_y)), seconds, noise_seconds


def run_all(settings: Settings) -> list[Run]:
    """Takes turns, so that whatever else the computer is doing disturbs all of them alike."""
    kinds = [(swapped, donated) for donated in (False, True) for swapped in (False, True)]
    programs = {kind: train(settings, donate=kind[1]) for kind in kinds}
    plans, params, steps = {}, {}, {kind: [] for kind in kinds}
    for t in tqdm(range(settings.steps + 1), unit="step", desc="training", disable=None):
        for kind, program in programs.items():
            swapped, _ = kind
            # All it takes.
            with jax_privacy_kernels.installed() if swapped else contextlib.nullcontext():
                found = next(program)
            if t == 0:
                plans[kind] = found
            else:
                params[kind], *numbers = found
                steps[kind].append(numbers)
    return [
        Run(*kind, params[kind], *zip(*steps[kind], strict=True), *plans[kind]) for kind in kinds
    ]


def difference(a: Run, b: Run) -> float:
    """The largest difference of two parameters, relative to the largest parameter."""
    leaves = [[np.asarray(leaf) for leaf in jax.tree.leaves(run.params)] for run in (a, b)]
    most = max(np.abs(x - y).max() for x, y in zip(*leaves, strict=True))
    return float(most / max(np.abs(x).max() for x in leaves[0]))


def format_table(runs: Sequence[Run]) -> str:
    header = ["noise state", "", "plan", "step", "its noise", "loss", "parameters"]
    table = [header]
    reference = runs[0]
    for run in runs:
        table.append(
            [
                "donated" if run.donated else "as documented",
                run.name,
                f"{run.plan_seconds:.1f} s",
                f"{1e3 * run.step_seconds:.1f} ms",
                f"{1e3 * run.noise_seconds:.1f} ms",
                f"{run.losses[-1]:.4f}",
                "reference" if run is reference else f"off by {difference(reference, run):.0e}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(map(str.rjust, line, widths)).rstrip() for line in table]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def plot(runs: Sequence[Run], path: str, settings: Settings) -> None:
    # A bare Figure, unlike pyplot, draws to a file whatever display there is or is not.
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = {False: {"linewidth": 5, "alpha": 0.45}, True: {"linewidth": 1.6, "linestyle": "--"}}
    for run in runs:
        if not run.donated:
            steps = np.arange(1, len(run.losses) + 1)
            style = {"color": COLORS[run.swapped], **styles[run.swapped]}
            left.plot(steps, run.losses, **style, label=run.name)
    left.set_xlabel("step")
    left.set_ylabel("loss on the test set")
    left.set_title("The same training")
    left.set_ylim(bottom=0)
    left.grid(alpha=0.3)
    left.legend()

    groups = [
        ("step,\nas documented", False, "step_seconds"),
        ("step,\nstate donated", True, "step_seconds"),
        ("noise,\nas documented", False, "noise_seconds"),
        ("noise,\nstate donated", True, "noise_seconds"),
    ]
    for swapped in (False, True):
        times = [
            1e3 * getattr(run, attribute)
            for _, donated, attribute in groups
            for run in runs
            if (run.swapped, run.donated) == (swapped, donated)
        ]
        positions = np.arange(len(groups)) + (0.2 if swapped else -0.2)
        name = "swapped" if swapped else "jax_privacy"
        bars = right.bar(positions, times, 0.38, color=COLORS[swapped], label=name)
        right.bar_label(bars, fmt="%.3g", padding=2, fontsize=9)
    right.set_xticks(range(len(groups)), [label for label, _, _ in groups])
    right.set_ylabel("milliseconds (median)")
    right.set_title("The time it takes")
    right.grid(alpha=0.3, axis="y")
    right.set_axisbelow(True)
    right.margins(y=0.1)
    right.legend()
    count = sum(leaf.size for leaf in jax.tree.leaves(runs[0].params))
    figure.suptitle(f"{count:,} parameters, {settings.bands} bands")
    figure.savefig(path, dpi=150)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments.Parser(
        description="A jax_privacy program with and without jax_privacy_kernels swapped in.",
    )
    parser.add_argument("--steps", type=arguments.count, default=64, help="of training (64)")
    parser.add_argument("--bands", type=arguments.count, default=16, help="of the strategy (16)")
    parser.add_argument(
        "--hidden", type=arguments.count, default=768, help="units of both layers (768)"
    )
    parser.add_argument("--noise-multiplier", type=arguments.positive, default=1.0, help="(1)")
    parser.add_argument(
        "--output", type=arguments.output, default="swap_in.png", help="where the plot goes"
    )
    args = parser.parse_args(argv)
    if args.bands > min(args.steps, TRAIN_SIZE // 4):
        most = min(args.steps, TRAIN_SIZE // 4)
        parser.error(f"--bands must be between 1 and {most}, got {args.bands}")
    return args


def main(argv: Sequence[str] | None = None) -> list[Run]:
    args = parse_args(argv)
    settings = Settings(args.steps, args.bands, args.hidden, args.noise_multiplier)
    runs = run_all(settings)
    print(f"\n{format_table(runs)}\n")
    zero_out = dp_accounting.NeighboringRelation.REPLACE_SPECIAL
    epsilon = PLDAccountant(zero_out).compose(runs[0].dp_event).get_epsilon(DELTA)
    print(f"Each at epsilon = {epsilon:.2f}, delta = {DELTA:g} (zero-out adjacency).")
    for before, after in (runs[:2], runs[2:]):
        state = "state donated" if before.donated else "as documented"
        print(
            f"{state}: steps {before.step_seconds / after.step_seconds:.1f}x as fast, "
            f"their noise {before.noise_seconds / after.noise_seconds:.1f}x"
        )
    plot(runs, args.output, settings)
    print(f"Losses and times: {args.output}")
    return runs


if __name__ == "__main__":
    main()
