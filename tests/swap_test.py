"""The swap: what it replaces and gives back, how objects mix, and programs that run under it."""

from __future__ import annotations

import collections.abc
import copy
import copyreg
import dataclasses
import gc
import importlib
import importlib.util
import inspect
import pathlib
import pickle
import re
import subprocess
import sys
import types
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import sweeps

import jax_privacy_kernels as ours
from jax_privacy_kernels import _swap
from jax_privacy_kernels.__main__ import main
from jax_privacy_kernels._mirrored import Mirrored
from jax_privacy_kernels._report import report

jax_privacy = pytest.importorskip("jax_privacy", reason="install the test extra")
theirs = jax_privacy.matrix_factorization
mine = ours.matrix_factorization

# Taken before any install, as a program may have.
Original = types.SimpleNamespace(
    StreamingMatrix=theirs.StreamingMatrix,
    ColumnNormalizedBanded=theirs.banded.ColumnNormalizedBanded,
    CallbackArgs=theirs.optimization.CallbackArgs,
    BufferedToeplitz=theirs.buffered_toeplitz.BufferedToeplitz,
    Strategies=jax_privacy.noise_addition.SupportedStrategies,
    prefix_sum=theirs.streaming_matrix.prefix_sum,
    gaussian_privatizer=jax_privacy.noise_addition.gaussian_privatizer,
    matrix_factorization_privatizer=jax_privacy.noise_addition.matrix_factorization_privatizer,
)
GRADS = {"w": jnp.zeros((3, 5)), "b": jnp.zeros(4)}


@pytest.fixture(autouse=True)
def _leave_nothing_behind():
    yield
    ours.uninstall()


@pytest.fixture
def swapped():
    ours.install()


# They say a type and nothing else, so they stay.
TYPES = {
    "CallbackFnType",
    "ParamT",
    "PartitionSpecPyTree",
    "PyTree",
    "ScalarFloat",
    "Shape",
    "ShapePyTree",
    "State",
    "T",
    "ThetaPairType",
}


def our_module(module):
    """Ours in place of one of jax_privacy."""
    return importlib.import_module(f"jax_privacy_kernels.{_swap._MODULES[module]}")


def names_in_jax_privacy():
    """Every object that a loaded module of jax_privacy holds, by module and name."""
    _swap.replacements()  # loads the modules that it names
    return {
        (module_name, name): value
        for module_name, module in sys.modules.items()
        if module_name.split(".")[0] == "jax_privacy"
        for name, value in vars(module).items()
    }


# -- What is replaced -------------------------------------------------------------------------


def test_every_shared_public_name_means_ours_and_nothing_else_changes():
    before = names_in_jax_privacy()
    ours.install()
    after = names_in_jax_privacy()
    assert before.keys() == after.keys()
    changed = {key for key in before if before[key] is not after[key]}
    table = {(f"jax_privacy.{entry.module}", entry.name): entry for entry in _swap.replacements()}
    kept = {key for key, entry in table.items() if entry.replacement is entry.original}
    assert {name for _, name in kept} == {"SupportedStrategies", *TYPES}
    reexported = {("jax_privacy.matrix_factorization", "StreamingMatrix")}
    assert changed == table.keys() - kept | reexported
    for key in changed - reexported:
        entry = table[key]
        mirror = getattr(our_module(entry.module), entry.name)
        assert entry.note in ("", "adapted")
        if entry.note == "":
            assert after[key] is mirror
        else:
            assert after[key].__module__ == mirror.__module__
            assert after[key].__doc__ == mirror.__doc__


@pytest.mark.parametrize("module", _swap._MODULES)
def test_the_table_is_complete(module):
    """Every name of ours that is there as well, found without the table's own code."""
    name = f"jax_privacy.{module}"
    there = importlib.util.find_spec(name) is not None
    original = importlib.import_module(name) if there else types.ModuleType("absent")
    shared = set(our_module(module).__all__) & vars(original).keys()
    assert shared == {entry.name for entry in _swap.replacements() if entry.module == module}


