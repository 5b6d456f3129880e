"""Every implementation of grid_noise against its definition in rational numbers."""

from __future__ import annotations

import csv
import functools
import importlib.util
import pathlib
import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from support import golden_normal, implementations, sweeps
from support.parts import PARTS, base_of

from jax_privacy_kernels import _grid_bounds
from jax_privacy_kernels.ops import _chacha20, grid_noise, init_grid_noise
from jax_privacy_kernels.ops._chacha20 import Domain
from jax_privacy_kernels.ops._leaves import Leaf
from jax_privacy_kernels.ops.correlated_noise._filters import RecurrenceFilter
from jax_privacy_kernels.ops.grid_noise import IMPLEMENTATIONS, _jax_normal
from jax_privacy_kernels.ops.grid_noise._contract import Inputs
from jax_privacy_kernels.ops.grid_noise._matrices import EXACT_DOUBLES
from jax_privacy_kernels.ops.grid_noise._rounding import Rounding

KEY = jax.random.wrap_key_data(jnp.arange(7, 15, dtype=jnp.uint32), impl=_chacha20.CHACHA20)
SHAPES = {"a": (3, 700), "b": (), "c": (0, 4)}
COEFS = {
    "identity": [1],
    "identity in eighths": [8],
    "two": [16, -5],
    "five": [256, 128, 96, 80, 70],
    "by row": [[8 + t, *(t % 3 - 1 for _ in range(3))] for t in range(9)],
    "negative diagonal": [[(-1) ** t * (3 + t), 2, -1] for t in range(9)],
}

# Coefficients, the scale, whether float64 holds sums, and the dtype of rings.
WIDE = {
    "narrow rings": ([2**12, 2**11, 2**10], 2.0**30, True, jnp.int32),
    "wide rings": ([2**12, 2**11, 2**10], 2.0**41, True, jnp.int64),
    "wide sums": ([[1, -2]] * 8, 2.0**41, False, jnp.int64),
}

TOOL = pathlib.Path(__file__).parents[2] / "tools" / "gaussian_table.py"

implementation = implementations.fixture(IMPLEMENTATIONS)


# -- Samples ----------------------------------------------------------------------------------


def golden(scale):
    """Arrays hi, lo, [4, n] more, and the samples, of a part of the golden table."""
    with golden_normal.PATH.open() as file:
        rows = [row[6:] for row in csv.reader(file) if float.fromhex(row[0]) == scale]
    columns = [np.array([int(x, 16) for x in row[:3]], np.uint64) for row in rows]
    bits, *more = np.stack(columns, axis=1)
    words = [(x >> shift).astype(np.uint32) for x in (bits, *more) for shift in (32, 0)]
    return words[0], words[1], np.stack(words[2:]), [int(row[3]) for row in rows]


@functools.partial(jax.jit, static_argnums=(0, 1))
def sampled(settled, rounding, hi, lo, more):
    if settled:
        return _jax_normal.settle(rounding, (hi, lo), more)
    return _jax_normal.rounded_normal(rounding, (hi, lo), lambda at: more[:, at])


@pytest.mark.each_value
@pytest.mark.parametrize("scale", golden_normal.SCALES)
@pytest.mark.parametrize("settled", [False, True], ids=["as needed", "all bits"])
def test_samples_are_rounded_correctly(scale, settled):
    *words, expected = golden(scale)
    with jax.enable_x64(True):
        samples = sampled(settled, Rounding(scale), *words)
    assert np.asarray(samples).tolist() == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "scale",
    sweeps.cases(golden_normal.SCALES, (min(golden_normal.SCALES), max(golden_normal.SCALES))),
)
def test_many_samples_are_rounded_correctly(scale):
    """10^5 elements in all."""
    rng = np.random.default_rng(0)
    hi, lo, *more = rng.integers(0, 2**32, (6, 20_000), dtype=np.uint32)
    with jax.enable_x64(True):
        samples = np.asarray(sampled(False, Rounding(scale), hi, lo, np.stack(more)))
    bits = hi.astype(np.uint64) << 32 | lo
    further = [
        functools.reduce(lambda x, word: x << 32 | int(word), words, 0)
        for words in zip(*more, strict=True)
    ]
    scales = [scale] * len(further)
    assert all(map(golden_normal.is_right, samples.tolist(), bits.tolist(), further, scales))


