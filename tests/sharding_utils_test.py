"""Sharding utilities, on one device and on eight."""

from __future__ import annotations

import contextlib
import re
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_privacy_kernels.sharding_utils import (
    compute_early_stopping_order,
    flatten_with_zero_redundancy,
    local_reshape_add,
    parallel_sample_pytree,
)

MESHES = {"x": (8,), "xy": (4, 2), "xyz": (2, 2, 2)}

# Mesh, shape and spec. Sizes are multiples of 8, and not; specs in the mesh's order, and not.
LAYOUTS = [
    ("x", (), P()),
    ("x", (5,), P()),
    ("x", (3, 5), P(None, None)),
    ("x", (16,), P("x")),
    ("x", (3, 8), P(None, "x")),
    ("xy", (), P()),
    ("xy", (4, 3), P("x")),
    ("xy", (4, 6), P("x", "y")),
    ("xy", (2, 4, 3), P("y", "x", None)),
    ("xy", (3, 2), P(None, "y")),
    ("xy", (8, 3), P(("x", "y"))),
    ("xy", (8,), P(("y", "x"))),
    ("xyz", (3,), P()),
    ("xyz", (2, 5), P("y")),
    ("xyz", (3, 2, 2), P(None, "z", "x")),
    ("xyz", (2, 3, 4), P("x", None, ("y", "z"))),
    ("xyz", (2, 2, 2), P("x", "y", "z")),
    ("xyz", (8, 1), P(("z", "x", "y"))),
]

# Of every mesh those that are replicated, split along some dimension, and split along all axes.
FEW = [LAYOUTS[i] for i in (1, 4, 5, 8, 10, 12, 15, 17)]

layouts = pytest.mark.parametrize(("axes", "shape", "spec"), LAYOUTS, ids=str)
few_layouts = pytest.mark.parametrize(
    ("axes", "shape", "spec"),
    [
        pytest.param(*layout, marks=() if layout in FEW else pytest.mark.nightly)
        for layout in LAYOUTS
    ],
    ids=str,
)


def mesh_of(axes, kind=AxisType.Explicit):
    return jax.make_mesh(MESHES[axes], tuple(axes), axis_types=(kind,) * len(axes))


def one_device(kind=AxisType.Explicit):
    return jax.make_mesh((1,), ("x",), axis_types=(kind,))


def flat(mesh, values):
    return jax.device_put(jnp.asarray(values), NamedSharding(mesh, P(mesh.axis_names)))


def spec_axes(spec):
    return [axis for entry in spec for axis in entry or ()]  # axes have names of one letter


@pytest.fixture(params=[False, True], ids=["no mesh set", "mesh set"])
def within(request):
    return jax.set_mesh if request.param else lambda mesh: contextlib.nullcontext()


@pytest.fixture(scope="module")
def reference():
    return pytest.importorskip("jax_privacy.sharding_utils")


# -- Early stopping ---------------------------------------------------------------------------


@pytest.mark.parametrize("microbatch_size", [1, 2, 3, 4, 6, 12])
def test_microbatches_take_examples_in_order(microbatch_size):
    order = compute_early_stopping_order(12, microbatch_size)
    assert order.dtype == np.int64
    batches = optax.microbatching.reshape_batch_axis(order, microbatch_size)
    np.testing.assert_array_equal(batches, np.arange(12).reshape(-1, microbatch_size))


