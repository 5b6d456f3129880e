"""jax_privacy, in place, on this library.

For every public name of ours that a module of jax_privacy has as well, every reference to
jax_privacy's object that a loaded module of jax_privacy holds is pointed to ours. Modules that are
loaded later take it from those. What jax_privacy has and we do not, and its private functions, stay
as they are: they call ours by the names they always did.

Two tables say what is particular: `_MODULES`, which module of ours goes where, and `_RULES`, which
names are not simply replaced. What differs between versions of jax_privacy is read off the
signatures of the one that is installed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_privacy_kernels import noise_addition, ops
from jax_privacy_kernels._checks import is_concrete
from jax_privacy_kernels._mirrored import Mirrored, pair, unpair

__all__ = ["KNOWN", "Replacement", "install", "installed", "replacements", "uninstall"]

_P = inspect.Parameter
_UNFIT = "kept: ours does not take all of"

KNOWN = ("2.0", "2.1", "2.2", "2.3")
"""Versions of jax-privacy, major and minor, that the swap is tested with."""

# Module of jax_privacy -> ours; one that a version does not have is left out.
_MODULES = {
    "experimental.monte_carlo.delta_calculation": "experimental.monte_carlo.delta_calculation",
    "experimental.monte_carlo.sample_generation": "experimental.monte_carlo.sample_generation",
    "noise_addition": "noise_addition",
    "optimizers": "optimizers",
    "sharding_utils": "sharding_utils",
    "matrix_factorization._checks": "matrix_factorization.checks",
    "matrix_factorization.banded": "matrix_factorization.banded",
    "matrix_factorization.buffered_toeplitz": "matrix_factorization.buffered_toeplitz",
    "matrix_factorization.checks": "matrix_factorization.checks",
    "matrix_factorization.dense": "matrix_factorization.dense",
    "matrix_factorization.optimization": "matrix_factorization.optimization",
    "matrix_factorization.sensitivity": "matrix_factorization.sensitivity",
    "matrix_factorization.streaming_matrix": "matrix_factorization.streaming_matrix",
    "matrix_factorization.toeplitz": "matrix_factorization.toeplitz",
}

_lock = threading.RLock()
_current: tuple[Replacement, ...] = ()  # what is replaced now
_blocks: list[bool] = []  # whether it was installed before each block that is not over
_warned: set[str] = set()  # versions


class Replacement(NamedTuple):
    """A public name that both libraries have.

    Attributes:
      module: of jax_privacy, without the package's name.
      name: in that module.
      original: jax_privacy's object.
      replacement: ours; the original itself if that stays.
      note: what is particular about it, or "".
    """

    module: str
    name: str
    original: Any
    replacement: Any
    note: str


def install(*, force: bool = False) -> None:
    """Makes the installed jax-privacy run on this library, in this process.

    Every public name that both libraries have then means ours, in all modules of jax_privacy:
    those that are loaded, and those that will be. `python -m jax_privacy_kernels` lists them. What
    jax_privacy does not have is not added to it.

    Call it at any time, in any order with imports of jax_privacy, and as often as you like; after
    a module of jax_privacy was reloaded, call it again. But a name that your own module has taken
    before, ``from jax_privacy.noise_addition import gaussian_privatizer``, stays what it was, as
    does what has been traced or compiled: so call it first, or run the program by
    ``python -m jax_privacy_kernels program.py``. Processes that the program starts need their own
    call, unless forked from it (a forkserver's are not).

    Objects mix: a StreamingMatrix (ColumnNormalizedBanded, CallbackArgs, ...) of either library is
    accepted by the functions of either, and is an instance of either's class. The state of a
    privatizer does not mix, except `gaussian_privatizer`'s: continue a run with the library that
    began it. The noise is the same for the same key.

    A step costs nothing more: functions are ours themselves, or wrapped where the installed version
    of jax_privacy takes other arguments, outside of what is compiled.

    Args:
      force: Whether to go ahead with a version of jax-privacy that is older than all that this was
        tested with, or that does not say what it is.

    Raises:
      ModuleNotFoundError: jax-privacy is not installed.
      RuntimeError: its version is too old or unknown, and ``force`` is false.

    Warns:
      UserWarning: its version is newer than all that this was tested with, once. A function that
        takes arguments which ours does not is then left alone, and named.
    """
    global _current
    with _lock:
        found = version()
        if not (_current or force) and _release(found) < _release(KNOWN[0]):
            raise RuntimeError(
                f"expected jax-privacy {_known()}, found {found}, which the swap was not tested "
                "with; install(force=True), or python -m jax_privacy_kernels --force, replaces "
                "what fits"
            )
        plan = _plan()
        try:
            for entry in plan:
                if _is_mirrored(entry) and not any(entry is old for old in _current):
                    pair(entry.replacement, entry.original)
            _point({id(entry.original): entry.replacement for entry in plan})
        except BaseException:
            _restore(plan)
            _current = ()
            raise
        _current = plan
        if _release(found) > _release(KNOWN[-1]) and found not in _warned:
            _warned.add(found)
            warnings.warn(_of_later(found, plan), stacklevel=2)


def uninstall() -> None:
    """Takes `install` back, however often it was called; without it, does nothing.

    What a program took from jax_privacy in the meantime stays ours, and works with ours: a matrix
    made under the swap is then none for jax_privacy's own functions.
    """
    global _current
    with _lock:
        _restore(_current)
        _current = ()


@contextlib.contextmanager
def installed(*, force: bool = False) -> Iterator[None]:
    """Installs for a block; after it all is as it was before, installed or not.

    For the whole process, other threads included: of blocks that overlap the last to end restores
    what was before the first. The argument and errors are those of `install`.
    """
    with _lock:
        before = bool(_current)
        install(force=force)
        _blocks.append(before)
    try:
        yield
    finally:
        with _lock:
            before = _blocks[0]
            _blocks.pop()
            if before or _blocks:
                install(force=force)
            else:
                uninstall()


def replacements() -> tuple[Replacement, ...]:
    """What `install` has replaced, or would.

    Raises:
      ModuleNotFoundError: jax-privacy is not installed.
    """
    with _lock:
        version()
        return _current or _plan()


def is_installed() -> bool:
    return bool(_current)


def version() -> str:
    """That of the code which is imported; "unknown" if it does not say."""
    if importlib.util.find_spec("jax_privacy") is None:
        raise ModuleNotFoundError(f"the swap needs jax-privacy {_known()}, which is not installed")
    found = getattr(importlib.import_module("jax_privacy"), "__version__", None)
    if found is not None:
        return str(found)
    try:
        return metadata.version("jax-privacy")
    except metadata.PackageNotFoundError:  # from a source tree
        return "unknown"


def _release(version: str) -> tuple[int, ...]:
    """Major and minor, to be compared; (0, 0) of what is no version."""
    match = re.match(r"(\d+)(?:\.(\d+))?", version)
    return tuple(int(part or 0) for part in match.groups()) if match else (0, 0)


def _known() -> str:
    return f"{KNOWN[0]} to {KNOWN[-1]}"


def _of_later(version: str, plan: tuple[Replacement, ...]) -> str:
    left = [f"{entry.module}.{entry.name}" for entry in plan if entry.note.startswith(_UNFIT)]
    return (
        f"the swap was tested with jax-privacy {_known()}, found {version}: "
        + (
            f"its {', '.join(left)} stay jax_privacy's, as ours do not take"
            if left
            else "ours take"
        )
        + " the same arguments"
    )


# -- What to replace --------------------------------------------------------------------------


def _plan() -> tuple[Replacement, ...]:
    """Everything to be replaced. What is replaced already keeps its entry."""
    done = {(entry.module, entry.name): entry for entry in _current}
    plan = []
    for module, ours_name in _MODULES.items():
        names = f"jax_privacy.{module}", f"jax_privacy_kernels.{ours_name}"
        if not all(importlib.util.find_spec(name) for name in names):
            continue
        theirs, ours = map(importlib.import_module, names)
        for name in ours.__all__:
            if not hasattr(theirs, name):
                continue
            found = getattr(theirs, name)
            entry = done.get((module, name))
            if entry is None or entry.replacement is not found:  # or the module was reloaded
                chosen = _choose(f"{module}.{name}", found, getattr(ours, name))
                entry = Replacement(module, name, found, *chosen)
            plan.append(entry)
    return tuple(plan)


def _choose(name: str, original: Any, ours: Any) -> tuple[Any, str]:
    """The replacement of an object of jax_privacy, and a note."""
    rule = _RULES.get(name, _Rule())
    if rule.keep:
        return original, f"kept: {rule.keep}"
    if rule.adapt is not None and (rule.takes is None or rule.takes in _parameters(original)):
        adapter = functools.update_wrapper(rule.adapt(ours, original), ours)
        del adapter.__wrapped__  # or its signature would be taken for ours
        if _covers(adapter, original):
            return adapter, "adapted"
    if _covers(ours, original):
        return ours, ""
    return original, f"{_UNFIT} {inspect.signature(original)}"


def _covers(function: Any, original: Any) -> bool:
    """Whether one takes every call that the other takes, as far as signatures tell."""
    old, new = _parameters(original), _parameters(function)
    variadic = (_P.VAR_POSITIONAL, _P.VAR_KEYWORD)
    if not old or {p.kind for p in old.values()} >= set(variadic):
        return True  # which tells nothing

    def positional(parameters: Mapping[str, _P]) -> list[str]:
        return [p.name for p in parameters.values() if p.kind is _P.POSITIONAL_OR_KEYWORD]

    def required(parameters: Mapping[str, _P]) -> set[str]:
        return {
            p.name for p in parameters.values() if p.default is p.empty and p.kind not in variadic
        }

    in_order = positional(old)
    return (
        old.keys() <= new.keys()
        and required(new) <= required(old)
        and positional(new)[: len(in_order)] == in_order
    )


def _parameters(function: Any) -> Mapping[str, _P]:
    """Those of a function or class; none of other objects, and where there is no signature."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


# -- Taking names over, and giving them back --------------------------------------------------


def _point(to: Mapping[int, Any]) -> None:
    """Points names in all of jax_privacy that mean an object of that id to another one."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "jax_privacy" and isinstance(module, ModuleType):
            for key, value in list(vars(module).items()):
                if id(value) in to:
                    setattr(module, key, to[id(value)])


def _restore(plan: tuple[Replacement, ...]) -> None:
    _point({id(entry.replacement): entry.original for entry in plan})
    for entry in plan:
        if _is_mirrored(entry):
            unpair(entry.replacement)


def _is_mirrored(entry: Replacement) -> bool:
    ours = entry.replacement
    return ours is not entry.original and isinstance(ours, type) and issubclass(ours, Mirrored)


# -- Calls of jax_privacy that ours do not take -----------------------------------------------
#
# Each maps our function, and jax_privacy's, to one that takes the calls of jax_privacy's.


def _gaussian_privatizer(ours: Any, _: Any) -> Any:
    """The state is jax_privacy's, ``(key, ())``: its Keras API makes and takes one apart."""

    def gaussian_privatizer(
        *,
        stddev: float,
        prng_key: jax.Array | int | None = None,
        dtype: jax.typing.DTypeLike | None = None,
        intermediate_strategy: Any = noise_addition.SupportedStrategies.DEFAULT,
        implementation: str | None = None,
    ) -> optax.GradientTransformation:
        def make(key: Any) -> optax.GradientTransformation:
            return ours(
                stddev=stddev,
                prng_key=key,
                dtype=dtype,
                intermediate_strategy=intermediate_strategy,
                implementation=implementation,
            )

        make(0)  # checks the other arguments
        # Without a key one may be made in a trace, where only init needs it.
        keys = None if prng_key is None else noise_addition._Keys(prng_key)

        def init(model: Any) -> Any:
            key = keys.draw() if keys else _key_that_can_be_saved()
            jax.eval_shape(make(key).init, model)  # checks the model
            data, _ = ops.mark_tree(jax.random.key_data(key), model)
            key = jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))
            given = prng_key if isinstance(prng_key, jax.Array | np.ndarray) else key
            return _like(given, jnp.copy(key)), ()

        def update(sum_of_clipped_grads: Any, noise_state: Any, params: Any = None) -> Any:
            del params
            pair = isinstance(noise_state, tuple | list) and len(noise_state) == 2
            key = noise_state[0] if pair else None
            if not isinstance(key, jax.Array | np.ndarray):
                found = type(noise_state).__name__
                raise ValueError(f"expected noise_state to be (key, ()), found a {found}")
            noisy, next_key = _gaussian_step(
                sum_of_clipped_grads,
                noise_addition._as_key(key),
                jnp.asarray(stddev, jnp.result_type(float)),
                make=ours,
                dtype=dtype,
                intermediate_strategy=intermediate_strategy,
                implementation=implementation or ops.asked(),
            )
            return noisy, (_like(key, next_key), ())

        made = noise_addition.Privatizer(init, update)
        shown = stddev if is_concrete(stddev) else "traced"
        made.told = f"gaussian_privatizer(stddev={shown}, swapped in)"
        return made

    return gaussian_privatizer