def test_uninstall_gives_everything_back():
    before = names_in_jax_privacy()
    for _ in range(2):
        ours.install()
        ours.install()
        ours.uninstall()
        after = names_in_jax_privacy()
        assert before.keys() == after.keys()
        assert all(before[key] is after[key] for key in before)
        assert not _swap.is_installed()
        ours.uninstall()  # once more than needed


def test_blocks_restore_what_was_before():
    def is_in():
        return theirs.StreamingMatrix is mine.StreamingMatrix

    with ours.installed():
        assert is_in()
        with ours.installed():
            assert is_in()
        assert is_in()
    assert not is_in()
    ours.install()
    with ours.installed():
        ours.uninstall()
        assert not is_in()
    assert is_in()
    ours.uninstall()
    with pytest.raises(KeyError), ours.installed():
        raise KeyError
    assert not is_in()


@pytest.mark.parametrize("before", [False, True])
def test_blocks_may_overlap(before):
    if before:
        ours.install()
    first, second = ours.installed(), ours.installed()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert _swap.is_installed()
    second.__exit__(None, None, None)
    assert _swap.is_installed() == before


def test_modules_that_took_a_name_follow(monkeypatch):
    early, late = types.ModuleType("early"), types.ModuleType("late")
    monkeypatch.setitem(sys.modules, "jax_privacy._early", early)
    monkeypatch.setitem(sys.modules, "jax_privacy._late", late)
    early.alias = jax_privacy.noise_addition.gaussian_privatizer
    ours.install()
    late.alias = jax_privacy.noise_addition.gaussian_privatizer
    assert early.alias is late.alias is not Original.gaussian_privatizer
    ours.uninstall()
    assert early.alias is late.alias is Original.gaussian_privatizer


def calls_of(signature):
    """As many arguments by position as there can be, by name, and as few as there must be."""
    parameters = signature.parameters.values()
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    named = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    yield [0] * len(positional), {p.name: 0 for p in named}
    yield [], {p.name: 0 for p in positional + named}
    yield [], {p.name: 0 for p in positional + named if p.default is p.empty}


def test_every_call_that_jax_privacy_takes_fits():
    seen = 0
    for entry in _swap.replacements():
        if entry.replacement is entry.original or not callable(entry.original):
            continue
        old = shown(entry.original)
        if any(p.kind is p.VAR_POSITIONAL for p in old.parameters.values()):
            continue  # hidden by a decorator
        new = inspect.signature(entry.replacement)
        for args, kwargs in calls_of(old):
            assert list(new.bind(*args, **kwargs).arguments) == list(
                old.bind(*args, **kwargs).arguments
            ), entry.name
        seen += 1
    assert seen > 40


def shown(function):
    """The signature of what jax_privacy decorates without functools.wraps."""
    cells = getattr(inspect.unwrap(function), "__closure__", None) or ()
    held = [cell.cell_contents for cell in cells]
    inner = [f for f in held if inspect.isfunction(f) and f.__name__ != "<lambda>"]
    if "args" in inspect.signature(function).parameters and inner:
        return inspect.signature(inner[0])
    return inspect.signature(function)


RELOADED = """
import importlib, sys
import jax_privacy, jax_privacy_kernels
from jax_privacy import matrix_factorization, noise_addition
from jax_privacy.matrix_factorization import streaming_matrix, toeplitz
from jax_privacy_kernels.matrix_factorization import streaming_matrix as ours
early = streaming_matrix.StreamingMatrix
names = "matrix_factorization_privatizer", "StreamingMatrix", "inverse_coef"
modules = noise_addition, streaming_matrix, toeplitz

def swapped():
    found = [getattr(module, name).__module__ for module, name in zip(modules, names)]
    return [name.startswith("jax_privacy_kernels.") for name in found]

jax_privacy_kernels.install()
for module in modules:
    importlib.reload(module)
late = streaming_matrix.StreamingMatrix
assert swapped() == [False] * 3 and late is not early
jax_privacy_kernels.install()
assert swapped() == [True] * 3
assert matrix_factorization.StreamingMatrix is ours.StreamingMatrix
assert issubclass(ours.StreamingMatrix, late) and not issubclass(ours.StreamingMatrix, early)
del sys.modules["jax_privacy.matrix_factorization.toeplitz"]
modules = noise_addition, streaming_matrix, importlib.import_module(toeplitz.__name__)
jax_privacy_kernels.install()
assert swapped() == [True] * 3
jax_privacy_kernels.uninstall()
assert swapped() == [False] * 3
assert matrix_factorization.StreamingMatrix is streaming_matrix.StreamingMatrix is late
assert ours.StreamingMatrix.__bases__[1:] == early.__bases__
"""


