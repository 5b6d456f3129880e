"""Sensitivity of matrix mechanisms when one user takes part several times."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jax_privacy_kernels._checks import check_int, is_concrete

__all__ = ["minsep_true_max_participations"]


def minsep_true_max_participations(
    n: int, min_sep: int, max_participations: int | None = None
) -> int:
    """Counts how often one user can really take part in n rounds.

    Participations i < j of a user satisfy ``j - i >= min_sep``, so there are at most
    ``ceil(n / min_sep)`` of them, whatever ``max_participations`` allows.

    Args:
      n: Number of rounds, at least 1.
      min_sep: Minimum separation, at least 1; 1 allows consecutive rounds.
      max_participations: Upper limit k on the count, at least 0, or None for no limit.

    Returns:
      ``min(k, ceil(n / min_sep))``, an int. Integer tracers are accepted too, unchecked, and give a
      scalar integer array.

    Raises:
      ValueError: if an argument is below its minimum.
      TypeError: if an argument is not an integer.
    """
    concrete = is_concrete((n, min_sep, max_participations))
    if concrete:
        n, min_sep = check_int("n", n), check_int("min_sep", min_sep)
    most = -(n // -min_sep)
    if max_participations is None:
        return most
    if concrete:
        return min(check_int("max_participations", max_participations, minimum=0), most)
    traced: Any = jnp.minimum(max_participations, most)
    return traced
