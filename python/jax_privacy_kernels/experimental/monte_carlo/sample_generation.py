"""Samples from the dominating pair of an amplified matrix mechanism, and their privacy losses.

The strategy C is lower-triangular Toeplitz with non-negative coefficients ``c_col``. With the
example, the output of the mechanism is y ~ P, a mixture of ``N(C x, sigma^2 I)`` over the example's
random participations x; without it, y ~ Q = ``N(0, sigma^2 I)``. Adjacency is zero-out: without it,
the example is there, but counts as zero.

For accounting prefer `jax_privacy_kernels.monte_carlo`, which samples the losses alone.

    >>> sampling = BallsInBins(iterations=20, cycle_length=5)
    >>> generate_sample(sampling, 2.0, [1.0, 0.5], seed=0, num_samples=3).shape
    (20, 3)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import signal, special

from jax_privacy_kernels import _sampling
from jax_privacy_kernels._checks import check_int, check_memory, check_scalar, floats
from jax_privacy_kernels.ops.privacy_loss_sums import (
    BallsInBins,
    BMinSep,
    CyclicPoisson,
    check_c_col,
)

__all__ = ["compute_privacy_loss", "generate_sample", "get_privacy_loss_sample"]

Seed = int | np.random.Generator | None


def generate_sample(
    strategy: Any,
    noise_multiplier: float,
    c_col: np.ndarray,
    seed: Seed = None,
    positive_sample: bool = True,
    num_samples: int | None = None,
    dataset_size: int | None = None,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Draws outputs of the mechanism, with or without the example.

    The law is that of jax_privacy's function, the stream is not. O(n) memory per sample.

    Args:
      strategy: a `BallsInBinsSampling`, `BMinSepSampling` or `CyclicPoissonSampling` of
        jax_privacy.batch_selection, or a scheme of `jax_privacy_kernels.monte_carlo`.
      noise_multiplier: sigma, at least 0, for a clip norm of 1 and whatever the norm of c_col.
      c_col: ``[b]``, non-negative; what exceeds the number of steps is cut off.
      seed: of NumPy's generator.
      positive_sample: whether the example takes part: samples of P, else of Q.
      num_samples: how many; None is one, without an axis of its own.
      dataset_size: the number of examples, for b-min-sep with truncated batches and only there.

    Returns:
      float64 ``[n]`` or ``[n, num_samples]``. With truncated batches a pair: y, and the sizes of
      the batches before truncation and without the example, int64 of the same shape.

    Raises:
      ValueError: an argument is out of range, or the strategy is none that is known.
    """
    noise_multiplier = check_scalar("noise_multiplier", noise_multiplier)
    if not noise_multiplier >= 0:
        raise ValueError(f"expected noise_multiplier >= 0, found {noise_multiplier}")
    scheme, truncated = _sampling.as_scheme(strategy)
    c = _column(scheme, c_col)
    n = scheme.iterations
    count = 1 if num_samples is None else check_int("num_samples", num_samples)
    check_memory("num_samples", count, 24 * n * count)
    rng = np.random.default_rng(seed)
    rest = None
    if truncated is not None:
        if dataset_size is None:
            raise ValueError("expected dataset_size with truncated batches, found None")
        dataset_size = check_int("dataset_size", dataset_size)
        assert isinstance(scheme, BMinSep)
        rest = _other_examples(scheme, dataset_size, rng, count)
    elif dataset_size is not None:
        raise ValueError(
            f"expected no dataset_size without truncated batches, found {dataset_size}"
        )

    y = np.zeros((n, count))
    if isinstance(scheme, BallsInBins):
        if positive_sample:
            mode = np.concatenate([np.zeros(scheme.cycle_length - 1), _first_mode(scheme, c)])
            first = rng.integers(0, scheme.cycle_length, count)
            y[:] = mode[np.arange(n)[:, None] + scheme.cycle_length - 1 - first]
    elif positive_sample or rest is not None:
        column = np.arange(count)
        for steps in _participations(scheme, rng, count):
            taken = steps < n
            at, who = steps[taken], column[taken]
            size = np.full(at.size, float(positive_sample))
            if rest is not None and truncated is not None:
                # Where the batch overflows, another example is dropped for this one, or this one.
                others = rest[at, who]
                kept = rng.random(at.size) < truncated / (others + 1)
                size = np.where(
                    others < truncated, size, np.where(kept, 2.0 if positive_sample else -1.0, 0.0)
                )
            for k, coefficient in enumerate(c):
                inside = at + k < n
                y[at[inside] + k, who[inside]] += coefficient * size[inside]
    y += rng.normal(scale=noise_multiplier, size=y.shape)
    if num_samples is None:
        y, rest = y[:, 0], None if rest is None else rest[:, 0]
    return y if rest is None else (y, rest)


