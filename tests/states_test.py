"""States of privatizers: what saves them, what refuses them, and what goes through a step."""

from __future__ import annotations

import functools
import pickle
from typing import NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import sweeps

from jax_privacy_kernels import disabled_safety_checks, random
from jax_privacy_kernels.matrix_factorization import (
    banded,
    buffered_toeplitz,
    streaming_matrix,
    toeplitz,
)
from jax_privacy_kernels.noise_addition import (
    SupportedStrategies,
    matrix_factorization_privatizer,
)
from jax_privacy_kernels.ops import _ffi

N = 8
SHAPES = {"w": (3, 500), "scalar": ()}


class Mechanism(NamedTuple):
    """How a noising matrix is made of a number, and of more or less numbers."""

    build: object
    size: int = 3

    def matrix(self, x=0.25, size=None):
        return self.build(x, self.size if size is None else size)


def coef(x, size):
    return jnp.array([1.0, *[x * 0.8**i for i in range(size - 1)]], jnp.float32)


def blt(x, size):
    decay, scale = np.linspace(0.9, 0.4, size), np.full(size, x / size)
    strategy = buffered_toeplitz.BufferedToeplitz.build(decay, scale, dtype=jnp.float32)
    return strategy.inverse_as_streaming_matrix()


MECHANISMS = {
    "banded": Mechanism(lambda x, b: toeplitz.inverse_as_streaming_matrix(coef(x, b))),
    "column-normalized": Mechanism(
        lambda x, b: banded.ColumnNormalizedBanded.from_banded_toeplitz(
            N, coef(x, b)
        ).inverse_as_streaming_matrix()
    ),
    "buffers": Mechanism(blt),
    "banded inverse": Mechanism(
        lambda x, p: toeplitz.noising_coef_as_streaming_matrix(coef(-x, p), look_ahead=p)
    ),
    "banded inverse without state": Mechanism(
        lambda x, p: toeplitz.noising_coef_as_streaming_matrix(coef(-x, p), look_ahead=0)
    ),
    "dense": Mechanism(lambda x, n: jnp.asarray(np.eye(n) + x * np.eye(n, k=-1)), N),
    "product": Mechanism(
        lambda x, b: (
            streaming_matrix.prefix_sum() @ toeplitz.inverse_as_streaming_matrix(coef(x, b))
        )
    ),
}
ALL = {"identity": Mechanism(lambda x, b: streaming_matrix.identity()), **MECHANISMS}
mechanisms = pytest.mark.parametrize("name", ALL)
# Their states are those of others: of recurrences, of moving averages and of no filter.
DERIVED = "column-normalized", "banded inverse", "product"
few_mechanisms = pytest.mark.parametrize("name", sweeps.cases(list(ALL), set(ALL) - set(DERIVED)))


@functools.cache
def privatizer(name, **kwargs):
    return matrix_factorization_privatizer(
        ALL[name].matrix(), **{"stddev": 1.5, "prng_key": 3, **kwargs}
    )


@functools.cache
def step(name, **kwargs):
    return jax.jit(privatizer(name, **kwargs).update)


def grads(t=0):
    rng = np.random.default_rng(t)
    return {k: jnp.asarray(rng.standard_normal(s), jnp.float32) for k, s in SHAPES.items()}


def go_on(update, state, first, last):
    outs = []
    for t in range(first, last):
        out, state = update(grads(t), state)
        outs.append(jax.tree.map(np.asarray, out))
    return outs, state


close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-6)
assert_close = functools.partial(jax.tree.map, close)
assert_equal = functools.partial(jax.tree.map, np.testing.assert_array_equal)


# -- Saved and restored -----------------------------------------------------------------------


def by_pickle(state, like, folder):
    del like, folder
    return pickle.loads(pickle.dumps(state))


def by_savez(state, like, folder):
    np.savez(folder / "state.npz", *jax.tree.leaves(state))
    with np.load(folder / "state.npz") as saved:
        return jax.tree.unflatten(jax.tree.structure(like), [saved[name] for name in saved.files])


def by_flax(state, like, folder):
    del folder
    serialization = pytest.importorskip("flax.serialization")
    return serialization.from_bytes(like, serialization.to_bytes(state))


def by_orbax(state, like, folder):
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state", like)


