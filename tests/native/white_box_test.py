"""The C++ kernels from inside, for every instruction set that they are compiled for.

The loader runs one clone of a kernel, the best for the machine. Here the same source is also
compiled once for each of the others, and every one that this machine can run is tested.
"""

import fcntl
import functools
import importlib.util
import os
import pathlib
import platform
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import scipy.special
from jax.extend.random import threefry2x32_p
from support import chacha20, sweeps

from jax_privacy_kernels.ops.privacy_loss_sums import (
    BallsInBins,
    BMinSep,
    CyclicPoisson,
    privacy_loss_sums,
    problem,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Flags of /proc/cpuinfo that an instruction set takes, as far as GCC makes use of them here.
V3 = {"avx2", "fma", "bmi1", "bmi2", "f16c", "abm", "movbe"}
V4 = V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
VARIANTS = {"clones": set(), "v1": set(), "v3": V3, "v4": V4}


def variants():
    """Those that there are for this processor."""
    return VARIANTS if platform.machine() in ("x86_64", "AMD64") else ("clones",)


FLOAT_TYPES = [np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)]
NOISE_AND_RING = [("f4", "f4"), ("f4", "f8"), ("f8", "f8")]
SIXTEEN_BITS = {"f16": FLOAT_TYPES[0], "bf16": FLOAT_TYPES[1]}


# The casts of NaNs, and of what overflows, are tested on purpose.
pytestmark = [
    pytest.mark.filterwarnings("ignore:(invalid|overflow).* in cast:RuntimeWarning"),
    pytest.mark.subprocess,  # the compiler
]


