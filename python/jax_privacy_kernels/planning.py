"""The best mechanism for a run: all that fit, compared by their error at one privacy target.

    >>> target = {"epsilon": 2.0, "delta": 1e-3}
    >>> table = plan(steps=20, dataset_size=80, batch_size=40, sampling="poisson", **target)
    >>> for row in table.rows:
    ...     print(f"{row.mechanism}: {row.rmse:.2f}")
    independent noise: 0.27
    banded Toeplitz, 2 bands: 0.29

Every row of the table is ready to run: it has its privatizer, its event for dp-accounting, and a
sentence that states its guarantee. An accountant of dp-accounting computed the epsilon of every
row, and every sensitivity is exact or an upper bound.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import os
import pathlib
import textwrap
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax

from jax_privacy_kernels import _plan_rows, _step_times
from jax_privacy_kernels._checks import check_int, check_scalar
from jax_privacy_kernels._plan_rows import Mechanism, Problem
from jax_privacy_kernels.matrix_factorization import _amplification
from jax_privacy_kernels.matrix_factorization._toeplitz_optimization import optimized_bands
from jax_privacy_kernels.matrix_factorization._workloads import known_workload
from jax_privacy_kernels.noise_addition import matrix_factorization_privatizer

__all__ = ["Plan", "Row", "plan"]

_SAMPLINGS = ("any", "fixed", "poisson")
_BYTES = 4  # of a number of state


@dataclasses.dataclass(frozen=True)
class Row:
    """A mechanism with the noise that the privacy target asks for.

    Attributes:
      mechanism: Its name.
      sampling: How examples have to be sampled: "fixed" is a fixed order, so that an example takes
        part at least ``min_sep`` steps apart; "poisson" is block-cyclic Poisson sampling.
      noise_multiplier: That of the Gaussian mechanism in `event`.
      sensitivity: Of the strategy, for gradients clipped to norm 1.
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
      event: The `dp_accounting.DpEvent` of the whole run.
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

    def _cells(self) -> Iterator[tuple[str, ...]]:
        yield "mechanism", "sampling", "noise", "rmse", "last", "state", "ms"
        for row in self.rows:
            ms = "" if row.milliseconds is None else f"{row.milliseconds:.3g}"
            yield (
                row.mechanism,
                row.sampling,
                f"{row.noise_multiplier:.4g}",
                f"{row.rmse:.4g}",
                f"{row.rmse_last:.4g}",
                _size(row.state_bytes),
                ms,
            )

    def __str__(self) -> str:
        """The table in at most 80 columns, and the guarantee of the best row."""
        cells = list(self._cells())
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        lines = []
        for row in cells:
            first = row[0].ljust(widths[0])
            rest = [x.rjust(width) for x, width in zip(row[1:], widths[1:], strict=True)]
            lines.append(" ".join([first, *rest]).rstrip())
        return "\n".join([*lines, "", *textwrap.wrap(self.best().guarantee, 80)])

    def to_markdown(self) -> str:
        """Returns the table in Markdown."""
        head, *rows = self._cells()
        lines = [head, ("---",) * len(head), *rows]
        return "\n".join(f"| {' | '.join(row)} |" for row in lines)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws error against memory into a file, with matplotlib.

        Raises:
          ImportError: If matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("expected matplotlib, for a plot, found none installed") from error
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        for sampling, marker in (("fixed", "o"), ("poisson", "s")):
            rows = [row for row in self.rows if row.sampling == sampling]
            if rows:
                x = [row.state_bytes for row in rows]
                axes.plot(x, [row.rmse for row in rows], marker, label=f"{sampling} sampling")
            for row in rows:
                axes.annotate(
                    row.mechanism,
                    (row.state_bytes, row.rmse),
                    xytext=(4, 4),
                    textcoords="offset points",
                    fontsize=7,
                )
        axes.set(xlabel="bytes of state", ylabel="RMSE of the iterates", yscale="log")
        axes.set_xscale("symlog", linthresh=max(1, self.target["parameters"] or 1) * _BYTES)
        axes.legend()
        target = self.target
        axes.set_title(f"({target['epsilon']:g}, {target['delta']:g})-DP, {target['steps']} steps")
        drawn = io.BytesIO()  # so that no interrupt leaves half a file
        file = pathlib.Path(path)
        figure.savefig(drawn, dpi=150, format=file.suffix[1:] or "png")
        file.write_bytes(drawn.getvalue())