savers = pytest.mark.parametrize("through", [by_pickle, by_savez, by_flax, by_orbax])


SECURE = "banded", "buffers", "dense"
SECURE_KEY = random.secure_key(bytes(range(32)))


@pytest.mark.each_value
@savers
@pytest.mark.parametrize(
    ("name", "secure"),
    [*((name, False) for name in ALL), *((name, True) for name in SECURE)],
    ids=[*ALL, *(f"{name}, chacha20" for name in SECURE)],
)
def test_noise_goes_on(name, secure, through, tmp_path):
    """In the middle of the first round of look-ahead, and in a process with another key."""
    mechanism = privatizer(name)
    if secure:
        matrix = ALL[name].matrix()
        mechanism = matrix_factorization_privatizer(matrix, stddev=1.5, prng_key=SECURE_KEY)
    update = jax.jit(mechanism.update) if secure else step(name)
    expected, _ = go_on(update, mechanism.init(grads()), 0, 6)
    outs, state = go_on(update, mechanism.init(grads()), 0, 2)
    like = privatizer(name, prng_key=None if secure else 4).init(grads())
    restored = through(state, like, tmp_path)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    rest, _ = go_on(update, restored, 2, 6)
    assert_equal(outs + rest, expected)


@savers
def test_state_of_a_stddev_that_changes(through, tmp_path):
    def run(stddevs):
        make = functools.partial(matrix_factorization_privatizer, prng_key=0)
        matrix = ALL["banded inverse without state"].matrix()
        start = jax.jit(lambda stddev: make(matrix, stddev=stddev).init(grads()))
        update = jax.jit(lambda stddev, g, state: make(matrix, stddev=stddev).update(g, state))
        state, outs = start(1.0), []
        for t, stddev in enumerate(stddevs):
            if t == 2:
                state = through(state, start(1.0), tmp_path)
            out, state = update(stddev, grads(t), state)
            outs.append(out)
        return outs

    once = run([1.0, 2.0])
    assert_equal(run([1.0, 2.0, 0.5, 4.0])[:2], once)


@pytest.mark.each_value
@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize("name", ["identity", "banded", "dense", "product"])
@savers
def test_zero_goes_on(name, through, tmp_path):
    mechanism = privatizer(name, intermediate_strategy=SupportedStrategies.ZERO)
    update = jax.jit(mechanism.update)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        g = {"w": jax.device_put(jnp.ones((16, 40)), NamedSharding(mesh, P("x", "y")))}
        like = mechanism.init(g)
        _, state = update(g, like)
        expected, _ = update(g, state)
        restored = through(state, like, tmp_path)
        restored = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), restored, like)
        assert_equal(update(g, restored)[0], expected)


# -- Refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MECHANISMS)
def test_other_coefficients_are_refused(name):
    """By an error where they are seen, by NaN where a trace hides them."""
    other = matrix_factorization_privatizer(MECHANISMS[name].matrix(0.26), stddev=1.5, prng_key=3)
    state = other.init(grads())
    assert jax.tree.structure(state) == jax.tree.structure(privatizer(name).init(grads()))
    with pytest.raises(ValueError, match=r"other coefficients.*stddev"):
        privatizer(name).update(grads(), state)
    outs, _ = step(name)(grads(), state)
    assert all(np.isnan(out).all() for out in jax.tree.leaves(outs))


@pytest.mark.parametrize("name", [name for name in MECHANISMS if name not in ("dense", "product")])
def test_another_stddev_is_refused(name):
    """Where terms are remembered that are scaled by it: not by dense rows, and a product
    remembers scaled ones."""
    state = privatizer(name, stddev=2.0).init(grads())
    with pytest.raises(ValueError, match=r"other coefficients.*stddev"):
        privatizer(name).update(grads(), state)
    outs, _ = step(name)(grads(), state)
    assert all(np.isnan(out).all() for out in jax.tree.leaves(outs))


