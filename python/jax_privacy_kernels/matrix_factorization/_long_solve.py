"""Systems of long Toeplitz matrices of many bands, by halves: n log(n)^2 in place of n^2.

The first half is solved for; what it contributes to the second is a product, by
`ops.toeplitz_multiply`; then the second half is solved for. Every product of a coefficient with an
element of x is part of exactly one sum: one of forward substitution or one of a product, which errs
by at most 1e-13 of the sizes of its terms. Together that is less than what forward substitution
over as many bands may err by, so that x is as accurate.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels import ops

__all__ = ["is_long", "solve"]

_LEAF = 2**14  # elements that forward substitution solves for
_BANDS = 2**13  # below, it is as fast
_SIZE = 2**17


def is_long(bands: int, n: int) -> bool:
    """Whether :func:`solve` is worth it."""
    return n >= _SIZE and bands >= _BANDS


def solve(coef: np.ndarray, rhs: np.ndarray) -> np.ndarray:
    """x with ``C x = rhs``, in float64.

    Args:
      coef: ``[m]`` coefficients of C, ``coef[0] != 0``.
      rhs: ``[n]``.
    """
    n, leaf = len(rhs), _LEAF
    size = leaf * 2 ** max(0, (-(-n // leaf) - 1).bit_length())
    x = np.zeros(size)  # to a size whose halves are of few shapes, each of which is compiled
    x[:n] = rhs
    c = np.zeros(size)
    c[: min(len(coef), size)] = coef[:size]
    bands = min(len(coef), size)

    def solve_part(first: int, last: int) -> None:
        if first >= n:
            return
        if last - first == leaf:
            part = ops.toeplitz_solve(jnp.asarray(c[:leaf]), jnp.asarray(x[first:last]))
            x[first:last] = np.asarray(part)
            return
        middle = (first + last) // 2
        solve_part(first, middle)
        if middle < n:
            whole = np.pad(x[first:middle], (0, last - middle))
            reach = jnp.asarray(c[: min(bands, last - first)])
            x[middle:last] -= np.asarray(ops.toeplitz_multiply(reach, jnp.asarray(whole)))[
                middle - first :
            ]
        solve_part(middle, last)

    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        solve_part(0, size)
    return x[:n]
