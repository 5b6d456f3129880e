"""Exact differential privacy: integer gradients, and correlated noise that is exact on their grid.

Floats leak: a float32 sample of noise takes one of 2^23 values, and the low bits of a noisy
gradient tell gradients apart that the noise should hide (Mironov, "On significance of the least
significant bits for differential privacy", CCS 2012; arXiv 2112.05307). Here gradients are rounded
to a grid, and everything after that is in integers. For a strategy C whose entries are multiples of
2^-k, and R(y) = floor(y + 1/2), the noise of step t is

    n_t = R(2^k z_t),   z_t ~ N(0, stddev^2)
    x_t = R((2^-k n_t - sum_{j<t} C[t, j] x_j) / C[t, t])

R commutes with the addition of integers. So G_t + x_t is a function of R(2^k (C G + z)), row by
row, also if G_t depends on what was released before: a post-processing of the Gaussian mechanism
on C G in real numbers, whose guarantee holds as it is proven. ``docs/security.md`` has the proof,
and says how nearly the z are normal: the total variation of a sample is below 2^-90.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jax_privacy_kernels.matrix_factorization import toeplitz
    >>> coef = round_coefs(toeplitz.optimal_max_error_strategy_coefs(16), fraction_bits=12)
    >>> noising_matrix = toeplitz.inverse_as_streaming_matrix(coef)
    >>> scale = 2**16  # steps of the grid in the clipping norm
    >>> noise = privatizer(noising_matrix, stddev=2.0 * scale)
    >>> per_example = {"w": jnp.ones((8, 10, 3)), "b": jnp.ones((8, 3))}
    >>> def clip(gradient):
    ...     return clip_and_round(gradient, l2_clip_norm=1.0, grid_scale=scale)
    >>> clipped, norms = jax.vmap(clip)(per_example)
    >>> total = jax.tree.map(lambda x: x.sum(axis=0), clipped)
    >>> state = noise.init(total)
    >>> noisy, state = jax.jit(noise.update, donate_argnums=1)(total, state)
    >>> gradient = to_float(noisy, l2_clip_norm=1.0, grid_scale=scale)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_privacy_kernels import _grid_bounds, random
from jax_privacy_kernels._checks import (
    check_int,
    check_scalar,
    floats,
    is_concrete,
    is_tracing,
    leaf_name,
    nan_unless,
    owned,
    promote_types,
    shown,
)
from jax_privacy_kernels.matrix_factorization import banded, streaming_matrix
from jax_privacy_kernels.noise_addition import Privatizer, on_mesh, shown_matrix
from jax_privacy_kernels.ops import (
    BandedRecurrence,
    BufferedToeplitz,
    GridMatrix,
    MovingAverage,
    NoiseState,
    check_name,
    grid_noise,
    init_grid_noise,
)

__all__ = [
    "clip_and_round",
    "inverse_as_streaming_matrix",
    "privatizer",
    "round_coefs",
    "to_float",
]

MOST_FRACTION_BITS = 20
# Sums of squares are made in blocks and those in blocks again, so that their error does not depend
# on how XLA orders additions: less than 256 roundings for each of seven levels.
_BLOCK = 256


# -- Gradients --------------------------------------------------------------------------------


def clip_and_round(
    gradient: Any, l2_clip_norm: jax.typing.ArrayLike, grid_scale: int
) -> tuple[Any, jax.Array]:
    """Clips one gradient and rounds it to integers of L2 norm at most grid_scale, for certain.

    The gradient times ``grid_scale / l2_clip_norm`` is clipped to the norm
    ``grid_scale - sqrt(d) / 2``, less a part in 4096, and rounded to the nearest integers, d being
    the number of its elements. Rounding adds sqrt(d) / 2 to the norm at most, and the part in 4096
    covers the rounding of floats; so one example changes a sum of clipped gradients by at most
    grid_scale. Choose a grid_scale that is many times sqrt(d). It maps over examples by `jax.vmap`;
    the sum is exact, in any order, as long as ``examples * grid_scale`` fits into the dtype.

    Args:
      gradient: tree of floating arrays, d elements in all. One that is not finite gives zeros.
      l2_clip_norm: the norm that stands for grid_scale, positive and finite as a float32, or as a
        float64 if a leaf is of float64.
      grid_scale: the norm in integers, more than sqrt(d); less than 2^30 (2^52 in x64 mode).

    Returns:
      A tree like the gradient of int32, int64 in x64 mode, and the L2 norm of the gradient before
      clipping, a float.

    Raises:
      TypeError: a leaf that is not floating; an l2_clip_norm that is not one number.
      ValueError: a grid_scale or l2_clip_norm out of range.
    """
    x64 = bool(jax.config.read("jax_enable_x64"))
    integer: Any = jnp.int64 if x64 else jnp.int32
    scale = _check_grid_scale(grid_scale, 52 if x64 else 30)
    leaves = [_floating(path, x) for path, x in jax.tree_util.tree_leaves_with_path(gradient)]
    dtype: Any = jnp.float64 if any(x.dtype == jnp.float64 for x in leaves) else jnp.float32
    _check_clip_norm(l2_clip_norm, dtype)
    leaves = [x.astype(dtype) for x in leaves]
    size = sum(x.size for x in leaves)
    target = (scale - math.sqrt(size) / 2) * (1 - 2.0**-12)
    if scale <= math.sqrt(size):
        raise ValueError(
            f"expected grid_scale > {math.sqrt(size):.6g}, the square root of the {size} elements "
            f"of the gradient, whose rounding would fill the norm, found {grid_scale}"
        )
    largest = jnp.max(
        jnp.stack([jnp.abs(x).max() for x in leaves if x.size] or [jnp.zeros((), dtype)])
    )
    finite = jnp.isfinite(largest)
    # By a power of two near the largest element first, so that squares neither overflow nor vanish.
    limit = -int(jnp.finfo(dtype).minexp) - 1
    exponent = jnp.frexp(jnp.where(finite & (largest > 0), largest, 1))[1] - 1
    exponent = jnp.clip(exponent, -limit, limit)
    unit, inverse = (jnp.ldexp(jnp.ones((), dtype), e) for e in (exponent, -exponent))
    units = [jnp.where(finite, x * inverse, 0) for x in leaves]
    squares = jnp.stack([_sum(jnp.square(x)) for x in units] or [jnp.zeros((), dtype)])
    norm_in_units = jnp.sqrt(_sum(squares))
    whole = unit * (scale / jnp.asarray(l2_clip_norm, dtype))
    factor = jnp.minimum(whole, target / jnp.maximum(norm_in_units, 1))
    factor = jnp.where(factor > 0, factor, 0)  # a clipping norm that a trace hides may be NaN
    rounded = [jnp.round(x * factor.astype(dtype)).astype(integer) for x in units]
    norm = jnp.where(finite, unit * norm_in_units, jnp.where(jnp.isnan(largest), jnp.nan, jnp.inf))
    return jax.tree.unflatten(jax.tree.structure(gradient), rounded), norm


def to_float(tree: Any, l2_clip_norm: jax.typing.ArrayLike, grid_scale: int) -> Any:
    """Integers on the grid as floats, ``l2_clip_norm / grid_scale`` times each.

    Args:
      tree: of int32 or int64 arrays, sums of what `clip_and_round` gives with or without noise.
      l2_clip_norm: as for `clip_and_round`.
      grid_scale: as for `clip_and_round`.

    Returns:
      A tree of float32, of float64 for int64. The least number of a dtype, which a privatizer gives
      where a trace has hidden that its state does not fit, becomes NaN.

    Raises:
      TypeError: a leaf that is not int32 or int64, or, outside of x64 mode, has numbers that int32
        does not hold; an l2_clip_norm that is not one number.
      ValueError: a grid_scale or l2_clip_norm out of range.
    """
    scale = _check_grid_scale(grid_scale, 52)
    _check_clip_norm(l2_clip_norm)

    def convert(path: Any, leaf: Any) -> jax.Array:
        x = _array(leaf)
        if x is None or x.dtype not in (jnp.int32, jnp.int64):
            raise TypeError(
                f"expected leaf {leaf_name(path)} to be of int32 or int64, "
                f"found {leaf if x is None else x.dtype}"
            )
        if isinstance(leaf, np.ndarray | np.generic) and (np.asarray(x) != leaf).any():
            raise TypeError(
                f"expected leaf {leaf_name(path)} to be of int32 outside of JAX's 64-bit mode, "
                f"found {leaf.dtype} with numbers that int32 does not hold"
            )
        dtype: Any = jnp.float32 if x.dtype == jnp.int32 else jnp.float64
        _check_clip_norm(l2_clip_norm, dtype)
        step = jnp.asarray(l2_clip_norm, dtype) / scale
        return nan_unless(x != jnp.iinfo(x.dtype).min, x.astype(dtype) * step)

    return jax.tree_util.tree_map_with_path(convert, tree)


def _sum(x: jax.Array) -> jax.Array:
    """The sum of numbers >= 0, with a relative error below 2^-13 for float32 and 2^40 elements."""
    x = x.reshape(-1)
    while x.size > 1:
        blocks = jnp.pad(x, (0, -x.size % _BLOCK)).reshape(-1, _BLOCK)
        x = jax.lax.optimization_barrier(blocks.sum(axis=1))  # else XLA makes one sum of all
    return x.sum()


def _check_grid_scale(grid_scale: Any, bits: int) -> int:
    scale = check_int("grid_scale", grid_scale)
    if scale >= 2**bits:
        raise ValueError(
            f"expected grid_scale < 2^{bits}, found {grid_scale}: sums of gradients would not fit "
            "into their integers"
        )
    return scale


def _array(leaf: Any) -> jax.Array | None:
    """A leaf as an array, or None if it is nothing that JAX has arrays of."""
    try:  # JAX takes strings for the names of dtypes
        return None if isinstance(leaf, str | bytes) else jnp.asarray(leaf)
    except (OverflowError, TypeError):
        return None


def _floating(path: Any, leaf: Any) -> jax.Array:
    """A leaf of a gradient as an array; a TypeError if it is not floating."""
    array = _array(leaf)
    what = type(leaf).__name__ if array is None else f"dtype {array.dtype}"
    if array is None or not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"expected leaf {leaf_name(path)} to be a floating array, found {what}")
    return array


def _check_clip_norm(l2_clip_norm: Any, dtype: Any = jnp.float64) -> None:
    if np.ndim(l2_clip_norm):
        raise TypeError(
            f"expected l2_clip_norm to be one number, found shape {np.shape(l2_clip_norm)}"
        )
    if is_concrete(l2_clip_norm):
        dtype = jax.dtypes.canonicalize_dtype(dtype)

        def is_valid(norm: float) -> bool:
            with np.errstate(over="ignore"):
                return bool(0 < np.asarray(norm, dtype) < math.inf)

        check_scalar("l2_clip_norm", l2_clip_norm, is_valid, f"positive and finite in {dtype}")


# -- Coefficients -----------------------------------------------------------------------------


def round_coefs(coef: jax.typing.ArrayLike, fraction_bits: int) -> jax.Array:
    """The coefficients of a strategy C, rounded to multiples of ``2^-fraction_bits``.

    All that is known of a strategy, its sensitivity and its error, is computed from the rounded
    coefficients as from any others; they are a strategy of their own, and the noise is exact for
    them. With 8 bits the error of optimal strategies of 4 to 64 bands grows by less than 0.1 %,
    with 12 by less than 0.01 %.

    Args:
      coef: ``[b]``, the coefficients of a Toeplitz strategy, or ``[n, b]``, ``C[t, t - l]`` for
        every row t.
      fraction_bits: k, from 0 to 20.

    Returns:
      An array of the same shape, and of its dtype if that is floating and holds the values.

    Raises:
      TypeError: coefficients that are not real numbers, or traced.
      ValueError: coefficients that are not finite or not below 2^31, a diagonal that rounds to 0, a
        k out of range, or a dtype that does not hold the rounded values.
    """
    bits = check_int("fraction_bits", fraction_bits, 0)
    if bits > MOST_FRACTION_BITS:
        raise ValueError(f"expected fraction_bits <= {MOST_FRACTION_BITS}, found {fraction_bits}")
    values = _rows_of_strategy(coef)
    given = owned("coef", coef)
    if not jnp.issubdtype(given.dtype, jnp.floating):
        given = given.astype(jnp.result_type(float))
    if values.ndim not in (1, 2) or values.size == 0:
        raise ValueError(f"expected coef of shape [b] or [n, b], found {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("expected coef to be finite, found NaN or infinite entries")
    if np.abs(values).max() >= 2.0**31:
        raise ValueError(f"expected coef to be below 2^31, found {np.abs(values).max():.6g}")
    rounded = np.floor(np.ldexp(values, bits) + 0.5)
    if (rounded[..., 0] == 0).any():
        raise ValueError(
            f"expected the diagonal of C to be at least 2^-{bits + 1}, found {values[..., 0].min()}"
        )
    rounded = np.ldexp(rounded, -bits)
    result = jnp.asarray(rounded, given.dtype)
    if not np.array_equal(np.asarray(result, np.float64), rounded):
        raise ValueError(
            f"expected coefficients that {given.dtype} holds with {bits} bits after the point, "
            f"found {np.abs(values).max():.6g}"
        )
    return result


def _rows_of_strategy(coef: Any) -> np.ndarray:
    """Coefficients of C as float64; a TypeError if they are not real numbers, or traced."""
    if not is_concrete(coef):
        raise TypeError("expected coef that is known, found one that is traced")
    dtype = getattr(coef, "dtype", np.dtype(float))  # of a list, floats() tells
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(f"expected coef to hold real numbers, found {dtype}")
    return floats("coef", coef)


def inverse_as_streaming_matrix(coef: jax.typing.ArrayLike) -> streaming_matrix.StreamingMatrix:
    """The noising matrix ``C^-1`` of a banded C that differs from row to row.

    For a Toeplitz C take `toeplitz.inverse_as_streaming_matrix`. A column-normalized C is one of
    these: ``C = banded.ColumnNormalizedBanded(..).materialize()`` has ``coef[t, l] = C[t, t - l]``.

    Args:
      coef: ``[n, b]``, ``C[t, t - l]`` for every row t and lag l, 0 where t < l; multiples of
        2^-k as `round_coefs` makes them.

    Returns:
      A StreamingMatrix of n rows; a privatizer refuses to go beyond them.

    Raises:
      TypeError: coef does not hold real numbers, or is traced.
      ValueError: coef is not [n, b], not finite, or has zeros in its first column.
    """
    rows = _rows_of_strategy(coef)
    if rows.ndim == 1 and rows.size:
        raise ValueError(
            f"expected coef of shape [n, b], found {rows.shape}: for a Toeplitz strategy take "
            "toeplitz.inverse_as_streaming_matrix(coef)"
        )
    if rows.ndim != 2 or rows.size == 0:
        raise ValueError(f"expected coef of shape [n, b], found {rows.shape}")
    if not np.isfinite(rows).all() or (rows[:, 0] == 0).any():
        raise ValueError("expected coef to be finite and the diagonal of C to be nonzero")
    array = owned("coef", coef)
    array = array.astype(promote_types(array.dtype, jnp.float32))
    return banded.inverse_of_rows(array, None, array.dtype)


# -- The privatizer ---------------------------------------------------------------------------


def privatizer(
    noising_matrix: streaming_matrix.StreamingMatrix | jax.typing.ArrayLike,
    *,
    stddev: float,
    prng_key: jax.Array | None = None,
    implementation: str | None = None,
) -> optax.GradientTransformation:
    """A privatizer of integers whose noise is exact: the matrix mechanism in real numbers, rounded.

    The guarantee of row after row of ``C G + Z``, Z with independent Gaussian entries of standard
    deviation ``stddev``, holds for the output as it is: with the sensitivity that C has for
    gradients of norm grid_scale, and any accounting for Gaussian noise. It rests on the cipher that
    makes the bits (`random.chacha20`), and on a total variation below 2^-90 for each sample. Noise
    is x of this module's beginning, the same integers in every implementation and on every mesh.

    Cost per step: as for the float privatizer of the same matrix, one pass for any number of bands,
    if the state is donated, with the same number of samples; the state holds as many integers,
    int32 if the noise fits, as the other holds floats.

    Args:
      noising_matrix: ``C^-1``: the identity, or the inverse of a banded C, Toeplitz or not, whose
        coefficients are multiples of 2^-k for a k of at most 20 (see `round_coefs`); a banded
        inverse (`toeplitz.noising_coef_as_streaming_matrix`) or an array ``[n, m]``, with any
        real coefficients, for which x_t is the sum ``(C^-1 z)_t``, rounded correctly.
      stddev: of Z, in steps of the grid: the noise multiplier times grid_scale times the
        sensitivity of C. ``2^k stddev`` has to be between 1/8 and 2^42, or for sums stddev times
        the absolute values of a row.
      prng_key: a key of type `random.chacha20`, or None, for which every ``init`` draws a
        `random.secure_key`. Who knows the key, or a state, knows the noise.
      implementation: "jax" or "cpp"; None for the fastest that runs on the platform.

    Returns:
      A transformation with ``init(model)``, which takes arrays or ShapeDtypeStructs shaped like the
      gradients, of int32, or int64 in x64 mode, and ``update(sum_of_clipped_grads, noise_state,
      params=None)``, which gives noisy integers of the same dtype. Sums of gradients and noise that
      do not fit wrap around, which costs no privacy; noise stays within half of the dtype's range
      with probability 1 - 2^-100, and sums of gradients should stay within the other half. Where a
      trace hides that a state is of another matrix or that steps are beyond the rows of C, all
      gradients are the least number of their dtype.

    Raises:
      TypeError: a noising matrix, stddev or key of a wrong type: keys of other types are no
        secrets. From init and update: leaves that are not int32 or, in x64 mode, int64.
      ValueError: an implementation that there is not; coefficients that are not on a grid, or
        traced; a stddev that is not positive, NaN or out of range; a C whose inverse grows without
        bound; sums that do not fit into 64 bits. From init and update, noise that does not fit into
        a leaf's dtype. Also what `noise_addition.matrix_factorization_privatizer` refuses of
        states, meshes and vmap.
      NotImplementedError: a noising matrix that has no exact noise, which says why.
    """
    check_name(implementation)
    stddev = _check_stddev(stddev)
    matrix = _grid_matrix(noising_matrix, stddev)
    draw = _key_source(prng_key)

    def init(model: Any) -> NoiseState:
        return init_grid_noise(model, matrix, key=draw())

    def update(
        sum_of_clipped_grads: Any, noise_state: Any, params: Any = None
    ) -> tuple[Any, NoiseState]:
        del params
        with jax.numpy_dtype_promotion("standard"):
            return grid_noise(
                sum_of_clipped_grads, noise_state, matrix, implementation=implementation
            )

    made = Privatizer(on_mesh(init), update)
    made.told = (
        f"grid.privatizer(<{shown_matrix(noising_matrix)}>, stddev={stddev}, "
        f"implementation={implementation!r}, noise stream chacha20)"
    )
    return made


def _grid_matrix(noising_matrix: Any, stddev: float) -> GridMatrix:
    """What the op needs of a noising matrix."""
    structure = getattr(noising_matrix, "structure", None)
    if isinstance(structure, BandedRecurrence):
        coef, bits = _grid_coefs(structure)
        scale = stddev * 2.0**bits  # infinite where it overflows
        if not _grid_bounds.LEAST_SCALE <= scale <= _grid_bounds.MOST_SCALE:
            raise ValueError(
                f"expected 2^k stddev between 1/8 and 2^42, found {scale:.6g} for stddev={stddev} "
                f"and coefficients with k={bits} bits after the point: choose another grid_scale, "
                "or fewer bits (round_coefs)"
            )
        return _grid_bounds.recurrence(coef, scale)
    if isinstance(structure, MovingAverage) and structure.row_scale is None:
        return _grid_bounds.sums(_weights(structure.coef), stddev, structure.slots)
    if isinstance(structure, BufferedToeplitz):
        raise NotImplementedError(
            "a BLT has no exact noise: its buffers are decaying sums whose decays are no multiples "
            "of any 2^-k after the first step, so that neither C nor its inverse stays on a grid. "
            "Take a banded strategy of as many bands as there are steps between participations"
        )
    if hasattr(noising_matrix, "multiply_next"):
        raise NotImplementedError(
            "this StreamingMatrix has no exact noise, as it is not known to be the inverse of a "
            "banded C or banded itself: take one of toeplitz.inverse_as_streaming_matrix, "
            "toeplitz.noising_coef_as_streaming_matrix or grid.inverse_as_streaming_matrix, or a "
            "dense matrix of its rows"
        )
    if isinstance(noising_matrix, jax.Array | np.ndarray):
        if noising_matrix.ndim != 2 or noising_matrix.size == 0:
            raise ValueError(
                "expected noising_matrix to be 2-D and not empty, "
                f"found shape {noising_matrix.shape}"
            )
        return _grid_bounds.sums(_weights(noising_matrix), stddev, 0)
    raise TypeError(
        "expected noising_matrix to be an array or a StreamingMatrix, found "
        f"{shown(noising_matrix)}"
    )


def _weights(coef: Any) -> np.ndarray:
    """Rows of C^-1, float64."""
    if not is_concrete(coef):
        raise ValueError("expected the coefficients of noising_matrix outside of traces")
    if not any(jnp.issubdtype(coef.dtype, kind) for kind in (jnp.floating, jnp.integer)):
        raise TypeError(f"expected noising_matrix to be real, found dtype {coef.dtype}")
    weights = np.array(coef, np.float64)
    if not np.isfinite(weights).all():
        raise ValueError("expected noising_matrix to be finite, found NaN or infinite entries")
    return weights


def _grid_coefs(structure: BandedRecurrence) -> tuple[np.ndarray, int]:
    """The coefficients of C times 2^k, int32 ``[b]`` or ``[n, b]``, and k."""
    if not is_concrete(structure):
        raise ValueError("expected the coefficients of noising_matrix outside of traces")
    coef = np.asarray(structure.coef, np.float64)
    if structure.row_scale is not None:
        coef = _unscaled(coef, np.asarray(structure.row_scale, np.float64))
    for bits in range(MOST_FRACTION_BITS + 1):
        scaled = np.ldexp(coef, bits)
        if np.array_equal(scaled, np.floor(scaled)):
            break
    else:
        worst = coef.reshape(-1)[np.argmax(scaled != np.floor(scaled))]
        raise ValueError(
            f"expected the coefficients of C to be multiples of 2^-{MOST_FRACTION_BITS}, found "
            f"{worst}: round them with grid.round_coefs(coef, fraction_bits)"
        )
    if np.abs(scaled).max() >= 2**31:
        raise ValueError(
            f"expected coefficients of less than 2^31 steps of 2^-{bits}, found "
            f"{np.abs(coef).max():.6g}"
        )
    if (scaled[..., 0] == 0).any():
        raise ValueError("expected the diagonal of C to be nonzero, found 0")
    return scaled.astype(np.int32), bits


def _unscaled(coef: np.ndarray, row_scale: np.ndarray) -> np.ndarray:
    """The rows of C for C^-1 = diag(row_scale) T^-1, T having these coefficients."""
    row_scale = row_scale[np.isfinite(row_scale)]  # NaN ends it
    n = len(row_scale)
    rows = np.broadcast_to(coef, (n, coef.shape[-1])) if coef.ndim == 1 else coef[:n]
    column = np.arange(n)[:, None] - np.arange(coef.shape[-1])[None, :]
    return np.where(column >= 0, rows / row_scale[np.maximum(column, 0)], 0.0)


def _check_stddev(stddev: Any) -> float:
    if not is_concrete(stddev):
        raise TypeError("expected a stddev that is known, found one that is traced")
    return check_scalar("stddev", stddev, lambda s: 0 < s < math.inf, "positive and finite")


def _key_source(prng_key: Any) -> Callable[[], jax.Array]:
    """What draws the key that a state begins with."""
    if prng_key is None:
        if is_tracing():
            raise ValueError(
                "expected a prng_key inside a trace, found None: a key drawn now would become a "
                "constant of the compiled program, and every call would add the same noise"
            )

        def draw() -> jax.Array:
            if jax.process_count() > 1:
                raise ValueError(
                    "expected a prng_key where several processes work together, found None: each "
                    "would draw its own, and replicas of a parameter would get different noise. "
                    "Draw a random.secure_key in one process and share it"
                )
            return random.secure_key()

        return draw
    dtype = getattr(prng_key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not typed or jax.random.key_impl(prng_key) != random.chacha20:
        # Not its value, which is somebody's secret.
        found = jax.random.key_impl(prng_key) if typed else f"a {type(prng_key).__name__}"
        raise TypeError(
            "expected prng_key to be a key of type random.chacha20, of random.secure_key() for "
            f"instance, found {found}: exact noise deserves a key that cannot be guessed"
        )
    if prng_key.shape:
        raise ValueError(f"expected prng_key to be one key, found keys of shape {prng_key.shape}")
    return lambda: prng_key


def __dir__() -> list[str]:  # for completion: no imported names
    return sorted(__all__)
