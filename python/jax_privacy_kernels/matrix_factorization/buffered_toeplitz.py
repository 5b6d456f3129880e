"""Buffered linear Toeplitz (BLT) strategies: n x n, but a few buffers to multiply a stream by.

A BLT is lower-triangular Toeplitz, with ones on its diagonal and, below it, a sum of a few decaying
exponentials. So is its inverse: https://arxiv.org/abs/2404.16706. With the m decays
``theta = buf_decay`` and ``omega = output_scale``, the notation of all that follows,
``c_0 = 1`` and ``c_t = sum_j omega_j theta_j^(t-1)``. Both multiply a stream with m slots of state,
whatever n is. :func:`optimize` finds a good one.

What is computed from values that are known is computed in NumPy, in float64: nothing is compiled,
and what a float32 BLT is said to cost does not depend on rounding. Inside a trace it is computed in
the dtype of the BLT, or the default one if that is wider.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_privacy_kernels import ops
from jax_privacy_kernels._checks import check_int, is_concrete
from jax_privacy_kernels._mirrored import Mirrored
from jax_privacy_kernels.matrix_factorization import optimization, sensitivity, toeplitz
from jax_privacy_kernels.matrix_factorization.streaming_matrix import StreamingMatrix, identity

__all__ = [
    "BufferedToeplitz",
    "LossFn",
    "Parameterization",
    "ScalarFloat",
    "StreamingMatrixBuilder",
    "ThetaPairType",
    "blt_pair_from_theta_pair",
    "check_float64_dtype",
    "geometric_sum",
    "get_init_blt",
    "iteration_error",
    "limit_max_error",
    "limit_max_loss",
    "max_error",
    "max_loss",
    "min_buf_decay_gap",
    "optimize",
    "optimize_loss",
    "require_buf_decay_less_eq_one",
    "require_output_scale_gt_zero",
    "robust_max_error_Gamma_j",
    "robust_max_error_Gamma_jk",
    "sensitivity_squared",
]

ScalarFloat: TypeAlias = jax.typing.ArrayLike
"""A real number, or an array of shape ()."""

ThetaPairType: TypeAlias = tuple[jax.Array, jax.Array]
"""Decays of C, and of ``C^-1``."""

# Decays of C closer than this count as the same: no inverse is made of them.
_MIN_GAP = 1e-9


def check_float64_dtype(blt: BufferedToeplitz) -> None:
    """Raises a ValueError if the BLT is of float64 and JAX is not in its 64-bit mode."""
    if blt.dtype == np.float64 and not jax.config.jax_enable_x64:
        raise ValueError(
            "dtype=jnp.float64 needs 64-bit mode: "
            "expected JAX's 64-bit mode for a BLT of dtype float64, which optimize() returns: call "
            'this inside of `with jax.enable_x64(True):`, or set `jax.config.update("'
            'jax_enable_x64", True)`, or make a BLT of float32 by '
            "`BufferedToeplitz.build(buf_decay, output_scale, dtype=jnp.float32)`"
        )


# -- The matrices -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamingMatrixBuilder(Mirrored):
    """Makes the streaming forms of a BLT.

    The state of either is one array ``[m] + shape`` for each leaf, the buffers, of the dtype that
    the leaf and the BLT promote to.

    Attributes:
      buf_decay: ``[m]`` decays theta.
      output_scale: ``[m]`` scales omega, of the same dtype.
    """

    buf_decay: np.ndarray
    output_scale: np.ndarray

    def __post_init__(self) -> None:
        parameters: Any = self.buf_decay, self.output_scale
        BufferedToeplitz(*parameters).validate()

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
        self, multiply_next: Callable[..., Any], look_ahead: int, *, inverse: bool
    ) -> StreamingMatrix:
        slots = check_int("look_ahead", look_ahead, minimum=0)
        structure: ops.NoisingMatrix = identity().structure
        if len(self.buf_decay):
            decay: Any = self.buf_decay
            scale: Any = self.output_scale
            structure = ops.Buffers(decay, scale, inverse=inverse, slots=slots)
        return StreamingMatrix.from_array_implementation(
            self._init, multiply_next, structure=structure
        )

    def _init(self, abstract_value: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
        dtype = jnp.promote_types(abstract_value.dtype, self.dtype)
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

    buf_decay: jax.Array
    output_scale: jax.Array

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
        cls, buf_decay: Any, output_scale: Any, dtype: jax.typing.DTypeLike = jnp.float64
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
        dtype = np.dtype(dtype)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"expected a floating dtype, found {dtype}")
        if dtype == np.float64 and not jax.config.jax_enable_x64:
            raise ValueError(
                "dtype=jnp.float64 needs 64-bit mode: "
                "expected JAX's 64-bit mode for dtype float64, the default: call this inside of "
                "`with jax.enable_x64(True):`, or pass dtype=jnp.float32"
            )
        for name, x in (("buf_decay", buf_decay), ("output_scale", output_scale)):
            if not is_concrete(x):
                continue
            found = np.asarray(x).dtype
            if not (np.issubdtype(found, np.integer) or jnp.issubdtype(found, jnp.floating)):
                raise TypeError(f"expected {name} to hold real numbers, found dtype {found}")
        return cls(jnp.asarray(buf_decay, dtype), jnp.asarray(output_scale, dtype)).canonicalize()

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
        for name, bound in (
            ("max_buf_decay", max_buf_decay),
            ("max_pillutla_score", max_pillutla_score),
            ("buf_decay_scale", buf_decay_scale),
        ):
            if bound is not None and not 0 < bound < np.inf:
                raise ValueError(f"expected {name} to be positive and finite, found {bound}")
        half = (m + 1) // 2
        spacing = buf_decay_scale * np.pi / np.sqrt(2 * (half + 1))
        x = spacing * (np.arange(m) + 1 - half + buf_decay_shift)
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
            order: Any = np.argsort(-np.asarray(self.buf_decay), stable=True)
            if np.all(np.diff(order) > 0):
                return self
        else:
            order = jnp.argsort(self.buf_decay, descending=True)
        return BufferedToeplitz(self.buf_decay[order], self.output_scale[order])

    def replace(self, **changes: Any) -> BufferedToeplitz:
        """Returns a BLT with other values in the fields named."""
        return dataclasses.replace(self, **changes)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the parameters."""
        return _dtype(self.buf_decay)

    def toeplitz_coefs(self, n: int) -> jax.Array:
        """Returns the first n coefficients of C: ``1, sum(omega), sum(omega theta), ...``.

        O(n m), of which only ``2 m sqrt(n)`` are powers.

        Raises:
          ValueError: If the BLT is not valid, see :meth:`validate`, or n < 1.
          TypeError: If n is not an integer.
        """
        n = check_int("n", n)
        return _result(_coefs(*_values(self), n), self.dtype)

    def materialize(self, n: int) -> jax.Array:
        """Returns C as an ``[n, n]`` array. O(n^2) time and memory.

        Raises:
          ValueError: If the BLT is not valid, see :meth:`validate`, or n < 1.
          TypeError: If n is not an integer.
        """
        return toeplitz.materialize_lower_triangular(self.toeplitz_coefs(n))

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
        theta, omega, xp = _values(self)
        known = xp is np
        if known and not skip_checks:
            gap = _min_gap(theta, np)
            if gap < _MIN_GAP:
                raise ValueError(
                    f"expected decays at least {_MIN_GAP} apart, found a gap of {gap} "
                    f"in buf_decay={theta}"
                )
        with np.errstate(all="ignore"):
            theta_hat = _inverse_decays(theta, omega, xp)
            omega_hat = _scales(theta_hat, theta, xp)
        if known and not skip_checks:
            inverse_coefs, coefs = (
                np.concatenate([[1.0], decays ** np.arange(2 * len(decays))[:, None] @ scales])
                for decays, scales in ((theta_hat, omega_hat), (theta, omega))
            )
            # As rational functions have degree 2 m, so many coefficients tell.
            product = np.convolve(coefs, inverse_coefs)[1 : len(coefs)]
            if not np.all(np.abs(product) <= 1e-7):
                raise RuntimeError(
                    "expected the inverse to be a BLT with real and distinct decays, found decays "
                    f"{theta_hat} and scales {omega_hat} for buf_decay={theta} and "
                    f"output_scale={omega}"
                )
        return BufferedToeplitz(
            *(xp.asarray(x).astype(self.dtype) for x in (theta_hat, omega_hat))
        )._as_jax()

    def _as_jax(self) -> BufferedToeplitz:
        return jax.tree.map(jnp.asarray, self)

    def pillutla_score(self) -> jax.Array:
        """Returns ``sum(omega / theta)``.

        For positive scales and decays in (0, 1) the inverse has positive decays if and only if it
        is below 1: Theorem 1 of https://arxiv.org/abs/2504.21413. NaN or infinite if there is a
        decay of 0.
        """
        theta, omega, xp = _values(self)
        with np.errstate(all="ignore"):
            return _result(xp.sum(omega / theta), self.dtype)

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
        parameters: Any = jax.tree.map(np.asarray, self) if is_concrete(self) else self
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


