"""When kernels in Triton are available, and that their offsets are long."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import mmap
import pathlib
import types
from unittest import mock

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest
import scipy.special
from support import triton_interpreter

from jax_privacy_kernels import random
from jax_privacy_kernels.ops import (
    BandedRecurrence,
    _counter_prng,
    _gpu,
    _jax_triton,
    correlated_noise,
    init_correlated_noise,
)
from jax_privacy_kernels.ops._leaves import plan
from jax_privacy_kernels.ops.correlated_noise import IMPLEMENTATIONS
from jax_privacy_kernels.ops.correlated_noise import _triton as correlated_noise_triton

KEY = jax.random.key(3)


def step(coef, grads, implementation=None):
    """A first step of noise for a tree of ShapeDtypeStructs, and its arguments."""
    matrix = BandedRecurrence(jnp.asarray(coef, jnp.float32))
    state = jax.eval_shape(lambda: init_correlated_noise(grads, matrix, key=KEY))

    def update(grads, state):
        return correlated_noise(
            grads,
            state,
            matrix,
            stddev=1.0,
            key_impl=jax.random.key_impl(KEY),
            implementation=implementation,
        )

    return update, (grads, state)


# -- Whether it is available --------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _asked_anew():
    remembered = _jax_triton._missing, _jax_triton._broken, _gpu.here
    for function in remembered:
        function.cache_clear()
    yield
    for function in remembered:
        function.cache_clear()


@pytest.mark.parametrize("module", ["triton", "jax_triton"])
def test_missing_packages(monkeypatch, module):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else name)
    expected = f"not installed: {module} (extra cuda; Python 3.12 or newer)"
    assert _jax_triton.unavailable() == expected


@pytest.fixture
def versions():
    """Of what is installed; may be changed."""
    return {"jax-triton": "0.4.1", "triton": "3.9.0"}


@pytest.fixture
def installed(monkeypatch, versions):
    """jax_triton, and triton, not told to interpret, as far as they are looked at."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions[name])
    knobs = types.SimpleNamespace(runtime=types.SimpleNamespace(interpret=False))
    names = ("jax_triton", "triton", "jaxlib.gpu_triton")
    modules = {name: types.ModuleType(name) for name in names}
    modules["triton"].knobs = knobs
    modules["jaxlib.gpu_triton"].TritonKernel = object
    monkeypatch.setattr(jaxlib, "gpu_triton", modules["jaxlib.gpu_triton"], raising=False)
    with mock.patch.dict("sys.modules", modules):
        yield types.SimpleNamespace(knobs=knobs, plugin=modules["jaxlib.gpu_triton"])


def has_gpu(monkeypatch, capability):
    device = types.SimpleNamespace(compute_capability=capability, device_kind="A GPU")
    monkeypatch.setattr(jax, "local_devices", lambda backend: [device])


@pytest.fixture
def without_gpu(monkeypatch):
    def none(backend):
        raise RuntimeError(f"no {backend}")

    monkeypatch.setattr(jax, "local_devices", none)


def made_of(kind):
    """A mesh without axes, which says what GPU programs are for."""
    fields = [field.name for field in dataclasses.fields(jax.sharding.AbstractDevice)]
    platform = {"platform": "gpu"} if "platform" in fields else {}  # not in jax 0.8 and 0.9
    device = jax.sharding.AbstractDevice(kind, None, **platform)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def test_no_gpu(installed, without_gpu):
    assert "there is none" in _jax_triton.unavailable()


@pytest.mark.parametrize(
    ("kind", "capability"),
    [
        ("NVIDIA A100-SXM4-80GB", 80),
        ("NVIDIA A10", 86),
        ("NVIDIA L40S", 89),
        ("NVIDIA H100 80GB HBM3", 90),
        ("NVIDIA GH200 480GB", 90),
        ("NVIDIA B200", 100),
    ],
)
def test_a_gpu_that_is_named(installed, without_gpu, kind, capability):
    with made_of(kind):
        assert _gpu.targets() == (_gpu.Gpu(kind, capability),)
        assert _jax_triton.unavailable() is None
    assert _gpu.targets() == ()


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA A1000", "TPU v5"])
def test_a_mesh_that_names_no_gpu_we_know(installed, without_gpu, kind):
    with made_of(kind):
        assert "there is none" in _jax_triton.unavailable()


def test_the_gpu_that_is_named_comes_before_the_one_that_is_here(installed, monkeypatch):
    has_gpu(monkeypatch, "9.0")
    with made_of("NVIDIA A100-SXM4-80GB"):
        assert [gpu.capability for gpu in _gpu.targets()] == [80]
    with made_of("A GPU"):
        assert _gpu.named() is None
        assert [gpu.capability for gpu in _gpu.targets()] == [90]


