"""The matrices: BLTs, their coefficients, their inverses, and their streaming forms."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels import ops
from jax_privacy_kernels._checks import (
    check_instance,
    check_int,
    check_memory,
    check_real,
    check_scalar,
    is_concrete,
    owned,
    promote_types,
    standard_promotion,
)
from jax_privacy_kernels._mirrored import Mirrored
from jax_privacy_kernels.matrix_factorization import toeplitz
from jax_privacy_kernels.matrix_factorization.buffered_toeplitz._sums import (
    KNOWN,
    TRACED,
    Arithmetic,
    Array,
    coefs,
    result,
)
from jax_privacy_kernels.matrix_factorization.streaming_matrix import StreamingMatrix, identity

__all__ = [
    "MIN_GAP",
    "BufferedToeplitz",
    "StreamingMatrixBuilder",
    "blt_pair_from_theta_pair",
    "blts_of_decays",
    "check_float64_dtype",
    "min_buf_decay_gap",
    "min_gap",
    "values_of",
]

# Decays of C closer than this count as the same: no inverse is made of them.
MIN_GAP = 1e-9


def check_float64_dtype(blt: BufferedToeplitz) -> None:
    """Raises a ValueError if the BLT is of float64 and JAX is not in its 64-bit mode."""
    check_instance("the BLT", blt, BufferedToeplitz)
    if blt.dtype == np.float64 and not jax.config.read("jax_enable_x64"):
        raise ValueError(
            "dtype=jnp.float64 needs 64-bit mode: "
            "expected JAX's 64-bit mode for a BLT of dtype float64, which optimize() returns: call "
            'this inside of `with jax.enable_x64(True):`, or set `jax.config.update("'
            'jax_enable_x64", True)`, or make a BLT of float32 by '
            "`BufferedToeplitz.build(buf_decay, output_scale, dtype=jnp.float32)`"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamingMatrixBuilder(Mirrored):
    """Makes the streaming forms of a BLT.

    The state of either is one array ``[m] + shape`` for each leaf, the buffers, of the dtype that
    the leaf and the BLT promote to.

    Attributes:
      buf_decay: ``[m]`` decays theta.
      output_scale: ``[m]`` scales omega, of the same dtype.
    """

    buf_decay: Array
    output_scale: Array

    def __post_init__(self) -> None:
        _own(self)
        BufferedToeplitz(self.buf_decay, self.output_scale).validate()

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the parameters."""
        return self.buf_decay.dtype

    def build(self, *, look_ahead: int = 0) -> StreamingMatrix:
        """Returns C, by Algorithm 2 of https://arxiv.org/abs/2408.08868.

        Args:
          look_ahead: See :meth:`BufferedToeplitz.inverse_as_streaming_matrix`.
        """

        def multiply_next(x: jax.Array, buffers: jax.Array) -> tuple[jax.Array, jax.Array]:
            return x + self._read(buffers), self._update(buffers, x)

        return self._streaming_matrix(multiply_next, look_ahead, inverse=False)

    def build_inverse(self, *, look_ahead: int = 0) -> StreamingMatrix:
        """Returns ``C^-1``, by Algorithm 3 of https://arxiv.org/abs/2408.08868.

        Args:
          look_ahead: See :meth:`BufferedToeplitz.inverse_as_streaming_matrix`.
        """

        def multiply_next(y: jax.Array, buffers: jax.Array) -> tuple[jax.Array, jax.Array]:
            x = y - self._read(buffers)
            return x, self._update(buffers, x)

        return self._streaming_matrix(multiply_next, look_ahead, inverse=True)

    def _streaming_matrix(
        self,
        multiply_next: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
        look_ahead: int,
        *,
        inverse: bool,
    ) -> StreamingMatrix:
        slots = check_int("look_ahead", look_ahead, minimum=0)
        structure: ops.NoisingMatrix = identity().structure
        if len(self.buf_decay):
            parameters: Any = self.buf_decay, self.output_scale
            structure = ops.BufferedToeplitz(
                parameters[0], parameters[1], inverse=inverse, slots=slots
            )
        return StreamingMatrix.from_array_implementation(
            self._init, multiply_next, structure=structure
        )

    def _init(self, abstract_value: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
        dtype = promote_types(abstract_value.dtype, self.dtype)
        # zeros_like keeps the sharding of the value, zeros would not.
        zero = jnp.zeros_like(abstract_value, dtype=dtype)
        return jnp.broadcast_to(zero, (len(self.buf_decay), *zero.shape))

    def _read(self, buffers: jax.Array) -> jax.Array:
        scale = jnp.asarray(self.output_scale)
        return jnp.tensordot(scale, buffers, axes=1, precision="highest")

    def _update(self, buffers: jax.Array, x: jax.Array) -> jax.Array:
        decay = jnp.asarray(self.buf_decay).reshape(-1, *[1] * (buffers.ndim - 1))
        return (decay * buffers + x).astype(buffers.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BufferedToeplitz(Mirrored):
    """A buffered linear Toeplitz matrix C. :meth:`build` is the way to make one.

    For instance, ``theta = [d, e]`` and ``omega = [r, s]`` give, for n = 4::

        [1          ]            c1 = r       + s
        [c1  1      ]    with    c2 = r d     + s e
        [c2 c1  1   ]            c3 = r d d   + s e e
        [c3 c2 c1  1]

    No buffers at all are the identity. A pytree with two leaves; of float64 unless asked for
    otherwise, since decays near 1 matter. See https://arxiv.org/abs/2404.16706 and, for several
    participations, https://arxiv.org/abs/2408.08868.

    Attributes:
      buf_decay: ``[m]`` floating array of decays theta.
      output_scale: ``[m]`` array of scales omega, of the same dtype.
    """

    buf_decay: Array
    output_scale: Array

    def __post_init__(self) -> None:
        _own(self)

    # Not those of a class that this one is paired with.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def validate(self) -> None:
        """Checks the parameters: a tree like this one may hold anything, and is not checked.

        Raises:
          ValueError: If they are not 1-D, of one shape and of one dtype, or not finite.
          TypeError: If the dtype is not floating.
        """
        shapes = jnp.shape(self.buf_decay), jnp.shape(self.output_scale)
        if shapes[0] != shapes[1] or len(shapes[0]) != 1:
            rule = "have the same length" if len(shapes[0]) == len(shapes[1]) == 1 else "be 1D"
            raise ValueError(
                f"buf_decay and output_scale must {rule}: "
                "expected buf_decay and output_scale to be 1-D and of the same length, "
                f"found shapes {shapes[0]} and {shapes[1]}"
            )
        dtypes = _dtype(self.buf_decay), _dtype(self.output_scale)
        if dtypes[0] != dtypes[1]:
            raise ValueError(
                "buf_decay and output_scale must have the same dtype: "
                "expected buf_decay and output_scale of the same dtype, "
                f"found {dtypes[0]} and {dtypes[1]}"
            )
        if not jnp.issubdtype(dtypes[0], jnp.floating):
            raise TypeError(f"expected a BLT of floating dtype, found {dtypes[0]}")
        if is_concrete(self):
            for name in ("buf_decay", "output_scale"):
                values = np.asarray(getattr(self, name), np.float64)
                bad = np.flatnonzero(~np.isfinite(values))
                if bad.size:
                    raise ValueError(
                        f"expected {name} to be finite, found {name}[{bad[0]}] = {values[bad[0]]}"
                    )

    @classmethod
    def build(
        cls,
        buf_decay: jax.typing.ArrayLike | Sequence[float],
        output_scale: jax.typing.ArrayLike | Sequence[float],
        dtype: jax.typing.DTypeLike = jnp.float64,
    ) -> BufferedToeplitz:
        """Makes a BLT of arrays, lists or tuples of numbers, its decays in decreasing order.

        Args:
          buf_decay: ``[m]`` decays theta.
          output_scale: ``[m]`` scales omega, in the same order.
          dtype: That of the BLT. float64 needs JAX's 64-bit mode, here and where the BLT is used:
            see :func:`check_float64_dtype`.

        Raises:
          ValueError: If they are not 1-D, of one length, and finite, or ``dtype`` is float64 and
            JAX is not in 64-bit mode.
          TypeError: If they are not real numbers, or ``dtype`` is not floating.
        """
        dtype = np.dtype(dtype)  # a TypeError if it is none
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"expected a floating dtype, found {dtype}")
        if dtype == np.float64 and not jax.config.read("jax_enable_x64"):
            raise ValueError(
                "dtype=jnp.float64 needs 64-bit mode: "
                "expected JAX's 64-bit mode for dtype float64, the default: call this inside of "
                "`with jax.enable_x64(True):`, or pass dtype=jnp.float32"
            )
        decay, scale = (
            check_real(f"{name} to hold real numbers", owned(name, x))
            for name, x in (("buf_decay", buf_decay), ("output_scale", output_scale))
        )
        return cls(decay.astype(dtype), scale.astype(dtype)).canonicalize()

    @classmethod
    def from_rational_approx_to_sqrt_x(
        cls,
        num_buffers: int,
        *,
        max_buf_decay: float = 1.0,
        max_pillutla_score: float | None = None,
        buf_decay_scale: float = 1.6,
        buf_decay_shift: int = -1,
    ) -> BufferedToeplitz:
        """Returns a BLT that approximates `toeplitz.optimal_max_error_strategy_coefs`.

        Those have the generating function ``1 / sqrt(1 - x)``. The rational approximation of
        ``sqrt(1 - x)`` in Proposition 4.5 of https://arxiv.org/abs/2404.16706 is a BLT, ``C^-1``:
        its decays are equally spaced on the logit scale. Of use to start an optimization; as it is,
        its error is well above that of :func:`optimize`.

        Args:
          num_buffers: The number m of buffers, at least 1.
          max_buf_decay: All decays are multiplied by one number, so that none is larger than this.
          max_pillutla_score: Then all scales are, so that :meth:`pillutla_score` is not larger than
            this; None leaves them.
          buf_decay_scale: Spacing of the decays. The larger it is, the closer they come to 0 and 1.
          buf_decay_shift: How many places all are moved towards 0, or if negative towards 1.

        Returns:
          A BLT of float64.

        Raises:
          ValueError: If an argument is out of range, JAX is not in 64-bit mode, or the decays come
            out too close to each other, which they do from some number of buffers on.
          TypeError: If ``num_buffers`` is not an integer.
        """
        m = check_int("num_buffers", num_buffers, rule="must be >= 1")
        check_memory("num_buffers", m, 8 * m * m)
        for name, bound in (
            ("max_buf_decay", max_buf_decay),
            ("max_pillutla_score", max_pillutla_score),
            ("buf_decay_scale", buf_decay_scale),
        ):
            if bound is not None:
                check_scalar(name, bound, lambda x: 0 < x < np.inf, "positive and finite")
        shift = check_scalar("buf_decay_shift", buf_decay_shift)
        half = (m + 1) // 2
        spacing = buf_decay_scale * np.pi / np.sqrt(2 * (half + 1))
        x = spacing * (np.arange(m) + 1 - half + shift)
        with np.errstate(all="ignore"):
            theta = 1 / (1 + np.exp(2 * x))
            omega = -(theta**2) * np.exp(3 * x) / np.sum(np.exp(x) * theta)
        if not np.all(np.isfinite([theta, omega])):
            raise ValueError(
                "expected buf_decay_shift and buf_decay_scale that leave decays within (0, 1), "
                f"found buf_decay_shift={buf_decay_shift} and buf_decay_scale={buf_decay_scale}"
            )
        blt = cls.build(theta, omega).inverse()
        theta, omega = np.array(blt.buf_decay), np.array(blt.output_scale)
        theta *= min(1.0, max_buf_decay / theta[0])
        if max_pillutla_score is not None:
            omega *= min(1.0, max_pillutla_score / np.sum(omega / theta))
        return cls.build(theta, omega)

    def canonicalize(self) -> BufferedToeplitz:
        """Returns the same matrix, its decays in decreasing order.

        Raises:
          ValueError: See :meth:`validate`.
          TypeError: See :meth:`validate`.
        """
        self.validate()
        if is_concrete(self.buf_decay):
            order: Array = np.argsort(-np.asarray(self.buf_decay), stable=True)
            if np.all(np.diff(order) > 0):
                return self
        else:
            order = jnp.argsort(self.buf_decay, descending=True)
        return BufferedToeplitz(self.buf_decay[order], self.output_scale[order])

    def replace(self, **changes: Array) -> BufferedToeplitz:
        """Returns a BLT with other values in the fields named."""
        return dataclasses.replace(self, **changes)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the parameters."""
        return _dtype(self.buf_decay)

    @standard_promotion()
    def toeplitz_coefs(self, n: int) -> jax.Array:
        """Returns the first n coefficients of C: ``1, sum(omega), sum(omega theta), ...``.

        O(n m), of which only ``2 m sqrt(n)`` are powers.

        Raises:
          ValueError: If the BLT is not valid, see :meth:`validate`, or n < 1.
          TypeError: If n is not an integer.
        """
        n = check_int("n", n)
        check_memory("n", n, 32 * n)
        theta, omega, on = values_of(self)
        return result(coefs(theta, omega, n, on), self.dtype)

    def materialize(self, n: int) -> jax.Array:
        """Returns C as an ``[n, n]`` array. O(n^2) time and memory.

        Raises:
          ValueError: If the BLT is not valid, see :meth:`validate`, or n < 1.
          TypeError: If n is not an integer.
        """
        return toeplitz.materialize_lower_triangular(self.toeplitz_coefs(n))

    @standard_promotion()
    def inverse(self, skip_checks: bool = False) -> BufferedToeplitz:
        """Returns ``C^-1``, which is a BLT as well.

        Its decays are the eigenvalues of ``diag(theta) - omega 1^T`` (Proposition 5.6 of
        https://arxiv.org/abs/2404.16706), and its scales follow from both sets of decays, as in
        :func:`blt_pair_from_theta_pair`. If all scales have one sign, the eigenvalues are those of
        a symmetric matrix, so real and well-conditioned; otherwise they may not be.

        Inside a trace only scales of one sign have an inverse: for others it is NaN.

        Args:
          skip_checks: Whether to leave unchecked that the decays are far enough apart, and that the
            result is an inverse. Where there is none, it is then NaN.

        Returns:
          A BLT of the same dtype, its decays in decreasing order.

        Raises:
          ValueError: If the BLT is not valid, see :meth:`validate`, is of float64 when JAX is not
            in 64-bit mode, or (unless skipped) two decays are within 1e-9 of each other.
          RuntimeError: If (unless skipped) the result is not an inverse, to 1e-7. For instance,
            the inverse may have complex decays, which no BLT has.
        """
        check_float64_dtype(self)
        theta, omega, on = values_of(self)
        checks = on.is_known and not skip_checks
        if checks:
            gap = min_gap(theta, on)
            if gap < MIN_GAP:
                raise ValueError(
                    f"expected decays at least {MIN_GAP} apart, found a gap of {gap} "
                    f"in buf_decay={theta}"
                )
        with np.errstate(all="ignore"):
            theta_hat = _inverse_decays(theta, omega, on)
            omega_hat = scales_of(theta_hat, theta, on)
        if checks:
            inverse_coefs, own_coefs = (
                np.concatenate([[1.0], decays ** np.arange(2 * len(decays))[:, None] @ scales])
                for decays, scales in ((theta_hat, omega_hat), (theta, omega))
            )
            # As rational functions have degree 2 m, so many coefficients tell.
            product = np.convolve(own_coefs, inverse_coefs)[1 : len(own_coefs)]
            if not np.all(np.abs(product) <= 1e-7):
                raise RuntimeError(
                    "expected the inverse to be a BLT with real and distinct decays, found decays "
                    f"{theta_hat} and scales {omega_hat} for buf_decay={theta} and "
                    f"output_scale={omega}"
                )
        return _blt(theta_hat, omega_hat, self.dtype)

    def pillutla_score(self) -> jax.Array:
        """Returns ``sum(omega / theta)``.

        For positive scales and decays in (0, 1) the inverse has positive decays if and only if it
        is below 1: Theorem 1 of https://arxiv.org/abs/2504.21413. NaN or infinite if there is a
        decay of 0.
        """
        theta, omega, on = values_of(self)
        with np.errstate(all="ignore"):
            return result(on.xp.sum(omega / theta), self.dtype)

    def as_streaming_matrix(self, *, look_ahead: int = 0) -> StreamingMatrix:
        """Returns C as a streaming matrix, whose state is m slots.

        Args:
          look_ahead: See :meth:`inverse_as_streaming_matrix`.

        Raises:
          ValueError: If the BLT is not valid, see :meth:`validate`, or is of float64 when JAX is
            not in 64-bit mode; or ``look_ahead < 0``.
          TypeError: If its dtype is not floating, or ``look_ahead`` is not an integer.
        """
        return self._builder().build(look_ahead=look_ahead)

    def inverse_as_streaming_matrix(self, *, look_ahead: int = 0) -> StreamingMatrix:
        """Returns the noising matrix ``C^-1`` as a streaming matrix, whose state is m slots.

        It is made of the parameters of C: no inverse is computed, and any BLT has one. Privatizers
        have a fused kernel for it, which reads and writes the m buffers of every parameter once.

        Args:
          look_ahead: How many terms to come a privatizer keeps for every parameter. With k of them
            it visits the buffers once in k steps: ``2 m / k + 2`` passes over the model for
            ``2 m``, for k slots more of state. It changes no noise.

        Raises:
          ValueError: If the BLT is not valid, see :meth:`validate`, or is of float64 when JAX is
            not in 64-bit mode; or ``look_ahead < 0``.
          TypeError: If its dtype is not floating, or ``look_ahead`` is not an integer.
        """
        return self._builder().build_inverse(look_ahead=look_ahead)

    def _builder(self) -> StreamingMatrixBuilder:
        check_float64_dtype(self)
        parameters = jax.tree.map(np.asarray, self) if is_concrete(self) else self
        return StreamingMatrixBuilder(
            buf_decay=parameters.buf_decay, output_scale=parameters.output_scale
        )

    def __str__(self) -> str:
        try:
            self.validate()
        except (TypeError, ValueError):
            return repr(self)
        if not is_concrete(self):
            return repr(self)
        coefs = ", ".join(f"{c:.5f}" for c in np.asarray(self.toeplitz_coefs(10)))
        return (
            f"BufferedToeplitz.build(\n    buf_decay={np.asarray(self.buf_decay).tolist()},\n"
            f"    output_scale={np.asarray(self.output_scale).tolist()},\n"
            f"    dtype=jnp.{self.dtype})\nInitial Toeplitz coefs=[{coefs}, ...]"
        )


def _own(blt: BufferedToeplitz | StreamingMatrixBuilder) -> None:
    """Copies parameters in NumPy's memory, where the caller may write later."""
    for name in ("buf_decay", "output_scale"):
        x = getattr(blt, name)
        if isinstance(x, np.ndarray):
            object.__setattr__(blt, name, x.copy())


def _dtype(x: Array) -> np.dtype:
    return x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype


def _blt(theta: Array, omega: Array, dtype: np.dtype) -> BufferedToeplitz:
    """A BLT of JAX arrays of the dtype, which JAX's mode has."""
    # Rounded where they are: NumPy rounds subnormal numbers too.
    return BufferedToeplitz(*(jnp.asarray(x.astype(dtype)) for x in (theta, omega)))


def values_of(blt: BufferedToeplitz, *others: object) -> tuple[Array, Array, Arithmetic]:
    """Decays and scales of a valid BLT, and how to compute with them and others."""
    check_instance("the BLT", blt, BufferedToeplitz)
    blt.validate()
    if is_concrete((blt, others)):
        return (
            np.asarray(blt.buf_decay, np.float64),
            np.asarray(blt.output_scale, np.float64),
            KNOWN,
        )
    dtype = promote_types(blt.dtype, jnp.result_type(float))
    return jnp.asarray(blt.buf_decay, dtype), jnp.asarray(blt.output_scale, dtype), TRACED


def _inverse_decays(theta: Array, omega: Array, on: Arithmetic) -> Array:
    """The eigenvalues of ``diag(theta) - omega 1^T`` in decreasing order, or NaN."""
    if not len(theta):
        return theta
    xp = on.xp
    signs = xp.all(omega >= 0) * 1 - xp.all(omega <= 0) * 1
    if on.is_known and signs == 0 and omega.any():
        complex_decays = np.linalg.eigvals(np.diag(theta) - omega[:, None])
        real = np.where(complex_decays.imag == 0, complex_decays.real, np.nan)
        return np.sort(real)[::-1]
    # Similar to it, by diag(sqrt(|omega|)).
    size = xp.abs(omega)
    root = xp.where(size > 0, xp.sqrt(xp.where(size > 0, size, 1)), 0)
    decays = xp.linalg.eigvalsh(xp.diag(theta) - signs * root[:, None] * root)[::-1]
    with jax.debug_nans(False):  # the NaN of arithmetic, which is hardly ever taken
        return xp.where((signs != 0) | xp.all(omega == 0), decays, xp.nan)


def scales_of(theta: Array, theta_hat: Array, on: Arithmetic) -> Array:
    """``omega_i = prod_j (theta_i - theta_hat_j) / prod_{j != i} (theta_i - theta_j)``."""
    apart = theta[:, None] - theta + np.eye(len(theta), dtype=theta.dtype)
    return on.xp.prod((theta[:, None] - theta_hat) / apart, axis=1)


def min_gap(theta: Array, on: Arithmetic) -> Array:
    """The least distance of two decays, infinity if there are fewer than two."""
    xp = on.xp
    gaps = xp.abs(theta[:, None] - theta[None, :])
    gaps = xp.where(np.eye(len(theta), dtype=bool), xp.inf, gaps)
    return xp.min(gaps, initial=xp.inf)


@standard_promotion()
def min_buf_decay_gap(buf_decay: jax.typing.ArrayLike) -> jax.Array:
    """Returns ``min_{i < j} |theta_i - theta_j|``, infinity if there are fewer than two decays.

    Raises:
      ValueError: If ``buf_decay`` is not 1-D.
    """
    theta = check_real("buf_decay to hold real numbers", owned("buf_decay", buf_decay))
    if theta.ndim != 1:
        raise ValueError(f"expected buf_decay to be 1-D, found shape {theta.shape}")
    return jnp.asarray(min_gap(theta, TRACED))


@standard_promotion()
def blt_pair_from_theta_pair(
    theta: jax.Array, theta_hat: jax.Array
) -> tuple[BufferedToeplitz, BufferedToeplitz]:
    """Returns C with decays ``theta`` and ``C^-1`` with decays ``theta_hat``: there is one pair.

    ``omega_i = prod_j (theta_i - theta_hat_j) / prod_{j != i} (theta_i - theta_j)``, and likewise
    for ``C^-1``: Theorem 2 of https://arxiv.org/abs/2504.21413, and Lemma 5.2 of
    https://arxiv.org/abs/2404.16706. Each factor is a difference of two decays, so where the two
    are close it is as accurate as they are.

    Args:
      theta: ``[m]`` decays, no two equal.
      theta_hat: ``[m]`` decays, no two equal.

    Returns:
      ``(C, C^-1)``, of float64, their decays in decreasing order.

    Raises:
      ValueError: If they are not 1-D, of one length and finite, or two of one array are equal, or
        JAX is not in 64-bit mode.
      TypeError: If they are not real numbers.
    """
    pair = [BufferedToeplitz.build(x, x) for x in (theta, theta_hat)]
    if pair[0].buf_decay.shape != pair[1].buf_decay.shape:
        raise ValueError(
            "expected theta and theta_hat of the same length, found shapes "
            f"{pair[0].buf_decay.shape} and {pair[1].buf_decay.shape}"
        )
    on = KNOWN if is_concrete(pair) else TRACED
    first, second = (on.xp.asarray(blt.buf_decay) for blt in pair)
    for name, x in (("theta", first), ("theta_hat", second)):
        if is_concrete(x) and min_gap(np.asarray(x), KNOWN) == 0:
            raise ValueError(f"expected the decays in {name} to be distinct, found {x}")
    return blts_of_decays(first, second, on)


def blts_of_decays(
    theta: Array, theta_hat: Array, on: Arithmetic
) -> tuple[BufferedToeplitz, BufferedToeplitz]:
    """C and ``C^-1``, given the decays of either."""
    return (
        _blt(theta, scales_of(theta, theta_hat, on), theta.dtype),
        _blt(theta_hat, scales_of(theta_hat, theta, on), theta.dtype),
    )
