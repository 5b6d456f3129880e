"""ChaCha20 as a JAX key type: noise that nobody can tell who does not have the key.

`chacha20` is an implementation of random numbers for JAX, by the block function of RFC 8439, with
keys of 256 bits. Keys of this type go wherever keys go: into `jax.random`, into privatizers and
into jax_privacy, under jit, vmap, scan and on many devices. The bits of an element are a function
of the key and of its index alone.

    >>> import jax
    >>> key = secure_key()
    >>> jax.random.normal(jax.random.fold_in(key, 3), (2, 5)).shape
    (2, 5)

jax.random's own threefry2x32 has keys of 64 bits and was not made to keep secrets; it is the stream
that reproduces jax_privacy's runs. ``docs/security.md`` compares the two, and says what blocks of a
key are for.
"""

from __future__ import annotations

import secrets

import jax
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels._checks import is_tracing
from jax_privacy_kernels.ops import CHACHA20

__all__ = ["chacha20", "secure_key"]

chacha20 = CHACHA20
"""The key type, for ``impl=`` of `jax.random.key` and `jax.random.wrap_key_data`.

``jax.random.key(seed, impl=chacha20)``, to reproduce a run, warns that an integer is no secret.
"""

_BYTES = 32


def secure_key(data: bytes | bytearray | memoryview | None = None) -> jax.Array:
    """A key of type `chacha20`, of all 256 bits.

    Whoever has it knows all noise that is made of it. Draw one for every run, in one process, and
    share it with the others; keep it, and states, which hold keys, as secret as the data.

    Args:
      data: 32 bytes to make the key of, to reproduce a run; None for bytes from the operating
        system's entropy (`secrets.token_bytes`). They are words 4 to 11 of blocks, each with its
        lowest byte first, as RFC 8439 has them.

    Returns:
      A typed key, shape ().

    Raises:
      TypeError: data is not bytes.
      ValueError: data is not of 32 bytes; there is none in a trace, where a key that is drawn would
        become a constant of the compiled program.
    """
    if data is None:
        if is_tracing():
            raise ValueError(
                "expected data for a key inside a trace, found None: a key drawn now would become "
                "a constant of the compiled program, and every call would use the same one"
            )
        data = secrets.token_bytes(_BYTES)
    if not isinstance(data, bytes | bytearray | memoryview):
        raise TypeError(f"expected data to be {_BYTES} bytes, found {type(data).__name__}")
    if memoryview(data).nbytes != _BYTES:  # its value is a secret, which no message shows
        raise ValueError(f"expected data to be {_BYTES} bytes, found {memoryview(data).nbytes}")
    words = np.frombuffer(bytes(data), "<u4").astype(np.uint32)
    return jax.random.wrap_key_data(jnp.asarray(words), impl=chacha20)


def __dir__() -> list[str]:  # for completion: no imported names
    return sorted(__all__)