def test_old_gpu(installed, monkeypatch):
    has_gpu(monkeypatch, "7.5")
    assert _jax_triton.unavailable() == "it needs compute capability 8.0, but A GPU has 7.5"
    with made_of("NVIDIA A100-SXM4-80GB"):
        assert _jax_triton.unavailable() is None
    with made_of("Tesla T4"):
        expected = "it needs compute capability 8.0, but Tesla T4 has 7.5"
        assert _jax_triton.unavailable() == expected


@pytest.mark.parametrize("capability", ["8.0", "9.0", "10.3", "12.1"])
def test_gpu(installed, monkeypatch, capability):
    has_gpu(monkeypatch, capability)
    assert _jax_triton.unavailable() is None


@pytest.mark.parametrize(
    ("jax_triton", "triton", "tried"),
    [
        ("0.3.1", "3.6.0", True),
        ("0.3.1", "3.6.0+git1a2b3c", True),
        ("0.3.0", "3.6.0", False),
        ("0.3.1", "3.7.0", False),
        ("0.4.0", "3.6.0", False),
        ("0.4.0", "3.7.0", True),
        ("0.4.1", "3.9.0", True),
        ("0.4.1", "3.10.0", False),
        ("0.5.0", "3.9.0", False),
        ("1.0", "4.0", False),
    ],
)
def test_versions_that_go_together(installed, monkeypatch, versions, jax_triton, triton, tried):
    has_gpu(monkeypatch, "9.0")
    versions |= {"jax-triton": jax_triton, "triton": triton}
    reason = _jax_triton.unavailable()
    if tried:
        assert reason is None
    else:
        assert f"jax-triton {jax_triton} with triton {triton} was not tried" in reason
        assert "jax-triton>=0.4,<0.5 with triton>=3.7,<3.10" in reason


def test_no_plugin_for_cuda(installed, without_gpu):
    del installed.plugin.TritonKernel
    with made_of("NVIDIA H100"):
        assert _jax_triton.unavailable() == "jaxlib has no plugin for CUDA (jax[cuda13])"


def test_documented_versions():
    """What is installed, what is used and what is said agree."""
    root = pathlib.Path(__file__).parents[2]
    page = (root / "docs" / "gpu.md").read_text()
    requirements = (root / "pyproject.toml").read_text()
    for family in _gpu.FAMILIES:
        for name, (first, end) in family._asdict().items():
            span = f"`{name.replace('_', '-')}>={_gpu.text(first)},<{_gpu.text(end)}`"
            assert span in page
    for place, name in enumerate(("jax-triton", "triton")):
        spans = [family[place] for family in _gpu.FAMILIES]
        first, end = min(first for first, _ in spans), max(end for _, end in spans)
        assert f'"{name}>={_gpu.text(first)},<{_gpu.text(end)};' in requirements


def test_interpreter_is_for_tests(installed, monkeypatch):
    has_gpu(monkeypatch, "9.0")
    installed.knobs.runtime.interpret = True
    assert _jax_triton.unavailable() == "TRITON_INTERPRET is set"