def missing(variant):
    """What this machine lacks to run a variant."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    return VARIANTS[variant] - set(cpuinfo.read_text().split() if cpuinfo.exists() else ())


@functools.cache
def load(variant):
    """The module of a variant, compiled. A compiler that is there must succeed."""
    if missing(variant):
        pytest.skip(f"this CPU has no {', '.join(sorted(missing(variant)))}")
    if variant not in variants():
        pytest.skip("compiled on x86-64 only")
    pytest.importorskip("pybind11")
    # Tools that pip has installed stand beside the interpreter.
    path = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ.get("PATH", "")])
    for tool in ("cmake", os.environ.get("CXX", "c++").split()[0]):
        if not shutil.which(tool, path=path):
            pytest.skip(f"needs {tool}")
    name = f"_white_box_{variant}"
    # A folder for each, so that workers of pytest-xdist compile several of them at a time.
    build = ROOT / "build" / "white_box" / sys.implementation.cache_tag / variant
    build.mkdir(parents=True, exist_ok=True)
    with (build / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for arguments in (
            [
                "-S",
                ROOT,
                "-B",
                build,
                "-DJPK_WHITE_BOX=ON",
                f"-DPython_EXECUTABLE={sys.executable}",
            ],
            ["--build", build, "--target", name],
        ):
            done = subprocess.run(
                [shutil.which("cmake", path=path), *arguments],
                env={**os.environ, "PATH": path},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stdout + done.stderr
    (found,) = (build / "tests" / "native").glob(f"{name}.*")
    spec = importlib.util.spec_from_file_location(name, found)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session", params=sweeps.cases(list(VARIANTS), ["clones", "v1"]))
def kernels(request):
    """By default the clone that the loader picks, and what it would pick where there is no SIMD."""
    return load(request.param)


def pack(hi, lo):
    return np.asarray(hi, np.uint64) << np.uint64(32) | np.asarray(lo, np.uint64)


def jax_threefry(key, counters):
    """The two words of every 64-bit counter, packed, by JAX."""
    counters = np.asarray(counters, np.uint64)
    words = ((counters >> np.uint64(32)).astype(np.uint32), counters.astype(np.uint32))
    k0, k1 = (np.full_like(words[0], k) for k in key)
    return pack(*map(np.asarray, threefry2x32_p.bind(k0, k1, *words)))


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_known_answers(kernels, counter, key, answer):
    """The vectors that Random123 publishes for threefry2x32 with 20 rounds."""
    assert kernels.threefry(*key, *counter) == pack(*answer)


def test_threefry_is_jax(kernels):
    rng = np.random.default_rng(0)
    k0, k1, x0, x1 = rng.integers(2**32, size=(4, 10_000), dtype=np.uint32)
    want = pack(*map(np.asarray, threefry2x32_p.bind(k0, k1, x0, x1)))
    np.testing.assert_array_equal(kernels.threefry(k0, k1, x0, x1), want)


@pytest.mark.parametrize("first", [0, 2**32 - 16, 2**40 + 32])
def test_chacha20_is_the_rfcs(kernels, first):
    key = chacha20.words_of(bytes(range(32)))
    for lane, words in enumerate(kernels.chacha20(key, 0x09000000, first).T):
        nonce = (first + lane) % 2**32, 0x09000000, first >> 32, 0
        assert words.tolist() == chacha20.block(key, nonce)


@pytest.mark.parametrize("count", [1, 2, 1000])
def test_split_is_jax(kernels, count):
    key = jax.random.key(11)
    keys = np.asarray(jax.random.key_data(jax.random.split(key, count)))
    got = kernels.split(*np.asarray(jax.random.key_data(key)), np.arange(count, dtype=np.uint32))
    np.testing.assert_array_equal(got, pack(keys[:, 0], keys[:, 1]))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_uniforms_are_jax(kernels, dtype):
    key, size = jax.random.key(12), 100_000
    counters = np.arange(size, dtype=np.uint32)
    words = kernels.threefry(*np.asarray(jax.random.key_data(key)), np.uint32(0), counters)
    with jax.enable_x64(True):
        lowest = np.nextafter(np.array(-1, dtype), np.array(0, dtype))
        want = np.asarray(jax.random.uniform(key, (size,), dtype, lowest, np.array(1, dtype)))
    got = {"float32": kernels.uniform_f32, "float64": kernels.uniform_f64}[dtype](words)
    assert got.dtype == want.dtype == dtype
    np.testing.assert_array_equal(got, want)


def all_uniforms_f32(kernels):
    return kernels.uniform_f32(np.arange(2**23, dtype=np.uint64) << np.uint64(9))


def many_uniforms_f64(kernels):
    """Dense at both ends and the center, log-spaced from each of them, and random."""
    rng = np.random.default_rng(13)
    top = 2**52
    dense = np.arange(2**19)
    spread = np.exp2(rng.uniform(0, 51, 2**20)).astype(np.int64)
    draws = [dense, top - 1 - dense, top // 2 - 2**18 + dense]
    draws += [spread, top - 1 - spread, top // 2 - spread, top // 2 - 1 + spread]
    draws += [rng.integers(top, size=2**21)]
    return kernels.uniform_f64(np.concatenate(draws).astype(np.uint64) << np.uint64(12))


def error(got, want):
    """max |got - want| / max(1, |want|), refusing anything that is not finite."""
    assert np.isfinite(got).all()
    worst = np.max(np.abs(got - want) / np.maximum(1, np.abs(want)))
    print(f"measured {worst:.3g}")
    return worst


def test_erf_inv_f32_against_scipy(kernels):
    """Every float32 that can be drawn. 5e-7 is 4 units in the last place of a number of size 1."""
    u = all_uniforms_f32(kernels)
    assert np.unique(u).size == 2**23
    want = np.sqrt(2) * scipy.special.erfinv(u.astype(np.float64))
    assert error(kernels.erf_inv_f32(u, True).astype(np.float64), want) < 5e-7


def test_erf_inv_f32_against_jax(kernels):
    """Every float32 that can be drawn: XLA's stream, with XLA's error in the tails."""
    u = all_uniforms_f32(kernels)
    want = np.sqrt(np.float32(2)) * np.asarray(jax.lax.erf_inv(jnp.asarray(u)))
    assert error(kernels.erf_inv_f32(u, False), want) < 2e-6


def test_erf_inv_f64_against_scipy(kernels):
    """1 - u and 1 + u are exact or nearly so, and log and sqrt damp what they lose."""
    u = many_uniforms_f64(kernels)
    want = np.sqrt(2) * scipy.special.erfinv(u)
    assert error(kernels.erf_inv_f64(u, True), want) < 2e-15


def test_erf_inv_f64_against_jax(kernels):
    u = many_uniforms_f64(kernels)
    with jax.enable_x64(True):
        want = np.sqrt(2) * np.asarray(jax.lax.erf_inv(jnp.asarray(u)))
    assert error(kernels.erf_inv_f64(u, False), want) < 1e-13


@pytest.mark.parametrize("accurate", [False, True])
@pytest.mark.parametrize("first", [0, 2**32 - 128, 2**32 - 5, 2**32, 3 * 2**40 - 77, 2**63 + 9])
def test_normal_block(kernels, first, accurate):
    """Counters are 64 bits wide: a block may lie across a carry into the upper word."""
    key = (0x13198A2E, 0x03707344)
    words = jax_threefry(key, [first + i for i in range(kernels.BLOCK)])
    want = kernels.erf_inv_f32(kernels.uniform_f32(words), accurate)
    np.testing.assert_allclose(
        kernels.normal_f32(*key, first, accurate), want, rtol=1e-6, atol=1e-6
    )
    want = kernels.erf_inv_f64(kernels.uniform_f64(words), accurate)
    np.testing.assert_allclose(
        kernels.normal_f64(*key, first, accurate), want, rtol=1e-14, atol=1e-14
    )


@pytest.mark.parametrize("accurate", [False, True])
def test_normal_blocks_with_tails(kernels, accurate):
    """The vector loop leaves the tails to a second pass: some at every position of a block."""
    key, blocks = (1, 2), 20_000
    starts = range(0, blocks * kernels.BLOCK, kernels.BLOCK)
    words = jax_threefry(key, np.arange(blocks * kernels.BLOCK))
    for normal, uniform, erf_inv, tolerance in (
        (kernels.normal_f32, kernels.uniform_f32, kernels.erf_inv_f32, 1e-6),
        (kernels.normal_f64, kernels.uniform_f64, kernels.erf_inv_f64, 1e-14),
    ):
        got = np.concatenate([normal(*key, first, accurate) for first in starts])
        want = erf_inv(uniform(words), accurate)
        assert (np.abs(want).reshape(blocks, -1) > 3.3).any(0).all()
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.nightly
@pytest.mark.parametrize("accurate", [False, True])
def test_samples_of_clones(accurate):
    """Bit for bit those of the best instruction set: tails are compiled for it, too."""
    clones = load("clones")
    best = load(next(name for name in ("v4", "v3", "v1") if not missing(name)))
    for name in ("normal_f32", "normal_f64"):
        blocks = [
            [getattr(module, name)(1, 2, first * clones.BLOCK, accurate) for first in range(20_000)]
            for module in (clones, best)
        ]
        assert np.abs(blocks[0]).max() > 4.5
        np.testing.assert_array_equal(*blocks)


EVERY_16_BITS = np.arange(2**16).astype(np.uint16)


def to_narrow():
    """float32 values at, and right beside, everything that rounding to 16 bits turns on."""
    bits = EVERY_16_BITS.astype(np.uint32)[:, None] << 16
    bfloats = (bits + np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)).ravel()
    # All magnitudes of float16, the power of two after the last, and what lies midway.
    halves = np.unique(np.abs(EVERY_16_BITS.view(np.float16).astype(np.float64)))
    halves = np.append(halves[halves < np.inf], 65536.0)
    halves = np.concatenate([halves, (halves[1:] + halves[:-1]) / 2]).astype(np.float32)
    above = np.nextafter(halves, np.float32(np.inf))
    below = np.nextafter(halves, np.float32(-np.inf))
    halves = np.concatenate([halves, above, below])
    rest = np.random.default_rng(14).integers(2**32, size=100_000, dtype=np.uint32)
    return np.concatenate([bfloats.view(np.float32), halves, -halves, rest.view(np.float32)])


def assert_same(got, want):
    """Equal to the bit, but for the payloads of NaNs."""
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(np.signbit(got), np.signbit(want))
    got, want = got.astype(np.float64), want.astype(np.float64)  # exact
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", SIXTEEN_BITS)
def test_widen(kernels, name):
    got = getattr(kernels, f"widen_{name}")(EVERY_16_BITS)
    assert_same(got, EVERY_16_BITS.view(SIXTEEN_BITS[name]).astype(np.float32))


@pytest.mark.parametrize("name", SIXTEEN_BITS)
def test_narrow(kernels, name):
    x, dtype = to_narrow(), SIXTEEN_BITS[name]
    assert_same(getattr(kernels, f"narrow_{name}")(x).view(dtype), x.astype(dtype))


def run_step(kernels, t, keys, coef, leaves, *, scale=1.0, accurate=False):
    """Runs one step on leaves (grad, noise dtype, ring); returns the outputs, updates the rings."""
    outs, arguments = [], []
    for grad, noise, ring in leaves:
        outs.append(np.full_like(grad, np.nan))
        arrays = [a.view(np.uint16) if a.itemsize == 2 else a for a in (grad, outs[-1])]
        types = [FLOAT_TYPES.index(np.dtype(t)) for t in (grad.dtype, noise, ring.dtype)]
        arguments.append((*arrays, ring, types))
    kernels.step(t, keys, coef, scale, accurate, arguments)
    return outs


@pytest.mark.parametrize(("noise", "ring"), NOISE_AND_RING)
@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
def test_conversions_in_a_step(kernels, dtype, noise, ring):
    """Those above again, where they are vectorized: out = g + x with g = -0, then with x = -0."""
    # With more slots than tiles there is a step that is no tile's turn and only reads x's slot.
    slots, size = 16, 15 * 1024 - 1
    t, coef, keys = 2 * slots - 1, [1.0] * (slots + 1), [(0, 0)] * slots
    rows = np.zeros((slots, size), ring)

    x = to_narrow().astype(ring)
    for rows[-1] in np.resize(x, (-(-x.size // size), size)):
        (out,) = run_step(kernels, t, keys, coef, [(np.full(size, -0.0, dtype), noise, rows)])
        assert_same(out, rows[-1].astype(dtype))

    rows[-1] = -0.0
    bits = EVERY_16_BITS if dtype.itemsize == 2 else EVERY_16_BITS.view(np.float16)
    grads = bits.view(dtype) if dtype.itemsize == 2 else bits.astype(dtype)
    for grad in np.resize(grads, (-(-grads.size // size), size)):
        (out,) = run_step(kernels, t, keys, coef, [(grad, noise, rows)])
        assert_same(out, grad)


def run(kernels, slots, accurate):
    """Outputs and rings of a few steps on leaves of all types, each with its tolerance."""
    rng = np.random.default_rng(15)
    size, ahead, steps = slots * 1024 + 300, max(slots, 1), 3 * slots + 2
    coef = [1.0, *rng.uniform(-0.9 / ahead, 0.9 / ahead, slots)]
    keys = rng.integers(2**32, size=(steps + ahead, 2)).tolist()
    leaves = [
        (rng.normal(size=size).astype(dtype), noise, np.zeros((slots, size), ring))
        for dtype in FLOAT_TYPES
        for noise, ring in NOISE_AND_RING
    ]
    tolerances = [1e-5 if noise == "f4" else 1e-12 for _, noise, _ in leaves]
    results = []
    for t in range(steps):
        outs = run_step(kernels, t, keys[t : t + ahead], coef, leaves, scale=0.7, accurate=accurate)
        for out, tolerance in zip(outs, tolerances, strict=True):
            results.append((out, max(tolerance, float(ml_dtypes.finfo(out.dtype).eps))))
    return results + [(ring, tol) for (_, _, ring), tol in zip(leaves, tolerances, strict=True)]


@pytest.fixture(scope="session", params=[(0, False), (3, True), (9, False)], ids=str)
def baseline(request):
    """Results of the variant with the least SIMD, which the others are compared with."""
    name = "v1" if "v1" in variants() else "clones"
    return request.param, run(load(name), *request.param)


def test_variants_agree(kernels, baseline):
    """A run on one machine is the run on any other, but for rounding."""
    parameters, wanted = baseline
    for (got, tolerance), (want, _) in zip(run(kernels, *parameters), wanted, strict=True):
        got, want = got.astype(np.float64), want.astype(np.float64)
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


# -- Coefficients -----------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 3), (100, 9), (1000, 70), (9000, 9000)])
def test_toeplitz(kernels, n, m):
    rng = np.random.default_rng(n)
    coef, x = rng.normal(size=m) / m, rng.normal(size=n)
    coef[0] = 1
    product = kernels.toeplitz(coef, x, False)
    np.testing.assert_allclose(product, np.convolve(coef, x)[:n], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(kernels.toeplitz(coef, product, True), x, rtol=1e-9, atol=1e-9)


def test_complex_product(kernels):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 37, 2)).view(complex)[..., 0]
    np.testing.assert_allclose(kernels.complex_product(a, b), a * b, rtol=1e-14)


@pytest.mark.parametrize(("sep", "k"), [(1, 300), (1, 2), (7, 3), (50, 100), (300, 1)])
def test_min_sep_norm(kernels, sep, k):
    n = 300
    coef = np.sort(np.random.default_rng(sep).uniform(0.1, 1, size=250))[::-1].copy()
    padded = np.pad(coef, (0, n - coef.size))
    shifted = [np.pad(padded, (j * sep, 0))[:n] for j in range(min(k, -(-n // sep)))]
    column = sum(shifted)
    value, gradient = kernels.min_sep_norm(coef, n, sep, k)
    np.testing.assert_allclose(value, column @ column, rtol=1e-13)
    transposed = sum(np.pad(column[j * sep :], (0, j * sep)) for j in range(len(shifted)))
    np.testing.assert_allclose(gradient, 2 * transposed[: coef.size], rtol=1e-13)


@pytest.mark.parametrize("sep", [1, 3, 40])
@pytest.mark.parametrize("k", [1, 2, 9, 100])
def test_participation_max(kernels, sep, k):
    x = np.random.default_rng(k).normal(size=41)
    best = np.zeros((len(x) + sep, k + 1))
    for i in reversed(range(len(x))):
        best[i, 1:] = np.maximum(x[i] + best[i + sep, :-1], best[i + 1, 1:])
    value, gradient = kernels.participation_max(x, sep, k)
    np.testing.assert_allclose(value, best[0, k], rtol=1e-14)
    np.testing.assert_allclose(gradient @ x, value, rtol=1e-14)
    assert set(gradient) <= {0, 1}
    assert gradient.sum() <= k
    assert np.all(np.diff(np.flatnonzero(gradient)) >= sep)


def test_exp_and_log(kernels):
    x = np.concatenate([np.linspace(-708, 708, 100_001), np.geomspace(1e-300, 1, 1000)])
    np.testing.assert_allclose(kernels.exp(x), np.exp(x), rtol=2**-50)
    y = np.exp(x)
    np.testing.assert_allclose(kernels.log(y), np.log(y), rtol=2**-51, atol=2**-51)
    ends = kernels.exp(np.array([-708.0, 708.0]))
    np.testing.assert_allclose(kernels.exp(np.array([-1e9, 1e9])), ends, rtol=2**-50)
    assert np.isnan(kernels.exp(np.nan))
    assert np.isnan(kernels.log(np.nan))


@pytest.mark.parametrize(
    "scheme",
    [
        BallsInBins(50, 11),
        BMinSep(90, 6, 0.3),
        BMinSep(90, 6, 0.3, warm_start=False),
        CyclicPoisson(90, 6, 0.5),
    ],
)
def test_privacy_loss_sums(kernels, scheme):
    """The same samples as those of the oracle; the least noise takes logarithms."""
    c, count = np.array([1.0, 0.5, 0.375, 0.3125]), 70
    sigmas, epsilons = np.array([0.05, 1.0, 3.0]), np.array([0.0, -0.5, 1.0])
    prepared = problem(scheme, c)
    targets = (sigmas, prepared.margins(sigmas), epsilons, count)
    static = dict(prepared.static)
    kind = static.pop("scheme")
    if kind == "bins":
        sums = kernels.privacy_loss_bins(*prepared.operands, *targets)
    else:
        number = ("min_sep", "min_sep_warm", "cyclic").index(kind)
        sums = kernels.privacy_loss_steps(number, *static.values(), c, *targets)
    right = privacy_loss_sums(
        scheme,
        c,
        sigmas,
        epsilons,
        key=np.array([1, 2], np.uint32),
        num_samples=count,
        implementation="jax",
    )
    np.testing.assert_allclose(sums, right.sums.ravel(), rtol=1e-8, atol=1e-8)
