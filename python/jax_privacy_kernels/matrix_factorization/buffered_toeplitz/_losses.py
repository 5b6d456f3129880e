"""Sensitivity, error and loss of BLTs."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, ParamSpec, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels._checks import (
    check_instance,
    check_int,
    is_concrete,
    is_tracing,
    promote_types,
    standard_promotion,
)
from jax_privacy_kernels._mirrored import Mirrored
from jax_privacy_kernels.matrix_factorization import sensitivity, toeplitz
from jax_privacy_kernels.matrix_factorization._scaling import as_dtype
from jax_privacy_kernels.matrix_factorization._workloads import known_workload
from jax_privacy_kernels.matrix_factorization.buffered_toeplitz._matrix import (
    BufferedToeplitz,
    check_float64_dtype,
    min_buf_decay_gap,
    values_of,
)
from jax_privacy_kernels.matrix_factorization.buffered_toeplitz._sums import (
    MAX_COEFS,
    Arithmetic,
    Array,
    Count,
    as_count,
    is_ratio,
    result,
    rounding,
    series,
    squares_of_coefs,
    sum_of_squares,
)

__all__ = [
    "LossFn",
    "iteration_error",
    "limit_max_error",
    "limit_max_loss",
    "max_error",
    "max_loss",
    "require_buf_decay_less_eq_one",
    "require_output_scale_gt_zero",
    "sensitivity_squared",
]

P = ParamSpec("P")
_OfBlt: TypeAlias = Callable[Concatenate[BufferedToeplitz, P], jax.Array]
_Scalar: TypeAlias = Callable[[BufferedToeplitz], jax.Array]


def _scalar(
    x: jax.typing.ArrayLike, blt: BufferedToeplitz, name: str = "", *, upward: bool = False
) -> jax.Array:
    """x in the dtype of a result of the BLT; given a name, a ValueError if it does not hold it."""
    dtype = promote_types(blt.dtype, jnp.float32)
    if name and is_concrete(x):
        return as_dtype(name, x, dtype, upward=upward)
    return result(x, dtype)


def _infinite_if(
    is_bad: Callable[[Array, Array, Arithmetic], Array], blt_fn: _OfBlt[P]
) -> _OfBlt[P]:
    @functools.wraps(blt_fn)
    def wrapped(blt: BufferedToeplitz, *args: P.args, **kwargs: P.kwargs) -> jax.Array:
        bad = is_bad(*values_of(blt))
        if is_concrete(bad):
            return _scalar(jnp.inf, blt) if bad else blt_fn(blt, *args, **kwargs)
        out = jax.eval_shape(lambda: blt_fn(blt, *args, **kwargs))
        return jax.lax.cond(
            bad,
            lambda: jnp.full(out.shape, jnp.inf, out.dtype),
            lambda: blt_fn(blt, *args, **kwargs),
        )

    return wrapped


def require_buf_decay_less_eq_one(blt_fn: _OfBlt[P]) -> _OfBlt[P]:
    """Makes a function of a BLT, and more, infinite where a decay is above 1."""
    return _infinite_if(lambda theta, omega, on: on.xp.any(theta > 1), blt_fn)


def require_output_scale_gt_zero(blt_fn: _OfBlt[P]) -> _OfBlt[P]:
    """Makes a function of a BLT, and more, infinite where a scale is not above 0."""
    return _infinite_if(lambda theta, omega, on: on.xp.any(omega <= 0), blt_fn)


@require_buf_decay_less_eq_one
@standard_promotion()
def sensitivity_squared(blt: BufferedToeplitz, n: jax.typing.ArrayLike) -> jax.Array:
    """Returns the squared sensitivity of C for one participation: that of its first column.

    ``1 + sum_{j,k} omega_j omega_k g_{n-1}(theta_j theta_k)``, g a geometric sum: Lemma 5.3 of
    https://arxiv.org/abs/2404.16706. O(m^2 log n). A bound on what rounding may take from the sum
    is added to it, so that it is not too low. For scales of both signs the terms cancel: where that
    bound would be more than 1e-9 of the sum, known coefficients are summed instead, up to
    n = 10^7: O(n m). In a trace the bound is added where terms cancel; where none do, the result
    may be too low by n units in its last place.

    Args:
      blt: C.
      n: The number of iterations, an integer of at least 1, or infinity for the limit.

    Returns:
      A scalar of the dtype of the BLT, at least float32. Infinite if a decay is above 1, and the
      limit if one is not within (-1, 1).

    Raises:
      ValueError: If the BLT is not valid, or n < 1 or not a scalar.
      TypeError: If n is neither an integer nor infinite.
    """
    count = as_count("n", n, 1, infinite=True)
    theta, omega, on = values_of(blt, count)
    xp = on.xp
    # 1 - theta_j theta_k, which for decays in [0, 1] does not cancel.
    gap = (1 - theta)[:, None] + theta[:, None] * (1 - theta)
    pairs = theta[:, None] * theta
    scales = omega[:, None] * omega
    with np.errstate(all="ignore"):
        terms = series(scales, pairs, gap, count - 1, on)
        total = 1 + xp.sum(terms)
        # Sums of negative ratios are below 1, but not so their errors.
        few = xp.minimum(count - 1, 1) if isinstance(count, jax.Array) else min(count - 1, 1)
        size = xp.maximum(xp.abs(terms), xp.abs(scales) * few)
        relative = rounding(pairs, count, on)
        if on.is_known:
            closed = (32 + pairs.size) * np.finfo(np.float64).eps
            error = np.sum(size * np.where(is_ratio(pairs), closed, relative))
        else:
            error = xp.where(xp.any(terms < 0), xp.sum(size * relative), 0)
    if isinstance(count, int) and on.is_known and count <= MAX_COEFS and not error <= 1e-9 * total:
        total = np.fmin(total + error, squares_of_coefs(theta, omega, count))
    else:
        total = total + on.constant(error)
    if isinstance(count, jax.Array) or count == math.inf:
        diverges = xp.any(xp.abs(theta) >= 1) & (count == math.inf)
        if on.is_known and diverges:
            return _scalar(np.inf, blt)
        total = xp.where(diverges, xp.inf, total)
    return _scalar(total, blt, "the squared sensitivity", upward=True)


def iteration_error(inv_blt: BufferedToeplitz, i: jax.typing.ArrayLike) -> jax.Array:
    """Returns the expected squared error of prefix sum i, for independent noise of variance 1.

    ``sum_{t<=i} b_t^2`` with ``b_t = 1 + sum_j omega_j g_t(theta_j)`` the coefficients of
    ``B = A C^-1``: Lemma 5.4 of https://arxiv.org/abs/2404.16706, in another order. It never
    decreases with i, so it is also the largest error of iterations 0 to i. O(m^2 log i).

    Args:
      inv_blt: ``C^-1``.
      i: The iteration, from 0.

    Returns:
      A scalar of the dtype of the BLT, at least float32.

    Raises:
      ValueError: If the BLT is not valid, or is of float64 when JAX is not in 64-bit mode, or
        i < 0 or is not a scalar.
      TypeError: If i is not an integer.
    """
    return _error(inv_blt, as_count("i", i, 0) + 1)


def max_error(inv_blt: BufferedToeplitz, n: jax.typing.ArrayLike) -> jax.Array:
    """Returns the largest expected squared error of n iterations: that of the last.

    See :func:`iteration_error`; n is at least 1.
    """
    return _error(inv_blt, as_count("n", n, 1))


@standard_promotion()
def _error(inv_blt: BufferedToeplitz, n: Count) -> jax.Array:
    check_float64_dtype(inv_blt)
    theta, omega, on = values_of(inv_blt, n)
    with np.errstate(all="ignore"):
        total = sum_of_squares(theta, omega, n, on)
    return _scalar(total, inv_blt, "the squared error")


def _loss(
    blt: BufferedToeplitz,
    error: Callable[[BufferedToeplitz], jax.Array],
    squared: Callable[[BufferedToeplitz], jax.Array],
    n: jax.typing.ArrayLike = 1,
    skip_checks: bool = True,
) -> jax.Array:
    """``error(C^-1) squared(C)``: in float64 if all is known, infinite if there is no inverse."""
    check_float64_dtype(blt)
    blt.validate()
    if is_tracing() or not is_concrete((blt, n)):
        return error(blt.inverse(skip_checks=skip_checks)) * squared(blt)
    with jax.enable_x64(True):
        wide = BufferedToeplitz(*values_of(blt)[:2])
        inv_blt = wide.inverse(skip_checks=skip_checks)
        finite = np.all(np.isfinite([inv_blt.buf_decay, inv_blt.output_scale]))
        if finite:
            factors = np.float64(error(inv_blt)), np.float64(squared(wide))
            with np.errstate(all="ignore"):
                # Infinite if one of them is; but not because of the range of numbers.
                name = "the loss" if np.all(np.isfinite(factors)) else ""
                return _scalar(factors[0] * factors[1], blt, name)
    return _scalar(np.inf, blt)


@standard_promotion()
def limit_max_error(inv_blt: BufferedToeplitz) -> jax.Array:
    """Returns the limit of ``max_error(inv_blt, n) / n``: ``(1 + sum(omega / (1 - theta)))^2``.

    Args:
      inv_blt: ``C^-1``.

    Returns:
      A scalar of the dtype of the BLT, at least float32. Infinite if a decay is not within (-1, 1).

    Raises:
      ValueError: If the BLT is not valid.
      TypeError: If its dtype is not floating.
    """
    theta, omega, on = values_of(inv_blt)
    xp = on.xp
    diverges = xp.abs(theta) >= 1
    if on.is_known and diverges.any():
        return _scalar(np.inf, inv_blt)
    with np.errstate(all="ignore"):
        last = 1 + xp.sum(omega / (1 - xp.where(diverges, 0, theta)))
        total = xp.where(xp.any(diverges), xp.inf, last**2)
    return _scalar(total, inv_blt, "the squared error")


@require_output_scale_gt_zero
def max_loss(blt: BufferedToeplitz, n: jax.typing.ArrayLike) -> jax.Array:
    """Returns :func:`max_error` times :func:`sensitivity_squared`, for one participation.

    In a trace ``C^-1`` has the dtype of the BLT. For decays near 1 the loss of a BLT of float32 may
    then be too low, by 1e-3 and more: it is no bound.

    Args:
      blt: C.
      n: The number of iterations, at least 1.

    Returns:
      A scalar of the dtype of the BLT, at least float32. Infinite if a decay is above 1, a scale is
      not above 0, or ``C^-1`` cannot be computed.

    Raises:
      ValueError: If the BLT is not valid, or is of float64 when JAX is not in 64-bit mode, or
        n < 1 or not a scalar.
      TypeError: If n is not an integer.
    """
    return _loss(blt, lambda C: max_error(C, n), lambda C: sensitivity_squared(C, n), n)


@require_output_scale_gt_zero
@standard_promotion()
def limit_max_loss(blt: BufferedToeplitz) -> jax.Array:
    """Returns the limit of ``max_loss(blt, n) / n``; in a trace see there.

    Args:
      blt: C.

    Returns:
      A scalar of the dtype of the BLT, at least float32. Infinite if a decay is not below 1, a
      scale is not above 0, or ``C^-1`` cannot be computed.

    Raises:
      ValueError: If the BLT is not valid, or is of float64 when JAX is not in 64-bit mode.
      TypeError: If its dtype is not floating.
    """
    loss = _loss(blt, limit_max_error, lambda C: sensitivity_squared(C, jnp.inf))
    theta, _, on = values_of(blt)
    xp = on.xp
    return _scalar(xp.where(xp.any(xp.abs(theta) >= 1), xp.inf, loss), blt)


@dataclasses.dataclass(frozen=True)
class LossFn(Mirrored):
    """What is minimized over BLTs: error times squared sensitivity, and penalties.

    Made by :meth:`build_closed_form_single_participation` or :meth:`build_min_sep`. Do not change
    ``penalty_multipliers`` afterwards: a loss is compiled once.

    Attributes:
      error_for_inv: Maps ``C^-1`` to the error.
      sensitivity_squared: Maps C to its squared sensitivity.
      n: The number of iterations.
      min_sep: Minimum separation of a user's participations.
      max_participations: The true maximum k of participations, given n and ``min_sep``.
      penalty_strength: Multiplies the sum of penalties.
      penalty_multipliers: By name, multiplies one penalty of :meth:`compute_penalties`; 1 if it is
        not named, and 0 leaves it out.
      max_second_coef: ``sum(omega)`` is kept below this.
      min_theta_gap: Decays of one matrix are kept at least this far apart.
    """

    error_for_inv: Callable[[BufferedToeplitz], jax.Array]
    sensitivity_squared: Callable[[BufferedToeplitz], jax.Array]
    n: int
    min_sep: int
    max_participations: int
    penalty_strength: float = 1e-8
    penalty_multipliers: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)
    max_second_coef: float = 1.0
    min_theta_gap: float = 1e-12

    @classmethod
    def build_closed_form_single_participation(cls, n: int, **kwargs: Any) -> LossFn:
        """Makes the loss of the maximum error for one participation: O(m^2 log n), for any n.

        Args:
          n: The number of iterations.
          **kwargs: Other fields of the loss.

        Raises:
          ValueError: If n < 1.
          TypeError: If n is not an integer.
        """
        n = check_int("n", n)
        error, sensitivity_fn = _closed_forms(n)
        return cls(error, sensitivity_fn, n=n, min_sep=1, max_participations=1, **kwargs)

    @classmethod
    def build_min_sep(
        cls,
        n: int,
        error: str = "max",
        min_sep: int = 1,
        max_participations: int | None = None,
        *,
        workload_coef: jax.Array | None = None,
        **kwargs: Any,
    ) -> LossFn:
        """Makes the loss for several participations, from n coefficients: O(n m).

        The error is that of `toeplitz.per_query_error`; the sensitivity that of
        `toeplitz.minsep_sensitivity_squared`, which is exact for BLTs whose scales and decays are
        positive and sum(scales) at most 1, and an upper bound for others. See
        https://arxiv.org/abs/2408.08868.

        Args:
          n: The number of iterations.
          error: "max" or "mean": the largest or the mean squared error of the queries.
          min_sep: Minimum separation: a user in rounds i < j has ``j - i >= min_sep``.
          max_participations: The most rounds a user takes part in, or None for no limit.
          workload_coef: Coefficients of the workload, by default ones: prefix sums. See
            `toeplitz.momentum_sgd_coefs`.
          **kwargs: Other fields of the loss.

        Raises:
          ValueError: If ``error`` is something else, or another argument is below 1.
          TypeError: If an integer argument is not one.
        """
        n, min_sep = check_int("n", n), check_int("min_sep", min_sep)
        if error not in ("max", "mean"):
            raise ValueError(f"expected error to be 'max' or 'mean', found {error!r}")
        if max_participations is not None:
            check_int("max_participations", max_participations)
        k = sensitivity.minsep_true_max_participations(n, min_sep, max_participations)
        workload = known_workload(workload_coef, n)
        encoded = None if workload is None else workload.tobytes()
        error_fn, sensitivity_fn = _from_coefs(n, error, min_sep, k, encoded)
        return cls(error_fn, sensitivity_fn, n=n, min_sep=min_sep, max_participations=k, **kwargs)

    @standard_promotion()
    def compute_penalties(
        self, blt: BufferedToeplitz, inv_blt: BufferedToeplitz
    ) -> dict[str, jax.Array]:
        """Returns the logarithmic barriers of the set of well-behaved BLTs, by name.

        Its conditions are those of Theorem 1 of https://arxiv.org/abs/2504.21413, and that decays
        differ. A barrier is infinite or NaN outside.

        Args:
          blt: C.
          inv_blt: ``C^-1``.

        Raises:
          ValueError: If C is of float64 when JAX is not in 64-bit mode.
        """
        check_float64_dtype(blt)
        check_instance("inv_blt", inv_blt, BufferedToeplitz)
        positive: dict[str, Array] = {
            "buf_decay>0": blt.buf_decay,
            "buf_decay<1": 1 - blt.buf_decay,
            "output_scale>0": blt.output_scale,
            "inv_buf_decay>0": inv_blt.buf_decay,
            "inv_buf_decay<1": 1 - inv_blt.buf_decay,
            "inv_output_scale<0": -inv_blt.output_scale,
            "second_coef": self.max_second_coef - blt.output_scale.sum(),
            "pillutla_score": 1 - blt.pillutla_score(),
        }
        if len(blt.buf_decay) > 1:
            gaps = [min_buf_decay_gap(x.buf_decay) for x in (blt, inv_blt)]
            positive["theta_gap"] = jnp.stack(gaps) - self.min_theta_gap
        return {name: -jnp.log(x).sum() for name, x in positive.items()}

    @standard_promotion()
    def penalized_loss(
        self,
        blt: BufferedToeplitz,
        inv_blt: BufferedToeplitz,
        normalize_by_approx_optimal_loss: bool = True,
    ) -> jax.Array:
        """Returns the loss and the penalties: what is minimized.

        Args:
          blt: C.
          inv_blt: ``C^-1``.
          normalize_by_approx_optimal_loss: Whether the loss is divided by
            ``k + (1 + log(n) / pi)^2``, so that penalties weigh about the same for any n and k.

        Raises:
          ValueError: If C is of float64 when JAX is not in 64-bit mode, or there is a multiplier
            for a penalty that there is not.
        """
        penalties = self.compute_penalties(blt, inv_blt)
        unknown = sorted(set(self.penalty_multipliers) - set(penalties))
        if unknown:
            raise ValueError(
                f"Unrecognized penalty multipliers {unknown}: "
                f"expected penalty_multipliers of {sorted(penalties)}, found {unknown}"
            )
        loss = self.error_for_inv(inv_blt) * self.sensitivity_squared(blt)
        if normalize_by_approx_optimal_loss:
            loss = loss / (self.max_participations + (1 + math.log(self.n) / math.pi) ** 2)
        multipliers = {name: self.penalty_multipliers.get(name, 1.0) for name in penalties}
        # One that is left out may be infinite.
        total = sum(factor * penalties[name] for name, factor in multipliers.items() if factor)
        return loss + self.penalty_strength * total

    def loss(self, blt: BufferedToeplitz, skip_checks: bool = False) -> jax.Array:
        """Returns the loss of C, without penalties; infinity if ``C^-1`` cannot be computed.

        Known values are computed with in float64, whatever the dtype of C. In a trace the loss is
        no bound: see :func:`max_loss`.

        Args:
          blt: C.
          skip_checks: As for :meth:`BufferedToeplitz.inverse`.

        Raises:
          ValueError: If the BLT is not valid, is of float64 when JAX is not in 64-bit mode, or
            (unless skipped) two decays are within 1e-9 of each other.

        Warns:
          UserWarning: If ``C^-1`` cannot be computed.
        """
        try:
            return _loss(blt, self.error_for_inv, self.sensitivity_squared, self.n, skip_checks)
        except RuntimeError as error:
            warnings.warn(f"the loss is taken to be infinite: {error}", stacklevel=2)
            return _scalar(jnp.inf, blt)


# The same functions for the same arguments, so that equal losses are compiled once.


@functools.lru_cache(maxsize=64)
def _closed_forms(n: int) -> tuple[_Scalar, _Scalar]:
    return functools.partial(max_error, n=n), functools.partial(sensitivity_squared, n=n)


@functools.lru_cache(maxsize=64)
def _from_coefs(
    n: int, error: str, min_sep: int, k: int, workload: bytes | None
) -> tuple[_Scalar, _Scalar]:
    A: Any = None if workload is None else np.frombuffer(workload)

    def error_for_inv(inv_blt: BufferedToeplitz) -> jax.Array:
        errors = toeplitz.per_query_error(noising_coef=inv_blt.toeplitz_coefs(n), workload_coef=A)
        return errors.mean() if error == "mean" else errors[-1]

    def sensitivity_fn(blt: BufferedToeplitz) -> jax.Array:
        return toeplitz.minsep_sensitivity_squared(
            blt.toeplitz_coefs(n), min_sep, n=n, max_participations=k
        )

    return error_for_inv, sensitivity_fn
