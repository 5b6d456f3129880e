"""Errors and losses of Toeplitz strategies; the algebra is in `_toeplitz_algebra`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels import ops
from jax_privacy_kernels._checks import (
    check_instance,
    check_int,
    check_one_given,
    is_concrete,
    nan_unless,
    promote_types,
)
from jax_privacy_kernels.matrix_factorization._scaling import Scale, restored, scaled
from jax_privacy_kernels.matrix_factorization._toeplitz_algebra import (
    Array,
    at_least_default,
    in_float64,
    min_sep_norm,
    multiply,
    norm_squared,
    pad_coefs_to_n,
    reconcile,
    solved,
)
from jax_privacy_kernels.matrix_factorization._workloads import can_follow, momentum_errors
from jax_privacy_kernels.matrix_factorization.streaming_matrix import StreamingMatrix

__all__ = ["check_pattern", "loss", "per_query_error", "reduction"]


def per_query_error(
    *,
    strategy_coef: jax.Array | None = None,
    noising_coef: jax.Array | None = None,
    n: int | None = None,
    workload_coef: jax.Array | None = None,
    A: StreamingMatrix | None = None,
) -> jax.Array:
    """Returns the expected squared error of every query, for independent noise of variance 1.

    With workload A, it is the squared norm of every row of ``B = A C^-1``. If A is Toeplitz, so is
    B, and the errors never decrease: the maximum is the last. O(n b) with b bands of C or of
    ``C^-1``.

    Args:
      strategy_coef: ``[b]`` coefficients of C, ``strategy_coef[0] != 0``; or
      noising_coef: ``[b]`` coefficients of ``C^-1``. Exactly one of the two.
      n: The size of the matrices, by default the number of coefficients given.
      workload_coef: Coefficients of A, by default n ones: prefix sums. Those from the n-th on are
        ignored; missing ones are zero.
      A: In their place, a workload that need not be Toeplitz, for C by ``strategy_coef``. O(n b^2)
        for `streaming_matrix.momentum_sgd_matrix`, with learning rates; O(n^2 b) for others.

    Returns:
      ``[n]`` array, with the dtype of :func:`pad_coefs_to_n`.

    Raises:
      ValueError: if not exactly one of C and ``C^-1`` is given, coefficients are not 1-D, empty or
        not finite, ``strategy_coef[0] == 0``, or n < 1; or A is given along with
        ``workload_coef`` or ``noising_coef``.
      TypeError: if n is not an integer, coefficients are not real, or A is not a `StreamingMatrix`.
    """
    check_one_given(strategy_coef=strategy_coef, noising_coef=noising_coef)
    if A is not None:
        return _errors_of_streaming(A, strategy_coef, n, workload_coef)
    if strategy_coef is not None:
        coef, n = reconcile(strategy_coef, n, name="strategy_coef", invertible=True)
    else:
        coef, n = reconcile(noising_coef, n, name="noising_coef")
    dtype = promote_types(coef.dtype, jnp.result_type(float))
    a: Array | None = None
    workload_scale: Scale = 0
    if workload_coef is not None:
        workload, _ = reconcile(workload_coef, n, name="workload_coef")
        dtype = promote_types(dtype, workload.dtype)
        a, workload_scale = scaled(workload)
    c, scale = scaled(coef)
    with in_float64(all(isinstance(x, np.ndarray) for x in (c, a) if x is not None)):
        c = jnp.asarray(c)
        if strategy_coef is not None:
            ones = jnp.ones(n, jnp.result_type(float))
            B = solved(c, ones if a is None else pad_coefs_to_n(jnp.asarray(a), n))
        elif a is None:
            B = _cumsum(pad_coefs_to_n(c, n))
        else:
            B = multiply(c, jnp.asarray(a), n)
        errors = _cumsum(B * B)
        vanished = (errors == 0) & (B != 0)
        if not is_concrete(vanished) or vanished.any():
            errors = nan_unless(~vanished, errors)
    power = -2 if strategy_coef is not None else 2
    return restored("the squared errors", errors, dtype, (scale, power), (workload_scale, 2))


def _errors_of_streaming(
    A: StreamingMatrix, strategy_coef: Any, n: int | None, workload_coef: Any
) -> jax.Array:
    check_instance("A", A, StreamingMatrix)
    if strategy_coef is None or workload_coef is not None:
        other = "noising_coef" if strategy_coef is None else "workload_coef"
        raise ValueError(f"expected A with strategy_coef alone, found {other} too")
    coef, n = reconcile(strategy_coef, n, name="strategy_coef", invertible=True)
    dtype = promote_types(coef.dtype, jnp.result_type(float))
    c, scale = scaled(coef)
    with in_float64(isinstance(c, np.ndarray)):
        c = at_least_default(jnp.asarray(c))
        if can_follow(A.structure, n):
            rows = jnp.broadcast_to(c, (n, c.size))
            errors = momentum_errors(rows, jnp.ones(n, c.dtype), A.structure, ops.asked())
        else:
            errors = (A @ _inverse(c)).row_norms_squared(n)
    return restored("the squared errors", errors, dtype, (scale, -2))


def _inverse(c: jax.Array) -> StreamingMatrix:
    """``C^-1``, which keeps the last b - 1 terms: enough for errors."""

    def init(abstract_value: Any) -> jax.Array:
        return jnp.zeros((c.size - 1, *abstract_value.shape), c.dtype)

    def multiply_next(z: jax.Array, history: jax.Array) -> tuple[jax.Array, jax.Array]:
        past = jnp.tensordot(c[1:], history, axes=1, precision="highest") if c.size > 1 else 0
        x = (z - past) / c[0]
        return x, jnp.concatenate([x[None], history])[: c.size - 1]

    return StreamingMatrix.from_array_implementation(init, multiply_next)


def _cumsum(x: jax.Array) -> jax.Array:
    # Differences undone: in float64, and as fast as anything on CPUs.
    return ops.toeplitz_solve(jnp.array([1, -1], x.dtype), x)


def loss(
    strategy_coef: jax.Array,
    n: int | None = None,
    reduction_fn: Callable[[jax.Array], jax.Array] = jnp.mean,
    *,
    workload_coef: jax.Array | None = None,
    A: StreamingMatrix | None = None,
    min_sep: int | None = None,
    max_participations: int | None = None,
) -> jax.Array:
    """Returns error times squared sensitivity of C; by default for prefix sums, one participation.

    See https://arxiv.org/abs/2405.15913. It does not change if C is multiplied by a number. For b
    bands and any k participations at least b steps apart it is k times that for one; for less
    separation, give ``min_sep``.

    Args:
      strategy_coef: ``[b]`` coefficients of C, ``strategy_coef[0] != 0``.
      n: The size of C, by default b.
      reduction_fn: Makes a scalar of the errors ``[n]`` of the queries: `jax.numpy.mean`,
        `jax.numpy.max`, ``lambda v: v[-1]``.
      workload_coef: As for :func:`per_query_error`, and
      A: likewise.
      min_sep: Minimum separation of a user's participations, whose sensitivity is that of
        :func:`minsep_sensitivity_squared`; None for one participation.
      max_participations: The most rounds a user takes part in, with ``min_sep``; None for no limit.

    Returns:
      A scalar, with the dtype of :func:`pad_coefs_to_n`.

    Raises:
      ValueError: if ``strategy_coef`` is not 1-D, empty or not finite, ``strategy_coef[0] == 0``,
        or another argument is out of range; ``max_participations`` without ``min_sep``, or A with
        ``workload_coef``.
      TypeError: if an integer argument is not one, or coefficients are not real.
    """
    coef, n = reconcile(strategy_coef, n, name="strategy_coef", invertible=True)
    values, _ = scaled(coef)
    coef = jnp.asarray(values, coef.dtype)
    errors = per_query_error(strategy_coef=coef, n=n, workload_coef=workload_coef, A=A)
    error = (reduction(reduction_fn) if A is None else reduction_fn)(errors)
    check_pattern(min_sep, max_participations)
    squared = (
        norm_squared(coef)
        if min_sep is None
        else min_sep_norm(coef, n, min_sep, max_participations)
    )
    result = error * squared
    if is_concrete((error, result)) and jnp.isfinite(error) and not jnp.isfinite(result):
        raise ValueError(f"expected a loss in the range of {result.dtype}, found {result}")
    return result


def check_pattern(min_sep: int | None, max_participations: int | None) -> None:
    """Raises an error unless a participation pattern is one, or is left out."""
    if min_sep is not None:
        check_int("min_sep", min_sep)
    if max_participations is not None:
        check_int("max_participations", max_participations)
        if min_sep is None:
            raise ValueError(
                f"expected min_sep with max_participations={max_participations}, found None"
            )


def reduction(reduction_fn: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """The same function of errors that never decrease, with a gradient in the last one only."""
    return _last if reduction_fn is jnp.max else reduction_fn


def _last(errors: jax.Array) -> jax.Array:
    return errors[-1]
