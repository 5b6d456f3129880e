"""Coefficients of a strategy from those of its inverse, with what rounding may have taken added.

Forward substitution finds c with ``w * c = e`` up to residuals ``|r| <= gamma |w| * |c|``, gamma a
small multiple of the unit roundoff. So c is off by ``C r``, which is at most ``max|c| R / (1 - R)``
with ``R = gamma |w|_1 |c|_1``: small as a rule, but above 1 for an ill-conditioned recurrence such
as that of ``(1 - x)^10``, whose c would be 39 % too small. Then more digits are computed with.
"""

from __future__ import annotations

import decimal
from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels import ops
from jax_privacy_kernels._checks import promote_types
from jax_privacy_kernels.matrix_factorization._scaling import Scale, scaled

__all__ = ["bounded_inverse"]

# A bound that is more than this above the coefficients is made with more digits.
_GOAL = 1e-10
# The most terms that are added with more digits: a few seconds.
_MOST_TERMS = 2 * 10**7
_MOST_DIGITS = 4000


def bounded_inverse(noising_coef: jax.Array, n: int) -> tuple[np.ndarray | jax.Array, Scale]:
    """Bounds on the first n coefficients of C: with their signs, and not below them in size.

    Args:
      noising_coef: ``[p]`` coefficients of ``C^-1``, p <= n, the first not 0.
      n: The size of C.

    Returns:
      ``(values, scale)``, the bounds being ``values / scale``. Infinite in a trace where rounding
      may have taken half of them.

    Raises:
      ValueError: Where the coefficients are known and cannot be bounded.
    """
    w, scale = scaled(noising_coef)
    if not isinstance(w, np.ndarray):
        dtype = promote_types(w.dtype, jnp.result_type(float))
        c = ops.toeplitz_solve(w.astype(dtype), _unit(n, dtype))
        # A scalar times the largest coefficient; constant, so that derivatives are those of c.
        fixed = jax.lax.stop_gradient(c)
        spread = _gamma(w.size) * jnp.abs(w).sum().astype(dtype) * jnp.abs(fixed).sum()
        error = jnp.abs(fixed).max() * spread / (1 - spread)
        error = jnp.where(spread < 0.5, error, jnp.full_like(error, jnp.inf))
        error = jax.lax.stop_gradient(error)
        return c + jnp.where(c < 0, -error, error), scale
    known = np.trim_zeros(w, "b")
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        solution = np.asarray(
            ops.toeplitz_solve(jnp.asarray(known), _unit(n, np.dtype(np.float64)))
        )
    with np.errstate(all="ignore"):
        spread = _gamma(known.size) * np.abs(known).sum() * np.abs(solution).sum()
        error = np.abs(solution).max() * spread / (1 - spread)
    if not spread <= _GOAL and n * known.size <= _MOST_TERMS:
        exact, exponent = _inverse_with_more_digits(known, n)
        return exact, _divided(scale, exponent)
    if not spread < 0.5:
        raise ValueError(
            f"expected noising coefficients whose inverse can be bounded for n={n}, found that "
            f"rounding changes it by a factor of {spread:.3g}; {_MOST_TERMS} terms are the most "
            "that are computed with more digits"
        )
    return np.where(solution < 0, solution - error, solution + error), scale


def _unit(n: int, dtype: np.dtype) -> jax.Array:
    return jnp.asarray(np.eye(1, n, dtype=dtype)[0])


def _gamma(p: int) -> float:
    """A bound on the relative error of a sum of p products, whatever its order, and a quotient."""
    return 4 * (p + 8) * 2.0**-53


def _divided(scale: Scale, exponent: int) -> int:
    """The scale of bounds that are ``2^exponent`` times what ``scale`` takes them for."""
    assert isinstance(scale, int)
    return scale - exponent


def _inverse_with_more_digits(w: np.ndarray, n: int) -> tuple[np.ndarray, int]:
    """``(values, e)``: bounds ``values 2^e``, the largest of them near 1."""
    exact = [Decimal(float(x)) for x in w]
    digits, goal = 50, Decimal(10) ** -25
    while digits <= _MOST_DIGITS:
        with decimal.localcontext(prec=digits, Emax=10**12, Emin=-(10**12)):
            c = [1 / exact[0]]
            scaled_w = [-x / exact[0] for x in exact[1:]]
            while len(c) < n:
                terms = zip(scaled_w, c[: -len(exact) : -1], strict=False)
                c.append(sum((x * y for x, y in terms), Decimal(0)))
            sizes = [abs(x) for x in c]
            unit = Decimal(10) ** (1 - digits)
            # Another factor, as scaled_w is rounded too.
            spread = (4 * len(exact) + 16) * unit * sum(map(abs, exact)) * sum(sizes)
            largest = max(sizes)
            if spread <= goal:
                exponent = int(Decimal(largest.adjusted()) * Decimal("3.3219280948873623"))
                power = Decimal(2) ** exponent
                error = largest * spread * 2
                bounds = [(abs(x) + error) / power for x in c]
                # To the nearest float64 and one further.
                values = np.nextafter(np.array([float(x) for x in bounds]), np.inf)
                return np.where([x < 0 for x in c], -values, values), exponent
            digits += max((spread / goal).adjusted() + 3, digits // 2)
    raise ValueError(
        f"expected noising coefficients whose inverse can be bounded for n={n}, found that it "
        f"takes more than {_MOST_DIGITS} digits"
    )
