"""Every implementation of correlated_noise against its definition and against the JAX one.

Tolerances. A float32 sample may differ from jax.random.normal's by 2e-6 max(1, |z|), a float64
one by 1e-13 max(1, |z|): both are of the order of how far erf_inv itself is off. A 16-bit sample is
the same to one unit in the last place, as compilers may keep more digits on the way to it. The
recurrence magnifies errors of z by at most the L1 norm of a row of C^-1 (`naive.gain`), and rounds:
a sum of b terms errs by about sqrt(b) eps. Outputs are rounded once more, to their own dtype: one
unit in the last place.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import golden_schedule, implementations, naive, sweeps
from support.parts import PARTS, Part, base_of, leaves_of

from jax_privacy_kernels import random
from jax_privacy_kernels.matrix_factorization import toeplitz
from jax_privacy_kernels.ops import (
    BandedRecurrence,
    BufferedToeplitz,
    MovingAverage,
    _leaves,
    correlated_noise,
    init_correlated_noise,
)
from jax_privacy_kernels.ops._shards import Shard
from jax_privacy_kernels.ops.correlated_noise import IMPLEMENTATIONS
from jax_privacy_kernels.ops.correlated_noise._contract import Inputs
from jax_privacy_kernels.ops.correlated_noise._filters import (
    BufferedFilter,
    InverseBufferedFilter,
    MovingAverageFilter,
    RecurrenceFilter,
)

SAMPLE_RTOL = {"float16": 2**-10, "bfloat16": 2**-7, "float32": 2e-6, "float64": 1e-13}
TARGET = "jpk_correlated_noise"
PALLAS_CALL = implementations.CUDA_CALLS["pallas"]


@dataclasses.dataclass(frozen=True)
class Case:
    shapes: tuple[tuple[int, ...], ...]
    grad_dtypes: tuple[str, ...]
    coef: tuple = (1.0,)  # or rows of them; of buffers the decays and the scales
    filter: str = "recurrence"
    look_ahead: int = 0  # the slots, of any other filter than recurrences
    coef_dtype: str = "float32"
    noise_dtype: str | None = None
    row_scale: tuple[float, ...] | None = None
    stddev: float = 2.0
    steps: int = 3
    seed: int = 0
    key_impl: Any = "threefry2x32"

    @property
    def ahead(self):
        """The filter that looks ahead."""
        return self.matrix.filter(True)

    @property
    def slots(self):
        return self.ahead.slots

    @property
    def noise_dtypes(self):
        return [self.noise_dtype or dtype for dtype in self.grad_dtypes]

    @property
    def x64(self):
        return "float64" in (*self.grad_dtypes, self.noise_dtype, self.coef_dtype)

    @property
    def key(self):
        if self.key_impl == random.chacha20:  # which warns of seeds
            return random.secure_key(self.seed.to_bytes(32, "little"))
        return jax.random.key(self.seed, impl=self.key_impl)

    @functools.cached_property
    def matrix(self):
        scale = self.row_scale
        scale = None if scale is None else jnp.asarray(scale, self.coef_dtype)
        coef = jnp.asarray(self.coef, self.coef_dtype)
        if self.filter == "recurrence":
            return BandedRecurrence(coef, scale)
        if self.filter == "moving_average":
            return MovingAverage(coef, self.look_ahead, scale)
        return BufferedToeplitz(*coef, self.filter == "inverse_buffers", self.look_ahead, scale)

    def apply(self, z):
        """x, and what the rows before the slots hold before every step."""
        coef = np.asarray(jnp.asarray(self.coef, self.coef_dtype), np.float64)
        nothing = np.zeros((len(z) + 1, 0, *z.shape[1:]))
        if self.filter == "recurrence":
            return naive.solve(coef, z), nothing
        if self.filter == "moving_average":
            return naive.moving_average(coef, z), nothing
        return naive.buffers(*coef, self.filter == "inverse_buffers", z)

    @functools.cached_property
    def grads(self):
        """All steps' gradients, ``[steps, *shape]`` each."""
        rng = np.random.default_rng(self.seed)
        return [
            jnp.asarray(rng.standard_normal((self.steps, *shape)), dtype)
            for shape, dtype in zip(self.shapes, self.grad_dtypes, strict=True)
        ]

    def grads_at(self, t):
        return [grad[t] for grad in self.grads]

    @property
    def structs(self):
        return [jax.ShapeDtypeStruct(g.shape[1:], g.dtype) for g in self.grads]

    def init(self):
        return init_correlated_noise(
            self.structs,
            self.matrix,
            key=self.key,
            stddev=self.stddev,
            dtype=self.noise_dtype,
        )

    def update(self, implementation):
        def update(grads, state):
            return correlated_noise(
                grads,
                state,
                self.matrix,
                stddev=self.stddev,
                key_impl=jax.random.key_impl(self.key),
                dtype=self.noise_dtype,
                implementation=implementation,
            )

        return update

    def run(self, implementation):
        """Outputs of all steps, ``[steps, *shape]`` each, and the state after them."""
        update = self.update(implementation)

        @functools.partial(jax.jit, donate_argnums=0)
        def scan(state, grads):
            return jax.lax.scan(
                lambda state, grads: update(grads, state)[::-1], state, grads, length=self.steps
            )

        state, outs = scan(self.init(), self.grads)
        return outs, state

    # What implementations are compared with is slow to find out, and found once for all of them.

    @functools.cached_property
    def expected(self):
        return Expected(self)

    @functools.cached_property
    def by_oracle(self):
        """From a platform to what the JAX implementation gives there, as NumPy arrays."""
        return functools.cache(lambda platform: jax.tree.map(np.asarray, self.run("jax")))


@dataclasses.dataclass
class Expected:
    """What the definition says of a case; x goes S steps beyond the case's."""

    case: Case
    ahead: bool = True

    def __post_init__(self):
        case = self.case
        self.filter = case.matrix.filter(self.ahead)
        self.horizon = case.steps + self.filter.slots
        z = naive.independent(case.key, case.shapes, case.noise_dtypes, self.horizon)
        applied = [case.apply(leaf) for leaf in z]
        self.x, self.buffers = [list(each) for each in zip(*applied, strict=True)] or ([], [])
        of_x, of_buffers = case.apply(np.eye(self.horizon))
        gain = max(naive.gain(of_x), naive.gain(of_buffers))
        terms = np.asarray(case.coef).size
        self.tolerance = []
        for leaf, dtype in zip(z, case.noise_dtypes, strict=True):
            eps = float(jnp.finfo(jnp.promote_types(dtype, case.coef_dtype)).eps)
            relative = SAMPLE_RTOL[dtype] + 4 * math.sqrt(terms) * eps
            largest = max(np.abs(leaf).max(initial=0), 1)
            self.tolerance.append(gain * largest * relative)

    def check_outputs(self, outs, steps=slice(None)):
        """``outs`` are those of ``steps``."""
        case = self.case
        scale = case.stddev
        if case.row_scale is not None:
            scale *= np.nanmax(np.abs(case.row_scale))
        for i, out in enumerate(outs):
            assert out.dtype == case.grad_dtypes[i]
            x = naive.scaled(case.matrix.row_scale, case.stddev, self.x[i])[: case.steps]
            expected = np.asarray(case.grads[i]).astype(np.float64) + x
            np.testing.assert_allclose(
                np.asarray(out).astype(np.float64),
                expected[steps],
                rtol=float(jnp.finfo(out.dtype).eps),
                atol=scale * self.tolerance[i],
                err_msg=f"leaf {i}",
            )

    def check_state(self, state, step=None):
        """The state before ``step``: rings as the schedule says, and keys exactly."""
        case = self.case
        step = case.steps if step is None else step
        assert (state.inner == ()) == (self.filter.rows == 0)
        for i, actual in enumerate(state.inner):
            first_tile = naive.first_tiles(case.shapes)[i]
            assert actual.dtype == jnp.promote_types(case.noise_dtypes[i], case.coef_dtype)
            np.testing.assert_allclose(
                np.asarray(actual).astype(np.float64),
                naive.ring(
                    self.x[i],
                    self.filter.slots,
                    first_tile,
                    step,
                    ahead=self.ahead,
                    buffers=self.buffers[i],
                ),
                rtol=0,
                atol=self.tolerance[i],
                err_msg=f"ring of leaf {i} before step {step}",
            )
        assert state.clock.step == step
        ahead = self.filter.steps if self.ahead else 0
        after, of_step = naive.step_keys(case.key, step + max(ahead, 1))
        key = case.key if step + ahead == 0 else after[step + ahead - 1]
        np.testing.assert_array_equal(state.clock.keys[-1], key)
        window = range(step - self.filter.behind, step + ahead)
        zero = np.zeros_like(of_step[0])
        known = [of_step[tau] if tau >= 0 else zero for tau in window]
        np.testing.assert_array_equal(state.clock.keys[:-1], np.reshape(known, (-1, zero.size)))