def test_a_reloaded_module_is_swapped_again(tmp_path):
    run("-c", RELOADED, cwd=tmp_path)


def test_an_install_that_fails_leaves_nothing(monkeypatch):
    before, pairs = names_in_jax_privacy(), []

    def pair_two(*classes):
        if len(pairs) == 2:
            raise TypeError("no more")
        pairs.append(classes)
        _pair(*classes)

    _pair = _swap.pair
    monkeypatch.setattr(_swap, "pair", pair_two)
    with pytest.raises(TypeError, match="no more"):
        ours.install()
    assert names_in_jax_privacy() == before
    assert not any(issubclass(mirror, original) for mirror, original in pairs)
    monkeypatch.undo()
    ours.install()
    assert all(issubclass(mirror, original) for mirror, original in pairs)


# -- Objects of both libraries ----------------------------------------------------------------


def test_every_replaced_class_pairs_up(swapped):
    classes = [entry for entry in _swap.replacements() if isinstance(entry.replacement, type)]
    classes = [entry for entry in classes if entry.replacement is not entry.original]
    assert {"StreamingMatrix", "ColumnNormalizedBanded"} <= {entry.name for entry in classes}
    for entry in classes:
        assert issubclass(entry.replacement, Mirrored), entry.name
        assert issubclass(entry.replacement, entry.original)
        assert issubclass(entry.original, entry.replacement)


def pairs():
    """An object of each class, theirs and ours."""
    buffers = {"buf_decay": jnp.array([0.5]), "output_scale": jnp.array([0.1])}
    step = {"step": 1, "loss": jnp.ones(()), "grad": None, "params": (), "state": ()}
    return [
        (Original.prefix_sum(), mine.streaming_matrix.prefix_sum()),
        (
            Original.ColumnNormalizedBanded.default(5, 2),
            mine.banded.ColumnNormalizedBanded.default(5, 2),
        ),
        (Original.CallbackArgs(**step), mine.optimization.CallbackArgs(**step)),
        (Original.BufferedToeplitz(**buffers), mine.buffered_toeplitz.BufferedToeplitz(**buffers)),
    ]


@pytest.mark.parametrize("which", range(4))
def test_either_is_an_instance_of_either(which):
    their, our = pairs()[which]
    their_class, our_class = type(their), type(our)

    def mixes():
        return [
            isinstance(their, our_class),
            isinstance(our, their_class),
            issubclass(their_class, our_class),
            issubclass(our_class, their_class),
        ]

    class Theirs(their_class):
        pass

    class Ours(our_class):
        pass

    for _ in range(2):  # what abstract classes remember must not last
        assert mixes() == [False] * 4
        with ours.installed():
            assert mixes() == [True] * 4
            assert issubclass(Theirs, our_class)
            assert issubclass(Ours, their_class)
            assert not isinstance(their, Ours)
            assert not isinstance(our, Theirs)
            assert not isinstance(object(), our_class)
            assert isinstance(our, collections.abc.Mapping) == isinstance(
                their, collections.abc.Mapping
            )
        assert not isinstance(our, collections.abc.Mapping)


def test_a_class_of_both_is_named():
    class Both(Original.StreamingMatrix, mine.StreamingMatrix):
        pass

    before = names_in_jax_privacy()
    with pytest.raises(TypeError, match=r"StreamingMatrix of both.*Both"):
        ours.install()
    assert names_in_jax_privacy() == before
    del Both
    gc.collect()
    ours.install()


