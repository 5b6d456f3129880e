"""Toeplitz factorizations in closed form, by the names that papers gave them."""

from __future__ import annotations

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels._checks import (
    check_coef,
    check_int,
    check_memory,
    check_scalar,
    promote_types,
)
from jax_privacy_kernels.matrix_factorization._scaling import as_dtype
from jax_privacy_kernels.matrix_factorization._toeplitz_algebra import (
    banded_inverse_square_root_noising_coefs,
    inverse_coef,
    sqrt_prefix_sum,
)
from jax_privacy_kernels.matrix_factorization._workloads import known_workload

__all__ = [
    "banded_inverse_power_noising_coefs",
    "banded_square_root_strategy_coefs",
    "lambda_cgd_column_norms",
    "lambda_cgd_sensitivity_squared",
    "nu_dp_ftrl_noising_coefs",
    "nu_dp_ftrl_sensitivity_squared",
    "square_root",
    "stationary_sensitivity_squared",
]

# Exact rationals of this many bands take about a second.
_MOST_EXACT = 64


def banded_square_root_strategy_coefs(
    num_bands: int, workload_coef: jax.typing.ArrayLike | None = None
) -> jax.Array:
    """Returns the first coefficients of the strategy ``C = A^{1/2}``, A the workload.

    The banded square root (BSR) factorization of https://arxiv.org/abs/2405.13763. For prefix sums
    they are those of :func:`optimal_max_error_strategy_coefs`. The sensitivity of C is that of
    :func:`minsep_sensitivity_squared`; its error is a few percent above that of
    :func:`optimize_banded_toeplitz`, which starts from it. Noise takes b - 1 slots of memory.
    O(b^2).

    Args:
      num_bands: The number b of coefficients.
      workload_coef: Coefficients of A, by default all ones: prefix sums. ``workload_coef[0] > 0``;
        see :func:`momentum_sgd_coefs`.

    Returns:
      ``[b]`` array of the default float dtype.

    Raises:
      ValueError: if ``workload_coef`` is not 1-D, empty or not finite, does not start with a
        positive number, or b < 1.
      TypeError: if b is not an integer, or the coefficients are not real.
    """
    b = _num_bands(num_bands)
    dtype = jnp.result_type(float)
    if workload_coef is None:
        return jnp.asarray(sqrt_prefix_sum(b), dtype)
    return jnp.asarray(_root(_workload(workload_coef, b), b), dtype)


def _num_bands(num_bands: int) -> int:
    number = check_int("num_bands", num_bands)
    check_memory("num_bands", number, 64 * number)
    return number


def _workload(workload_coef: jax.typing.ArrayLike | None, n: int) -> np.ndarray:
    workload = known_workload(workload_coef, n)
    if workload is None:
        return np.ones(n)
    if not workload[0] > 0:
        raise ValueError(f"expected workload_coef[0] > 0, found workload_coef[0] = {workload[0]}")
    return workload


def _root(workload: np.ndarray, bands: int) -> np.ndarray:
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        noising = banded_inverse_square_root_noising_coefs(bands, workload)
        return np.array(inverse_coef(noising))


def square_root(bands: int, workload: np.ndarray | None) -> np.ndarray:
    """As the public function, but of prefix sums where the workload has no square root."""
    if workload is None or not workload[0] > 0:
        return sqrt_prefix_sum(bands)
    root = _root(np.pad(workload, (0, max(0, bands - workload.size))), bands)
    return root if np.isfinite(root).all() else sqrt_prefix_sum(bands)


