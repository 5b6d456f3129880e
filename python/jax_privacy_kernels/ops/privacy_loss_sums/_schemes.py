"""How examples are sampled, and what that makes of a strategy: the operands of the kernels."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from typing import Any, NamedTuple

import numpy as np

from jax_privacy_kernels._checks import check_int, check_memory, check_scalar

__all__ = ["BMinSep", "BallsInBins", "CyclicPoisson", "Problem", "Scheme", "check_c_col", "problem"]

MOST_SAMPLES = 2**44  # for which sums are rounded up by less than half a percent
_LARGEST_NORMAL = 8.3  # no sample of 52 bits is larger
_ROW = 256  # bytes of one number of every sample that is made together


@dataclasses.dataclass(frozen=True)
class BallsInBins:
    """Every example falls into one of ``cycle_length`` bins and takes part when its bin's turn is.

    Step t is the turn of bin ``t % cycle_length``, https://arxiv.org/abs/2410.06266. The analysis
    holds for every non-negative lower-triangular strategy: c may be longer than the cycle.

    Attributes:
      iterations: n, the number of steps, at least 1.
      cycle_length: the number of bins, at least 1.
    """

    iterations: int
    cycle_length: int

    def __post_init__(self) -> None:
        _check_ints(self, "iterations", "cycle_length")


@dataclasses.dataclass(frozen=True)
class BMinSep:
    """Every step takes each example that is open with a probability; then it is closed for a while.

    b-min-sep sampling, https://arxiv.org/abs/2602.09338. The analysis holds for non-negative
    strategies of at most ``min_sep`` bands.

    Attributes:
      iterations: n, the number of steps, at least 1.
      min_sep: the least distance of two participations of an example, at least 1.
      sampling_prob: the probability that an open example is taken, in [0, 1].
      warm_start: whether examples start as if the process had been running for long, as opposed to
        all being open.
    """

    iterations: int
    min_sep: int
    sampling_prob: float
    warm_start: bool = True

    def __post_init__(self) -> None:
        _check_ints(self, "iterations", "min_sep")
        _check_probability(self)
        if not isinstance(self.warm_start, bool | np.bool_):
            raise TypeError(f"expected warm_start to be True or False, found {self.warm_start!r}")
        object.__setattr__(self, "warm_start", bool(self.warm_start))


@dataclasses.dataclass(frozen=True)
class CyclicPoisson:
    """As `BallsInBins`, but an example is left out of every turn of its bin with a probability.

    The analysis holds for non-negative strategies of at most ``cycle_length`` bands. A cycle of one
    step is Poisson sampling.

    Attributes:
      iterations: n, the number of steps, at least 1.
      cycle_length: the number of bins, at least 1.
      sampling_prob: the probability that an example takes part in a turn of its bin, in [0, 1].
    """

    iterations: int
    cycle_length: int
    sampling_prob: float

    def __post_init__(self) -> None:
        _check_ints(self, "iterations", "cycle_length")
        _check_probability(self)


Scheme = BallsInBins | BMinSep | CyclicPoisson


def _check_ints(scheme: Any, *names: str) -> None:
    """Keeps Python's numbers, whatever they were given as: schemes are compared and hashed."""
    for name in names:
        object.__setattr__(scheme, name, check_int(name, getattr(scheme, name)))


def _check_probability(scheme: Any) -> None:
    p = check_scalar("sampling_prob", scheme.sampling_prob)
    if not 0 <= p <= 1:
        raise ValueError(f"expected 0 <= sampling_prob <= 1, found sampling_prob={p}")
    object.__setattr__(scheme, "sampling_prob", p)


def check_reals(name: str, values: Any) -> np.ndarray:
    """Values as float64; a TypeError unless they are real numbers."""
    try:
        array = np.asarray(values)
        if array.dtype.kind in "cOSUmM":
            raise TypeError
        return array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"expected {name} to hold real numbers, found {values!r}") from error


def check_c_col(c_col: Any) -> np.ndarray:
    """c_col as float64 ``[b]``, checked.

    Raises a ValueError unless it is 1-D, finite and non-negative, b >= 1, and a TypeError unless
    it holds real numbers.
    """
    c = check_reals("c_col", c_col)
    if c.ndim != 1 or c.size == 0:
        raise ValueError(f"expected c_col to be a non-empty 1-D array, found shape {c.shape}")
    bad = np.flatnonzero(~(np.isfinite(c) & (c >= 0)))
    if bad.size:
        raise ValueError(
            f"expected c_col to be finite and non-negative, found c_col[{bad[0]}] = {c[bad[0]]}"
        )
    return c


