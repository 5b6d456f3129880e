"""Types of command-line arguments, which say what was expected before any work begins."""

from __future__ import annotations

import argparse
import math
import os
import pathlib

__all__ = ["count", "file", "output", "positive"]


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
    return pathlib.Path(text) if text == "-" else file(text)


def file(text: str) -> pathlib.Path:
    """A file that can be written."""
    path = pathlib.Path(text)
    target = path if path.exists() else path.parent
    if path.is_dir() or not target.exists() or not os.access(target, os.W_OK) or text == "-":
        raise argparse.ArgumentTypeError(f"expected a file that can be written, found {text!r}")
    return path


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"expected a number, found {text!r}")
    return number