@pytest.mark.parametrize(
    "sizes", [(1, 1), (1, None), (12, None), (12, 3), (0, None), (0, 4), (np.int64(8), np.int32(2))]
)
def test_order_is_that_of_the_reference(reference, sizes):
    order, expected = (
        lib(*sizes)
        for lib in (compute_early_stopping_order, reference.compute_early_stopping_order)
    )
    np.testing.assert_array_equal(order, expected)
    assert order.dtype == expected.dtype


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ((-4, 2), ValueError, "expected batch_size >= 0, found batch_size=-4"),
        ((4, 0), ValueError, "expected microbatch_size >= 1, found microbatch_size=0"),
        (
            (10, 4),
            ValueError,
            "multiple of microbatch_size, found batch_size=10, microbatch_size=4",
        ),
        ((4.5, 2), TypeError, "expected batch_size to be an integer, found 4.5"),
        ((4, 2.5), TypeError, "expected microbatch_size to be an integer, found 2.5"),
    ],
)
def test_order_of_wrong_sizes(sizes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        compute_early_stopping_order(*sizes)


# -- One device -------------------------------------------------------------------------------


def test_on_one_device(within):
    mesh = one_device()
    with within(mesh):
        x = jax.device_put(jnp.arange(6.0).reshape(2, 3), NamedSharding(mesh, P(None, "x")))
        assert flatten_with_zero_redundancy(x).shape == (6,)
        z = local_reshape_add(x, flat(mesh, 10.0 * np.arange(9)))
        np.testing.assert_array_equal(z, 11 * np.arange(6).reshape(2, 3))
        sample = parallel_sample_pytree(np.random.default_rng(0), x)
    assert sample.sharding == x.sharding
    # As one leaf on one device spawns.
    rng = np.random.default_rng(0).spawn(1)[0].spawn(1)[0]
    expected = rng.standard_normal(6, np.float32).reshape(2, 3)
    np.testing.assert_array_equal(sample, expected)


def test_leaves_that_are_drawn_whole():
    struct = {
        "struct": jax.ShapeDtypeStruct((2, 3), jnp.float32),
        "numpy": np.zeros(4),
        "array": jnp.zeros((), jnp.float32),
        "empty": jax.ShapeDtypeStruct((3, 0), jnp.float32),
        "none": None,
    }
    sample = parallel_sample_pytree(np.random.default_rng(1), struct)
    array, empty, values, leaf = np.random.default_rng(1).spawn(4)  # in order of the names
    np.testing.assert_array_equal(sample["array"], array.standard_normal((), np.float32))
    np.testing.assert_array_equal(sample["empty"], empty.standard_normal((3, 0), np.float32))
    np.testing.assert_array_equal(
        sample["numpy"], values.standard_normal(4).astype(sample["numpy"].dtype)
    )
    np.testing.assert_array_equal(sample["struct"], leaf.standard_normal((2, 3), np.float32))
    assert sample["none"] is None
    assert sample["array"].sharding == struct["array"].sharding


def test_no_leaves():
    assert parallel_sample_pytree(np.random.default_rng(0), {}) == {}


def test_calls_and_leaves_are_independent():
    rng = np.random.default_rng(2)
    struct = [jax.ShapeDtypeStruct((50,), jnp.float32)] * 2
    samples = np.ravel([parallel_sample_pytree(rng, struct) for _ in range(2)])
    assert np.unique(samples).size == 200
    other = np.random.default_rng(2)  # whose own numbers are left alone
    assert rng.random() == other.random()


def test_samples_are_cast_to_the_leaf():
    def sampler(rng, size, dtype):
        assert dtype == jnp.bfloat16
        return rng.standard_normal(size, np.float32)

    for sharding in (None, NamedSharding(one_device(), P())):
        leaf = jax.ShapeDtypeStruct((4,), jnp.bfloat16, sharding=sharding)
        sample = parallel_sample_pytree(np.random.default_rng(0), leaf, sampler)
        assert sample.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "array", [np.zeros(3), jnp.zeros(3), jax.ShapeDtypeStruct((3,), np.float32)]
)
def test_an_array_without_mesh(array):
    with pytest.raises(ValueError, match=r"expected abstract_array to .* over a mesh, found none"):
        flatten_with_zero_redundancy(array)
    if not isinstance(array, jax.ShapeDtypeStruct):
        with pytest.raises(ValueError, match=r"expected x to .* over a mesh, found none"):
            local_reshape_add(array, array)


def test_automatic_axes(within):
    mesh = one_device(AxisType.Auto)
    with within(mesh):
        x = jax.device_put(jnp.zeros(3), NamedSharding(mesh, P()))
        for name, call in {
            "abstract_array": lambda: flatten_with_zero_redundancy(x),
            "x": lambda: local_reshape_add(x, x),
            "struct['w']": lambda: parallel_sample_pytree(np.random.default_rng(0), {"w": x}),
        }.items():
            message = f"expected the mesh of {name} to have explicit axes only, found x: 1 ("
            with pytest.raises(RuntimeError, match=re.escape(message)):
                call()


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.zeros((3, 3)), "expected y to be 1-D, found shape (3, 3)"),
        (np.zeros(()), "expected y to be 1-D, found shape ()"),
        (np.zeros(5), "expected y to have at least the 6 elements of x, found 5"),
    ],
)
def test_a_y_that_does_not_fit(y, message):
    mesh = one_device()
    x = jax.device_put(jnp.zeros((2, 3)), NamedSharding(mesh, P()))
    y = jax.device_put(y, NamedSharding(mesh, P()))
    for add in (local_reshape_add, jax.jit(local_reshape_add)):
        with pytest.raises(ValueError, match=re.escape(message)):
            add(x, y)


