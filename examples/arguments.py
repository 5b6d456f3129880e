"""Command-line arguments of the examples: what is wrong is said in one line, before any work."""

from __future__ import annotations

import argparse
import math
import pathlib
from collections.abc import Callable
from typing import NoReturn

from matplotlib.backend_bases import FigureCanvasBase

__all__ = ["Parser", "between", "count", "output", "positive", "seed"]


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and exits with status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def count(text: str) -> int:
    """A whole number from 1 on."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, found {text}")
    return number


def positive(text: str) -> float:
    """A finite number above 0."""
    number = _number(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text}")
    return number


def between(low: float, high: float) -> Callable[[str], float]:
    """A number in [low, high)."""

    def parse(text: str) -> float:
        number = _number(text)
        if not low <= number < high:
            raise argparse.ArgumentTypeError(
                f"expected a number from {low:g} to below {high:g}, found {text}"
            )
        return number

    return parse


def seed(text: str) -> int:
    """A whole number that jax.random.key takes."""
    try:
        number = int(text)
    except ValueError:
        number = -1
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(
            f"expected a whole number from 0 to below 2^63, found {text}"
        )
    return number


def output(text: str) -> str:
    """A picture that can be written: rather found out before than after the work."""
    path = pathlib.Path(text).resolve()  # what a link leads to, which may not be there yet
    formats = FigureCanvasBase.get_supported_filetypes()
    if not path.is_dir() and path.suffix[1:].lower() not in formats:
        raise argparse.ArgumentTypeError(
            f"expected a name that ends in one of {', '.join(sorted(formats))}, found {text}"
        )
    existed = path.exists()
    try:
        with path.open("ab"):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise argparse.ArgumentTypeError(
            f"expected a file that can be written, found {text}: {reason}"
        ) from error
    if not existed:
        path.unlink()
    return text


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
