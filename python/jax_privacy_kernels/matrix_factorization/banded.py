"""Banded strategies whose columns all have norm 1, each with coefficients of its own.

Banded Toeplitz strategies (`toeplitz.optimize_banded_toeplitz`, https://arxiv.org/abs/2405.15913)
come close to the error of these at a fraction of the parameters. For prefix sums theirs is above by
1.2 % at n = 1,000 and 32 bands, by 0.7 % at 16 bands, and for 32 bands by 0.6 % at n = 4,000.

    >>> C = ColumnNormalizedBanded.default(100, bands=8)
    >>> error = per_query_error(C).mean() ** 0.5
    >>> squared = minsep_sensitivity_squared(C, min_sep=10, max_participations=5)
    >>> noising_matrix = C.inverse_as_streaming_matrix()
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels import ops
from jax_privacy_kernels._checks import (
    check_coef,
    check_instance,
    check_int,
    check_memory,
    check_real,
    is_concrete,
    nan_unless,
    promote_types,
)
from jax_privacy_kernels._mirrored import Mirrored
from jax_privacy_kernels.matrix_factorization import optimization, sensitivity, toeplitz
from jax_privacy_kernels.matrix_factorization._dense_bounds import dense_bound
from jax_privacy_kernels.matrix_factorization._scaling import (
    ending_in_nan,
    exponent_of_small,
    within_range,
)
from jax_privacy_kernels.matrix_factorization._workloads import can_follow, momentum_errors
from jax_privacy_kernels.matrix_factorization.streaming_matrix import StreamingMatrix, prefix_sum

__all__ = ["ColumnNormalizedBanded", "minsep_sensitivity_squared", "optimize", "per_query_error"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ColumnNormalizedBanded(Mirrored):
    """A lower-triangular n x n strategy C with b bands, its columns scaled to norm 1.

    Row j of the parameters holds column j of C from the diagonal down, before it is scaled. For
    ``n = 4`` and ``b = 2``::

        params = [a b]      C = [a      ]
                 [c d]          [b c    ]
                 [e f]          [  d e  ]
                 [g *]          [    f g]

    Entries marked ``*`` lie outside of C and do not matter. A pytree, with one leaf.

    Attributes:
      params: ``[n, b]`` array of real numbers, ``params[:, 0] != 0``, ``1 <= b <= n``. Integers
        stand for default floats.
    """

    params: jax.Array

    def __post_init__(self) -> None:
        if isinstance(self.params, np.ndarray):  # where the caller may write later
            object.__setattr__(self, "params", self.params.copy())

    def __repr__(self) -> str:
        shape, dtype = np.shape(self.params), getattr(self.params, "dtype", None)
        if len(shape) != 2:
            return f"ColumnNormalizedBanded(params={self.params!r})"
        return f"ColumnNormalizedBanded(n={shape[0]}, bands={shape[1]}, dtype={dtype})"

    @property
    def n(self) -> int:
        """The size of C."""
        return self.params.shape[0]

    @property
    def bands(self) -> int:
        """The number b of bands of C, the diagonal included."""
        return self.params.shape[1]

    @classmethod
    def from_banded_toeplitz(cls, n: int, coefs: jax.Array) -> ColumnNormalizedBanded:
        """Makes the strategy from a Toeplitz one, column by column.

        Args:
          n: The size of C.
          coefs: ``[b]`` Toeplitz coefficients, ``coefs[0] != 0`` and ``b <= n``.

        Raises:
          ValueError: If ``coefs`` is not 1-D, empty or not finite, starts with 0, or is longer than
            n; or n < 1.
          TypeError: If n is not an integer, or ``coefs`` is not real.
        """
        if np.shape(coefs)[:-1] == (1,):
            coefs = coefs[0]
        n, coefs = check_int("n", n), check_coef("coefs", coefs, invertible=True)
        if coefs.size > n:
            raise ValueError(f"expected at most n={n} coefs, found {coefs.size}")
        check_memory("n", n, 8 * n * coefs.size)
        scaled = coefs / jnp.abs(coefs).max()  # no square underflows or overflows
        params = jnp.broadcast_to(scaled / jnp.linalg.norm(scaled), (n, coefs.size))
        return cls(jnp.where(_inside(n, coefs.size), params, jnp.zeros_like(params)))

    @classmethod
    def default(cls, n: int, bands: int) -> ColumnNormalizedBanded:
        """Makes it from the first coefficients of `toeplitz.optimal_max_error_strategy_coefs`.

        Raises:
          ValueError: If not ``1 <= bands <= n``.
          TypeError: If one is not an integer.
        """
        coefs = toeplitz.optimal_max_error_strategy_coefs(check_int("bands", bands))
        return cls.from_banded_toeplitz(n, coefs)

    def materialize(self) -> jax.Array:
        """Returns C as an ``[n, n]`` array. O(n^2) time and memory.

        Raises:
          ValueError: If ``params`` is not as the class says, or C does not fit into memory.
          TypeError: If it does not hold real numbers.
        """
        dtype = _checked(self).params.dtype
        check_memory("n", self.n, 8 * self.n**2)
        normed = (_entries(self) / _column_norms(self)[:, None]).astype(dtype)
        row = jnp.arange(self.n)
        lag = row[:, None] - row[None, :]
        column = jnp.broadcast_to(row, lag.shape)
        entries = normed[column, jnp.clip(lag, 0, self.bands - 1)]
        inside = (lag >= 0) & (lag < self.bands)
        return jnp.where(inside, entries, jnp.zeros_like(entries))

    def inverse_as_streaming_matrix(self) -> StreamingMatrix:
        """Returns the noising matrix ``C^-1``, by Algorithm 9 of https://arxiv.org/abs/2306.08153.

        Its state is the step and the last b - 1 rows of ``P^-1 z``, newest first, where P is C
        before its columns are scaled. C has n rows: rows of the product from the n-th on are NaN.
        Privatizers have a fused kernel for it, as for Toeplitz strategies.

        Raises:
          ValueError: If ``params`` is not as the class says.
          TypeError: If it does not hold real numbers.
        """
        C = _checked(self)
        dtype = C.params.dtype
        return inverse_of_rows(_rows(C).astype(dtype), _column_norms(C), dtype)


def inverse_of_rows(rows: jax.Array, norms: jax.Array | None, dtype: Any) -> StreamingMatrix:
    """The noising matrix ``diag(norms) T^-1`` of a banded T, ``rows[t, l] = T[t, t - l]``.

    Rows of the product from the n-th on are NaN.

    Args:
      rows: ``[n, b]``.
      norms: ``[n]``, or None for ones.
      dtype: of the history, promoted with that of the values.
    """
    bands = rows.shape[1]
    scale = jnp.ones(rows.shape[0], rows.dtype) if norms is None else norms

    def init_multiply(abstract_value: Any) -> tuple[jax.Array, jax.Array]:
        promoted = promote_types(abstract_value.dtype, dtype)
        zero = jnp.zeros_like(abstract_value, dtype=promoted)  # keeps the sharding of the value
        return jnp.array(0), jnp.broadcast_to(zero, (bands - 1, *zero.shape))

    def multiply_next(z: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        t, history = state
        row = rows.at[t].get(mode="clip")
        past = jnp.tensordot(row[1:], history, axes=1, precision="highest") if bands > 1 else 0
        x = (z - past) / row[0]
        if bands > 1:
            history = jnp.concatenate([x[None].astype(history.dtype), history[:-1]])
        norm = nan_unless(t < scale.size, scale.at[t].get(mode="clip"))
        return x * norm, (t + 1, history)

    row_scale = ending_in_nan(scale, scale.dtype)
    structure = ops.BandedRecurrence(rows, row_scale=row_scale)
    return StreamingMatrix.from_array_implementation(
        init_multiply, multiply_next, structure=structure
    )


def _check_shape(C: ColumnNormalizedBanded) -> tuple[int, ...]:
    check_instance("the strategy", C, ColumnNormalizedBanded)
    # Not by its type: programs that are only lowered have structures for arrays.
    shape = getattr(C.params, "shape", None)
    if shape is None or not hasattr(C.params, "dtype"):
        raise TypeError(f"expected params to be an array, found {C.params!r}")
    if len(shape) != 2 or not 1 <= shape[1] <= shape[0]:
        raise ValueError(f"expected params of shape [n, b], 1 <= b <= n, found {shape}")
    return shape


def _checked(C: ColumnNormalizedBanded) -> ColumnNormalizedBanded:
    """C, if its parameters are what they should be."""
    shape = _check_shape(C)
    real = _real(C)
    if is_concrete(C.params):
        params = np.asarray(C.params)
        bad = ~np.isfinite(params)
        bad[:, 0] |= params[:, 0] == 0
        bad &= np.add.outer(np.arange(shape[0]), np.arange(shape[1])) < shape[0]
        if bad.any():
            at = tuple(int(i) for i in np.argwhere(bad)[0])
            raise ValueError(
                "expected params to be finite, and not 0 in the first column, "
                f"found params{list(at)} = {params[at]}"
            )
    return real


def _real(C: ColumnNormalizedBanded) -> ColumnNormalizedBanded:
    return ColumnNormalizedBanded(check_real("floating params", jnp.asarray(C.params)))


def _inside(n: int, bands: int) -> jax.Array:
    """Which parameters are entries of C."""
    return jnp.arange(n)[:, None] + jnp.arange(bands)[None, :] < n


def _entries(C: ColumnNormalizedBanded) -> jax.Array:
    """P, in 32 bits at least, with 0 for parameters outside of it.

    Columns of extreme numbers are scaled: P may have any scale, and its norms and inverse should
    not vanish or overflow.
    """
    params = _real(C).params
    inside = jnp.where(_inside(C.n, C.bands), params, jnp.zeros_like(params))
    return within_range(inside, axis=1)


def _column_norms(C: ColumnNormalizedBanded) -> jax.Array:
    # Norms of 16 bits would leave columns of norms up to 1.006.
    inside = _entries(C)
    # Scaled, so that no square underflows or overflows.
    largest = jax.lax.stop_gradient(jnp.abs(inside).max(axis=1, keepdims=True))
    largest = jnp.where(largest > 0, largest, jnp.ones_like(largest))
    return largest[:, 0] * jnp.sqrt(jnp.sum((inside / largest) ** 2, axis=1))


def _rows(C: ColumnNormalizedBanded) -> jax.Array:
    """``[n, b]``: entry (t, l) is ``P[t, t - l]``, from column t - l; 0 where there is none."""
    t, lag = jnp.arange(C.n)[:, None], jnp.arange(C.bands)[None, :]
    entries = _entries(C)
    inside = entries[jnp.maximum(t - lag, 0), jnp.broadcast_to(lag, entries.shape)]
    return jnp.where(t >= lag, inside, jnp.zeros_like(entries))


def minsep_sensitivity_squared(
    strategy: ColumnNormalizedBanded,
    min_sep: int,
    max_participations: int | None = None,
    n: int | None = None,
    skip_checks: bool = False,
) -> int:
    """Returns the squared sensitivity of the strategy: the most participations of one user.

    Columns at least b apart are orthogonal, and have norm 1.

    Args:
      strategy: C, with at most ``min_sep`` bands.
      min_sep: Minimum separation: a user in rounds i < j has ``j - i >= min_sep``.
      max_participations: The most rounds a user takes part in, or None for no limit.
      n: How many rounds there are, by default all of C's.
      skip_checks: Leaves unchecked whether C has that many rounds and that few bands.

    Raises:
      ValueError: If an argument is below 1, ``min_sep`` below b, or n above C's.
      TypeError: If an integer argument is not one.
    """
    _check_shape(strategy)
    n = strategy.n if n is None else check_int("n", n)
    min_sep = check_int("min_sep", min_sep)
    count = sensitivity.participations(n, min_sep, max_participations)
    if not skip_checks:
        if min_sep < strategy.bands:
            raise ValueError(
                f"expected min_sep >= {strategy.bands}, the bands of the strategy, "
                f"found min_sep={min_sep}; any is fine for "
                "sensitivity.get_min_sep_sensitivity_upper_bound"
            )
        if n > strategy.n:
            raise ValueError(f"expected n <= {strategy.n}, the size of the strategy, found n={n}")
    return count


def per_query_error(
    C: ColumnNormalizedBanded, A: StreamingMatrix | None = None, scan_fn: Any = jax.lax.scan
) -> jax.Array:
    """Returns the expected squared error of every query, for independent noise of variance 1.

    With workload A, it is the squared norm of every row of ``A C^-1``. For prefix sums and for
    `streaming_matrix.momentum_sgd_matrix` it follows from the covariance of the last b - 1 terms
    and the workload's own: O(n b^2), exact, in float64. Other workloads are multiplied row by row,
    O(n^2 b).

    Args:
      C: The strategy.
      A: The workload, by default prefix sums.
      scan_fn: A function in place of `jax.lax.scan` for other workloads, not called for these two;
        for instance one that saves memory in the backward pass.

    Returns:
      ``[n]`` array of the dtype of the parameters, at least float32.

    Raises:
      ValueError: If the parameters of C are not as its class says.
      TypeError: If they are not real numbers, or ``scan_fn`` is not a function.
    """
    C = _checked(C)
    _check_scan(scan_fn)
    A = prefix_sum() if A is None else A
    check_instance("A", A, StreamingMatrix)
    structure: Any = getattr(A, "structure", None)
    if not can_follow(structure, C.n):
        errors = (A @ C.inverse_as_streaming_matrix()).row_norms_squared(C.n, scan_fn=scan_fn)
        return errors.astype(promote_types(C.params.dtype, jnp.float32))
    norms = _column_norms(C).astype(promote_types(C.params.dtype, jnp.float32))
    return momentum_errors(_rows(C), norms, structure, ops.asked())


def _check_scan(scan_fn: Any) -> None:
    if not callable(scan_fn):
        raise TypeError(f"expected scan_fn to be a function like jax.lax.scan, found {scan_fn!r}")


def optimize(
    n: int,
    *,
    bands: int,
    C: ColumnNormalizedBanded | None = None,
    A: StreamingMatrix | None = None,
    max_optimizer_steps: int = 100,
    reduction_fn: Callable[[jax.Array], jax.Array] = jnp.mean,
    scan_fn: Any = jax.lax.scan,
    callback: Callable[[optimization.CallbackArgs], bool | None] | None = None,
    report: optimization.ReportFnType | None = None,
) -> ColumnNormalizedBanded:
    """Minimizes the error over column-normalized strategies of b bands.

    Their sensitivity does not depend on the parameters, for one participation and for any number of
    them at least b steps apart: https://arxiv.org/abs/2405.15913. Steps of O(n b^2), see
    :func:`per_query_error`, in one compiled loop if there is no callback.

    Args:
      n: The number of steps.
      bands: The number b of bands.
      C: The strategy to start from, by default :meth:`ColumnNormalizedBanded.default`.
      A: The workload, by default prefix sums.
      max_optimizer_steps: The most steps of L-BFGS.
      reduction_fn: Makes a scalar of the errors ``[n]`` of the queries.
      scan_fn: As for :func:`per_query_error`.
      callback: As for `optimization.optimize`.
      report: Called with an `optimization.Report` at the end. For the mean error and n up to 128 it
        has a lower bound on all strategies of b bands, which takes some seconds.

    Returns:
      The optimized strategy.

    Raises:
      ValueError: If not ``1 <= bands <= n``, C has another shape or is not as its class says, or
        ``max_optimizer_steps`` is below 0.
      TypeError: If an integer argument is not one, or ``scan_fn`` is not a function.
    """
    n, bands = check_int("n", n), check_int("bands", bands)
    _check_scan(scan_fn)
    if A is not None:
        check_instance("A", A, StreamingMatrix)
    C = ColumnNormalizedBanded.default(n, bands) if C is None else _checked(C)
    if C.params.shape != (n, bands):
        raise ValueError(f"expected C with params of shape ({n}, {bands}), found {C.params.shape}")
    optimization.check_report(report)
    loss_fn = _loss(A, reduction_fn, scan_fn)
    start = ColumnNormalizedBanded(_entries(C).astype(C.params.dtype))

    def cost(C: ColumnNormalizedBanded) -> float:
        with jax.enable_x64(True):
            wide = ColumnNormalizedBanded(C.params.astype(jnp.float64))
            return float(optimization.jitted(loss_fn)(wide))

    exponent = 0
    if callback is None and max_optimizer_steps:
        exponent = exponent_of_small(cost(start))
    best, steps, stopped = optimization.minimized(
        _loss(A, reduction_fn, scan_fn, exponent) if exponent else loss_fn,
        start,
        max_optimizer_steps=max_optimizer_steps,
        callback=callback,
    )
    if report is not None:
        bound = dense_bound(n, bands, reduction_fn, None, A, None, None)
        report(optimization.Report(cost(best), steps, stopped, bound))
    return best


@optimization.compiled_once
def _loss(
    A: StreamingMatrix | None,
    reduction_fn: Callable[[jax.Array], jax.Array],
    scan_fn: Any,
    exponent: int = 0,
) -> Callable[[ColumnNormalizedBanded], jax.Array]:
    factor = 2.0**-exponent
    return lambda C: factor * reduction_fn(per_query_error(C, A, scan_fn))


def __dir__() -> list[str]:  # for completion: no imported names
    return sorted(__all__)
