"""Lower-triangular matrices that multiply a stream, one row at a time.

Row t of ``A x`` depends on ``x_0 .. x_t`` only, so a stream x can be multiplied as it arrives. A
:class:`StreamingMatrix` is a pair of functions that does this with as little state as the matrix
allows (none for the identity, one slot for prefix sums, b - 1 slots for the inverse of a b-banded
matrix), and never holds A or x. The matrices have no fixed size: n is how many rows you ask for.

    >>> A = momentum_sgd_matrix(momentum=0.5) @ prefix_sum()
    >>> print(A.materialize(3))
    [[1.   0.   0.  ]
     [2.5  1.   0.  ]
     [4.25 2.5  1.  ]]
    >>> print(A @ jnp.array([1.0, 0.0, -1.0]))
    [1.   2.5  3.25]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels._checks import (
    check_instance,
    check_int,
    check_memory,
    check_scalar,
    check_vector,
    is_concrete,
    owned,
    promote_types,
    standard_promotion,
)
from jax_privacy_kernels._mirrored import Mirrored
from jax_privacy_kernels.matrix_factorization._scaling import restored, scaled
from jax_privacy_kernels.ops import (
    BandedRecurrence,
    Momentum,
    NoisingMatrix,
)

__all__ = [
    "Shape",
    "ShapePyTree",
    "State",
    "StreamingMatrix",
    "T",
    "diagonal",
    "identity",
    "momentum_sgd_matrix",
    "multiply_array",
    "multiply_streaming_matrices",
    "prefix_sum",
    "scale_rows_and_columns",
]

_MOST_WORDS = 300  # characters that name a product

State = TypeVar("State")
"""What a :class:`StreamingMatrix` carries from row to row: any pytree of arrays."""

Shape: TypeAlias = tuple[int, ...]
"""Of an array."""

ShapePyTree: TypeAlias = Any
"""A pytree of shapes."""


def _name(function: Any) -> str:
    """What a function is called, without its address."""
    name = getattr(function, "__qualname__", None)
    return type(function).__name__ if name is None else f"{function.__module__}.{name}"


def _in_words(matrix: Any) -> str:
    """What a matrix is called; by its functions, if nobody gave it a name."""
    structure, words = (getattr(matrix, name, None) for name in ("structure", "_words"))
    if isinstance(structure, NoisingMatrix | Momentum):
        return str(structure)
    return words or f"{_name(matrix.init_multiply)}, {_name(matrix.multiply_next)}"


@dataclasses.dataclass(frozen=True)
class StreamingMatrix(Mirrored, Generic[State]):
    """A lower-triangular matrix A, given by how it multiplies a stream.

    Each ``x_t`` is a pytree of arrays, and A acts on every element of it alike::

        >>> A = prefix_sum()
        >>> state = A.init_multiply(jnp.zeros(()))
        >>> for x in [1.0, 2.0, 3.0]:
        ...     y, state = A.multiply_next(jnp.asarray(x), state)
        ...     print(y)
        1.0
        3.0
        6.0

    For a whole array of rows, ``A @ x`` does the same inside one ``lax.scan``.

    Attributes:
      init_multiply: Maps ``x_0``, or ShapeDtypeStructs like it, to the state before row 0.
      multiply_next: Maps ``(x_t, state)`` to ``((A x)_t, next state)``.
      structure: What fused kernels may use in place of the two functions: a description of exactly
        the same rows, or None where there is none. It takes no part in comparisons.
    """

    init_multiply: Callable[[Any], State]
    multiply_next: Callable[[Any, State], tuple[Any, State]]
    # Not an argument: dataclasses.replace on one of the functions must drop it.
    structure: Any = dataclasses.field(default=None, init=False, repr=False, compare=False)
    # What it is called, where it has no structure that says so.
    _words: str | None = dataclasses.field(default=None, init=False, repr=False, compare=False)

    def __repr__(self) -> str:
        return f"StreamingMatrix({_in_words(self)})"

    @classmethod
    def from_array_implementation(
        cls,
        init_multiply_fn: Callable[[jax.Array | jax.ShapeDtypeStruct], State],
        multiply_next_fn: Callable[[jax.Array, State], tuple[jax.Array, State]],
        *,
        structure: Any = None,
    ) -> StreamingMatrix:
        """Builds a matrix from functions of one array by applying them to each leaf of a pytree.

        Args:
          init_multiply_fn: Maps one leaf of ``x_0``, or its ShapeDtypeStruct, to its state.
          multiply_next_fn: Maps ``(leaf of x_t, its state)`` to ``(output leaf, next state)``.
          structure: See the attribute of the same name.

        Returns:
          A matrix whose state has the tree of ``x_0``, with a state in place of each leaf.
        """

        @standard_promotion()
        def init_multiply(abstract_value: Any) -> Any:
            return jax.tree.map(init_multiply_fn, abstract_value)

        @standard_promotion()
        def multiply_next(value: Any, state: Any) -> tuple[Any, Any]:
            treedef: Any = jax.tree.structure(value)
            states = treedef.flatten_up_to(state)
            results = [
                multiply_next_fn(leaf, leaf_state)
                for leaf, leaf_state in zip(jax.tree.leaves(value), states, strict=True)
            ]
            return (
                treedef.unflatten([output for output, _ in results]),
                treedef.unflatten([new_state for _, new_state in results]),
            )

        return _with_structure(cls(init_multiply, multiply_next), structure)

    def materialize(self, n: int) -> jax.Array:
        """Returns the leading n x n block, in the default float dtype. Meant for tests: O(n^2).

        Raises:
          ValueError: if n < 1.
          TypeError: if n is not an integer.
        """
        n = check_int("n", n)
        check_memory("n", n, 8 * n * n)
        return multiply_array(self, jnp.eye(n, dtype=jnp.result_type(float)))

    def row_norms_squared(self, n: int, scan_fn: Callable[..., Any] = jax.lax.scan) -> jax.Array:
        """Returns the squared L2 norms of the first n rows, as an array ``[n]``.

        For ``B = A C^-1`` these are the expected squared errors of the factorization ``A = B C``,
        query by query: their sum and their maximum are the total and the maximum error.

        Cost: n steps of ``multiply_next`` on a vector ``[n]``. Reverse-mode differentiation keeps
        the state of all n steps, unless ``scan_fn`` recomputes some of them.

        Args:
          n: Number of rows.
          scan_fn: Replaces ``jax.lax.scan``, and is called like it. A checkpointed scan, such as
            ``functools.partial(equinox.internal.scan, kind="checkpointed", checkpoints=8)``, trades
            time for the memory of the backward pass.

        Raises:
          ValueError: if n < 1.
          TypeError: if n is not an integer.
        """
        n = check_int("n", n)
        check_memory("n", n, 32 * n)
        zero = jnp.zeros(n, jnp.result_type(float))

        def step(state: State, t: jax.Array) -> tuple[State, jax.Array]:
            row, state = self.multiply_next(zero.at[t].set(1), state)
            values, scale = scaled(row)
            squared = jnp.sum(values * values)
            return state, restored("the squared norm", squared, squared.dtype, (scale, 2))

        return scan_fn(step, self.init_multiply(zero), jnp.arange(n))[1]

    def scale_rows_and_columns(
        self, row_scale: jax.Array | None = None, col_scale: jax.Array | None = None
    ) -> StreamingMatrix:
        """See the function :func:`scale_rows_and_columns`."""
        return scale_rows_and_columns(self, row_scale, col_scale)

    def __matmul__(self, other: T) -> T:
        """Multiplies by an array of rows ``[n, ...]`` or by another :class:`StreamingMatrix`.

        Raises:
          ValueError: if ``other`` is neither.
        """
        if isinstance(other, StreamingMatrix):
            return multiply_streaming_matrices(self, other)
        if isinstance(other, jax.Array | np.ndarray):
            return multiply_array(self, other)
        raise ValueError(
            f"expected an array or a StreamingMatrix to multiply by, found {type(other).__name__}"
        )

    def __mul__(self, other: float) -> StreamingMatrix:
        """Multiplies every entry by a real scalar, a number or a 0-d array; keeps the structure.

        Raises:
          TypeError: if ``other`` is not a real scalar.
        """
        number = isinstance(other, int | float | np.generic | np.ndarray | jax.Array)
        if not number or np.ndim(other) != 0 or jnp.iscomplexobj(other):
            raise TypeError(f"expected a real scalar to multiply by, found {other!r}")
        scale = owned("the scalar", other)[None]
        return _with_structure(
            multiply_streaming_matrices(self, diagonal(scale)),
            _scale_structure(self.structure, scale),
        )


T = TypeVar("T", StreamingMatrix, jax.Array)
"""What a :class:`StreamingMatrix` can be multiplied by."""


def scale_rows_and_columns(
    matrix: StreamingMatrix,
    row_scale: jax.Array | None = None,
    col_scale: jax.Array | None = None,
) -> StreamingMatrix:
    """Returns ``diag(row_scale) @ matrix @ diag(col_scale)``.

    Args:
      matrix: The matrix to scale.
      row_scale: ``[m]``, or None to leave the rows alone. Rows from m on use the last entry.
      col_scale: ``[m]``, or None to leave the columns alone; extends like ``row_scale``.

    Returns:
      The scaled matrix. Scaled rows keep the structure, if ``matrix`` has one; scaled columns lose
      it.

    Raises:
      ValueError: if a scale is not 1-D or is empty.
    """
    check_instance("matrix", matrix, StreamingMatrix)
    result = matrix
    if row_scale is not None:
        row_scale = check_vector("row_scale", row_scale)
        result = _with_structure(
            multiply_streaming_matrices(diagonal(row_scale), result),
            _scale_structure(matrix.structure, row_scale),
        )
    if col_scale is not None:
        col_scale = check_vector("col_scale", col_scale)
        result = multiply_streaming_matrices(result, diagonal(col_scale))
    return result


def _with_structure(matrix: StreamingMatrix, structure: Any) -> StreamingMatrix:
    """Returns the matrix, new and not yet shared, with its structure set."""
    object.__setattr__(matrix, "structure", structure)
    return matrix


def _called(matrix: StreamingMatrix, words: str) -> StreamingMatrix:
    """Returns the matrix, new and not yet shared, with its name set."""
    object.__setattr__(matrix, "_words", words)
    return matrix


def _scale_structure(structure: Any, scale: jax.Array) -> NoisingMatrix | None:
    """Describes ``diag(scale) @ matrix`` for a matrix of this structure, or gives None.

    The last entry of a scale goes on, so a scale of size 1 is a constant.
    """
    if not isinstance(structure, NoisingMatrix) or jnp.iscomplexobj(scale):
        return None
    # In 16 bits, products of small scales would be none.
    with jax.debug_nans(False):  # which may be the last entry
        dtype = promote_types(promote_types(scale.dtype, structure.dtype), jnp.float32)
        scale = scale.astype(dtype)
    old = structure.row_scale
    if old is not None:
        rows = jnp.arange(max(old.size, scale.size))
        with jax.debug_nans(False):
            scale = old.at[rows].get(mode="clip") * scale.at[rows].get(mode="clip")
    return dataclasses.replace(structure, row_scale=scale)


def multiply_array(A: StreamingMatrix, x: jax.Array) -> jax.Array:
    """Returns the product ``A x``, with one ``lax.scan`` over the rows of x.

    Args:
      A: The matrix.
      x: ``[n, ...]`` array of rows, n >= 1.

    Raises:
      ValueError: if x has no rows.
    """
    check_instance("A", A, StreamingMatrix)
    x = owned("x", x)
    if x.ndim == 0 or x.shape[0] == 0:
        raise ValueError(f"expected an array with at least one row, found shape {x.shape}")

    def step(state: Any, row: jax.Array) -> tuple[Any, jax.Array]:
        output, state = A.multiply_next(row, state)
        return state, output

    return jax.lax.scan(step, A.init_multiply(x[0]), x)[1]


def multiply_streaming_matrices(A: StreamingMatrix, B: StreamingMatrix) -> StreamingMatrix:
    """Returns the product ``A B``, which runs the stream through B and then through A.

    Its state is the pair (state of A, state of B). It has no structure.

    Raises:
      TypeError: if one is not a :class:`StreamingMatrix`.
    """
    check_instance("A", A, StreamingMatrix)
    check_instance("B", B, StreamingMatrix)

    def init_multiply(abstract_value: Any) -> tuple[Any, Any]:
        return A.init_multiply(abstract_value), B.init_multiply(abstract_value)

    def multiply_next(value: Any, state: tuple[Any, Any]) -> tuple[Any, tuple[Any, Any]]:
        A_state, B_state = state
        inner, B_state = B.multiply_next(value, B_state)
        outer, A_state = A.multiply_next(inner, A_state)
        return outer, (A_state, B_state)

    words = f"({_in_words(A)}) @ ({_in_words(B)})"
    if len(words) > _MOST_WORDS:
        words = "a long product"
    return _called(StreamingMatrix(init_multiply, multiply_next), words)


def identity() -> StreamingMatrix:
    """Returns the identity matrix. It has no state."""
    return _with_structure(
        StreamingMatrix(lambda abstract_value: (), lambda value, state: (value, ())),
        BandedRecurrence(coef=jnp.ones(1, jnp.float32)),
    )


def prefix_sum() -> StreamingMatrix:
    """Returns the lower-triangular matrix of ones: row t of the product is ``x_0 + ... + x_t``."""

    def multiply_next(value: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
        total = total + value
        return total, total

    return StreamingMatrix.from_array_implementation(
        jnp.zeros_like, multiply_next, structure=Momentum()
    )


def diagonal(diag: jax.Array) -> StreamingMatrix:
    """Returns a diagonal matrix.

    Args:
      diag: ``[m]``, the first m entries of the diagonal. All later ones equal ``diag[-1]``.

    Raises:
      ValueError: if ``diag`` is not 1-D or is empty.
    """
    diag = check_vector("diag", diag)

    def multiply_next(value: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        return value * diag.at[t].get(mode="clip"), t + 1

    matrix = StreamingMatrix.from_array_implementation(lambda _: jnp.array(0), multiply_next)
    return _called(matrix, f"diagonal, {diag.size} given")


def momentum_sgd_matrix(
    momentum: float = 0, learning_rates: jax.Array | None = None, *, decay: float = 1.0
) -> StreamingMatrix:
    """Returns the workload of SGD with momentum: gradients in, (negated) iterates out.

    Row t of the product is ``y_t = decay * y_{t-1} + eta_t m_t`` with
    ``m_t = momentum * m_{t-1} + x_t``. With the defaults that is the prefix sum. The state is two
    slots and the step.

    Args:
      momentum: The momentum, usually in [0, 1).
      learning_rates: ``[m]``, the learning rates eta of the first m steps; later steps use the last
        one. None means 1 at every step.
      decay: What every step multiplies the iterate by, above 0 and at most 1: one minus the product
        of learning rate and weight decay, for instance 0.9999.

    Raises:
      ValueError: if ``learning_rates`` is not 1-D, is empty, or has an entry that is not finite and
        positive (a rate of zero makes the workload singular), or ``decay`` is out of range.
      TypeError: if ``momentum`` or ``decay`` is not a real number.
    """
    if is_concrete(momentum):
        check_scalar("momentum", momentum)
    if is_concrete(decay):
        decay = check_scalar("decay", decay, lambda x: 0 < x <= 1, "in (0, 1]")
    if isinstance(momentum, np.ndarray):
        momentum = momentum.item()
    rates = check_vector(
        "learning_rates",
        jnp.ones(1, jnp.result_type(float)) if learning_rates is None else learning_rates,
        lambda values: np.isfinite(values) & (values > 0),
        "learning rates to be positive and finite",
    )

    def init_multiply(abstract_value: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        dtype = jnp.result_type(abstract_value.dtype, rates.dtype, momentum)
        # Two arrays, so that both can be donated.
        buffer, result = (jnp.zeros_like(abstract_value, dtype=dtype) for _ in range(2))
        return jnp.array(0), buffer, result

    def multiply_next(value: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        t, buffer, result = state
        buffer = momentum * buffer + value
        result = decay * result + rates.at[t].get(mode="clip") * buffer
        return result, (t + 1, buffer, result)

    return StreamingMatrix.from_array_implementation(
        init_multiply, multiply_next, structure=Momentum(momentum, rates, decay)
    )


def __dir__() -> list[str]:  # for completion: no imported names
    return sorted(__all__)