@pytest.mark.parametrize("which", range(4))
def test_copies_and_pickles(which):
    their, our = pairs()[which]
    reducers = dict(copyreg.dispatch_table)

    def as_key():
        """What our object is as a key, equal to itself, and as a static argument."""
        try:
            jax.jit(lambda x: 0, static_argnums=0)(our)
            return hash(our), our == our, our == copy.copy(our)
        except (TypeError, ValueError) as error:
            return type(error)

    before = as_key()
    ours.install()
    assert as_key() == before
    first = dataclasses.fields(our)[0].name
    for thing in (their, our):
        value = {first: getattr(thing, first)}
        assert type(dataclasses.replace(thing, **value)) is type(thing)
        assert getattr(copy.copy(thing), first) is getattr(thing, first)
    if which:  # functions of a StreamingMatrix do not pickle
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            for thing in (their, our):
                again = pickle.loads(pickle.dumps(thing, protocol))
                assert type(again) is type(our)
                np.testing.assert_array_equal(getattr(again, first), getattr(thing, first))
    ours.uninstall()
    assert copyreg.dispatch_table == reducers
    if which:
        again = pickle.loads(pickle.dumps(their))
        assert type(again) is type(their)


def test_streaming_matrices_multiply(swapped):
    their, our = pairs()[0]
    expected = np.tri(6) @ np.tri(6)
    for A, B in ((their, our), (our, their), (their, their), (our, our)):
        product = A @ B
        np.testing.assert_array_equal(product.materialize(6), expected)
        assert isinstance(product, Original.StreamingMatrix)
        assert isinstance(product, mine.StreamingMatrix)
    for A in (their, our):
        np.testing.assert_array_equal(A @ jnp.eye(6), np.tri(6))
        scaled = theirs.streaming_matrix.scale_rows_and_columns(A, jnp.arange(1.0, 7))
        np.testing.assert_array_equal(scaled.materialize(6), np.tri(6) * np.arange(1, 7)[:, None])


def test_privatizers_take_either_matrix():
    their, our = pairs()[0]
    noisy = []
    for swap in (False, True):
        if swap:
            ours.install()
        for make in (
            Original.matrix_factorization_privatizer,
            jax_privacy.noise_addition.matrix_factorization_privatizer,
        ):
            for matrix in (their, our) if swap else (their,):
                privatizer = make(matrix, stddev=2.0, prng_key=7)
                _, state = privatizer.update(GRADS, privatizer.init(GRADS))
                noisy.append(privatizer.update(GRADS, state)[0])
    assert len(noisy) == 6
    for other in noisy[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), noisy[0], other)


def test_banded_strategies_mix(swapped):
    their, our = pairs()[1]
    A = Original.prefix_sum()
    expected = theirs.banded.per_query_error(our)
    for C in (their, our):
        for workload in (None, A, mine.streaming_matrix.prefix_sum()):
            error = theirs.banded.per_query_error(C, workload)
            np.testing.assert_allclose(error, expected, rtol=1e-6)
        assert theirs.banded.minsep_sensitivity_squared(C, 2) == 3
        best = theirs.banded.optimize(5, bands=2, C=C, max_optimizer_steps=3)
        assert isinstance(best, Original.ColumnNormalizedBanded)
        # What jax_privacy's class offers and ours does not.
        np.testing.assert_array_equal(C.replace(params=2 * C.params)["params"], 2 * C.params)
        assert list(C) == ["params"]
        np.testing.assert_array_equal(C.to_tuple()[0], C.params)


def test_strategies_of_intermediate_noise_are_the_same():
    mirror = ours.noise_addition.SupportedStrategies
    for member in Original.Strategies:
        assert member == mirror[member.name]
        assert mirror[member.name] == member
        assert hash(member) == hash(mirror[member.name])
        assert all(member != other for other in mirror if other.name != member.name)
    assert mirror.DEFAULT != "SupportedStrategies.DEFAULT"
    ours.noise_addition.gaussian_privatizer(
        stddev=1.0, intermediate_strategy=Original.Strategies.DEFAULT
    )
    with ours.installed():
        assert jax_privacy.noise_addition.SupportedStrategies is Original.Strategies


