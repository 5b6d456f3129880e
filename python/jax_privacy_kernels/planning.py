"""The best mechanism for a run: all that fit, compared by their error at one privacy target.

    >>> target = {"epsilon": 2.0, "delta": 1e-3}
    >>> table = plan(steps=20, dataset_size=80, batch_size=40, sampling="poisson", **target)
    >>> for row in table.rows:
    ...     print(f"{row.mechanism}: {row.rmse:.2f}")
    independent noise: 0.27
    banded Toeplitz, 2 bands: 0.29

Every row of the table is ready to run: it has its privatizer, its event for dp-accounting, and a
sentence that states its guarantee. An accountant computed the epsilon of every row, and every
sensitivity is exact or an upper bound.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import pathlib
import re
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax

from jax_privacy_kernels import _step_times
from jax_privacy_kernels._bench import looks
from jax_privacy_kernels._checks import check_int, check_scalar, check_seed
from jax_privacy_kernels._files import draw_whole
from jax_privacy_kernels._plan_privacy import BallsInBins, FixedOrder, Job, Poisson, Private
from jax_privacy_kernels._plan_rows import Problem
from jax_privacy_kernels.matrix_factorization._amplification import Target
from jax_privacy_kernels.matrix_factorization._workloads import (
    can_follow,
    known_workload,
    toeplitz_coefs,
)
from jax_privacy_kernels.matrix_factorization.streaming_matrix import StreamingMatrix, prefix_sum
from jax_privacy_kernels.noise_addition import matrix_factorization_privatizer

__all__ = ["Plan", "Row", "plan"]

_SAMPLINGS = ("any", "fixed", "poisson", "bins")
_ACCOUNTANTS = ("pld", "monte_carlo")
_BYTES = 4  # of a number of state
# Okabe and Ito's, of families.
_COLORS = {
    "banded Toeplitz": "#009E73",
    "BLT": "#0072B2",
    "banded inverse": "#D55E00",
    "column-normalized": "#56B4E9",
    "lambda-CGD": "#CC79A7",
    "independent noise": "#555555",
}
_WIDTH = 80


@dataclasses.dataclass(frozen=True)
class Row:
    """A mechanism with the noise that the privacy target asks for.

    Attributes:
      mechanism: Its name.
      sampling: How examples have to be sampled: "fixed" is a fixed order, so that an example takes
        part at least ``min_sep`` steps apart; "poisson" is block-cyclic Poisson sampling; "bins" is
        balls in bins, one random batch of an epoch for every example, the same in all epochs.
      noise_multiplier: Standard deviation of the noise over the sensitivity: that of the Gaussian
        mechanism in `event`, if there is one.
      sensitivity: Of the strategy, for gradients clipped to norm 1: to all participations in a
        fixed order, to one of them where sampling amplifies.
      stddev: Standard deviation of the independent noise, ``noise_multiplier * sensitivity``, for
        sums of gradients that are clipped to norm 1.
      rmse: Root of the mean squared error that noise makes in every coordinate of an iterate, over
        all steps, for mean gradients and a learning rate and clip norm of 1.
      rmse_last: The same of the last iterate.
      state_bytes: Size of the noise state; for one parameter where their number is not given.
      milliseconds: An estimate of what noise takes of a step on this machine, or None where the
        number of parameters is not given.
      seconds: What planning the row took.
      epsilon: As the accountant computed it for `event`, at most the target's.
      delta: The target's.
      guarantee: The guarantee in a sentence.
      event: The `dp_accounting.DpEvent` of the whole run. With "bins" it is an
        ``UnsupportedDpEvent``, which accountants refuse: dp-accounting has none for that sampling.
    """

    mechanism: str
    sampling: str
    noise_multiplier: float
    sensitivity: float
    stddev: float
    rmse: float
    rmse_last: float
    state_bytes: int
    milliseconds: float | None
    seconds: float
    epsilon: float
    delta: float
    guarantee: str
    event: Any = dataclasses.field(repr=False)
    noising_matrix: Callable[[], Any] = dataclasses.field(repr=False)

    def privatizer(self, *, clip_norm: float = 1.0, **options: Any) -> optax.GradientTransformation:
        """Returns the privatizer of the row, for sums of gradients.

        Args:
          clip_norm: What the gradient of every example is clipped to.
          **options: As of `noise_addition.matrix_factorization_privatizer`: ``prng_key``, ``dtype``
            and others.

        Raises:
          ValueError: If ``clip_norm`` is not positive and finite.
        """
        clip_norm = check_scalar(
            "clip_norm", clip_norm, lambda x: 0 < x < math.inf, "positive and finite"
        )
        # Rounded to float32 inside, as any stddev is: up.
        stddev = float(np.nextafter(np.float32(self.stddev * clip_norm), np.float32(np.inf)))
        return matrix_factorization_privatizer(self.noising_matrix(), stddev=stddev, **options)

    def to_dict(self) -> dict[str, Any]:
        """Returns what is numbers and text in the row."""
        left_out = ("event", "noising_matrix")
        names = [field.name for field in dataclasses.fields(self)]
        return {name: getattr(self, name) for name in names if name not in left_out}


@dataclasses.dataclass(frozen=True)
class Plan:
    """The mechanisms that fit, those of the least error first.

    Attributes:
      rows: The table.
      target: The arguments of :func:`plan`, and what follows from them.
    """

    rows: tuple[Row, ...]
    target: dict[str, Any]

    def best(self) -> Row:
        """Returns the row of the least `Row.rmse`."""
        return self.rows[0]

    def to_dict(self) -> dict[str, Any]:
        """Returns the table as a dict that `json.dumps` takes."""
        return {"target": self.target, "rows": [row.to_dict() for row in self.rows]}

    def _cells(self, digits: int = 4) -> Iterator[tuple[str, ...]]:
        yield "mechanism", "sampling", "noise", "rmse", "last", "state", "ms", "s"
        for row in self.rows:
            ms = "" if row.milliseconds is None else f"{row.milliseconds:.{min(digits, 3)}g}"
            yield (
                row.mechanism,
                row.sampling,
                f"{row.noise_multiplier:.{digits}g}",
                f"{row.rmse:.{digits}g}",
                f"{row.rmse_last:.{digits}g}",
                _size(row.state_bytes),
                ms,
                f"{row.seconds:.1f}",
            )

    def __str__(self) -> str:
        """The table in at most 80 columns, and the guarantee of the best row."""
        for digits in (4, 3, 2, 1):
            lines = _aligned(list(self._cells(digits)))
            if max(map(len, lines)) <= _WIDTH:
                break
        return "\n".join([*lines, "", *textwrap.wrap(self.best().guarantee, _WIDTH)])

    def to_markdown(self) -> str:
        """Returns the table in Markdown."""
        head, *rows = self._cells()
        lines = [head, ("---",) * len(head), *rows]
        return "\n".join(f"| {' | '.join(row)} |" for row in lines)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws error against memory into a file, with matplotlib.

        Args:
          path: The file, whose name ends on a format that matplotlib knows; on none it is a PNG.

        Raises:
          ImportError: If matplotlib is not installed.
          OSError: If the file cannot be written.
          ValueError: If matplotlib does not know the format.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("expected matplotlib, for a plot, found none installed") from error
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        families = list(dict.fromkeys(row.mechanism.partition(",")[0] for row in self.rows))
        samplings = {"fixed": "o-", "poisson": "s--", "bins": "^:"}
        used = [name for name in samplings if any(row.sampling == name for row in self.rows)]
        for family, sampling in itertools.product(families, used):
            rows = [
                row
                for row in self.rows
                if (row.mechanism.partition(",")[0], row.sampling) == (family, sampling)
            ]
            rows.sort(key=lambda row: row.state_bytes)
            if not rows:
                continue
            axes.plot(
                [row.state_bytes for row in rows],
                [row.rmse for row in rows],
                samplings[sampling],
                color=_COLORS.get(family, "#000000"),
                label=family if len(used) == 1 else f"{family}, {sampling}",
            )
            for row in rows:
                # The number of bands, buffers or coefficients.
                axes.annotate(
                    "".join(re.findall(r"\d[\d.]*", row.mechanism)[:1]),
                    (row.state_bytes, row.rmse),
                    xytext=(4, 4),
                    textcoords="offset points",
                    fontsize=8,
                )
        model = max(1, self.target["parameters"] or 1) * _BYTES
        most = max(row.state_bytes for row in self.rows) // model
        ticks = [0, *(model * 2**i for i in range(int(most).bit_length()))]
        axes.set_xscale("symlog", base=2, linthresh=model)
        axes.set_xticks(ticks, [_size(tick) for tick in ticks])
        axes.xaxis.minorticks_off()
        axes.set_xlim(-0.3 * model, 1.5 * max(model, most * model))
        axes.set_yscale("log")
        looks.log_ticks(axes.yaxis)
        of_all = " of a parameter" if self.target["parameters"] is None else ""
        axes.set(xlabel=f"state of the noise{of_all}", ylabel="RMSE of the iterates")
        axes.grid(True, linewidth=0.3)
        figure.legend(loc="outside right upper", fontsize=8)
        target = self.target
        axes.set_title(f"({target['epsilon']:g}, {target['delta']:g})-DP, {target['steps']} steps")
        draw_whole(figure, pathlib.Path(path))


def _aligned(cells: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        first = row[0].ljust(widths[0])
        rest = [x.rjust(width) for x, width in zip(row[1:], widths[1:], strict=True)]
        lines.append(" ".join([first, *rest]).rstrip())
    return lines


def _size(size: int) -> str:
    if size == 0:
        return "0"
    power = min((size.bit_length() - 1) // 10, 6)
    number = size / 1024**power
    unit = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")[power]
    return f"{number:.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"


def plan(
    *,
    steps: int,
    dataset_size: int,
    batch_size: int,
    epsilon: float,
    delta: float,
    epochs: int | None = None,
    min_sep: int | None = None,
    workload: Any = None,
    parameters: int | None = None,
    memory_budget: float | None = None,
    sampling: str = "any",
    accountant: str = "pld",
    seed: int | None = None,
    progress: bool | None = None,
) -> Plan:
    """Compares the mechanisms that fit a run, each with the noise for a privacy target.

    With examples in a fixed order: independent noise, banded Toeplitz strategies, banded ones whose
    columns differ, buffered ones (BLT), lambda-CGD and banded inverses (BandInvMF), optimized for
    the workload and the participation. With block-cyclic Poisson sampling, which amplifies privacy:
    independent noise and banded Toeplitz strategies. Epsilon is computed by dp-accounting, by
    privacy loss distributions or, where that is less, by Renyi divergences.

    Cost: some seconds to a minute; the time of a step is measured once per machine and remembered
    in ``$XDG_CACHE_HOME/jax_privacy_kernels``.

    Args:
      steps: n, the number of steps.
      dataset_size: The number of examples.
      batch_size: The number of examples in a step; the expected number with random sampling.
      epsilon: The privacy target is (epsilon, delta)-DP; positive and finite.
      delta: Strictly between 0 and 1.
      epochs: How many passes over the examples the steps are, in a fixed order: ``min_sep`` is then
        ``steps // epochs``. Steps that are left over count as one more. Not with ``min_sep``.
      min_sep: The least number of steps between two participations of one example, in a fixed
        order. By default ``dataset_size // batch_size``, the most there can be.
      workload: ``[n]`` coefficients of the workload, by default ones: prefix sums. See
        `toeplitz.momentum_sgd_coefs`. Or a `StreamingMatrix`, such as that of
        `streaming_matrix.momentum_sgd_matrix`: with learning rates that change, banded strategies
        are optimized for it and the others for prefix sums; errors are its own for all, in O(n^2).
        Strategies whose columns differ need either it or the default.
      parameters: The size of the model. Without it there are no times, and state is that of one
        parameter.
      memory_budget: The most bytes that the noise state may take, with ``parameters``. Beyond it
        there are keys and counters, some bytes for every slot and leaf of the model.
      sampling: "fixed", "poisson", "bins", or "any" for all that the accountant knows: see `Row`.
      accountant: "pld", or "monte_carlo" for "bins" too, by `monte_carlo.calibrate`. That takes
        minutes for every strategy, and 10 times as long for a tenth of delta.
      seed: Of Monte Carlo samples, chosen beforehand; None for one of the system's.
      progress: Whether to show a progress bar on standard error; None does so on a terminal, after
        two seconds.

    Returns:
      The table.

    Raises:
      ValueError: If an argument is out of range, participations do not fit the data, or no noise
        reaches the target.
      TypeError: If an argument is of the wrong type.
    """
    n = check_int("steps", steps)
    dataset_size = check_int("dataset_size", dataset_size)
    batch_size = check_int("batch_size", batch_size)
    if batch_size > dataset_size:
        raise ValueError(
            f"expected batch_size <= dataset_size={dataset_size}, found batch_size={batch_size}"
        )
    target = Target(n, dataset_size, batch_size, epsilon, delta)
    _check_choice("sampling", sampling, _SAMPLINGS)
    _check_choice("accountant", accountant, _ACCOUNTANTS)
    if sampling == "bins" and accountant != "monte_carlo":
        raise ValueError(
            f"expected accountant='monte_carlo' with sampling='bins', found {accountant!r}"
        )
    if not (progress is None or isinstance(progress, bool)):
        raise TypeError(f"expected progress to be True, False or None, found {progress!r}")
    if parameters is not None:
        parameters = check_int("parameters", parameters)
    if seed is not None:
        seed = check_seed(seed)
    slots = _slots(parameters, memory_budget)
    coefs, A, followed = _workload(workload, n)
    apart, participations = _participation(n, dataset_size, batch_size, epochs, min_sep)
    problem = Problem(n, apart, participations, coefs, A, followed, slots)
    arguments = {
        "steps": n,
        "dataset_size": dataset_size,
        "batch_size": batch_size,
        "epsilon": target.epsilon,
        "delta": target.delta,
        "min_sep": apart,
        "participations": participations,
        "parameters": parameters,
        "memory_budget": memory_budget,
        "sampling": sampling,
        "accountant": accountant,
    }
    jobs: list[Job] = []
    if sampling in ("any", "fixed"):
        jobs += FixedOrder(target, problem).jobs()
    if sampling in ("any", "poisson"):
        jobs += Poisson(target, problem).jobs()
    if accountant == "monte_carlo" and sampling in ("any", "bins"):
        jobs += BallsInBins(target, problem, seed).jobs()
    rows = []
    for job in _shown(jobs, progress):
        began = time.monotonic()
        row = _row(job(), target, parameters, began)
        if math.isfinite(row.rmse):
            rows.append(row)
    if not rows:
        raise ValueError("expected a workload of finite errors, found none of any mechanism")
    rows.sort(key=lambda row: row.rmse)
    return Plan(tuple(rows), arguments)


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if not (isinstance(value, str) and value in choices):
        raise ValueError(f"expected {name} to be one of {choices}, found {value!r}")


def _workload(
    workload: Any, n: int
) -> tuple[np.ndarray | None, StreamingMatrix | None, StreamingMatrix | None]:
    """Coefficients of a workload or the matrix that it is, and `Problem.followed`."""
    if workload is None:
        return None, None, prefix_sum()
    if isinstance(workload, StreamingMatrix):
        followed = workload if can_follow(workload.structure, n) else None
        coefs = toeplitz_coefs(workload.structure, n)
        return coefs, workload if coefs is None else None, followed
    coefs = known_workload(workload, n, "workload")
    if np.shape(workload) != (n,):
        raise ValueError(f"expected workload of shape ({n},), found {np.shape(workload)}")
    return coefs, None, None


def _slots(parameters: int | None, memory_budget: float | None) -> float:
    if memory_budget is None:
        return math.inf
    if parameters is None:
        raise ValueError(f"expected parameters with memory_budget={memory_budget}, found None")
    budget = check_scalar(
        "memory_budget",
        memory_budget,
        lambda x: x >= 0,
        "at least 0, which independent noise and lambda-CGD need",
    )
    return math.inf if math.isinf(budget) else budget // (_BYTES * parameters)


def _participation(
    n: int, dataset_size: int, batch_size: int, epochs: int | None, min_sep: int | None
) -> tuple[int, int]:
    """``min_sep``, at most n, and the most participations."""
    most = dataset_size // batch_size
    if epochs is not None:
        if min_sep is not None:
            raise ValueError("expected epochs or min_sep, found both")
        epochs = check_int("epochs", epochs)
        if epochs > n:
            raise ValueError(f"expected epochs <= steps={n}, found epochs={epochs}")
        apart = n // epochs
        why = f"epochs={epochs} of {n} steps take {apart} steps each"
    else:
        apart = most if min_sep is None else check_int("min_sep", min_sep)
        why = f"min_sep={apart}"
    apart = min(apart, n)  # more steps between them make no difference
    if apart > most:
        raise ValueError(
            f"expected at most dataset_size // batch_size = {most} steps between participations of "
            f"one example, found {why}"
        )
    return apart, -(-n // apart)


def _shown(jobs: list[Any], progress: bool | None) -> Any:
    from tqdm import tqdm

    disable = None if progress is None else not progress
    return tqdm(jobs, desc="planning", delay=2, disable=disable, leave=False)


def _row(private: Private, target: Target, parameters: int | None, began: float) -> Row:
    mechanism = private.mechanism
    # Steps are run in float32: what they add up to is off by a few 1e-7 after ten thousand of them.
    sensitivity = math.sqrt(mechanism.squared_sensitivity) * (1 + 2.0**-20)
    stddev = private.noise_multiplier * sensitivity
    milliseconds = None
    if parameters is not None:
        with jax.enable_x64(False):
            matrix = mechanism.noising_matrix()
            key = f"{mechanism.name.partition(' =')[0]}, {mechanism.slots} slots"
            milliseconds = _step_times.milliseconds(key, matrix, parameters)
    return Row(
        mechanism=mechanism.name,
        sampling=private.sampling,
        noise_multiplier=private.noise_multiplier,
        sensitivity=sensitivity,
        stddev=stddev,
        rmse=stddev * math.sqrt(float(mechanism.errors.mean())) / target.batch_size,
        rmse_last=stddev * math.sqrt(float(mechanism.errors[-1])) / target.batch_size,
        state_bytes=_BYTES * mechanism.slots * (parameters or 1),
        milliseconds=milliseconds,
        seconds=time.monotonic() - began,
        epsilon=private.epsilon,
        delta=target.delta,
        guarantee=private.guarantee,
        event=private.event,
        noising_matrix=mechanism.noising_matrix,
    )


def __dir__() -> list[str]:  # for completion: no imported names
    return sorted(__all__)
