"""Correlated noise in Triton (kernels/correlated_noise_triton.py).

A leaf that fills a GPU has a launch of its own, and up to eight that do not share one: a program
that refreshes takes as long in a small leaf as in a large one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels.kernels import _leaves as columns
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
PROGRAMS = 1024  # that refresh tiles at a step, and fill a GPU


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
    outs, rings = list(inputs.grads), list(inputs.rings)
    for group in _launches(inputs):
        first, *others = group
        leaf, grad = leaves[first], inputs.grads[first]
        factors = filter.factors(step, inputs.coef.astype(leaf.dtype))
        scale = inputs.scale.astype(leaf.dtype)
        if not filter.slots:
            outs[first] = _dense_noise.weighted_samples(
                leaf, base[first], inputs.stream, keys, factors.reshape(-1), scale, grad
            )
            continue
        shared = [step, keys, _padded(factors, inputs.stream), scale]
        if others:
            results = _recurrences(
                filter.slots,
                [leaves[i] for i in group],
                inputs.stream,
                shared,
                [inputs.grads[i] for i in group],
                [inputs.rings[i] for i in group],
            )
        else:
            runs = _gpu_noise.runs(leaf, base[first], filter.slots)
            arrays = [*shared, grad, runs, inputs.rings[first]]
            results = [_recurrence(filter.slots, leaf, inputs.stream, arrays)]
        for i, (out, ring) in zip(group, results, strict=True):
            outs[i], rings[i] = out, ring
    return NoiseOutputs(outs, rings)


def _launches(inputs: Inputs) -> list[list[int]]:
    """The leaves, by their positions, in groups that share a launch."""
    slots, rows = inputs.filter.slots, inputs.coef.shape[0]
    groups: list[list[int]] = []
    last: dict[Any, list[int]] = {}  # the group that is being filled, by what its leaves share
    for i, (leaf, grad) in enumerate(zip(inputs.leaves, inputs.grads, strict=True)):
        if not slots or not leaf.whole or not _is_small(slots, inputs.stream, rows, leaf):
            groups.append([i])
            continue
        kind = grad.dtype, leaf.dtype, _jax_triton.divisor(leaf.size)
        if len(last.get(kind, [])) in (0, columns.LEAVES):
            last[kind] = []
            groups.append(last[kind])
        last[kind].append(i)
    return groups


def _is_small(slots: int, stream: str, rows: int, leaf: Leaf) -> bool:
    """Whether a whole leaf does not fill a GPU, and places in its ring have 32 bits."""
    part, _ = _part(slots, stream, rows, leaf)
    groups, _ = _tiles(slots, part, leaf)
    return groups * (TILE // part) < PROGRAMS and slots * leaf.size < 2**31


def _tiles(slots: int, part: int, leaf: Leaf) -> tuple[int, int]:
    """How often S tiles in a row are met in a run, and the programs of each time."""
    tiles = _gpu_noise.tiles_of_run(leaf)
    # Of every S tiles that have all phases; the first of them may begin before the run.
    groups = -(-(tiles + (0 if leaf.whole else slots - 1)) // slots)
    return groups, TILE // part + (-(-tiles // groups) if slots > 1 else 0)


def _recurrence(
    slots: int, leaf: Leaf, stream: str, arrays: Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """A launch for one leaf."""
    from jax_privacy_kernels.kernels import correlated_noise_triton

    _, keys, weights, _, grad, runs, ring = arrays
    unit = _jax_triton.divisor(leaf.shard.run)
    part, warps = _part(slots, stream, weights.shape[0], leaf)
    groups, group = _tiles(slots, part, leaf)
    magic, shift = _division_by(group) if slots > 1 else (0, 0)
    out, ring = _jax_triton.call(
        correlated_noise_triton.recurrence,
        arrays,
        [
            keys[0].size * leaf.index,
            leaf.shard.run // unit,
            leaf.shard.size // unit,
            (slots - 1) * (leaf.shard.size // unit),
            groups * group,
            group,
            magic,
            shift,
        ],
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (grad, ring)],
        programs=runs.shape[0] * groups * group,
        warps=warps,
        aliases={len(arrays) - 1: 1},
        **_constants(slots, stream, weights, unit, part),
        WHOLE=leaf.whole,
    )
    return out, ring


def _recurrences(
    slots: int,
    leaves: Sequence[Leaf],
    stream: str,
    shared: Sequence[jax.Array],
    grads: Sequence[jax.Array],
    rings: Sequence[jax.Array],
) -> list[tuple[jax.Array, jax.Array]]:
    """A launch for several leaves that are here as a whole."""
    from jax_privacy_kernels.kernels import correlated_noise_triton

    step, keys, weights, _ = shared
    unit = _jax_triton.divisor(leaves[0].size)
    part, warps = _part(slots, stream, weights.shape[0], leaves[0])
    table = np.zeros((columns.LEAVES, columns.COLUMNS), np.uint32)
    programs = 0
    for row, leaf in zip(table, leaves, strict=False):
        groups, group = _tiles(slots, part, leaf)
        row[columns.BEGIN] = programs
        row[columns.FIRST_KEY] = keys[0].size * leaf.index
        row[columns.UNITS] = leaf.size // unit
        row[columns.FIRST_PHASE] = leaf.first_tile % slots
        row[columns.PROGRAMS] = group
        row[[columns.MAGIC, columns.SHIFT]] = _division_by(group)
        programs += groups * group
    count, missing = len(leaves), columns.LEAVES - len(leaves)
    table[count:, columns.BEGIN] = programs
    # What stands for leaves that are missing is not looked at. A ring that were there twice would
    # be copied.
    nothing = jax.ShapeDtypeStruct((1,), grads[0].dtype), jax.ShapeDtypeStruct((1,), rings[0].dtype)
    arrays = [*shared, jnp.asarray(table.view(np.int32))]
    first_ring = len(arrays) + columns.LEAVES
    results = _jax_triton.call(
        correlated_noise_triton.recurrences,
        [*arrays, *grads, *[grads[0]] * missing, *rings, *[step] * missing],
        [],
        [
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in grads),
            *[nothing[0]] * missing,
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in rings),
            *[nothing[1]] * missing,
        ],
        programs=programs,
        warps=warps,
        aliases={first_ring + i: columns.LEAVES + i for i in range(count)},
        **_constants(slots, stream, weights, unit, part),
    )
    return list(zip(results[:count], results[columns.LEAVES :][:count], strict=True))


def _constants(slots: int, stream: str, weights: jax.Array, unit: int, part: int) -> dict[str, Any]:
    """What is compiled into a kernel."""
    return {
        "UNIT": unit,
        "SLOTS": slots,
        "ROWS": weights.shape[0],
        "WIDTH": weights.shape[1],
        "GROUP": _group(slots, stream),
        "PART": part,
        "TILE": TILE,
        "STREAM": stream,
        "ACCURATE": _jax_triton.accurate(),
    }


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