def test_a_y_on_another_mesh():
    mesh = one_device()
    other = jax.make_mesh((1,), ("other",), axis_types=(AxisType.Explicit,))
    x = jax.device_put(jnp.zeros(3), NamedSharding(mesh, P()))
    with pytest.raises(ValueError, match=r"mesh of x, x: 1 .*; found other: 1"):
        local_reshape_add(x, jax.device_put(jnp.zeros(3), NamedSharding(other, P())))
    with pytest.raises(ValueError, match=r"mesh of x, x: 1 .*; found no mesh"):
        local_reshape_add(x, jnp.zeros(3))
    with jax.set_mesh(mesh):  # is the mesh of what has none
        np.testing.assert_array_equal(local_reshape_add(x, np.ones(3)), np.ones(3))


@pytest.mark.parametrize("rng", [0, None, np.random.RandomState(0), np.random.default_rng])
def test_what_is_not_a_generator(rng):
    with pytest.raises(TypeError, match=r"expected rng to be a numpy.random.Generator, found"):
        parallel_sample_pytree(rng, jnp.zeros(3))


def test_what_cannot_be_sampled():
    def sample(struct, sampler=np.random.Generator.standard_normal):
        return parallel_sample_pytree(np.random.default_rng(0), struct, sampler)

    with pytest.raises(TypeError, match=r"expected struct\['a'\]\[1\] to have a shape .*found 1.5"):
        sample({"a": [jnp.zeros(2), 1.5]})
    mesh = one_device()
    with pytest.raises(ValueError, match=r"mesh of struct to have devices"):
        sample(flatten_with_zero_redundancy(jax.device_put(jnp.zeros(2), NamedSharding(mesh, P()))))
    with pytest.raises(TypeError, match="Unsupported dtype"):
        sample(jnp.zeros(2, jnp.bfloat16))
    for sharding in (None, NamedSharding(mesh, P())):
        leaf = jax.ShapeDtypeStruct((2,), jnp.float32, sharding=sharding)
        with pytest.raises(ValueError, match=r"sampler to return shape \(2,\), found \(\)"):
            sample(leaf, lambda rng, size, dtype: rng.standard_normal())
    with pytest.raises(RuntimeError, match="outside of jit"):
        jax.jit(lambda: sample(jax.ShapeDtypeStruct((2,), jnp.float32)))()


# -- Eight devices ----------------------------------------------------------------------------


