"""Rounded normal samples by their bits, computed with mpmath: what every implementation gives.

Running this writes golden_normal.csv beside it: the scale, the words of 1 / (2 scale) 2^192 of 64
bits with the lowest first, the 64 bits of a sample, its 128 further bits as two words, and the
sample. Bits are random, in the tails, at the ends, and so that the sample is nearly half way
between two integers.
"""

from __future__ import annotations

import csv
import pathlib
from fractions import Fraction

import mpmath
import numpy as np

__all__ = ["PATH", "SCALES", "is_right", "rows"]

PATH = pathlib.Path(__file__).with_suffix(".csv")
SCALES = (0.4, 3.0, 2.0**20 * 1.234, 2.0**36 * 1.1, 2.0**42)
FURTHEST = 13.0  # standard deviations; samples beyond are cut off
COUNT = 40  # of each kind
NEAREST = 50  # boundaries are missed by 2^50 2^-191 or more


def rounded(bits: int, more: int, scale: float) -> int:
    """The sample, by bisection on the boundaries between integers."""
    least, last = 0, int(FURTHEST * scale)
    v = _uniform(bits, more)
    while least < last:
        m = (least + last + 1) // 2
        least, last = (m, last) if v <= _tail(m, scale) else (least, m - 1)
    return -least if bits & 1 else least


def is_right(sample: int, bits: int, more: int, scale: float) -> bool:
    """Whether that is the sample: V is between 2 Q of the two boundaries."""
    v, size = _uniform(bits, more), abs(sample)
    near_enough = size == 0 or v <= _tail(size, scale)
    far_enough = size == int(FURTHEST * scale) or v > _tail(size + 1, scale)
    return near_enough and far_enough and (sample <= 0 if bits & 1 else sample >= 0)


def _uniform(bits: int, more: int) -> mpmath.mpf:
    """V, the middle of the interval that 63 + 128 bits leave."""
    with mpmath.workprec(260):
        return mpmath.mpf(((bits >> 1) << 128 | more) * 2 + 1) / mpmath.mpf(2) ** 192


def _tail(m: int, scale: float) -> mpmath.mpf:
    """P(scale |z| > m - 1/2)."""
    with mpmath.workprec(260):
        return mpmath.erfc((m - mpmath.mpf(1) / 2) / mpmath.mpf(scale) / mpmath.sqrt(2))


def crafted_bits(scale: float) -> list[tuple[int, int]]:
    rng = np.random.default_rng(int(scale))
    pairs = [
        (int(rng.integers(2**64, dtype=np.uint64)), int.from_bytes(rng.bytes(16), "big"))
        for _ in range(2 * COUNT)
    ]
    pairs[COUNT:] = [(bits >> 2 * i % 64, more) for i, (bits, more) in enumerate(pairs[COUNT:])]
    pairs += [(bits, more) for bits in (0, 1, 2, 2**64 - 1) for more in (0, 1, 2**128 - 1)]
    for _ in range(COUNT):
        with mpmath.workprec(260):
            v = int(_tail(int(rng.integers(1, int(4 * scale) + 2)), scale) * 2**191)
        v += int(rng.choice([-1, 1])) << int(rng.choice([NEAREST, 64, 100, 125]))
        pairs.append(((v >> 128) * 2 + int(rng.integers(2)), v & 2**128 - 1))
    return pairs


def rows() -> list[list[str]]:
    found = []
    for scale in SCALES:
        spacing = int(Fraction(2**192) / (2 * Fraction(scale)))
        words = [f"{spacing >> 64 * i & 2**64 - 1:x}" for i in range(5)]
        for bits, more in crafted_bits(scale):
            split = [f"{x:x}" for x in (bits, more >> 64, more & 2**64 - 1)]
            found.append([scale.hex(), *words, *split, str(rounded(bits, more, scale))])
    return found


if __name__ == "__main__":
    with PATH.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows())
