"""The golden table of the look-ahead schedule, against which every copy of it is checked.

The definition, in words, from ops/correlated_noise/_schedule.py: every S tiles in a row have all
phases, one after the other, and from each S tiles to the next the phases shift by one; the first
tile of a leaf goes on where the leaf before ended. A tile makes S terms at the steps of its phase,
before that one term a step, and else none. `python tests/support/golden_schedule.py` writes the
table, golden_schedule.csv.
"""

from __future__ import annotations

import csv
import itertools
import pathlib
from typing import NamedTuple

__all__ = ["FILE", "Row", "load", "phases", "visits"]

FILE = pathlib.Path(__file__).with_suffix(".csv")


class Row(NamedTuple):
    """What a tile does at a step: it makes ``terms`` terms, the first of them in ``slot``."""

    slots: int
    first_tile: int
    tile: int
    step: int
    terms: int
    slot: int


def phases(slots: int, first_tile: int, tiles: int) -> list[int]:
    """The phases of the first tiles of a leaf, counted out one by one."""
    start = first_tile  # the phase of the first of S tiles, not yet reduced
    of_tile: list[int] = []
    while len(of_tile) < tiles:
        of_tile += [(start + place) % max(slots, 1) for place in range(max(slots, 1))]
        start += 1
    return of_tile[:tiles]


def visits(slots: int, first_tile: int, tiles: int, steps: int) -> list[Row]:
    """The rows of the first tiles of a leaf."""
    rows = []
    of_tile = phases(slots, first_tile, tiles)
    for tile, step in itertools.product(range(tiles), range(steps)):
        turn = step % slots == of_tile[tile] if slots else True
        seen = any(t % slots == of_tile[tile] for t in range(step)) if slots else True
        terms = max(slots, 1) if turn else 0 if seen else 1
        rows.append(Row(slots, first_tile, tile, step, terms, step % slots if slots else 0))
    return rows


def load() -> list[Row]:
    """The table as it was written."""
    with FILE.open(newline="") as file:
        return [Row(*map(int, row.values())) for row in csv.DictReader(file)]


def main() -> None:
    with FILE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        for slots, first_tile in itertools.product((0, 1, 2, 3, 4, 7), (0, 5)):
            writer.writerows(visits(slots, first_tile, 3 * slots + 2, 2 * slots + 2))


if __name__ == "__main__":
    main()