@pytest.mark.parametrize("scale", [0.4, 1.0, 3.0])
def test_the_law_of_small_samples(scale):
    """Chi-square against exact probabilities; tests/grid_test.py does it with 10^8."""
    n = 200_000
    bits = np.random.default_rng(5).integers(0, 2**32, (6, n), dtype=np.uint32)
    with jax.enable_x64(True):
        samples = np.asarray(sampled(False, Rounding(scale), bits[0], bits[1], bits[2:]))
    cut = int(4 * scale)
    values = np.arange(-cut, cut + 1)
    law = [mpmath.ncdf((v + 0.5) / scale) - mpmath.ncdf((v - 0.5) / scale) for v in values]
    inside = np.array([float(p) for p in law])
    expected = n * np.append(inside, 1 - inside.sum())
    found = np.array([(samples == v).sum() for v in values])
    found = np.append(found, n - found.sum())
    statistic = ((found - expected) ** 2 / expected).sum()
    degrees = len(expected) - 1
    assert abs(statistic - degrees) < 5 * np.sqrt(2 * degrees)


@pytest.mark.parametrize("largest", [1.0, 0.0035, 2.0**-23])
def test_estimates_are_within_their_bounds(largest):
    """V from all of its range, and near 1, where z is near 0."""
    rng = np.random.default_rng(1)
    some = largest * np.concatenate([rng.uniform(size=200), 1 - 2.0 ** -rng.uniform(1, 40, 50)])
    v = np.clip(some, 2.0**-62, 1 - 2.0**-52)
    with jax.enable_x64(True):
        of = jax.tree.map(np.asarray, _jax_normal._estimate(jnp.asarray(v)))
    for x, z, error in zip(v.tolist(), of.z.tolist(), of.error.tolist(), strict=True):
        with mpmath.workprec(200):
            # P(|N| > z - error) > V > P(|N| > z + error), for the V that was given
            assert mpmath.erfc((z - mpmath.mpf(error)) / mpmath.sqrt(2)) > x
            assert x > mpmath.erfc((z + mpmath.mpf(error)) / mpmath.sqrt(2))