# -- Calls of jax_privacy that ours do not take -----------------------------------------------


KEYS = {"typed": jax.random.key(3), "raw": jax.random.PRNGKey(3), "seed": 3}


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("jit", [False, True])
def test_gaussian_privatizer_keeps_its_state(key, jit):
    histories = []
    for swap in (False, True):
        if swap:
            ours.install()
        privatizer = jax_privacy.noise_addition.gaussian_privatizer(stddev=2.0, prng_key=key)
        update = jax.jit(privatizer.update) if jit else privatizer.update
        state, history = privatizer.init(GRADS), []
        for _ in range(3):
            noisy, state = update(sum_of_clipped_grads=GRADS, noise_state=state)
            history.append((noisy, state))
        histories.append(history)
    for (noisy, (key_data, empty)), (same, state) in zip(*histories, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), noisy, same)
        assert empty == state[1] == ()
        assert key_data.dtype == state[0].dtype
        assert (key_data == state[0]).all()
    # A state of either goes on in the other.
    middle = histories[0][0][1]
    again = update(GRADS, middle)[0]
    jax.tree.map(np.testing.assert_array_equal, again, histories[1][1][0])
    # Checkpoints may give back lists.
    again = update(GRADS, list(middle))[0]
    jax.tree.map(np.testing.assert_array_equal, again, histories[1][1][0])


def test_gaussian_privatizer_in_a_trace_needs_no_key(swapped):
    make = jax_privacy.noise_addition.gaussian_privatizer
    key = jax.random.key(5)

    @jax.jit
    def step(grads, key, stddev):
        return make(stddev=stddev).update(grads, (key, ()))[0]

    expected = make(stddev=2.0, prng_key=key).update(GRADS, (key, ()))[0]
    jax.tree.map(np.testing.assert_array_equal, step(GRADS, key, 2.0), expected)
    with pytest.raises(ValueError, match="expected a prng_key inside a trace"):
        jax.jit(lambda grads: make(stddev=1.0).init(grads))(GRADS)


def test_gaussian_privatizer_uses_a_key_once(swapped):
    privatizer = jax_privacy.noise_addition.gaussian_privatizer(stddev=1.0)
    assert repr(privatizer) == "gaussian_privatizer(stddev=1.0, swapped in)"
    models = jnp.zeros((3, 5))
    with pytest.raises(ValueError, match="same noise"):
        jax.vmap(privatizer.init)(models)
    with pytest.raises(ValueError, match="same noise"):
        jax.vmap(privatizer.update, (0, None))(models, privatizer.init(models[0]))
    one, other = (privatizer.init(models[0])[0] for _ in range(2))
    assert (jax.random.key_data(one) != jax.random.key_data(other)).any()


def test_gaussian_privatizer_without_a_key_has_a_state_that_orbax_restores(swapped, tmp_path):
    """The state is a key, and orbax restores types of keys by their names in JAX alone."""
    ocp = pytest.importorskip("orbax.checkpoint")
    state = jax_privacy.noise_addition.gaussian_privatizer(stddev=1.0).init(GRADS)
    assert str(jax.random.key_impl(state[0])) == "threefry2x32"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", {"key": state[0]})
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", {"key": state[0]})
    np.testing.assert_array_equal(*map(jax.random.key_data, (restored["key"], state[0])))