def compute_privacy_loss(
    strategy: Any,
    sample: np.ndarray,
    noise_multiplier: float,
    c_col: np.ndarray,
    aux: np.ndarray | None = None,
) -> float | np.ndarray:
    """``log P(y) / Q(y)``; its negative is the loss of samples of Q.

    Args:
      strategy: what the sample was generated with.
      sample: y, ``[n]`` or ``[n, samples]``.
      noise_multiplier: sigma, positive.
      c_col: ``[b]``, non-negative; what exceeds the number of steps is cut off.
      aux: the sizes that `generate_sample` gave, with truncated batches, else None.

    Returns:
      A number, or float64 ``[samples]``.

    Raises:
      ValueError: an argument is out of range or does not go with the strategy.
    """
    noise_multiplier = check_scalar("noise_multiplier", noise_multiplier)
    if not noise_multiplier > 0:
        raise ValueError(f"expected noise_multiplier > 0, found {noise_multiplier}")
    if not 1e-150 <= noise_multiplier <= 1e150:  # or its square is beyond floats
        raise ValueError(
            f"expected noise_multiplier between 1e-150 and 1e150, found {noise_multiplier}"
        )
    scheme, truncated = _sampling.as_scheme(strategy)
    c = _column(scheme, c_col)
    y = floats("sample", sample)
    if y.ndim not in (1, 2) or y.shape[0] != scheme.iterations:
        raise ValueError(
            f"expected sample of shape [{scheme.iterations}] or [{scheme.iterations}, samples], "
            f"found {y.shape}"
        )
    if (truncated is None) != (aux is None):
        raise ValueError("expected aux with truncated batches, and only there")
    rest = None
    if aux is not None:
        rest = np.asarray(aux)
        if rest.shape != y.shape:
            raise ValueError(f"expected aux of the shape of sample, {y.shape}, found {rest.shape}")
        rest = rest.reshape(y.shape[0], -1)
    columns = y.reshape(y.shape[0], -1)
    products = _correlate(c, columns)  # <c_i, y>
    variance = noise_multiplier**2
    if isinstance(scheme, BallsInBins):
        loss = _bins_loss(scheme, c, products, variance)
    else:
        norms = np.cumsum(c**2)[np.minimum(c.size, y.shape[0] - np.arange(y.shape[0])) - 1]
        norms = norms[:, None]
        ratio = (products - norms / 2) / variance
        if isinstance(scheme, CyclicPoisson):
            loss = _cyclic_loss(scheme, ratio)
        elif rest is None or truncated is None:
            loss = _min_sep_loss(scheme, ratio)
        else:
            # Both are mixtures now: their ratios to N(0, sigma^2 I), and the difference of these.
            with np.errstate(divide="ignore"):
                kept = np.log(truncated / (rest + 1.0))
                dropped = np.log1p(-truncated / np.maximum(rest + 1.0, truncated))
            cut = rest >= truncated
            double = np.logaddexp(kept + (2 * products - 2 * norms) / variance, dropped)
            minus = np.logaddexp(kept - (products + norms / 2) / variance, dropped)
            loss = _min_sep_loss(scheme, np.where(cut, double, ratio))
            loss = loss - _min_sep_loss(scheme, np.where(cut, minus, 0.0))
    return float(loss[0]) if y.ndim == 1 else loss


def get_privacy_loss_sample(
    strategy: Any,
    noise_multiplier: float,
    c_col: np.ndarray,
    seed: Seed = None,
    positive_sample: bool = True,
    num_samples: int | None = None,
    dataset_size: int | None = None,
) -> tuple[float | np.ndarray, np.ndarray | tuple[np.ndarray, np.ndarray]]:
    """Samples of the privacy loss: `generate_sample`, then `compute_privacy_loss`.

    The loss is ``log P/Q`` with the example, and ``log Q/P`` without it. Arguments and errors are
    those of `generate_sample`; the noise multiplier has to be positive.

    Returns:
      The losses, a number or float64 ``[num_samples]``, and what `generate_sample` returned.
    """
    made = generate_sample(
        strategy, noise_multiplier, c_col, seed, positive_sample, num_samples, dataset_size
    )
    y, aux = made if isinstance(made, tuple) else (made, None)
    loss = compute_privacy_loss(strategy, y, noise_multiplier, c_col, aux)
    return loss if positive_sample else -loss, made


def _column(scheme: Any, c_col: Any) -> np.ndarray:
    """The coefficients that count; a ValueError if the analysis of the scheme allows fewer."""
    c = check_c_col(c_col)[: scheme.iterations]
    period = {BMinSep: "min_sep", CyclicPoisson: "cycle_length"}.get(type(scheme))
    if period is not None and c.size > getattr(scheme, period):
        raise ValueError(
            f"expected c_col to have at most {period}={getattr(scheme, period)} coefficients, "
            f"found {c.size}"
        )
    return c


