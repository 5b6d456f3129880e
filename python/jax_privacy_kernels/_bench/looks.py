"""How results look: the same name and colour for the same contestant everywhere, aligned tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["COLORS", "LABELS", "MARKERS", "log_ticks", "over_bands", "style", "table"]

# The contestants, as plots call them, slowest first.
LABELS = {
    "peer": "jax_privacy",
    "jax": "this library, jax",
    "cpp": "this library, cpp",
    "pallas": "this library, pallas",
    "triton": "this library, triton",
}
# Okabe and Ito's colours: told apart by colour-blind readers too.
COLORS = {
    "peer": "#D55E00",
    "jax": "#0072B2",
    "cpp": "#009E73",
    "pallas": "#CC79A7",
    "triton": "#56B4E9",
}
MARKERS = {"peer": "o", "jax": "s", "cpp": "D", "pallas": "^", "triton": "v"}


def style(name: str) -> dict[str, Any]:
    """Label, colour and marker of a contestant, for matplotlib."""
    return {"label": LABELS[name], "color": COLORS[name], "marker": MARKERS[name]}


def log_ticks(axis: Any) -> None:
    """Puts plain numbers on a logarithmic axis of matplotlib, on which all is drawn already.

    Those are 1, 2 and 5 of every decade, or 1 alone where there are many decades.
    """
    low, high = axis.get_view_interval()
    axis.set_major_locator(_ticker().LogLocator(subs=(1, 2, 5) if high < 3000 * low else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(_ticker().NullFormatter())


def over_bands(axes: Any, bands: Sequence[int]) -> None:
    """Axes, logarithmic both, of something over numbers of bands, on which all is drawn already."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(bands, [str(b) for b in bands])
    axes.xaxis.minorticks_off()
    log_ticks(axes.yaxis)
    axes.set_xlabel("bands")


def _ticker() -> Any:
    # Plots are an extra.
    import matplotlib.ticker

    return matplotlib.ticker


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Text with aligned columns, the first to the left and the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        row[0].ljust(widths[0])
        + "".join(f"  {c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))
        for row in cells
    )