def not_for(case, implementation):
    """Why a case is left to another implementation, as only kernels for GPUs do, or None."""
    if implementation not in implementations.INTERPRETERS:
        return None
    with jax.enable_x64(case.x64):
        filter = case.ahead
        for leaf in _leaves.plan(case.structs, case.matrix.dtype, case.noise_dtype):
            if reason := IMPLEMENTATIONS[implementation].refuse(leaf, filter, str(case.key_impl)):
                return reason
    return None


def check(case, implementation):
    if reason := not_for(case, implementation):
        pytest.skip(reason)
    with jax.enable_x64(case.x64):
        oracle_outs, oracle_state = case.by_oracle(jax.config.jax_default_device.platform)
        case.expected.check_outputs(oracle_outs)
        case.expected.check_state(oracle_state)
        if implementation == "jax":
            return
        outs, state = case.run(implementation)
        case.expected.check_outputs(outs)
        case.expected.check_state(state)
        jax.tree.map(np.testing.assert_array_equal, state.clock, oracle_state.clock)
        for actual, oracle, tolerance in zip(
            state.inner, oracle_state.inner, case.expected.tolerance, strict=bool(state.inner)
        ):
            np.testing.assert_allclose(actual, oracle, rtol=0, atol=tolerance)


# -- Cases ------------------------------------------------------------------------------------


def stable_coefs(bands, c_0, weight, seed):
    """c_0 and a tail of any signs with sum |c_l| = weight c_0."""
    tail = np.random.default_rng(seed).standard_normal(bands - 1)
    return (c_0, *(weight * c_0 * tail / max(np.abs(tail).sum(), 1e-9)))


def rows_of_coefs(rows, bands):
    coef = np.tril(np.full((rows, bands), 0.04))
    coef[:, 0] = np.linspace(0.5, 2, rows)
    return tuple(map(tuple, coef.tolist()))


def optimal_coefs(bands):
    return tuple(np.asarray(toeplitz.optimal_max_error_strategy_coefs(bands), np.float64).tolist())


f32 = ("float32",)
CORNERS = {
    "no history": Case(((1025,), (), (3, 5)), f32 * 3, coef=(0.5,), steps=4),
    "one slot": Case(((2049,), (0,), (1,)), f32 * 3, coef=(2.0, 1.5), steps=6),
    "empty tree": Case((), (), coef=(1.0, 0.5), steps=4),
    "only empty leaves": Case(((0,), (3, 0)), f32 * 2, coef=(1.0, 0.5), steps=4),
    "phases shifted by leaves before": Case(
        ((1024,), (0,), (1025,), (1,), (3 * 1024 + 1,), (5 * 1024 - 1,)),
        f32 * 6,
        coef=stable_coefs(4, 0.7, 0.9, 1),
        steps=10,
    ),
    "S tiles and one element more": Case(
        ((7 * 1024 + 1,), (7, 1024), (7 * 1024 - 1,)), f32 * 3, coef=optimal_coefs(8), steps=24
    ),
    "rows without noise": Case(
        ((1500,), (30, 3)), f32 * 2, coef=(1.0, 0.5), row_scale=(2.0, 0.0, -0.5, -0.0), steps=6
    ),
    "more steps than rows": Case(
        ((1500,), (30, 3)),
        f32 * 2,
        coef=optimal_coefs(5),
        row_scale=(2.0, 1.0, -0.5, 0.25),
        steps=15,
    ),
    "wide band": Case(((69 * 1024 + 1,),), f32, coef=optimal_coefs(70), steps=75),
    "wide band, 3 b steps": Case(
        ((7,), (3000,)), f32 * 2, coef=stable_coefs(70, 1.3, 0.8, 2), steps=210
    ),
    "16-bit gradients, float32 noise": Case(
        ((1030,), (2100,), (5, 2)),
        ("float16", "bfloat16", "float32"),
        noise_dtype="float32",
        coef=optimal_coefs(4),
        row_scale=(0.3, 3.0),
        steps=9,
    ),
    "coefficients by row, fewer rows than steps": Case(
        ((3 * 1024 + 5,), (1000,), (2, 1024)),
        f32 * 3,
        coef=((1.0, 0.0, 0.0), (0.8, 0.4, 0.0), (1.1, -0.3, 0.5), (0.9, 0.2, 0.3), (1.3, 0.1, 0.6)),
        row_scale=(1.0, 2.0, 0.5, 1.5, math.nan),
        steps=5,
    ),
    "coefficients by row, one band": Case(
        ((1500,), ()), f32 * 2, coef=((1.0,), (0.5,), (2.0,)), steps=5
    ),
    "coefficients by row, two bands": Case(
        ((2500,), ()), f32 * 2, coef=((1.0, 0.0), (0.5, 0.3), (2.0, 1.0)), steps=7
    ),
    "moving average without state": Case(
        ((2100,), (3, 5), (0,)), f32 * 3, (1.0, -0.6, -0.2), "moving_average", steps=6
    ),
    "moving average of one sample": Case(((1030,),), f32, (0.5,), "moving_average", 3, steps=7),
    "moving average, one slot": Case(((2100,),), f32, (1.0, -0.5), "moving_average", 1, steps=5),
    "moving average, fewer slots than samples": Case(
        ((5 * 1024 + 1,), (7,), (3 * 1024,)),
        f32 * 3,
        (0.9, -0.5, -0.1, 0.05, -0.1, 0.2, -0.3),
        "moving_average",
        3,
        steps=20,
    ),
    "moving average, more slots than samples": Case(
        ((9 * 1024 - 1,), (30, 5)),
        ("float32", "float16"),
        (1.0, -0.5, -0.25),
        "moving_average",
        8,
        noise_dtype="float32",
        row_scale=(2.0, 1.0),
        steps=20,
    ),
    "moving average in float64": Case(
        ((1025,), (7,)),
        ("float64", "float32"),
        (1.0, -0.5, -0.25, -0.1),
        "moving_average",
        0,
        coef_dtype="float64",
        noise_dtype="float32",
        steps=6,
    ),
    "buffers": Case(
        ((2100,), (0,), (4, 5)),
        f32 * 3,
        ((0.9, 0.5, 0.1), (0.3, 0.1, 0.4)),
        "buffers",
        steps=7,
    ),
    "buffers of an inverse": Case(
        ((2100,), (0,), (4, 5)),
        ("float32", "float32", "bfloat16"),
        ((0.95, 0.4), (0.3, 0.1)),
        "inverse_buffers",
        noise_dtype="float32",
        row_scale=(0.5, 3.0),
        steps=7,
    ),
    "buffers, looking ahead": Case(
        ((5 * 1024 + 1,), (7,), (3 * 1024,)),
        f32 * 3,
        ((0.9, 0.5, 0.1), (0.3, 0.1, 0.4)),
        "buffers",
        4,
        steps=15,
    ),
    "buffers of an inverse, looking ahead": Case(
        ((7 * 1024 - 1,), (1030,)), f32 * 2, ((0.999,), (0.6,)), "inverse_buffers", 3, steps=13
    ),
    "buffers, one slot": Case(((1030,),), f32, ((0.7,), (0.6,)), "inverse_buffers", 1, steps=4),
    "buffers in float64": Case(
        ((2100,), (4, 5)),
        ("float64",) * 2,
        ((0.95, 0.4), (0.3, 0.1)),
        "inverse_buffers",
        2,
        coef_dtype="float64",
        steps=7,
    ),
    "float64": Case(
        ((1025,), (2, 1500)),
        ("float64",) * 2,
        coef=optimal_coefs(6),
        coef_dtype="float64",
        steps=15,
    ),
    "float64 noise and float32 coefficients": Case(
        ((1025,), (17,), (900,), (3,)),
        ("float64", "float32", "float16", "bfloat16"),
        noise_dtype="float64",
        coef=(1.0, 0.3, -0.2),
        row_scale=(1.0, 2.0),
        steps=7,
    ),
    "float32 noise and float64 coefficients": Case(
        ((1025,), (17,), (900,)),
        ("float64", "float32", "bfloat16"),
        noise_dtype="float32",
        coef=(1.0, 0.3, -0.2),
        coef_dtype="float64",
        steps=7,
    ),
    "float64 and float32 leaves": Case(
        ((1025,), (2000,), (0,)), ("float64", "float32", "float64"), coef=(1.0, 0.7), steps=5
    ),
    "two groups of terms and a rest": Case(((3000,),), f32, coef=optimal_coefs(20), steps=40),
    "two groups of terms and a rest, by row": Case(
        ((1030,),), f32, coef=rows_of_coefs(25, 20), steps=27
    ),
}
# Every filter, with and without slots, and every kind of leaf, of row and of dtype.
FEW_CORNERS = (
    "no history",
    "one slot",
    "empty tree",
    "only empty leaves",
    "rows without noise",
    "16-bit gradients, float32 noise",
    "coefficients by row, two bands",
    "moving average without state",
    "moving average, fewer slots than samples",
    "moving average in float64",
    "buffers of an inverse",
    "buffers, looking ahead",
    "float64",
    "float32 noise and float64 coefficients",
    "two groups of terms and a rest",
)
# What the interpreters of kernels can do in seconds.
INTERPRETED_CORNERS = [
    CORNERS[name]
    for name in (
        "no history",
        "one slot",
        "empty tree",
        "only empty leaves",
        "phases shifted by leaves before",
        "more steps than rows",
        "two groups of terms and a rest",
        "two groups of terms and a rest, by row",
        "16-bit gradients, float32 noise",
        "coefficients by row, fewer rows than steps",
        "coefficients by row, one band",
        "coefficients by row, two bands",
        "moving average without state",
        "moving average in float64",
        "moving average, fewer slots than samples",
        "buffers of an inverse",
        "buffers, looking ahead",
        "float64",
        "float32 noise and float64 coefficients",
    )
]


