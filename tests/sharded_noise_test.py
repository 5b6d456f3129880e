"""Noise on eight devices: that of one, made where it is wanted, and once."""

from __future__ import annotations

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import sweeps

from jax_privacy_kernels import noise_addition, random, sharding_utils
from jax_privacy_kernels.matrix_factorization import (
    banded,
    buffered_toeplitz,
    streaming_matrix,
    toeplitz,
)
from jax_privacy_kernels.noise_addition import SupportedStrategies
from jax_privacy_kernels.ops import _ffi

STEPS = 12
COEF = toeplitz.optimal_max_error_strategy_coefs(5)
DENSE = np.tril(np.random.default_rng(0).normal(size=(STEPS, STEPS))) * (np.arange(STEPS) % 3 != 1)

MATRICES = {
    "banded": lambda: toeplitz.inverse_as_streaming_matrix(COEF),
    "two bands": lambda: toeplitz.inverse_as_streaming_matrix(COEF[:2]),
    "by row": lambda: banded.ColumnNormalizedBanded.from_banded_toeplitz(
        STEPS, COEF
    ).inverse_as_streaming_matrix(),
    "inverse banded": lambda: toeplitz.noising_coef_as_streaming_matrix(
        toeplitz.inverse_coef(COEF, 4)
    ),
    "buffered": lambda: buffered_toeplitz.BufferedToeplitz.build(
        buf_decay=[0.9, 0.5], output_scale=[0.3, 0.2], dtype=jnp.float32
    ).inverse_as_streaming_matrix(),
    "dense": lambda: DENSE,
    "identity": streaming_matrix.identity,
    "prefix": streaming_matrix.prefix_sum,
    "momentum": lambda: streaming_matrix.momentum_sgd_matrix(0.9),
}

MESHES = {"x": (8,), "xy": (4, 2), "xyz": (2, 2, 2)}

# Shapes and, for every mesh, specs: replicated, sharded on any axis, in another order than the
# mesh's; in runs of whole tiles, of less, and of single elements.
SHAPES = {
    "scalar": (),
    "odd": (7, 5),
    "rows": (16, 700),
    "columns": (6, 4096),
    "thin": (1000, 8),
    "middle": (4, 24, 100),
    "flat": (9 * 1024,),
    "empty": (0, 8),
}
SPECS = {
    "x": {
        "rows": P("x"),
        "columns": P(None, "x"),
        "thin": P(None, "x"),
        "middle": P(None, "x"),
        "flat": P("x"),
        "empty": P(None, "x"),
    },
    "xy": {
        "rows": P("y", "x"),
        "columns": P("y", "x"),
        "thin": P("y"),
        "middle": P("x", ("y",), None),
        "flat": P(("y", "x")),
    },
    "xyz": {
        "rows": P(("x", "z")),
        "columns": P(None, ("z", "x")),
        "thin": P("y", ("x", "z")),
        "middle": P("x", "y", "z"),
        "flat": P(("x", "y", "z")),
        "empty": P(None, "z"),
    },
}
SMALL = "odd", "columns", "flat"

KINDS = {"explicit": AxisType.Explicit, "automatic": AxisType.Auto}
COLLECTIVES = "all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"

needs_cpp = pytest.mark.skipif(bool(_ffi.unavailable()), reason=f"{_ffi.unavailable()}")
implementations = pytest.mark.parametrize(
    "implementation", [pytest.param("cpp", marks=needs_cpp), "jax"]
)


def mesh_of(axes, kind="explicit"):
    return jax.make_mesh(MESHES[axes], tuple(axes), axis_types=(KINDS[kind],) * len(axes))


def within(mesh):
    explicit = AxisType.Explicit in mesh.axis_types
    return jax.set_mesh(mesh) if explicit else contextlib.nullcontext()


def privatizer(matrix="banded", implementation=None, strategy="DEFAULT", **kwargs):
    return noise_addition.matrix_factorization_privatizer(
        MATRICES[matrix](),
        **{"stddev": 1.0, "prng_key": 3, "implementation": implementation, **kwargs},
        intermediate_strategy=SupportedStrategies[strategy],
    )


def model(names=tuple(SHAPES), dtype=jnp.float32):
    numbers = np.random.default_rng(1)
    return {name: jnp.asarray(numbers.normal(size=SHAPES[name]), dtype) for name in names}


def on_mesh(tree, mesh, axes):
    specs = SPECS[axes]
    return {k: jax.device_put(x, NamedSharding(mesh, specs.get(k, P()))) for k, x in tree.items()}


