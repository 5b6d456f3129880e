"""Privatizers: optax.GradientTransformations that add noise to clipped and summed gradients.

A privatizer's ``update(sum_of_clipped_grads, noise_state, params=None)`` returns noisy gradients
and the next state. The state is a tree of plain arrays: it can be jitted, scanned, donated and
checkpointed, and it holds everything that the noise to come depends on. Donate it: with b bands it
holds b - 1 copies of the model, which are updated in place if donated, and copied whole at every
step if not. A state makes the noise of one update: a loop, or a `jax.lax.map`, that does not go on
with the state after it gives every gradient the same noise. A `jax.lax.scan` carries it on.

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
costs no privacy. What passes a privatizer by has no noise: the leaves that ``optax.masked`` leaves
out are released as they are. The stddev that a privacy guarantee asks for is the noise multiplier
times the clipping norm times the sensitivity of the strategy C.
"""

from __future__ import annotations

import enum
import operator
import secrets
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_privacy_kernels import random, sharding_utils
from jax_privacy_kernels._checks import (
    check_like,
    floats,
    is_concrete,
    is_tracing,
    leaf_name,
    nan_unless,
    owned,
    promote_types,
    shown,
)
from jax_privacy_kernels.matrix_factorization import streaming_matrix
from jax_privacy_kernels.ops import (
    FLOATS,
    LEAST_STDDEV,
    MOST_STDDEV,
    NoiseState,
    NoisingMatrix,
    check_devices,
    check_mesh,
    check_name,
    check_noise_dtype,
    correlated_noise,
    dense_noise,
    fingerprint_of_function,
    init_correlated_noise,
    init_dense_noise,
    is_fingerprint,
    is_usable_stddev,
    mark_tree,
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
    """Laid out as the gradients are. Every device makes the noise of what it has of them, and
    nothing is communicated. It is the same noise on every mesh. Gradients that are replicated are
    so with their noise."""

    ZERO = "zero"
    """Split evenly over all devices of a mesh, whose axes have to be explicit; then brought to
    where the gradients are (see `sharding_utils`)."""

    def __eq__(self, other: object) -> bool:  # jax_privacy's member of the same name, too
        return isinstance(other, enum.Enum) and str(self) == str(other)

    __hash__ = enum.Enum.__hash__


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
      stddev: standard deviation of Z, in the units of the gradients; finite and not negative, 0 or
        between 1e-30 and the largest float32. One that is traced may change from step to step: row
        t of ``C^-1 diag(stddev) Z`` is added. Then no noise is made ahead, in plain JAX: for b
        bands a step reads all b - 1 slots. Such a state is of another kind: it comes from an
        ``init`` whose stddev is traced as well, or from the first step after one whose stddev is
        known, as `optax.inject_hyperparams` has it. (The carry of a scan keeps its type: trace the
        ``init`` there.) For a dense matrix stddev_t scales row t of ``C^-1 Z``.
      prng_key: a typed or a raw key, a seed, or None. Seeds that differ by a multiple of 2^32 are
        the same, outside of 64-bit mode. A key that is given begins every ``init`` of the
        privatizer and of its copies, cloudpickled ones for instance: the same noise each time. For
        None every ``init`` draws a `random.secure_key` of its own. Seeds and threefry keys
        reproduce jax_privacy's noise; for None, and for keys of type `random.chacha20`, it comes
        from ChaCha20, and nobody who sees some of it can tell the rest (``docs/security.md``).
        Inside of jit, the key that is drawn is a constant of the compiled ``init``, and every call
        of that begins the same noise; so does what runs under `jax.ensure_compile_time_eval`. Who
        knows the key, or a state, knows the noise: keep states secret, and give a key only to
        reproduce a run.
      dtype: what noise is sampled in, one of float16, bfloat16, float32, float64; None for each
        gradient's own dtype. It is correlated and scaled in 32 bits at least. Gradients of 16 bits
        deserve ``dtype=jnp.float32``: a bfloat16 sample takes one of 128 values. Outside of JAX's
        64-bit mode float64 means float32, with a warning.
      intermediate_strategy: how noise is laid out over devices, see `SupportedStrategies`.
      implementation: of the noise kernel, "jax", "cpp" (on CPUs), "pallas" or "triton" (on CUDA
        devices); None for the fastest that takes the arguments.

    Returns:
      A transformation with ``init(model)``, which takes arrays or ShapeDtypeStructs shaped like
      the gradients, and ``update(sum_of_clipped_grads, noise_state, params=None)``. Noise is added
      in the wider of the gradient's and its own dtype; the result has the gradient's. Its
      derivative with respect to the gradients is the identity, and with respect to a traced stddev
      the unit noise.

    Raises:
      TypeError: a noising matrix, key or stddev of a wrong type; a noise dtype that is not one of
        the above. From init and update: leaves that are not real floating.
      ValueError: an implementation that there is not; a dense matrix that is not 2-D, empty or not
        finite; stddev negative, NaN,
        infinite or beyond float32; a key that is not one key; no key inside a trace. From init: no
        key where several processes work together. From update: a state of another format, strategy,
        stddev or number of bands, or of gradients of other shapes or dtypes (NaN instead where a
        trace hides coefficients, stddev or shapes); a step beyond the rows of a dense matrix (NaN
        instead inside a trace, and beyond those of a ColumnNormalizedBanded); an implementation
        asked for that cannot run. Coefficients that are refused where a matrix is made give NaN if
        a trace has hidden them.
      ValueError from init and update, too: in a vmap, gradients that are mapped where the key is
        not, which would all have the same noise (NaN where both are mapped, and keys equal). From
        update: the same of a stddev or a noising matrix that is mapped; in a shard_map, gradients
        that vary over axes that the state's key does not (NaN with ``check_vma=False`` and in a
        pmap, where devices compare them, a pass over the gradients); gradients unreduced over a
        mesh axis.
      From init and update with ``SupportedStrategies.ZERO``, ValueError: a leaf without a mesh;
      RuntimeError: one on a mesh with axes that are not explicit.

    Warns:
      UserWarning: from init, once, if noise is sampled in 16 bits, whose few values tell gradients
        apart.
    """
    strategies = SupportedStrategies.DEFAULT, SupportedStrategies.ZERO
    if intermediate_strategy not in strategies:
        raise TypeError(
            f"expected intermediate_strategy to be one of {[str(s) for s in strategies]}, "
            f"found {intermediate_strategy!r}"
        )
    check_name(implementation)
    _check_dtype(dtype)
    stddev = _check_stddev(stddev)
    key = _Keys(prng_key)
    if hasattr(noising_matrix, "multiply_next"):
        structure = getattr(noising_matrix, "structure", None)
        if isinstance(structure, NoisingMatrix):
            privatizer = _fused(structure, stddev, key, dtype, implementation)
        else:
            privatizer = _streaming(noising_matrix, stddev, key, dtype, implementation)
    elif isinstance(noising_matrix, _ARRAYS):
        privatizer = _dense(noising_matrix, stddev, key, dtype, implementation)
    elif hasattr(noising_matrix, "inverse_as_streaming_matrix"):
        raise TypeError(
            "expected noising_matrix to be an array or a StreamingMatrix, found the strategy "
            f"{noising_matrix!r}: pass its inverse_as_streaming_matrix()"
        )
    else:
        raise TypeError(
            "expected noising_matrix to be an array or a StreamingMatrix, found "
            f"{shown(noising_matrix)}: coefficients of a strategy make a noising matrix by "
            "toeplitz.inverse_as_streaming_matrix(coef)"
        )
    if intermediate_strategy == SupportedStrategies.ZERO:
        privatizer = _zero_redundancy(privatizer, dtype)
    told = [
        f"<{shown_matrix(noising_matrix)}>",
        f"stddev={stddev if is_concrete(stddev) else 'traced'}",
        f"dtype={None if dtype is None else jnp.dtype(dtype).name}",
        f"intermediate_strategy={intermediate_strategy.name}",
        f"implementation={implementation!r}",
        f"noise stream {key.impl}",
    ]
    privatizer = _for_any_caller(on_mesh(privatizer.init), privatizer.update, dtype)
    privatizer.told = f"matrix_factorization_privatizer({', '.join(told)})"
    return privatizer


class Privatizer(optax.GradientTransformation):
    """A transformation that tells what it is, but not its key: errors print what they are about."""

    told = "matrix_factorization_privatizer(...)"

    def __repr__(self) -> str:
        return self.told


def shown_matrix(noising_matrix: Any) -> str:
    structure = getattr(noising_matrix, "structure", None)
    if isinstance(structure, NoisingMatrix):
        return str(structure)
    if hasattr(noising_matrix, "multiply_next"):
        return f"{noising_matrix!r} without a fused kernel"
    return f"dense {' x '.join(map(str, np.shape(noising_matrix)))} matrix"


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
    keys: _Keys,
    dtype: Any,
    implementation: str | None,
) -> optax.GradientTransformation:
    def init(model: Any) -> NoiseState:
        return init_correlated_noise(model, matrix, key=keys.draw(), stddev=stddev, dtype=dtype)

    def update(
        sum_of_clipped_grads: Any, noise_state: Any, params: Any = None
    ) -> tuple[Any, NoiseState]:
        del params
        return correlated_noise(
            sum_of_clipped_grads,
            noise_state,
            matrix,
            stddev=stddev,
            key_impl=keys.impl,
            dtype=dtype,
            implementation=implementation,
        )

    return optax.GradientTransformation(init, update)


def _streaming(
    matrix: Any, stddev: Any, keys: _Keys, dtype: Any, implementation: str | None
) -> optax.GradientTransformation:
    independent = _fused(streaming_matrix.identity().structure, 1.0, keys, dtype, implementation)

    def wide(path: Any, leaf: Any) -> Any:
        # In 16 bits, small noise rounds to none.
        z_dtype = jnp.promote_types(check_noise_dtype(path, leaf, dtype), jnp.float32)
        return jax.ShapeDtypeStruct(leaf.shape, z_dtype, sharding=sharding_of(leaf))

    def init_inner(model: Any) -> Any:
        return matrix.init_multiply(jax.tree_util.tree_map_with_path(wide, model))

    def of_matrix() -> Any:
        """The fingerprint of what the matrix computes with, to be added to that of the noise."""
        scalar = jax.ShapeDtypeStruct((), jnp.float32)
        try:
            inner = jax.eval_shape(matrix.init_multiply, scalar)
            return fingerprint_of_function(matrix.multiply_next, scalar, inner)
        except Exception:  # functions of a caller, who may have written them for another tree
            return np.uint32(0)

    def init(model: Any) -> NoiseState:
        return _owned(independent.init(model), of_matrix())._replace(inner=init_inner(model))

    def update(
        sum_of_clipped_grads: Any, noise_state: Any, params: Any = None
    ) -> tuple[Any, NoiseState]:
        del params
        zeros = jax.tree_util.tree_map_with_path(
            lambda path, g: jnp.zeros_like(g, dtype=check_noise_dtype(path, g, dtype)),
            sum_of_clipped_grads,
        )
        if not isinstance(noise_state, NoiseState):
            noise_state = NoiseState(noise_state, ())  # which the independent noise refuses
        # The independent noise checks its own state; a matrix may promote the dtype of its own.
        own = of_matrix()
        noise_state, once = _marked(noise_state, sum_of_clipped_grads, stddev, own)
        unit, noise = independent.update(zeros, _owned(noise_state, -own)._replace(inner=()))
        expected = jax.eval_shape(init_inner, sum_of_clipped_grads)
        check_like("noise_state.inner", noise_state.inner, expected, dtypes=False)
        jax.tree_util.tree_map_with_path(_check_as_wide, expected, noise_state.inner)
        once &= check_devices(sum_of_clipped_grads, noise_state.clock.keys, stddev, own)
        scale = jnp.asarray(stddev, jnp.result_type(float))
        scale = nan_unless(is_usable_stddev(scale) & once, scale)
        z = jax.tree.map(lambda u: scale * u.astype(jnp.promote_types(u.dtype, jnp.float32)), unit)
        x, inner = matrix.multiply_next(z, noise_state.inner)
        return jax.tree.map(_add, sum_of_clipped_grads, x), _owned(noise, own)._replace(inner=inner)

    return optax.GradientTransformation(init, update)


def _dense(
    matrix: jax.typing.ArrayLike,
    stddev: Any,
    keys: _Keys,
    dtype: Any,
    implementation: str | None,
) -> optax.GradientTransformation:
    rows = owned("noising_matrix", matrix)
    if rows.ndim != 2 or rows.size == 0:
        hint = (
            ": coefficients of a strategy make a noising matrix by "
            "toeplitz.inverse_as_streaming_matrix(coef), those of C^-1 by "
            "toeplitz.noising_coef_as_streaming_matrix(coef)"
        )
        raise ValueError(
            "Expected 2D matrix: expected noising_matrix to be 2-D and not empty, "
            f"found shape {rows.shape}{hint if rows.ndim == 1 else ''}"
        )
    if jnp.issubdtype(rows.dtype, jnp.complexfloating):
        raise TypeError(f"expected noising_matrix to be real, found dtype {rows.dtype}")
    # A copy: memory of NumPy may be shared, and is the caller's.
    rows = jnp.array(rows, promote_types(rows.dtype, jnp.float32))
    if is_concrete(matrix) and not np.isfinite(np.asarray(matrix, float)).all():
        raise ValueError("expected noising_matrix to be finite, found NaN or infinite entries")

    def init(model: Any) -> NoiseState:
        return init_dense_noise(model, rows, key=keys.draw(), dtype=dtype)

    def update(
        sum_of_clipped_grads: Any, noise_state: Any, params: Any = None
    ) -> tuple[Any, NoiseState]:
        del params
        return dense_noise(
            sum_of_clipped_grads,
            noise_state,
            rows,
            stddev=stddev,
            key_impl=keys.impl,
            dtype=dtype,
            implementation=implementation,
        )

    return optax.GradientTransformation(init, update)


def _for_any_caller(init: Any, update: Any, dtype: Any) -> Privatizer:
    """The privatizer, where JAX is strict about dtypes and where leaves are Python numbers, too."""

    def arrays(tree: Any) -> Any:
        number = int, float, complex
        return jax.tree.map(lambda x: owned("a leaf", x) if isinstance(x, number) else x, tree)

    def init_for_any_caller(model: Any) -> NoiseState:
        with jax.numpy_dtype_promotion("standard"):
            model = arrays(model)
            state = init(model)
            _warn_of_16_bits(model, dtype)
            return state

    def update_for_any_caller(
        sum_of_clipped_grads: Any, noise_state: Any, params: Any = None
    ) -> tuple[Any, NoiseState]:
        with jax.numpy_dtype_promotion("standard"):
            return update(arrays(sum_of_clipped_grads), noise_state, params)

    return Privatizer(init_for_any_caller, update_for_any_caller)


def _warn_of_16_bits(model: Any, dtype: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        noise_dtype = check_noise_dtype(path, leaf, dtype)
        if noise_dtype.itemsize == 2:
            # Python shows one warning of a text and a line once.
            warnings.warn(
                f"noise of 16 bits ({noise_dtype}) takes few values, one sample of bfloat16 one of "
                "128: noisy gradients that only one of two data sets can give tell the two apart. "
                "Pass dtype=jnp.float32 to the privatizer",
                stacklevel=1,
            )
            return


def on_mesh(init: Any) -> Any:
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

    def suffix(model: Any) -> str:
        """How many shards the leaves have: which noise a parameter gets depends on them."""
        counts = []
        for leaf in jax.tree.leaves(model):
            local = jax.typeof(leaf).sharding.shard_shape(leaf.shape)
            counts.append([n // m if n else 1 for n, m in zip(leaf.shape, local, strict=True)])
        return f"_zero_{zlib.crc32(repr(counts).encode()):08x}"

    def init(model: Any) -> NoiseState:
        state = privatizer.init(jax.tree_util.tree_map_with_path(flat, model))
        return _renamed(state, lambda name: name + suffix(model))

    def update(
        sum_of_clipped_grads: Any, noise_state: Any, params: Any = None
    ) -> tuple[Any, NoiseState]:
        del params
        likes = jax.tree_util.tree_map_with_path(flat, sum_of_clipped_grads)
        ending = suffix(sum_of_clipped_grads)
        inner = _renamed(noise_state, lambda name: _without_ending(name, ending))
        inner, once = _marked(inner, sum_of_clipped_grads)
        zeros = jax.tree.map(
            lambda like: zeros_on_mesh(like.shape, like.dtype, like.sharding), likes
        )
        noise, state = privatizer.update(zeros, inner)
        noise = jax.tree.map(lambda x: nan_unless(once, x), noise)
        noisy = jax.tree.map(sharding_utils.local_reshape_add, sum_of_clipped_grads, noise)
        return noisy, _renamed(state, lambda name: name + ending)

    return optax.GradientTransformation(init, update)


def _without_ending(name: str, ending: str) -> str:
    """The name of a kind without the ending that tells the shards of the gradients."""
    if not name.endswith(ending):
        found = "gradients that are split into other shards" if "_zero_" in name else "DEFAULT"
        raise ValueError(
            f"expected noise_state to be of SupportedStrategies.ZERO, of kind ...{ending} for "
            f"gradients that are split as these are, found one of {found}, of kind {name}"
        )
    return name.removesuffix(ending)


def _renamed(state: Any, rename: Callable[[str], str]) -> Any:
    """The state with another name of its kind; what is no such state stays as it is."""
    return _relabeled(state, lambda name, fingerprint: (rename(name), fingerprint))


def _marked(state: Any, grads: Any, *uses: Any) -> tuple[Any, Any]:
    """The state, known to make noise for these gradients, which it is then not made with.

    And for these other uses of `mark_tree`; and whether it makes it for no others.
    """
    keys = getattr(getattr(state, "clock", None), "keys", None)
    if not isinstance(state, NoiseState) or not isinstance(keys, jax.Array | np.ndarray):
        return state, True
    check_mesh(grads, keys)
    keys, once = mark_tree(keys, (grads, *uses))
    return state._replace(clock=state.clock._replace(keys=keys)), once


def _check_as_wide(path: Any, expected: Any, found: Any) -> None:
    dtype = jnp.result_type(found)
    if jnp.promote_types(dtype, expected.dtype) != dtype:
        raise ValueError(
            f"expected noise_state.inner{jax.tree_util.keystr(path)} to be of dtype "
            f"{expected.dtype} or wider, found {dtype}"
        )


def _owned(state: NoiseState, own: Any) -> NoiseState:
    """The state with a fingerprint added to its own."""
    return _relabeled(state, lambda name, fingerprint: (name, fingerprint + own))


def _relabeled(state: Any, relabel: Callable[[str, Any], tuple[str, Any]]) -> Any:
    kind = getattr(getattr(state, "clock", None), "kind", None)
    if not isinstance(state, NoiseState) or not isinstance(kind, dict):
        return state
    if not all(map(is_fingerprint, kind.values())):
        return state
    kind = dict(relabel(*item) for item in kind.items())
    return state._replace(clock=state.clock._replace(kind=kind))


def _add(value: jax.Array, noise: jax.Array) -> jax.Array:
    return (value + noise).astype(value.dtype)


class _Keys:
    """Where the states of a privatizer begin: at the key that was given, or each at a new one.

    A seed or a raw key is of jax_privacy's stream; without a key the stream is ``random.chacha20``.
    """

    def __init__(self, prng_key: Any) -> None:
        if prng_key is None and is_tracing():
            raise ValueError(
                "expected a prng_key inside a trace, found None: a key drawn now would become a "
                "constant of the compiled program, and every call would add the same noise"
            )
        self._given = None if prng_key is None else _as_key(prng_key)
        self.impl = random.chacha20
        if self._given is not None:
            self.impl = jax.random.key_impl(self._given)

    def draw(self) -> jax.Array:
        """The key that was given, or a secret one."""
        if self._given is not None:
            return self._given
        if jax.process_count() > 1:
            raise ValueError(
                "expected a prng_key where several processes work together, found None: each would "
                "draw its own, and replicas of a parameter would get different noise. Draw a key "
                "in one process and share it, by jax.experimental.multihost_utils."
                "broadcast_one_to_all for instance"
            )
        return random.secure_key(secrets.token_bytes(32))  # in a trace, too


def _as_key(prng_key: Any) -> jax.Array:
    """A typed key of shape () from what users may give."""
    if not isinstance(prng_key, jax.Array | np.ndarray):
        try:
            return jax.random.key(operator.index(prng_key))
        except TypeError as error:
            raise TypeError(
                "expected prng_key to be a key, an integer or None, "
                f"found a {type(prng_key).__name__}"
            ) from error
        except OverflowError as error:
            bits = int(prng_key).bit_length()  # its value is somebody's secret
            raise ValueError(
                f"expected prng_key to be an integer of 64 bits, found one of {bits} bits"
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


def _check_dtype(dtype: Any) -> None:
    """Refuses what is no floating dtype; says so where JAX makes noise of 64 bits that of 32."""
    try:
        known = dtype is None or jnp.dtype(dtype).name in FLOATS
    except TypeError:  # NumPy knows no such type
        known = False
    if not known:
        raise TypeError(f"expected dtype to be one of {', '.join(FLOATS)}, found {dtype!r}")
    if dtype not in (None, float) and jax.dtypes.canonicalize_dtype(dtype) != jnp.dtype(dtype):
        warnings.warn(
            f"requested dtype {jnp.dtype(dtype).name} is not available outside of JAX's 64-bit "
            "mode, and noise will be float32: set jax.config.update('jax_enable_x64', True), or "
            "use jnp.float32",
            stacklevel=3,
        )


def _check_stddev(stddev: Any) -> Any:
    if not is_concrete(stddev):
        kinds = (jnp.floating, jnp.integer)
        if stddev.shape or not any(jnp.issubdtype(stddev.dtype, kind) for kind in kinds):
            raise TypeError(
                f"expected stddev to be a real number, found dtype {stddev.dtype}, "
                f"shape {stddev.shape}"
            )
        if stddev.dtype == jnp.float32:  # converted to float64, a subnormal one would be 0
            return nan_unless(is_usable_stddev(stddev), stddev)
        return stddev
    value = floats("stddev", stddev) if type(stddev) is int else np.asarray(stddev)
    kinds = (jnp.floating, jnp.integer)
    if value.ndim or not any(jnp.issubdtype(value.dtype, kind) for kind in kinds):
        raise TypeError(f"expected stddev to be a real number, found {shown(stddev)}")
    # Noise is scaled in float32, where less than 1e-38 is zero.
    if value != 0 and not LEAST_STDDEV <= value <= MOST_STDDEV:
        raise ValueError(
            f"expected stddev to be 0 or between {LEAST_STDDEV:g} and {MOST_STDDEV:g}, "
            f"found {stddev}"
        )
    return float(value) or 0.0  # not -0.0


def __dir__() -> list[str]:  # for completion: no imported names
    return sorted(__all__)