def cases(noise_dtypes, small=False):
    @st.composite
    def draw_case(draw):
        bands = draw(st.one_of(st.integers(1, 9), st.integers(1, 19 if small else 70)))
        slots = bands - 1
        tiles = st.one_of(st.integers(0, 6), st.just(min(slots, 6 if small else 20)))
        size = st.one_of(
            st.integers(0, 5),
            st.builds(lambda q, d: max(q * 1024 + d, 0), tiles, st.integers(-1, 1)),
            st.integers(0, 8000),
        )
        sizes = draw(st.lists(size, min_size=1, max_size=2 if small else 4))
        split = st.sampled_from([1, 2, 3, 7])
        shapes = tuple((n,) if n % (rows := draw(split)) else (rows, n // rows) for n in sizes)
        x64 = draw(st.booleans())
        width = [d for d in ("float16", "bfloat16", "float32", "float64") if x64 or d != "float64"]
        noise = [d for d in noise_dtypes if d in width]
        noise_dtype = draw(st.sampled_from([None, *noise]))
        grad_dtype = st.sampled_from(width if noise_dtype else noise)
        coef = st.one_of(
            st.just(optimal_coefs(bands)),
            st.builds(
                functools.partial(stable_coefs, bands),
                st.floats(0.5, 2),
                st.floats(0, 0.95),
                st.integers(0, 99),
            ),
        )
        of_a_row = st.floats(-2, 2, width=32).filter(lambda s: s == 0 or abs(s) > 1e-30)
        scale = st.lists(of_a_row, min_size=1, max_size=8).map(tuple)
        name = draw(
            st.sampled_from(
                ["recurrence", "by row", "moving_average", "buffers", "inverse_buffers"]
            )
        )
        if name == "by row":
            rows = [draw(coef) for _ in range(draw(st.integers(2, 5)))]
            coef = st.just(tuple(c[:t] + (0.0,) * len(c[t:]) for t, c in enumerate(rows, 1)))
        elif "buffers" in name:
            buffers = draw(st.integers(1, 5))
            decay = np.linspace(0.9, 0.1, buffers)
            coef = st.just((tuple(decay), tuple(0.5 * (1 - decay))))
        return Case(
            shapes,
            tuple(draw(grad_dtype) for _ in shapes),
            coef=draw(coef),
            filter="recurrence" if name == "by row" else name,
            look_ahead=draw(st.integers(0, 12)),
            coef_dtype=draw(st.sampled_from(["float32", "float64"])) if x64 else "float32",
            noise_dtype=noise_dtype,
            row_scale=draw(st.none() | scale),
            stddev=draw(st.sampled_from([0.0, 0.125, 1.0, 4.0])),
            steps=draw(st.integers(1, 3 * bands)),
            seed=draw(st.integers(0, 2**31 - 1)),
        )

    return draw_case()


def takes(implementation):
    """Noise dtypes that an implementation samples."""
    refuse = IMPLEMENTATIONS[implementation].refuse
    filter = RecurrenceFilter(ahead=True, slots=0)
    with jax.enable_x64(True):
        leaves = {d: _leaves.plan(jnp.zeros(1, d), d, None)[0] for d in SAMPLE_RTOL}
    return [d for d, leaf in leaves.items() if refuse(leaf, filter, "threefry2x32") is None]


implementation = implementations.fixture(IMPLEMENTATIONS)


is_interpreted = functools.partial(implementations.is_interpreted, IMPLEMENTATIONS)
is_slow = functools.partial(implementations.is_slow, IMPLEMENTATIONS)


@pytest.fixture
def compiled(implementation):
    if implementation == "jax" or is_interpreted(implementation):
        pytest.skip("what XLA makes of plain JAX, or of an interpreter, is its own business")
    return implementation


def trees_allclose(actual, expected, rtol=0.0, atol=0.0):
    def close(a, b):
        assert a.dtype == b.dtype
        a, b = (np.asarray(v).astype(np.float64) for v in (a, b))
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)

    jax.tree.map(close, actual, expected)


SMALL = Case(((2500,), (3, 5), (0,)), f32 * 3, coef=(1.0, 0.4, -0.2, 0.1), steps=10)
FILTERS = {
    "recurrence": SMALL,
    "by row": dataclasses.replace(
        SMALL, coef=((1.0, 0.0, 0.0, 0.0), (0.9, 0.3, 0.0, 0.0), (1.1, 0.2, -0.3, 0.1))
    ),
    "moving average": dataclasses.replace(SMALL, filter="moving_average", look_ahead=3),
    "moving average without state": dataclasses.replace(SMALL, filter="moving_average"),
    "buffers": dataclasses.replace(
        SMALL, filter="inverse_buffers", coef=((0.9, 0.3), (0.2, 0.4)), look_ahead=3
    ),
    "buffers without slots": dataclasses.replace(
        SMALL, filter="buffers", coef=((0.9, 0.3), (0.2, 0.4))
    ),
}


INTERPRETED_FILTERS = ("recurrence", "buffers")

# One leaf each: plain JAX takes a second for every array of ChaCha20 that it compiles.
CHACHA20 = {
    name: dataclasses.replace(
        case, shapes=((5 * 1024 + 3,),), grad_dtypes=case.grad_dtypes[:1], key_impl=random.chacha20
    )
    for name, case in {
        **FILTERS,
        "no history": CORNERS["no history"],
        "float64": CORNERS["float64"],
        "float32 noise, float64 rings": CORNERS["moving average in float64"],
    }.items()
}


SHARDED = {
    **{
        f"{slots} slots": (RecurrenceFilter(True, slots), [(1.0, *[0.1] * slots)])
        for slots in (0, 1, 4, 7)
    },
    "moving average": (MovingAverageFilter(True, 3, 2), [(-0.5, 1.0)]),
    "buffers": (BufferedFilter(True, 0, 1), [(0.9,), (0.3,)]),
    "buffers, looking ahead": (InverseBufferedFilter(True, 3, 1), [(0.9,), (0.3,)]),
}
CHACHA20_KEY = random.secure_key(bytes(range(32)))
SHARDED_OF_KEYS = {
    **{name: (SMALL.key, *case) for name, case in SHARDED.items()},
    **{f"{name}, chacha20": (CHACHA20_KEY, *SHARDED[name]) for name in ("0 slots", "4 slots")},
}
FEW_SHARDED = (
    "0 slots",
    "4 slots",
    "4 slots, chacha20",
    "moving average",
    "buffers, looking ahead",
)


def step_on_parts(implementation, filter, coef):
    """(step, keys, rings) -> (outs, rings), and the rings before the first step."""
    leaves = leaves_of(PARTS)
    grads = [jnp.ones(leaf.shard.size) for leaf in leaves]

    def step(t, keys, rings):
        inputs = Inputs(
            leaves=leaves,
            base=base_of(PARTS),
            grads=grads,
            rings=rings,
            filter=filter,
            step=t,
            keys=keys,
            coef=jnp.array(coef),
            stddevs=None,
            scale=jnp.array(2.0),
        )
        return tuple(IMPLEMENTATIONS[implementation].run(inputs))

    rings = [jnp.zeros((filter.rows, grad.size)) for grad in grads if filter.rows]
    return step, rings


def run_on_parts(implementation, filter, coef, key=None):
    """Outputs and rings of all steps of a cycle, and of one more."""
    key = SMALL.key if key is None else key
    step, rings = step_on_parts(implementation, filter, coef)
    step, results = jax.jit(step), []
    for t in range(filter.steps + 1):
        window = t + np.arange(filter.behind + filter.steps)
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(window)
        results.append(step(jnp.int32(t), keys, rings))
        rings = results[-1][1]
    return results


@pytest.fixture(params=FILTERS)
def small(request, implementation):
    if is_interpreted(implementation) and request.param not in INTERPRETED_FILTERS:
        pytest.skip("too much for an interpreter; the corners have it too")
    if reason := not_for(FILTERS[request.param], implementation):
        pytest.skip(reason)
    return FILTERS[request.param]


class TestImplementation:
    """What holds for every implementation."""

    @pytest.mark.parametrize(
        "case",
        sweeps.cases(
            CHACHA20, ("recurrence", "by row", "moving average", "buffers", "float64", "no history")
        ),
    )
    def test_chacha20(self, implementation, case):
        if is_slow(implementation):
            case = dataclasses.replace(case, shapes=((1100,),), steps=min(case.steps, 5))
        check(case, implementation)

    @pytest.mark.parametrize("case", sweeps.cases(CORNERS, FEW_CORNERS))
    def test_corner(self, implementation, case):
        if is_interpreted(implementation) and case not in INTERPRETED_CORNERS:
            pytest.skip("too much for an interpreter")
        check(case, implementation)

    @pytest.mark.slow
    def test_sweep(self, implementation):
        interpreted = is_interpreted(implementation)

        def fits(case):
            tiles = sum(-(-math.prod(shape) // 1024) for shape in case.shapes)
            too_long = is_slow(implementation) and case.steps * tiles > 130
            return not too_long and not not_for(case, implementation)

        @sweeps.compiling(4 if interpreted else 10)
        @given(case=cases(takes(implementation), small=interpreted).filter(fits))
        def sweep(case):
            check(case, implementation)

        sweep()

    @pytest.mark.interpreted_nightly
    def test_many_leaves(self, implementation):
        # XLA takes seconds to compile ten leaves of plain JAX, and a minute for 300.
        count = 12 if implementation == "jax" or is_interpreted(implementation) else 300
        shapes = [((), (1030,), (7, 3), (0,))[i % 4] for i in range(count)]
        case = Case(tuple(shapes), f32 * count, coef=(1.0, 0.5, 0.25), steps=5)
        expected = Expected(case)
        outs, state = case.run(implementation)
        expected.check_outputs(outs)
        expected.check_state(state)

    @pytest.mark.interpreted_nightly
    def test_every_slot_holds_the_term_of_the_schedule(self, implementation):
        shapes = ((5 * 1024 + 3,), (1,), (0,), (2048,), (3, 1024))
        case = Case(shapes, f32 * 5, coef=(1.0, 0.5, -0.3, 0.2), steps=11)
        expected = Expected(case)
        update = jax.jit(case.update(implementation))
        state = case.init()
        for t in range(case.steps):
            if t:
                expected.check_state(state, t)
            _, state = update(case.grads_at(t), state)
        expected.check_state(state)

    @pytest.mark.each_value
    @pytest.mark.parametrize("slots", [1, 2, 4])
    @pytest.mark.parametrize("first_tile", [0, 5])
    def test_visits_are_those_of_the_golden_table(self, implementation, slots, first_tile):
        """What a step changes of a ring, tile by tile, is what the table says."""
        tiles = 3 * slots + 2
        before = ((first_tile * 1024,),) if first_tile else ()  # a leaf of so many tiles
        shapes = (*before, (tiles * 1024 - 9,))
        case = Case(shapes, f32 * len(shapes), coef=(1.0, *[0.1] * slots))
        update, state = jax.jit(case.update(implementation)), case.init()
        table = golden_schedule.load()
        for t in range(2 * slots + 2):
            old = state.inner[-1]
            _, state = update([jnp.zeros(shape) for shape in shapes], state)
            changed = jnp.pad(state.inner[-1] != old, ((0, 0), (0, 9)), constant_values=True)
            changed = changed.reshape(slots, tiles, 1024)
            expected = np.zeros((slots, tiles), bool)
            for row in table:
                if (row.slots, row.first_tile, row.step) == (slots, first_tile, t):
                    made = (row.slot + np.arange(row.terms)) % slots
                    expected[made, row.tile] = True
            np.testing.assert_array_equal(changed[..., :1000].all(-1), expected)
            np.testing.assert_array_equal(changed[..., :1000].any(-1), expected)

    @pytest.mark.interpreted_nightly
    @pytest.mark.each_value
    def test_state_continues_in_another_implementation(self, implementation, small):
        slow = is_slow(implementation)
        sizes = ((1100,), (5,)) if slow else ((6000,), (5,))
        case = dataclasses.replace(small, shapes=sizes, grad_dtypes=f32 * 2, steps=13)
        expected = Expected(case)
        others = [
            name
            for name, entry in IMPLEMENTATIONS.items()
            if name != implementation
            and jax.config.jax_default_device.platform in entry.platforms
            and not entry.unavailable()
            and not not_for(case, name)
        ]
        if not others:
            pytest.skip("there is only one implementation here")
        for other in others:
            before, after = (jax.jit(case.update(name)) for name in (implementation, other))
            for switch in (2, 5) if slow else (1, 2, 3, 4, 7):
                state, outs = case.init(), []
                for t in range(case.steps):
                    update = before if t < switch else after
                    out, state = update(case.grads_at(t), state)
                    outs.append(out)
                stacked = [jnp.stack(leaf) for leaf in zip(*outs, strict=True)]
                expected.check_outputs(stacked)
                expected.check_state(state)

    @pytest.mark.interpreted_nightly
    @pytest.mark.each_value
    def test_eager_jit_and_scan_agree(self, implementation, small):
        case = dataclasses.replace(small, steps=5)
        update = case.update(implementation)
        jitted = jax.jit(update)
        outs, last = case.run(implementation)
        eager_state = jit_state = case.init()
        for t in range(case.steps):
            shapes = jax.eval_shape(update, case.grads_at(t), eager_state)
            eager, eager_state = update(case.grads_at(t), eager_state)
            jit, jit_state = jitted(case.grads_at(t), jit_state)
            trees_allclose(eager, jit, atol=1e-5)
            trees_allclose(eager, [out[t] for out in outs], atol=1e-5)
            assert [(s.shape, s.dtype) for s in jax.tree.leaves(shapes)] == [
                (a.shape, a.dtype) for a in jax.tree.leaves((eager, eager_state))
            ]
        trees_allclose(eager_state, last, atol=1e-5)
        trees_allclose(jit_state, last, atol=1e-5)

    @pytest.mark.interpreted_nightly
    @pytest.mark.each_value
    def test_vmap_is_a_loop(self, implementation, small):
        case = dataclasses.replace(small, steps=3)
        update = case.update(implementation)
        batch = [(dataclasses.replace(case, seed=seed).grads_at(0)) for seed in range(3)]
        states = []
        for t in range(3):  # states of different keys and steps
            state = dataclasses.replace(case, seed=t).init()
            for _ in range(t):
                _, state = update(case.grads_at(0), state)
            states.append(state)
        grads, state = (jax.tree.map(lambda *v: jnp.stack(v), *trees) for trees in (batch, states))
        outs, new = jax.jit(jax.vmap(update))(grads, state)
        for i in range(3):
            at = functools.partial(jax.tree.map, lambda v, i=i: v[i])
            trees_allclose(at((outs, new)), update(batch[i], states[i]), atol=1e-5)

    @pytest.mark.interpreted_nightly
    def test_a_state_for_several_gradients_is_refused(self, implementation):
        """They would get the same noise, however the vmap is hidden."""
        update, state = SMALL.update(implementation), SMALL.init()
        grads = [jnp.stack([grad, grad]) for grad in SMALL.grads_at(0)]
        one = [jnp.zeros_like(grad) for grad in SMALL.grads_at(0)]
        for mapped in (
            lambda g: jax.vmap(update, (0, None))(g, state),
            jax.jit(lambda g: jax.vmap(jax.jit(update), (0, None))(g, state)),
            lambda g: jax.vmap(jax.checkpoint(lambda g: update(g, state)[0]))(g),
            lambda g: jax.vmap(jax.grad(lambda g: update(g, state)[0][1].sum()))(g),
            lambda g: jax.vmap(lambda g: jax.lax.cond(True, update, update, g, state))(g),
            lambda g: jax.vmap(
                lambda g: jax.lax.scan(lambda s, _: (update(g, s)[1], 0), state, length=2)
            )(g),
        ):
            with pytest.raises(ValueError, match="same noise"):
                mapped(grads)
        # States of their own are fine, and so is one gradient for several of them.
        states = [dataclasses.replace(SMALL, seed=seed).init() for seed in range(2)]
        states = jax.tree.map(lambda *x: jnp.stack(x), *states)
        outs = jax.vmap(update, (None, 0))(one, states)[0]
        assert not np.array_equal(outs[0][0], outs[0][1])

    @pytest.mark.interpreted_nightly
    def test_gradients_in_another_layout(self, implementation):
        case = Case(((40, 60),), f32, coef=(1.0, 0.5), steps=1)
        grads, state = case.grads_at(0), case.init()
        update = case.update(implementation)
        transposed = jax.jit(lambda g, s: update([g.T], s)[0][0].T)(grads[0].T, state)
        np.testing.assert_allclose(transposed.T, update(grads, state)[0][0], atol=1e-5)

    @pytest.mark.interpreted_nightly
    @pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # that is the point
    def test_extreme_values(self, implementation):
        """Rounding to 16 bits where it is delicate; inf and NaN pass through."""
        values = [0.0, -0.0, 65504.0, -65504.0, 70000.0, 6e-8, np.inf, -np.inf, np.nan]
        for stddev, dtype in ((1e-6, "float16"), (300.0, "float16"), (0.0, "bfloat16")):
            case = Case(((900,),), (dtype,), noise_dtype="float32", stddev=stddev, steps=1)
            grads = [jnp.asarray(np.resize(np.array(values, np.float32), 900), dtype)]
            out, _ = case.update(implementation)(grads, case.init())
            noise = (stddev * Expected(case).x[0][0]).astype(np.float32)
            expected = (np.asarray(grads[0]).astype(np.float32) + noise).astype(dtype)
            info = jnp.finfo(dtype)
            np.testing.assert_allclose(
                np.asarray(out[0]).astype(np.float64),
                expected.astype(np.float64),
                rtol=float(info.eps),
                atol=float(info.smallest_subnormal),
            )

    @pytest.mark.each_value
    def test_donated_state_is_updated_in_place(self, implementation, small):
        if is_interpreted(implementation):
            pytest.skip("interpreters work on copies; what is lowered is tested without them")
        case = dataclasses.replace(small, shapes=((50_000,), (300,)), grad_dtypes=f32 * 2)
        update = jax.jit(case.update(implementation), donate_argnums=1)
        state = case.init()
        _, state = update(case.grads_at(0), state)
        for t in range(1, 4):
            old, pointers = state, [b.unsafe_buffer_pointer() for b in jax.tree.leaves(state.inner)]
            _, state = update(case.grads_at(t), state)
            assert [b.unsafe_buffer_pointer() for b in jax.tree.leaves(state.inner)] == pointers
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))

    @pytest.mark.interpreted_nightly
    def test_state_that_is_not_donated_stays(self, implementation):
        case = dataclasses.replace(SMALL, steps=2)
        update = jax.jit(case.update(implementation))
        _, state = update(case.grads_at(0), case.init())
        kept = jax.tree.map(np.array, state)
        first = update(case.grads_at(1), state)
        jax.tree.map(np.testing.assert_array_equal, state, kept)
        jax.tree.map(np.testing.assert_array_equal, first, update(case.grads_at(1), state))

    def test_program_is_one_call_without_copies(self, compiled, small):
        case = dataclasses.replace(small, shapes=((5000,), (70, 30), (9,)))
        update = case.update(compiled)

        def scan(grads, state):
            return jax.lax.scan(lambda state, grads: update(grads, state)[::-1], state, grads)

        rows = case.ahead.rows
        rings = [f"f32[{rows},{','.join(map(str, shape))}]" for shape in case.shapes if rows]
        for function, grads in ((update, case.grads_at(0)), (scan, case.grads)):
            lowered = jax.jit(function, donate_argnums=1).lower(grads, case.init())
            hlo = lowered.compile().as_text()
            assert all(ring in hlo for ring in rings)
            assert hlo.count(f'custom_call_target="{TARGET}"') == (compiled == "cpp")
            copies = [line for line in hlo.splitlines() if " copy(" in line or "copy-start" in line]
            assert not [line for line in copies if any(ring in line for ring in rings)]

    @pytest.mark.parametrize("name", sweeps.cases(list(SHARDED_OF_KEYS), FEW_SHARDED))
    def test_shards(self, implementation, name):
        key, filter, coef = SHARDED_OF_KEYS[name]
        if implementation not in implementations.INTERPRETERS:
            pytest.skip("kernels for GPUs are compared with it")
        refuse, stream = IMPLEMENTATIONS[implementation].refuse, str(jax.random.key_impl(key))
        if any(refuse(leaf, filter, stream) for leaf in leaves_of(PARTS)):
            pytest.skip("it leaves them to others")
        on_cpu = jax.config.jax_default_device.platform == "cpu"
        oracle = "cpp" if on_cpu and not IMPLEMENTATIONS["cpp"].unavailable() else "jax"
        names = implementation, oracle
        actual, expected = (run_on_parts(name, filter, coef, key) for name in names)
        trees_allclose(actual, expected, atol=5e-5)

    # -- Statistics: fixed keys, so these either always pass or always fail.

    @pytest.mark.interpreted_nightly
    @pytest.mark.each_value
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_samples_are_normal(self, implementation, dtype):
        stats = pytest.importorskip("scipy.stats")
        size = 2**17 if is_slow(implementation) else 2**20
        case = Case(((size,),), (dtype,), stddev=3.0, steps=1, seed=11)
        if reason := not_for(case, implementation):
            pytest.skip(reason)
        with jax.enable_x64(case.x64):
            zeros = [jnp.zeros(size, dtype)]
            out, _ = jax.jit(case.update(implementation))(zeros, case.init())
            z = np.asarray(out[0], np.float64) / 3
        assert stats.kstest(z, "norm").pvalue > 1e-3
        # KS is blind to the tails: four standard deviations of the number beyond 4 sigma.
        beyond = z.size * 2 * stats.norm.sf(4)
        assert abs(np.sum(np.abs(z) > 4) - beyond) < 4 * math.sqrt(beyond)

    @pytest.mark.interpreted_nightly
    @pytest.mark.each_value
    def test_strategy_whitens_the_noise(self, implementation, small):
        d, steps, stddev = 12_000 if is_slow(implementation) else 100_000, 12, 1.5
        case = dataclasses.replace(
            small, shapes=((d,),), grad_dtypes=f32, stddev=stddev, steps=steps, seed=5
        )
        (x,), _ = case.run(implementation)
        x = np.asarray(x, np.float64) - np.asarray(case.grads[0], np.float64)
        z = np.linalg.solve(case.apply(np.eye(steps))[0], x)
        # An entry of the sample covariance has standard deviation stddev^2 / sqrt(d), and sqrt(2)
        # times that on the diagonal: six of them, for 78 entries.
        covariance = z @ z.T / d
        np.testing.assert_allclose(
            covariance, stddev**2 * np.eye(steps), atol=6 * stddev**2 * math.sqrt(2 / d)
        )

    @pytest.mark.interpreted_nightly
    def test_nothing_repeats(self, implementation):
        """No tile of 1024 numbers looks like another, across tiles, leaves, steps and keys."""
        rows = []
        for seed in (0, 1):
            case = Case(((4, 1024), (3, 1024)), f32 * 2, coef=(1.0, 0.5, 0.2), steps=7, seed=seed)
            outs, _ = case.run(implementation)
            for out, grads in zip(outs, case.grads, strict=True):
                x = np.asarray(out, np.float64) - np.asarray(grads, np.float64)
                C = sum(c * np.eye(case.steps, k=-lag) for lag, c in enumerate(case.coef))
                rows.append(np.tensordot(C, x, axes=1).reshape(-1, 1024))
        z = np.concatenate(rows)
        assert z.shape == (2 * 7 * 7, 1024)
        correlation = np.corrcoef(z) - np.eye(len(z))
        # The largest of 4,753 correlations of independent rows is near 3.7 / sqrt(1024).
        assert np.abs(correlation).max() < 6 / math.sqrt(1024)


# -- Dispatch among leaves and platforms ------------------------------------------------------


def test_every_leaf_takes_what_it_can():
    """Noise of 16 bits and of more in one tree, without a name."""
    case = Case(
        ((1025,), (1100,), (3000,), (5,), (1,)),
        ("bfloat16", "float32", "float16", "float64", "float32"),
        coef=optimal_coefs(4),
        row_scale=(1.0, 0.5),
        steps=9,
    )
    with jax.enable_x64(True):
        outs, state = case.run(None)
        expected = Expected(case)
        expected.check_outputs(outs)
        expected.check_state(state)


def test_16_bit_noise_by_name():
    if IMPLEMENTATIONS["cpp"].unavailable():
        pytest.skip(IMPLEMENTATIONS["cpp"].unavailable())
    case = Case(((3,), (4,)), ("float32", "bfloat16"))
    with pytest.raises(ValueError, match=r"\[1\].*cpp.*bfloat16"):
        case.update("cpp")(case.grads_at(0), case.init())


PLATFORMS = (("cpu",), ("cuda",), ("cpu", "cuda"))


CHECKS = [
    jax.export.DisabledSafetyCheck.custom_call(target)
    for target in (TARGET, *implementations.CUDA_TARGETS)
]


@pytest.mark.parametrize("platforms", PLATFORMS, ids=" ".join)
def test_export(platforms):
    update, arguments = SMALL.update(None), (SMALL.grads_at(0), SMALL.init())
    exported = jax.export.export(jax.jit(update), platforms=platforms, disabled_checks=CHECKS)(
        *arguments
    )
    assert exported.platforms == platforms
    expects_call = "cpu" in platforms and not IMPLEMENTATIONS["cpp"].unavailable()
    assert (TARGET in exported.mlir_module()) == expects_call
    first = implementations.first_on_cuda(IMPLEMENTATIONS) if "cuda" in platforms else None
    for name, target in implementations.CUDA_CALLS.items():
        assert (target in exported.mlir_module()) == (name == first)
    if "cpu" in platforms:
        trees_allclose(exported.call(*arguments), update(*arguments), atol=1e-5)


def lowered_for_cuda(case, implementation):
    """The StableHLO of a step."""
    with jax.enable_x64(case.x64):
        update = jax.jit(case.update(implementation))
        export = jax.export.export(update, platforms=("cuda",), disabled_checks=CHECKS)
        return export(case.grads_at(0), case.init()).mlir_module()


LOWERED = {
    **FILTERS,
    "one slot": dataclasses.replace(SMALL, coef=(1.0, 0.4)),
    "no history": dataclasses.replace(SMALL, coef=(2.0,)),
    "64 bands": dataclasses.replace(SMALL, coef=(1.0,) + (0.01,) * 63),
    **{
        f"{gradient} gradients, {noise} noise": dataclasses.replace(
            SMALL, grad_dtypes=(gradient,) * 3, noise_dtype=noise
        )
        for gradient in ("float16", "bfloat16", "float64")
        for noise in ("float32", "float64")
    },
    "float64 buffers": dataclasses.replace(FILTERS["buffers"], coef_dtype="float64"),
    "float64 moving average": dataclasses.replace(
        FILTERS["moving average"], coef_dtype="float64", noise_dtype="float64"
    ),
}
LOWERED |= {
    f"{name}, chacha20": dataclasses.replace(LOWERED[name], key_impl=random.chacha20)
    for name in ("recurrence", "moving average", "no history", "float16 gradients, float64 noise")
}


@pytest.mark.parametrize(
    "case",
    sweeps.cases(
        LOWERED,
        (
            *FILTERS,
            "no history",
            "bfloat16 gradients, float32 noise",
            "float64 gradients, float64 noise",
            "float64 buffers",
            "float64 moving average",
        ),
    ),
)
def test_pallas_lowers_for_cuda(case):
    """Without a GPU: one kernel for every leaf, in place, and nothing else as large as a leaf."""
    if reason := IMPLEMENTATIONS["pallas"].unavailable():
        pytest.skip(reason)
    text = lowered_for_cuda(case, "pallas").splitlines()
    calls = [line for line in text if PALLAS_CALL in line]
    assert len(calls) == 2  # the third leaf is empty
    rows = case.ahead.rows
    aliases = "output_tuple_indices = [1], operand_index = 6"
    assert all((aliases in line) == (rows > 0) for line in calls)
    large = [line for line in text if "2500x" in line and "func.func" not in line]
    assert large
    for line in large:
        operation = line.partition(" = ")[2].split(" ")[0] or line.split()[0]
        kept = ("stablehlo.custom_call", "stablehlo.reshape", "call", "return", "func.return")
        assert operation in kept or (rows == 0 and "2500x0" in line) or "tensor<0x2500" in line, (
            line
        )


def test_leaves_of_one_shape_share_a_kernel():
    if reason := IMPLEMENTATIONS["pallas"].unavailable():
        pytest.skip(reason)
    case = Case(((1500,),) * 5 + ((7,),), f32 * 6, coef=(1.0, 0.5, 0.2))
    assert lowered_for_cuda(case, "pallas").count(PALLAS_CALL) == 2


@pytest.mark.parametrize("name", sweeps.cases(list(SHARDED_OF_KEYS), FEW_SHARDED))
def test_pallas_lowers_shards_for_cuda(name):
    """One kernel for every leaf, of which each run has one program more than it has tiles."""
    key, filter, coef = SHARDED_OF_KEYS[name]
    if reason := IMPLEMENTATIONS["pallas"].unavailable():
        pytest.skip(reason)
    step, rings = step_on_parts("pallas", filter, coef)
    keys = jax.random.split(key, filter.behind + filter.steps)
    text = jax.jit(step).trace(jnp.int32(0), keys, rings).lower(lowering_platforms=("cuda",))
    calls = [line for line in text.as_text().splitlines() if PALLAS_CALL in line]
    programs = [int(re.search(r"grid_x = (\d+)", call)[1]) for call in calls]
    assert programs == [3, 4 * 2, 2 * 3]


@pytest.mark.parametrize("name", ["triton", "pallas"])
def test_shards_in_short_runs_are_left_to_jax(name):
    filter, _ = SHARDED["4 slots"]
    refuse = IMPLEMENTATIONS[name].refuse
    for axes, run, refused in (((), 1, False), (((2, 900),), 256, False), (((2, 900),), 255, True)):
        (leaf,) = leaves_of([Part(5000, Shard(run, axes), 0)])
        reason = refuse(leaf, filter, "threefry2x32")
        assert bool(reason) == refused
        if refused:
            assert "runs of 255 elements" in reason


@pytest.mark.parametrize("name", ["0 slots", "4 slots"])
def test_chacha20_on_shards(name):
    """In C++ as in plain JAX, wherever the elements of a shard stand."""
    filter, coef = SHARDED[name]
    if reason := IMPLEMENTATIONS["cpp"].unavailable():
        pytest.skip(reason)
    actual, expected = (run_on_parts(name, filter, coef, CHACHA20_KEY) for name in ("cpp", "jax"))
    trees_allclose(actual, expected, atol=5e-5)


def test_pallas_lowers_in_a_shard_map():
    """For a mesh of GPUs that are not here."""
    if reason := IMPLEMENTATIONS["pallas"].unavailable():
        pytest.skip(reason)
    spec = jax.sharding.PartitionSpec("x")
    device = jax.sharding.AbstractDevice("NVIDIA H100", 132, "gpu")
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((2,), ("x",), auto, abstract_device=device)
    grads = [jax.ShapeDtypeStruct((5000,), jnp.float32)]

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec)
    def update(grads):
        key = jax.random.fold_in(SMALL.key, jax.lax.axis_index("x"))  # shards are leaves here
        state = init_correlated_noise(grads, SMALL.matrix, key=key)
        return SMALL.update("pallas")(grads, state)[0]

    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(update).trace(grads).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(PALLAS_CALL) == 1