def run(privatizer, grads, steps=STEPS, state=None):
    """The gradients after every step, and the last state."""
    state = privatizer.init(grads) if state is None else state
    update = jax.jit(privatizer.update, donate_argnums=1)
    outs = []
    for _ in range(steps):
        out, state = update(grads, state)
        outs.append(jax.tree.map(np.asarray, out))
        for name, x in out.items():
            assert not x.size or x.sharding.is_equivalent_to(grads[name].sharding, x.ndim), name
    return outs, state


@functools.cache
def on_one_device(matrix, implementation, names):
    outs, state = run(privatizer(matrix, implementation), model(names))
    return outs, jax.tree.map(np.asarray, state)


def assert_same(implementation, actual, expected):
    """XLA rounds the sums of the JAX implementation as it likes."""
    if implementation == "cpp":
        jax.tree.map(np.testing.assert_array_equal, actual, expected)
    else:
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
        jax.tree.map(close, actual, expected)


def program(privatizer, grads):
    """What XLA makes of a step."""
    update = jax.jit(privatizer.update, donate_argnums=1)
    return update.lower(grads, privatizer.init(grads)).compile().as_text()


def collectives(hlo):
    found = rf"= (.+?) ({'|'.join(COLLECTIVES)})(?:-start)?\("
    return [
        (kind, shape)
        for shapes, kind in re.findall(found, hlo)
        for shape in re.findall(r"[a-z]+\d+\[[\d,]*\]", shapes)
    ]


def cases():
    """Every mechanism and mesh compiled; a few in plain JAX, which takes long to compile.

    By default every mechanism has one mesh.
    """
    for i, matrix in enumerate(MATRICES):
        for j, axes in enumerate(MESHES):
            nightly = () if j == i % len(MESHES) else (pytest.mark.nightly,)
            yield pytest.param("cpp", matrix, axes, marks=(needs_cpp, *nightly))
    yield from (("jax", matrix, "xy") for matrix in ("banded", "buffered"))
    yield pytest.param("jax", "inverse banded", "xy", marks=pytest.mark.nightly)
    yield pytest.param("jax", "prefix", "x", marks=pytest.mark.nightly)
    yield "jax", "dense", "x"


@pytest.mark.parametrize("strategy", ["DEFAULT", "ZERO"])
def test_lowering_for_a_mesh_that_is_not_here(strategy):
    mesh = jax.sharding.AbstractMesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    sharding = NamedSharding(mesh, P("x", None))
    grads = {"w": jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=sharding)}
    mechanism = privatizer(strategy=strategy)
    with jax.sharding.use_abstract_mesh(mesh):
        state = jax.eval_shape(mechanism.init, grads)
        traced = jax.jit(mechanism.update).trace(grads, state)
        text = traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "sdy.manual_computation" in text


