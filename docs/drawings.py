"""Draws the ring and the look-ahead schedule, from the definition that the library computes with.

python docs/drawings.py    # writes docs/ring.svg and docs/schedule.svg, which docs/design.md shows
"""

from __future__ import annotations

import pathlib
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from jax_privacy_kernels.ops.correlated_noise import _schedule

DOCS = pathlib.Path(__file__).parent
MADE, WARM, READ = "#009E73", "#E69F00", "#DDDDDD"  # colours of Okabe and Ito, and gray


def ring(slots: int, steps: int) -> Figure:
    """What the slots of one tile of phase 0 hold, step by step, and what is read and written."""
    figure = Figure(figsize=(7.5, 2.6), layout="constrained")
    axes = _grid(figure, steps, slots)
    for step in range(steps):
        refreshed = _schedule.terms(0, slots, step) == slots
        first = step - step % slots  # of the terms that the ring holds
        for slot in range(slots):
            now = slot == _schedule.slot(slots, step)
            _cell(axes, step, slot, MADE if refreshed else READ, f"$x_{{{first + slot}}}$", now)
    axes.set_yticks([i + 0.5 for i in range(slots)], [f"slot {i}" for i in range(slots)])
    _legend(
        figure, {"written, all at once": MADE, "left as it is": READ}, "read for the step's noise"
    )
    return figure


def schedule(slots: int, tiles: int, steps: int) -> Figure:
    """Which tiles are refreshed, warm up or only read, step by step."""
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    axes = _grid(figure, steps, tiles)
    for step in range(steps):
        for tile in range(tiles):
            terms = _schedule.terms(_schedule.phase(tile, slots, 0), slots, step)
            color = {slots: MADE, 1: WARM, 0: READ}[terms]
            made = f"{step}-{step + slots - 1}" if terms == slots else str(step) if terms else ""
            _cell(axes, step, tile, color, made, False)
    axes.set_yticks([i + 0.5 for i in range(tiles)], [f"tile {i}" for i in range(tiles)])
    made = {f"refreshed: makes {slots} terms": MADE, "warms up: makes one": WARM, "reads": READ}
    _legend(figure, made, None)
    return figure


def _grid(figure: Figure, columns: int, rows: int) -> Any:
    axes = figure.subplots()
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    axes.set_xticks([i + 0.5 for i in range(columns)], [f"step {i}" for i in range(columns)])
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    return axes


def _cell(axes: Any, column: int, row: int, color: str, text: str, framed: bool) -> None:
    axes.add_patch(Rectangle((column + 0.04, row + 0.06), 0.92, 0.88, color=color, linewidth=0))
    if framed:
        frame = {"fill": False, "edgecolor": "black", "linewidth": 1.8}
        axes.add_patch(Rectangle((column + 0.04, row + 0.06), 0.92, 0.88, **frame))
    axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=9)


def _legend(figure: Figure, colors: dict[str, str], framed: str | None) -> None:
    handles = [Rectangle((0, 0), 1, 1, color=color, label=label) for label, color in colors.items()]
    if framed:
        handles.append(Rectangle((0, 0), 1, 1, fill=False, edgecolor="black", label=framed))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)


if __name__ == "__main__":
    matplotlib.rcParams["svg.hashsalt"] = "jax_privacy_kernels"  # the same file every time
    for name, figure in (("ring", ring(4, 9)), ("schedule", schedule(4, 8, 9))):
        figure.savefig(DOCS / f"{name}.svg", metadata={"Date": None})
