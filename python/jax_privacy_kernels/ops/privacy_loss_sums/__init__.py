"""Monte Carlo sums of the privacy loss of amplified matrix mechanisms."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels._checks import check_int
from jax_privacy_kernels.ops import _coefficients, _dispatch, _ffi
from jax_privacy_kernels.ops.privacy_loss_sums import _cpp, _jax
from jax_privacy_kernels.ops.privacy_loss_sums._schemes import (
    BallsInBins,
    BMinSep,
    CyclicPoisson,
    Problem,
    Scheme,
    check_c_col,
    check_reals,
    problem,
)

__all__ = [
    "IMPLEMENTATIONS",
    "BMinSep",
    "BallsInBins",
    "CyclicPoisson",
    "PrivacyLossSums",
    "Problem",
    "Run",
    "Scheme",
    "check_c_col",
    "privacy_loss_sums",
    "problem",
]


class Run(Protocol):
    """An implementation: it gives sums, counts and maxima, float64 ``[2, s, e]``.

    key is uint32 ``[2]``, the words of a threefry2x32 key, span int64 ``[2]``, the first sample and
    the number of samples, at least 1; sample i is the function of the key and of i that
    csrc/privacy_loss_sums.h says. operands is what the scheme makes of the strategy (`Problem`);
    sigmas, margins (what is added to their losses) ``[s]`` and epsilons ``[e]`` are float64. All
    others are static: scheme is "bins", "min_sep", "min_sep_warm" or "cyclic"; n the number of
    steps; period that of modes, the separation or the cycle; p the probability to take part.
    """

    def __call__(
        self,
        key: jax.Array,
        span: jax.Array,
        operands: tuple[jax.Array, ...],
        sigmas: jax.Array,
        margins: jax.Array,
        epsilons: jax.Array,
        /,
        *,
        scheme: str,
        n: int,
        period: int,
        p: float,
    ) -> Sequence[jax.Array]: ...


# Fastest first.
IMPLEMENTATIONS: Mapping[str, _dispatch.Implementation[Run]] = {
    "cpp": _dispatch.Implementation(platforms=("cpu",), run=_cpp.run, unavailable=_ffi.unavailable),
    "jax": _dispatch.Implementation(platforms=_dispatch.PLATFORMS, run=_jax.run),
}

_STEP = 2.0**-52  # to round up after an operation, of which each is off by half as much


class PrivacyLossSums(NamedTuple):
    """What samples of the privacy loss L add up to.

    X is ``(1 - e^(epsilon - L))_+``, whose mean is delta(epsilon). The first axis is the sign: 0
    for samples of the mechanism with the example, L = log P/Q, and 1 without it, L = log Q/P.

    Attributes:
      sums: float64 ``[2, s, e]``, of X, rounded up, and at most counts.
      counts: float64 ``[2, s, e]``, the number of X that are not zero.
      maxima: float64 ``[2, s, e]``, the largest X.
      num_samples: the number of samples of each sign.
    """

    sums: np.ndarray
    counts: np.ndarray
    maxima: np.ndarray
    num_samples: int

    def __add__(self, other: PrivacyLossSums) -> PrivacyLossSums:  # type: ignore[override]
        counts = self.counts + other.counts
        return PrivacyLossSums(
            np.minimum((self.sums + other.sums) * (1 + 2 * _STEP), counts),
            counts,
            np.maximum(self.maxima, other.maxima),
            self.num_samples + other.num_samples,
        )


def privacy_loss_sums(
    sampling: Scheme,
    c_col: Any,
    noise_multipliers: Any,
    epsilons: Any,
    *,
    key: Any,
    num_samples: int,
    first_sample: int = 0,
    implementation: str | None = None,
) -> PrivacyLossSums:
    """Samples privacy losses of a matrix mechanism, for both signs, and adds up what is needed.

    The strategy C is lower-triangular Toeplitz with first column ``c_col``, the noise has standard
    deviation ``noise_multiplier`` times the clip norm, and adjacent datasets differ by one example
    being zeroed out. P is the output for the example's random participations, Q without it.

    All in float64, whatever JAX's x64 mode. A sample is a function of the key and of its number:
    the result is the same for any number of threads, and samples 0 .. 9 are those of two calls for
    0 .. 4 and 5 .. 9, up to the rounding of sums. All noise multipliers and both signs share the
    normal numbers of a sample. Losses are rounded up by more than the error of their computation.

    Cost: memory does not depend on ``num_samples``. A sample takes O(m b) and O(m) for every noise
    multiplier with m bins, whatever the number of steps; O(n b) and O(n) with sequences of n steps.

    Args:
      sampling: how examples take part.
      c_col: ``[b]``, non-negative and not all zero, at most as long as there are steps, and as
        the scheme allows.
      noise_multipliers: ``[s]`` or a scalar, from 1e-6 to 1e6.
      epsilons: ``[e]`` or a scalar, finite; negative ones are allowed.
      key: a threefry2x32 key, typed or ``uint32[2]``.
      num_samples: of each sign, at least 1.
      first_sample: the number of the first sample, at least 0.
      implementation: "jax", "cpp", or None for the fastest.

    Returns:
      Sums, counts and maxima, NumPy arrays.

    Raises:
      ValueError: an argument is out of its range, what it asks for does not fit into memory, or
        the implementation cannot run here.
      TypeError: an argument is of the wrong type.
    """
    prepared = problem(sampling, c_col)
    sigmas = _vector("noise_multipliers", noise_multipliers, 1e-6, 1e6)
    eps = _vector("epsilons", epsilons, -1e6, 1e6)
    prepared.check_memory(sigmas.size, eps.size)
    num_samples = check_int("num_samples", num_samples)
    first_sample = check_int("first_sample", first_sample, 0)
    last = first_sample + num_samples
    most = prepared.most_samples
    if last > most:
        raise ValueError(f"expected first_sample + num_samples <= {most}, found {last}")
    span = np.array([first_sample, num_samples], np.int64)
    name = _dispatch.requested("privacy_loss_sums", IMPLEMENTATIONS, implementation)
    with jax.enable_x64(True):
        out = _call(
            _words(key),
            span,
            prepared.operands,
            sigmas,
            prepared.margins(sigmas),
            eps,
            name=name,
            **prepared.static,
        )
        sums, counts, maxima = (np.array(x) for x in out)
    if not np.all(np.isfinite(sums)):
        raise ValueError(
            f"privacy losses are not numbers for noise_multipliers={sigmas}, c_col={c_col}"
        )
    # In any order, the sum of n terms that are not negative loses less than n half steps of itself.
    # No X exceeds 1, so that counts bound the sums, and are exact.
    rounded = np.minimum(sums * (1 + num_samples * _STEP), counts)
    return PrivacyLossSums(rounded, counts, maxima, num_samples)


@functools.partial(jax.jit, static_argnames=("name", "scheme", "n", "period", "p"))
def _call(*arrays: Any, name: str | None, **static: Any) -> Any:
    return _coefficients.call("privacy_loss_sums", IMPLEMENTATIONS, name, *arrays, **static)


def _vector(name: str, values: Any, least: float, most: float) -> np.ndarray:
    array = np.atleast_1d(check_reals(name, values))
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"expected {name} to be a number or 1-D array, found shape {array.shape}")
    bad = np.flatnonzero(~((array >= least) & (array <= most)))
    if bad.size:
        raise ValueError(
            f"expected {name} from {least:g} to {most:g}, found {name}[{bad[0]}] = {array[bad[0]]}"
        )
    return array


def _words(key: Any) -> np.ndarray:
    """The two words of a threefry2x32 key, typed or raw."""
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        implementation = str(jax.random.key_impl(key))
        if implementation != "threefry2x32":
            raise ValueError(f"expected a key of type threefry2x32, found {implementation}")
        key = jax.random.key_data(key)
    words = np.asarray(key)
    if words.shape != (2,) or words.dtype != np.uint32:
        raise ValueError(
            f"expected key to be one threefry2x32 key, or uint32[2], found {words.dtype} of shape "
            f"{words.shape}"
        )
    return words
