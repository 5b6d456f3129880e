# mypy: ignore-errors
# Triton's language looks like Python, and has other types.
"""Where the samples of kernels in Triton get their bits, and the samples, by jax.random.normal.

STREAM, the type of the keys, is threefry2x32 or chacha20; what else there is in a kernel does not
know which. csrc/streams.h has the same choice in C++.
"""

import triton
import triton.language as tl

from jax_privacy_kernels.kernels import _chacha20 as _constants

__all__ = ["draw", "normal"]

# As the language wants them.
KEY_WORDS, GROUP = tl.constexpr(_constants.KEY_WORDS), tl.constexpr(_constants.GROUP)
BLOCKS_32 = tl.constexpr(_constants.BLOCKS_32)
DOMAIN = tl.constexpr(32)  # of bits of 32
C0, C1, C2, C3 = map(tl.constexpr, _constants.CONSTANTS)

# -- threefry2x32 with jax_threefry_partitionable: the bits of an element are its encrypted index --


@triton.jit
def _round(x0, x1, rotation: tl.constexpr):
    x0 += x1
    return x0, ((x1 << rotation) | (x1 >> (32 - rotation))) ^ x0


@triton.jit
def _four_rounds(x0, x1, a: tl.constexpr, b: tl.constexpr, c: tl.constexpr, d: tl.constexpr):
    x0, x1 = _round(x0, x1, a)
    x0, x1 = _round(x0, x1, b)
    x0, x1 = _round(x0, x1, c)
    return _round(x0, x1, d)


@triton.jit
def _threefry2x32(k0, k1, x0, x1):
    """Threefry-2x32 with 20 rounds, Salmon et al., SC'11."""
    k2 = k0 ^ k1 ^ 0x1BD11BDA
    x0, x1 = _four_rounds(x0 + k0, x1 + k1, 13, 15, 26, 6)
    x0, x1 = _four_rounds(x0 + k1, x1 + (k2 + 1), 17, 29, 16, 24)
    x0, x1 = _four_rounds(x0 + k2, x1 + (k0 + 2), 13, 15, 26, 6)
    x0, x1 = _four_rounds(x0 + k0, x1 + (k1 + 3), 17, 29, 16, 24)
    x0, x1 = _four_rounds(x0 + k1, x1 + (k2 + 4), 13, 15, 26, 6)
    return x0 + k2, x1 + (k0 + 5)


# -- chacha20: ops/_chacha20.py says where bits stand in blocks -----------------------------------


@triton.jit
def _rotate_left(x, by: tl.constexpr):
    return (x << by) | (x >> (32 - by))


@triton.jit
def _quarter_round(a, b, c, d):
    a += b
    d = _rotate_left(d ^ a, 16)
    c += d
    b = _rotate_left(b ^ c, 12)
    a += b
    d = _rotate_left(d ^ a, 8)
    c += d
    return a, _rotate_left(b ^ c, 7), c, d


@triton.jit
def _chacha20(key, low, high):
    """The 16 words of the blocks of 32 bits that have these numbers, of keys at these addresses."""
    k0, k1, k2, k3 = tl.load(key), tl.load(key + 1), tl.load(key + 2), tl.load(key + 3)
    k4, k5, k6, k7 = tl.load(key + 4), tl.load(key + 5), tl.load(key + 6), tl.load(key + 7)
    zero = tl.zeros_like(low)
    x0, x1, x2, x3 = zero + C0, zero + C1, zero + C2, zero + C3
    x4, x5, x6, x7, x8, x9, x10, x11 = k0, k1, k2, k3, k4, k5, k6, k7
    x12, x13, x14, x15 = low, zero + DOMAIN, zero + high, zero
    for _ in range(10):
        x0, x4, x8, x12 = _quarter_round(x0, x4, x8, x12)
        x1, x5, x9, x13 = _quarter_round(x1, x5, x9, x13)
        x2, x6, x10, x14 = _quarter_round(x2, x6, x10, x14)
        x3, x7, x11, x15 = _quarter_round(x3, x7, x11, x15)
        x0, x5, x10, x15 = _quarter_round(x0, x5, x10, x15)
        x1, x6, x11, x12 = _quarter_round(x1, x6, x11, x12)
        x2, x7, x8, x13 = _quarter_round(x2, x7, x8, x13)
        x3, x4, x9, x14 = _quarter_round(x3, x4, x9, x14)
    first = (x0 + C0, x1 + C1, x2 + C2, x3 + C3, x4 + k0, x5 + k1, x6 + k2, x7 + k3)
    last = (x8 + k4, x9 + k5, x10 + k6, x11 + k7, x12 + low, x13 + DOMAIN, x14 + high, x15)
    return first + last