def test_gaussian_privatizer_draws_keys_and_checks(swapped):
    make = jax_privacy.noise_addition.gaussian_privatizer
    keys = [make(stddev=1.0).init(GRADS)[0] for _ in range(2)]
    assert (jax.random.key_data(keys[0]) != jax.random.key_data(keys[1])).any()
    with pytest.raises(ValueError, match="stddev"):
        make(stddev=-1.0)
    with pytest.raises(TypeError, match="prng_key"):
        make(stddev=1.0, prng_key="seed")
    with pytest.raises(TypeError, match="gradients of dtype"):
        make(stddev=1.0, prng_key=1).init({"i": jnp.zeros(2, jnp.int32)})
    other = ours.noise_addition.gaussian_privatizer(stddev=1.0, prng_key=1)
    with pytest.raises(ValueError, match=r"noise_state.*\(key, \(\)\)"):
        make(stddev=1.0, prng_key=1).update(GRADS, other.init(GRADS))
    with pytest.raises(ValueError, match="nonsense"):
        make(stddev=1.0, prng_key=1, implementation="nonsense").update(
            GRADS, (jax.random.key(0), ())
        )
    with pytest.raises(ValueError, match="nonsense"):
        ours.implementation("nonsense")


def test_equal_privatizers_share_what_is_compiled(swapped):
    compiled = []

    def listen(event, duration, **_):
        compiled.append(event)

    def sweep(*seeds):
        for seed in seeds:
            make = jax_privacy.noise_addition.gaussian_privatizer
            privatizer = make(stddev=1.0 + seed, prng_key=seed)
            privatizer.update(GRADS, privatizer.init(GRADS))

    sweep(0, 1)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        sweep(2, 3, 4)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not [event for event in compiled if "backend_compile" in event]


def test_skipped_checks():
    coef, other = jnp.array([1.0, 0.5, 0.25]), jnp.array([1.0, 0.75])

    def results():
        T = theirs.toeplitz
        return [
            T.multiply(coef, other, skip_checks=True),
            T.multiply(coef, other, 4),
            T.multiply(coef, other, n=2, skip_checks=False),
            T.minsep_sensitivity_squared(coef, 2, 1),
            T.minsep_sensitivity_squared(coef, 2, None, 7),
            T.minsep_sensitivity_squared(coef, 1, 2, 7, True),
            T.minsep_sensitivity_squared(strategy_coef=coef, min_sep=2, skip_checks=True),
            T.per_query_error(strategy_coef=coef, n=6, skip_checks=True),
            T.per_query_error(noising_coef=other, workload_coef=coef, n=4, skip_checks=True),
            jax.jit(lambda c: T.minsep_sensitivity_squared(c, 2, 2, skip_checks=True))(coef),
            jax.jit(lambda c: T.per_query_error(strategy_coef=c, n=6, skip_checks=True))(coef),
        ]

    expected = results()
    ours.install()
    for value, want in zip(results(), expected, strict=True):
        np.testing.assert_allclose(value, want, rtol=1e-6)
    with pytest.raises(ValueError, match="3 and 2"):
        theirs.toeplitz.multiply(coef, other)


@pytest.mark.parametrize("coef", [[1.0, 0.5, 0.75], [1.0, -0.5, -0.75], [-1.0, -2.0]])
def test_coefficients_whose_sensitivity_is_only_bounded_are_refused(swapped, coef):
    """As in jax_privacy, whose buffered_toeplitz.optimize counts on it."""
    coef = jnp.array(coef)
    with pytest.raises(ValueError, match="non-negative and non-increasing"):
        theirs.toeplitz.minsep_sensitivity_squared(coef, 2, n=5)
    bound = theirs.toeplitz.minsep_sensitivity_squared(coef, 2, n=5, skip_checks=True)
    assert bound == mine.toeplitz.minsep_sensitivity_squared(coef, 2, n=5)


@pytest.mark.parametrize("optimize", [False, True])
def test_scans_by_name(monkeypatch, optimize):
    asked = []

    def scan_of(n, bands):
        def scan(*args):
            asked.append((n, bands))
            return jax.lax.scan(*args)

        return scan

    monkeypatch.setattr(theirs.banded, "_equinox_scan_fn", scan_of)
    ours.install()
    C, A = theirs.banded.ColumnNormalizedBanded.default(6, 2), Original.prefix_sum()
    if optimize:
        theirs.banded.optimize(6, bands=2, A=A, max_optimizer_steps=1, scan_fn="equinox")
    else:
        plain = theirs.banded.per_query_error(C, A)
        np.testing.assert_array_equal(theirs.banded.per_query_error(C, A, "equinox"), plain)
        named = theirs.banded.per_query_error(C, scan_fn="equinox")
        np.testing.assert_allclose(named, plain, rtol=1e-6)
    assert set(asked) == {(6, 2)}


