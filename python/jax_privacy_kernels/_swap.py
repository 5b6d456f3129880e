"""jax_privacy, in place, on this library.

For every public name of ours that a module of jax_privacy has as well, every reference to
jax_privacy's object that a loaded module of jax_privacy holds is pointed to ours. Modules that are
loaded later take it from those. What jax_privacy has and we do not, and its private functions, stay
as they are: they call ours by the names they always did.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import importlib
import importlib.util
import inspect
import sys
import threading
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

__all__ = ["VERIFIED", "Replacement", "install", "installed", "replacements", "uninstall"]

_P = inspect.Parameter

VERIFIED = ("2.0",)
"""Releases of jax-privacy, major and minor, that the swap is tested with."""

# Of either library: one that a version does not have is left out.
_MODULES = (
    "experimental.monte_carlo.delta_calculation",
    "experimental.monte_carlo.sample_generation",
    "noise_addition",
    "optimizers",
    "sharding_utils",
    "matrix_factorization.banded",
    "matrix_factorization.buffered_toeplitz",
    "matrix_factorization.checks",
    "matrix_factorization.dense",
    "matrix_factorization.optimization",
    "matrix_factorization.sensitivity",
    "matrix_factorization.streaming_matrix",
    "matrix_factorization.toeplitz",
)

_lock = threading.RLock()
_current: tuple[Replacement, ...] = ()  # what is replaced now
_blocks: list[bool] = []  # whether it was installed before each block that is not over


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

    Call it at any time, in any order with imports of jax_privacy, and as often as you like. But a
    name that your own module has taken before, ``from jax_privacy.noise_addition import
    gaussian_privatizer``, stays what it was, as does what has been traced or compiled: so call it
    first, or run the program by ``python -m jax_privacy_kernels program.py``. Processes that the
    program starts need their own call, unless forked from it (a forkserver's are not).

    Objects mix: a StreamingMatrix (ColumnNormalizedBanded, CallbackArgs, ...) of either library is
    accepted by the functions of either, and is an instance of either's class. The state of a
    privatizer does not mix, except `gaussian_privatizer`'s: continue a run with the library that
    began it. The noise is the same for the same key.

    A step costs nothing more: functions are ours themselves, or wrapped where jax_privacy takes
    more arguments, outside of what is compiled.

    Args:
      force: Whether to go ahead with a version of jax-privacy that this was not tested with. A
        function that takes arguments which ours does not is then left alone.

    Raises:
      ModuleNotFoundError: jax-privacy is not installed.
      RuntimeError: its version is not known, and ``force`` is false.
    """
    global _current
    with _lock:
        if _current:
            return
        version = _version()
        if not force and ".".join(version.split(".")[:2]) not in VERIFIED:
            raise RuntimeError(
                f"expected jax-privacy {_verified()}, found {version}, which the swap was not "
                "tested with; install(force=True), or python -m jax_privacy_kernels --force, "
                "replaces what fits"
            )
        plan = _plan()
        try:
            for entry in plan:
                if _is_mirrored(entry):
                    pair(entry.replacement, entry.original)
            _point({id(entry.original): entry.replacement for entry in plan})
        except BaseException:
            _restore(plan)
            raise
        _current = plan


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
        _version()
        return _current or _plan()


def is_installed() -> bool:
    return bool(_current)


def _version() -> str:
    try:
        return metadata.version("jax-privacy")
    except metadata.PackageNotFoundError:
        if importlib.util.find_spec("jax_privacy") is not None:  # from a source tree
            return "unknown"
        raise ModuleNotFoundError(
            f"the swap needs jax-privacy {_verified()}, which is not installed"
        ) from None


def _verified() -> str:
    return " or ".join(f"{release}.x" for release in VERIFIED)


# -- What to replace --------------------------------------------------------------------------


def _plan() -> tuple[Replacement, ...]:
    plan = []
    for module in _MODULES:
        names = [f"{package}.{module}" for package in ("jax_privacy", "jax_privacy_kernels")]
        if not all(importlib.util.find_spec(name) for name in names):
            continue
        theirs, ours = map(importlib.import_module, names)
        for name in ours.__all__:
            if hasattr(theirs, name):
                original = getattr(theirs, name)
                chosen = _choose(original, getattr(ours, name), _ADAPTERS.get(f"{module}.{name}"))
                plan.append(Replacement(module, name, original, *chosen))
    return tuple(plan)


def _choose(original: Any, ours: Any, adapt: Callable[[Any, Any], Any] | None) -> tuple[Any, str]:
    """The replacement of an object of jax_privacy, and a note."""
    if isinstance(original, enum.EnumMeta):
        return original, "kept: ours takes its members"
    if adapt is not None:
        adapter = functools.update_wrapper(adapt(ours, original), ours)
        del adapter.__wrapped__  # or its signature would be taken for ours
        if _covers(adapter, original):
            return adapter, "adapted"
    if _covers(ours, original):
        return ours, ""
    return original, f"kept: ours does not take all of {_signature(original)}"


