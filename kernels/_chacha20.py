"""The block function of ChaCha20 (RFC 8439, section 2.3) on uint32 arrays, and what kernels know.

ops/_chacha20.py says what each block of a key is for, and where bits stand in blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["BLOCKS_32", "CONSTANTS", "GROUP", "KEY_WORDS", "chacha20"]

KEY_WORDS = 8
GROUP = 128  # elements that have blocks of their own
BLOCKS_32 = 8  # how many these are, for bits of 32

CONSTANTS = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)
_COLUMNS = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15))
_DIAGONALS = ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))


def chacha20(
    key: Sequence[jax.Array],
    nonce: Sequence[Any],
    *,
    barrier: Callable[[Any], Any] = jax.lax.optimization_barrier,
) -> list[jax.Array]:
    """The 16 words of blocks.

    Args:
      key: words 4 to 11 of the input of each block, 8 uint32 arrays.
      nonce: words 12 to 15, 4 of them; all broadcast against each other.
      barrier: keeps XLA from fusing two rounds, of which it would compute most words four times
        over. Pallas has none.
    """
    shape = jnp.broadcast_shapes(*(jnp.shape(word) for word in (*key, *nonce)))
    words: list[Any] = [*map(np.uint32, CONSTANTS), *key, *nonce]
    # Rounds mix all words. In a shard_map, a loop wants them to vary over the same axes before.
    zero = functools.reduce(jnp.bitwise_or, (*key, *nonce)) & np.uint32(0)
    start = tuple(jnp.broadcast_to(word | zero, shape) for word in words)

    def two_rounds(_: Any, x: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return _round(_DIAGONALS, barrier(_round(_COLUMNS, x)))

    end = jax.lax.fori_loop(0, 10, two_rounds, start)
    return [x + y for x, y in zip(start, end, strict=True)]


def _round(
    quarters: Sequence[tuple[int, int, int, int]], words: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    x = list(words)
    for a, b, c, d in quarters:
        for left, right in ((16, 12), (8, 7)):
            x[a] = x[a] + x[b]
            x[d] = _rotate_left(x[d] ^ x[a], left)
            x[c] = x[c] + x[d]
            x[b] = _rotate_left(x[b] ^ x[c], right)
    return tuple(x)


def _rotate_left(x: jax.Array, by: int) -> jax.Array:
    return (x << by) | (x >> (32 - by))
