"""The swap and the versions of jax_privacy: which it takes, how they differ, what errors say."""

from __future__ import annotations

import importlib.machinery
import inspect
import re
import sys
import types

import jax
import jax.numpy as jnp
import optax
import pytest

import jax_privacy_kernels as ours
from jax_privacy_kernels import _swap
from jax_privacy_kernels._report import report

jax_privacy = pytest.importorskip("jax_privacy", reason="install the test extra")
theirs = jax_privacy.matrix_factorization
mine = ours.matrix_factorization


@pytest.fixture(autouse=True)
def _leave_nothing_behind():
    yield
    ours.uninstall()


def solve_banded(coef, rhs, blocks=None):
    """Of some newer version."""


def test_a_function_that_asks_for_more_is_left_alone(monkeypatch):
    monkeypatch.setattr(theirs.toeplitz, "solve_banded", solve_banded)
    ours.install()
    assert theirs.toeplitz.solve_banded is solve_banded
    (entry,) = (entry for entry in _swap.replacements() if entry.name == "solve_banded")
    assert entry.note == "kept: ours does not take all of (coef, rhs, blocks=None)"
    assert theirs.toeplitz.inverse_coef is mine.toeplitz.inverse_coef


# -- Versions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["2.0.0", "2.1.0.dev0", "2.2.1", "2.3.0.dev0", "2.3"])
def test_known_versions(monkeypatch, recwarn, version):
    monkeypatch.setattr(jax_privacy, "__version__", version)
    monkeypatch.setattr(_swap.metadata, "version", lambda name: "1.0.0")  # not what is imported
    ours.install()
    assert theirs.StreamingMatrix is mine.StreamingMatrix
    assert not [str(w.message) for w in recwarn if "swap" in str(w.message)]
    assert f"of jax-privacy {version}" in report()


@pytest.mark.parametrize("version", ["1.0.0", "0.4", "unknown", ""])
def test_an_older_version_is_refused_unless_forced(monkeypatch, version):
    monkeypatch.setattr(jax_privacy, "__version__", version)
    before = theirs.StreamingMatrix
    with pytest.raises(RuntimeError, match=rf"jax-privacy 2.0 to 2.3, found {version}") as error:
        ours.install()
    assert "force" in str(error.value)
    assert theirs.StreamingMatrix is before is not mine.StreamingMatrix
    with ours.installed(force=True):
        assert theirs.StreamingMatrix is mine.StreamingMatrix
        ours.install()  # which is no news
        with ours.installed():
            pass
        assert theirs.StreamingMatrix is mine.StreamingMatrix


@pytest.mark.parametrize("version", ["2.4.0", "2.10", "3.0.0.dev0", "20"])
def test_a_later_version_is_a_warning_once(monkeypatch, recwarn, version):
    monkeypatch.setattr(jax_privacy, "__version__", version)
    monkeypatch.setattr(theirs.toeplitz, "solve_banded", solve_banded)
    message = (
        rf"with jax-privacy 2.0 to 2.3, found {re.escape(version)}: "
        r"its matrix_factorization.toeplitz.solve_banded stay"
    )
    with pytest.warns(UserWarning, match=message) as record:
        ours.install()
    assert record[0].filename == __file__
    assert theirs.toeplitz.solve_banded is solve_banded
    assert theirs.StreamingMatrix is mine.StreamingMatrix
    recwarn.clear()
    ours.install()
    ours.uninstall()
    ours.install()
    assert not recwarn


def test_a_version_that_is_not_in_the_code_is_the_distributions(monkeypatch):
    monkeypatch.delattr(jax_privacy, "__version__")
    monkeypatch.setattr(_swap.metadata, "version", lambda name: "1.9.1")
    with pytest.raises(RuntimeError, match=r"found 1\.9\.1"):
        ours.install()

    def missing(name):
        raise _swap.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(_swap.metadata, "version", missing)
    with pytest.raises(RuntimeError, match=r"found unknown"):
        ours.install()
    with ours.installed(force=True):
        assert theirs.StreamingMatrix is mine.StreamingMatrix


def test_without_jax_privacy_the_error_says_so(monkeypatch):
    monkeypatch.setattr(_swap.importlib.util, "find_spec", lambda name: None)
    for call in (ours.install, lambda: ours.install(force=True), _swap.replacements):
        with pytest.raises(ModuleNotFoundError, match=r"needs jax-privacy 2.0 to 2.3, which is"):
            call()
    assert "the swap needs jax-privacy" in report()


def test_what_takes_the_arguments_of_ours_is_ours(monkeypatch):
    """Since version 2.2: no skip_checks, and coefficients that rise have a bound."""

    def multiply(lhs_coef, rhs_coef, n=None):
        """Of 2.2."""

    def minsep_sensitivity_squared(strategy_coef, min_sep, *, n, max_participations=None):
        """Of 2.2."""

    def per_query_error(*, strategy_coef=None, noising_coef=None, n=None, workload_coef=None):
        """Of 2.2."""

    for function in (multiply, minsep_sensitivity_squared, per_query_error):
        monkeypatch.setattr(theirs.toeplitz, function.__name__, function)
    ours.install()
    for name in ("multiply", "minsep_sensitivity_squared", "per_query_error"):
        assert getattr(theirs.toeplitz, name) is getattr(mine.toeplitz, name)
    coef = jnp.array([1.0, 0.5, 0.75])
    bound = theirs.toeplitz.minsep_sensitivity_squared(coef, 2, n=5)
    assert bound == mine.toeplitz.minsep_sensitivity_squared(jnp.array([1.0, 0.75, 0.75]), 2, n=5)


