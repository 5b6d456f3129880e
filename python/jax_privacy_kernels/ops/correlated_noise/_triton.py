"""Correlated noise as one launch for every leaf, in Triton (kernels/correlated_noise_triton.py)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jax_privacy_kernels.ops import _gpu_noise, _jax_triton
from jax_privacy_kernels.ops._leaves import TILE, Leaf
from jax_privacy_kernels.ops._noise import NoiseOutputs
from jax_privacy_kernels.ops.correlated_noise._contract import Inputs
from jax_privacy_kernels.ops.correlated_noise._filters import Filter, RecurrenceFilter
from jax_privacy_kernels.ops.dense_noise import _triton as _dense_noise

__all__ = ["refuse", "run"]

# Terms made together, at most, and elements of a tile to a program that makes them. With twice as
# many terms, the compiler spills registers for some dtypes and sizes. Of chacha20 keys the bits
# of a group are in registers too, and 8 terms spill; `_part` says what their parts are.
GROUP, GROUP_CHACHA20 = 8, 7
PART = 256
PROGRAMS = 1024  # that refresh tiles at a step, and fill a GPU with parts of twice the size


def refuse(leaf: Leaf, filter: Filter, stream: str) -> str | None:
    """Why this implementation cannot take the leaf, or None."""
    if reason := _gpu_noise.refuse_triton(leaf, filter.ahead, stream):
        return reason
    if filter.rows and not isinstance(filter, RecurrenceFilter):
        return f"it keeps no state of a {filter.name}"
    return None


def run(inputs: Inputs) -> NoiseOutputs:
    """One step."""
    filter, leaves, base = inputs.filter, inputs.leaves, inputs.base
    assert filter.ahead
    assert base is not None
    step = inputs.step
    split = jax.vmap(lambda key: jax.random.split(key, leaves[0].count), out_axes=1)
    keys = jax.random.key_data(split(inputs.keys))  # [leaves, samples, words]
    outs, rings = [], []
    for i, (leaf, first, grad) in enumerate(zip(leaves, base, inputs.grads, strict=True)):
        factors = filter.factors(step, inputs.coef.astype(leaf.dtype))
        scale = inputs.scale.astype(leaf.dtype)
        if filter.slots:
            runs = _gpu_noise.runs(leaf, first, filter.slots)
            arrays = [
                step,
                keys,
                _padded(factors, inputs.stream),
                scale,
                grad,
                runs,
                inputs.rings[i],
            ]
            first_key = keys[0].size * leaf.index
            out, ring = _recurrence(filter.slots, leaf, inputs.stream, first_key, arrays)
            rings.append(ring)
        else:
            out = _dense_noise.weighted_samples(
                leaf, first, inputs.stream, keys, factors.reshape(-1), scale, grad
            )
        outs.append(out)
    return NoiseOutputs(outs, rings)


def _recurrence(
    slots: int, leaf: Leaf, stream: str, first_key: int, arrays: Sequence[jax.Array]
) -> Sequence[jax.Array]:
    from jax_privacy_kernels.kernels import correlated_noise_triton

    *_, weights, _, grad, runs, ring = arrays
    unit = _jax_triton.divisor(leaf.shard.run)
    tiles = _gpu_noise.tiles_of_run(leaf)
    # Of every S tiles that have all phases; the first of them may begin before the run.
    groups = -(-(tiles + (0 if leaf.whole else slots - 1)) // slots)
    part, warps = _part(slots, stream, weights.shape[0], leaf)
    others = -(-tiles // groups) if slots > 1 else 0
    group = TILE // part + others
    programs = groups * group
    magic, shift = _division_by(group) if others else (0, 0)
    return _jax_triton.call(
        correlated_noise_triton.recurrence,
        arrays,
        [
            first_key,
            leaf.shard.run // unit,
            leaf.shard.size // unit,
            (slots - 1) * (leaf.shard.size // unit),
            programs,
            group,
            magic,
            shift,
        ],
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (grad, ring)],
        programs=runs.shape[0] * programs,
        warps=warps,
        aliases={len(arrays) - 1: 1},
        UNIT=unit,
        SLOTS=slots,
        ROWS=weights.shape[0],
        WIDTH=weights.shape[1],
        GROUP=_group(slots, stream),
        PART=part,
        TILE=TILE,
        STREAM=stream,
        ACCURATE=_jax_triton.accurate(),
        WHOLE=leaf.whole,
    )


def _division_by(divisor: int) -> tuple[int, int]:
    """A magic number of 32 bits and a shift: p // divisor is ``magic * p >> shift`` if p < 2^31.

    Divisors are 2 or more. 2^l is the least power of two that is not below the divisor. Then
    ``magic * divisor`` exceeds 2^(31 + l) by less than 2^l, and the quotient by less than
    1 / divisor (T. Granlund and P. L. Montgomery, PLDI'94).
    """
    shift = 31 + (divisor - 1).bit_length()
    return -(-(2**shift) // divisor), shift


def _padded(factors: jax.Array, stream: str) -> jax.Array:
    """The factors of a recurrence, and zeros for what groups at either end reach beyond them."""
    slots = factors.shape[1] - 1
    group = _group(slots, stream)
    whole = -(-slots // group) * group
    rows = factors.shape[0] if factors.shape[0] == 1 else whole
    missing = rows - factors.shape[0], whole + group - factors.shape[1]
    return jnp.pad(factors, [(0, count) for count in missing])


def _group(slots: int, stream: str) -> int:
    """The size of a group: as many as there must be, and these as equal as can be."""
    most = GROUP_CHACHA20 if stream == "chacha20" else GROUP
    return -(-slots // -(-slots // most))


def _part(slots: int, stream: str, rows: int, leaf: Leaf) -> tuple[int, int]:
    """The elements of a part, and the warps of a program.

    Args:
      slots, stream: as they are.
      rows: of the weights.
      leaf: the one that is launched for.
    """
    if stream == "chacha20":
        # A block of 16 elements to each thread, of the keys of a group, which are drawn at once.
        keys = 1 << (_group(slots, stream) - 1).bit_length()
        part = min(16 * 128 // keys, TILE)
        return part, _gpu_noise.warps(part * keys, stream)
    if slots == 1:
        part = TILE  # all tiles are refreshed, and there is no other work for parts to hide
    elif slots > 2 * GROUP and rows == 1 and _is_wide(slots, leaf):
        # Weights and places in the ring, which all terms before a group need, serve more elements.
        # With fewer groups they cost little. More registers leave room for fewer programs.
        part = 2 * PART
    else:
        part = PART
    return part, _gpu_noise.warps(part, stream)


def _is_wide(slots: int, leaf: Leaf) -> bool:
    """Whether a leaf has work for a GPU in parts of twice the size, and kernels for it no spills.

    A part of a shard needs more registers, and so do accesses of single elements, and places in the
    ring of 64 bits.
    """
    size = leaf.shard.size
    plain = leaf.whole and _jax_triton.divisor(size) > 1 and slots * size < 2**34
    return plain and size >= 2 * PART * PROGRAMS * slots