def test_by_name(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    update, arguments = step((1.0, 0.5), [jax.ShapeDtypeStruct((5,), jnp.float32)], "triton")
    with pytest.raises(ValueError, match=r"'triton'.*not installed: triton, jax_triton"):
        jax.eval_shape(update, *arguments)


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_noise_that_it_does_not_take(monkeypatch, dtype):
    entry = IMPLEMENTATIONS["triton"]._replace(unavailable=lambda: None)
    monkeypatch.setitem(IMPLEMENTATIONS, "triton", entry)
    with jax.enable_x64(True):
        update, arguments = step((1.0,), [jax.ShapeDtypeStruct((5,), dtype)], "triton")
        with pytest.raises(ValueError, match=f"triton: it samples float32, not {dtype}"):
            jax.eval_shape(update, *arguments)


# -- Steps that are none ------------------------------------------------------------------------


@pytest.mark.interpreted
@pytest.mark.triton
@pytest.mark.parametrize("clock", [-1, -2])
def test_a_negative_step_stays_in_the_ring(clock):
    """And its noise is NaN. The interpreter sees to what is written beside a result."""
    if reason := triton_interpreter.unavailable():
        pytest.skip(reason)
    with triton_interpreter.interpreted():
        grads = [jnp.zeros(1500)]
        update, _ = step((1.0, 0.5, 0.25, 0.1), grads, "triton")
        matrix = BandedRecurrence(jnp.array((1.0, 0.5, 0.25, 0.1)))
        state = init_correlated_noise(grads, matrix, key=KEY)
        state = state._replace(clock=state.clock._replace(step=jnp.int32(clock)))
        (out,), _ = jax.block_until_ready(update(grads, state))
    assert np.isnan(out).all()


# -- Launches for several leaves ------------------------------------------------------------------

SHAPES = [(1500,), (3, 5), (64,), (2048,), (8,), (), (7000,), (16,), (1024, 5), (24,), (40,), (72,)]


@pytest.mark.interpreted
@pytest.mark.triton
@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize(
    "key", [KEY, random.secure_key(bytes(32))], ids=["threefry2x32", "chacha20"]
)
def test_small_leaves_share_launches(key, slots):
    """Eight leaves of one dtype at most, whose sizes are multiples of 8 or are not."""
    if reason := triton_interpreter.unavailable():
        pytest.skip(reason)
    large = [jnp.ones(9000, jnp.bfloat16)]  # alone, as the only one of its dtype
    grads = [jnp.full(shape, i, jnp.float32) for i, shape in enumerate(SHAPES)] + large
    matrix = BandedRecurrence(jnp.array([1.0, 0.5, 0.25][: slots + 1]))
    options = {"stddev": 1.0, "key_impl": jax.random.key_impl(key), "dtype": "float32"}
    launches = []

    def counted(kernel, *arguments, **constants):
        launches.append(kernel.__name__)
        return triton_interpreter.call(kernel, *arguments, **constants)

    with triton_interpreter.interpreted(), mock.patch.object(_jax_triton, "call", counted):
        state = expected_state = init_correlated_noise(grads, matrix, key=key, dtype="float32")
        for _ in range(slots + 2):
            out, state = correlated_noise(grads, state, matrix, implementation="triton", **options)
            expected, expected_state = correlated_noise(
                grads, expected_state, matrix, implementation="jax", **options
            )
            for got, want in zip(
                jax.tree.leaves((out, state.inner)),
                jax.tree.leaves((expected, expected_state.inner)),
                strict=True,
            ):
                tolerance = 1e-5 if got.dtype == jnp.float32 else 2.0**-7
                np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)
    # Of eight and of three leaves, and of one whose size is the ninth multiple of 8, and of one
    # dtype. Each is traced more than once.
    assert launches.count("recurrences") == launches.count("recurrence") > 0


def test_leaves_that_fill_a_gpu_are_launched_alone():
    sizes = [2**21 + 8, 1000, 2**20, 2**33]
    leaves = plan([jax.ShapeDtypeStruct((size,), jnp.float32) for size in sizes], jnp.float32, None)
    small = [correlated_noise_triton._is_small(7, "threefry2x32", 1, leaf) for leaf in leaves]
    assert small == [False, True, True, False]