def banded_inverse_power_noising_coefs(
    num_bands: int, gamma: float, workload_coef: jax.typing.ArrayLike | None = None
) -> jax.Array:
    """Returns the first coefficients of ``C^-1`` for ``C = A^gamma``, A the workload.

    The gamma-BIFR factorization of https://arxiv.org/abs/2605.18379. With gamma = 1/2 it is the
    banded inverse square root (:func:`banded_inverse_square_root_noising_coefs`); for few bands a
    larger gamma has less error, and the best is found by trying some. The sensitivity of C is that
    of :func:`compute_banded_inverse_sensitivity_squared`, an upper bound; noise is made by
    :func:`noising_coef_as_streaming_matrix`. O(p^2).

    Args:
      num_bands: The number p of coefficients.
      gamma: The power, above 0 and at most 1.
      workload_coef: Coefficients of A, by default all ones: prefix sums. ``workload_coef[0] > 0``.

    Returns:
      ``[p]`` array of the default float dtype, computed in float64.

    Raises:
      ValueError: if ``workload_coef`` is not 1-D, empty or not finite, does not start with a
        positive number, p < 1, or gamma is out of range.
      TypeError: if p is not an integer, or another argument is not real.
    """
    p = _num_bands(num_bands)
    gamma = check_scalar("gamma", gamma, lambda x: 0 < x <= 1, "in (0, 1]")
    a = _workload(workload_coef, p)
    k = np.arange(1, p)
    if workload_coef is None:  # of (1 - x)^gamma
        coefs = np.cumprod(np.concatenate([[1.0], (k - 1 - gamma) / k]))
    else:
        coefs = _power(a, -gamma)
    return jnp.asarray(coefs, jnp.result_type(float))


def _power(a: np.ndarray, exponent: float) -> np.ndarray:
    """Coefficients of a power of a power series, from ``a c' = exponent a' c``."""
    ratio = a / a[0]
    c = np.zeros(len(a))
    c[0] = a[0] ** exponent
    for k in range(1, len(a)):
        j = np.arange(1, k + 1)
        c[k] = np.sum((exponent * j - (k - j)) * ratio[1 : k + 1] * c[k - 1 :: -1][:k]) / k
    return c


# -- lambda-CGD -------------------------------------------------------------------------------


def lambda_cgd_column_norms(n: int, lam: float) -> np.ndarray:
    """The norms ``[n]`` of the columns of ``C_0``, whose inverse has coefficients ``(1, -lam)``."""
    n, lam = _lambda_cgd(n, lam)
    check_memory("n", n, 64 * n)
    rows = np.arange(n, 0, -1)
    # (1 - lam^(2 r)) / (1 - lam^2)
    with np.errstate(divide="ignore"):
        log = math.log(lam) if lam else -math.inf
    return np.sqrt(np.expm1(2 * rows * log) / np.expm1(2 * log))


def _lambda_cgd(n: int, lam: float) -> tuple[int, float]:
    n = check_int("n", n)
    return n, check_scalar("lam", lam, lambda x: 0 <= x < 1, "in [0, 1)")


def lambda_cgd_sensitivity_squared(
    n: int, lam: float, min_sep: int, max_participations: int | None = None
) -> jax.Array:
    """Returns an upper bound on the squared sensitivity of :func:`lambda_cgd_as_streaming_matrix`.

    Columns of norm 1 that are d steps apart have an inner product of at most ``lam^d``, and of no
    less than that but for the last columns. So k participations at least ``min_sep`` apart have a
    squared norm of at most ``k + 2 sum_{d<k} (k - d) lam^(d min_sep)``, and 1 for k = 1.

    Args:
      n: The number of steps.
      lam: As of that function.
      min_sep: Minimum separation of a user's participations.
      max_participations: The most rounds a user takes part in, or None for no limit.

    Returns:
      A scalar of the default float dtype, rounded up.

    Raises:
      ValueError: if an argument is out of range.
      TypeError: if an integer argument is not one, or ``lam`` is not a real number.
    """
    from jax_privacy_kernels.matrix_factorization import sensitivity

    n, lam = _lambda_cgd(n, lam)
    min_sep = check_int("min_sep", min_sep)
    k = sensitivity.participations(n, min_sep, max_participations)
    check_memory("the number of participations", k, 64 * k)
    d = np.arange(1, k, dtype=np.float64)
    squared = k + 2 * np.sum((k - d) * float(lam) ** (d * float(min_sep)))
    wide = squared * (1 + 4 * (k + 8) * 2.0**-53) if k > 1 else squared
    return as_dtype("the squared sensitivity", wide, jnp.result_type(float), upward=True)


# -- nu-DP-FTRL -------------------------------------------------------------------------------


