"""Privacy loss sums in plain JAX: the oracle, and what runs where no kernel does.

The samples are those of the kernel, up to rounding. Likelihood ratios of sequences of steps are
those of the backward recurrence of https://arxiv.org/abs/2602.09338, always in logarithms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp

from jax_privacy_kernels._checks import check_memory
from jax_privacy_kernels.kernels._threefry import threefry2x32

__all__ = ["run"]

_NUMBERS = 2**21  # that a chunk of samples may take, for each of its arrays


def run(
    key: jax.Array,
    span: jax.Array,
    operands: tuple[jax.Array, ...],
    sigmas: jax.Array,
    margins: jax.Array,
    epsilons: jax.Array,
    /,
    *,
    scheme: str,
    n: int,
    period: int,
    p: float,
) -> Any:
    """Sums, counts and maxima; a ValueError if a chunk of samples does not fit into memory."""
    width = period if scheme == "bins" else n + period
    size = max(16, min(1024, _NUMBERS // width))
    # Some eight arrays of its samples' steps, and four of its samples' excesses.
    check_memory("iterations", n, 8 * 8 * width * size)
    cells = sigmas.size * epsilons.size
    check_memory("noise_multipliers times epsilons", cells, 8 * 4 * 2 * cells * size)
    if scheme == "bins":
        gram, factor = operands
        losses = _bins(key, gram, factor, sigmas)
    else:
        (c,) = operands
        losses = _steps(key, c, sigmas, scheme=scheme, n=n, period=period, p=p)
    shape = (2, sigmas.size, epsilons.size)
    first, count = span

    def chunk(i: jax.Array, carry: Any) -> Any:
        sums, counts, maxima = carry
        index = i * size + jnp.arange(size)
        loss = losses((first + index).astype(jnp.uint64)) + margins[:, None]
        loss = jnp.where(index < count, loss, -jnp.inf)
        excess = -jnp.expm1(epsilons[:, None] - loss[..., None, :])
        value = jnp.where(excess <= 0, 0.0, excess)
        return (
            sums + value.sum(axis=-1),
            counts + (value != 0).sum(axis=-1),
            jnp.maximum(maxima, value.max(axis=-1)),
        )

    zeros = jnp.zeros(shape, jnp.float64)
    return jax.lax.fori_loop(0, -(-count // size), chunk, (zeros, zeros, zeros))


Key = tuple[jax.Array, jax.Array]


def _unit(key: Key, index: jax.Array) -> jax.Array:
    """Uniform numbers of [0, 1), multiples of 2^-52, a function of the key and a 64-bit index."""
    hi, lo = (index >> 32).astype(jnp.uint32), index.astype(jnp.uint32)
    x0, x1 = threefry2x32(*key, hi, lo)
    bits = (x0.astype(jnp.uint64) << 32) | x1.astype(jnp.uint64)
    return (bits >> 12).astype(jnp.float64) * 2.0**-52


def _normal(unit: jax.Array) -> jax.Array:
    lowest = -1 + 2.0**-53
    return jax.lax.erf_inv(jnp.maximum(unit * 2 + lowest, lowest)) * 2**0.5


def _split(key: jax.Array) -> tuple[Key, Key, Key]:
    """Of normal numbers, of the choice of a bin or a start, of participations."""
    k0, k1 = threefry2x32(key[0], key[1], jnp.zeros(3, jnp.uint32), jnp.arange(3, dtype=jnp.uint32))
    return (k0[0], k1[0]), (k0[1], k1[1]), (k0[2], k1[2])


def _for_each_sigma(
    loss: Callable[[jax.Array, jax.Array], jax.Array], sigmas: jax.Array, signal: jax.Array
) -> jax.Array:
    """Losses [2, s, samples]: with the signal of the example, and without it and of other sign."""

    def signed(which: Any) -> jax.Array:
        sign, sigma = which
        return sign * loss(sigma, jnp.where(sign > 0, signal, 0.0))

    signs = jnp.repeat(jnp.array([1.0, -1.0]), sigmas.size)
    found = jax.lax.map(signed, (signs, jnp.concatenate([sigmas, sigmas])))
    return found.reshape(2, sigmas.size, -1)


def _bins(
    key: jax.Array, gram: jax.Array, factor: jax.Array, sigmas: jax.Array
) -> Callable[[jax.Array], jax.Array]:
    modes = len(gram)
    half = jnp.diag(gram) / 2

    def losses(sample: jax.Array) -> jax.Array:
        index = sample[:, None] * jnp.uint64(modes) + jnp.arange(modes, dtype=jnp.uint64)
        normal_key, choice_key, _ = _split(key)
        g = jnp.matmul(_normal(_unit(normal_key, index)), factor.T, precision="highest")
        chosen = (_unit(choice_key, sample) * modes).astype(jnp.int64)
        offsets = gram[jnp.minimum(chosen, modes - 1)]

        def loss(sigma: jax.Array, offset: jax.Array) -> jax.Array:
            t = g / sigma + (offset - half) / sigma**2
            return logsumexp(t, axis=-1) - jnp.log(modes)

        return _for_each_sigma(loss, sigmas, offsets)

    return losses


def _steps(
    key: jax.Array,
    c: jax.Array,
    sigmas: jax.Array,
    *,
    scheme: str,
    n: int,
    period: int,
    p: float,
) -> Callable[[jax.Array], jax.Array]:
    taps = c.size
    norms = jnp.cumsum(c**2)[jnp.minimum(taps, n - jnp.arange(n)) - 1]
    log_p, log_rest = jnp.log(jnp.float64(p)), jnp.log1p(-jnp.float64(p))
    log_start = jnp.log1p((period - 1) * jnp.float64(p))

    def correlate(y: jax.Array) -> jax.Array:
        """The inner products of y [n, samples] with the columns of C."""
        y = jnp.concatenate([y, jnp.zeros((taps - 1, y.shape[1]))])
        tap = lambda k, total: total + c[k] * jax.lax.dynamic_slice_in_dim(y, k, n)  # noqa: E731
        return jax.lax.fori_loop(0, taps, tap, jnp.zeros((n, y.shape[1])))

    def multiply(x: jax.Array) -> jax.Array:
        """C x."""
        x = jnp.concatenate([jnp.zeros((taps - 1, x.shape[1])), x])
        start = taps - 1
        tap = lambda k, y: y + c[k] * jax.lax.dynamic_slice_in_dim(x, start - k, n)  # noqa: E731
        return jax.lax.fori_loop(0, taps, tap, jnp.zeros((n, x.shape[1])))

    def participations(sample: jax.Array, choice_key: Key, draw_key: Key) -> jax.Array:
        """x [n, samples]."""
        u = _unit(choice_key, sample)
        unspent = 1 / (1 + (period - 1) * p)  # the probability to be open at the start
        if scheme == "cyclic":
            first = jnp.floor(u * period)
        elif scheme == "min_sep_warm" and p > 0:
            first = jnp.where(u < unspent, 0, 1 + jnp.floor((u - unspent) / (p * unspent)))
        else:
            first = jnp.zeros(u.shape)
        turn = period if scheme == "cyclic" else 1

        def wait(carry: Any) -> Any:
            number, at, x = carry
            index = sample * jnp.uint64(n + 1) + number
            waits = jnp.floor(jnp.log1p(-_unit(draw_key, index)) / log_rest)
            at = jnp.minimum(at + waits * turn, n)
            x = x.at[at.astype(jnp.int64), jnp.arange(at.size)].set(1, mode="drop")
            return number + jnp.uint64(1), at + period, x

        x = jnp.zeros((n, u.size))
        if p == 0:
            return x
        start = (jnp.uint64(0), jnp.minimum(first, period - 1), x)
        # What is past the end by a period has waited once too often.
        return jax.lax.while_loop(lambda carry: jnp.any(carry[1] < n), wait, start)[2]

    def log_ratio(r: jax.Array) -> jax.Array:
        """log P(y) / Q(y) [samples] from r_i [n, samples]."""
        if scheme == "cyclic":
            terms = jnp.logaddexp(log_rest, log_p + r)
            rows = -(-n // period)
            terms = jnp.concatenate([terms, jnp.zeros((rows * period - n, r.shape[1]))])
            return logsumexp(terms.reshape(rows, period, -1).sum(axis=0), axis=0) - jnp.log(period)

        def step(carry: Any, now: Any) -> Any:
            ring, after = carry  # V_{i+1} .. V_{i+b}, the one of i + b at i % b, and V_{i+1}
            i, r = now
            here = jnp.logaddexp(log_rest + after, log_p + r + ring[i % period])
            return (ring.at[i % period].set(here), here), None

        start = (jnp.zeros((period, r.shape[1])), jnp.zeros(r.shape[1]))
        (ring, here), _ = jax.lax.scan(step, start, (jnp.arange(n), r), reverse=True)
        if scheme == "min_sep":
            return here
        return logsumexp(ring.at[1:].add(log_p), axis=0) - log_start

    def losses(sample: jax.Array) -> jax.Array:
        index = sample * jnp.uint64(n) + jnp.arange(n, dtype=jnp.uint64)[:, None]
        normal_key, choice_key, draw_key = _split(key)
        noise = correlate(_normal(_unit(normal_key, index)))
        x = participations(sample, choice_key, draw_key)
        signals = correlate(multiply(x))

        def loss(sigma: jax.Array, signal: jax.Array) -> jax.Array:
            return log_ratio(noise / sigma + (signal - norms[:, None] / 2) / sigma**2)

        return _for_each_sigma(loss, sigmas, signals)

    return losses