def _key_that_can_be_saved() -> jax.Array:
    """A key of the system's entropy, of a type that JAX names: the state is one, and is saved."""
    words = jax.random.key_data(noise_addition._Keys(None).draw())[:2]
    return jax.random.wrap_key_data(words, impl="threefry2x32")


# One for all privatizers, so that a new one, of another stddev, compiles nothing.
@functools.partial(
    jax.jit, static_argnames=("make", "dtype", "intermediate_strategy", "implementation")
)
def _gaussian_step(
    grads: Any, key: jax.Array, stddev: Any, *, make: Any, **static: Any
) -> tuple[Any, jax.Array]:
    privatizer = make(stddev=stddev, prng_key=key, **static)
    noisy, _ = privatizer.update(grads, privatizer.init(grads))
    return noisy, jax.random.split(key)[0]


def _like(given: Any, key: jax.Array) -> jax.Array:
    """The key, typed or raw as another."""
    typed = jnp.issubdtype(given.dtype, jax.dtypes.prng_key)
    return key if typed else jax.random.key_data(key)


def _multiply(ours: Any, _: Any) -> Any:
    def multiply(
        lhs_coef: jax.Array, rhs_coef: jax.Array, n: int | None = None, skip_checks: bool = False
    ) -> jax.Array:
        return ours(lhs_coef, rhs_coef, n or (len(lhs_coef) if skip_checks else None))

    return multiply


