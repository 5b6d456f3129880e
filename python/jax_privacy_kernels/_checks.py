"""Argument checks shared by the public functions.

Shapes and types are always checked. Values are checked when they are there: inside a trace they
are not, and the check passes.

Errors say what was expected and what was found. Some begin with a few words more, such as "min_sep
must be positive": those that jax_privacy uses, for programs that look for them.
"""

from __future__ import annotations

import contextlib
import operator
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "check_coef",
    "check_instance",
    "check_int",
    "check_like",
    "check_memory",
    "check_one_given",
    "check_real",
    "check_scalar",
    "check_seed",
    "check_vector",
    "floats",
    "is_concrete",
    "is_tracing",
    "leaf_name",
    "nan_unless",
    "owned",
    "promote_types",
    "shown",
    "standard_promotion",
    "type_of",
]


def is_concrete(x: Any) -> bool:
    """Whether ``x``, a value or a nest of values, holds no tracer."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(x))


def is_tracing() -> bool:
    """Whether what is computed now becomes part of a program."""
    return isinstance(jnp.zeros(()) + 0, jax.core.Tracer)


def nan_unless(valid: Any, x: Any) -> jax.Array:
    """x where it is valid, and NaN elsewhere: what a trace does where it cannot refuse.

    Where JAX looks for NaN, in its debug mode, only one that is taken is a fault.
    """
    with jax.debug_nans(False):
        return jnp.where(valid, x, jnp.nan)


def leaf_name(path: Any) -> str:
    """What errors call the leaf of a tree at a path of jax.tree_util."""
    return jax.tree_util.keystr(path) or "(the only one)"


def shown(x: Any) -> str:
    """What errors show of a value that was given: of a key its type, as logs keep errors."""
    dtype = getattr(x, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return f"a key of type {jax.random.key_impl(x)}"
    return repr(x)


def promote_types(first: Any, second: Any) -> Any:
    """The dtype that two dtypes promote to, also where JAX's strict mode has operands agree."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(first, second)