def _covers(function: Any, original: Any) -> bool:
    """Whether one takes every call that the other takes, as far as signatures tell."""
    if not callable(original):
        return True
    try:
        old, new = (_signature(f).parameters for f in (original, function))
    except (TypeError, ValueError):  # of no signature
        return True
    if {p.kind for p in old.values()} >= {_P.VAR_POSITIONAL, _P.VAR_KEYWORD}:
        return True  # which tells nothing

    def positional(parameters: Mapping[str, _P]) -> list[str]:
        return [p.name for p in parameters.values() if p.kind is _P.POSITIONAL_OR_KEYWORD]

    def required(parameters: Mapping[str, _P]) -> set[str]:
        variadic = (_P.VAR_POSITIONAL, _P.VAR_KEYWORD)
        return {
            p.name for p in parameters.values() if p.default is p.empty and p.kind not in variadic
        }

    in_order = positional(old)
    return (
        old.keys() <= new.keys()
        and required(new) <= required(old)
        and positional(new)[: len(in_order)] == in_order
    )


def _signature(function: Any) -> inspect.Signature:
    """The signature, of what it decorates if a decorator's ``*args, **kwargs`` hide that."""
    signature = inspect.signature(function)
    inner = inspect.unwrap(function)
    if {p.kind for p in signature.parameters.values()} >= {_P.VAR_POSITIONAL, _P.VAR_KEYWORD}:
        held = [cell.cell_contents for cell in getattr(inner, "__closure__", None) or ()]
        named = [f for f in held if inspect.isfunction(f) and f.__name__ != "<lambda>"]
        if len(named) == 1:
            return _signature(named[0])
    return signature


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
        def make(key: Any, implementation: str | None) -> optax.GradientTransformation:
            return ours(
                stddev=stddev,
                prng_key=key,
                dtype=dtype,
                intermediate_strategy=intermediate_strategy,
                implementation=implementation,
            )

        key: Any = None
        # A privatizer may be made in a trace without a key: only its init needs one.
        if prng_key is not None or is_concrete(jnp.zeros(()) + 0):
            key = noise_addition._as_key(prng_key)
        make(0, implementation)  # checks the other arguments

        def init(model: Any) -> Any:
            start = noise_addition._as_key(None) if key is None else key
            make(start, implementation).init(model)  # checks the model
            given = prng_key if isinstance(prng_key, jax.Array | np.ndarray) else start
            return like(given, jnp.copy(start)), ()

        @functools.partial(jax.jit, static_argnums=2)
        def step(grads: Any, key: jax.Array, implementation: str | None) -> Any:
            start = noise_addition._as_key(key)
            privatizer = make(start, implementation)
            noisy, _ = privatizer.update(grads, privatizer.init(grads))
            return noisy, (like(key, jax.random.split(start)[0]), ())

        def like(given: Any, key: jax.Array) -> jax.Array:
            """The key, typed or raw as another."""
            typed = jnp.issubdtype(given.dtype, jax.dtypes.prng_key)
            return key if typed else jax.random.key_data(key)

        def update(sum_of_clipped_grads: Any, noise_state: Any, params: Any = None) -> Any:
            del params
            if not (isinstance(noise_state, tuple | list) and len(noise_state) == 2):
                raise ValueError(f"expected noise_state to be (key, ()), found {noise_state!r}")
            key, _ = noise_state
            return step(sum_of_clipped_grads, key, implementation or ops.asked())

        return optax.GradientTransformation(init, update)

    return gaussian_privatizer


def _multiply(ours: Any, _: Any) -> Any:
    def multiply(
        lhs_coef: jax.Array, rhs_coef: jax.Array, n: int | None = None, skip_checks: bool = False
    ) -> jax.Array:
        return ours(lhs_coef, rhs_coef, n or (len(lhs_coef) if skip_checks else None))

    return multiply


def _minsep_sensitivity_squared(ours: Any, _: Any) -> Any:
    """Refuses coefficients that ours bounds: buffered_toeplitz.optimize counts on it."""

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
            bad = np.flatnonzero((coef < 0) | (np.diff(coef, prepend=np.inf) > 0))
            if bad.size:
                raise ValueError(
                    "expected strategy_coef to be non-negative and non-increasing, "
                    f"found strategy_coef[{bad[0]}] = {coef[bad[0]]}"
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


_ADAPTERS: dict[str, Callable[[Any, Any], Any]] = {
    "noise_addition.gaussian_privatizer": _gaussian_privatizer,
    "matrix_factorization.banded.optimize": _named_scan,
    "matrix_factorization.banded.per_query_error": _named_scan,
    "matrix_factorization.toeplitz.minsep_sensitivity_squared": _minsep_sensitivity_squared,
    "matrix_factorization.toeplitz.multiply": _multiply,
    "matrix_factorization.toeplitz.per_query_error": _per_query_error,
}
