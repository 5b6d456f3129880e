"""The state of a privatizer: where its noise stream stands, and what it keeps of the noise."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels._checks import check_like, is_concrete
from jax_privacy_kernels.ops._chacha20 import CHACHA20, KEY_WORDS
from jax_privacy_kernels.ops._fingerprint import WORDS, is_fingerprint
from jax_privacy_kernels.ops._leaves import Leaf

__all__ = [
    "Clock",
    "NoiseState",
    "abstract_kind",
    "check_kind",
    "has_fingerprint",
    "in_words",
    "is_of_kind",
    "key_words",
    "kind_of",
]

FORMAT = 2


class Clock(NamedTuple):
    """Where the noise stream stands before step t. Plain arrays, none of them without elements.

    Attributes:
      step: int32 scalar, t.
      keys: ``[stored + 1, kw]`` uint32, data of keys, kw words each. The last is the one that the
        keys of later steps are split from; those before it are the keys of the steps that samples
        are made of before that (zeros for steps before the first).
      stddevs: for a stddev that may change and noise that remembers it, those of the steps before
        t that samples are made of again; else ().
      kind: one entry. Its name says what the state is of: the format, the filter and its schedule,
        the type of the keys, and the dtypes of the leaves. Its value is the fingerprint of the
        noising matrix, of the shapes of the leaves, and of the stddev if the state depends on it,
        ``[4]`` uint32.
    """

    step: jax.Array
    keys: jax.Array
    stddevs: Any
    kind: dict[str, jax.Array]

    def __repr__(self) -> str:
        """Without the keys: errors print what they are about."""
        return f"Clock(step={_shown_step(self)}, kind={_name_of_kind(self)}, keys=<secret>)"


class NoiseState(NamedTuple):
    """State of a privatizer before a step. It unpacks as ``clock, inner = state``.

    What it keeps is noise of steps to come, and the clock says which: save and restore them as one.
    Keep it secret, as one keeps a key: it tells the noise.

    Attributes:
      clock: the `Clock`.
      inner: what is kept of the noise. For a banded strategy the rings, a tree like the parameters
        with leaves ``(b - 1,) + shape``; () for independent noise.
    """

    clock: Clock
    inner: Any

    def __repr__(self) -> str:
        """What it is of, without keys and noise: errors print what they are about."""
        leaves = jax.tree.leaves(self.inner)
        kind = _name_of_kind(self.clock)
        words = in_words(kind)
        if words == "1 band" and leaves:
            words = "a StreamingMatrix without a fused kernel"
        return (
            f"NoiseState(step={_shown_step(self.clock)}, kind={kind}, of {words}; "
            f"{_counted(len(leaves), 'array')} of noise, {_size_in_words(leaves)})"
        )


def _size_in_words(leaves: Sequence[Any]) -> str:
    """Of arrays, of ShapeDtypeStructs, and of what stands for arrays in a trace."""
    shapes = [tuple(getattr(leaf, "shape", ())) for leaf in leaves]
    if not all(isinstance(size, int) for shape in shapes for size in shape):
        return "of symbolic sizes"
    dtypes = [getattr(leaf, "dtype", np.dtype(np.uint8)) for leaf in leaves]
    size = sum(math.prod(s) * d.itemsize for s, d in zip(shapes, dtypes, strict=True))
    for unit, bytes_of_it in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= bytes_of_it:
            return f"{size / bytes_of_it:.3g} {unit}"
    return f"{size} B"


def _shown_step(clock: Any) -> str:
    step = getattr(clock, "step", None)
    known = isinstance(step, jax.Array | np.ndarray | np.generic) and is_concrete(step)
    return str(step) if known else type(step).__name__


def _name_of_kind(clock: Any) -> str:
    kind = getattr(clock, "kind", None)
    return " ".join(map(str, kind)) if isinstance(kind, dict) else type(kind).__name__


def in_words(kind: str) -> str:
    """What a kind of state is of, as users call it."""
    counts = {name: int(n) for name, n in re.findall(r"_(slots|buffers|samples)(\d+)", kind)}
    if "_dense_" in kind:
        words = "a dense matrix"
    elif "samples" in counts:
        words = _counted(counts["samples"], "coefficient") + " of C^-1 with "
        words += _counted(counts["slots"], "slot")
    elif "buffers" in counts:
        words = _counted(counts["buffers"], "buffer")
    elif "slots" in counts:
        words = _counted(counts["slots"] + 1, "band")
    else:
        words = "another kind"
    return words + (" and a stddev that changes" if "_changing_stddev" in kind else "")


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


for _type in (Clock, NoiseState):
    jax.export.register_namedtuple_serialization(
        _type, serialized_name=f"jax_privacy_kernels.{_type.__name__}"
    )


def key_words(key_impl: Any) -> tuple[int, ...]:
    """The shape of the data of a key of a type."""
    if key_impl == CHACHA20:  # which warns of seeds
        return (KEY_WORDS,)
    return jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=key_impl))).shape


def kind_of(described: str, key_impl: Any, leaves: Sequence[Leaf]) -> str:
    """The name of a kind of state, in lower case letters, digits and underscores."""
    dtypes = dict.fromkeys(leaf.noise_dtype.name for leaf in leaves)
    types = repr([(len(leaf.shape), leaf.noise_dtype.name) for leaf in leaves])
    parts = [f"v{FORMAT}", described, str(key_impl), *dtypes, f"{zlib.crc32(types.encode()):08x}"]
    return re.sub(r"[^a-z0-9]+", "_", "_".join(parts).lower())


def abstract_kind(name: str) -> Any:
    """`Clock.kind`, its shape and dtype."""
    return {name: jax.ShapeDtypeStruct((WORDS,), jnp.uint32)}


def is_of_kind(state: Any, name: str) -> bool:
    """Whether that is what a state says that it is."""
    kind = getattr(getattr(state, "clock", None), "kind", None)
    return isinstance(kind, dict) and list(kind) == [name]


def check_kind(state: Any, expected: NoiseState) -> None:
    """Raises a ValueError unless a state is of the kind, shapes and dtypes of the one expected."""
    kind: Any = getattr(getattr(state, "clock", None), "kind", None)
    named = isinstance(kind, dict) and [type(name) for name in kind] == [str]
    if not isinstance(state, NoiseState) or not named:
        raise ValueError(
            f"expected noise_state to be a NoiseState of format {FORMAT}, from init or from the "
            f"step before, found a {type(state).__name__}"
        )
    ((found, of_state),) = kind.items()
    if not is_fingerprint(of_state):
        raise ValueError(
            f"expected noise_state.clock.kind to hold an array of shape ({WORDS},), "
            f"found a {type(of_state).__name__}"
        )
    ((name, _),) = expected.clock.kind.items()
    if found != name:
        if found.rpartition("_")[0] == name.rpartition("_")[0]:  # of other leaves, named by rings
            check_like("noise_state.inner", state.inner, expected.inner)
        words = in_words(found), in_words(name)
        differ = f"a state of {words[0]}, expected {words[1]}: " if words[0] != words[1] else ""
        raise ValueError(
            f"{differ}expected noise_state to be of kind {name}, of this privatizer and these "
            "gradients (slots are b - 1 for b bands; the number after the dtypes tells the "
            f"dimensions of the leaves), found one of kind {found}"
        )
    check_like("noise_state", state, expected)


def has_fingerprint(state: NoiseState, fingerprint: Any) -> jax.Array:
    """Whether a state has the fingerprint of a noising matrix and of leaves: a boolean.

    Raises:
      ValueError: it is seen not to have.
    """
    (of_state,) = state.clock.kind.values()
    if not is_concrete([of_state, fingerprint]):
        return (jnp.asarray(of_state) == jnp.asarray(fingerprint)).all()
    same = np.array_equal(np.asarray(of_state), np.asarray(fingerprint))
    if not same:
        raise ValueError(
            "expected noise_state to be of this privatizer and these gradients, found one of a "
            "noising matrix with other coefficients, of another stddev (a stddev that is to change "
            "from step to step has to be traced, in init as well) or of gradients of other shapes"
        )
    return jnp.asarray(same)
