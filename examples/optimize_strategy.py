"""Which noise to correlate how: strategies compared for a given number of steps and epochs.

Training adds up gradients, so what noise does to it is what it does to their running sums. With a
strategy C the noise of step t is row t of C^-1 z, z being independent, and the running sums are off
by A C^-1 z, with A the matrix of prefix sums. An example takes part several times, and the standard
deviation of z is proportional to the sensitivity of C to that. This program plans strategies of
every kind in the library, and compares error times sensitivity: the error at equal privacy.

    pip install "jax_privacy_kernels[examples]"
    python optimize_strategy.py --n 2000 --epochs 10

What is computed:

* Error of a step: standard deviation of the running sum of noise, `sqrt(per_query_error)` times
  sensitivity, for a noise multiplier and a clip norm of 1. Multiply by both to get that of a run.
  The table is sorted by its root mean square over the steps; the largest is that of the last step.
* Participation: an example takes part at most `--epochs` times, any two of them at least
  `--min-sep` steps apart. In every epoch the same order of the data, as in train_digits.py, gives
  `min_sep = n // epochs`.
* Memory: noise kept from step to step, in copies of the model. With b bands of C these are the last
  b - 1 terms of C^-1 z, with p bands of C^-1 the last p - 1 of z.
* Privacy: at one noise multiplier all are one Gaussian mechanism with the same epsilon. No
  amplification by sampling is taken into account: for that, see
  `toeplitz.optimize_coefs_for_amplifications`.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence

import arguments
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from tqdm import tqdm

from jax_privacy_kernels.matrix_factorization import toeplitz

LEAST_SHOWN = 1e-4  # of the coefficients in the plot

IDENTITY = "independent noise"
SQUARE_ROOT = "optimal max error"
BANDED = "banded"
INVERSE_ROOT = "banded inverse root"
INVERSE = "banded inverse"
# Okabe-Ito colours: told apart by colour-blind readers too. Dashes later in the list are drawn over
# lines earlier in it, so that both show where they agree.
STYLES = {
    IDENTITY: {"color": "#555555", "linestyle": "-"},
    BANDED: {"color": "#0072B2", "linestyle": "-"},
    SQUARE_ROOT: {"color": "#D55E00", "linestyle": "-"},
    INVERSE: {"color": "#009E73", "linestyle": (0, (6, 3))},
    INVERSE_ROOT: {"color": "#E69F00", "linestyle": (0, (2, 2))},
}


@dataclasses.dataclass(frozen=True)
class Participation:
    """How often and how densely one example takes part in n steps."""

    n: int
    epochs: int
    min_sep: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"expected n >= 1, found n={self.n}")
        if not 1 <= self.epochs <= self.n:
            raise ValueError(f"expected 1 <= epochs <= n={self.n}, found epochs={self.epochs}")
        if not 1 <= self.min_sep <= self.n:
            raise ValueError(f"expected 1 <= min_sep <= n={self.n}, found min_sep={self.min_sep}")
        if (self.epochs - 1) * self.min_sep >= self.n:
            most = -(-self.n // self.min_sep)
            raise ValueError(
                f"expected {self.epochs} participations to fit into n={self.n} steps, found room "
                f"for {most} that are min_sep={self.min_sep} apart"
            )


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A strategy to plan."""

    kind: str
    bands: int
    plan: Callable[[], jax.Array]  # Coefficients of C, or of C^-1 if the kind is an inverse.

    @property
    def is_inverse(self) -> bool:
        return self.kind in (INVERSE_ROOT, INVERSE)


@dataclasses.dataclass(frozen=True)
class Row:
    kind: str
    bands: int  # of C, or of C^-1
    strategy: np.ndarray  # First column of C.
    sensitivity: float
    errors: np.ndarray  # [n], by step
    seconds: float  # to plan, compilation included

    @property
    def rms_error(self) -> float:
        return float(np.sqrt(np.mean(self.errors**2)))

    @property
    def max_error(self) -> float:
        return float(self.errors.max())

    @property
    def models(self) -> int:
        """Size of the noise state, in copies of the model."""
        return self.bands - 1


def band_counts(most: int) -> list[int]:
    """A few counts up to the most, each four times the one before or thereabouts."""
    powers = [4**i for i in range(1, most.bit_length()) if 2 * 4**i <= most]
    return [*powers, most]


def candidates(pattern: Participation, counts: Iterable[int]) -> list[Candidate]:
    n, limits = pattern.n, {"min_sep": pattern.min_sep, "max_participations": pattern.epochs}
    found = [
        Candidate(IDENTITY, 1, lambda: jnp.ones(1)),
        Candidate(SQUARE_ROOT, n, lambda: toeplitz.optimal_max_error_strategy_coefs(n)),
    ]
    for b in counts:
        found += [
            Candidate(BANDED, b, lambda b=b: toeplitz.optimize_banded_toeplitz(n, b)),
            Candidate(
                INVERSE_ROOT, b, lambda b=b: toeplitz.banded_inverse_square_root_noising_coefs(b)
            ),
            Candidate(
                INVERSE,
                b,
                lambda b=b: toeplitz.optimize_banded_inverse_toeplitz(n, num_bands=b, **limits),
            ),
        ]
    return found


