"""Types of command-line arguments, which say what was expected before any work begins."""

from __future__ import annotations

import argparse
import math
import os
import pathlib

__all__ = ["count", "output", "picture", "positive"]


def count(text: str) -> int:
    """A whole number from 1 on, also as 1e6."""
    number = _number(text)
    if number < 1 or number != int(number):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, found {text!r}")
    return int(number)


def positive(text: str) -> float:
    """A finite number above 0."""
    number = _number(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")
    return number


def output(text: str) -> pathlib.Path:
    """A file that can be written; "-" is standard output."""
    path = pathlib.Path(text)
    if text != "-" and not _can_be_written(path):
        raise argparse.ArgumentTypeError(f"expected a file that can be written, found {text!r}")
    return path


def picture(text: str) -> pathlib.Path:
    """A file that can be written, in a format that matplotlib draws."""
    path = output(text)
    try:
        # An extra.
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise argparse.ArgumentTypeError(
            "matplotlib is not installed: pip install matplotlib"
        ) from error
    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise argparse.ArgumentTypeError(
            f"expected a picture, whose name ends in one of {', '.join(sorted(formats))}, "
            f"found {text!r}"
        )
    return path


def _can_be_written(path: pathlib.Path) -> bool:
    """Whether it can be; nothing is left behind."""
    path = path.resolve()  # what a link leads to, which may not be there yet
    try:
        if path.exists():
            return not path.is_dir() and os.access(path, os.W_OK)
        path.touch(exist_ok=False)
        path.unlink()
    except OSError:
        return False
    return True


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"expected a number, found {text!r}")
    return number