def test_checks_may_be_private(monkeypatch):
    """As they are since version 2.2."""
    name = "jax_privacy.matrix_factorization._checks"
    private = types.ModuleType(name)
    private.__spec__ = importlib.machinery.ModuleSpec(name, None)
    before = private.check_square = theirs.checks.check_square
    monkeypatch.setitem(sys.modules, name, private)
    with ours.installed():
        assert private.check_square is mine.checks.check_square
        of_checks = {e.module for e in _swap.replacements() if e.name == "check_square"}
        assert "matrix_factorization._checks" in of_checks
    assert private.check_square is before


# -- What errors say ---------------------------------------------------------------------------


# Words that jax_privacy's own tests look for, so that programs may as well.
PHRASES = [
    ("Expected 2D", lambda mf, eye: privatizer_of(jnp.ones(10))),
    ("exactly one of", lambda mf, eye: mf.dense.per_query_error()),
    (
        "exactly one of",
        lambda mf, eye: mf.dense.per_query_error(strategy_matrix=eye, noising_matrix=eye),
    ),
    ("must be orthogonal", lambda mf, eye: mf.sensitivity.get_sensitivity_banded(jnp.tri(4), 1)),
    ("must be positive", lambda mf, eye: mf.sensitivity.fixed_epoch_sensitivity(eye, 0)),
    ("must be positive", lambda mf, eye: mf.sensitivity.fixed_epoch_sensitivity(eye, -3)),
    ("must divide n", lambda mf, eye: mf.sensitivity.fixed_epoch_sensitivity(eye, 3)),
    (
        "lhs_coef and rhs_coef must have the same length",
        lambda mf, eye: mf.toeplitz.multiply(eye[0], jnp.ones(2)),
    ),
    (
        "min_sep must be positive",
        lambda mf, eye: mf.toeplitz.minsep_sensitivity_squared(jnp.ones(1), min_sep=0, n=1),
    ),
    ("X.*symmetric", lambda mf, eye: mf.checks.check(X=jnp.tri(3))),
    ("A.*finite", lambda mf, eye: mf.checks.check(A=jnp.full((1, 1), jnp.nan))),
    ("B.*lower-triangular", lambda mf, eye: mf.checks.check(B=jnp.ones((3, 3)))),
    ("B and C shapes do not match", lambda mf, eye: mf.checks.check(B=eye[:, :3], C=eye[:2])),
    ("Expected matrix shapes", lambda mf, eye: mf.checks.check(A=eye, X=jnp.eye(3))),
    ("dtype=jnp.float64", lambda mf, eye: blt(mf).build([0.9], [0.1])),
    ("dtype=jnp.float64", lambda mf, eye: blt(mf)(**float64_buffers()).inverse()),
    (
        "buf_decay and output_scale must be.*1D",
        lambda mf, eye: blt(mf).build([[0.9]], [0.1], dtype=jnp.float32),
    ),
    (
        "buf_decay and output_scale must have the same length",
        lambda mf, eye: blt(mf).build([0.9, 0.8], [0.1], dtype=jnp.float32),
    ),
    (
        "buf_decay and output_scale must have the same dtype",
        lambda mf, eye: blt(mf)(
            buf_decay=jnp.ones(1), output_scale=jnp.ones(1, jnp.bfloat16)
        ).validate(),
    ),
    (
        "num_buffers must be >= 1",
        lambda mf, eye: blt(mf).from_rational_approx_to_sqrt_x(num_buffers=0),
    ),
    ("Unrecognized penalty multipliers.*bad", lambda mf, eye: bad_penalty(mf.buffered_toeplitz)),
]
# Versions since 2.2 give a bound.
PHRASES_OF_2_0 = [
    (
        "coef must be non-negative",
        lambda mf, eye: mf.toeplitz.minsep_sensitivity_squared(jnp.array([-1.0]), 1),
    ),
    (
        "coef must be non-increasing",
        lambda mf, eye: mf.toeplitz.minsep_sensitivity_squared(jnp.array([1.0, 2.0, 1.0]), 1),
    ),
]


def privatizer_of(matrix):
    return jax_privacy.noise_addition.matrix_factorization_privatizer(matrix, stddev=1.0)


def blt(mf):
    return mf.buffered_toeplitz.BufferedToeplitz


def float64_buffers():
    with jax.enable_x64(True):
        return {"buf_decay": jnp.array([0.9]), "output_scale": jnp.array([0.1])}


def bad_penalty(module):
    with jax.enable_x64(True):
        blt = module.get_init_blt(num_buffers=1)
        module.LossFn.build_closed_form_single_participation(
            n=10, penalty_multipliers={"bad_penalty": 0.0}
        ).penalized_loss(blt, blt.inverse())


def phrases():
    old = "skip_checks" in inspect.signature(theirs.toeplitz.multiply).parameters
    return PHRASES + (PHRASES_OF_2_0 if old else [])


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(("words", "call"), phrases(), ids=lambda x: x if type(x) is str else "")
def test_errors_contain_the_words_of_jax_privacy(words, call, swap):
    if swap:
        ours.install()
    with pytest.raises(ValueError, match=words) as error:
        call(theirs, jnp.eye(4))
    if swap and "dtype=jnp.float64" not in words:
        assert re.search("[Ee]xpected .*found", str(error.value), re.DOTALL)


def test_errors_of_optimizers_contain_the_words_of_jax_privacy():
    optimizer = ours.optimizers.scale_then_privatize(optax.sgd(0.1))
    with pytest.raises(ValueError, match="adaptive optimizer"):
        optimizer.pre_clipping_transform(())