def _minsep_sensitivity_squared(ours: Any, _: Any) -> Any:
    """Refuses coefficients that ours bounds: buffered_toeplitz of that version counts on it."""

    def minsep_sensitivity_squared(
        strategy_coef: jax.Array,
        min_sep: int,
        max_participations: int | None = None,
        n: int | None = None,
        skip_checks: bool = False,
    ) -> jax.Array:
        n = n or len(strategy_coef)
        if not skip_checks and is_concrete(strategy_coef):
            coef = np.asarray(strategy_coef)[:n]
            negative, rising = coef < 0, np.diff(coef, prepend=np.inf) > 0
            for what, bad in (("non-negative", negative), ("non-increasing", rising)):
                if bad.any():
                    at = int(bad.argmax())
                    raise ValueError(
                        f"coef must be {what}: expected strategy_coef to be non-negative and "
                        f"non-increasing, found strategy_coef[{at}] = {coef[at]}"
                    )
        return ours(strategy_coef, min_sep, n=n, max_participations=max_participations)

    return minsep_sensitivity_squared


def _per_query_error(ours: Any, _: Any) -> Any:
    def per_query_error(
        *,
        strategy_coef: jax.Array | None = None,
        noising_coef: jax.Array | None = None,
        n: int | None = None,
        workload_coef: jax.Array | None = None,
        skip_checks: bool = False,  # of values, which ours does not check where it cannot
    ) -> jax.Array:
        return ours(
            strategy_coef=strategy_coef,
            noising_coef=noising_coef,
            n=n or None,
            workload_coef=workload_coef,
        )

    return per_query_error