# -- The report, and programs -----------------------------------------------------------------


def test_the_page_for_users_of_jax_privacy_names_everything():
    page = (pathlib.Path(__file__).parents[1] / "docs" / "migrating.md").read_text()
    for entry in _swap.replacements():
        assert f"`{entry.name}`" in page


def test_the_page_for_users_of_jax_privacy_names_what_there_is():
    page = (pathlib.Path(__file__).parents[1] / "docs" / "migrating.md").read_text()
    sections = re.split(r"^### (.*)$", page, flags=re.MULTILINE)[1:]
    assert len(sections) >= 20
    for title, text in zip(sections[::2], sections[1::2], strict=True):
        modules = [name for name in re.findall(r"[\w.]+", title) if name != "and"]
        if modules[0] == "matrix_factorization.optimization":
            modules[1:] = [f"matrix_factorization.{name}" for name in modules[1:]]
        modules = [importlib.import_module(f"jax_privacy_kernels.{name}") for name in modules]
        public = {name for module in modules for name in module.__all__}
        rows = [row.split("|")[1] for row in text.splitlines() if row.startswith("| `")]
        for name in re.findall(r"`(\w+)`", " ".join(rows)):
            assert name in public, f"{title}: {name}"


def test_the_report_lists_the_table():
    assert "swap not installed, would replace" in report()
    with ours.installed():
        text = report()
    assert "swap installed, replaces" in text
    for entry in _swap.replacements():
        assert entry.name in text.split("swap installed")[1]
    assert "minsep_sensitivity_squared, multiply, per_query_error (adapted)" in text


def run(*arguments, cwd, code=0):
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stderr
    return result


ORDERS = """
import sys
import jax_privacy_kernels
loaded = set(sys.modules)
assert "jax_privacy" not in loaded
{before}
jax_privacy_kernels.install()
assert not {{"keras", "torch", "tensorflow", "jax_privacy.keras_api"}} & set(sys.modules)
{after}
jax_privacy_kernels.install()
import jax_privacy
from jax_privacy.experimental import execution_plan
from jax_privacy.matrix_factorization.toeplitz import inverse_coef
from jax_privacy_kernels.matrix_factorization import toeplitz
assert inverse_coef is toeplitz.inverse_coef is execution_plan.toeplitz.inverse_coef
assert jax_privacy.matrix_factorization.toeplitz.loss is toeplitz.loss
jax_privacy_kernels.uninstall()
assert execution_plan.toeplitz.inverse_coef is not toeplitz.inverse_coef
assert jax_privacy.matrix_factorization.toeplitz.loss is not toeplitz.loss
"""
IMPORTS = [
    "import jax_privacy",
    "from jax_privacy.experimental import execution_plan",
    "from jax_privacy.matrix_factorization import toeplitz",
]


@pytest.mark.parametrize(
    ("before", "after"), [("", IMPORTS[2]), (IMPORTS[2], IMPORTS[1]), (IMPORTS[1], IMPORTS[0])]
)
@pytest.mark.subprocess
def test_any_order_of_imports(tmp_path, before, after):
    run("-c", ORDERS.format(before=before, after=after), cwd=tmp_path)


PROGRAM = """
import sys
import helper
from jax_privacy import noise_addition
print(sys.argv, sys.path[0], __name__, noise_addition.gaussian_privatizer.__module__)
if sys.argv[-1] == "fail":
    raise ArithmeticError("on purpose")
sys.exit(int(sys.argv[-1]))
"""