def _dtype(x: Any) -> np.dtype:
    return x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype


def _values(blt: BufferedToeplitz, *others: Any) -> tuple[Any, Any, Any]:
    """Decays and scales of a valid BLT, and numpy or jax.numpy, to compute with them and others."""
    blt.validate()
    if is_concrete((blt, others)):
        return np.asarray(blt.buf_decay, np.float64), np.asarray(blt.output_scale, np.float64), np
    dtype = jnp.promote_types(blt.dtype, jnp.result_type(float))
    return jnp.asarray(blt.buf_decay, dtype), jnp.asarray(blt.output_scale, dtype), jnp


def _result(x: Any, dtype: Any) -> jax.Array:
    return jnp.asarray(x, jax.dtypes.canonicalize_dtype(dtype))


def _scalar(x: Any, blt: BufferedToeplitz) -> jax.Array:
    return _result(x, jnp.promote_types(blt.dtype, jnp.float32))


def _coefs(theta: Any, omega: Any, xp: Any, n: int) -> Any:
    size = max(math.isqrt(n - 1), 1)
    if xp is np:  # in a trace this would lose the derivative
        theta = np.where(omega == 0, 0, theta)
    # theta^(t-1), t - 1 = size row + column.
    rows = omega * theta ** (size * np.arange(-(-(n - 1) // size)))[:, None]
    columns = theta ** np.arange(size)[:, None]
    precision = {} if xp is np else {"precision": "highest"}
    tail = xp.matmul(rows, columns.T, **precision).reshape(-1)[: n - 1]
    return xp.concatenate([xp.ones(1, theta.dtype), tail])


def _inverse_decays(theta: Any, omega: Any, xp: Any) -> Any:
    """The eigenvalues of ``diag(theta) - omega 1^T`` in decreasing order, or NaN."""
    if not len(theta):
        return theta
    signs = xp.all(omega >= 0) * 1 - xp.all(omega <= 0) * 1
    if xp is np and signs == 0 and omega.any():
        decays = np.linalg.eigvals(np.diag(theta) - omega[:, None])
        return np.sort(np.where(np.abs(decays.imag) == 0, decays.real, np.nan))[::-1]
    # Similar to it, by diag(sqrt(|omega|)).
    size = xp.abs(omega)
    root = xp.where(size > 0, xp.sqrt(xp.where(size > 0, size, 1)), 0)
    decays = xp.linalg.eigvalsh(xp.diag(theta) - signs * root[:, None] * root)[::-1]
    return xp.where((signs != 0) | xp.all(omega == 0), decays, xp.nan)


def _scales(theta: Any, theta_hat: Any, xp: Any) -> Any:
    """``omega_i = prod_j (theta_i - theta_hat_j) / prod_{j != i} (theta_i - theta_j)``."""
    apart = theta[:, None] - theta + xp.eye(len(theta), dtype=theta.dtype)
    return xp.prod((theta[:, None] - theta_hat) / apart, axis=1)


def _min_gap(theta: Any, xp: Any) -> Any:
    gaps = xp.where(np.eye(len(theta), dtype=bool), xp.inf, xp.abs(theta[:, None] - theta))
    return xp.min(gaps, initial=xp.inf)


def min_buf_decay_gap(buf_decay: jax.Array) -> jax.Array:
    """Returns ``min_{i < j} |theta_i - theta_j|``, infinity if there are fewer than two decays.

    Raises:
      ValueError: If ``buf_decay`` is not 1-D.
    """
    theta = jnp.asarray(buf_decay)
    if theta.ndim != 1:
        raise ValueError(f"expected buf_decay to be 1-D, found shape {theta.shape}")
    return _min_gap(theta, jnp)


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
    xp = np if is_concrete(pair) else jnp
    first, second = (xp.asarray(blt.buf_decay) for blt in pair)
    for name, x in (("theta", first), ("theta_hat", second)):
        if is_concrete(x) and _min_gap(np.asarray(x), np) == 0:
            raise ValueError(f"expected the decays in {name} to be distinct, found {x}")
    return (
        BufferedToeplitz(first, _scales(first, second, xp))._as_jax(),
        BufferedToeplitz(second, _scales(second, first, xp))._as_jax(),
    )


# -- Sums -------------------------------------------------------------------------------------
#
# Sums of n terms are doubled: a state holds the sums of m terms, from which follow those of 2 m and
# of m + 1. For decays in [0, 1] only non-negative numbers are added, so the result has all of its
# digits however close to 1 they are, where quotients like (1 - r^n) / (1 - r) lose them; and it is
# a polynomial, so its derivative has no singularities either.


def _sum(double: Any, add: Any, state: Any, n: Any, xp: Any) -> Any:
    """The state of n terms, from that of none: ``double`` and ``add`` lead to 2 m and to m + 1."""
    if xp is np:
        with np.errstate(all="ignore"):
            for digit in f"{n:b}":
                state = double(state)
                state = add(state) if digit == "1" else state
        return state
    if is_concrete(n):
        digits = np.array([digit == "1" for digit in f"{n:b}"])
    else:
        if jnp.issubdtype(n.dtype, jnp.floating):
            state = jax.tree.map(lambda x: jnp.where(jnp.isnan(n), jnp.nan, x), state)
        n = jnp.asarray(n).astype(jnp.result_type(int))
        digits = (n >> np.arange(jnp.iinfo(n.dtype).bits - 2, -1, -1)) & 1 == 1

    def step(state: Any, digit: Any) -> tuple[Any, None]:
        state = double(state)
        return jax.tree.map(lambda a, b: jnp.where(digit, a, b), add(state), state), None

    return jax.lax.scan(step, state, digits)[0]


def _geometric(r: Any, n: Any, xp: Any) -> tuple[Any, Any]:
    """``g(n) = 1 + r + ... + r^(n-1)`` and ``g(0) + ... + g(n-1)``, element by element."""

    def double(state: Any) -> Any:
        m, p, g, s = state
        return m + m, p * p, g + p * g, s + m * g + p * s

    def add(state: Any) -> Any:
        m, p, g, s = state
        return m + 1, p * r, g + p, s + g

    zero = xp.zeros_like(r)
    return _sum(double, add, (xp.zeros((), r.dtype), zero + 1, zero, zero), n, xp)[2:]


def _geometric_product(r: Any, s: Any, n: Any, xp: Any) -> Any:
    """``sum_{i<n} g_i(r) g_i(s)`` for the sums of :func:`_geometric`, element by element."""

    def double(state: Any) -> Any:
        m, p, q, g, h, sum_g, sum_h, total = state
        total = total + m * g * h + p * h * sum_g + q * g * sum_h + p * q * total
        sum_g, sum_h = sum_g + m * g + p * sum_g, sum_h + m * h + q * sum_h
        return m + m, p * p, q * q, g + p * g, h + q * h, sum_g, sum_h, total

    def add(state: Any) -> Any:
        m, p, q, g, h, sum_g, sum_h, total = state
        return m + 1, p * r, q * s, g + p, h + q, sum_g + g, sum_h + h, total + g * h

    zero = xp.zeros_like(r * s)
    state = (xp.zeros((), zero.dtype), zero + 1, zero + 1, *[zero] * 5)
    return _sum(double, add, state, n, xp)[-1]


def _sum_of_squares(theta: Any, omega: Any, n: Any, xp: Any) -> Any:
    """``sum_{i<n} (1 + sum_j omega_j g_i(theta_j))^2``: the first n prefix sums of coefficients.

    Block by block, m to 2 m, from the prefix sum that the block starts with. What cancels in a
    block is at most what its prefix sums fall by, a small factor; not the factor n / log(n) between
    the sum over pairs of decays and the result. Where scales of both signs on close decays cancel
    much more than that, the result is an upper bound.
    """

    def double(state: Any) -> Any:
        m, p, g, s, pairs, total, size = state
        first, scale = 1 + xp.sum(omega * g), omega * p
        terms = m * first**2, 2 * first * scale * s, scale[:, None] * scale * pairs
        total = total + sum(xp.sum(x) for x in terms)
        size = size + sum(xp.sum(xp.abs(x)) for x in terms)
        ps = p * s
        pairs = pairs + m * g[:, None] * g + g[:, None] * ps + ps[:, None] * g
        pairs = pairs + p[:, None] * p * state[4]
        return m + m, p * p, g + p * g, s + m * g + ps, pairs, total, size

    def add(state: Any) -> Any:
        m, p, g, s, pairs, total, size = state
        square = (1 + xp.sum(omega * g)) ** 2
        pairs = pairs + g[:, None] * g
        return m + 1, p * theta, g + p, s + g, pairs, total + square, size + square

    zero = xp.zeros_like(theta)
    none = xp.zeros((), theta.dtype)
    state = (none, zero + 1, zero, zero, zero[:, None] * zero, none, none)
    g, *_, total, size = _sum(double, add, state, n, xp)[2:]
    constant = (lambda x: x) if xp is np else jax.lax.stop_gradient
    with np.errstate(all="ignore"):
        relative = xp.max(_rounding(theta[:, None] * theta, n, xp), initial=0)
        # Of the terms, and of the prefix sums that the blocks start with.
        most = xp.sqrt(1.0 * n) * (1 + xp.sum(xp.abs(omega * g)))
        bound = (xp.sqrt(xp.maximum(total, 0) + relative * size) + relative * most) ** 2
        cancels = ~((size <= _CANCELLATION * total) & (most <= 1e5 * xp.sqrt(total)))
    if xp is np and cancels and n <= _MAX_COEFS:
        return np.fmin(bound, _squares_of_coefs(theta, omega, n, prefix_sums=True))
    return total + constant(xp.where(cancels, bound - total, 0))


# Prefix sums of a good BLT cancel by a factor of 10. From this one on, rounding is bounded.
_CANCELLATION = 100
# The most coefficients that are summed up where closed forms cancel.
_MAX_COEFS = 10**7


def _rounding(r: Any, n: Any, xp: Any) -> Any:
    """A bound on the relative error of geometric sums of ratios r >= 0, element by element.

    A rounded ratio is off by 1 in ``1 / eps``; its power n, and the ratio's sum, by n times that,
    or 1 / (1 - r) times if that is less.
    """
    gap = 1 - xp.abs(r)
    steps = xp.where(gap > 0, xp.minimum(1.0 * n, 1 / xp.where(gap > 0, gap, 1)), 1.0 * n)
    return 8 * (steps + 64 + r.size) * xp.finfo(r.dtype).eps


def _squares_of_coefs(theta: Any, omega: Any, n: int, prefix_sums: bool = False) -> Any:
    """An upper bound on the sum of n squared coefficients, or of their prefix sums: O(n m)."""
    eps = np.finfo(np.float64).eps
    with np.errstate(all="ignore"):
        values = _coefs(theta, omega, np, n)
        errors = (len(theta) + 8) * eps * _coefs(np.abs(theta), np.abs(omega), np, n)
        if prefix_sums:
            values = np.cumsum(values)
            errors = np.cumsum(errors + eps * np.abs(values))
        return np.sum((np.abs(values) + errors) ** 2)


def _count(name: str, n: Any, minimum: int, infinite: bool = False) -> Any:
    """n as an ``int``, or `math.inf` where that is allowed; a scalar tracer is rounded up."""
    if jnp.ndim(n) != 0:
        raise ValueError(f"expected {name} to be a scalar, found shape {jnp.shape(n)}")
    if not is_concrete(n):
        return jnp.ceil(n) if jnp.issubdtype(n.dtype, jnp.floating) else n
    number: Any = np.asarray(n).item()
    if infinite and number == math.inf:
        return math.inf
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    return check_int(name, number, minimum)


def _arrays(n: Any, *xs: Any) -> tuple[Any, Any, list[Any]]:
    """Their dtype, numpy or jax.numpy to compute with them and n, and the arrays for that."""
    dtype = jnp.promote_types(jnp.result_type(*xs), jnp.result_type(float))
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"expected real numbers, found dtype {dtype}")
    if is_concrete((n, xs)):
        return dtype, np, [np.asarray(x, np.float64) for x in xs]
    return dtype, jnp, [jnp.asarray(x, dtype) for x in xs]


def geometric_sum(a: jax.Array, r: jax.Array, num: jax.typing.ArrayLike = jnp.inf) -> jax.Array:
    """Returns ``a + a r + a r^2 + ... + a r^(num-1)``, or its limit. Accurate for r = 1, and near.

    O(log num); a tracer counts as the largest integer.

    Args:
      a: First terms.
      r: Ratios; they broadcast with ``a``.
      num: The number of terms, an integer of at least 0, or infinity. A scalar.

    Returns:
      Array of the dtype that a and r promote to, at least the default float dtype. The limit is
      infinite for r >= 1 and a != 0, and NaN for r <= -1.

    Raises:
      ValueError: If ``num`` is negative or not a scalar.
      TypeError: If it is neither an integer nor infinite.
    """
    num = _count("num", num, 0, infinite=True)
    dtype, xp, (a, r) = _arrays(num, a, r)
    return _result(_series(a, r, 1 - r, num, xp), dtype)


def _series(a: Any, r: Any, gap: Any, n: Any, xp: Any) -> Any:
    """``a g_n(r)``, given also ``gap = 1 - r``: rounded once, where r is a product."""

    def limit(a: Any, r: Any, gap: Any) -> Any:
        converges = xp.abs(r) < 1
        value = a / xp.where(converges, gap, 1)
        diverges = xp.where(a == 0, 0.0, xp.where(a > 0, xp.inf, -xp.inf))
        return xp.where(converges, value, xp.where(r > 0, diverges, xp.nan))

    if is_concrete(n):
        return limit(a, r, gap) if n == math.inf else a * _geometric(r, n, xp)[0]
    if not jnp.issubdtype(n.dtype, jnp.floating):
        return a * _geometric(r, n, xp)[0]

    def finite(a: Any, r: Any, gap: Any) -> Any:
        return a * _geometric(r, n, xp)[0]

    a, r, gap = jnp.broadcast_arrays(a, r, gap)
    return jax.lax.cond(jnp.isinf(n), limit, finite, a, r, gap)


def robust_max_error_Gamma_j(omega: jax.Array, theta: jax.Array, n: jax.Array) -> jax.Array:
    """Returns ``1/n sum_{i<n} omega g_i(theta)`` with ``g_i = 1 + theta + ... + theta^(i-1)``.

    A term of Lemma 5.4 of https://arxiv.org/abs/2404.16706. Accurate for all decays in [0, 1].

    Args:
      omega: Scales.
      theta: Decays; they broadcast with the scales.
      n: The number of iterations, an integer of at least 1. A scalar.

    Raises:
      ValueError: If n < 1 or n is not a scalar.
      TypeError: If n is not an integer.
    """
    n = _count("n", n, 1)
    dtype, xp, (omega, theta) = _arrays(n, omega, theta)
    return _result(omega * _geometric(theta, n, xp)[1] / n, dtype)


def robust_max_error_Gamma_jk(
    omega1: jax.Array, theta1: jax.Array, omega2: jax.Array, theta2: jax.Array, n: jax.Array
) -> jax.Array:
    """Returns ``1/n sum_{i<n} omega1 g_i(theta1) omega2 g_i(theta2)``.

    With g as for :func:`robust_max_error_Gamma_j`. A term of Lemma 5.4 of
    https://arxiv.org/abs/2404.16706. Accurate for all decays in [0, 1].

    Args:
      omega1: Scales.
      theta1: Decays.
      omega2: Scales.
      theta2: Decays. All four broadcast: ``[m]`` with ``[m, 1]`` gives all pairs.
      n: The number of iterations, an integer of at least 1. A scalar.

    Raises:
      ValueError: If n < 1 or n is not a scalar.
      TypeError: If n is not an integer.
    """
    n = _count("n", n, 1)
    dtype, xp, (omega1, theta1, omega2, theta2) = _arrays(n, omega1, theta1, omega2, theta2)
    return _result(omega1 * omega2 * _geometric_product(theta1, theta2, n, xp) / n, dtype)


# -- Sensitivity, error and loss --------------------------------------------------------------


def _infinite_if(
    is_bad: Callable[[Any, Any, Any], Any], blt_fn: Callable[..., Any]
) -> Callable[..., Any]:
    @functools.wraps(blt_fn)
    def wrapped(blt: BufferedToeplitz, *args: Any, **kwargs: Any) -> Any:
        bad = is_bad(*_values(blt))
        if is_concrete(bad):
            return _scalar(jnp.inf, blt) if bad else blt_fn(blt, *args, **kwargs)
        out = jax.eval_shape(lambda: blt_fn(blt, *args, **kwargs))
        return jax.lax.cond(
            bad,
            lambda: jnp.full(out.shape, jnp.inf, out.dtype),
            lambda: blt_fn(blt, *args, **kwargs),
        )

    return wrapped


def require_buf_decay_less_eq_one(blt_fn: Callable[..., Any]) -> Any:
    """Makes a function of a BLT, and more, infinite where a decay is above 1."""
    return _infinite_if(lambda theta, omega, xp: xp.any(theta > 1), blt_fn)


def require_output_scale_gt_zero(blt_fn: Callable[..., Any]) -> Any:
    """Makes a function of a BLT, and more, infinite where a scale is not above 0."""
    return _infinite_if(lambda theta, omega, xp: xp.any(omega <= 0), blt_fn)


@require_buf_decay_less_eq_one
def sensitivity_squared(blt: BufferedToeplitz, n: jax.typing.ArrayLike) -> jax.Array:
    """Returns the squared sensitivity of C for one participation: that of its first column.

    ``1 + sum_{j,k} omega_j omega_k g_{n-1}(theta_j theta_k)``, g a geometric sum: Lemma 5.3 of
    https://arxiv.org/abs/2404.16706. O(m^2 log n). For scales of both signs the terms cancel: a
    bound on what rounding may take from the sum is then added to it, so that it is not too low.
    Where that would be more than 1e-9 of it, known coefficients are summed instead, up to n = 10^7:
    O(n m).

    Args:
      blt: C.
      n: The number of iterations, an integer of at least 1, or infinity for the limit.

    Returns:
      A scalar of the dtype of the BLT, at least float32. Infinite if a decay is above 1, and the
      limit if one is not within (-1, 1).

    Raises:
      ValueError: If the BLT is not valid, or n < 1 or not a scalar.
      TypeError: If n is neither an integer nor infinite.
    """
    count: Any = _count("n", n, 1, infinite=True)
    theta, omega, xp = _values(blt, count)
    # 1 - theta_j theta_k, which for decays in [0, 1] does not cancel.
    gap = (1 - theta)[:, None] + theta[:, None] * (1 - theta)
    pairs = theta[:, None] * theta
    scales = omega[:, None] * omega
    terms = _series(scales, pairs, gap, count - 1, xp)
    total = 1 + xp.sum(terms)
    # Sums of negative ratios are below 1, but not so their errors.
    size = xp.maximum(xp.abs(terms), xp.abs(scales) * xp.minimum(count - 1, 1))
    with np.errstate(invalid="ignore"):
        error = xp.where(xp.any(terms < 0), xp.sum(size * _rounding(pairs, count, xp)), 0)
    if xp is np and count <= _MAX_COEFS and not error <= 1e-9 * total:
        total = np.fmin(total + error, _squares_of_coefs(theta, omega, count))
    else:
        total = total + (error if xp is np else jax.lax.stop_gradient(error))
    if not is_concrete(count) or count == math.inf:
        diverges = xp.any(xp.abs(theta) >= 1) & (count == math.inf)
        total = xp.where(diverges, xp.inf, total)
    return _scalar(total, blt)


def iteration_error(inv_blt: BufferedToeplitz, i: jax.typing.ArrayLike) -> jax.Array:
    """Returns the expected squared error of prefix sum i, for independent noise of variance 1.

    ``sum_{t<=i} b_t^2`` with ``b_t = 1 + sum_j omega_j g_t(theta_j)`` the coefficients of
    ``B = A C^-1``: Lemma 5.4 of https://arxiv.org/abs/2404.16706, in another order. It never
    decreases with i, so it is also the largest error of iterations 0 to i. O(m^2 log i).

    Args:
      inv_blt: ``C^-1``.
      i: The iteration, from 0.

    Returns:
      A scalar of the dtype of the BLT, at least float32.

    Raises:
      ValueError: If the BLT is not valid, or is of float64 when JAX is not in 64-bit mode, or
        i < 0 or is not a scalar.
      TypeError: If i is not an integer.
    """
    return _error(inv_blt, _count("i", i, 0) + 1)


def max_error(inv_blt: BufferedToeplitz, n: jax.typing.ArrayLike) -> jax.Array:
    """Returns the largest expected squared error of n iterations: that of the last.

    See :func:`iteration_error`; n is at least 1.
    """
    return _error(inv_blt, _count("n", n, 1))


def _error(inv_blt: BufferedToeplitz, n: Any) -> jax.Array:
    check_float64_dtype(inv_blt)
    theta, omega, xp = _values(inv_blt, n)
    return _scalar(_sum_of_squares(theta, omega, n, xp), inv_blt)


def _loss(
    blt: BufferedToeplitz,
    error: Callable[[BufferedToeplitz], jax.Array],
    squared: Callable[[BufferedToeplitz], jax.Array],
    n: Any = 1,
    skip_checks: bool = True,
) -> jax.Array:
    """``error(C^-1) squared(C)``: in float64 if all is known, infinite if there is no inverse."""
    check_float64_dtype(blt)
    blt.validate()
    if not is_concrete((blt, n, jnp.zeros(()) + 0)):  # or while something else is traced
        return error(blt.inverse(skip_checks=skip_checks)) * squared(blt)
    with jax.enable_x64(True):
        wide = BufferedToeplitz(*_values(blt)[:2])
        inv_blt = wide.inverse(skip_checks=skip_checks)
        finite = np.all(np.isfinite([inv_blt.buf_decay, inv_blt.output_scale]))
        loss = np.asarray(error(inv_blt) * squared(wide)) if finite else np.inf
    return _scalar(loss, blt)


def limit_max_error(inv_blt: BufferedToeplitz) -> jax.Array:
    """Returns the limit of ``max_error(inv_blt, n) / n``: ``(1 + sum(omega / (1 - theta)))^2``.

    Args:
      inv_blt: ``C^-1``.

    Returns:
      A scalar of the dtype of the BLT, at least float32. Infinite if a decay is not within (-1, 1).

    Raises:
      ValueError: If the BLT is not valid.
      TypeError: If its dtype is not floating.
    """
    theta, omega, xp = _values(inv_blt)
    diverges = xp.abs(theta) >= 1
    last = 1 + xp.sum(omega / (1 - xp.where(diverges, 0, theta)))
    return _scalar(xp.where(xp.any(diverges), xp.inf, last**2), inv_blt)


@require_output_scale_gt_zero
def max_loss(blt: BufferedToeplitz, n: jax.typing.ArrayLike) -> jax.Array:
    """Returns :func:`max_error` times :func:`sensitivity_squared`, for one participation.

    In a trace ``C^-1`` has the dtype of the BLT. For decays near 1 the loss of a BLT of float32 may
    then be too low, by 1e-3 and more: it is no bound.

    Args:
      blt: C.
      n: The number of iterations, at least 1.

    Returns:
      A scalar of the dtype of the BLT, at least float32. Infinite if a decay is above 1, a scale is
      not above 0, or ``C^-1`` cannot be computed.

    Raises:
      ValueError: If the BLT is not valid, or is of float64 when JAX is not in 64-bit mode, or
        n < 1 or not a scalar.
      TypeError: If n is not an integer.
    """
    return _loss(blt, lambda C: max_error(C, n), lambda C: sensitivity_squared(C, n), n)


@require_output_scale_gt_zero
def limit_max_loss(blt: BufferedToeplitz) -> jax.Array:
    """Returns the limit of ``max_loss(blt, n) / n``; in a trace see there.

    Args:
      blt: C.

    Returns:
      A scalar of the dtype of the BLT, at least float32. Infinite if a decay is not below 1, a
      scale is not above 0, or ``C^-1`` cannot be computed.

    Raises:
      ValueError: If the BLT is not valid, or is of float64 when JAX is not in 64-bit mode.
      TypeError: If its dtype is not floating.
    """
    loss = _loss(blt, limit_max_error, lambda C: sensitivity_squared(C, jnp.inf))
    theta, _, xp = _values(blt)
    return _scalar(xp.where(xp.any(xp.abs(theta) >= 1), jnp.inf, loss), blt)


@dataclasses.dataclass(frozen=True)
class LossFn(Mirrored):
    """What is minimized over BLTs: error times squared sensitivity, and penalties.

    Made by :meth:`build_closed_form_single_participation` or :meth:`build_min_sep`. Do not change
    ``penalty_multipliers`` afterwards: a loss is compiled once.

    Attributes:
      error_for_inv: Maps ``C^-1`` to the error.
      sensitivity_squared: Maps C to its squared sensitivity.
      n: The number of iterations.
      min_sep: Minimum separation of a user's participations.
      max_participations: The true maximum k of participations, given n and ``min_sep``.
      penalty_strength: Multiplies the sum of penalties.
      penalty_multipliers: By name, multiplies one penalty of :meth:`compute_penalties`; 1 if it is
        not named, and 0 leaves it out.
      max_second_coef: ``sum(omega)`` is kept below this.
      min_theta_gap: Decays of one matrix are kept at least this far apart.
    """

    error_for_inv: Callable[[BufferedToeplitz], jax.Array]
    sensitivity_squared: Callable[[BufferedToeplitz], jax.Array]
    n: int
    min_sep: int
    max_participations: int
    penalty_strength: float = 1e-8
    penalty_multipliers: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)
    max_second_coef: float = 1.0
    min_theta_gap: float = 1e-12

    @classmethod
    def build_closed_form_single_participation(cls, n: int, **kwargs: Any) -> LossFn:
        """Makes the loss of the maximum error for one participation: O(m^2 log n), for any n.

        Args:
          n: The number of iterations.
          **kwargs: Other fields of the loss.

        Raises:
          ValueError: If n < 1.
          TypeError: If n is not an integer.
        """
        n = check_int("n", n)
        error, sensitivity_fn = _closed_forms(n)
        return cls(error, sensitivity_fn, n=n, min_sep=1, max_participations=1, **kwargs)

    @classmethod
    def build_min_sep(
        cls,
        n: int,
        error: str = "max",
        min_sep: int = 1,
        max_participations: int | None = None,
        **kwargs: Any,
    ) -> LossFn:
        """Makes the loss for several participations, from n coefficients: O(n m).

        The error is that of `toeplitz.per_query_error` for prefix sums; the sensitivity that of
        `toeplitz.minsep_sensitivity_squared`, which is exact for BLTs whose scales and decays are
        positive and sum(scales) at most 1, and an upper bound for others. See
        https://arxiv.org/abs/2408.08868.

        Args:
          n: The number of iterations.
          error: "max" or "mean": the largest or the mean squared error of the prefix sums.
          min_sep: Minimum separation: a user in rounds i < j has ``j - i >= min_sep``.
          max_participations: The most rounds a user takes part in, or None for no limit.
          **kwargs: Other fields of the loss.

        Raises:
          ValueError: If ``error`` is something else, or another argument is below 1.
          TypeError: If an integer argument is not one.
        """
        n, min_sep = check_int("n", n), check_int("min_sep", min_sep)
        if error not in ("max", "mean"):
            raise ValueError(f"expected error to be 'max' or 'mean', found {error!r}")
        if max_participations is not None:
            check_int("max_participations", max_participations)
        k = sensitivity.minsep_true_max_participations(n, min_sep, max_participations)
        error_fn, sensitivity_fn = _from_coefs(n, error, min_sep, k)
        return cls(error_fn, sensitivity_fn, n=n, min_sep=min_sep, max_participations=k, **kwargs)

    def compute_penalties(
        self, blt: BufferedToeplitz, inv_blt: BufferedToeplitz
    ) -> dict[str, jax.Array]:
        """Returns the logarithmic barriers of the set of well-behaved BLTs, by name.

        Its conditions are those of Theorem 1 of https://arxiv.org/abs/2504.21413, and that decays
        differ. A barrier is infinite or NaN outside.

        Args:
          blt: C.
          inv_blt: ``C^-1``.

        Raises:
          ValueError: If C is of float64 when JAX is not in 64-bit mode.
        """
        check_float64_dtype(blt)
        positive: dict[str, Any] = {
            "buf_decay>0": blt.buf_decay,
            "buf_decay<1": 1 - blt.buf_decay,
            "output_scale>0": blt.output_scale,
            "inv_buf_decay>0": inv_blt.buf_decay,
            "inv_buf_decay<1": 1 - inv_blt.buf_decay,
            "inv_output_scale<0": -inv_blt.output_scale,
            "second_coef": self.max_second_coef - blt.output_scale.sum(),
            "pillutla_score": 1 - blt.pillutla_score(),
        }
        if len(blt.buf_decay) > 1:
            gaps = [min_buf_decay_gap(x.buf_decay) for x in (blt, inv_blt)]
            positive["theta_gap"] = jnp.stack(gaps) - self.min_theta_gap
        return {name: -jnp.log(x).sum() for name, x in positive.items()}

    def penalized_loss(
        self,
        blt: BufferedToeplitz,
        inv_blt: BufferedToeplitz,
        normalize_by_approx_optimal_loss: bool = True,
    ) -> jax.Array:
        """Returns the loss and the penalties: what is minimized.

        Args:
          blt: C.
          inv_blt: ``C^-1``.
          normalize_by_approx_optimal_loss: Whether the loss is divided by
            ``k + (1 + log(n) / pi)^2``, so that penalties weigh about the same for any n and k.

        Raises:
          ValueError: If C is of float64 when JAX is not in 64-bit mode, or there is a multiplier
            for a penalty that there is not.
        """
        penalties = self.compute_penalties(blt, inv_blt)
        unknown = sorted(set(self.penalty_multipliers) - set(penalties))
        if unknown:
            raise ValueError(
                f"Unrecognized penalty multipliers {unknown}: "
                f"expected penalty_multipliers of {sorted(penalties)}, found {unknown}"
            )
        loss = self.error_for_inv(inv_blt) * self.sensitivity_squared(blt)
        if normalize_by_approx_optimal_loss:
            loss = loss / (self.max_participations + (1 + math.log(self.n) / math.pi) ** 2)
        multipliers = {name: self.penalty_multipliers.get(name, 1.0) for name in penalties}
        # One that is left out may be infinite.
        total = sum(factor * penalties[name] for name, factor in multipliers.items() if factor)
        return loss + self.penalty_strength * total

    def loss(self, blt: BufferedToeplitz, skip_checks: bool = False) -> jax.Array:
        """Returns the loss of C, without penalties; infinity if ``C^-1`` cannot be computed.

        Known values are computed with in float64, whatever the dtype of C. In a trace the loss is
        no bound: see :func:`max_loss`.

        Args:
          blt: C.
          skip_checks: As for :meth:`BufferedToeplitz.inverse`.

        Raises:
          ValueError: If the BLT is not valid, is of float64 when JAX is not in 64-bit mode, or
            (unless skipped) two decays are within 1e-9 of each other.

        Warns:
          UserWarning: If ``C^-1`` cannot be computed.
        """
        try:
            return _loss(blt, self.error_for_inv, self.sensitivity_squared, self.n, skip_checks)
        except RuntimeError as error:
            warnings.warn(f"the loss is taken to be infinite: {error}", stacklevel=2)
            return _scalar(jnp.inf, blt)


# The same functions for the same arguments, so that equal losses are compiled once.


@functools.lru_cache(maxsize=64)
def _closed_forms(n: int) -> tuple[Any, Any]:
    return functools.partial(max_error, n=n), functools.partial(sensitivity_squared, n=n)


@functools.lru_cache(maxsize=64)
def _from_coefs(n: int, error: str, min_sep: int, k: int) -> tuple[Any, Any]:
    def error_for_inv(inv_blt: BufferedToeplitz) -> jax.Array:
        errors = toeplitz.per_query_error(noising_coef=inv_blt.toeplitz_coefs(n))
        return errors.mean() if error == "mean" else errors[-1]

    def sensitivity_fn(blt: BufferedToeplitz) -> jax.Array:
        return toeplitz.minsep_sensitivity_squared(
            blt.toeplitz_coefs(n), min_sep, n=n, max_participations=k
        )

    return error_for_inv, sensitivity_fn


# -- Optimization -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Parameterization(Mirrored):
    """What :func:`optimize_loss` varies.

    Attributes:
      params_from_blt: Maps C to parameters, a tree of arrays.
      blt_and_inverse_from_params: Maps them to ``(C, C^-1)``.
    """

    params_from_blt: Callable[[BufferedToeplitz], Any]
    blt_and_inverse_from_params: Callable[[Any], tuple[BufferedToeplitz, BufferedToeplitz]]

    @classmethod
    def strategy_blt(cls) -> Parameterization:
        """The parameters are C itself, a `BufferedToeplitz`."""
        return cls(_same, _with_inverse)

    @classmethod
    def buf_decay_pair(cls) -> Parameterization:
        """The parameters are the decays of C and of ``C^-1``: see :func:`blt_pair_from_theta_pair`.

        No eigenvalues are computed on the way.
        """
        return cls(_decay_pair, _blts_of_decay_pair)

    @classmethod
    def interlaced_decays(cls) -> Parameterization:
        """The parameters are free numbers, and any of them make a well-behaved BLT.

        C has positive scales and decays in (0, 1), and ``C^-1`` positive decays, if and only if the
        decays interlace: ``1 > theta_1 > theta_hat_1 > theta_2 > ... > theta_hat_m > 0``. (The
        poles and zeros of a sum of simple fractions with positive numerators alternate, see
        Theorem 1 of https://arxiv.org/abs/2504.21413.) The parameters are
        ``logit(1 - theta_1)`` and the logs of the differences, along this sequence, of
        ``logit(1 - decay)``: decays close to 0 and 1 take no small steps.

        They are a pair of arrays ``[2 m]``; the second says which of the first are free (1), and
        which are not (0).
        """
        return cls(_interlaced, _blts_of_interlaced)

    def get_loss_fn(self, loss_fn: LossFn) -> Callable[[Any], jax.Array]:
        """Returns the penalized loss as a function of the parameters.

        The same one for the same loss, so that `optimization.optimize` compiles it once.
        """
        return _penalized_loss(loss_fn, self.blt_and_inverse_from_params)


@optimization.compiled_once
def _penalized_loss(loss_fn: LossFn, blts: Callable[..., Any]) -> Callable[[Any], Any]:
    return lambda params: loss_fn.penalized_loss(*blts(params))


def _same(blt: BufferedToeplitz) -> BufferedToeplitz:
    return blt


def _with_inverse(blt: BufferedToeplitz) -> tuple[BufferedToeplitz, BufferedToeplitz]:
    return blt, blt.inverse(skip_checks=True)


def _decay_pair(blt: BufferedToeplitz) -> tuple[jax.Array, jax.Array]:
    return blt.buf_decay, blt.inverse().buf_decay


def _blts_of_decay_pair(
    params: tuple[jax.Array, jax.Array],
) -> tuple[BufferedToeplitz, BufferedToeplitz]:
    return blt_pair_from_theta_pair(*params)


def _logits(blt: BufferedToeplitz) -> np.ndarray:
    """``logit(1 - decay)`` for the decays of C and ``C^-1``, which interlace."""
    pair = blt.canonicalize(), blt.inverse()
    decays = np.stack([np.asarray(x.buf_decay, np.float64) for x in pair], axis=1).ravel()
    with np.errstate(all="ignore"):
        logits = np.log1p(-decays) - np.log(decays)
    if not (np.all(np.isfinite(logits)) and np.all(np.diff(logits) > 0)):
        raise ValueError(
            "expected a BLT of positive output_scale, buf_decay in (0, 1) and pillutla_score() "
            f"below 1, found\n{blt}\nUse Parameterization.buf_decay_pair() for others."
        )
    return logits


def _interlaced_params(logits: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Parameters of ``size`` buffers, those that are missing held where they do nothing.

    Their decays are all but the same in C and in ``C^-1``, so that their scales are all but 0.
    """
    idle = size - len(logits) // 2
    params = np.concatenate([logits[:1], np.log(np.diff(logits)), np.tile([0.0, -25.0], idle)])
    return params, np.repeat([1.0, 0.0], [len(logits), 2 * idle])


def _logits_of_steps(steps: Any, xp: Any) -> Any:
    # Not cumsum, which takes longer to compile.
    return np.tri(len(steps)) @ xp.concatenate([steps[:1], xp.exp(steps[1:])])


def _interlaced(blt: BufferedToeplitz) -> tuple[np.ndarray, np.ndarray]:
    return _interlaced_params(_logits(blt), len(blt.buf_decay))


def _blts_of_interlaced(params: Any) -> tuple[BufferedToeplitz, BufferedToeplitz]:
    xp = np if is_concrete(params) else jnp
    steps, free = (xp.asarray(x) for x in params)
    if xp is jnp:
        steps = jnp.where(free > 0, steps, jax.lax.stop_gradient(steps))
    with np.errstate(over="ignore"):
        decays = 1 / (1 + xp.exp(_logits_of_steps(steps, xp)))
    theta, theta_hat = decays[0::2], decays[1::2]
    return (
        BufferedToeplitz(theta, _scales(theta, theta_hat, xp))._as_jax(),
        BufferedToeplitz(theta_hat, _scales(theta_hat, theta, xp))._as_jax(),
    )


def get_init_blt(
    num_buffers: int = 3, init_blt: BufferedToeplitz | None = None
) -> BufferedToeplitz:
    """Returns a BLT to start an optimization from.

    Args:
      num_buffers: The number of buffers, at least 0.
      init_blt: The result, if it is given; by default it is
        :meth:`BufferedToeplitz.from_rational_approx_to_sqrt_x` with decays and Pillutla score at
        most ``1 - 1e-6``, or the identity for 0 buffers.

    Raises:
      ValueError: If ``init_blt`` has another number of buffers, or ``num_buffers < 0``, or there is
        a BLT to be made and JAX is not in 64-bit mode.
      TypeError: If ``num_buffers`` is not an integer.
    """
    m = check_int("num_buffers", num_buffers, minimum=0)
    if init_blt is None:
        if m == 0:
            return BufferedToeplitz.build([], [])
        return BufferedToeplitz.from_rational_approx_to_sqrt_x(
            m, max_buf_decay=1 - 1e-6, max_pillutla_score=1 - 1e-6
        )
    if len(init_blt.buf_decay) != m:
        raise ValueError(
            f"expected init_blt with num_buffers={m} buffers, found {len(init_blt.buf_decay)}"
        )
    return init_blt


# The default, on the free parameters of `interlaced_decays`.
_OPTIMIZER = optax.lbfgs(
    memory_size=10,
    linesearch=optax.scale_by_backtracking_linesearch(
        60, decrease_factor=0.5, increase_factor=float("inf"), store_grad=True
    ),
)
# For other parameterizations: it takes many more steps, but leads to decays within 1e-10 of 1. The
# tuning is that of jax_privacy.
_CAREFUL_OPTIMIZER = optax.lbfgs(
    memory_size=15,
    linesearch=optax.scale_by_zoom_linesearch(
        100, curv_rtol=0.5, max_learning_rate=1.0, stepsize_precision=1e-20
    ),
)


def _converged(_: optimization.CallbackArgs) -> None:
    """Ends the compiled loop where the loss is flat, to 1e-7 relative and less."""


def _is_flat(gradient: Any) -> jax.Array:
    return jnp.stack([jnp.abs(leaf).max() for leaf in jax.tree.leaves(gradient)]).max() <= 1e-7


_converged._ends_on_gradient = _is_flat  # type: ignore[attr-defined]


@optimization.jax_enable_x64
def optimize_loss(
    loss_fn: LossFn,
    num_buffers: int = 1,
    init_blt: BufferedToeplitz | None = None,
    parameterization: Parameterization | None = None,
    **kwargs: Any,
) -> tuple[BufferedToeplitz, jax.Array]:
    """Minimizes a loss over BLTs of m buffers, in float64.

    Losses for several participations have local minima. If neither ``init_blt`` nor
    ``parameterization`` is given, buffers are added one at a time, each from three starts: that of
    :func:`get_init_blt`, and the best BLT of one buffer less with one that decays slower or faster
    than all others.

    Args:
      loss_fn: The loss.
      num_buffers: The number m of buffers, at least 0.
      init_blt: The BLT to start from; by default see above, or that of :func:`get_init_blt`.
      parameterization: What is varied, by default :meth:`Parameterization.interlaced_decays`.
      **kwargs: ``max_optimizer_steps`` (600 for each start), ``callback`` and ``optimizer``, as of
        `optimization.optimize`. A callback makes each step a call, and sees parameters of the
        ``parameterization``.

    Returns:
      The BLT, of float64, and its loss without penalties.

    Raises:
      ValueError: If ``num_buffers`` is not that of ``init_blt``, or below 0; or ``init_blt`` has no
        parameters.
      TypeError: If ``num_buffers`` is not an integer, or an argument is unknown.
      RuntimeError: If no BLT with a finite loss is found.

    Warns:
      UserWarning: If a scale of the result is within 1e-8 of 0, so that fewer buffers would do.
    """
    m = check_int("num_buffers", num_buffers, minimum=0)
    start = get_init_blt(m, init_blt)
    if m == 0 or (init_blt is None and parameterization is None):
        *_, (blt, loss) = _grow(loss_fn, m, kwargs)
    else:
        parameterization = parameterization or Parameterization.interlaced_decays()
        params = parameterization.params_from_blt(start)
        blt, loss, _ = _minimize(loss_fn, parameterization, params, m, kwargs)
    if not np.isfinite(loss):
        raise RuntimeError(
            f"expected the optimization to end at a finite loss, found {loss} for\n{blt}"
        )
    scales = np.abs(np.asarray(blt.output_scale))
    if np.any(scales < 1e-8):
        warnings.warn(
            f"buffers of output_scale {scales.min()} do next to nothing: fewer of them would do",
            stacklevel=3,
        )
    return blt, loss


def _grow(loss_fn: LossFn, size: int, kwargs: Any) -> Iterator[tuple[BufferedToeplitz, jax.Array]]:
    """The best BLTs of 0, 1, ... ``size`` buffers, and their losses."""
    blt = BufferedToeplitz.build([], [])
    yield blt, loss_fn.loss(blt)
    parameterization = Parameterization.interlaced_decays()
    logits = np.zeros(0)
    for m in range(1, size + 1):
        starts = [_logits(get_init_blt(m))]
        if m == 1:
            starts.append(np.array([-math.log(loss_fn.n) / 2 - 1, 0]))
        else:
            starts.append(np.concatenate([logits[0] - [2, 1], logits]))
            starts.append(np.concatenate([logits, logits[-1] + [1, 2]]))
        # All of one shape, so that the loss is compiled once.
        blt, loss, logits = min(
            (
                _minimize(loss_fn, parameterization, _interlaced_params(start, size), m, kwargs)
                for start in starts
            ),
            key=lambda result: float(result[1]),
        )
        yield blt, loss


def _minimize(
    loss_fn: LossFn, parameterization: Parameterization, params: Any, m: int, kwargs: Any
) -> tuple[BufferedToeplitz, jax.Array, Any]:
    """The BLT of m buffers that the parameters lead to, its loss, and its logits if they interlace.

    The loss is infinite where there is no telling it.
    """
    interlaced = parameterization == Parameterization.interlaced_decays()
    defaults = {
        "max_optimizer_steps": 600,
        "optimizer": _OPTIMIZER if interlaced else _CAREFUL_OPTIMIZER,
        "callback": None if "optimizer" in kwargs else _converged,
    }
    params = optimization.optimize(
        parameterization.get_loss_fn(loss_fn), params, **(defaults | kwargs)
    )
    logits = None
    if interlaced:
        params = [np.asarray(x)[: 2 * m] for x in params]
        logits = _logits_of_steps(params[0], np)
    blt, _ = parameterization.blt_and_inverse_from_params(params)
    loss = jnp.asarray(jnp.inf)
    if np.all(np.isfinite(np.stack([blt.buf_decay, blt.output_scale]))):
        blt = blt.canonicalize()
        if not _min_gap(np.asarray(blt.buf_decay), np) < _MIN_GAP:
            loss = loss_fn.loss(blt)
    return blt, loss if jnp.isfinite(loss) else jnp.asarray(jnp.inf), logits


@optimization.jax_enable_x64
def optimize(
    *,
    n: int,
    min_sep: int = 1,
    max_participations: int | None = 1,
    error: str = "max",
    min_buffers: int = 0,
    max_buffers: int = 10,
    rtol: float = 1.01,
    init_blt: BufferedToeplitz | None = None,
    **kwargs: Any,
) -> BufferedToeplitz:
    """Finds a BLT of low error times squared sensitivity, and how many buffers it takes.

    Buffers are added one at a time, see :func:`optimize_loss`, until one more does not lower the
    loss by a factor of ``rtol``. All steps are compiled loops, of one program for all numbers of
    buffers.

    For one participation and the maximum error the loss has a closed form, and n hardly matters.
    Otherwise a step is O(n m): see :meth:`LossFn.build_min_sep`.

    Args:
      n: The number of iterations.
      min_sep: Minimum separation of a user's participations; 1 allows every round.
      max_participations: The most rounds a user takes part in, or None for no limit.
      error: "max" or "mean": the largest or the mean squared error of the prefix sums.
      min_buffers: The fewest buffers, at least 0.
      max_buffers: The most buffers, at most 15. 3 to 7 usually are best.
      rtol: See above.
      init_blt: The BLT to start from, if ``min_buffers == max_buffers``; then no other is tried.
      **kwargs: As for :func:`optimize_loss`, and the same for each number of buffers.

    Returns:
      The BLT, of float64, whatever the mode of the caller.

    Raises:
      ValueError: If an argument is out of range, or ``init_blt`` has another number of buffers.
      TypeError: If an integer argument is not one, or an argument is unknown.
      RuntimeError: If no BLT with a finite loss is found.
    """
    fewest = check_int("min_buffers", min_buffers, minimum=0)
    most = check_int("max_buffers", max_buffers, minimum=0)
    if not fewest <= most <= 15:
        raise ValueError(
            "expected min_buffers <= max_buffers <= 15, more of which have decays too close to "
            f"each other to compute with, found min_buffers={fewest} and max_buffers={most}"
        )
    if not rtol > 0:
        raise ValueError(f"expected rtol > 0, found {rtol}")
    if init_blt is not None and fewest != most:
        raise ValueError(
            "expected min_buffers == max_buffers with init_blt, "
            f"found min_buffers={fewest} and max_buffers={most}"
        )
    loss_fn = LossFn.build_min_sep(n, error, min_sep, max_participations)
    if loss_fn.max_participations == 1 and error == "max":
        loss_fn = LossFn.build_closed_form_single_participation(n)
    if init_blt is not None:
        return optimize_loss(loss_fn, most, init_blt, **kwargs)[0]
    best: BufferedToeplitz | None = None
    best_loss = math.inf
    for m, (blt, loss) in enumerate(_grow(loss_fn, most, kwargs)):
        if m < fewest:
            continue
        if best is not None and not rtol * float(loss) < best_loss:
            break
        best, best_loss = blt, float(loss)
    if best is None or not math.isfinite(best_loss):
        raise RuntimeError(f"expected a BLT with a finite loss, found {best_loss} for\n{best}")
    return best
