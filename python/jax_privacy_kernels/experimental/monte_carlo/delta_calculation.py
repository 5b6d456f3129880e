"""From samples of the privacy loss to delta, and to noise that is verified to be enough.

Verification works with two deltas. A mechanism passes if the mean over the samples of
``X = (1 - e^(epsilon - L))_+`` is at most ``base_delta``; the pipeline as a whole, which may let
pass by chance what it should not, is then ``(epsilon, overall_delta)``-DP for a somewhat larger
``overall_delta``.
The argument is that of Appendix A of https://arxiv.org/abs/2602.09338, with the Chernoff bound of
https://arxiv.org/abs/2412.16802 (Fact 4.2); ``docs/amplified_accounting.md`` spells it out.

    >>> base_delta = get_base_delta(num_samples=1_000_000, target_delta=1e-4)
    >>> get_overall_delta(1_000_000, base_delta) <= 1e-4
    True
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_privacy_kernels._checks import check_int, check_scalar, floats

__all__ = [
    "delta_from_epsilon_and_samples",
    "get_base_delta",
    "get_overall_delta",
    "minimum_samples_to_calibrate",
    "perform_calibration_from_samples",
]

_MOST_SAMPLES = 2**62


def _kl(q: Any, p: Any) -> Any:
    """The relative entropy of coins that come up with probability q and p, q <= p < 1."""
    with np.errstate(divide="ignore", invalid="ignore"):
        up = np.where(q > 0, q * np.log(q / p), 0.0)
    return up + (1 - q) * np.log1p((p - q) / (1 - p))


def _check_open(name: str, value: float) -> None:
    if not 0 < check_scalar(name, value) <= 1:
        raise ValueError(f"expected 0 < {name} <= 1, found {name}={value}")


def get_overall_delta(num_samples: int, base_delta: float, *, calibrations: int = 1) -> float:
    """The delta of a pipeline that verifies with ``base_delta`` and runs what passes.

    The pipeline tries mechanisms from the most to the least private, each with ``num_samples``
    samples of either sign, and takes the last one before the first that fails. For every t >= base
    it can take one whose true delta exceeds t only if the first such mechanism passes, which by the
    Chernoff bound has probability at most ``q = exp(-num_samples KL(base_delta, t))``. So the
    pipeline has delta at most ``t + (1 - t) q``, whatever the number of mechanisms; this is the
    least of that over t. Of K pipelines the one that is run may be chosen by what they took: each
    can err, so that K q takes the place of q.

    Args:
      num_samples: samples of either sign that every mechanism is verified with, positive.
      base_delta: what the mean over the samples may be at most, in (0, 1].
      calibrations: K, the pipelines that what is run is chosen from, at least 1.

    Returns:
      The overall delta, at most 1.

    Raises:
      ValueError: an argument is out of range.
    """
    _check_open("base_delta", base_delta)
    if not num_samples > 0:
        raise ValueError(f"expected num_samples > 0, found num_samples={num_samples}")
    calibrations = check_int("calibrations", calibrations)
    # Any t will do: the search only has to be good. Three rounds, each between the neighbours of
    # the best of the one before.
    low, high, best = math.log(base_delta), 0.0, 1.0
    for _ in range(3):
        logs = np.linspace(low, high, 257)
        t = np.minimum(np.exp(logs), 1 - 2**-53)
        t = np.maximum(t, base_delta)
        with np.errstate(under="ignore", over="ignore"):
            q = np.exp(math.log(calibrations) - num_samples * _kl(base_delta, t))
            overall = t + (1 - t) * np.minimum(q, 1.0)
        i = int(np.argmin(overall))
        best = min(best, float(overall[i]))
        low, high = logs[max(i - 1, 0)], logs[min(i + 1, len(logs) - 1)]
    return best


def minimum_samples_to_calibrate(
    base_delta: float, target_delta: float, *, calibrations: int = 1
) -> int:
    """The least number of samples for which `get_overall_delta` is at most ``target_delta``.

    Args:
      base_delta: what the mean over the samples may be at most, in (0, 1].
      target_delta: what the pipeline shall satisfy, in (0, 1] and above ``base_delta``.
      calibrations: the pipelines that what is run is chosen from, at least 1.

    Raises:
      ValueError: an argument is out of range, or they are so close that 2^62 samples do not do.
    """
    _check_open("base_delta", base_delta)
    _check_open("target_delta", target_delta)
    if target_delta <= base_delta:
        raise ValueError(
            f"expected target_delta > base_delta={base_delta}, found target_delta={target_delta}"
        )
    low, high = 0, 1  # low is too few, high is enough
    while get_overall_delta(high, base_delta, calibrations=calibrations) > target_delta:
        low, high = high, 2 * high
        if high > _MOST_SAMPLES:
            raise ValueError(
                f"expected target_delta={target_delta} to leave room above base_delta={base_delta}:"
                f" {_MOST_SAMPLES} samples are too few"
            )
    while high - low > 1:
        middle = (low + high) // 2
        if get_overall_delta(middle, base_delta, calibrations=calibrations) <= target_delta:
            high = middle
        else:
            low = middle
    return high


def get_base_delta(num_samples: int, target_delta: float, *, calibrations: int = 1) -> float:
    """The largest ``base_delta`` for which `get_overall_delta` is at most ``target_delta``.

    Args:
      num_samples: samples of either sign that every mechanism is verified with, positive.
      target_delta: what the pipeline shall satisfy, in (0, 1].
      calibrations: the pipelines that what is run is chosen from, at least 1.

    Raises:
      ValueError: an argument is out of range, or there are too few samples for any base_delta.
    """
    if not num_samples > 0:
        raise ValueError(f"expected num_samples > 0, found num_samples={num_samples}")
    _check_open("target_delta", target_delta)
    low, high = 0.0, target_delta  # in logarithms it would not matter: half of the target is usual
    for _ in range(60):
        middle = (low + high) / 2
        if get_overall_delta(num_samples, middle, calibrations=calibrations) <= target_delta:
            low = middle
        else:
            high = middle
    if low < target_delta * 1e-9:
        raise ValueError(
            f"expected enough samples to verify target_delta={target_delta} at some base_delta, "
            f"found num_samples={num_samples}"
        )
    return low


def _as_accountant(event: Any) -> Any:
    import dp_accounting  # Takes as long to import as everything else.

    if isinstance(event, dp_accounting.DpEvent):
        return dp_accounting.pld.PLDAccountant().compose(event)
    if isinstance(event, dp_accounting.pld.PLDAccountant):
        return event
    raise ValueError(f"expected other_event to be a DpEvent or a PLDAccountant, found {event!r}")


def delta_from_epsilon_and_samples(
    epsilon: float,
    samples: Sequence[float],
    counts: Sequence[float] | None = None,
    other_event: Any = None,
) -> float:
    """The mean of ``(1 - e^(epsilon - L))_+`` over samples L of the privacy loss.

    To sample the loss of P against Q, draw x from P and take ``log P(x)/Q(x)``. The mean is an
    estimate, above or below the truth; what can be claimed is for `get_overall_delta` to say.

    Args:
      epsilon: of the guarantee, at least 0.
      samples: ``[m]``; infinite ones are fine, NaN is not.
      counts: ``[m]``, how often each sample occurs, non-negative, or None for once. Samples may be
        rounded up to a grid and counted.
      other_event: a DpEvent or PLDAccountant that the mechanism is composed with, or None. The
        estimate is then the mean of its delta at ``epsilon - L``.

    Raises:
      ValueError: an argument is out of range or of the wrong shape.
    """
    losses = floats("samples", samples)
    epsilon = check_scalar("epsilon", epsilon, lambda x: x >= 0, "a number >= 0")
    if losses.ndim != 1 or losses.size == 0:
        raise ValueError(
            f"expected samples to be a non-empty 1-D array, found shape {losses.shape}"
        )
    if np.isnan(losses).any():
        raise ValueError(f"expected numbers, found samples[{np.isnan(losses).argmax()}] = nan")
    weights = None
    if counts is not None:
        weights = floats("counts", counts)
        if weights.shape != losses.shape:
            raise ValueError(
                f"expected counts of the shape of samples, {losses.shape}, found {weights.shape}"
            )
        if not (np.all(weights >= 0) and 0 < weights.sum() < math.inf):
            raise ValueError(
                f"expected counts to be non-negative and finite, some positive, found {weights}"
            )
    if other_event is None:
        values = -np.expm1(np.minimum(epsilon - losses, 0.0))
    else:
        accountant = _as_accountant(other_event)
        values = np.array([accountant.get_delta(epsilon - loss) for loss in losses])
    return float(np.average(values, weights=weights))


def perform_calibration_from_samples(
    epsilon: float,
    delta: float,
    *,
    positive_samples: Sequence[Sequence[float]],
    positive_counts: Sequence[Sequence[float]] | None = None,
    negative_samples: Sequence[Sequence[float]] | None = None,
    negative_counts: Sequence[Sequence[float]] | None = None,
    other_event: Any = None,
    calibrations: int = 1,
) -> tuple[bool, int | float]:
    """The last mechanism, from the most private on, before the first that fails verification.

    Algorithm 5 of https://arxiv.org/abs/2602.09338. Mechanisms, say noise multipliers, come in the
    order of their privacy, the most private first. Run what this returns, and all of it is
    ``(epsilon, delta)``-DP. The least number of samples in any list counts for all.

    Args:
      epsilon: of the guarantee, at least 0.
      delta: of the guarantee, in (0, 1].
      positive_samples: for every mechanism, losses of its output with the example.
      positive_counts: how often each of them occurs, or None for once.
      negative_samples: for every mechanism, losses without the example; or None, where it is known
        that the other sign is the worse.
      negative_counts: how often each of them occurs, or None for once.
      other_event: what each mechanism is composed with: one DpEvent or PLDAccountant for all, or a
        sequence of them, or None.
      calibrations: of how many calls with this delta what is run is chosen, at least 1.

    Returns:
      ``(True, i)``: take mechanism i. ``(False, base_delta)``: none passed; take one that is known
      to be ``(epsilon, base_delta)``-DP without verification.

    Raises:
      ValueError: lists do not match, or there are too few samples for delta.
    """
    lists = {
        "positive_samples": positive_samples,
        "positive_counts": positive_counts,
        "negative_samples": negative_samples,
        "negative_counts": negative_counts if negative_samples is not None else None,
    }
    for name, found in lists.items():
        optional = name != "positive_samples"
        if not isinstance(found, Sequence | np.ndarray) and not (optional and found is None):
            raise TypeError(f"expected {name} to be a list of lists, found {found!r}")
    if len(positive_samples) == 0:
        raise ValueError("expected positive_samples to be non-empty, found no lists")
    size = len(positive_samples)
    for name, found in lists.items():
        if found is not None and len(found) != size:
            raise ValueError(
                f"expected {name} for all {size} lists of positive_samples, found {len(found)}"
            )
    if isinstance(other_event, Sequence):
        if len(other_event) != size:
            raise ValueError(f"expected {size} other events, found {len(other_event)}")
        others = [_as_accountant(event) for event in other_event]
    else:
        others = [other_event and _as_accountant(other_event)] * size

    signs: list[tuple[Any, Any]] = [(positive_samples, positive_counts)]
    if negative_samples is not None:
        signs.append((negative_samples, negative_counts))
    least = min(
        floats("samples", samples[i]).size
        if counts is None
        else int(np.sum(floats("counts", counts[i])))
        for samples, counts in signs
        for i in range(size)
    )
    base_delta = get_base_delta(least, delta, calibrations=calibrations)
    for i in range(size):
        for samples, counts in signs:
            estimate = delta_from_epsilon_and_samples(
                epsilon, samples[i], None if counts is None else counts[i], others[i]
            )
            if not estimate <= base_delta:
                return (True, i - 1) if i else (False, base_delta)
    return True, size - 1


def __dir__() -> list[str]:  # for completion: no imported names
    return sorted(__all__)