@pytest.mark.parametrize("name", MECHANISMS)
def test_another_number_of_coefficients_is_refused(name):
    mechanism = MECHANISMS[name]
    other = matrix_factorization_privatizer(
        mechanism.matrix(size=mechanism.size + 1), stddev=1.5, prng_key=3
    )
    named = "slots" if name in ("banded", "column-normalized") else "expected noise_state"
    for update in (privatizer(name).update, step(name)):
        if name == "dense":  # of which no shape tells, but the fingerprint
            continue
        with pytest.raises(ValueError, match=named):
            update(grads(), other.init(grads()))
    if name == "dense":
        with pytest.raises(ValueError, match="other coefficients"):
            privatizer(name).update(grads(), other.init(grads()))
        outs, _ = step(name)(grads(), other.init(grads()))
        assert all(np.isnan(out).all() for out in jax.tree.leaves(outs))


@mechanisms
def test_what_is_no_state_of_this_format_is_refused(name):
    state = privatizer(name).init(grads())
    ((kind, fingerprint),) = state.clock.kind.items()
    assert kind.startswith("v2_")
    older = state.clock._replace(kind={kind.replace("v2_", "v1_"): fingerprint})
    unnamed = state.clock._replace(kind={0: fingerprint})
    of_another_clock = [state._replace(clock=clock) for clock in (older, unnamed)]
    for found in (*of_another_clock, tuple(state), (state.clock.keys, state.inner), None):
        for update in (privatizer(name).update, step(name)):
            with pytest.raises(ValueError, match=r"expected noise_state.*found"):
                update(grads(), found)


@mechanisms
def test_states_of_other_mechanisms_are_refused(name):
    for other in ALL:
        if other != name:
            with pytest.raises(ValueError, match="expected noise_state"):
                privatizer(name).update(grads(), privatizer(other).init(grads()))


def test_a_state_of_other_gradients_names_the_leaf():
    state = privatizer("banded").init(grads())
    other = {**grads(), "w": jnp.zeros((3, 501))}
    with pytest.raises(ValueError, match=r"\['w'\] to have shape \(2, 3, 501\).*\(2, 3, 500\)"):
        privatizer("banded").update(other, state)


def test_a_state_of_fewer_bits_is_refused():
    """What it keeps was rounded, so that noise no longer cancels."""
    for name in ("banded", "product"):
        state = privatizer(name).init(grads())
        rounded = state._replace(inner=jax.tree.map(lambda x: x.astype("bfloat16"), state.inner))
        for update in (privatizer(name).update, step(name)):
            with pytest.raises(ValueError, match=r"noise_state.inner.*float32.*found.*bfloat16"):
                update(grads(), rounded)


def test_custom_matrices_go_on_without_a_fingerprint():
    """Theirs may be functions of one tree alone."""
    matrix = streaming_matrix.StreamingMatrix(
        lambda tree: jnp.zeros_like(tree["w"]),
        lambda tree, total: ({**tree, "w": total + tree["w"]}, total + tree["w"]),
    )
    mechanism = matrix_factorization_privatizer(matrix, stddev=1.0, prng_key=0)
    out, state = mechanism.update(grads(), mechanism.init(grads()))
    jax.jit(mechanism.update)(out, state)


# -- One key, one use -------------------------------------------------------------------------


@mechanisms
def test_states_of_one_key_in_a_vmap_are_refused(name):
    models = jax.tree.map(lambda x: jnp.stack([x, x]), grads())
    state = privatizer(name).init(grads())
    for mapped in (
        lambda: jax.vmap(privatizer(name).update, (0, None))(models, state),
        lambda: jax.vmap(privatizer(name).init)(models),
        lambda: jax.vmap(privatizer(name, prng_key=None).init)(models),
    ):
        with pytest.raises(ValueError, match="all of them would get the same noise"):
            mapped()


@few_mechanisms
def test_states_of_one_key_that_a_branch_maps_make_no_noise(name):
    """A mapped predicate maps all operands of a cond, so that no key is seen to be shared."""

    def one(g, state):
        return jax.lax.cond(
            g.sum() >= 0, lambda: privatizer(name).update(g, state)[0], lambda: jnp.zeros(7)
        )

    models = jnp.arange(21.0).reshape(3, 7)
    init = privatizer(name).init
    out = jax.jit(jax.vmap(one, (0, None)))(models, init(jnp.zeros(7)))
    assert np.isnan(out).all()
    keys = [
        matrix_factorization_privatizer(ALL[name].matrix(), stddev=1.5, prng_key=k) for k in (3, 4)
    ]
    states = [keys[k].init(jnp.zeros(7)) for k in (0, 1, 0)]
    states = jax.tree.map(lambda *x: jnp.stack(x), *states)
    out = jax.vmap(privatizer(name).update)(models, states)[0]
    assert np.isnan(out).all(axis=1).tolist() == [True, False, True]
    assert np.isfinite(out[1]).all()


