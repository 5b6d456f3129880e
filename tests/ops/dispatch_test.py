"""Which implementation runs, and what is said when one cannot."""

from __future__ import annotations

import contextlib
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_privacy_kernels
from jax_privacy_kernels.ops import (
    BandedRecurrence,
    _dispatch,
    _ffi,
    correlated_noise,
    implementation,
    init_correlated_noise,
)
from jax_privacy_kernels.ops.correlated_noise import IMPLEMENTATIONS

KEY = jax.random.key(0)
RECURRENCE = BandedRecurrence(jnp.array([1.0, 0.5]))
GRADS = jnp.zeros(5)


def noise(**kwargs):
    state = init_correlated_noise(GRADS, RECURRENCE, key=KEY)
    return correlated_noise(
        GRADS, state, RECURRENCE, stddev=1.0, key_impl=jax.random.key_impl(KEY), **kwargs
    )


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv(_dispatch.ENVIRONMENT, raising=False)
    monkeypatch.setattr(_dispatch, "NAMES", (*_dispatch.NAMES, *"abc"))  # of the tables here


@pytest.fixture
def ran(monkeypatch):
    """Implementations "a", "b" and "c" of the op, and the names of those that ran."""
    names = []

    def entry(name):
        def run(*arguments):
            if names[-1:] != [name]:  # traced for its shapes, and for the platform
                names.append(name)
            return IMPLEMENTATIONS["jax"].run(*arguments)

        return IMPLEMENTATIONS["jax"]._replace(run=run)

    table = {"jax": IMPLEMENTATIONS["jax"], **{name: entry(name) for name in "abc"}}
    module = sys.modules["jax_privacy_kernels.ops.correlated_noise"]
    jax.clear_caches()  # a step traced by the test before would not run
    monkeypatch.setattr(module, "IMPLEMENTATIONS", table)
    yield names
    jax.clear_caches()


def test_the_call_goes_before_the_block_before_the_environment(ran, monkeypatch):
    noise()
    assert ran == []  # "jax", the first of the table
    monkeypatch.setenv(_dispatch.ENVIRONMENT, "a")
    noise()
    assert ran == ["a"]
    with implementation("b"):
        noise()
        assert ran == ["a", "b"]
        noise(implementation="c")
        assert ran == ["a", "b", "c"]
    monkeypatch.delenv(_dispatch.ENVIRONMENT)
    with implementation("b"):
        noise(implementation="jax")
    assert ran == ["a", "b", "c"]


def test_an_empty_variable_is_none(ran, monkeypatch):
    monkeypatch.setenv(_dispatch.ENVIRONMENT, "")
    noise()
    assert ran == []


def asked_for():
    return _dispatch.requested("op", dict.fromkeys("abc", IMPLEMENTATIONS["jax"]), None)


def test_blocks_nest_and_end_with_exceptions():
    assert jax_privacy_kernels.implementation is implementation
    assert asked_for() is None
    with implementation("a"):
        with implementation("b"):
            assert asked_for() == "b"
        assert asked_for() == "a"
        with contextlib.suppress(KeyError), implementation("c"):
            assert asked_for() == "c"
            raise KeyError
        assert asked_for() == "a"
        with implementation(None):
            assert asked_for() is None
    assert asked_for() is None


def test_a_block_of_an_unknown_name_does_not_begin():
    with pytest.raises(ValueError, match=r"one of jax, cpp, pallas, triton.*found 'fortran'"):
        implementation("fortran")
    assert asked_for() is None


@pytest.mark.parametrize("how", ["call", "environment"])
def test_unknown_name(monkeypatch, how):
    if how == "environment":
        monkeypatch.setenv(_dispatch.ENVIRONMENT, "fortran")
    message = r"'fortran' of correlated_noise.*none of that name.*available.*'jax'"
    kwargs = {"implementation": "fortran"} if how == "call" else {}
    with pytest.raises(ValueError, match=message):
        noise(**kwargs)


def test_candidates_are_the_first_that_can_by_platform():
    def entry(platforms, unavailable=None, refusal=None):
        return _dispatch.Implementation(
            platforms, lambda: None, unavailable=lambda: unavailable, refuse=lambda *_: refusal
        )

    table = {
        "gone": entry(("cpu",), unavailable="not built"),
        "picky": entry(("cpu", "cuda"), refusal="too wide"),
        "gpu": entry(("cuda",)),
        "any": entry(_dispatch.PLATFORMS),
    }
    chosen, refusals = _dispatch.candidates(table, None)
    assert chosen == {"cpu": "any", "cuda": "gpu", "rocm": "any", "tpu": "any"}
    assert refusals == ["gone: not built", "picky: too wide"]
    assert _dispatch.candidates(table, "gpu") == ({"cuda": "gpu"}, [])
    assert _dispatch.candidates(table, "picky") == ({}, ["picky: too wide"])


@pytest.fixture
def no_extension(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_privacy_kernels._jpk", None)
    # A submodule that was imported is an attribute of the package as well.
    monkeypatch.delattr(jax_privacy_kernels, "_jpk", raising=False)
    monkeypatch.setattr(_ffi, "_registered", _ffi._register())
    _ffi.unavailable.cache_clear()
    jax.clear_caches()
    yield
    _ffi.unavailable.cache_clear()
    jax.clear_caches()


def test_without_the_extension(no_extension):
    with pytest.warns(RuntimeWarning, match="without its compiled kernels.*_jpk") as caught:
        actual = noise()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = noise(implementation="jax")
        jax.tree.map(np.testing.assert_array_equal, actual, expected)
        noise()
        with pytest.raises(
            ValueError, match=r"'cpp'.*cannot be loaded.*_jpk.*available: \[.*'jax'\]"
        ):
            noise(implementation="cpp")
        with implementation("cpp"), pytest.raises(ValueError, match="cannot be loaded"):
            noise()


# -- Branches ---------------------------------------------------------------------------------


def branches(**by_platform):
    """A function that runs the branch of the platform, and the platforms that were traced."""
    traced = []

    def branch(platform, fun):
        def run(x):
            traced.append(platform)
            return fun(x)

        return run

    named = {platform: branch(platform, fun) for platform, fun in by_platform.items()}
    return (lambda x: _dispatch.per_platform(named, "not here", x)), traced


def test_other_platforms_are_not_traced():
    # The first gives the shapes.
    double, traced = branches(cpu=lambda x: 2 * x, cuda=lambda x: x + x, tpu=lambda x: x + x)
    assert jax.jit(double)(3.0) == 6
    assert set(traced) == {"cpu"}


def test_branches_map_and_scan():
    double, _ = branches(cuda=lambda x: x, cpu=lambda x: 2 * x)
    x = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(jax.vmap(double)(x), 2 * x)
    np.testing.assert_array_equal(jax.vmap(jax.vmap(double), 1, 1)(x), 2 * x)
    np.testing.assert_array_equal(jax.lax.map(double, x), 2 * x)
    outer = jax.vmap(lambda i: double(x[0]) * i)(jnp.arange(2.0))
    np.testing.assert_array_equal(outer, [0 * x[0], 2 * x[0]])


def test_branches_run_without_jit():
    double, _ = branches(cuda=lambda x: x, cpu=lambda x: 2 * x)
    with jax.disable_jit():
        np.testing.assert_array_equal(double(jnp.ones(2)), [2, 2])


def test_platforms_without_a_branch_refuse():
    on_cuda, _ = branches(cuda=lambda x: x)
    with pytest.raises(NotImplementedError, match="not here"):
        jax.jit(on_cuda)(1.0)
