"""Functions of strategies, Toeplitz or banded, by either library, on inputs of a size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels.matrix_factorization import banded, sensitivity, toeplitz

__all__ = ["FUNCTIONS", "OURS", "TITLES", "Library", "Size", "call", "difference", "peer"]


class Library(NamedTuple):
    toeplitz: ModuleType
    sensitivity: ModuleType
    banded: ModuleType


OURS = Library(toeplitz, sensitivity, banded)


def peer() -> Library:
    """jax_privacy's modules; an ImportError where it is not installed."""
    from jax_privacy.matrix_factorization import banded, sensitivity, toeplitz

    return Library(toeplitz, sensitivity, banded)


@dataclasses.dataclass(frozen=True)
class Size:
    """A function and the size of its arguments."""

    function: str  # of FUNCTIONS
    n: int
    bands: int | None = None  # None for all n
    min_sep: int = 1
    max_participations: int | None = None

    @property
    def coefficients(self) -> int:
        return self.bands or self.n

    @property
    def label(self) -> str:
        """In words."""
        parts = [f"n = {self.n:,}"]
        if self.coefficients < self.n:
            parts.append(f"b = {self.coefficients}")
        if self.min_sep > 1:
            parts.append(f"min_sep = {self.min_sep}")
        if self.max_participations is not None:
            parts.append(f"k = {self.max_participations}")
        return ", ".join(parts)


def multiply(size: Size, coef: jax.Array, library: Library) -> Callable[[], Any]:
    return lambda: library.toeplitz.multiply(coef, coef)


def inverse(size: Size, coef: jax.Array, library: Library) -> Callable[[], Any]:
    return lambda: library.toeplitz.inverse_coef(coef, size.n)


def solve(size: Size, coef: jax.Array, library: Library) -> Callable[[], Any]:
    rhs = jnp.ones(size.n)
    return lambda: library.toeplitz.solve_banded(coef, rhs)


def min_sep(size: Size, coef: jax.Array, library: Library) -> Callable[[], Any]:
    limits = {"min_sep": size.min_sep, "max_participations": size.max_participations}
    return lambda: library.toeplitz.minsep_sensitivity_squared(coef, n=size.n, **limits)


def gram(size: Size, coef: jax.Array, library: Library) -> Callable[[], Any]:
    C = toeplitz.materialize_lower_triangular(coef, size.n)
    X = jnp.matmul(C.T, C, precision="highest")
    bound = library.sensitivity.get_min_sep_sensitivity_upper_bound_for_X
    return lambda: bound(X, size.min_sep, size.max_participations)


def error(size: Size, coef: jax.Array, library: Library) -> Callable[[], Any]:
    return lambda: library.toeplitz.per_query_error(strategy_coef=coef, n=size.n)


def error_grad(size: Size, coef: jax.Array, library: Library) -> Callable[[], Any]:
    def mean(coef: jax.Array) -> jax.Array:
        return library.toeplitz.per_query_error(strategy_coef=coef, n=size.n).mean()

    return lambda: jax.value_and_grad(mean)(coef)


def rows(size: Size, coef: jax.Array, library: Library) -> Callable[[], Any]:
    C = library.banded.ColumnNormalizedBanded.from_banded_toeplitz(size.n, coef)
    return lambda: library.banded.per_query_error(C)


def rows_grad(size: Size, coef: jax.Array, library: Library) -> Callable[[], Any]:
    C = library.banded.ColumnNormalizedBanded.from_banded_toeplitz(size.n, coef)
    return lambda: jax.value_and_grad(lambda C: library.banded.per_query_error(C).mean())(C)


FUNCTIONS = {
    f.__name__: f
    for f in (multiply, inverse, solve, min_sep, gram, error, error_grad, rows, rows_grad)
}
TITLES = {
    "multiply": "multiply",
    "inverse": "inverse_coef",
    "solve": "solve_banded",
    "min_sep": "minsep_sensitivity_squared",
    "gram": "get_min_sep_sensitivity_upper_bound_for_X",
    "error": "per_query_error",
    "error_grad": "mean of per_query_error, and gradient",
    "rows": "banded.per_query_error",
    "rows_grad": "mean of banded.per_query_error, and gradient",
}


def call(size: Size, library: Library) -> Callable[[], Any]:
    """The function on the first coefficients of the optimal strategy for prefix sums."""
    coef = toeplitz.optimal_max_error_strategy_coefs(size.coefficients)
    return FUNCTIONS[size.function](size, coef, library)


def difference(a: Any, b: Any) -> float:
    """The largest difference of two results, relative to the largest number in the second."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    wide = [(np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in pairs]
    return max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in wide)
