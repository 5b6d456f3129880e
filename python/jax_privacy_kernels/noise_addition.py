"""Privatizers: optax.GradientTransformations that add noise to clipped and summed gradients.

A privatizer's ``update(sum_of_clipped_grads, noise_state, params=None)`` returns noisy gradients
and the next state. The state is a tree of plain arrays: it can be jitted, scanned, donated and
checkpointed, and it holds everything that the noise to come depends on. Donate it: with b bands it
holds b - 1 copies of the model, which are updated in place if donated, and copied whole at every
step if not.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jax_privacy_kernels.matrix_factorization import toeplitz
    >>> coef = toeplitz.optimal_max_error_strategy_coefs(16)
    >>> noising_matrix = toeplitz.inverse_as_streaming_matrix(coef)
    >>> privatizer = matrix_factorization_privatizer(noising_matrix, stddev=2.0)
    >>> model = grads = {"w": jnp.zeros((10, 3)), "b": jnp.zeros(3)}
    >>> state = privatizer.init(model)
    >>> update = jax.jit(privatizer.update, donate_argnums=1)
    >>> for _ in range(4):
    ...     noisy_grads, state = update(grads, state)

They compose, ``optax.chain(privatizer, optimizer)``; what follows the noise is post-processing and
costs no privacy. The stddev that a privacy guarantee asks for is the noise multiplier times the
clipping norm times the sensitivity of the strategy C.
"""

from __future__ import annotations

import enum
import operator
import secrets
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_privacy_kernels import sharding_utils
from jax_privacy_kernels._checks import check_like, is_concrete, leaf_name
from jax_privacy_kernels.matrix_factorization import streaming_matrix
from jax_privacy_kernels.ops import (
    NoiseState,
    NoisingMatrix,
    check_noise_dtype,
    check_shared,
    correlated_noise,
    dense_kind,
    dense_noise,
    init_correlated_noise,
    sharding_of,
    zeros_on_mesh,
)

__all__ = [
    "SupportedStrategies",
    "gaussian_privatizer",
    "matrix_factorization_privatizer",
]


# The types of jax.typing.ArrayLike, which is a union and not itself a type.
_ARRAYS = (jax.Array, np.ndarray, np.bool_, np.number, bool, int, float, complex)


class SupportedStrategies(enum.Enum):
    """How noise is laid out over devices while it is made."""

    DEFAULT = "default"
    """As the gradients are: every device makes the noise of what it has of them, and nothing is
    communicated. It is the same noise on every mesh. Gradients that are replicated are so with
    their noise."""

    ZERO = "zero"
    """Split evenly over all devices of a mesh, whose axes have to be explicit; then brought to
    where the gradients are (see `sharding_utils`)."""

    def __eq__(self, other: object) -> bool:  # jax_privacy's member of the same name, too
        return isinstance(other, enum.Enum) and str(self) == str(other)

    __hash__ = enum.Enum.__hash__


class _StreamingState(NamedTuple):
    """State of a privatizer whose noising matrix has no fused kernel."""

    noise: NoiseState  # of the independent noise
    matrix: Any  # of StreamingMatrix.multiply_next


class _ZeroState(NamedTuple):
    """State of a privatizer whose noise is flat, and split evenly over all devices."""

    shards: Any  # mirrors the parameters; (0,) + the number of shards along every dimension
    noise: Any  # of the privatizer of the flat noise


class _DenseState(NamedTuple):
    """State of a privatizer with a dense noising matrix."""

    step: jax.Array  # int32 scalar, the row to come
    key: jax.Array  # [kw] uint32, the data of the key that every row regenerates its noise from
    # Nothing but shapes and dtypes, of all that the regenerated noise depends on beside the key.
    kind: jax.Array  # of the key
    buffers: Any  # (0,) + shape, the dtype of the noise