def _named_scan(ours: Any, original: Any) -> Any:
    """Takes the names that jax_privacy has for checkpointed scans of other packages."""
    signature = inspect.signature(ours)

    def adapted(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        name = arguments.get("scan_fn")
        if isinstance(name, str):
            C = arguments.get("C")
            n, bands = (arguments.get(size) or getattr(C, size) for size in ("n", "bands"))
            make_scan = getattr(importlib.import_module(original.__module__), f"_{name}_scan_fn")
            arguments["scan_fn"] = make_scan(n, bands)
        return ours(**arguments)

    adapted.__signature__ = signature  # type: ignore[attr-defined]
    return adapted


def _default_samples(ours: Any, original: Any) -> Any:
    """As many samples by default as jax_privacy's draws: one, since 2.3 with an axis of its own."""
    signature = inspect.signature(ours)
    default = inspect.signature(original).parameters["num_samples"].default
    parameters = [
        p.replace(default=default) if p.name == "num_samples" else p
        for p in signature.parameters.values()
    ]
    signature = signature.replace(parameters=parameters)

    def adapted(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return ours(*bound.args, **bound.kwargs)

    adapted.__signature__ = signature  # type: ignore[attr-defined]
    return adapted


class _Rule(NamedTuple):
    """How a name is replaced, if not by ours as it is.

    Attributes:
      adapt: Maps our function, and jax_privacy's, to the replacement.
      takes: A parameter that tells the versions whose function needs the adapter; None for all.
      keep: Why jax_privacy's object stays, or "".
    """

    adapt: Callable[[Any, Any], Any] | None = None
    takes: str | None = None
    keep: str = ""


_ONLY_A_TYPE = _Rule(keep="says a type, and nothing else")

_RULES = {
    "experimental.monte_carlo.sample_generation.generate_sample": _Rule(_default_samples),
    "experimental.monte_carlo.sample_generation.get_privacy_loss_sample": _Rule(_default_samples),
    "noise_addition.SupportedStrategies": _Rule(keep="ours takes its members"),
    "noise_addition.gaussian_privatizer": _Rule(_gaussian_privatizer),
    "matrix_factorization.banded.optimize": _Rule(_named_scan),
    "matrix_factorization.banded.per_query_error": _Rule(_named_scan),
    # Since 2.2 these three take what ours take.
    "matrix_factorization.toeplitz.minsep_sensitivity_squared": _Rule(
        _minsep_sensitivity_squared, takes="skip_checks"
    ),
    "matrix_factorization.toeplitz.multiply": _Rule(_multiply, takes="skip_checks"),
    "matrix_factorization.toeplitz.per_query_error": _Rule(_per_query_error, takes="skip_checks"),
    # The same objects stand for other things, too: they cannot be taken back.
    "sharding_utils.PartitionSpecPyTree": _ONLY_A_TYPE,
    "sharding_utils.PyTree": _ONLY_A_TYPE,
    "matrix_factorization.buffered_toeplitz.ScalarFloat": _ONLY_A_TYPE,
    "matrix_factorization.buffered_toeplitz.ThetaPairType": _ONLY_A_TYPE,
    "matrix_factorization.optimization.CallbackFnType": _ONLY_A_TYPE,
    "matrix_factorization.optimization.ParamT": _ONLY_A_TYPE,
    "matrix_factorization.streaming_matrix.Shape": _ONLY_A_TYPE,
    "matrix_factorization.streaming_matrix.ShapePyTree": _ONLY_A_TYPE,
    "matrix_factorization.streaming_matrix.State": _ONLY_A_TYPE,
    "matrix_factorization.streaming_matrix.T": _ONLY_A_TYPE,
}