@pytest.mark.usefixtures("eight_devices")
class TestEightDevices:
    # -- The same noise -----------------------------------------------------------------------

    @pytest.mark.each_value
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(("implementation", "matrix", "axes"), list(cases()))
    def test_noise_is_that_of_one_device(self, implementation, matrix, axes, kind):
        names = tuple(SHAPES) if implementation == "cpp" else SMALL
        mesh = mesh_of(axes, kind)
        with within(mesh):
            grads = on_mesh(model(names), mesh, axes)
            outs, state = run(privatizer(matrix, implementation), grads)
        expected, last = on_one_device(matrix, implementation, names)
        assert_same(implementation, outs, expected)
        assert_same(implementation, jax.tree.map(np.asarray, state), last)

    @pytest.mark.parametrize("kind", KINDS)
    def test_samples_in_plain_jax_are_those_of_one_device(self, kind):
        mesh = mesh_of("xyz", kind)
        with within(mesh):
            outs, _ = run(privatizer("identity", "jax"), on_mesh(model(), mesh, "xyz"), 2)
        expected, _ = on_one_device("identity", "jax", tuple(SHAPES))
        jax.tree.map(np.testing.assert_array_equal, outs, expected[:2])

    @pytest.mark.each_value
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
    def test_dtypes(self, dtype, kind):
        with jax.enable_x64(dtype == "float64"):
            mechanism = privatizer("prefix", dtype=jnp.promote_types(dtype, jnp.float32))
            expected, _ = run(mechanism, model(dtype=dtype), 5)
            mesh = mesh_of("xy", kind)
            with within(mesh):
                outs, _ = run(mechanism, on_mesh(model(dtype=dtype), mesh, "xy"), 5)
            jax.tree.map(np.testing.assert_array_equal, outs, expected)

    @pytest.mark.parametrize("kind", KINDS)
    def test_keys_that_do_not_count(self, kind):
        """All of a leaf is sampled everywhere, there is no other way."""
        mechanism = privatizer(prng_key=jax.random.key(5, impl="rbg"))
        expected, _ = run(mechanism, model(SMALL), 6)
        mesh = mesh_of("xy", kind)
        with within(mesh):
            outs, _ = run(mechanism, on_mesh(model(SMALL), mesh, "xy"), 6)
        assert_same("jax", outs, expected)

    @pytest.mark.each_value
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        ("implementation", "matrix"),
        [
            pytest.param("cpp", "banded", marks=needs_cpp),
            pytest.param("cpp", "dense", marks=needs_cpp),
            ("jax", "two bands"),
        ],
    )
    def test_chacha20(self, implementation, matrix, kind):
        mechanism = privatizer(matrix, implementation, prng_key=random.secure_key(bytes(range(32))))
        names = tuple(SHAPES) if implementation == "cpp" else SMALL
        expected, _ = run(mechanism, model(names), 6)
        mesh = mesh_of("xyz", kind)
        with within(mesh):
            outs, _ = run(mechanism, on_mesh(model(names), mesh, "xyz"), 6)
        assert_same(implementation, outs, expected)

    @pytest.mark.parametrize("kind", KINDS)
    def test_scan(self, kind):
        mechanism = privatizer()
        mesh = mesh_of("xy", kind)

        def all_steps(grads):
            def step(state, _):
                return mechanism.update(grads, state)[::-1]

            return jax.lax.scan(step, mechanism.init(grads), length=STEPS)[1]

        with within(mesh):
            outs = jax.jit(all_steps)(on_mesh(model(), mesh, "xy"))
        outs = jax.tree.map(np.asarray, outs)  # JAX 0.10 cannot slice empty ones without the mesh
        expected, _ = on_one_device("banded", None, tuple(SHAPES))
        for t, want in enumerate(expected):
            assert_same("cpp", jax.tree.map(lambda x, t=t: x[t], outs), want)

    def test_layouts_that_no_spec_can_say(self):
        """XLA splits a dimension of 4 over half of an axis of 8, and another over the rest."""
        mesh, mechanism = mesh_of("x", "automatic"), privatizer()
        expected, _ = run(mechanism, {"w": jnp.ones((64, 4, 64))}, 6)

        @functools.partial(jax.jit, donate_argnums=1)
        def step(flat, state):
            flat = jax.lax.with_sharding_constraint(flat, NamedSharding(mesh, P(None, "x")))
            return mechanism.update({"w": flat.reshape(64, 4, 64)}, state)

        state = mechanism.init({"w": jnp.ones((64, 4, 64))})
        for want in expected:
            out, state = step(jnp.ones((64, 256)), state)
            np.testing.assert_array_equal(out["w"], want["w"])

    def test_programs_with_other_noise_are_others(self, tmp_path):
        """To JAX's cache on disk, which sees nothing of what the partitioner calls."""
        mesh = mesh_of("x", "automatic")
        grads = on_mesh(model(("flat",), jnp.bfloat16), mesh, "x")
        config = {
            "jax_compilation_cache_dir": str(tmp_path),
            "jax_persistent_cache_min_compile_time_secs": 0,
            "jax_persistent_cache_min_entry_size_bytes": -1,
            "jax_remove_custom_partitioning_ptr_from_cache_key": True,
        }
        before = {name: getattr(jax.config, name) for name in config}
        try:
            for name, value in config.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()  # JAX opens one directory, and stays there
            for dtype in ("float32", "bfloat16") * 2:
                jax.clear_caches()
                mechanism = privatizer(dtype=dtype)
                outs, _ = run(mechanism, grads, 2)
                expected, _ = run(mechanism, model(("flat",), jnp.bfloat16), 2)
                jax.tree.map(np.testing.assert_array_equal, outs, expected)
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()
            jax.clear_caches()

    @pytest.mark.parametrize("kind", KINDS)
    def test_noise_is_that_of_the_configuration_it_was_traced_in(self, kind):
        mesh, mechanism = mesh_of("xy", kind), privatizer()
        expected, _ = on_one_device("banded", None, SMALL)
        with within(mesh):
            grads = on_mesh(model(SMALL), mesh, "xy")
            state = mechanism.init(grads)
            lowered = jax.jit(mechanism.update).lower(grads, state)
            with jax.threefry_partitionable(False), jax.enable_x64(True):
                step = lowered.compile()
            out, _ = step(grads, state)
        jax.tree.map(np.testing.assert_array_equal, out, expected[0])

    @pytest.mark.each_value
    @pytest.mark.parametrize("kind", [None, *KINDS])
    @pytest.mark.parametrize("matrix", ["banded", "dense"])
    def test_derivatives(self, matrix, kind):
        mechanism = privatizer(matrix)

        def loss(grads, state):
            out, _ = mechanism.update(grads, state)
            return sum((x**2).sum() for x in jax.tree.leaves(out))

        mesh = mesh_of("xy", kind) if kind else None
        with within(mesh) if mesh else contextlib.nullcontext():
            grads = on_mesh(model(SMALL), mesh, "xy") if mesh else model(SMALL)
            state = mechanism.init(grads)
            found = jax.jit(jax.grad(loss))(grads, state)
            out, _ = mechanism.update(grads, state)
        for name in SMALL:
            np.testing.assert_allclose(found[name], 2 * out[name], rtol=1e-4, atol=1e-4)

    @pytest.mark.filterwarnings("ignore:.*GSPMD.*")
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_older_partitioner(self, kind):
        shardy = jax.config.jax_use_shardy_partitioner
        mesh = mesh_of("xy", kind)
        jax.config.update("jax_use_shardy_partitioner", False)
        try:
            with within(mesh):
                grads = on_mesh(model(), mesh, "xy")
                outs, _ = run(privatizer(), grads)
                assert not collectives(program(privatizer(), grads))
        finally:
            jax.config.update("jax_use_shardy_partitioner", shardy)
        assert_same("cpp", outs, on_one_device("banded", None, tuple(SHAPES))[0])

    def test_blocks_that_do_not_divide_a_leaf(self):
        """They reach beyond it, inside of a program with automatic axes."""
        mesh, mechanism = mesh_of("xy", "automatic"), privatizer()
        grads = {"a": jnp.ones((10, 7)), "b": jnp.ones((2050, 3))}
        specs = {"a": P("x", "y"), "b": P(("x", "y"))}

        @jax.jit
        def steps(grads):
            state, outs = mechanism.init(grads), []
            for _ in range(6):
                grads = {
                    k: jax.lax.with_sharding_constraint(g, NamedSharding(mesh, specs[k]))
                    for k, g in grads.items()
                }
                out, state = mechanism.update(grads, state)
                outs.append(out)
            return outs

        expected, _ = run(mechanism, grads, 6)
        jax.tree.map(np.testing.assert_array_equal, steps(grads), expected)

    @needs_cpp
    @pytest.mark.parametrize(
        "matrix",
        sweeps.cases(
            ["banded", "by row", "inverse banded", "buffered", "dense"],
            ["banded", "buffered", "dense"],
        ),
    )
    def test_state_moves_between_meshes(self, matrix):
        """In the middle of a cycle of the look-ahead, too: before, while and after all warm up."""
        mechanism = privatizer(matrix)
        expected, _ = on_one_device(matrix, None, tuple(SHAPES))
        state, outs = None, []
        for axes, kind in (
            ("x", "explicit"),
            ("xyz", "automatic"),
            (None, None),
            ("xy", "explicit"),
        ):
            mesh = mesh_of(axes, kind) if axes else None
            with within(mesh) if mesh else contextlib.nullcontext():
                grads = on_mesh(model(), mesh, axes) if mesh else model()
                like = mechanism.init(grads)
                if state is not None:
                    state = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), state, like)
                some, state = run(mechanism, grads, 3, state)
            outs += some
            state = jax.tree.map(np.asarray, state)
        assert_same("cpp", outs, expected)

    # -- No more than is needed ---------------------------------------------------------------

    @pytest.mark.each_value
    @needs_cpp
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("axes", MESHES)
    @pytest.mark.parametrize("matrix", MATRICES)
    def test_nothing_is_communicated(self, matrix, axes, kind):
        mesh = mesh_of(axes, kind)
        with within(mesh):
            hlo = program(privatizer(matrix), on_mesh(model(), mesh, axes))
        assert not collectives(hlo)
        op = "dense_noise" if matrix == "dense" else "correlated_noise"
        assert hlo.count(f"jpk_{op}") >= 1

    @pytest.mark.parametrize("kind", KINDS)
    def test_nothing_is_communicated_in_plain_jax(self, kind):
        mesh = mesh_of("xy", kind)
        with within(mesh):
            assert not collectives(
                program(privatizer("banded", "jax"), on_mesh(model(SMALL), mesh, "xy"))
            )

    @needs_cpp
    @pytest.mark.parametrize("kind", KINDS)
    def test_donated_state_is_updated_in_place(self, kind):
        mesh = mesh_of("xy", kind)
        with within(mesh):
            grads = on_mesh(model(), mesh, "xy")
            hlo = program(privatizer(), grads)
        copies = [line for line in hlo.splitlines() if " copy(" in line or "copy-start" in line]
        for name in ("rows", "columns", "thin", "middle", "flat"):
            local = grads[name].sharding.shard_shape(grads[name].shape)
            ring = f"f32[4,{','.join(map(str, local))}]"
            assert ring in hlo
            assert not [line for line in copies if ring in line]

    @pytest.mark.parametrize("matrix", ["banded", "buffered", "prefix"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_state_is_laid_out_as_the_gradients(self, matrix, kind):
        mesh = mesh_of("xy", kind)
        mechanism = privatizer(matrix)
        with within(mesh):
            grads = on_mesh(model(), mesh, "xy")
            states = [mechanism.init(grads), run(mechanism, grads, 1)[1]]
            if kind == "explicit":
                structs = jax.tree.map(
                    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), grads
                )
                states.append(mechanism.init(structs))
                states.append(jax.jit(mechanism.init)(grads))
        for state in states:
            for path, x in jax.tree_util.tree_leaves_with_path(state):
                name = path[-1].key if isinstance(path[-1], jax.tree_util.DictKey) else None
                used = re.findall("[xy]", str(SPECS["xy"].get(name, "")).removeprefix("P"))
                parts = np.prod([mesh.shape[axis] for axis in used], dtype=int) if x.size else 1
                assert x.addressable_shards[0].data.size * parts == x.size, path

    def test_collectives_are_seen(self):
        mesh = mesh_of("x", "automatic")

        def communicate(x, y):
            x, y = jax.lax.psum((x, y), "x")
            gathered = jax.lax.all_gather(x, "x")
            return jax.lax.all_to_all(gathered, "x", 0, 0, tiled=True), y

        shared = jax.shard_map(
            communicate, mesh=mesh, in_specs=P("x"), out_specs=P(), check_vma=False
        )
        hlo = jax.jit(shared).lower(jnp.zeros((64, 3)), jnp.zeros(64)).compile().as_text()
        assert {kind for kind, _ in collectives(hlo)} >= {"all-reduce", "all-to-all"}

    # -- ZeRO ---------------------------------------------------------------------------------

    @pytest.mark.each_value
    @pytest.mark.parametrize("axes", MESHES)
    @pytest.mark.parametrize("matrix", MATRICES)
    def test_zero_is_the_same_noise_elsewhere(self, matrix, axes):
        """Over all steps: what a parameter gets is the series of noise of one parameter."""
        mechanism, mesh = privatizer(matrix, strategy="ZERO"), mesh_of(axes)
        names = [
            name for name, shape in SHAPES.items() if np.prod(shape) % 8 == 0 and 0 not in shape
        ]
        grads = {name: jnp.zeros(SHAPES[name]) for name in names}
        expected, _ = run(privatizer(matrix), grads)
        with jax.set_mesh(mesh):
            outs, state = run(mechanism, on_mesh(grads, mesh, axes))
            places = {
                name: np.asarray(sharding_utils.local_reshape_add(x, jnp.arange(x.size))).ravel()
                for name, x in on_mesh(
                    {name: x.astype(int) for name, x in grads.items()}, mesh, axes
                ).items()
            }
        for name in names:
            found, want = (
                np.stack([out[name].ravel() for out in series]) for series in (outs, expected)
            )
            np.testing.assert_allclose(found, want[:, places[name]], rtol=1e-6, atol=1e-6)
            assert (np.sort(places[name]) == np.arange(found.shape[1])).all()
            if name not in SPECS[axes]:  # replicated gradients have it in the order of one device
                assert (np.diff(places[name]) == 1).all()
        rings = [x for x in jax.tree.leaves(state) if x.size >= 1024]
        if matrix not in ("dense", "identity"):
            assert len(rings) >= len(names)
        for ring in rings:
            assert P(ring.sharding.spec[-1]) in (P(mesh.axis_names), P(*mesh.axis_names))
            assert ring.addressable_shards[0].data.nbytes == ring.nbytes // 8

    @pytest.mark.parametrize("axes", MESHES)
    def test_zero_pads(self, axes):
        """Sizes that eight do not divide: every parameter gets noise, and all of them others."""
        mesh, mechanism = mesh_of(axes), privatizer(strategy="ZERO")
        with jax.set_mesh(mesh):
            grads = on_mesh({"scalar": jnp.zeros(()), "odd": jnp.zeros((7, 5))}, mesh, axes)
            outs, state = run(mechanism, grads)
        assert state.inner["scalar"].shape == (4, 8)
        assert state.inner["odd"].shape == (4, 40)
        values = np.concatenate([x.ravel() for out in outs for x in out.values()])
        assert len(np.unique(values)) == len(values) == 36 * STEPS
        assert 0.5 < values.std() < 2

    def test_zero_adds_in_the_dtype_of_the_gradients(self):
        mesh = mesh_of("xy")
        mechanism = privatizer("identity", strategy="ZERO", dtype=jnp.float32)
        with jax.set_mesh(mesh):
            outs, _ = run(mechanism, on_mesh(model(("odd",), jnp.bfloat16), mesh, "xy"), 2)
        flat = {"odd": jnp.zeros(40, jnp.float32)}
        noise, _ = run(privatizer("identity"), flat, 2)
        for out, z in zip(outs, noise, strict=True):
            grad = model(("odd",), jnp.bfloat16)["odd"]
            want = (grad + z["odd"][:35].reshape(7, 5)).astype(jnp.bfloat16)
            np.testing.assert_array_equal(out["odd"], want)

    @needs_cpp
    @pytest.mark.parametrize("matrix", ["banded", "buffered", "dense", "prefix"])
    def test_zero_communicates_the_noise_alone(self, matrix):
        """To replicas. Gradients that are split as the noise is need none."""
        mesh = mesh_of("xy")
        with jax.set_mesh(mesh):
            put = functools.partial(jax.device_put, jnp.zeros((16, 1024)))
            mechanism = privatizer(matrix, strategy="ZERO")
            split = {"w": put(NamedSharding(mesh, P("x", "y")))}
            assert not collectives(program(mechanism, split))
            replicated = {"w": put(NamedSharding(mesh, P()))}
            found = collectives(program(mechanism, replicated))
        assert found
        for kind, shape in found:
            assert kind == "all-gather"
            assert np.prod([int(n) for n in re.findall(r"\d+", shape[3:])]) <= 16 * 1024

    @pytest.mark.parametrize("strategy", ["DEFAULT", "ZERO"])
    def test_no_mesh_is_set(self, strategy):
        """The gradients are on one all the same."""
        mechanism, mesh = privatizer(strategy=strategy), mesh_of("xy")
        grads = on_mesh(model(("rows",)), mesh, "xy")
        with jax.set_mesh(mesh):
            expected, _ = run(mechanism, grads, 3)
        outs, state = run(mechanism, grads, 3)
        jax.tree.map(np.testing.assert_array_equal, outs, expected)
        structs = {
            "rows": jax.ShapeDtypeStruct((16, 700), jnp.float32, sharding=grads["rows"].sharding)
        }
        starts = [mechanism.init(grads), mechanism.init(structs)]
        if strategy == "DEFAULT":
            starts.append(jax.jit(mechanism.init)(grads))
        for start in starts:
            here = [
                x.addressable_shards[0].data.shape for x in jax.tree.leaves(start) if x.size > 999
            ]
            assert here == [
                x.addressable_shards[0].data.shape for x in jax.tree.leaves(state) if x.size > 999
            ]
            assert [np.prod(shape) for shape in here] == [4 * 16 * 700 // 8]
            _, moved = mechanism.update(grads, start)  # not compiled as a whole
            assert jax.tree.structure(moved) == jax.tree.structure(state)
        if strategy == "ZERO":
            with pytest.raises(ValueError, match="set_mesh"):
                jax.jit(mechanism.init)(grads)

    # -- What cannot be ------------------------------------------------------------------------

    def test_zero_needs_explicit_axes(self):
        mechanism, grads = privatizer(strategy="ZERO"), {"a": {"w": jnp.zeros(16)}}
        with pytest.raises(ValueError, match=r"ZERO, leaf \['a'\]\['w'\].*mesh"):
            mechanism.init(grads)
        mesh = mesh_of("x", "automatic")
        spread = {"a": {"w": jax.device_put(grads["a"]["w"], NamedSharding(mesh, P("x")))}}
        with pytest.raises(RuntimeError, match=r"ZERO, leaf \['a'\]\['w'\].*explicit"):
            mechanism.init(spread)
        with jax.set_mesh(mesh_of("x")):
            explicit = {"a": {"w": jnp.zeros(16)}}
            state = mechanism.init(explicit)
        with pytest.raises(ValueError, match=r"ZERO, leaf \['a'\]\['w'\].*mesh"):
            mechanism.update(grads, state)

    @pytest.mark.parametrize("strategy", ["DEFAULT", "ZERO"])
    @pytest.mark.parametrize("matrix", ["banded", "identity", "prefix"])
    def test_a_mesh_that_changes(self, matrix, strategy):
        mechanism, grads = privatizer(matrix, strategy=strategy), model(("flat",))
        with jax.set_mesh(mesh_of("x")):
            state = mechanism.init(on_mesh(grads, mesh_of("x"), "x"))
        with jax.set_mesh(mesh_of("xy")):
            moved = on_mesh(grads, mesh_of("xy"), "xy")
            for update in (mechanism.update, jax.jit(mechanism.update)):
                with pytest.raises(ValueError, match=r"\['flat'\].*'x': 4, 'y': 2.*'x': 8"):
                    update(moved, state)

    @pytest.mark.parametrize("matrix", ["banded", "dense", "prefix"])
    def test_gradients_on_no_mesh_are_replicated(self, matrix):
        mechanism, grads = privatizer(matrix), model(SMALL)
        expected, _ = on_one_device(matrix, None, SMALL)
        before = mechanism.init(grads)
        with jax.set_mesh(mesh_of("xy")):
            out, state = mechanism.update(grads, mechanism.init(grads))
            jax.tree.map(np.testing.assert_array_equal, out, expected[0])
            out, _ = jax.jit(mechanism.update)(grads, state)
            jax.tree.map(np.testing.assert_array_equal, out, expected[1])
            out, _ = jax.jit(mechanism.update)(grads, before)
            jax.tree.map(np.testing.assert_array_equal, out, expected[0])

    @pytest.mark.parametrize("matrix", ["banded", "dense", "prefix"])
    def test_shards_that_would_share_their_noise(self, matrix):
        """In a shard_map of the caller's, where they cannot be told from leaves."""
        mechanism, grads = privatizer(matrix), model(("flat",))
        mesh = mesh_of("x", "automatic")
        state = mechanism.init({"flat": grads["flat"][: 9 * 128]})

        def step(grads):
            return mechanism.update(grads, state)[0]

        local = jax.shard_map(step, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
        with pytest.raises(ValueError, match=r"\['flat'\].*same over the axes \['x'\]"):
            jax.jit(local)(grads)

    @pytest.mark.parametrize("matrix", ["banded", "dense", "prefix"])
    def test_shards_of_one_key_with_stddevs_of_their_own(self, matrix):
        """The difference of two outputs would be known noise, and so the gradient."""

        def step(stddevs):
            mechanism, grads = privatizer(matrix, stddev=stddevs[0]), jnp.zeros(1500)
            return mechanism.update(grads, mechanism.init(grads))[0]

        local = functools.partial(
            jax.shard_map, step, mesh=mesh_of("x", "automatic"), in_specs=P("x"), out_specs=P("x")
        )
        with pytest.raises(ValueError, match=r"the stddev and .* over the axes \['x'\]"):
            jax.jit(local())(jnp.arange(1.0, 9.0))
        assert np.isnan(jax.jit(local(check_vma=False))(jnp.arange(1.0, 9.0))).all()
        same = jax.jit(local(check_vma=False))(jnp.ones(8)).reshape(8, 1500)
        assert np.isfinite(same).all()
        assert len(np.unique(same[:, 0])) == 1

    @pytest.mark.each_value
    @pytest.mark.parametrize("matrix", ["banded", "dense", "prefix"])
    @pytest.mark.parametrize("through", ["shard_map", "pmap"])
    def test_shards_that_would_share_their_noise_where_types_do_not_tell(self, through, matrix):
        """Their noise is NaN; replicas, and shards with keys of their own, have theirs."""

        def step(grads, key, summed):
            mechanism = privatizer(matrix, prng_key=key)
            state = mechanism.init(grads)
            grads = jax.lax.psum(grads, "x") if summed else grads
            return mechanism.update(grads, state)[0]

        def on_devices(keys, summed=False):
            def one(grads, keys):
                out = step(*jax.tree.map(lambda x: x[0], (grads, keys)), summed)
                return jax.tree.map(lambda x: x[None], out)

            if through == "pmap":
                return jax.pmap(functools.partial(step, summed=summed), "x")(grads, keys)
            mesh, specs = mesh_of("x", "automatic"), {"in_specs": P("x"), "out_specs": P("x")}
            return jax.jit(jax.shard_map(one, mesh=mesh, check_vma=False, **specs))(grads, keys)

        grads = {"w": jnp.arange(8 * 1500.0).reshape(8, 1500), "v": jnp.zeros((8, 3))}
        keys = jax.random.split(jax.random.key(0), 8)
        one_key = keys[jnp.zeros(8, int)]
        assert all(np.isnan(out).all() for out in jax.tree.leaves(on_devices(one_key)))
        total = jax.tree.map(lambda x: x.sum(axis=0), grads)
        expected = step(total, keys[0], summed=False)
        for replica in zip(*jax.tree.leaves(on_devices(one_key, summed=True)), strict=True):
            for found, want in zip(replica, jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)
        assert len(np.unique(on_devices(keys)["v"])) == 24
        two_alike = np.isnan(on_devices(keys.at[5].set(keys[2]))["v"]).all(axis=1)
        assert np.flatnonzero(two_alike).tolist() == [2, 5]

    def test_a_state_that_is_laid_out_otherwise(self):
        mechanism, grads, mesh = privatizer(), model(("flat",)), mesh_of("x")
        with jax.set_mesh(mesh):
            state = mechanism.init(on_mesh(grads, mesh, "x"))
            replicated = {"flat": jax.device_put(grads["flat"], NamedSharding(mesh, P()))}
            with pytest.raises(ValueError, match=r"leaf \['flat'\] to be laid out.*\(None, None\)"):
                mechanism.update(replicated, state)

    def test_zero_state_for_other_shards(self):
        """The layout of the gradients says which noise is whose."""
        mechanism, mesh = privatizer(strategy="ZERO"), mesh_of("xy")
        with jax.set_mesh(mesh):
            grads = {"w": jnp.zeros((16, 8))}
            state = mechanism.init(grads)
            for spec in (P("x"), P(None, "y"), P("x", "y")):
                moved = {"w": jax.device_put(grads["w"], NamedSharding(mesh, spec))}
                with pytest.raises(ValueError, match="gradients that are split into other"):
                    mechanism.update(moved, state)

    def test_zero_state_of_another_mesh(self):
        mechanism = privatizer(strategy="ZERO")
        with jax.set_mesh(jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))):
            state = mechanism.init({"w": jnp.zeros((7, 5))})
        message = r"mesh of leaf \['w'\], \{'x': 8\}, found it on \{'x': 2\}"
        with jax.set_mesh(mesh_of("x")), pytest.raises(ValueError, match=message):
            mechanism.update({"w": jnp.zeros((7, 5))}, state)

    @pytest.mark.parametrize("strategy", ["DEFAULT", "ZERO"])
    def test_gradients_that_have_yet_to_be_summed_up(self, strategy):
        mechanism, mesh = privatizer(strategy=strategy), mesh_of("xy")
        with jax.set_mesh(mesh):
            state = mechanism.init({"w": jnp.zeros((8, 8))})
            a, b = (
                jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, spec))
                for spec in (P(None, "x"), P("x", None))
            )

            def update(a, b):
                unreduced = P(None, None, unreduced={"x"})
                grad = jnp.einsum("ij,jk->ik", a, b, out_sharding=unreduced)
                return mechanism.update({"w": grad}, state)

            with pytest.raises(ValueError, match=r"leaf \['w'\].*summed up.*unreduced.*\['x'\]"):
                jax.jit(update)(a, b)

    def test_an_axis_that_is_not_there(self):
        with pytest.raises(ValueError, match="nowhere"):
            NamedSharding(mesh_of("x"), P("nowhere"))  # there is no array with such a spec

    @needs_cpp
    def test_export_for_eight_devices(self):
        """With explicit axes all is as it was; automatic ones are not known, and noise is whole."""
        mechanism = privatizer()
        for kind in KINDS:
            mesh = mesh_of("xy", kind)
            with within(mesh):
                grads = on_mesh(model(SMALL), mesh, "xy")
                state = mechanism.init(grads)
                disabled = [jax.export.DisabledSafetyCheck.custom_call("jpk_correlated_noise")]
                exported = jax.export.export(jax.jit(mechanism.update), disabled_checks=disabled)
                out, _ = jax.jit(exported(grads, state).call)(grads, state)
            expected, _ = on_one_device("banded", None, SMALL)
            jax.tree.map(np.testing.assert_array_equal, out, expected[0])