def _size(size: int) -> str:
    if size == 0:
        return "0"
    power = min(int(math.log2(size) // 10), 4)
    return f"{size / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


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
    progress: bool | None = None,
) -> Plan:
    """Compares the mechanisms that fit a run, each with the noise for a privacy target.

    Independent noise, banded Toeplitz strategies, buffered ones (BLT), lambda-CGD and banded
    inverses (BandInvMF), optimized for the workload and the participation, with examples in a fixed
    order; independent noise and banded strategies with block-cyclic Poisson sampling, which
    amplifies privacy. Epsilon is computed by dp-accounting, by privacy loss distributions or, where
    that is less, by Renyi divergences.

    Cost: some seconds to a minute; the time of a step is measured once per machine and remembered
    in ``$XDG_CACHE_HOME/jax_privacy_kernels``.

    Args:
      steps: n, the number of steps.
      dataset_size: The number of examples.
      batch_size: The number of examples in a step; the expected number with Poisson sampling.
      epsilon: The privacy target is (epsilon, delta)-DP; positive and finite.
      delta: Strictly between 0 and 1.
      epochs: How often an example takes part, in a fixed order; by default as often as fits:
        ``min_sep`` is then ``steps // epochs``. Not with ``min_sep``.
      min_sep: The least number of steps between two participations of one example, by default
        ``dataset_size // batch_size``, the most there can be.
      workload: Coefficients of the workload, by default ones: prefix sums. See
        `toeplitz.momentum_sgd_coefs`.
      parameters: The size of the model. Without it there are no times, and state is that of one
        parameter.
      memory_budget: The most bytes that the noise state may take, with ``parameters``.
      sampling: "fixed", "poisson", or "any" for both: see `Row`.
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
    target = _amplification.Target(n, dataset_size, batch_size, epsilon, delta)
    if sampling not in _SAMPLINGS:
        raise ValueError(f"expected sampling to be one of {_SAMPLINGS}, found {sampling!r}")
    if parameters is not None:
        parameters = check_int("parameters", parameters)
    slots = _slots(parameters, memory_budget)
    coefs = known_workload(workload, n, "workload")
    apart, participations = _participation(n, dataset_size, batch_size, epochs, min_sep)
    problem = Problem(n, apart, participations, coefs, slots)
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
    }
    jobs: list[Callable[[], Row]] = []
    if sampling != "poisson":
        privacy = _Fixed(target, apart, participations)
        for make in _plan_rows.in_fixed_order(problem):
            jobs.append(functools.partial(privacy.row, make, parameters))
    if sampling != "fixed":
        amplified = _Amplified(target, problem)
        for bands in amplified.bands():
            jobs.append(functools.partial(amplified.row, bands, parameters))
    rows = [job() for job in _shown(jobs, progress)]
    rows = [row for row in rows if math.isfinite(row.rmse)]
    rows.sort(key=lambda row: row.rmse)
    return Plan(tuple(rows), arguments)


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
    return budget // (_BYTES * parameters)


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


def _row(
    mechanism: Mechanism,
    parameters: int | None,
    began: float,
    batch_size: float,
    noise_multiplier: float,
    **fields: Any,
) -> Row:
    sensitivity = math.sqrt(mechanism.squared_sensitivity) * (1 + 2.0**-50)
    stddev = noise_multiplier * sensitivity
    size = parameters or 1
    milliseconds = None
    if parameters is not None:
        with jax.enable_x64(False):
            matrix = mechanism.noising_matrix()
            key = f"{mechanism.name.partition(' =')[0]}, {mechanism.slots} slots"
            milliseconds = _step_times.milliseconds(key, matrix, parameters)
    return Row(
        mechanism=mechanism.name,
        noise_multiplier=noise_multiplier,
        sensitivity=sensitivity,
        stddev=stddev,
        rmse=stddev * math.sqrt(float(mechanism.errors.mean())) / batch_size,
        rmse_last=stddev * math.sqrt(float(mechanism.errors[-1])) / batch_size,
        state_bytes=_BYTES * mechanism.slots * size,
        milliseconds=milliseconds,
        seconds=time.monotonic() - began,
        noising_matrix=mechanism.noising_matrix,
        **fields,
    )


class _Fixed:
    """Examples in a fixed order: one Gaussian mechanism, of the sensitivity of the strategy."""

    def __init__(self, target: _amplification.Target, min_sep: int, participations: int) -> None:
        import dp_accounting

        self.target, self.min_sep, self.participations = target, min_sep, participations
        self.noise_multiplier, self.epsilon = target.unamplified()
        self.event = dp_accounting.GaussianDpEvent(self.noise_multiplier)

    def row(self, make: Callable[[], Mechanism], parameters: int | None) -> Row:
        began = time.monotonic()
        mechanism = _plan_rows.in_float64(make)
        target = self.target
        return _row(
            mechanism,
            parameters,
            began,
            target.batch_size,
            self.noise_multiplier,
            sampling="fixed",
            epsilon=self.epsilon,
            delta=target.delta,
            event=self.event,
            guarantee=(
                f"The run is ({self.epsilon:.6g}, {target.delta:g})-DP if one example is replaced "
                f"by a zero gradient: an example takes part at most {self.participations} times, "
                f"at least {self.min_sep} steps apart, clipped to norm 1, and the noise makes it a "
                f"Gaussian mechanism with noise multiplier {self.noise_multiplier:.6g}."
            ),
        )


class _Amplified:
    """Block-cyclic Poisson sampling: DP-SGD on every part of the data."""

    def __init__(self, target: _amplification.Target, problem: Problem) -> None:
        self.target, self.problem = target, problem

    def bands(self) -> list[int]:
        """Independent noise, and a few numbers of bands, from few to as many as fit."""
        all_bands = [b for b in self.target.candidates() if b - 1 <= self.problem.slots]
        wanted = [1, 2, 4, 8, 16, 32, 64, 128]
        return sorted({max((b for b in all_bands if b <= w), default=1) for w in wanted})

    def row(self, bands: int, parameters: int | None) -> Row:
        began = time.monotonic()
        target = self.target
        mechanism = _plan_rows.in_float64(functools.partial(self._mechanism, bands))
        noise_multiplier, epsilon = target.amplified(bands)
        probability, rounds = target.sampling(bands)
        parts = "every step samples every example"
        if bands > 1:
            parts = (
                f"the data are cut into {bands} equal parts, and step t samples every example of "
                f"part t mod {bands}"
            )
        return _row(
            mechanism,
            parameters,
            began,
            target.batch_size,
            noise_multiplier,
            sampling="poisson",
            epsilon=epsilon,
            delta=target.delta,
            event=target.event(bands, noise_multiplier),
            guarantee=(
                f"The run is ({epsilon:.6g}, {target.delta:g})-DP if one example is added or "
                f"removed: {parts} with probability {probability:.6g}, at {rounds} steps at most, "
                f"clipped to norm 1, with noise multiplier {noise_multiplier:.6g}."
            ),
        )

    def _mechanism(self, bands: int) -> Mechanism:
        if bands == 1:
            return _plan_rows.independent(self.problem, 1)
        coef = optimized_bands(self.problem.steps, bands, self.problem.workload)
        norm = float(np.sum(np.asarray(coef, np.float64) ** 2)) * (1 + 1e-12)
        return _plan_rows.banded(self.problem, np.asarray(coef, np.float32), norm)


def __dir__() -> list[str]:  # for completion: no imported names
    return sorted(__all__)