def matrix_factorization_privatizer(
    noising_matrix: jax.typing.ArrayLike | streaming_matrix.StreamingMatrix,
    *,
    stddev: float,
    prng_key: jax.Array | int | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    intermediate_strategy: SupportedStrategies = SupportedStrategies.DEFAULT,
    implementation: str | None = None,
) -> optax.GradientTransformation:
    """A privatizer that adds ``C^-1 Z`` to the gradients, row t at step t.

    Z has independent Gaussian entries of standard deviation ``stddev``, so that over time the
    noise on each parameter has covariance ``stddev^2 C^-1 C^-T``. For the same key it is the noise
    that jax_privacy adds. See Section 4.4 of "Correlated Noise Mechanisms for Differentially
    Private Learning", https://arxiv.org/abs/2506.08201.

    Cost per step, for a model of d parameters:

    * Banded C (`toeplitz.inverse_as_streaming_matrix`, `banded.ColumnNormalizedBanded`) and the
      identity: one fused pass, d samples and about 20 d bytes (float32), whatever the number of
      bands b; the state holds (b - 1) d numbers.
    * Buffered C (`buffered_toeplitz.BufferedToeplitz`), m buffers: one fused pass, d samples and
      8 (m + 1) d bytes; the state holds m d numbers.
    * Banded ``C^-1`` (`toeplitz.noising_coef_as_streaming_matrix`), p coefficients: one fused pass;
      with k slots of look-ahead (k + p - 1) / k d samples, and k d numbers of state; without any,
      p d samples and no state.
    * Any other StreamingMatrix, such as a product: its own ``multiply_next`` on d fresh samples.
    * A dense matrix: one fused pass, d samples for every non-zero of the row (by "jax", for every
      entry from the first of them to the last); the state holds no noise, all of it is made again
      from the key.

    Args:
      noising_matrix: ``C^-1``, a StreamingMatrix or an array ``[n, m]``.
      stddev: standard deviation of Z, in the units of the gradients; finite and not negative. A
        stddev that varies from step to step (traced, or by another privatizer on the same state)
        scales the rows of ``C^-1 Z`` where the matrix has a fused kernel, those of Z where not.
      prng_key: a typed or a raw key, a seed, or None for a fresh key from the operating system's
        entropy. Who knows the key knows the noise: give one only to reproduce a run. Every ``init``
        of a privatizer starts the same noise again.
      dtype: what noise is sampled in, one of float16, bfloat16, float32, float64; None for each
        gradient's own dtype. It is correlated and scaled in 32 bits at least. Gradients of 16 bits
        deserve ``dtype=jnp.float32``: a bfloat16 sample takes one of 128 values.
      intermediate_strategy: how noise is laid out over devices, see `SupportedStrategies`.
      implementation: of the noise kernel, "jax" or "cpp"; None for the fastest that takes the
        arguments.

    Returns:
      A transformation with ``init(model)``, which takes arrays or ShapeDtypeStructs shaped like
      the gradients, and ``update(sum_of_clipped_grads, noise_state, params=None)``. Noise is added
      in the wider of the gradient's and its own dtype; the result has the gradient's.

    Raises:
      TypeError: a noising matrix, key or stddev of a wrong type. From init and update: leaves that
        are not real floating, or a noise dtype that is not one of the above.
      ValueError: a dense matrix that is not 2-D, empty or not finite; stddev negative, NaN,
        infinite or beyond float32; a key that is not one key; no key inside a trace. From update:
        a state whose tree, shapes or dtypes are not those of this privatizer and these gradients;
        a step beyond the rows of a dense matrix (NaN instead inside a trace, and beyond those of a
        ColumnNormalizedBanded); an implementation asked for that cannot run. Coefficients that are
        refused where a matrix is made give NaN if a trace has hidden them.
      ValueError from update, too: in a shard_map, gradients that vary over axes that the state's
        key does not, whose shards would have the same noise; gradients unreduced over a mesh axis.
      From init and update with ``SupportedStrategies.ZERO``, ValueError: a leaf without a mesh;
      RuntimeError: one on a mesh with axes that are not explicit.
    """
    strategies = SupportedStrategies.DEFAULT, SupportedStrategies.ZERO
    if intermediate_strategy not in strategies:
        raise TypeError(
            f"expected intermediate_strategy to be one of {[str(s) for s in strategies]}, "
            f"found {intermediate_strategy!r}"
        )
    stddev = _check_stddev(stddev)
    key = _as_key(prng_key)
    if hasattr(noising_matrix, "multiply_next"):
        structure = getattr(noising_matrix, "structure", None)
        if isinstance(structure, NoisingMatrix):
            privatizer = _fused(structure, stddev, key, dtype, implementation)
        else:
            privatizer = _streaming(noising_matrix, stddev, key, dtype, implementation)
    elif isinstance(noising_matrix, _ARRAYS):
        privatizer = _dense(noising_matrix, stddev, key, dtype, implementation)
    else:
        raise TypeError(
            f"expected noising_matrix to be an array or a StreamingMatrix, found {noising_matrix!r}"
        )
    if intermediate_strategy == SupportedStrategies.ZERO:
        privatizer = _zero_redundancy(privatizer, dtype)
    return optax.GradientTransformation(_on_mesh(privatizer.init), privatizer.update)


