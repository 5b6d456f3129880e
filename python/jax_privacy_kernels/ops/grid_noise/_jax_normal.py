"""Rounded normal samples in plain JAX: what csrc/exact_normal.h computes, which says how.

Everything here is traced in x64 mode. Fixed-point numbers are uint64 arrays ``[10, n]``, words of
32 bits with the lowest first, the first six of them after the point.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels.ops.grid_noise import _table
from jax_privacy_kernels.ops.grid_noise._rounding import FURTHEST, Rounding

__all__ = ["normal_estimates", "rounded_normal", "rounded_sums", "settle"]

Words = tuple[jax.Array, jax.Array]

_LIMBS, _FRACTION = 10, 6
_LOW = np.uint64(0xFFFFFFFF)
_WIDTH = 64  # elements that are settled together
_OF_PRODUCT = 2.0**-51  # how far a product of z may be off by rounding
_ROOT_TWO_OVER_PI = 0xCC42299EA1B284687E59E2805D5C717FA7053E60A24E0DB1  # times 2^192
_ROOT_PI_OVER_TWO = 0x140D931FF627059657CA41FAE722CEE2F8CF9F5320B0005A8
_LEAST = 2.0**-126  # the least V that estimates are made of

# words [4, n] uint32 of the elements at these places, further bits of their uniform numbers
More = Callable[[jax.Array], jax.Array]


# -- Fixed point ------------------------------------------------------------------------------


def _constant(value: int) -> jax.Array:
    words = [value >> 32 * i & 0xFFFFFFFF for i in range(_LIMBS)]
    return jnp.asarray(np.array(words, np.uint64)[:, None])


def _carried(columns: jax.Array) -> jax.Array:
    """The number with these sums in the places of its words, modulo the highest place."""

    def step(carry: jax.Array, column: jax.Array) -> tuple[jax.Array, jax.Array]:
        total = column + carry
        return total >> 32, total & _LOW

    return jax.lax.scan(step, jnp.zeros_like(columns[0]), columns)[1]


def _add(a: jax.Array, b: jax.Array) -> jax.Array:
    return _carried(a + b)


def _multiply(a: jax.Array, b: jax.Array) -> jax.Array:
    products = a[:, None] * b[None]  # [limbs, limbs, n]
    low, high = _columns(products & _LOW), _columns(products >> 32)
    none = jnp.zeros_like(low[:1])
    columns = jnp.concatenate([low, none]) + jnp.concatenate([none, high])
    return _carried(columns)[_FRACTION : _FRACTION + _LIMBS]


def _columns(products: jax.Array) -> jax.Array:
    """``[2 limbs - 1, n]``, the sums over i + j = k: rows are shifted, each by one more."""
    n = products.shape[2]
    padded = jnp.pad(products, ((0, 0), (0, _LIMBS), (0, 0))).reshape(-1, n)
    return padded[:-_LIMBS].reshape(_LIMBS, 2 * _LIMBS - 1, n).sum(axis=0)


def _divide(a: jax.Array, divisor: jax.Array) -> jax.Array:
    def step(rest: jax.Array, word: jax.Array) -> tuple[jax.Array, jax.Array]:
        total = rest << 32 | word
        quotient = total // divisor
        return total - quotient * divisor, quotient

    return jax.lax.scan(step, jnp.zeros_like(a[0]), a, reverse=True)[1]


def _subtract(a: jax.Array, b: jax.Array) -> jax.Array:
    """a - b, modulo the highest place."""
    return _carried((a + (_LOW - b)).at[0].add(1))


def _fixed(x: jax.Array) -> jax.Array:
    """Of float64 >= 0; digits beyond the last place are left out."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int64)
    exponent = (bits >> 52) - 1075
    mantissa = ((bits & (2**52 - 1)) | (jnp.int64(1) << 52)).astype(jnp.uint64)
    mantissa = jnp.where(x < np.finfo(np.float64).tiny, jnp.uint64(0), mantissa)
    words = []
    for i in range(_LIMBS):
        shift = exponent + 32 * (_FRACTION - i)
        left = mantissa << jnp.clip(shift, 0, 31).astype(jnp.uint64)
        right = mantissa >> jnp.clip(-shift, 0, 63).astype(jnp.uint64)
        word = jnp.where(shift >= 0, left, right) & _LOW
        words.append(jnp.where((shift < 32) & (shift > -64), word, jnp.uint64(0)))
    return jnp.stack(words)