# -- Divisions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("divisor", [*range(2, 70), 127, 128, 129, 1003, 2**20 - 1, 2**20 + 1])
def test_divisions_by_a_magic_number(divisor):
    """For all programs there can be: next to a multiple is where one could go wrong."""
    magic, shift = correlated_noise_triton._division_by(divisor)
    assert magic < 2**32
    last = (2**31 - 1) // divisor
    for quotient in {1, 2, 3, last // 3, last // 2, last - 1, last}:
        for p in (quotient * divisor - 1, quotient * divisor):
            assert magic * p >> shift == p // divisor
    assert magic * (2**31 - 1) >> shift == last


# -- The error of samples -----------------------------------------------------------------------


@pytest.mark.interpreted
@pytest.mark.triton
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("accurate", [False, True])
def test_samples_by_the_logarithm_of_a_gpu(accurate, sign):
    """By any error that PTX allows it, all samples there can be are far within 2e-6."""
    if reason := triton_interpreter.unavailable():
        pytest.skip(reason)
    bits = np.arange(2**23, dtype=np.uint32) << 9  # the others are not looked at
    unit = ((bits >> 9) | 0x3F800000).view(np.float32) - np.float32(1)
    uniform = np.nextafter(np.float32(-1), np.float32(0)) + 2 * unit
    uniform = np.maximum(uniform, np.nextafter(np.float32(-1), np.float32(0)))
    if accurate:
        expected = np.sqrt(2) * scipy.special.erfinv(uniform.astype(np.float64))
    else:
        expected = np.float32(np.sqrt(2)) * np.asarray(jax.lax.erf_inv(uniform))
    with triton_interpreter.interpreted():
        import triton.language as tl
        from triton.runtime import interpreter

        from jax_privacy_kernels.kernels import _streams_triton

        assembly = triton_interpreter.Assembly(sign * triton_interpreter.LOG2_ERROR)
        normal = _streams_triton.normal.rewrite()
        samples = []
        with (
            mock.patch.object(interpreter.interpreter_builder, "create_inline_asm", assembly),
            np.errstate(invalid="ignore"),
        ):
            for part in np.split(bits, 8):  # more is too large for Triton
                kind = tl.block_type(tl.uint32, [part.size])
                drawn = tl.tensor(interpreter.TensorHandle(part, tl.uint32), kind)
                z = normal(drawn, None, None, "chacha20", accurate)
                samples.append(z.handle.data.astype(np.float64))
    error = np.abs(np.concatenate(samples) - expected)
    assert (error < 5e-7 * np.maximum(1, np.abs(expected))).all()


# -- Leaves of more than 2^32 elements ----------------------------------------------------------


def launches(update, arguments):
    """What `_jax_triton.call` is called with."""
    found = []

    def call(kernel, arrays, numbers, outs, *, programs, warps=4, aliases=None, **constants):
        del warps
        found.append((kernel, arrays, numbers, programs, constants))
        return [jnp.zeros(out.shape, out.dtype) for out in outs]

    with mock.patch.object(_jax_triton, "call", call):
        jax.clear_caches()
        jax.eval_shape(update, *arguments)
    jax.clear_caches()
    return found


def memory(shape):
    """A float32 array of any size; what is not touched takes no memory."""
    no_reserve = 0x4000  # MAP_NORESERVE of Linux, which has no name in mmap
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return np.frombuffer(mmap.mmap(-1, 4 * int(np.prod(shape)), flags), np.float32).reshape(shape)


def run_program(kernel, index, programs, arguments, constants):
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.set_grid_dim(programs, 1, 1)
    builder.set_grid_idx(index, 0, 0)
    kernel.rewrite()(*map(interpreter._implicit_cvt, arguments), **constants)


def last_samples(key, start, count):
    """Elements from ``start`` on, above 2^32, of jax.random.normal."""
    words = tuple(map(jnp.uint32, divmod(start, 2**32)))
    at = _counter_prng.at(jax.random.split(key, 1)[0], words)
    return np.asarray(jax.random.normal(at, (count,)))


@pytest.mark.interpreted
@pytest.mark.triton
@pytest.mark.parametrize("coef", [(2.0,), (1.0, 0.5, 0.25)])
def test_offsets_are_long(coef):
    if reason := triton_interpreter.unavailable():
        pytest.skip(reason)
    size, start, slots = 2**32 + 9, 2**32, len(coef) - 1
    with triton_interpreter.interpreted():
        update, arguments = step(coef, [jax.ShapeDtypeStruct((size,), jnp.float32)], "triton")
        ((kernel, arrays, numbers, programs, constants),) = launches(update, arguments)
        key, keys = KEY, []
        for _ in range(max(slots, 1)):
            key, subkey = jax.random.split(key)
            keys.append(subkey)
        words = np.stack([jax.random.key_data(jax.random.split(key, 1)[0]) for key in keys])
        grad, out = memory((size,)), memory((size,))
        grad[start:] = 1.0
        weights = np.zeros(arrays[2 if slots else 1].shape, np.float32)
        weights.flat[: slots + 1] = np.array([1, *(-c for c in coef[1:])]) / coef[0]
        inputs = [words, weights, np.float32([3.0]), grad, np.zeros((1, 4), np.uint32)]
        results = [out]
        if slots:
            ring = memory((slots, size))
            inputs, results = [np.int32([0]), *inputs, ring], [out, ring]
        wrapped = [triton_interpreter._Array(x) for x in inputs]
        wrapped += [*numbers, *map(triton_interpreter._Array, results)]
        # At step 0 the first of S tiles is refreshed, and so is this one: 2^22 + 2^21 is even.
        parts = 1024 // constants.get("PART", 1024)
        index = 2**22 // slots * (parts + slots) if slots else programs - 1
        assert index < programs < 2**31
        run_program(kernel, index, programs, wrapped, constants)
    z = [last_samples(key, start, size - start) for key in keys]
    x = z[0] / coef[0]
    np.testing.assert_allclose(out[start:], 1 + 3 * x, rtol=1e-5, atol=1e-5)
    if slots:
        np.testing.assert_allclose(ring[0, start:], x, rtol=1e-5, atol=1e-5)
        second = (z[1] - coef[1] * x) / coef[0]
        np.testing.assert_allclose(ring[1, start:], second, rtol=1e-5, atol=1e-5)
    assert not out[:9].any()
    assert not out[start - 9 : start].any()