def evaluate(candidate: Candidate, pattern: Participation) -> Row:
    """Plans a strategy, and computes what it costs."""
    n, epochs, min_sep = pattern.n, pattern.epochs, pattern.min_sep
    start = time.perf_counter()
    coef = jax.block_until_ready(candidate.plan())
    seconds = time.perf_counter() - start
    # Exact for strategies that are non-negative and never increase. For others the sensitivity is
    # an upper bound, and with it the error at equal privacy.
    if candidate.is_inverse:
        strategy = toeplitz.inverse_coef(coef, n)
        squared = toeplitz.compute_banded_inverse_sensitivity_squared(n, coef, min_sep, epochs)
        variances = toeplitz.per_query_error(noising_coef=coef, n=n)
    else:
        strategy = toeplitz.pad_coefs_to_n(coef, n)
        squared = toeplitz.minsep_sensitivity_squared(coef, min_sep, n=n, max_participations=epochs)
        variances = toeplitz.per_query_error(strategy_coef=coef, n=n)
    sensitivity = float(jnp.sqrt(squared))
    return Row(
        kind=candidate.kind,
        bands=candidate.bands,
        strategy=np.asarray(strategy, np.float64),
        sensitivity=sensitivity,
        errors=np.sqrt(np.asarray(variances, np.float64)) * sensitivity,
        seconds=seconds,
    )


def format_table(rows: Sequence[Row]) -> str:
    header = ["strategy", "bands", "rms error", "max", "sensitivity", "models", "plan", ""]
    table = [header]
    best = min(rows, key=lambda row: row.rms_error)
    for row in rows:
        table.append(
            [
                row.kind,
                str(row.bands),
                f"{row.rms_error:.2f}",
                f"{row.max_error:.2f}",
                f"{row.sensitivity:.3f}",
                str(row.models),
                f"{row.seconds:.2f} s",
                "*" if row is best else "",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in table
    ]
    note = "* least error; models: what the noise keeps; plan: time to find the strategy"
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], note])


def plot(rows: Sequence[Row], path: str, pattern: Participation) -> None:
    """The best strategy of every kind: its errors and its coefficients."""
    best: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: row.rms_error):
        best.setdefault(row.kind, row)
    # A bare Figure, unlike pyplot, draws to a file whatever display there is or is not.
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = np.arange(1, pattern.n + 1)
    for kind, row in best.items():
        style = {"linewidth": 1.8, "zorder": 2 + list(STYLES).index(kind) / 10, **STYLES[kind]}
        label = kind if kind in (IDENTITY, SQUARE_ROOT) else f"{kind}, {row.bands} bands"
        left.plot(steps, row.errors, **style, label=label)
        # A line ends where its bands do, or where what is left of them no longer counts.
        sizes = np.abs(row.strategy / row.strategy[0])
        sizes = np.where(sizes < LEAST_SHOWN, np.nan, sizes)
        marker = "o" if row.bands == 1 else None
        right.plot(steps, sizes, **style, marker=marker)
    left.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    left.set_xlabel("step")
    left.set_ylabel("standard deviation of the running sum's noise\n(noise multiplier x clip norm)")
    left.set_title("Error of every step")
    left.set_yscale("log")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("{x:g}")
    left.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    right.set_xscale("log")
    right.set_yscale("log")
    right.xaxis.set_major_formatter("{x:g}")
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_formatter("")
    right.set_xlabel("lag + 1 (steps)")
    right.set_ylabel(f"|coefficient of C|, the first being 1, above {LEAST_SHOWN:g}")
    right.set_title("Strategies")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.grid(alpha=0.3, which="minor")
    figure.suptitle(
        f"Steps: {pattern.n:,}; participations of an example: up to {pattern.epochs}, "
        f"min_sep {pattern.min_sep}"
    )
    figure.legend(loc="outside lower center", ncols=3)  # below the curves, not over them
    figure.savefig(path, dpi=150)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments.Parser(
        description="Compares strategies for correlated noise at the same privacy.",
    )
    parser.add_argument("--n", type=arguments.count, default=2000, help="steps of training (2000)")
    parser.add_argument(
        "--epochs", type=arguments.count, default=10, help="times each example takes part (10)"
    )
    parser.add_argument(
        "--min-sep",
        type=arguments.count,
        help="least distance of two of them (default: n // epochs)",
    )
    parser.add_argument(
        "--bands",
        type=arguments.count,
        nargs="+",
        help="band counts to try (default: a few up to min_sep)",
    )
    parser.add_argument(
        "--output",
        type=arguments.output,
        default="optimize_strategy.png",
        help="where the plot goes",
    )
    args = parser.parse_args(argv)
    if args.min_sep is None:
        args.min_sep = max(args.n // args.epochs, 1)
    try:
        args.pattern = Participation(args.n, args.epochs, args.min_sep)
    except ValueError as error:
        parser.error(str(error))
    args.bands = sorted(set(args.bands or band_counts(args.min_sep)))
    if args.bands[-1] > args.n:
        parser.error(f"expected 1 <= bands <= n={args.n}, found bands={args.bands}")
    return args


def main(argv: Sequence[str] | None = None) -> list[Row]:
    args = parse_args(argv)
    pattern = args.pattern
    print(
        f"Steps: {pattern.n}. Participations of an example: up to {pattern.epochs}, at least "
        f"{pattern.min_sep} steps apart."
    )

    rows = []
    with tqdm(
        candidates(pattern, args.bands), unit="strategy", desc="planning", disable=None
    ) as progress:
        for candidate in progress:
            progress.set_postfix_str(f"{candidate.kind}, b = {candidate.bands}")
            rows.append(evaluate(candidate, pattern))
    rows.sort(key=lambda row: row.rms_error)

    print(f"\n{format_table(rows)}\n")
    plot(rows, args.output, pattern)
    print(f"Errors and coefficients: {args.output}")
    return rows


if __name__ == "__main__":
    main()