def first_step(name, key, g, stddev=1.0, x=0.25):
    mechanism = matrix_factorization_privatizer(ALL[name].matrix(x), stddev=stddev, prng_key=key)
    return mechanism.update(g, mechanism.init(g))[0]


@few_mechanisms
def test_states_of_their_own_keys_in_a_vmap(name):
    client = functools.partial(first_step, name)
    found = jax.vmap(client)(jax.random.split(jax.random.key(0), 3), jnp.zeros((3, 7)))
    assert len(np.unique(found)) == 21


@few_mechanisms
def test_keys_that_lanes_of_nested_vmaps_share(name):
    """Wherever a key stands in the other lanes, the gradients that share it get no noise."""
    keys = jax.random.split(jax.random.key(0), 5)[jnp.array([[0, 1], [2, 0], [3, 4]])]
    inner = jax.vmap(functools.partial(first_step, name), in_axes=(0, 1))
    found = jax.vmap(inner)(keys, jnp.zeros((3, 7, 2)))
    assert np.isnan(found).all((1, 2)).tolist() == [True, True, False]
    assert len(np.unique(found[2])) == 14


@few_mechanisms
def test_scales_of_one_sample_in_a_vmap_are_refused(name):
    """Their difference is known noise, and so the gradient is."""
    g, stddevs = jnp.zeros(7), jnp.array([1.0, 2.0])
    one = functools.partial(first_step, name)
    with pytest.raises(ValueError, match="would get the same noise"):
        jax.vmap(lambda stddev: one(3, g, stddev))(stddevs)
    if name not in ("identity", "buffers"):
        with pytest.raises(ValueError, match="would get the same noise"):
            jax.jit(jax.vmap(lambda x: one(3, g, 1.0, x)))(jnp.array([0.25, 0.5]))
    keys = jax.random.split(jax.random.key(0), 2)
    found = jax.vmap(lambda key, stddev: one(key, g, stddev))(keys, stddevs)
    assert len(np.unique(found)) == 14
    same = jax.vmap(lambda key, stddev: one(key, g, stddev))(keys[jnp.array([0, 0])], stddevs)
    assert np.isnan(same).all()


def test_every_init_without_a_key_draws_one():
    mechanism = privatizer("banded", prng_key=None)
    groups = optax.multi_transform({"x": mechanism, "y": mechanism}, {"w": "x", "v": "y"})
    g = {"w": jnp.zeros(500), "v": jnp.zeros(500)}
    noise, _ = groups.update(g, groups.init(g))
    assert (noise["w"] != noise["v"]).mean() > 0.99


# -- Through a step ---------------------------------------------------------------------------


@mechanisms
def test_derivatives_with_respect_to_gradients(name):
    state, g, direction = privatizer(name).init(grads()), grads(), grads(1)

    def noisy(g):
        return privatizer(name).update(g, state)[0]

    value, tangent = jax.jvp(noisy, (g,), (direction,))
    assert_equal(value, noisy(g))
    assert_equal(tangent, direction)
    weighted = jax.grad(lambda g: optax.tree.vdot(direction, noisy(g)))(g)
    assert_equal(weighted, direction)


@pytest.mark.parametrize("name", ["identity", "banded", "dense", "product"])
def test_the_derivative_with_respect_to_stddev_is_the_noise(name):
    matrix, zeros = ALL[name].matrix(), jax.tree.map(jnp.zeros_like, grads())

    def noisy(stddev):
        mechanism = matrix_factorization_privatizer(matrix, stddev=stddev, prng_key=3)
        return mechanism.update(zeros, mechanism.init(zeros))[0]

    found, unit = jax.jit(jax.jacfwd(noisy))(2.0), noisy(1.0)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found, unit)


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize("spec", [P(), P("x", "y")], ids=str)
def test_derivatives_of_zero(spec):
    mechanism = privatizer("banded", intermediate_strategy=SupportedStrategies.ZERO)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        g = {"w": jax.device_put(jnp.ones((16, 40)), NamedSharding(mesh, spec))}
        state = mechanism.init(g)
        _, tangent = jax.jvp(lambda g: mechanism.update(g, state)[0], (g,), (g,))
        assert_equal(tangent, g)
        twice = jax.grad(lambda g: 2 * mechanism.update(g, state)[0]["w"].sum())(g)
        assert (np.asarray(twice["w"]) == 2).all()