@pytest.fixture
def folder(tmp_path):
    """With a program, and a module beside it."""
    folder = tmp_path / "somewhere"
    folder.mkdir()
    (folder / "program.py").write_text(PROGRAM)
    (folder / "helper.py").write_text("")
    return folder


@pytest.mark.subprocess
def test_python_m_runs_a_program(folder):
    command = ["somewhere/program.py", "--help", "-m", "3"]
    plain = run(*command, cwd=folder.parent, code=3).stdout
    swapped = run("-m", "jax_privacy_kernels", *command, cwd=folder.parent, code=3).stdout
    assert plain == f"{command} {folder} __main__ functools\n"
    assert swapped == plain.replace("functools", "jax_privacy_kernels.noise_addition")


@pytest.mark.subprocess
def test_python_m_runs_a_module_and_passes_its_errors_on(folder):
    command = ["-m", "jax_privacy_kernels", "-m", "program", "--help", "fail"]
    result = run(*command, cwd=folder, code=1)
    arguments = [str(folder / "program.py"), "--help", "fail"]
    assert result.stdout == f"{arguments} {folder} __main__ jax_privacy_kernels.noise_addition\n"
    assert "ArithmeticError: on purpose" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--", "a", "--"],
        pytest.param(["-m", "--", "--force"], marks=pytest.mark.nightly),
        pytest.param([], marks=pytest.mark.nightly),
    ],
)
@pytest.mark.subprocess
def test_python_m_passes_all_arguments_on(tmp_path, arguments):
    (tmp_path / "show.py").write_text("import sys; print(sys.argv[1:])")
    for program in (["show.py"], ["-m", "show"]):
        command = ["-m", "jax_privacy_kernels", *program, *arguments]
        assert run(*command, cwd=tmp_path).stdout == f"{arguments}\n"


AS_MAIN = """
import atexit, pickle, sys, threading

class Thing:
    pass

def late():
    assert type(pickle.loads(pickle.dumps(Thing()))) is sys.modules["__main__"].Thing
    print("late")

main = sys.modules["__main__"]
print(vars(main) is globals(), __file__, __package__, __spec__ and __spec__.name, __name__)
atexit.register(late)
threading.Timer(0.2, late).start()
"""


@pytest.mark.parametrize(
    "program",
    sweeps.cases(
        ["as_main.py", "folder", "-m as_main", "-m package", "packed.zip"],
        ["as_main.py", "-m package", "packed.zip"],
    ),
)
@pytest.mark.subprocess
def test_a_program_is_main(tmp_path, program):
    (tmp_path / "as_main.py").write_text(AS_MAIN)
    for name in ("folder", "package"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__main__.py").write_text(AS_MAIN)
    (tmp_path / "package" / "__init__.py").write_text("")
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as packed:
        packed.writestr("__main__.py", AS_MAIN)
    plain = run(*program.split(), cwd=tmp_path)
    swapped = run("-m", "jax_privacy_kernels", *program.split(), cwd=tmp_path)
    assert plain.stdout.count("late") == 2
    assert swapped.stdout == plain.stdout
    assert "Error" not in swapped.stderr


LATE = """
import os
os.environ["JAX_ENABLE_X64"] = "1"
os.environ["HOME"] = "elsewhere"
"""


@pytest.mark.subprocess
def test_python_m_warns_of_variables_that_come_too_late(tmp_path, monkeypatch):
    (tmp_path / "late.py").write_text(LATE)
    command = ["-m", "jax_privacy_kernels", "late.py"]
    (line,) = (x for x in run(*command, cwd=tmp_path).stderr.splitlines() if "Warning" in x)
    assert line.startswith(f"{tmp_path / 'late.py'}:3: UserWarning: JAX_ENABLE_X64=1 comes too")
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    assert "Warning" not in run(*command, cwd=tmp_path).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["missing.py"], "no file 'missing.py'"), (["-m"], "name of a module"), (["-x"], "-x")],
)
def test_python_m_refuses(capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not _swap.is_installed()


def test_python_m_without_a_program_reports(capsys):
    main([])
    assert capsys.readouterr().out == report() + "\n"