@pytest.mark.nightly
def test_tables_are_those_of_the_tool():
    spec = importlib.util.spec_from_file_location("gaussian_table", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    for path, text in tool.tables().items():
        assert numbers_of(path.read_text()) == numbers_of(text)


def numbers_of(text):
    """The numbers in a table, however its lines are broken."""
    words = re.findall(r"-?0x[\da-f.]+p[+-]?\d+|-?\d+\.\d+(?:e[+-]?\d+)?", text)
    return [float.fromhex(w) if "0x" in w else float(w) for w in words]


# -- Steps ------------------------------------------------------------------------------------


def matrix_of(name, scale=1000.0):
    return _grid_bounds.recurrence(np.array(COEFS[name], np.int32), scale)


def gradients(dtype, shapes=SHAPES):
    rng = np.random.default_rng(3)
    return {k: jnp.asarray(rng.integers(-1000, 1000, shape), dtype) for k, shape in shapes.items()}


def samples_of(key, steps, leaves, sizes, rounding):
    """[leaf][step] -> the samples of all elements, by the plain layout of bits."""
    step_keys = []
    for _ in range(steps):
        key, subkey = jax.random.split(key)
        step_keys.append(jax.random.split(subkey, leaves))
    with jax.enable_x64(True):
        return [
            [
                samples_of_leaf(jax.random.key_data(keys[leaf]), size, rounding).tolist()
                for keys in step_keys
            ]
            for leaf, size in enumerate(sizes)
        ]


@functools.partial(jax.jit, static_argnums=(1, 2))
def samples_of_leaf(key, size, rounding):
    if size == 0:
        return jnp.zeros(0, jnp.int64)
    bits = _chacha20.bits(key, Domain.GRID, 64, size)
    index = jnp.arange(size, dtype=jnp.uint32)

    def more(at):
        number = jnp.zeros_like(index[at]), index[at]
        return jnp.stack(_chacha20.blocks(key, Domain.GRID_EXTENSION, number)[:4])

    words = (bits >> 32).astype(jnp.uint32), bits.astype(jnp.uint32)
    return _jax_normal.rounded_normal(rounding, words, more)


def terms(samples, coef):
    """x_t of one element, in rational numbers."""
    found = []
    for t, n in enumerate(samples):
        row = coef[min(t, len(coef) - 1)] if isinstance(coef[0], list) else coef
        past = sum(c * x for c, x in zip(row[1:], found[::-1], strict=False))
        found.append((Fraction(n - past, row[0]) + Fraction(1, 2)).__floor__())
    return found


def definition(matrix, coef, grads, steps):
    """[step] -> what every leaf is, as lists."""
    flat = {k: np.asarray(g).reshape(-1).tolist() for k, g in grads.items()}
    sizes = [len(g) for g in flat.values()]
    samples = samples_of(KEY, steps, len(sizes), sizes, matrix.rounding)
    by_leaf = [
        [terms([of_step[i] for of_step in of_leaf], coef) for i in range(size)]
        for of_leaf, size in zip(samples, sizes, strict=True)
    ]
    return [
        {
            k: [g + x[t] for g, x in zip(grad, by_leaf[leaf], strict=True)]
            for leaf, (k, grad) in enumerate(flat.items())
        }
        for t in range(steps)
    ]


def run(matrix, grads, steps, implementation):
    step = jax.jit(functools.partial(grid_noise, matrix=matrix, implementation=implementation))
    state, outs = init_grid_noise(grads, matrix, key=KEY), []
    for _ in range(steps):
        out, state = step(grads, state)
        outs.append(out)
    return outs, state


class TestImplementation:
    """What holds for every implementation."""

    @pytest.mark.parametrize(
        "name", sweeps.cases(list(COEFS), ["identity in eighths", "negative diagonal"])
    )
    def test_definition(self, implementation, name):
        matrix, grads = matrix_of(name), gradients(jnp.int32)
        outs, _ = run(matrix, grads, 9, implementation)
        for out, expected in zip(outs, definition(matrix, COEFS[name], grads, 9), strict=True):
            for k, x in out.items():
                assert x.dtype == jnp.int32
                assert x.shape == SHAPES[k]
                assert np.asarray(x).reshape(-1).tolist() == expected[k]

    @pytest.mark.each_value
    @pytest.mark.parametrize("kind", WIDE)
    def test_wide_integers(self, implementation, kind):
        """Rings of int64, and sums beyond what float64 holds."""
        coef, scale, in_doubles, ring = WIDE[kind]
        with jax.enable_x64(True):
            matrix = _grid_bounds.recurrence(np.array(coef, np.int32), scale)
            assert matrix.in_doubles == in_doubles == (matrix.largest_sum < EXACT_DOUBLES)
            grads = gradients(jnp.int64, {"a": (300,)})
            outs, state = run(matrix, grads, 5, implementation)
            assert state.inner["a"].dtype == ring
            for out, expected in zip(outs, definition(matrix, coef, grads, 5), strict=True):
                assert np.asarray(out["a"]).tolist() == expected["a"]

    def test_settled_samples(self, implementation):
        """At the largest scale, one sample in a hundred takes more bits."""
        with jax.enable_x64(True):
            matrix = _grid_bounds.recurrence(np.array([1], np.int32), 2.0**42)
            grads = gradients(jnp.int64, {"a": (2000,)})
            outs, _ = run(matrix, grads, 1, implementation)
            assert np.asarray(outs[0]["a"]).tolist() == definition(matrix, [1], grads, 1)[0]["a"]

    @pytest.mark.slow
    def test_shards(self, implementation):
        """Parts of leaves from anywhere in them, over the ends of words."""
        if implementation == "jax":
            pytest.skip("the others are compared with it")
        actual = on_parts(implementation)
        expected = on_parts("jax")
        for a, b in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(a, b)


def on_parts(implementation):
    coef, filter = jnp.array([[4, 2, 1, -1]], jnp.int32), RecurrenceFilter(True, 3)
    word = jnp.dtype(jnp.int32)
    leaves, first_tile = [], 0
    for i, part in enumerate(PARTS):
        leaf = Leaf(f"{i}", i, len(PARTS), (part.size,), first_tile, word, word, part.shard)
        leaves.append(leaf)
        first_tile += -(-part.size // 1024)
    keys = jax.random.split(KEY, 3)
    rings = [jnp.zeros((3, leaf.shard.size), jnp.int32) for leaf in leaves]
    grads = [jnp.ones(leaf.shard.size, jnp.int32) for leaf in leaves]
    outs = []
    for t in (0, 1, 2, 5):
        step = jnp.int32(t)
        inputs = Inputs(
            tuple(leaves),
            base_of(PARTS),
            grads,
            rings,
            filter,
            Rounding(100.0),
            True,
            step,
            keys,
            coef,
        )
        results = jax.jit(IMPLEMENTATIONS[implementation].run)(inputs)
        rings = results.rings
        outs += [*results.outs, *rings]
    return outs


@pytest.mark.parametrize("name", ["five", "by row"])
def test_x_solves_the_system_up_to_rounding(name):
    """C x is within half of the diagonal of the rounded samples, in rational numbers."""
    matrix, grads = matrix_of(name), gradients(jnp.int32, {"a": (40,)})
    zeros = jax.tree.map(jnp.zeros_like, grads)
    outs, _ = run(matrix, zeros, 9, None)
    x = np.stack([np.asarray(out["a"]) for out in outs]).tolist()
    (samples,) = samples_of(KEY, 9, 1, [40], matrix.rounding)
    for t in range(9):
        row = COEFS[name][t] if name == "by row" else COEFS[name]
        for i in range(40):
            left = sum(c * x[t - lag][i] for lag, c in enumerate(row) if lag <= t)
            assert abs(Fraction(left - samples[t][i], row[0])) <= Fraction(1, 2)


@pytest.mark.parametrize("name", ["five", "by row", "negative diagonal"])
def test_what_is_released_is_made_of_the_gaussian_mechanism(name):
    """The claim of docs/security.md: by C G + z alone, with G chosen after what was released."""
    matrix, zeros = matrix_of(name), {"a": jnp.zeros(40, jnp.int32)}
    state = init_grid_noise(zeros, matrix, key=KEY)
    step = jax.jit(functools.partial(grid_noise, matrix=matrix, implementation=None))
    (samples,) = samples_of(KEY, 9, 1, [40], matrix.rounding)
    grads, outs = [], []
    for t in range(9):
        grads.append([(31 * x + t) % 2001 - 1000 for x in (outs[-1] if outs else range(40))])
        out, state = step({"a": jnp.array(grads[-1], jnp.int32)}, state)
        outs.append(np.asarray(out["a"]).tolist())
        row = COEFS[name] if name == "five" else COEFS[name][t]
        for i in range(40):
            lags = [(lag, c) for lag, c in enumerate(row) if lag <= t]
            mechanism = sum(c * grads[t - lag][i] for lag, c in lags) + samples[t][i]
            before = sum(c * outs[t - lag][i] for lag, c in lags if lag)
            assert outs[t][i] == (Fraction(mechanism - before, row[0]) + Fraction(1, 2)).__floor__()
