"""The decision table: error, memory and time of mechanisms, computed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_privacy_kernels.matrix_factorization import buffered_toeplitz, toeplitz

__all__ = ["HEADER", "Row", "lines", "plot", "table"]

HEADER = ["mechanism", "error", "memory, models", "ms per step"]


@dataclasses.dataclass(frozen=True)
class Row:
    """A mechanism.

    Attributes:
      name: what readers call it.
      family: of mechanisms that differ in one number.
      error: root mean square over steps, for noise multiplier and clip norm 1.
      memory: in models.
      case: of bench/noise.py, and its bands; None where it was not measured.
    """

    name: str
    family: str
    error: float
    memory: int
    case: tuple[str, int] | None


def table(
    n: int,
    min_sep: int,
    max_participations: int,
    bands: Sequence[int] = (1, 8, 32, 64, 100),
    buffers: Sequence[int] = (2, 4),
    coefficients: Sequence[int] = (4, 16),
) -> list[Row]:
    """Mechanisms optimized for a run, all at the same privacy."""
    limits = {"min_sep": min_sep, "max_participations": max_participations}
    rows = []
    with jax.enable_x64(True):
        for b in bands:
            coef = toeplitz.optimize_banded_toeplitz(n=n, bands=b)
            squared = toeplitz.minsep_sensitivity_squared(coef, n=n, **limits)
            error = toeplitz.per_query_error(strategy_coef=coef, n=n).mean()
            name = "independent noise" if b == 1 else f"banded Toeplitz, {b} bands"
            rows.append(_row(name, "banded Toeplitz", error, squared, b - 1, ("bands", b)))
        for m in buffers:
            blt = buffered_toeplitz.optimize(
                n=n, error="mean", min_buffers=m, max_buffers=m, **limits
            )
            coef = blt.toeplitz_coefs(n)
            squared = toeplitz.minsep_sensitivity_squared(coef, n=n, **limits)
            error = toeplitz.per_query_error(strategy_coef=coef, n=n).mean()
            rows.append(_row(f"BLT, {m} buffers", "BLT", error, squared, m, ("buffers", m)))
        for p in coefficients:
            coef = toeplitz.banded_inverse_square_root_noising_coefs(p)
            squared = toeplitz.compute_banded_inverse_sensitivity_squared(
                n, coef, min_sep, max_participations
            )
            error = toeplitz.per_query_error(noising_coef=coef, n=n).mean()
            name = f"banded inverse, {p} coefficients"
            rows.append(_row(name, "banded inverse", error, squared, p - 1, ("inverse", p)))
    return rows


def _row(
    name: str, family: str, error: Any, squared: Any, memory: int, case: tuple[str, int]
) -> Row:
    return Row(name, family, math.sqrt(float(jnp.asarray(error) * squared)), memory, case)


def lines(rows: Sequence[Row], noise: dict[str, Any], busy: dict[str, Any]) -> list[list[str]]:
    """What stands in the table, with the times that results of bench/noise.py hold.

    Args:
      rows: mechanisms.
      noise: results of an idle machine, whose medians are shown.
      busy: of a busy one, of whose mechanisms the best times are shown, and marked.
    """

    def milliseconds(report: dict[str, Any], key: str, mark: str) -> dict[Any, str]:
        return {
            (row["case"], row["bands"]): f"{row['implementations']['cpp'][key] * 1e3:.0f}{mark}"
            for row in report["rows"]
        }

    measured = milliseconds(busy, "min_s", "*") | milliseconds(noise, "median_s", "")
    return [
        [
            row.name,
            f"{row.error:.1f}",
            str(row.memory),
            measured.get(row.case, "-"),
        ]
        for row in rows
    ]


def plot(rows: Sequence[Row], axes: Any) -> None:
    """Error over memory."""
    for family, marker, color in (
        ("banded Toeplitz", "D", "#009E73"),
        ("BLT", "s", "#0072B2"),
        ("banded inverse", "^", "#D55E00"),
    ):
        mine = [row for row in rows if row.family == family]
        x, y = [row.memory for row in mine], [row.error for row in mine]
        axes.plot(x, y, marker=marker, color=color, label=family)
    axes.set_xscale("symlog", base=2, linthresh=1)
    ticks = [0, 1, 2, 4, 8, 16, 32, 64, 128]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("memory of the noise, in models")
    axes.set_ylabel("root mean square error")
    axes.grid(True, linewidth=0.3)
    axes.legend()