def gaussian_privatizer(
    *,
    stddev: float,
    prng_key: jax.Array | int | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    intermediate_strategy: SupportedStrategies = SupportedStrategies.DEFAULT,
    implementation: str | None = None,
) -> optax.GradientTransformation:
    """A privatizer that adds independent Gaussian noise, as in DP-SGD.

    It is `matrix_factorization_privatizer` for the identity matrix: one band, no history. The
    arguments and errors are described there.
    """
    return matrix_factorization_privatizer(
        streaming_matrix.identity(),
        stddev=stddev,
        prng_key=prng_key,
        dtype=dtype,
        intermediate_strategy=intermediate_strategy,
        implementation=implementation,
    )


def _fused(
    matrix: NoisingMatrix,
    stddev: Any,
    key: jax.Array,
    dtype: Any,
    implementation: str | None,
) -> optax.GradientTransformation:
    def init(model: Any) -> NoiseState:
        return init_correlated_noise(model, matrix, key=key, dtype=dtype)

    def update(
        sum_of_clipped_grads: Any, noise_state: Any, params: Any = None
    ) -> tuple[Any, NoiseState]:
        del params
        return correlated_noise(
            sum_of_clipped_grads,
            noise_state,
            matrix,
            stddev=stddev,
            key_impl=jax.random.key_impl(key),
            dtype=dtype,
            implementation=implementation,
        )

    return optax.GradientTransformation(init, update)


def _streaming(
    matrix: Any, stddev: Any, key: jax.Array, dtype: Any, implementation: str | None
) -> optax.GradientTransformation:
    independent = _fused(streaming_matrix.identity().structure, 1.0, key, dtype, implementation)

    def wide(path: Any, leaf: Any) -> Any:
        # In 16 bits, small noise rounds to none.
        z_dtype = jnp.promote_types(check_noise_dtype(path, leaf, dtype), jnp.float32)
        return jax.ShapeDtypeStruct(leaf.shape, z_dtype, sharding=sharding_of(leaf))

    def init(model: Any) -> _StreamingState:
        z = jax.tree_util.tree_map_with_path(wide, model)
        return _StreamingState(independent.init(model), matrix.init_multiply(z))

    def update(
        sum_of_clipped_grads: Any, noise_state: Any, params: Any = None
    ) -> tuple[Any, _StreamingState]:
        del params
        # The independent noise checks its own state; a matrix may promote the dtype of its own.
        expected = jax.eval_shape(init, sum_of_clipped_grads)
        check_like("noise_state", noise_state, expected, dtypes=False)
        check_shared(sum_of_clipped_grads, noise_state.noise.clock.key)
        zeros = jax.tree_util.tree_map_with_path(
            lambda path, g: jnp.zeros_like(g, dtype=check_noise_dtype(path, g, dtype)),
            sum_of_clipped_grads,
        )
        unit, noise = independent.update(zeros, noise_state.noise)
        z = jax.tree.map(lambda u: stddev * u.astype(jnp.promote_types(u.dtype, jnp.float32)), unit)
        x, state = matrix.multiply_next(z, noise_state.matrix)
        return jax.tree.map(_add, sum_of_clipped_grads, x), _StreamingState(noise, state)

    return optax.GradientTransformation(init, update)