@pytest.mark.parametrize("size", [2**30 + 1, 2**31 - 1024, 2**31 - 1023, 2**31])
def test_indices_of_large_leaves_fit_or_are_refused(size):
    entry, case = IMPLEMENTATIONS["pallas"], SMALL
    if reason := entry.unavailable():
        pytest.skip(reason)
    struct = jax.ShapeDtypeStruct((size,), jnp.float32)
    update = case.update("pallas")
    state = jax.eval_shape(
        lambda: init_correlated_noise([struct], case.matrix, key=case.key, dtype="float32")
    )
    lower = functools.partial(jax.jit(update).trace, [struct], state)
    if size > 2**31 - 1024:
        with pytest.raises(ValueError, match=rf"pallas.*{size} elements.*32 bits"):
            lower()
    else:
        text = lower().lower(lowering_platforms=("cuda",)).as_text()
        assert f"grid_x = {-(-size // 1024)} : i32" in text


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (dataclasses.replace(SMALL, noise_dtype="bfloat16"), "not bfloat16"),
        (
            dataclasses.replace(SMALL, filter="moving_average", coef=(0.1,) * 33, look_ahead=2),
            "33 samples",
        ),
        (dataclasses.replace(SMALL, filter="buffers", coef=((0.5,) * 33,) * 2), "33 buffers"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_pallas_refuses_goes_to_jax(case, reason):
    if unavailable := IMPLEMENTATIONS["pallas"].unavailable():
        pytest.skip(unavailable)
    with pytest.raises(ValueError, match=rf"pallas.*{reason}"):
        lowered_for_cuda(case, "pallas")
    assert PALLAS_CALL not in lowered_for_cuda(case, None)


@pytest.mark.parametrize("platforms", PLATFORMS[1:], ids=" ".join)
def test_export_by_a_name_that_the_platform_lacks(platforms):
    if IMPLEMENTATIONS["cpp"].unavailable():
        pytest.skip(IMPLEMENTATIONS["cpp"].unavailable())
    export = jax.export.export(jax.jit(SMALL.update("cpp")), platforms=platforms)
    with pytest.raises(NotImplementedError, match=r"correlated_noise.*'cpp'.*cpu") as error:
        export(SMALL.grads_at(0), SMALL.init())
    assert "cuda" not in str(error.value).partition("it would on")[2]


# -- The plain schedule -----------------------------------------------------------------------


PLAIN = dataclasses.replace(SMALL, coef=(1.0, 0.5, -0.3), row_scale=(1.0, 2.0, 3.0), steps=8)


PLAIN_CASES = {
    **{f"{b} bands": dataclasses.replace(PLAIN, coef=PLAIN.coef[:b]) for b in (1, 2, 3)},
    **{name: dataclasses.replace(case, steps=8) for name, case in FILTERS.items()},
}


@pytest.mark.each_value
@pytest.mark.parametrize("case", PLAIN_CASES.values(), ids=PLAIN_CASES)
@pytest.mark.parametrize("key_impl", ["rbg", "unsafe_rbg", "threefry2x32"])
def test_plain_schedule(key_impl, case):
    case = dataclasses.replace(case, key_impl=key_impl)
    with jax.threefry_partitionable(key_impl != "threefry2x32"):
        outs, state = case.run(None)
        expected = Expected(case, ahead=False)
        expected.check_outputs(outs)
        expected.check_state(state)
        assert state.clock.keys.shape[0] == case.matrix.filter(False).behind + 1


def test_plain_schedule_is_not_the_compiled_ones():
    if IMPLEMENTATIONS["cpp"].unavailable():
        pytest.skip(IMPLEMENTATIONS["cpp"].unavailable())
    case = dataclasses.replace(PLAIN, key_impl="rbg")
    with pytest.raises(ValueError, match=r"cpp.*threefry2x32"):
        case.update("cpp")(case.grads_at(0), case.init())


@pytest.mark.parametrize("case", PLAIN_CASES.values(), ids=PLAIN_CASES)
def test_states_of_one_schedule_are_refused_by_the_other(case):
    ahead = case.init()
    with jax.threefry_partitionable(False):
        plain = case.init()
        with pytest.raises(ValueError, match="found one of kind v2_"):
            case.update(None)(case.grads_at(0), ahead)
    with pytest.raises(ValueError, match="found one of kind v2_"):
        case.update(None)(case.grads_at(0), plain)
    rbg = dataclasses.replace(case, key_impl="rbg")
    with pytest.raises(ValueError, match="found one of kind v2_"):
        rbg.update(None)(case.grads_at(0), ahead)


def test_states_of_one_kind_are_refused_by_every_other():
    """Even if their shapes agree, which the shape of `kind` then tells apart."""
    f = f32
    kinds = [
        Case(((5,),), f, (1.0, 0.5)),
        Case(((5,),), f, (1.0,), "moving_average", 1),
        Case(((5,),), f, (1.0, 0.5), "moving_average", 1),
        Case(((5,),), f, ((0.5,), (0.1,)), "buffers"),
        Case(((5,),), f, ((0.5,), (0.1,)), "inverse_buffers"),
        Case(((5,),), f, ((0.5,), (0.1,)), "buffers", 1),
        Case(((5,),), f, ((0.5, 0.2), (0.1, 0.1)), "buffers"),
        Case(((5,),), f, (1.0,)),
        Case(((5,),), f, (1.0,), "moving_average"),
        Case(((5,),), f, (1.0, 0.5), "moving_average", key_impl="rbg"),
        Case(((5,),), f, (1.0, 0.5), "moving_average", key_impl="unsafe_rbg"),
    ]
    for case in kinds:
        for other in kinds:
            if case is other:
                case.update(None)(case.grads_at(0), case.init())
                continue
            with pytest.raises(ValueError, match="noise_state"):
                case.update(None)(case.grads_at(0), other.init())


TRACED = {
    "recurrence, infinite c_0": ("recurrence", (math.inf, 0.5)),
    "recurrence, c_0 of zero": ("recurrence", (0.0, 0.5)),
    "recurrence, NaN": ("recurrence", (1.0, math.nan)),
    "moving average, w_0 of zero": ("moving_average", (0.0, 0.5)),
    "moving average, infinite": ("moving_average", (1.0, math.inf)),
    "buffers, infinite": ("buffers", ((0.5,), (math.inf,))),
}


@pytest.mark.each_value
@pytest.mark.parametrize("look_ahead", [0, 2])
@pytest.mark.parametrize(("filter", "coef"), TRACED.values(), ids=TRACED)
def test_coefficients_that_a_trace_hides_are_seen(filter, coef, look_ahead):
    """What is refused where a value is known must not make a step without noise."""
    case = Case(((2000,),), f32, filter=filter, look_ahead=look_ahead)

    def first(coef):
        traced = dataclasses.replace(case, coef=coef, steps=1)
        state = init_correlated_noise(
            [jnp.zeros(2000)], traced.matrix, key=case.key, stddev=case.stddev
        )
        return traced.update(None)([jnp.zeros(2000)], state)[0][0]

    noise = jax.jit(first)(jax.tree.map(jnp.float32, coef))
    assert np.isnan(noise).all()
    good = jax.tree.map(lambda c: jnp.float32(0.5), coef)
    assert np.isfinite(jax.jit(first)(good)).all()


def test_coefficients_in_one_lane_of_a_vmap_spoil_no_other():
    case = Case(((20,),), f32, coef=(1.0, 0.5))

    def first(coef, seed):
        traced = dataclasses.replace(case, coef=(coef, 0.5), steps=1)
        key = jax.random.key(seed)
        state = init_correlated_noise([jnp.zeros(20)], traced.matrix, key=key, stddev=case.stddev)
        return traced.update(None)([jnp.zeros(20)], state)[0][0]

    noise = jax.jit(jax.vmap(first))(jnp.array([1.0, 0.0, jnp.inf]), jnp.arange(3))
    assert np.isfinite(noise[0]).all()
    assert np.isnan(noise[1:]).all()


@pytest.mark.parametrize("implementation", ["cpp", "jax"])
def test_steps_below_zero_in_one_lane_of_a_vmap_spoil_no_other(implementation):
    """As a step is that has overflowed."""
    if reason := IMPLEMENTATIONS[implementation].unavailable():
        pytest.skip(reason)
    state, grads = SMALL.init(), SMALL.grads_at(0)
    states = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    steps = jnp.array([0, -3], jnp.int32)
    states = states._replace(clock=states.clock._replace(step=steps))
    outs, _ = jax.jit(jax.vmap(SMALL.update(implementation), (None, 0)))(grads, states)
    expected, _ = SMALL.update(implementation)(grads, state)
    trees_allclose([out[0] for out in outs], expected, atol=1e-5)
    assert all(np.isnan(out[1]).all() for out in outs)


# -- States and what they belong to -----------------------------------------------------------


OTHERS = {
    "coefficients": {"coef": (1.0, 0.4, -0.2, 0.1000001)},
    "scale of rows": {"row_scale": (1.0, 0.5)},
    "stddev": {"stddev": 2.5},
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_states_of_another_matrix_are_refused(change):
    """Of one kind and size: by an error where they are seen, by NaN where a trace hides them."""
    other = dataclasses.replace(SMALL, **change)
    state = other.init()
    other.update(None)(SMALL.grads_at(0), state)
    with pytest.raises(ValueError, match="other coefficients, of another stddev"):
        SMALL.update(None)(SMALL.grads_at(0), state)
    outs, _ = jax.jit(SMALL.update(None))(SMALL.grads_at(0), state)
    assert all(np.isnan(out).all() for out in outs)


@pytest.mark.parametrize("coef", [(1.0, -0.0, 0.5), (1.0, 0.0, 1e-40), (1.0, 0.1, 0.2)])
def test_a_state_knows_a_matrix_whose_coefficients_are_traced(coef):
    """Fingerprints of known and of traced numbers are the same."""
    state, grads = dataclasses.replace(SMALL, coef=coef).init(), SMALL.grads_at(0)

    @jax.jit
    def update(c, state):
        return dataclasses.replace(SMALL, coef=tuple(c)).update(None)(grads, state)[0]

    assert all(np.isfinite(out).all() for out in update(list(map(jnp.float32, coef)), state))


def test_independent_noise_takes_any_stddev():
    """It remembers none."""
    case = dataclasses.replace(SMALL, coef=(1.0,))
    again = dataclasses.replace(case, stddev=3.0)
    grads = case.grads_at(0)
    x, y = (c.update(None)(grads, case.init())[0][0] - grads[0] for c in (case, again))
    np.testing.assert_allclose(1.5 * x, y, rtol=1e-5, atol=1e-5)


def test_states_have_no_array_without_elements():
    for case in (*FILTERS.values(), *PLAIN_CASES.values()):
        whole = dataclasses.replace(case, shapes=case.shapes[:2], grad_dtypes=f32 * 2)
        assert all(np.size(x) for x in jax.tree.leaves(whole.init()))
        clock, inner = whole.init()
        assert jax.tree.structure(inner) == jax.tree.structure([0, 0] if whole.ahead.rows else ())
        assert clock.step == 0


CHANGING = {
    **FILTERS,
    "no history": dataclasses.replace(SMALL, coef=(2.0,)),
    "scaled rows": dataclasses.replace(SMALL, row_scale=(1.0, 0.5, 2.0)),
}


@pytest.mark.each_value
@pytest.mark.parametrize("key_impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("case", CHANGING.values(), ids=CHANGING)
def test_a_stddev_that_changes_scales_the_samples(case, key_impl):
    """Row t of C^-1 diag(stddev) Z, as jax_privacy has it."""
    case = dataclasses.replace(case, key_impl=key_impl, steps=7)
    stddevs = np.array([1.0, 10.0, 0.0, 0.5, 3.0, 3.0, 100.0], np.float32)
    all_grads = case.grads

    def with_stddev(stddev):
        changed = dataclasses.replace(case, stddev=stddev)
        changed.__dict__["grads"] = all_grads  # made outside of the trace
        return changed

    @jax.jit
    def run(stddevs):
        state = with_stddev(stddevs[0]).init()
        step = lambda state, v: with_stddev(v[1]).update(None)(v[0], state)[::-1]  # noqa: E731
        return jax.lax.scan(step, state, (all_grads, stddevs))[1]

    z = naive.independent(case.key, case.shapes, case.noise_dtypes, case.steps)
    for out, grads, of_leaf in zip(run(stddevs), case.grads, z, strict=True):
        scaled = stddevs.reshape(-1, *[1] * (of_leaf.ndim - 1)) * of_leaf
        x = naive.scaled(case.matrix.row_scale, 1.0, case.apply(scaled)[0])
        np.testing.assert_allclose(out, grads + x, rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize("case", CHANGING.values(), ids=CHANGING)
def test_a_traced_stddev_that_is_none_is_seen(case):
    grads = case.grads_at(0)

    @jax.jit
    def first(stddev):
        changed = dataclasses.replace(case, stddev=stddev)
        state = init_correlated_noise(grads, case.matrix, key=case.key, stddev=stddev)
        return changed.update(None)(grads, state)[0]

    for bad in (-1.0, np.nan, np.inf, 1e-39, 1e-31):
        assert all(np.isnan(out).all() for out in first(jnp.float32(bad)))
    for good in (0.0, 1e-30, 1e30):
        assert all(np.isfinite(out).all() for out in first(jnp.float32(good)))


def test_a_changing_stddev_is_left_to_jax():
    def first(stddev):
        changed = dataclasses.replace(SMALL, stddev=stddev)
        return changed.update("cpp")(SMALL.grads_at(0), changed.init())[0]

    if reason := IMPLEMENTATIONS["cpp"].unavailable():
        pytest.skip(reason)
    with pytest.raises(ValueError, match="stddev that is not traced"):
        jax.jit(first)(1.0)


EXTREME = {
    "tiny recurrence": ("recurrence", 1e-30),
    "huge recurrence": ("recurrence", 1e37),
    "tiny average": ("moving_average", 1e-30),
    "huge average": ("moving_average", 1e29),
}


@pytest.mark.each_value
@pytest.mark.parametrize("implementation", ["cpp", "jax"])
@pytest.mark.parametrize(("filter", "size"), EXTREME.values(), ids=EXTREME)
def test_coefficients_of_extreme_size(implementation, filter, size):
    """What they make is scaled by a stddev that brings it back."""
    if reason := IMPLEMENTATIONS[implementation].unavailable():
        pytest.skip(reason)
    plain = dataclasses.replace(SMALL, filter=filter, stddev=1.0)
    coef = tuple(float(np.float32(size)) * c for c in plain.coef)
    stddev = size if filter == "recurrence" else 1 / size
    extreme = dataclasses.replace(plain, coef=coef, stddev=stddev)
    expected, actual = (case.run(implementation)[0] for case in (plain, extreme))
    trees_allclose(actual, expected, atol=2e-5)


VANISHING = {
    "recurrence": ("recurrence", (1e20, 1e19), 1e-20),
    "average": ("moving_average", (1e-20, 1e-19), 1e-20),
    "huge recurrence": ("recurrence", (1e38, 1e37), 1.0),
    "tiny average": ("moving_average", (1e-38, 1e-39), 1.0),
    "subnormal average": ("moving_average", (1e-40, 1e-41), 1.0),
    "only the first term": ("moving_average", (1e-30, 1.0), 1e-20),
}


@pytest.mark.parametrize(("filter", "coef", "stddev"), VANISHING.values(), ids=VANISHING)
def test_terms_that_vanish_are_seen(filter, coef, stddev):
    """Zero in 32 bits, as products of coefficients and stddev."""
    case = dataclasses.replace(SMALL, filter=filter, coef=coef, stddev=stddev)
    grads = case.grads_at(0)

    @jax.jit
    def traced(stddev):
        changed = dataclasses.replace(case, stddev=stddev)
        state = init_correlated_noise(grads, case.matrix, key=case.key, stddev=stddev)
        return changed.update(None)(grads, state)[0]

    for outs in (case.update(None)(grads, case.init())[0], traced(stddev)):
        assert all(np.isnan(out).all() for out in outs)


# -- Derivatives ------------------------------------------------------------------------------


class TestDerivatives:
    implementation = pytest.fixture(
        lambda self, request: request.param,
        params=["cpp", "jax"],
    )

    @pytest.fixture(autouse=True)
    def _available(self, implementation):
        if reason := IMPLEMENTATIONS[implementation].unavailable():
            pytest.skip(reason)

    def test_of_gradients_is_the_identity(self, implementation):
        case = SMALL
        state, update = case.init(), case.update(implementation)
        grads = case.grads_at(0)
        outs, pull = jax.vjp(lambda grads: update(grads, state)[0], grads)
        jax.tree.map(np.testing.assert_array_equal, pull(outs)[0], outs)
        _, tangents = jax.jvp(lambda grads: update(grads, state)[0], (grads,), (outs,))
        jax.tree.map(np.testing.assert_array_equal, tangents, outs)
        jax.grad(lambda w: (jnp.sum(w[0] ** 2), update(w, state)[0]), has_aux=True)(grads)

    def test_of_stddev_is_the_noise(self, implementation):
        case = dataclasses.replace(SMALL, coef=(2.0,))
        grads, state = case.grads_at(0), case.init()

        def noisy(stddev):
            return dataclasses.replace(case, stddev=stddev).update(implementation)(grads, state)[0]

        unit = [out - grad for out, grad in zip(noisy(1.0), grads, strict=True)]
        trees_allclose(jax.jit(jax.jacfwd(noisy))(3.0), unit, atol=1e-6)
        trees_allclose(jax.jit(jax.jacrev(noisy))(3.0)[1], unit[1], atol=1e-6)

    def test_through_steps(self, implementation):
        """States are not differentiated, and do not stand in the way."""
        update = SMALL.update(implementation)

        def run(scale):
            step = lambda state, grads: update([scale * g for g in grads], state)[::-1]  # noqa: E731
            outs = jax.lax.scan(step, SMALL.init(), SMALL.grads)[1]
            return outs[1].sum()

        expected = SMALL.grads[1].sum()
        np.testing.assert_allclose(jax.grad(run)(2.0), expected, rtol=1e-4)
        np.testing.assert_allclose(jax.jvp(run, (2.0,), (1.0,))[1], expected, rtol=1e-4)

    def test_of_coefficients_is_refused(self, implementation):
        def noisy(c):
            traced = dataclasses.replace(SMALL, coef=(1.0, c))
            outs, _ = traced.update(implementation)(SMALL.grads_at(0), traced.init())
            return outs[0].sum()

        with pytest.raises(NotImplementedError, match="coefficients of a noising matrix"):
            jax.grad(noisy)(0.5)


def test_derivative_of_a_stddev_that_changes():
    """Through the rings of the steps before, too."""
    case = dataclasses.replace(SMALL, coef=(2.0, 1.0), steps=3)
    zeros = [jnp.zeros_like(grad) for grad in case.grads]

    def last(first_stddev):
        stddevs = jnp.stack([first_stddev, 1.0, 1.0])
        state = dataclasses.replace(case, stddev=stddevs[0]).init()

        def step(state, inputs):
            grads, stddev = inputs
            return dataclasses.replace(case, stddev=stddev).update(None)(grads, state)[::-1]

        return jax.lax.scan(step, state, (zeros, stddevs))[1][1][2]

    z = naive.independent(case.key, case.shapes, case.noise_dtypes, 3)[1]
    np.testing.assert_allclose(jax.jacfwd(last)(1.0), z[0] / 8, rtol=1e-4, atol=1e-5)
