"""Sampling schemes, ours or jax_privacy's."""

from __future__ import annotations

from typing import Any

from jax_privacy_kernels._checks import check_int
from jax_privacy_kernels.ops.privacy_loss_sums import BallsInBins, BMinSep, CyclicPoisson, Scheme

__all__ = ["as_scheme"]

_NAMES = ("BallsInBinsSampling", "BMinSepSampling", "CyclicPoissonSampling")


def as_scheme(sampling: Any) -> tuple[Scheme, int | None]:
    """The scheme, and the size that batches are truncated to or None.

    jax_privacy need not be installed: its strategies are known by the names of their classes.

    Raises:
      ValueError: there is no Monte Carlo accounting for it.
    """
    if isinstance(sampling, Scheme):
        return sampling, None
    name = _checked_name(sampling)
    truncated = getattr(sampling, "truncated_batch_size", None)
    if truncated is not None:
        if name != "BMinSepSampling":
            raise ValueError(
                f"expected {name} without truncated_batch_size, for which there is no Monte Carlo "
                f"accounting, found {truncated}"
            )
        truncated = check_int("truncated_batch_size", truncated)
    if name == "BallsInBinsSampling":
        return BallsInBins(sampling.iterations, sampling.cycle_length), None
    if name == "BMinSepSampling":
        return (
            BMinSep(
                sampling.iterations, sampling.min_sep, sampling.sampling_prob, sampling.warm_start
            ),
            truncated,
        )
    partition = getattr(sampling.partition_type, "name", None)
    if partition != "INDEPENDENT" and sampling.cycle_length != 1:
        raise ValueError(
            "expected CyclicPoissonSampling with partition_type INDEPENDENT, found "
            f"{sampling.partition_type}"
        )
    return CyclicPoisson(sampling.iterations, sampling.cycle_length, sampling.sampling_prob), None


def _checked_name(sampling: Any) -> str:
    """The name of jax_privacy's class that it is of, or derived from with the same batches."""
    for cls in reversed(type(sampling).__mro__):  # the base, if what is derived is named like it
        if cls.__name__ in _NAMES:
            found = getattr(sampling, "batch_iterator", None)
            if getattr(found, "__func__", None) is not vars(cls).get("batch_iterator"):
                raise ValueError(
                    f"expected the batch_iterator of {cls.__name__} itself, found one of "
                    f"{type(sampling).__qualname__}, of which nothing is known"
                )
            return cls.__name__
    raise ValueError(
        "expected balls-in-bins, b-min-sep or cyclic Poisson sampling, found a "
        f"{type(sampling).__name__}"
    )