def nu_dp_ftrl_noising_coefs(num_bands: int, nu: float) -> jax.Array:
    """Returns the first coefficients of ``C^-1`` with generating function ``sqrt(1 - (1 - nu) x)``.

    The noise of nu-DP-FTRL (https://arxiv.org/abs/2310.06771): that of the square root of prefix
    sums, with coefficients that decay like ``(1 - nu)^t``, for runs of any length. For one
    participation, the sensitivity of all of them is :func:`nu_dp_ftrl_sensitivity_squared`, and
    that of the first p is :func:`stationary_sensitivity_squared`.

    Args:
      num_bands: The number p of coefficients.
      nu: Above 0 and at most 1, where noise is independent.

    Returns:
      ``[p]`` array of the default float dtype. All of its digits hold: it is computed in float64.

    Raises:
      ValueError: if p < 1, or nu is out of range.
      TypeError: if p is not an integer, or nu is not a real number.
    """
    p, nu = _num_bands(num_bands), _nu(nu)
    k = np.arange(p)
    coefs = sqrt_prefix_sum(p) / (1 - 2 * k) * (1 - nu) ** k
    return jnp.asarray(coefs, jnp.result_type(float))


def _nu(nu: float) -> float:
    return check_scalar("nu", nu, lambda x: 0 < x <= 1, "in (0, 1]")


def nu_dp_ftrl_sensitivity_squared(nu: float) -> jax.Array:
    """Returns the squared sensitivity of nu-DP-FTRL, for one participation in any number of steps.

    ``sum_k (binom(2k, k) / 4^k)^2 (1 - nu)^(2k) = 2 K(m) / pi`` with the complete elliptic integral
    K of the parameter ``m = (1 - nu)^2``: see :func:`nu_dp_ftrl_noising_coefs`.

    Args:
      nu: Above 0 and at most 1.

    Returns:
      A scalar of the default float dtype, rounded up.

    Raises:
      ValueError: if nu is out of range.
      TypeError: if it is not a real number.
    """
    from scipy import special  # Takes as long to import as this package.

    nu = _nu(nu)
    wide = 2 / math.pi * float(special.ellipkm1(nu * (2 - nu))) * (1 + 2.0**-48)
    return as_dtype("the squared sensitivity", wide, jnp.result_type(float), upward=True)


def stationary_sensitivity_squared(noising_coef: jax.Array) -> jax.Array:
    """Returns the squared sensitivity of C for one participation in any number of steps.

    Given p coefficients of ``C^-1``, the coefficients of C are those of a recurrence. The sum of
    their squares is the variance of an autoregressive process, which the Levinson-Durbin recursion
    gives, run backwards: ``1 / (w_0^2 prod_i (1 - r_i^2))`` with reflection coefficients r. It is
    run in exact rationals: the result is exact, then rounded up. O(p^2) of them.

    Args:
      noising_coef: ``[p]`` coefficients of ``C^-1``, at most 64, the first not 0.

    Returns:
      A scalar of the dtype of the coefficients, at least the default float dtype.

    Raises:
      ValueError: if coefficients are not 1-D, empty or not finite, too many, or start with 0; or
        the sum of squares is infinite, as it is for ``(1, -1)``.
      TypeError: if they are not real.
    """
    w = check_coef("noising_coef", noising_coef, invertible=True)
    values = np.trim_zeros(np.asarray(w, np.float64), "b")
    if values.size > _MOST_EXACT:
        raise ValueError(
            f"expected at most {_MOST_EXACT} noising coefficients, found {values.size}"
        )
    a = [Fraction(float(x)) / Fraction(float(values[0])) for x in values]
    power = 1 / Fraction(float(values[0])) ** 2
    while len(a) > 1:
        reflection = a[-1]
        rest = 1 - reflection**2
        if rest <= 0:
            raise ValueError(
                "expected noising coefficients of a strategy whose squares have a finite sum, "
                f"found a reflection coefficient of {float(reflection):.6g} at {len(a)} bands"
            )
        power /= rest
        a = [(x - reflection * y) / rest for x, y in zip(a[:-1], a[:0:-1], strict=True)]
    nearest = float(power)
    wide = nearest if Fraction(nearest) >= power else math.nextafter(nearest, math.inf)
    dtype = promote_types(w.dtype, jnp.result_type(float))
    return as_dtype("the squared sensitivity", wide, dtype, upward=True)