def _less(a: jax.Array, b: jax.Array) -> jax.Array:
    less = jnp.zeros(a.shape[1:], bool)
    for i in range(_LIMBS):  # the highest that differ decide
        less = jnp.where(a[i] == b[i], less, a[i] < b[i])
    return less


def _series(y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """e^w and sum_j y^(2 j) / (2 j + 1)!! for w = y^2 / 2."""
    squared = _multiply(y, y)
    w = _divide(squared, jnp.uint64(2))
    one = jnp.broadcast_to(_constant(1 << 192), y.shape)

    def more(carry: tuple[jax.Array, ...]) -> jax.Array:
        return (carry[1] != 0).any()

    def term(carry: Any) -> Any:
        j, p, q, exponential, total = carry
        p = _divide(_multiply(w, p), j)
        q = _divide(_multiply(squared, q), 2 * j + 1)
        return j + 1, p, q, _add(exponential, p), _add(total, q)

    *_, exponential, total = jax.lax.while_loop(more, term, (jnp.uint64(1), one, one, one, one))
    return exponential, total


def _refined(y: jax.Array, one_minus_v: jax.Array) -> jax.Array:
    """|z|, near y, given 1 - V."""
    for _ in range(2):
        exponential, total = _series(y)
        left = _multiply(_multiply(_constant(_ROOT_PI_OVER_TWO), one_minus_v), exponential)
        right = _multiply(y, total)
        below = _less(left, right)
        d = jnp.where(below, _subtract(right, left), _subtract(left, right))
        second = _divide(_multiply(y, _multiply(d, d)), jnp.uint64(2))
        lower = jnp.where(_less(y, d), jnp.uint64(0), _subtract(y, d))
        y = _add(jnp.where(below, lower, _add(y, d)), second)
    return y


def _reaches(rounding: Rounding, m: jax.Array, one_minus_v: jax.Array) -> jax.Array:
    """Whether scale |z| >= m - 1/2, for m >= 1, given 1 - V."""
    odd = (2 * m - 1).astype(jnp.uint64)
    zeros = jnp.zeros((_LIMBS, *m.shape), jnp.uint64)
    factor = zeros.at[_FRACTION].set(odd & _LOW).at[_FRACTION + 1].set(odd >> 32)
    y = _multiply(_constant(rounding.spacing), factor)
    exponential, total = _series(y)
    right = _multiply(_multiply(_constant(_ROOT_TWO_OVER_PI), y), total)
    return ~_less(_multiply(one_minus_v, exponential), right)


# -- Estimates --------------------------------------------------------------------------------


def _horner(coefs: Sequence[float], x: jax.Array) -> jax.Array:
    total = jnp.full_like(x, coefs[0])
    for c in coefs[1:]:
        total = total * x + c
    return total


def _minus_log_of_tail(v: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(v * (2.0 - v), jnp.int64)
    exponent = (bits - 0x3FE6A09E667F3BCD) >> 52
    f = jax.lax.bitcast_convert_type(bits - (exponent << 52), jnp.float64) - 1.0
    s = f / (2.0 + f)
    series = _horner([2.0 / (2 * i + 1) for i in reversed(range(12))], s * s)
    return -0.693147180559945309 * exponent.astype(jnp.float64) - s * series


class _Estimate(NamedTuple):
    z: jax.Array
    error: jax.Array
    w: jax.Array


def _estimate(v: jax.Array) -> _Estimate:
    """Of |z|, and by how much it may be wrong, for what 64 bits leave open of V in the center."""
    w = _minus_log_of_tail(v)
    root, u = jnp.sqrt(w), 1.0 - v
    center = u * _horner(_table.CENTRAL, w - 2.5)
    middle = u * _horner(_table.MIDDLE, root - 3.0)
    far = u * _horner(_table.FAR, jnp.minimum(root, 9.5) - 6.5)
    z = jnp.where(w < 5.0, center, jnp.where(w < 16.0, middle, far))
    outside = jnp.where(w < 16.0, _table.MIDDLE_BOUND, _table.FAR_BOUND)
    return _Estimate(z, jnp.where(w < 5.0, _table.CENTRAL_BOUND * (1.0 + z), outside), w)


def _rounded(y: jax.Array) -> jax.Array:
    return jnp.floor(y + 0.5).astype(jnp.int64)


def _signed(lo: jax.Array, integer: jax.Array) -> jax.Array:
    return jnp.where(lo & 1 != 0, -integer, integer)


# -- Samples ----------------------------------------------------------------------------------


def _uniform(bits: Words, more: jax.Array) -> tuple[jax.Array, jax.Array]:
    """V and, in fixed point, 1 - V, of all bits of samples."""
    hi, lo = (x.astype(jnp.uint64) for x in bits)
    further = more.astype(jnp.uint64)
    # V in words, the highest first: the sign is left out, and a last bit is the middle.
    shifted = (further << 1 & _LOW).at[:-1].add(further[1:] >> 31).at[-1].add(1)
    words = jnp.concatenate([hi[None], (lo >> 1 << 1 | further[0] >> 31)[None], shifted])
    powers = np.ldexp(1.0, -32 * np.arange(1, 7))[:, None]
    v = (words.astype(jnp.float64) * powers)[::-1].sum(axis=0)
    # 1 - V: the complement, and one more, which does not carry as the last bit is set.
    complement = (words ^ _LOW).at[-1].add(1)[::-1]
    integer_part = jnp.zeros((_LIMBS - _FRACTION, *hi.shape), jnp.uint64)
    return v, jnp.concatenate([complement, integer_part])


def settle(rounding: Rounding, bits: Words, more: jax.Array) -> jax.Array:
    """``[n]`` int64, the samples by all of their bits.

    Args:
      rounding: what they are rounded to.
      bits: the high and the low word ``[n]`` of the first bits.
      more: ``[4, n]`` further words, the first one highest.
    """
    v, one_minus_v = _uniform(bits, more)
    of = _estimate(jnp.maximum(v, _LEAST))
    y = of.z * rounding.scale
    error = of.error * rounding.scale + _OF_PRODUCT * y + 1e-9
    most = jnp.int64(rounding.most)
    least = jnp.clip(_rounded(y - error), 0, most)
    last = jnp.where(v < _LEAST, most, jnp.clip(_rounded(y + error), 0, most))

    def narrow(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        least, last = bounds
        m = least + (last - least + 1) // 2
        reached = _reaches(rounding, jnp.maximum(m, 1), one_minus_v)
        open_ = least < last
        return jnp.where(open_ & reached, m, least), jnp.where(open_ & ~reached, m - 1, last)

    least, _ = jax.lax.while_loop(lambda b: (b[0] < b[1]).any(), narrow, (least, last))
    return _signed(bits[1], least)


def rounded_normal(rounding: Rounding, bits: Words, more: More) -> jax.Array:
    """``[n]`` int64, the samples R(scale z).

    Args:
      rounding: what they are rounded to.
      bits: the high and the low word ``[n]`` uint32 of 64 bits for each.
      more: gives ``[4, k]`` further words of the elements at k places.
    """
    hi, lo = bits
    v = hi.astype(jnp.float64) * 2.0**-32 + (lo | 1).astype(jnp.float64) * 2.0**-64
    of = _estimate(v)
    y = of.z * rounding.scale
    integer = jnp.floor(y + 0.5)
    # Beyond the center, 64 bits leave V open by 2^-64 to either side, and z V <= 2 phi(z).
    left_open = jnp.where(of.w < 5.0, 0.0, 2.0**-64 / (of.z * v))
    error = (of.error + left_open) * rounding.scale + _OF_PRODUCT * y
    sure = (jnp.abs(y - integer) <= 0.5 - error) & (of.w < 16.0)
    samples = _signed(lo, integer.astype(jnp.int64))

    def settled(at: jax.Array) -> jax.Array:
        return settle(rounding, (hi[at], lo[at]), more(at))

    return _settled_where(~sure, settled, samples)


def _settled_where(
    unsure: jax.Array, settled: Callable[[jax.Array], jax.Array], samples: jax.Array
) -> jax.Array:
    """The samples, those that are unsure by ``settled(places)``, some at a time."""
    size = samples.shape[0]
    width = min(_WIDTH, size)
    places = jnp.nonzero(unsure, size=-(-size // width) * width, fill_value=size)[0]
    places = places.astype(jnp.int32)

    def some(i: jax.Array, samples: jax.Array) -> jax.Array:
        at = jax.lax.dynamic_slice_in_dim(places, i * width, width)
        return samples.at[at].set(settled(jnp.minimum(at, size - 1)), mode="drop")

    count = (jnp.count_nonzero(unsure).astype(jnp.int32) + width - 1) // width
    return jax.lax.fori_loop(jnp.int32(0), count, some, samples)


# -- Sums of samples --------------------------------------------------------------------------


def normal_estimates(bits: Words) -> tuple[jax.Array, jax.Array]:
    """``[n]`` float64 each, samples z and how far they may be off."""
    hi, lo = bits
    v = hi.astype(jnp.float64) * 2.0**-32 + (lo | 1).astype(jnp.float64) * 2.0**-64
    of = _estimate(jnp.maximum(v, 2.0**-62))
    # 64 bits leave V open by 2^-64 to either side; where they leave nothing, z is anything.
    outside = jnp.where(v < 2.0**-40, FURTHEST, of.error + 2.0**-64 / (of.z * v))
    return _signed(lo, of.z), jnp.where(of.w < 5.0, of.error, outside)


def rounded_sums(
    weights: jax.Array,
    stddev: float,
    first: jax.Array,
    bits: Callable[[jax.Array], Words],
    all_bits: Callable[[jax.Array, jax.Array], tuple[Words, jax.Array]],
    size: int,
) -> jax.Array:
    """``[size]`` int64, R(stddev sum_j weights[j] z_j), as csrc/grid_sums.h does it.

    Args:
      weights: ``[samples]`` float64.
      stddev: static.
      first: the first of the samples that there are.
      bits: gives the 64 bits of sample j of all elements.
      all_bits: gives these and the further bits of sample j of the elements at some places.
      size: the number of elements, static.
    """
    count = weights.shape[0]

    def add(j: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        total, absolute, error = sums
        weight = weights[j] * stddev
        z, error_of_z = normal_estimates(bits(j))
        size = jnp.abs(weight)
        return total + weight * z, absolute + size * jnp.abs(z), error + size * error_of_z

    zeros = (jnp.zeros(size),) * 3
    last = jnp.int32(count)
    total, absolute, error = jax.lax.fori_loop(first.astype(jnp.int32), last, add, zeros)
    integer = jnp.floor(total + 0.5)
    # The weights, their products and the sums are rounded; 2^-51 for each is more than that.
    wrong = 1.0625 * (error + (count + 3) * 2.0**-51 * absolute)
    sure = jnp.abs(total - integer) <= 0.5 - wrong

    def settled(at: jax.Array) -> jax.Array:
        def add(j: jax.Array, sides: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            words, more = all_bits(j, at)
            v, one_minus_v = _uniform(words, more)
            z = _refined(_fixed(_estimate(jnp.maximum(v, _LEAST)).z), one_minus_v)
            z = jnp.where(v < _LEAST, _constant(int(FURTHEST) << 192), z)
            weight = jnp.broadcast_to(jnp.abs(weights[j]), at.shape)
            scale = _multiply(_fixed(weight), _fixed(jnp.full(at.shape, stddev)))
            term = _multiply(scale, z)
            negative = (weights[j] < 0) != (words[1] & 1 != 0)
            above, below = sides
            none = jnp.zeros_like(term)
            return (
                _add(above, jnp.where(negative, none, term)),
                _add(below, jnp.where(negative, term, none)),
            )

        zero = jnp.zeros((_LIMBS, *at.shape), jnp.uint64)
        above, below = jax.lax.fori_loop(first.astype(jnp.int32), last, add, (zero, zero))
        above = _add(above, _constant(1 << 191))
        negative = _less(above, below)
        rest = jnp.where(negative, _subtract(below, above), _subtract(above, below))
        whole = (rest[_FRACTION] | rest[_FRACTION + 1] << 32).astype(jnp.int64)
        fraction = (rest[:_FRACTION] != 0).any(axis=0)
        return jnp.where(negative, -whole - fraction, whole)

    return _settled_where(~sure, settled, integer.astype(jnp.int64))