@few_mechanisms
def test_a_step_in_plain_jax_can_be_exported(name):
    mechanism = privatizer(name, implementation="jax")
    state = mechanism.init(grads())
    pytest.importorskip("flatbuffers")
    data = jax.export.export(jax.jit(mechanism.update))(grads(), state).serialize()
    again = jax.export.deserialize(data)
    outs, after = again.call(grads(), state)
    for update in (jax.jit(mechanism.update), mechanism.update):  # the same outside of jit
        expected, expected_after = update(grads(), state)
        assert jax.tree.structure(after) == jax.tree.structure(expected_after)
        assert_equal(outs, expected)


@mechanisms
def test_a_step_with_compiled_kernels_can_be_exported(name):
    if (reason := _ffi.unavailable()) or not _ffi.targets():
        pytest.skip(f"{reason}")
    update = jax.jit(privatizer(name, implementation="cpp").update)
    state = privatizer(name).init(grads())
    exported = jax.export.export(update, disabled_checks=disabled_safety_checks())(grads(), state)
    assert "jpk_" in exported.mlir_module()
    assert_equal(exported.call(grads(), state)[0], update(grads(), state)[0])
    with pytest.raises(ValueError, match="custom call"):
        jax.export.export(update)(grads(), state)


@pytest.mark.parametrize(
    ("name", "prng_key"),
    [
        *(
            pytest.param(name, 3, marks=pytest.mark.nightly if name in DERIVED else ())
            for name in ALL
        ),
        pytest.param("identity", SECURE_KEY, marks=pytest.mark.nightly),
        ("dense", SECURE_KEY),
    ],
)
def test_a_step_can_be_exported_for_any_size(name, prng_key):
    """What is exported knows the state of other sizes as well."""
    mechanism = matrix_factorization_privatizer(  # keys are not hashed, as `privatizer` needs
        ALL[name].matrix(), stddev=1.5, prng_key=prng_key, implementation="jax"
    )
    (size,) = jax.export.symbolic_shape("d", constraints=["d <= 700000000"])
    structs = {
        "v": jax.ShapeDtypeStruct((3, size), jnp.float32),
        "w": jax.ShapeDtypeStruct((size,), jnp.float32),
    }
    state = jax.eval_shape(mechanism.init, structs)
    exported = jax.export.export(jax.jit(mechanism.update))(structs, state)
    update = jax.jit(mechanism.update)
    for d in (5, 1024, 2500):
        g = {"v": jnp.ones((3, d)), "w": jnp.ones(d)}
        other = mechanism.init({"v": jnp.ones((3, d + 1)), "w": jnp.ones(d + 1)})
        found = expected = mechanism.init(g)
        for _ in range(5):
            out, found = exported.call(g, found)
            want, expected = update(g, expected)
            assert_close(out, want)
        if name in ("identity", "dense", "banded inverse without state"):  # no shape tells
            assert np.isnan(exported.call(g, other)[0]["w"]).all()


@few_mechanisms
def test_a_trace_leaks_nothing(name):
    fresh = matrix_factorization_privatizer(ALL[name].matrix(), stddev=1.0, prng_key=0)
    with jax.checking_leaks():
        jax.jit(lambda g: fresh.update(g, fresh.init(g)))(grads())


@pytest.mark.each_value
@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize("strategy", SupportedStrategies)
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_a_trace_over_a_mesh_leaks_nothing(strategy, kind):
    if strategy == SupportedStrategies.ZERO and kind == AxisType.Auto:
        pytest.skip("ZERO takes explicit axes alone")
    fresh = matrix_factorization_privatizer(
        ALL["banded"].matrix(), stddev=1.0, prng_key=0, intermediate_strategy=strategy
    )
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh), jax.checking_leaks():
        g = {"w": jax.device_put(jnp.ones((16, 40)), NamedSharding(mesh, P("x", "y")))}
        jax.jit(fresh.update)(g, fresh.init(g))


