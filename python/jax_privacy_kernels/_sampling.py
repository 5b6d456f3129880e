"""Sampling schemes, ours or jax_privacy's."""

from __future__ import annotations

from typing import Any

from jax_privacy_kernels._checks import check_int
from jax_privacy_kernels.ops.privacy_loss_sums import BallsInBins, BMinSep, CyclicPoisson, Scheme

__all__ = ["as_scheme"]


def as_scheme(sampling: Any) -> tuple[Scheme, int | None]:
    """The scheme, and the size that batches are truncated to or None.

    jax_privacy need not be installed: its strategies are known by the names of their classes.

    Raises:
      ValueError: there is no Monte Carlo accounting for it.
    """
    if isinstance(sampling, Scheme):
        return sampling, None
    names = {cls.__name__ for cls in type(sampling).__mro__}
    truncated = getattr(sampling, "truncated_batch_size", None)
    if "BallsInBinsSampling" in names:
        return BallsInBins(sampling.iterations, sampling.cycle_length), None
    if "BMinSepSampling" in names:
        if truncated is not None:
            truncated = check_int("truncated_batch_size", truncated)
        return (
            BMinSep(
                sampling.iterations, sampling.min_sep, sampling.sampling_prob, sampling.warm_start
            ),
            truncated,
        )
    if "CyclicPoissonSampling" in names:
        if truncated is not None:
            raise ValueError(
                "expected CyclicPoissonSampling without truncated_batch_size, for which there is "
                f"no Monte Carlo accounting, found {truncated}"
            )
        partition = getattr(sampling.partition_type, "name", None)
        if partition != "INDEPENDENT" and sampling.cycle_length != 1:
            raise ValueError(
                "expected CyclicPoissonSampling with partition_type INDEPENDENT, found "
                f"{sampling.partition_type}"
            )
        return (
            CyclicPoisson(sampling.iterations, sampling.cycle_length, sampling.sampling_prob),
            None,
        )
    raise ValueError(
        "expected balls-in-bins, b-min-sep or cyclic Poisson sampling, found a "
        f"{type(sampling).__name__}"
    )