@triton.jit
def _halves(x, SIZE: tl.constexpr, KEYS: tl.constexpr):
    """Those of even and of odd keys, of ``[SIZE, KEYS]``."""
    even, odd = tl.split(tl.reshape(x, (SIZE, KEYS // 2, 2)))
    return even, odd


@triton.jit
def _bits_of_blocks(keys, first, count, index, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """The bits that `draw` gives, ``[SIZE]`` for each key, and for more keys to a power of two."""
    KEYS: tl.constexpr = COUNT if COUNT <= 2 else 4 if COUNT <= 4 else 8
    BLOCKS: tl.constexpr = SIZE // GROUP * BLOCKS_32
    lane = tl.arange(0, KEYS * BLOCKS)
    key = keys + KEY_WORDS * tl.minimum(first + lane // BLOCKS, count - 1)
    number = (index // GROUP) * BLOCKS_32
    low, high = number.to(tl.uint32), (number >> 32).to(tl.uint32)  # no carry from low + lane
    w = _chacha20(key, low + (lane % BLOCKS).to(tl.uint32), high)
    # Joined in this order, the last dimension counts the words.
    even = tl.join(
        tl.join(tl.join(w[0], w[8]), tl.join(w[4], w[12])),
        tl.join(tl.join(w[2], w[10]), tl.join(w[6], w[14])),
    )
    odd = tl.join(
        tl.join(tl.join(w[1], w[9]), tl.join(w[5], w[13])),
        tl.join(tl.join(w[3], w[11]), tl.join(w[7], w[15])),
    )
    words = tl.reshape(tl.join(even, odd), (KEYS, SIZE // GROUP, BLOCKS_32, 16))
    x = tl.reshape(tl.permute(words, (1, 3, 2, 0)), (SIZE, KEYS))  # by element, then by key
    if KEYS == 1:
        return (tl.reshape(x, (SIZE,)),)
    elif KEYS == 2:
        return tl.split(x)
    elif KEYS == 4:
        even, odd = _halves(x, SIZE, 4)
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        return x0, x1, x2, x3
    else:
        tl.static_assert(KEYS == 8)
        even, odd = _halves(x, SIZE, 8)
        x04, x26 = _halves(even, SIZE, 4)
        x15, x37 = _halves(odd, SIZE, 4)
        x0, x4 = tl.split(x04)
        x1, x5 = tl.split(x15)
        x2, x6 = tl.split(x26)
        x3, x7 = tl.split(x37)
        return x0, x1, x2, x3, x4, x5, x6, x7


# -- Bits, and samples ----------------------------------------------------------------------------


@triton.jit
def draw(keys, first, count, index, COUNT: tl.constexpr, SIZE: tl.constexpr, STREAM: tl.constexpr):
    """What `normal` takes for each of COUNT keys from number ``first`` on, as a tuple.

    A block of ChaCha20 has the bits of 16 elements, 8 apart, of one key. A thread that kept to its
    own elements would compute a block for every one of them; one that had all 16 would hold 16
    elements of every term, and kernels have up to 8 terms in registers. So each thread computes one
    block, of any of the keys, and the bits go by shared memory to the threads that have the
    elements; what that costs was not measured. If there are COUNT SIZE = 16 elements for
    each thread, COUNT a power of two, no block is computed twice.

    Args:
      keys: those of a leaf.
      first: a number.
      count: how many keys there are; the last one stands for those after it.
      index: that of an element in the leaf, and a multiple of SIZE.
      COUNT: up to 8.
      SIZE: how many elements there are from that one on, a multiple of 128.
      STREAM: the type of the keys.
    """
    if STREAM == "chacha20":
        return _bits_of_blocks(keys, first, count, index, COUNT, SIZE)
    else:
        tl.static_assert(STREAM == "threefry2x32")
        drawn = ()
        for k in tl.static_range(COUNT):
            drawn = drawn + (keys + 2 * tl.minimum(first + k, count - 1),)
        return drawn


@triton.jit
def _log2(x):
    """The GPU's own logarithm of positive, normal numbers, one instruction.

    PTX bounds its error by 2^-22, absolute between 0.5 and 2 and relative elsewhere.
    """
    code: tl.constexpr = "lg2.approx.ftz.f32 $0, $1;"
    return tl.inline_asm_elementwise(code, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _sqrt2_erf_inv(u, ACCURATE: tl.constexpr):
    """sqrt(2) erf_inv(u), by the polynomials of M. Giles (GPU Computing Gems, 2011), as in XLA."""
    # XLA rounds u^2 before it takes log(1 - u^2), unless jax_accurate_erf_inv is set.
    if ACCURATE:
        w = -0.693147181 * _log2((1.0 - u) * (1.0 + u))
    else:
        w = -0.693147181 * _log2(1.0 - u * u)
    x = w - 2.5
    p = tl.fma(x, 2.81022636e-08, 3.43273939e-07)
    p = tl.fma(p, x, -3.5233877e-06)
    p = tl.fma(p, x, -4.39150654e-06)
    p = tl.fma(p, x, 0.00021858087)
    p = tl.fma(p, x, -0.00125372503)
    p = tl.fma(p, x, -0.00417768164)
    p = tl.fma(p, x, 0.246640727)
    p = tl.fma(p, x, 1.50140941)
    x = tl.sqrt(w) - 3.0
    q = tl.fma(x, -0.000200214257, 0.000100950558)
    q = tl.fma(q, x, 0.00134934322)
    q = tl.fma(q, x, -0.00367342844)
    q = tl.fma(q, x, 0.00573950773)
    q = tl.fma(q, x, -0.0076224613)
    q = tl.fma(q, x, 0.00943887047)
    q = tl.fma(q, x, 1.00167406)
    q = tl.fma(q, x, 2.83297682)
    return tl.where(w < 5.0, p, q) * u * 1.41421356


@triton.jit
def normal(drawn, index, lane, STREAM: tl.constexpr, ACCURATE: tl.constexpr):
    """Elements index + lane of a leaf's samples, of one tile, from what was drawn for them."""
    if STREAM == "chacha20":
        bits = drawn
    else:
        high, low = (index >> 32).to(tl.uint32), index.to(tl.uint32)  # no carry from low + lane
        low += lane.to(tl.uint32)
        x0, x1 = _threefry2x32(tl.load(drawn), tl.load(drawn + 1), high, low)
        bits = x0 ^ x1
    unit = ((bits >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    lowest = -0.99999994  # the float32 above -1
    # Doubling is exact: the fused sum is rounded as JAX rounds it, and is never below lowest.
    return _sqrt2_erf_inv(tl.fma(unit, 2.0, lowest), ACCURATE)