class Problem(NamedTuple):
    """A scheme and a strategy, as the kernels take them.

    Attributes:
      operands: float64 arrays; (gram, factor), both ``[m, m]``, for "bins", else (c,), ``[b]``.
      static: the keywords scheme, n, period and p of the kernels.
      sensitivity: the largest norm of ``C x`` over all x that can occur: that of the mechanism
        without amplification.
      margins: maps noise multipliers ``[s]`` to what their losses have to be rounded up by.
    """

    operands: tuple[np.ndarray, ...]
    static: dict[str, Any]
    sensitivity: float
    reach: tuple[float, float]
    operations: float
    takes: float

    def margins(self, sigmas: np.ndarray) -> np.ndarray:
        """More than the errors of losses in float64, ``[s]``.

        No term of a loss exceeds ``reach``; each of the operations adds a few units in the last
        place of what has been added up by then, ``takes`` terms at most.
        """
        by_noise, by_signal = self.reach
        reach = by_noise / sigmas + by_signal / sigmas**2
        return 2.0**-48 * self.operations * (1 + self.takes * reach)

    @property
    def most_samples(self) -> int:
        """Counters of 63 bits: every sample has n + 1 of its own, or one for every mode."""
        return min(MOST_SAMPLES, 2**63 // (self.static["n"] + self.static["period"] + 1))

    def check_memory(self, sigmas: int = 1, epsilons: int = 1) -> None:
        """Raises a ValueError if the arrays of so many noise multipliers and epsilons do not fit.

        Every thread has states of its own, and every strand of samples, of which there are 128,
        sums.
        """
        static = self.static
        threads = os.cpu_count() or 1
        if static["scheme"] != "bins":
            name = "cycle_length" if static["scheme"] == "cyclic" else "min_sep"
            period, n = static["period"], static["n"]
            check_memory(name, period, threads * 2 * sigmas * (period + 2) * _ROW)
            check_memory("iterations", n, threads * 2 * (n // period + 2) * _ROW)
        cells = sigmas * epsilons
        check_memory("noise_multipliers times epsilons", cells, 128 * 2 * cells * 3 * _ROW)


def problem(scheme: Scheme, c_col: Any) -> Problem:
    """Checks a strategy against a scheme, and prepares the operands; cached.

    Raises a ValueError if there are more coefficients than steps, or more than the analysis of the
    scheme allows, if C x is too large or too small to be squared, or if the arrays of one noise
    multiplier do not fit into memory.
    """
    c = check_c_col(c_col)
    if c.size > scheme.iterations:
        raise ValueError(
            f"expected c_col to have at most iterations={scheme.iterations} coefficients, "
            f"found {c.size}"
        )
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return _problem(scheme, c.tobytes())


@functools.lru_cache(maxsize=4)
def _problem(scheme: Scheme, data: bytes) -> Problem:
    c = np.frombuffer(data)
    n = scheme.iterations
    if isinstance(scheme, BallsInBins):
        # The Gram matrix, its factor, what it takes to find that, and copies for the kernel; modes
        # in extended precision.
        check_memory("cycle_length", scheme.cycle_length, 6 * 8 * scheme.cycle_length**2)
        check_memory("iterations", n, 4 * 16 * n)
        gram = _gram(c, n, scheme.cycle_length)
        modes, largest = len(gram), float(np.max(np.diag(gram)))
        _check_square(largest, c)
        return Problem(
            operands=(gram, _factor(gram)),
            static={"scheme": "bins", "n": n, "period": modes, "p": 1.0},
            sensitivity=math.sqrt(largest),
            reach=(_LARGEST_NORMAL * math.sqrt(modes * largest), 2 * largest),
            operations=modes + 16,
            takes=1,
        )
    if isinstance(scheme, BMinSep):
        name, period = "min_sep", scheme.min_sep
        kind = "min_sep_warm" if scheme.warm_start else "min_sep"
    else:
        name, period, kind = "cycle_length", scheme.cycle_length, "cyclic"
    if c.size > period:
        raise ValueError(
            f"expected c_col to have at most {name}={period} coefficients, found {c.size}: the "
            "analysis of this sampling scheme holds for no more bands"
        )
    squares = np.cumsum(c**2)
    # The most participations there can be, the first at step 0: the columns do not overlap, and
    # only the last may be cut off.
    total, before = float(squares[-1]), (n - 1) // period
    last = float(squares[min(n - before * period, c.size) - 1])
    _check_square(before * total + last, c)
    result = Problem(
        operands=(c,),
        static={"scheme": kind, "n": n, "period": period, "p": scheme.sampling_prob},
        sensitivity=math.sqrt(before * total + last),
        reach=(_LARGEST_NORMAL * float(c.sum()), 2.5 * total),
        operations=n + period + c.size,
        takes=n // period + 1,
    )
    result.check_memory()
    return result


def _check_square(value: float, c: np.ndarray) -> None:
    if not 1e-280 <= value <= 1e280:
        raise ValueError(
            "expected c_col for which C x has a squared norm from 1e-280 to 1e280, found "
            f"{value:g} for c_col of max {c.max():g}"
        )


def _gram(c: np.ndarray, n: int, cycle_length: int) -> np.ndarray:
    """Inner products of the modes C x_i, x_i being 1 at i, i + cycle_length, ...; O(n m).

    Mode i is mode 0, shifted by i, so that ``G[i, i + d] = sum_{t < n - i} m_0[t] m_0[t - d]``: one
    sum of products for every d, in extended precision where the machine has it.
    """
    x = np.arange(n) % cycle_length == 0
    mode = np.zeros(n + c.size - 1, np.longdouble)
    for k, coefficient in enumerate(c):
        mode[k : k + n] += coefficient * x
    mode = mode[:n]
    count = cycle_length
    gram = np.zeros((count, count))
    within = min(count, n)  # modes that start later are zero
    for d in range(within):
        sums = np.cumsum(mode[d:] * mode[: n - d])  # over t = d, d + 1, ...
        i = np.arange(within - d)  # rows; i + d is the column
        gram[i, i + d] = gram[i + d, i] = sums[n - 1 - d - i]
    return gram


def _factor(gram: np.ndarray) -> np.ndarray:
    """F with F F^T = gram: lower triangular, or whatever it takes if gram is close to singular."""
    largest = np.max(np.diag(gram))
    try:
        factor = np.linalg.cholesky(gram)
        if np.min(np.diag(factor)) ** 2 > 1e-10 * largest:
            return factor
    except np.linalg.LinAlgError:
        pass
    values, vectors = np.linalg.eigh(gram)
    factor = vectors * np.sqrt(np.maximum(values, 0))
    factor[np.diag(gram) == 0] = 0
    return factor
