"""Checks that the matrices of a factorization ``A = B C`` are what the library takes them for.

Inside a trace, where values are not known, only shapes are checked.

    >>> check(A=jnp.tri(3), C=jnp.eye(3))
    >>> check(A=jnp.tri(3), C=jnp.ones((3, 3)))
    Traceback (most recent call last):
    ValueError: expected matrix C to be lower-triangular, found entry (0, 1) = 1.0
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_privacy_kernels._checks import is_concrete, owned

__all__ = [
    "check",
    "check_finite",
    "check_is_matrix",
    "check_lower_triangular",
    "check_square",
    "check_symmetric",
]


def check_is_matrix(M: Any, name: str = "") -> None:
    """Raises a ValueError unless M has two dimensions."""
    if jnp.ndim(M) != 2:
        raise ValueError(f"expected {_matrix(name)} to have 2 dimensions, found {_shape(M)}")


def check_square(M: Any, name: str = "") -> None:
    """Raises a ValueError unless M is a square matrix."""
    shape = jnp.shape(M)
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"expected {_matrix(name)} to be square, found {_shape(M)}")


def check_finite(M: Any, name: str = "") -> None:
    """Raises a ValueError if an entry of M is NaN or infinite."""
    _check_entries(M, jnp.isfinite, name, "to be finite")


def check_lower_triangular(M: Any, name: str = "", **allclose_kwargs: Any) -> None:
    """Raises a ValueError unless M is a matrix whose entries above the diagonal are close to 0.

    ``allclose_kwargs`` are those of `jax.numpy.allclose`.
    """
    check_is_matrix(M, name)
    _check_entries(
        M, lambda M: jnp.isclose(M, jnp.tril(M), **allclose_kwargs), name, "to be lower-triangular"
    )


def check_symmetric(M: Any, name: str = "", **allclose_kwargs: Any) -> None:
    """Raises a ValueError unless M is square, each entry close to the one across the diagonal.

    ``allclose_kwargs`` are those of `jax.numpy.allclose`.
    """
    check_square(M, name)
    _check_entries(M, lambda M: jnp.isclose(M, M.T, **allclose_kwargs), name, "to be symmetric")


def check(
    *, A: Any = None, B: Any = None, C: Any = None, X: Any = None, **allclose_kwargs: Any
) -> None:
    """Checks any of the matrices of ``A = B C`` and ``X = C^T C``, and that their shapes agree.

    Args:
      A: workload ``[n, n]``, lower-triangular.
      B: decoder ``[n, k]``, lower-triangular if it is square.
      C: strategy ``[k, n]``, lower-triangular if it is square.
      X: Gram matrix ``[n, n]``, symmetric.
      **allclose_kwargs: tolerances, as of `jax.numpy.allclose`.

    Raises:
      ValueError: one is not so, or not finite, or their shapes do not fit together.
    """
    given = {name: M for name, M in (("A", A), ("B", B), ("C", C), ("X", X)) if M is not None}
    shapes = {name: tuple(jnp.shape(M)) for name, M in given.items()}
    for name, M in given.items():
        if name in "AX":
            check_square(M, name)
        else:
            check_is_matrix(M, name)
        check_finite(M, name)
        if name == "X":
            check_symmetric(M, name, **allclose_kwargs)
        elif shapes[name][0] == shapes[name][1]:
            check_lower_triangular(M, name, **allclose_kwargs)

    sizes = {shape[1] if name == "C" else shape[0] for name, shape in shapes.items()}
    found = f"expected shapes A [n, n], B [n, k], C [k, n], X [n, n], found {shapes}"
    if "B" in shapes and "C" in shapes and shapes["B"][1] != shapes["C"][0]:
        raise ValueError(f"B and C shapes do not match: {found}")
    if len(sizes) > 1:
        raise ValueError(f"Expected matrix shapes to match: {found}")


def _check_entries(M: Any, are_valid: Any, name: str, expected: str) -> None:
    if not is_concrete(M):
        return
    with jax.ensure_compile_time_eval():  # values are known, also inside of a trace
        M = owned(_matrix(name), M)
        valid = are_valid(M)
        if not valid.all():
            at = tuple(int(i) for i in jnp.argwhere(~valid, size=1)[0])
            raise ValueError(f"expected {_matrix(name)} {expected}, found entry {at} = {M[at]}")


def _matrix(name: str) -> str:
    return f"matrix {name}" if name else "the matrix"


def _shape(M: Any) -> str:
    return f"shape {tuple(jnp.shape(M))}"


def __dir__() -> list[str]:  # for completion: no imported names
    return sorted(__all__)
