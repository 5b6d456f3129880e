"""How much noise sampling saves: one training run, accounted for in four ways.

Who sees only some of the data at every step learns less about each example, so that a run whose
batches are sampled at random needs less noise for the same guarantee. That holds for correlated
noise, too, if the batches are sampled to fit its bands. This program plans banded strategies for a
run, and compares the noise that they need and the error it makes, by how batches are sampled and
accounted for:

    pip install "jax_privacy_kernels[examples]"
    python amplified_accounting.py --epsilon 1 8 --bands 1 16

* none: any order of the data in which the participations of an example are an epoch apart. A
  Gaussian mechanism, in closed form.
* Poisson: block-cyclic Poisson sampling, each block of the data every `bands` steps
  (https://arxiv.org/abs/2306.08153), by the privacy loss distributions of dp-accounting.
* bins: balls in bins, every example into one of the batches of an epoch, the same in all epochs
  (https://arxiv.org/abs/2410.06266), by Monte Carlo.
* min-sep: b-min-sep, an example is taken at random, and then not for `bands` steps
  (https://arxiv.org/abs/2602.09338), by Monte Carlo.

What is computed:

* noise: the noise multiplier of a strategy whose columns have norm 1, for a clip norm of 1.
* error: that noise times the root mean square over the steps of the norms of A C^-1, A being the
  matrix of prefix sums, divided by the batch: the standard deviation of the running sum of the mean
  gradients, per coordinate and for a clip norm of 1.
* All four have the same expected batch. Adjacent datasets differ by one example being zeroed out;
  (epsilon, delta) is what the search for the noise and the run guarantee together.

Monte Carlo takes most of the time, and most of that b-min-sep: with the defaults about 45 minutes
on two cores. `--delta 1e-3` shows a similar picture in one minute. Estimates may be half of delta
at most: what is between the two is room for what they fall short of the truth, and costs about 5 %
of noise, while dp-accounting spends all of delta. The chance that they fall short by more takes
some 2 % of delta; that of every Monte Carlo calibration of the table counts, since the best is
taken.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence

import arguments
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from tqdm import tqdm

from jax_privacy_kernels import monte_carlo
from jax_privacy_kernels.matrix_factorization import toeplitz

METHODS = ("none", "Poisson", "bins", "min-sep")
NAMES = {
    "none": "no amplification",
    "Poisson": "cyclic Poisson, by dp-accounting",
    "bins": "balls in bins, by Monte Carlo",
    "min-sep": "b-min-sep, by Monte Carlo",
}
# Okabe-Ito colours: told apart by colour-blind readers too.
STYLES = {
    "none": {"color": "#555555", "linestyle": "-", "marker": "o"},
    "Poisson": {"color": "#0072B2", "linestyle": "-", "marker": "s"},
    "bins": {"color": "#D55E00", "linestyle": (0, (6, 2)), "marker": "D"},
    "min-sep": {"color": "#009E73", "linestyle": (0, (2, 1)), "marker": "^"},
}


@dataclasses.dataclass(frozen=True)
class Training:
    """A run, and what it shall guarantee."""

    examples: int
    batch: int
    epochs: int
    delta: float
    seed: int
    calibrations: int = 1  # by Monte Carlo, of which the best is run

    @property
    def cycle(self) -> int:
        """Steps of an epoch."""
        return self.examples // self.batch

    @property
    def steps(self) -> int:
        return self.epochs * self.cycle


@dataclasses.dataclass(frozen=True)
class Cell:
    """The noise that a strategy needs under one method, and the error that it makes."""

    method: str
    epsilon: float
    bands: int
    noise: float
    error: float


def plan(training: Training, bands: int) -> tuple[np.ndarray, float]:
    """A strategy of columns of norm 1, and its error for a noise multiplier of 1."""
    coef = np.asarray(toeplitz.optimize_banded_toeplitz(training.steps, bands=bands), np.float64)
    coef = np.maximum(coef, 0) / np.linalg.norm(np.maximum(coef, 0))
    errors = toeplitz.per_query_error(strategy_coef=coef, n=training.steps)
    return coef, math.sqrt(float(np.mean(errors))) / training.batch


def gaussian_noise(training: Training, epsilon: float) -> float:
    """Participations an epoch apart, so that their columns do not overlap."""
    import dp_accounting

    single = dp_accounting.get_sigma_gaussian(epsilon, training.delta)
    return single * math.sqrt(training.epochs)


def poisson_noise(training: Training, epsilon: float, bands: int) -> float:
    import dp_accounting

    probability = training.batch / (training.examples // bands)
    steps = -(-training.steps // bands)

    def event(noise: float) -> dp_accounting.DpEvent:
        gaussian = dp_accounting.GaussianDpEvent(noise)
        step = dp_accounting.PoissonSampledDpEvent(probability, gaussian)
        return dp_accounting.SelfComposedDpEvent(step, steps)

    return dp_accounting.calibrate_dp_mechanism(
        lambda: dp_accounting.pld.PLDAccountant(value_discretization_interval=1e-3),
        event,
        epsilon,
        training.delta,
        tol=1e-3,
    )


def sampled_noise(
    training: Training, epsilon: float, coef: np.ndarray, scheme: monte_carlo.Scheme
) -> float:
    return monte_carlo.calibrate(
        scheme,
        coef,
        epsilon=epsilon,
        delta=training.delta,
        calibrations=training.calibrations,
        seed=training.seed,
    ).noise_multiplier


def noise(training: Training, method: str, epsilon: float, coef: np.ndarray) -> float:
    """The noise multiplier that a method finds."""
    if method == "none":
        return gaussian_noise(training, epsilon)
    if method == "Poisson":
        return poisson_noise(training, epsilon, coef.size)
    if method == "bins":
        scheme = monte_carlo.BallsInBins(training.steps, training.cycle)
        return sampled_noise(training, epsilon, coef, scheme)
    # An example waits 1 / p steps on average once it is open, and takes part once a cycle.
    probability = 1 / (training.cycle - coef.size + 1)
    scheme = monte_carlo.BMinSep(training.steps, coef.size, probability)
    return sampled_noise(training, epsilon, coef, scheme)


def compare(training: Training, epsilons: Sequence[float], bands: Sequence[int]) -> Iterator[Cell]:
    strategies = {b: plan(training, b) for b in bands}
    jobs = [(m, e, b) for e in epsilons for b in bands for m in METHODS]
    with tqdm(jobs, unit="cell", desc="accounting", disable=None) as progress:
        for method, epsilon, b in progress:
            progress.set_postfix_str(f"{method}, epsilon = {epsilon:g}, b = {b}")
            coef, unit = strategies[b]
            found = noise(training, method, epsilon, coef)
            yield Cell(method, epsilon, b, found, found * unit)


def best(cells: Sequence[Cell], method: str, epsilon: float) -> Cell:
    """Of the least error."""
    found = [c for c in cells if c.method == method and c.epsilon == epsilon]
    return min(found, key=lambda c: c.error)


def format_table(cells: Sequence[Cell]) -> str:
    by_key = {(c.method, c.epsilon, c.bands): c for c in cells}
    lines = [
        f"{'':>7}  {'':>5}" + "".join(f" {m:>15}" for m in METHODS),
        f"{'epsilon':>7}  {'bands':>5}" + f" {'noise':>7} {'error':>7}" * len(METHODS),
    ]
    lines.append("-" * max(map(len, lines)))
    for epsilon in sorted({c.epsilon for c in cells}):
        least = min((c for c in cells if c.epsilon == epsilon), key=lambda c: c.error)
        for b in sorted({c.bands for c in cells}):
            line = f"{epsilon:>7g}  {b:>5}"
            for method in METHODS:
                c = by_key[method, epsilon, b]
                mark = "*" if c is least else " "
                line += f" {c.noise:>7.3f}{mark}{c.error:>7.4f}"
            lines.append(line.rstrip())
    return "\n".join([*lines, "* least error at that epsilon"])


def advice(cells: Sequence[Cell]) -> str:
    """What to choose, in words."""
    lines = []
    for epsilon in sorted({c.epsilon for c in cells}):
        found = {method: best(cells, method, epsilon) for method in METHODS}
        least = min(found.values(), key=lambda c: c.error)
        lines.append(
            f"epsilon {epsilon:g}: choose {NAMES[least.method]}, {least.bands} bands, noise "
            f"{least.noise:.3f}:"
        )
        others = [
            f"{1 - least.error / found[other].error:.0%} below {other}"
            for other in METHODS
            if other != least.method
        ]
        lines.append(f"    an error {', '.join(others)} at its best")
    return "\n".join(lines)


def plot(cells: Sequence[Cell], training: Training, path: str) -> None:
    # A bare Figure, unlike pyplot, draws to a file whatever display there is or is not.
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    epsilons = sorted({c.epsilon for c in cells})
    shown = epsilons[len(epsilons) // 2]
    for method in METHODS:
        style = {"linewidth": 1.8, "markersize": 5, **STYLES[method]}
        errors = [best(cells, method, e).error for e in epsilons]
        left.plot(epsilons, errors, label=NAMES[method], **style)
        mine = sorted(
            (c for c in cells if c.method == method and c.epsilon == shown), key=lambda c: c.bands
        )
        right.plot([c.bands for c in mine], [c.error for c in mine], **style)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:.2g}")
        axes.yaxis.set_minor_formatter("{x:.2g}")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
        axes.grid(alpha=0.3, which="both")
    left.set_xlabel("epsilon")
    left.set_ylabel("error of the running sum of mean gradients\n(clip norm 1)")
    left.set_title("Best number of bands")
    right.set_xlabel("bands")
    right.set_title(f"epsilon = {shown:g}")
    figure.suptitle(
        f"{training.examples:,} examples, batches of {training.batch:,}, {training.epochs} epochs, "
        f"delta = {training.delta:g}"
    )
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)


def parse_args(argv: Sequence[str] | None) -> tuple[Training, list[float], list[int], str]:
    parser = arguments.Parser(
        description="Compares the noise of a training run by how batches are sampled."
    )
    parser.add_argument(
        "--examples", type=arguments.count, default=60_000, help="in the dataset (60000)"
    )
    parser.add_argument(
        "--batch", type=arguments.count, default=500, help="expected size of a batch (500)"
    )
    parser.add_argument("--epochs", type=arguments.count, default=10, help="of training (10)")
    parser.add_argument(
        "--epsilon",
        type=arguments.between(0.01, 100),
        nargs="+",
        default=[1.0, 2.0, 8.0],
        help="to compare (1 2 8)",
    )
    parser.add_argument(
        "--delta", type=arguments.between(1e-12, 1), default=1e-5, help="of the guarantee (1e-5)"
    )
    parser.add_argument(
        "--bands", type=arguments.count, nargs="+", default=[1, 8, 64], help="to compare (1 8 64)"
    )
    parser.add_argument("--seed", type=arguments.seed, default=0, help="of Monte Carlo (0)")
    parser.add_argument(
        "--output",
        type=arguments.output,
        default="amplified_accounting.png",
        help="where the plot goes",
    )
    args = parser.parse_args(argv)
    if args.batch > args.examples:
        parser.error(f"expected --batch <= {args.examples}, found {args.batch}")
    training = Training(args.examples, args.batch, args.epochs, args.delta, args.seed)
    for b in args.bands:
        if b > training.cycle:
            parser.error(f"expected --bands <= {training.cycle} steps an epoch, found {b}")
    epsilons, bands = sorted(set(args.epsilon)), sorted(set(args.bands))
    training = dataclasses.replace(training, calibrations=2 * len(epsilons) * len(bands))
    return training, epsilons, bands, args.output


def main(argv: Sequence[str] | None = None) -> list[Cell]:
    training, epsilons, bands, output = parse_args(argv)
    print(
        f"Steps: {training.steps:,}, {training.cycle} an epoch; {training.epochs} epochs; "
        f"delta = {training.delta:g}."
    )
    cells = list(compare(training, epsilons, bands))
    print(f"\n{format_table(cells)}\n\n{advice(cells)}\n")
    plot(cells, training, output)
    print(f"Plot: {output}")
    return cells


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