# -- A stddev that changes --------------------------------------------------------------------


STDDEVS = (1.0, 10.0, 0.0, 100.0, 2.0, 2.0)


def samples(steps, d):
    unit = matrix_factorization_privatizer(streaming_matrix.identity(), stddev=1.0, prng_key=3)

    def sample(state, _):
        return unit.update(jnp.zeros(d), state)[::-1]

    return jax.lax.scan(sample, unit.init(jnp.zeros(d)), length=steps)[1]


@pytest.mark.each_value
@pytest.mark.parametrize("name", [name for name in ALL if name != "dense"])
@pytest.mark.parametrize("start", ["traced", "known", "injected"])
def test_a_stddev_that_changes_scales_the_samples(name, start):
    """As it does in jax_privacy: row t of C^-1 diag(stddev) Z, from whatever init."""
    matrix = ALL[name].matrix()
    make = functools.partial(matrix_factorization_privatizer, matrix, prng_key=3)
    zeros, stddevs = jnp.zeros(2000), jnp.array(STDDEVS)
    if start == "injected":
        injected = optax.inject_hyperparams(lambda stddev: make(stddev=stddev))(
            stddev=lambda t: stddevs[t]
        )
        state, update = injected.init(zeros), jax.jit(injected.update)
        outs = []
        for _ in STDDEVS:
            out, state = update(zeros, state, zeros)
            outs.append(out)
    elif start == "known":
        state = make(stddev=7.0).init(zeros)
        update = jax.jit(lambda stddev, state: make(stddev=stddev).update(zeros, state))
        outs = []
        for stddev in STDDEVS:
            out, state = update(stddev, state)
            outs.append(out)
    else:

        @jax.jit
        def schedule(stddevs):
            def one(state, stddev):
                return make(stddev=stddev).update(zeros, state)[::-1]

            return jax.lax.scan(one, make(stddev=stddevs[0]).init(zeros), stddevs)[1]

        outs = schedule(stddevs)
    expected = matrix @ (stddevs[:, None] * samples(len(STDDEVS), 2000))
    np.testing.assert_allclose(jnp.stack(list(outs)), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["banded", "buffers", "banded inverse"])
def test_states_of_known_and_of_traced_stddevs_are_of_two_kinds(name):
    """But before step 0, where they are of keys alone."""
    make = functools.partial(matrix_factorization_privatizer, ALL[name].matrix(), prng_key=3)
    known, later = privatizer(name), step(name)(grads(), privatizer(name).init(grads()))[1]

    def traced(stddev, state):
        return make(stddev=stddev).update(grads(), state)

    with pytest.raises(ValueError, match=r"changing_stddev.*found one of kind v2_\w+_ahead"):
        jax.jit(functools.partial(traced, state=later))(1.0)
    outs, _ = jax.jit(traced)(1.0, later)
    assert all(np.isnan(out).all() for out in jax.tree.leaves(outs))
    start = jax.jit(lambda stddev: make(stddev=stddev).init(grads()))
    with pytest.raises(ValueError, match=r"_ahead.*found one of kind.*changing_stddev"):
        known.update(grads(), start(1.0))
    other = jax.tree.map(lambda x: x[..., None], grads())
    with pytest.raises(ValueError, match="expected noise_state"):
        jax.jit(traced)(1.0, known.init(other))


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize("strategy", SupportedStrategies)
def test_a_stddev_that_changes_on_a_mesh(strategy):
    make = functools.partial(
        matrix_factorization_privatizer,
        ALL["banded"].matrix(),
        prng_key=3,
        intermediate_strategy=strategy,
    )
    update = jax.jit(lambda stddev, g, state: make(stddev=stddev).update(g, state))
    with jax.set_mesh(jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))):
        g = jax.device_put(jnp.zeros(1600), P("x"))
        state = make(stddev=7.0).init(g)
        for stddev, x in zip(STDDEVS, expected_on_a_mesh(), strict=True):
            out, state = update(stddev, g, state)
            np.testing.assert_allclose(out, x, rtol=1e-5, atol=1e-4)


def expected_on_a_mesh():
    z = jnp.array(STDDEVS)[:, None] * samples(len(STDDEVS), 1600)
    return np.asarray(ALL["banded"].matrix() @ z)