@pytest.mark.usefixtures("eight_devices")
class TestEightDevices:
    @layouts
    def test_flattened_is_split_over_all(self, axes, shape, spec, within):
        mesh = mesh_of(axes)
        with within(mesh):
            x = jax.device_put(jnp.zeros(shape, jnp.bfloat16), NamedSharding(mesh, spec))
            like = flatten_with_zero_redundancy(x)
            assert like.shape == (-(-x.size // 8) * 8,)
            assert like.dtype == x.dtype
            assert like.sharding.spec == P(mesh.axis_names)
            assert like.sharding.mesh == mesh.abstract_mesh
            described = jax.ShapeDtypeStruct(shape, x.dtype, sharding=x.sharding)
            assert flatten_with_zero_redundancy(described) == like
            traced = []
            jax.jit(lambda x: traced.append(flatten_with_zero_redundancy(x)))(x)
            assert traced == [like]

    @layouts
    def test_flattened_as_the_reference(self, axes, shape, spec, reference):
        x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh_of(axes), spec))
        like, expected = (
            lib(x) for lib in (flatten_with_zero_redundancy, reference.flatten_with_zero_redundancy)
        )
        assert like == expected

    @pytest.mark.each_value
    @pytest.mark.parametrize("extra", [0, 8])
    @layouts
    def test_every_element_is_added_once(self, axes, shape, spec, extra, within):
        mesh = mesh_of(axes)
        with within(mesh):
            x = jax.device_put(
                1000.0 * np.arange(np.prod(shape, dtype=int)).reshape(shape),
                NamedSharding(mesh, spec),
            )
            padded = flatten_with_zero_redundancy(x).size + extra
            y = flat(mesh, np.arange(float(padded)))
            z = local_reshape_add(x, y)
            assert (z.shape, z.dtype) == (x.shape, x.dtype)
            assert z.sharding.is_equivalent_to(x.sharding, x.ndim)
            added = np.asarray(z) - np.asarray(x)
            assert np.unique(added).size == x.size
            assert set(added.ravel()) <= set(range(padded))
            for shard in z.addressable_shards:  # replicas agree
                np.testing.assert_array_equal(shard.data, np.asarray(z)[shard.index])
            if not spec_axes(spec):
                np.testing.assert_array_equal(added.ravel(), np.arange(x.size))
            compiled = jax.jit(local_reshape_add)(x, y)
            np.testing.assert_array_equal(compiled, z)
            assert compiled.sharding.is_equivalent_to(x.sharding, x.ndim)

    @few_layouts
    def test_adds_what_the_reference_adds(self, axes, shape, spec, reference):
        mesh = mesh_of(axes)
        with jax.set_mesh(mesh):
            x = jax.device_put(jnp.zeros(shape, jnp.float16), NamedSharding(mesh, spec))
            y = flat(mesh, np.arange(flatten_with_zero_redundancy(x).size + 8, dtype=np.float32))
            for y_ in (y, jax.sharding.reshard(y, P()), np.asarray(y)):
                z, expected = (
                    lib(x, y_) for lib in (local_reshape_add, reference.local_reshape_add)
                )
                np.testing.assert_array_equal(z, expected)
                assert z.dtype == expected.dtype
                assert z.sharding == expected.sharding

    @layouts
    def test_communication(self, axes, shape, spec):
        mesh = mesh_of(axes)
        x = jax.device_put(jnp.zeros(shape), NamedSharding(mesh, spec))
        y = flat(mesh, np.zeros(flatten_with_zero_redundancy(x).size))
        program = jax.jit(local_reshape_add).lower(x, y).compile().as_text()
        found = set(re.findall(r"(?:all|collective|reduce)-[a-z-]+(?=\()", program))
        found = {name.removesuffix("-start") for name in found if not name.endswith("-done")}
        used = spec_axes(spec)
        in_order = used == sorted(used)
        if len(used) == len(axes):
            assert found == (set() if in_order else {"collective-permute"})
        else:
            assert "all-gather" in found
            gathered = re.findall(r"f32\[(\d+)\]\S* all-gather", program)
            shards = np.prod([mesh.shape[axis] for axis in used], dtype=int)
            assert {int(size) for size in gathered} == {y.size // shards}

    def test_the_example_of_the_module(self):
        mesh = mesh_of("xy")

        @jax.jit
        def privatize(grad, key):
            like = flatten_with_zero_redundancy(grad)
            noise = jax.random.normal(key, like.shape, like.dtype, out_sharding=like.sharding)
            return local_reshape_add(grad, noise), noise

        with jax.set_mesh(mesh):
            grad = jax.device_put(jnp.zeros((3, 8)), NamedSharding(mesh, P(None, "y")))
            noisy, noise = privatize(grad, jax.random.key(0))
        assert noisy.sharding == grad.sharding
        assert {shard.data.shape for shard in noise.addressable_shards} == {(3,)}
        np.testing.assert_array_equal(np.sort(noisy, axis=None), np.sort(noise))

    def test_a_y_that_does_not_split(self):
        mesh = mesh_of("xy")
        x = jax.device_put(jnp.zeros((4, 2)), NamedSharding(mesh, P("x")))
        y = jax.device_put(jnp.zeros(10), NamedSharding(mesh, P()))
        with pytest.raises(ValueError, match="multiple of the 4 shards of x, found 10"):
            local_reshape_add(x, y)
        z = local_reshape_add(x, jax.device_put(jnp.ones(12), NamedSharding(mesh, P())))
        np.testing.assert_array_equal(z, np.ones((4, 2)))

    @layouts
    def test_samples_are_spread(self, axes, shape, spec, within):
        mesh = mesh_of(axes)
        struct = [
            jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)),
            jax.device_put(jnp.zeros(shape), NamedSharding(mesh, spec)),
        ]
        with within(mesh):
            samples = parallel_sample_pytree(np.random.default_rng(3), struct)
        for sample, leaf in zip(samples, struct, strict=True):
            assert (sample.shape, sample.dtype) == (leaf.shape, leaf.dtype)
            assert sample.sharding == leaf.sharding
        drawn = {
            value
            for leaf in np.random.default_rng(3).spawn(2)
            for rng in leaf.spawn(8)
            for value in rng.standard_normal(-(-samples[0].size // 8), np.float32)
        }
        values = np.ravel(samples)
        assert np.unique(values).size == values.size
        assert set(values) <= drawn

    @few_layouts
    def test_samples_are_those_of_the_reference(self, axes, shape, spec, reference):
        mesh = mesh_of(axes)
        sharding = NamedSharding(mesh, spec)
        struct = {
            "a": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding),
            "b": jax.ShapeDtypeStruct((3,), jnp.float32),
            "c": jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding),
        }

        def sampler(rng, size, dtype):
            draw = rng.integers if jnp.issubdtype(dtype, jnp.integer) else rng.uniform
            return draw(0, 100, size).astype(dtype)

        samplers = (np.random.Generator.standard_normal, sampler)
        for sampler, chosen in zip(samplers, ({"a", "b"}, set(struct)), strict=True):
            leaves = {name: struct[name] for name in chosen}
            with jax.set_mesh(mesh):
                ours, theirs = (
                    lib.parallel_sample_pytree(np.random.default_rng(5), leaves, sampler)
                    for lib in (sys.modules[parallel_sample_pytree.__module__], reference)
                )
            jax.tree.map(np.testing.assert_array_equal, ours, theirs)

    @pytest.mark.parametrize("x64", [False, True])
    def test_float64(self, x64):
        sharding = NamedSharding(mesh_of("x"), P("x"))
        with jax.enable_x64(x64):
            leaf = jax.ShapeDtypeStruct((16,), np.float64, sharding=sharding)
            sample = parallel_sample_pytree(np.random.default_rng(4), leaf)
        assert sample.dtype == (np.float64 if x64 else np.float32)
        rngs = np.random.default_rng(4).spawn(1)[0].spawn(8)
        drawn = np.concatenate([rng.standard_normal(2) for rng in rngs])
        np.testing.assert_array_equal(sample, drawn.astype(sample.dtype))

    def test_devices_draw_at_the_same_time(self):
        mesh = mesh_of("x")
        both = threading.Barrier(2, timeout=600)  # broken where they draw one by one

        def sampler(rng, size, dtype):
            both.wait()
            return rng.standard_normal(size, dtype)

        leaf = jax.ShapeDtypeStruct((16,), jnp.float32, sharding=NamedSharding(mesh, P()))
        parallel_sample_pytree(np.random.default_rng(0), leaf, sampler)

    def test_normal(self):
        mesh = mesh_of("xyz")
        leaf = jax.ShapeDtypeStruct((400, 500), jnp.float32, sharding=NamedSharding(mesh, P("y")))
        sample = np.asarray(parallel_sample_pytree(np.random.default_rng(7), leaf), np.float64)
        deviation = 1 / np.sqrt(sample.size)
        assert abs(sample.mean()) < 5 * deviation
        assert abs(sample.var() - 1) < 5 * np.sqrt(2) * deviation
        blocks = sample.reshape(8, -1)
        correlation = np.corrcoef(blocks) - np.eye(8)
        assert abs(correlation).max() < 5 / np.sqrt(blocks.shape[1])

    def test_a_shape_that_does_not_divide(self):
        sharding = NamedSharding(mesh_of("x"), P("x"))
        rng = np.random.default_rng(0)
        with pytest.raises(ValueError, match="partitioned 8 times"):
            parallel_sample_pytree(rng, jax.ShapeDtypeStruct((3,), jnp.float32, sharding=sharding))

    def test_an_empty_leaf(self):
        sharding = NamedSharding(mesh_of("x"), P("x"))
        leaf = jax.ShapeDtypeStruct((8, 0), jnp.float32, sharding=sharding)
        sample = parallel_sample_pytree(np.random.default_rng(0), leaf)
        assert (sample.shape, sample.sharding) == ((8, 0), sharding)

    def test_some_axes_are_automatic(self):
        mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit, AxisType.Auto))
        x = jax.device_put(jnp.zeros(8), NamedSharding(mesh, P("x")))
        with pytest.raises(RuntimeError, match=r"found x: 4 \(.*Explicit\), y: 2 \(.*Auto\)"):
            flatten_with_zero_redundancy(x)

    def test_inside_a_shard_map(self):
        mesh = mesh_of("x")
        x = jax.device_put(jnp.zeros(8), NamedSharding(mesh, P("x")))
        add = jax.shard_map(local_reshape_add, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
        with pytest.raises(RuntimeError, match="Manual"):
            add(x, x)
