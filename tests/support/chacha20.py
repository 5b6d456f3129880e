"""ChaCha20 as RFC 8439 defines it, one block of Python integers at a time, and its test vectors."""

from __future__ import annotations

__all__ = ["VECTORS", "block", "element", "words_of"]

_MASK = 2**32 - 1


def _quarter_round(state, a, b, c, d):
    for first, second in ((16, 12), (8, 7)):
        state[a] = state[a] + state[b] & _MASK
        x = state[d] ^ state[a]
        state[d] = (x << first | x >> (32 - first)) & _MASK
        state[c] = state[c] + state[d] & _MASK
        x = state[b] ^ state[c]
        state[b] = (x << second | x >> (32 - second)) & _MASK


def block(key, nonce):
    """The 16 words of a block, of 8 words of a key and the 4 words after them."""
    start = [int.from_bytes(b"expand 32-byte k"[i : i + 4], "little") for i in range(0, 16, 4)]
    start += [*map(int, key), *map(int, nonce)]
    state = list(start)
    for _ in range(10):
        for i in range(4):
            _quarter_round(state, i, 4 + i, 8 + i, 12 + i)
        for i in range(4):
            _quarter_round(state, i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
    return [(x + y) & _MASK for x, y in zip(state, start, strict=True)]


def words_of(data):
    """The 32-bit words of bytes."""
    return [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]


def element(key, domain, width, i):
    """The bits of element i, by the layout of docs/security.md."""
    group, place = divmod(i, 128)
    lanes = 16 if width == 64 else 8
    number = lanes * group + place % lanes
    words = block(key, (number & _MASK, domain, number >> 32, 0))
    low = words[place // lanes]
    if width == 64:
        return words[place // lanes + 8] << 32 | low
    return low & (2**width - 1)


def _vector(key, counter, nonce, words):
    nonce = bytes.fromhex(nonce)
    return words_of(key), [counter, *words_of(nonce)], [int(word, 16) for word in words.split()]


_ZEROS = bytes(31)
# Of section 2.3.2 and of appendix A.1: key, words 12 to 15, and the block.
VECTORS = {
    "2.3.2": _vector(
        bytes(range(32)),
        1,
        "000000090000004a00000000",
        "e4e7f110 15593bd1 1fdd0f50 c47120a3 c7f4d1c7 0368c033 9aaa2204 4e6cd4c3 "
        "466482d2 09aa9f07 05d7c214 a2028bd9 d19c12b5 b94e16de e883d0cb 4e3c50a2",
    ),
    "A.1, 1": _vector(
        bytes(32),
        0,
        "00" * 12,
        "ade0b876 903df1a0 e56a5d40 28bd8653 b819d2bd 1aed8da0 ccef36a8 c70d778b "
        "7c5941da 8d485751 3fe02477 374ad8b8 f4b8436a 1ca11815 69b687c3 8665eeb2",
    ),
    "A.1, 2": _vector(
        bytes(32),
        1,
        "00" * 12,
        "bee7079f 7a385155 7c97ba98 0d082d73 a0290fcb 6965e348 3e53c612 ed7aee32 "
        "7621b729 434ee69c b03371d5 d539d874 281fed31 45fb0a51 1f0ae1ac 6f4d794b",
    ),
    "A.1, 3": _vector(
        _ZEROS + b"\x01",
        1,
        "00" * 12,
        "2452eb3a 9249f8ec 8d829d9b ddd4ceb1 e8252083 60818b01 f38422b8 5aaa49c9 "
        "bb00ca8e da3ba7b4 c4b592d1 fdf2732f 4436274e 2561b3c8 ebdd4aa6 a0136c00",
    ),
    "A.1, 4": _vector(
        b"\x00\xff" + bytes(30),
        2,
        "00" * 12,
        "fb4dd572 4bc42ef1 df922636 327f1394 a78dea8f 5e269039 a1bebbc1 caf09aae "
        "a25ab213 48a6b46c 1b9d9bcb 092c5be6 546ca624 1bec45d5 87f47473 96f0992e",
    ),
    "A.1, 5": _vector(
        bytes(32),
        0,
        "00" * 11 + "02",
        "374dc6c2 3736d58c b904e24a cd3f93ef 88228b1a 96a4dfb3 5b76ab72 c727ee54 "
        "0e0e978a f3145c95 1b748ea8 f786c297 99c28f5f 628314e8 398a19fa 6ded1b53",
    ),
}