@contextlib.contextmanager
def standard_promotion() -> Iterator[None]:
    """Inside of it dtypes and ranks are promoted, whatever the caller's modes."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def check_int(name: str, value: Any, minimum: int = 1, *, rule: str = "must be positive") -> int:
    """Returns ``value`` as an ``int``: TypeError if it is not one, ValueError below ``minimum``.

    Arrays without dimensions and floats that are whole, 1e6 for instance, count as integers; True
    and False do not. ``rule`` is how the error begins if the minimum is 1.
    """
    try:
        scalar = value.item() if np.ndim(value) == 0 and hasattr(value, "item") else value
        if isinstance(scalar, bool):
            raise TypeError
        whole = isinstance(scalar, float) and scalar.is_integer()
        result = int(scalar) if whole else operator.index(scalar)
    except (TypeError, ValueError, NotImplementedError) as error:
        # A ragged list has no dimension, a key of jax.random no item.
        raise TypeError(f"expected {name} to be an integer, found {shown(value)}") from error
    if result < minimum:
        begin = f"{name} {rule}: " if minimum == 1 else ""
        raise ValueError(f"{begin}expected {name} >= {minimum}, found {name}={result}")
    return result


def check_seed(seed: Any) -> int:
    """Returns a seed from 0 to 2^64 - 1; a TypeError or ValueError if it is none."""
    seed = check_int("seed", seed, 0)
    if seed >= 2**64:
        raise ValueError(f"expected seed < 2^64, found seed={seed}")
    return seed


def check_memory(name: str, n: int, size: int) -> None:
    """Raises a ValueError if ``size`` bytes are more than this machine has.

    Before they are asked for: XLA ends the process where sizes overflow.
    """
    try:
        most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # a system that does not tell
        most = 2**40
    if size > most:
        raise ValueError(
            f"expected {name} of which the arrays fit into {most} bytes of memory, "
            f"found {name}={n}, which takes {size} bytes"
        )


def check_instance(name: str, value: Any, expected: type) -> None:
    """Raises a TypeError unless ``value`` is of the class ``expected``, or its twin."""
    if not isinstance(value, expected):
        raise TypeError(
            f"expected {name} to be a {expected.__name__}, found {shown(value)} of type "
            f"{type(value).__name__}"
        )


def check_scalar(
    name: str,
    value: Any,
    is_valid: Callable[[float], bool] = lambda _: True,
    expected: str = "a real number",
) -> float:
    """Returns a real number as a float; TypeError if it is none, ValueError if it is not valid.

    ``expected`` describes numbers that pass.
    """
    try:
        if np.ndim(value) != 0 or np.asarray(value).dtype.kind in "bcSU":
            raise TypeError
        number = float(value)
    except OverflowError as error:
        raise ValueError(f"expected {name} to be {expected}, found {name}={value}") from error
    except (TypeError, ValueError) as error:
        raise TypeError(f"expected {name} to be {expected}, found {shown(value)}") from error
    if not is_valid(number):
        raise ValueError(f"expected {name} to be {expected}, found {name}={value}")
    return number


def owned(name: str, x: Any) -> jax.Array:
    """x as an array that shares no memory with the caller; TypeError if it is none.

    `jax.numpy.asarray` takes over memory that is aligned, and what is written there later.
    """
    try:
        if isinstance(x, jax.Array):
            return x
        if hasattr(x, "__array__"):
            x = np.array(x)
        with np.errstate(over="ignore"):  # an overflow is a value
            return jnp.asarray(x)
    except OverflowError as error:
        raise ValueError(f"expected {name} in the range of a dtype, found {shown(x)}") from error
    except (TypeError, ValueError) as error:
        if isinstance(error, jax.errors.JAXTypeError):
            raise
        raise TypeError(f"expected {name} to be an array of numbers, found {shown(x)}") from error


def floats(name: str, x: Any) -> np.ndarray:
    """x as an array of float64; ValueError if its numbers are too large, TypeError for others."""
    try:
        return np.asarray(x, np.float64)
    except OverflowError as error:
        raise ValueError(f"expected {name} in the range of float64, found {shown(x)}") from error
    except (TypeError, ValueError) as error:
        raise TypeError(f"expected {name} to be an array of numbers, found {shown(x)}") from error


def type_of(name: str, x: Any) -> Any:
    """`jax.typeof` of an array or a number; ValueError for a number too large for a dtype."""
    try:
        return jax.typeof(x)
    except OverflowError as error:
        raise ValueError(f"expected {name} in the range of a dtype, found {shown(x)}") from error


def check_one_given(**arguments: Any) -> None:
    """Raises a ValueError unless exactly one of two arguments, given by name, is not None."""
    absent = [value is None for value in arguments.values()]
    if sum(absent) != 1:
        found = "neither" if all(absent) else "both"
        raise ValueError(f"expected exactly one of {' and '.join(arguments)}, found {found}")


def check_real(expected: str, x: jax.Array) -> jax.Array:
    """Returns x as a floating array, integers as default floats; TypeError for other dtypes.

    ``expected`` says what x should be.
    """
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x
    if jnp.issubdtype(x.dtype, jnp.integer):
        return x.astype(jnp.result_type(float))
    raise TypeError(f"expected {expected}, found dtype {x.dtype}")


def check_vector(
    name: str,
    x: Any,
    is_valid: Callable[[np.ndarray], np.ndarray] | None = None,
    expected: str = "",
) -> jax.Array:
    """Returns ``x`` as a non-empty 1-D array, or raises a ValueError that says what is wrong.

    ``is_valid`` maps the values to a boolean array; ``expected`` describes values that pass.
    """
    array = owned(name, x)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"expected {name} to be a non-empty 1-D array, found shape {array.shape}")
    if is_valid is not None and is_concrete(x):
        # Inside a trace `array` is a tracer even where x is not, so look at x, in array's dtype.
        if jnp.issubdtype(array.dtype, jnp.complexfloating):
            raise TypeError(f"expected {name} to hold real numbers, found dtype {array.dtype}")
        with np.errstate(over="ignore"):
            values = np.asarray(x, array.dtype)
        bad = np.flatnonzero(~is_valid(values))
        if bad.size:
            raise ValueError(f"expected {expected}, found {name}[{bad[0]}] = {values[bad[0]]}")
    return array


def check_coef(name: str, coef: Any, *, invertible: bool = False) -> jax.Array:
    """Returns Toeplitz coefficients as a floating array ``[b]``; integers become floats.

    Raises ValueError unless they are 1-D, non-empty and finite (and, if ``invertible``, start with
    a nonzero one), TypeError unless they are real numbers.
    """

    def is_valid(values: np.ndarray) -> np.ndarray:
        valid = np.isfinite(values)
        if invertible:
            valid[0] &= values[0] != 0
        return valid

    expected = f"{name} to be finite" + (f" and {name}[0] to be nonzero" if invertible else "")
    array = check_vector(name, coef, is_valid, expected)
    return check_real(f"{name} to hold real numbers", array)


def check_like(name: str, value: Any, expected: Any, *, dtypes: bool = True) -> None:
    """Raises a ValueError unless two trees agree in structure and shapes (and, if asked, dtypes).

    ``expected`` is a tree of anything with shape and dtype; the error names the first difference.
    """

    def describe(tree: Any) -> dict[str, str]:
        found = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            where = name + jax.tree_util.keystr(path)
            like = leaf if hasattr(leaf, "dtype") else owned(where, leaf)
            found[where] = f"shape {like.shape}" + (f" and dtype {like.dtype}" if dtypes else "")
        return found

    if type(value) is not type(expected) and not isinstance(expected, jax.ShapeDtypeStruct):
        raise ValueError(
            f"expected {name} to be a {type(expected).__name__}, found a {type(value).__name__}"
        )
    found, want = describe(value), describe(expected)
    for path in want | found:
        if found.get(path) != want.get(path):
            raise ValueError(
                f"expected {path} to have {want.get(path, 'no value')}, "
                f"found {found.get(path, 'no value')}"
            )
    structure: Any
    wanted: Any
    structure, wanted = jax.tree.structure(value), jax.tree.structure(expected)
    if structure != wanted:
        raise ValueError(f"expected {name} to be a tree {wanted}, found {structure}")