def _first_mode(scheme: BallsInBins, c: np.ndarray) -> np.ndarray:
    """C x for the bin whose turn comes first; those of the others are shifted."""
    x = np.arange(scheme.iterations) % scheme.cycle_length == 0
    return np.convolve(c, x)[: x.size]


def _correlate(c: np.ndarray, y: np.ndarray) -> np.ndarray:
    """C^T y."""
    if c.size == 1:
        return c[0] * y
    return signal.fftconvolve(y, c[::-1, None], axes=0)[c.size - 1 :]


def _participations(scheme: Any, rng: np.random.Generator, count: int) -> Any:
    """The steps of the first, second, ... participation of the example in every sample."""
    n, p = scheme.iterations, scheme.sampling_prob
    if p == 0:
        return
    if isinstance(scheme, CyclicPoisson):
        turn = rng.integers(0, scheme.cycle_length, count)
        for first in range(0, n, scheme.cycle_length):
            yield np.where(rng.random(count) < p, first + turn, n)
        return
    b = scheme.min_sep
    last = np.full(count, -b)
    if scheme.warm_start:
        last = rng.choice(b, p=_warm_start(b, p), size=count) - b
    while last.min() < n:
        last = np.minimum(last + b - 1 + rng.geometric(p, size=count), n)
        yield last


def _warm_start(b: int, p: float) -> np.ndarray:
    """How likely the last participation is at -b or before, at -b + 1, ..., at -1."""
    weights = np.full(b, p)
    weights[0] = 1
    return weights / (1 + (b - 1) * p)


def _other_examples(
    scheme: BMinSep, dataset_size: int, rng: np.random.Generator, count: int
) -> np.ndarray:
    """Sizes of the batches of all examples but one before truncation, int64 ``[n, count]``."""
    n, b, p, others = scheme.iterations, scheme.min_sep, scheme.sampling_prob, dataset_size - 1
    sizes = np.zeros((b + n, count), np.int64)  # the first b are before the start
    if scheme.warm_start:
        # Those at -b or before are open at the start, as are those who never took part.
        sizes[:b] = rng.multinomial(others, _warm_start(b, p), size=count).T
        sizes[0] = 0
    for i in range(b, b + n):
        closed = sizes[i - b + 1 : i].sum(axis=0)
        sizes[i] = rng.binomial(others - closed, p)
    return sizes[b:]


def _bins_loss(
    scheme: BallsInBins, c: np.ndarray, products: np.ndarray, variance: float
) -> np.ndarray:
    n, cycle = scheme.iterations, scheme.cycle_length
    rows = -(-n // cycle)
    padded = np.concatenate([products, np.zeros((rows * cycle - n, products.shape[1]))])
    by_mode = padded.reshape(rows, cycle, -1).sum(axis=0)  # <C x_i, y>
    squares = np.concatenate([[0.0], np.cumsum(_first_mode(scheme, c) ** 2)])
    norms = squares[np.maximum(n - np.arange(cycle), 0)]
    terms = (by_mode - norms[:, None] / 2) / variance
    return special.logsumexp(terms, axis=0) - np.log(cycle)


def _cyclic_loss(scheme: CyclicPoisson, ratio: np.ndarray) -> np.ndarray:
    n, cycle, p = scheme.iterations, scheme.cycle_length, scheme.sampling_prob
    with np.errstate(divide="ignore"):
        terms = np.logaddexp(np.log1p(-p), np.log(p) + ratio)
    rows = -(-n // cycle)
    padded = np.concatenate([terms, np.zeros((rows * cycle - n, ratio.shape[1]))])
    by_mode = padded.reshape(rows, cycle, -1).sum(axis=0)
    return special.logsumexp(by_mode, axis=0) - np.log(cycle)


def _min_sep_loss(scheme: BMinSep, ratio: np.ndarray) -> np.ndarray:
    """The recurrence of Section 4 of https://arxiv.org/abs/2602.09338, in logarithms."""
    b, p = scheme.min_sep, scheme.sampling_prob
    with np.errstate(divide="ignore"):
        log_p, log_rest = np.log(p), np.log1p(-p)
    ring = np.zeros((b, ratio.shape[1]))  # what follows step i, at i % b
    after = np.zeros(ratio.shape[1])
    for i in reversed(range(len(ratio))):
        after = np.logaddexp(log_rest + after, log_p + ratio[i] + ring[i % b])
        ring[i % b] = after
    if not scheme.warm_start:
        return after
    ring[1:] += log_p
    return special.logsumexp(ring, axis=0) - np.log1p((b - 1) * p)


def __dir__() -> list[str]:  # for completion: no imported names
    return sorted(__all__)