def _dense(
    matrix: jax.typing.ArrayLike,
    stddev: Any,
    key: jax.Array,
    dtype: Any,
    implementation: str | None,
) -> optax.GradientTransformation:
    # Approach 2 of Section 4.4.5 of https://arxiv.org/abs/2506.08201.
    rows = jnp.asarray(matrix)
    if rows.ndim != 2 or rows.size == 0:
        raise ValueError(
            "Expected 2D matrix: expected noising_matrix to be 2-D and not empty, "
            f"found shape {rows.shape}"
        )
    if jnp.issubdtype(rows.dtype, jnp.complexfloating):
        raise TypeError(f"expected noising_matrix to be real, found dtype {rows.dtype}")
    rows = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
    if is_concrete(matrix) and not np.isfinite(np.asarray(matrix, float)).all():
        raise ValueError("expected noising_matrix to be finite, found NaN or infinite entries")
    n = rows.shape[0]

    def empty(path: Any, leaf: Any) -> jax.Array:
        noise_dtype = check_noise_dtype(path, leaf, dtype)
        return jnp.zeros((0, *leaf.shape), noise_dtype)

    def init(model: Any) -> _DenseState:
        return _DenseState(
            jnp.zeros((), jnp.int32),
            jnp.copy(jax.random.key_data(key)),
            dense_kind(jax.random.key_impl(key)),
            jax.tree_util.tree_map_with_path(empty, model),
        )

    def update(
        sum_of_clipped_grads: Any, noise_state: Any, params: Any = None
    ) -> tuple[Any, _DenseState]:
        del params
        check_like("noise_state", noise_state, jax.eval_shape(init, sum_of_clipped_grads))
        step = noise_state.step
        if is_concrete(step) and not 0 <= int(step) < n:
            raise ValueError(
                f"expected at most {n} steps, the rows of noising_matrix, found step {step}"
            )
        # A trace cannot raise. NaN is seen; the noise of row n - 1 again would not be.
        row = jnp.where((step >= 0) & (step < n), rows[step] * stddev, jnp.nan)
        noisy = dense_noise(
            sum_of_clipped_grads,
            row,
            key=jax.random.wrap_key_data(noise_state.key, impl=jax.random.key_impl(key)),
            dtype=dtype,
            implementation=implementation,
        )
        return noisy, noise_state._replace(step=step + 1)

    return optax.GradientTransformation(init, update)


def _on_mesh(init: Any) -> Any:
    """The same, with all of the state on the mesh of the model, if it is known to be on one."""

    def init_on_mesh(model: Any) -> Any:
        state = init(model)
        shardings = map(sharding_of, jax.tree.leaves(model))
        meshes = [sharding.mesh for sharding in shardings if sharding is not None]
        if not is_concrete(state) or not meshes or not isinstance(meshes[0], Mesh):
            return state
        whole = NamedSharding(meshes[0], PartitionSpec())
        return jax.tree.map(
            lambda x: x if isinstance(x.sharding, NamedSharding) else jax.device_put(x, whole),
            state,
        )

    return init_on_mesh


def _zero_redundancy(
    privatizer: optax.GradientTransformation, dtype: Any
) -> optax.GradientTransformation:
    """The privatizer, on flat arrays that are split evenly over all devices."""

    def flat(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        noise_dtype = check_noise_dtype(path, leaf, dtype)
        try:
            like = sharding_utils.flatten_with_zero_redundancy(leaf)
        except (ValueError, RuntimeError) as error:
            where = f"SupportedStrategies.ZERO, leaf {leaf_name(path)}"
            raise type(error)(f"{where}: {error}") from error
        known = sharding_of(leaf) or like.sharding  # with devices, outside of traces
        sharding = NamedSharding(known.mesh, like.sharding.spec)
        return jax.ShapeDtypeStruct(like.shape, noise_dtype, sharding=sharding)

    def shards(leaf: Any) -> jax.Array:
        """Which noise a parameter gets depends on them, so they have to stay as they are."""
        sharding = jax.typeof(leaf).sharding
        local = sharding.shard_shape(leaf.shape)
        counts = (1 if not n else n // m for n, m in zip(leaf.shape, local, strict=True))
        return jnp.zeros((0, *counts))

    def init(model: Any) -> _ZeroState:
        noise = privatizer.init(jax.tree_util.tree_map_with_path(flat, model))
        return _ZeroState(jax.tree.map(shards, model), noise)

    def update(
        sum_of_clipped_grads: Any, noise_state: Any, params: Any = None
    ) -> tuple[Any, _ZeroState]:
        del params
        likes = jax.tree_util.tree_map_with_path(flat, sum_of_clipped_grads)
        check_like("noise_state", noise_state, jax.eval_shape(init, sum_of_clipped_grads))
        zeros = jax.tree.map(
            lambda like: zeros_on_mesh(like.shape, like.dtype, like.sharding), likes
        )
        noise, state = privatizer.update(zeros, noise_state.noise)
        noisy = jax.tree.map(sharding_utils.local_reshape_add, sum_of_clipped_grads, noise)
        return noisy, noise_state._replace(noise=state)

    return optax.GradientTransformation(init, update)


def _add(value: jax.Array, noise: jax.Array) -> jax.Array:
    return (value + noise).astype(value.dtype)


def _as_key(prng_key: Any) -> jax.Array:
    """A typed key of shape () from what users may give."""
    if prng_key is None:
        if isinstance(jnp.zeros(()) + 0, jax.core.Tracer):
            raise ValueError(
                "expected a prng_key inside a trace, found None: a key drawn now would become a "
                "constant of the compiled program, and every call would add the same noise"
            )
        words = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).size
        entropy = np.frombuffer(secrets.token_bytes(4 * words), np.uint32)
        return jax.random.wrap_key_data(jnp.asarray(entropy))
    if not isinstance(prng_key, jax.Array | np.ndarray):
        try:
            return jax.random.key(operator.index(prng_key))
        except TypeError as error:
            raise TypeError(
                f"expected prng_key to be a key, an integer or None, found {prng_key!r}"
            ) from error
    key = jnp.asarray(prng_key)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.dtype != jnp.uint32 or key.ndim != 1:
            raise TypeError(
                "expected prng_key to be a key, found an array of "
                f"dtype {key.dtype} and shape {key.shape}"
            )
        key = jax.random.wrap_key_data(key)
    if key.shape:
        raise ValueError(f"expected prng_key to be one key, found keys of shape {key.shape}")
    return key


def _check_stddev(stddev: Any) -> Any:
    if not is_concrete(stddev):
        if stddev.shape or not jnp.issubdtype(stddev.dtype, jnp.floating):
            raise TypeError(
                f"expected stddev to be a real number, found dtype {stddev.dtype}, "
                f"shape {stddev.shape}"
            )
        return stddev
    value = np.asarray(stddev)
    kinds = (jnp.floating, jnp.integer)
    if value.ndim or not any(jnp.issubdtype(value.dtype, kind) for kind in kinds):
        raise TypeError(f"expected stddev to be a real number, found {stddev!r}")
    # Noise is scaled in float32, where less than 1e-38 is zero.
    least, most = 1e-30, float(np.finfo(np.float32).max)
    if value != 0 and not least <= value <= most:
        raise ValueError(
            f"expected stddev to be 0 or between {least:g} and {most:g}, found {stddev}"
        )
    return float(value)
