"""Minimizes losses of strategies with optax, in float64."""

from __future__ import annotations

import dataclasses
import functools
import time
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_privacy_kernels import ops
from jax_privacy_kernels._checks import check_int, check_real, owned, standard_promotion
from jax_privacy_kernels._mirrored import Mirrored

__all__ = [
    "DEFAULT_OPTIMIZER",
    "CallbackArgs",
    "CallbackFnType",
    "ParamT",
    "Report",
    "jax_enable_x64",
    "optimize",
]

ParamT = TypeVar("ParamT")

DEFAULT_OPTIMIZER = optax.lbfgs(
    memory_size=1, linesearch=optax.scale_by_backtracking_linesearch(128)
)

# Steps in a row that change nothing, after which the default optimizer has converged: neither its
# own direction nor, from an empty memory, the gradient lowers the loss any more.
_STILL = 2


@dataclasses.dataclass
class CallbackArgs(Mirrored):
    """What a callback of :func:`optimize` gets to see after a step.

    Attributes:
      step: index of the step, from 0.
      loss: at the parameters before the step.
      grad: gradient there, a tree like the parameters.
      params: after the step, float64.
      state: of the optimizer, after the step.
    """

    step: int
    loss: jax.Array
    grad: Any
    params: Any
    state: Any


CallbackFnType: TypeAlias = Callable[[CallbackArgs], bool | None]
"""Of a callback: whether to stop; None goes on."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What an optimization reached: optimizers call their argument ``report`` with it.

        >>> def loss(x):
        ...     return jnp.sum((x - 1) ** 2) + 3
        >>> _ = optimize(loss, jnp.zeros(2), report=print)
        loss 3: converged after ... steps

    Attributes:
      loss: Of the result.
      steps: All that were taken, from all starts together.
      stopped: Why the steps that led to the result ended. "converged": further ones do not lower
        the loss; "proved": the loss is as near to its lower bound as was asked for;
        "max_optimizer_steps"; "callback".
      lower_bound: No result has a lower loss. None where no such bound is known.
    """

    loss: float
    steps: int
    stopped: str
    lower_bound: float | None = None

    @property
    def gap(self) -> float | None:
        """The most that the loss may be above the least, relative to that; None if not known."""
        return self.loss / self.lower_bound - 1 if self.lower_bound else None

    def __str__(self) -> str:
        gap = "" if self.gap is None else f", at most {self.gap:.2g} of it above the least"
        return f"loss {self.loss:.8g}{gap}: {self.stopped} after {self.steps} steps"


ReportFnType: TypeAlias = Callable[[Report], object]
"""Of an argument ``report``."""


def jax_enable_x64(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function run in JAX's 64-bit mode; the caller's mode comes back with its result."""

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with jax.enable_x64(True):
            return fn(*args, **kwargs)

    return wrapped


def compiled_once(
    make_loss: Callable[..., Callable[..., Any]],
) -> Callable[..., Callable[..., Any]]:
    """Makes ``make_loss`` give the same loss for the same arguments, so that it is compiled once.

    With arguments that cannot be hashed, and so not told to be the same, it makes a new one.
    """
    cached = functools.lru_cache(maxsize=64)(make_loss)

    @functools.wraps(make_loss)
    def wrapped(*args: Any) -> Callable[..., Any]:
        try:
            return cached(*args)
        except TypeError:  # not hashable
            return make_loss(*args)

    return wrapped


def _no_callback(_: CallbackArgs) -> None:
    return None


def optimize(
    loss_fn: Callable[[ParamT], Any],
    params: ParamT,
    *,
    max_optimizer_steps: int = 250,
    grad: bool = False,
    callback: Callable[[CallbackArgs], bool | None] | None = _no_callback,
    optimizer: optax.GradientTransformationExtraArgs = DEFAULT_OPTIMIZER,
    report: ReportFnType | None = None,
) -> ParamT:
    """Minimizes a differentiable function.

    Everything runs in float64, and dtypes and ranks are promoted, whatever the modes of the
    caller. Without a callback all steps are one compiled loop, which ends early once two steps of
    the default optimizer have not changed a bit of the parameters. It hands control back about
    twice a second, so that an interrupt ends it. With a callback, each step is a call. Either is
    compiled once for every loss function, shape of parameters and optimizer: pass the same
    function again, not a new one that does the same. Like a function given to `jax.jit`, it should
    depend on its argument alone.

    L-BFGS, the default, works well on the losses of factorizations: see
    https://arxiv.org/abs/2106.12118, https://arxiv.org/abs/2306.08153,
    https://arxiv.org/abs/2405.15913.

        >>> def loss(x):
        ...     return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
        >>> print(optimize(loss, jnp.zeros(2)).round(4))
        [1. 1.]

    Args:
      loss_fn: gives the loss at parameters, a scalar; or, with ``grad``, the loss and its gradient.
      params: tree of arrays to start from.
      max_optimizer_steps: the most steps that are taken, at least 0.
      grad: whether ``loss_fn`` gives its gradient as well.
      callback: called after every step with a `CallbackArgs`; a true result ends the optimization.
        None is no callback.
      optimizer: an optax transformation whose update takes ``value``, ``grad`` and ``value_fn``.
      report: called with a `Report` at the end.

    Returns:
      The parameters after the last step, of the dtypes of ``params``.

    Raises:
      ValueError: if ``max_optimizer_steps`` is below 0.
      TypeError: if it is not an integer.
    """
    check_report(report)
    params, steps, stopped = minimized(
        loss_fn,
        params,
        max_optimizer_steps=max_optimizer_steps,
        grad=grad,
        callback=None if callback is _no_callback else callback,
        optimizer=optimizer,
    )
    if report is not None:
        with jax.enable_x64(True):
            wide: Any = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
            found = jitted(loss_fn)(wide)
        report(Report(float(found[0] if grad else found), steps, stopped))
    return params


def check_report(report: Any) -> None:
    """Raises a TypeError unless it is None or a function."""
    if report is not None and not callable(report):
        raise TypeError(f"expected report to be a function or None, found {report!r}")


def minimized(
    loss_fn: Callable[[ParamT], Any],
    params: ParamT,
    *,
    max_optimizer_steps: int,
    grad: bool = False,
    callback: CallbackFnType | None = None,
    optimizer: optax.GradientTransformationExtraArgs = DEFAULT_OPTIMIZER,
    done: Callable[[jax.Array, Any], jax.Array] | None = None,
) -> tuple[ParamT, int, str]:
    """As :func:`optimize`: the parameters, the number of steps, and `Report.stopped`.

    Without a callback, steps also end where ``done`` is true of a loss and its gradient.
    """
    steps = check_int("max_optimizer_steps", max_optimizer_steps, minimum=0)
    for name, value in (("loss_fn", loss_fn), ("callback", callback)):
        if not callable(value) and not (name == "callback" and value is None):
            raise TypeError(f"expected {name} to be a function, found {value!r}")
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(f"expected optimizer to be an optax transformation, found {optimizer!r}")
    if not jax.tree.leaves(params):
        raise ValueError(f"expected params with an array to vary, found {params!r}")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = "params" + jax.tree_util.keystr(path)
        array = owned(name, leaf)
        if array.dtype != bool:  # of masks
            check_real(f"{name} to hold real numbers", array)
    dtypes = jax.tree.map(lambda x: x.dtype if hasattr(x, "dtype") else jnp.result_type(x), params)
    taken, stopped = steps, "max_optimizer_steps"
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        if callback is None:
            loop = _compiled(loss_fn, _loop, grad, optimizer, done)
            params, taken, converged = _in_turns(
                loop, params, _state_like(optimizer, params), steps
            )
            stopped = "converged" if converged else stopped
        else:
            step = _compiled(loss_fn, _step, grad, optimizer)
            state = optimizer.init(params)
            for i in range(steps):
                loss, gradient, params, state = step(params, state)
                if callback(CallbackArgs(i, loss, gradient, params, state)):
                    taken, stopped = i + 1, "callback"
                    break
        params = jax.tree.map(lambda x, dtype: x.astype(dtype), params, dtypes)
    return params, taken, stopped


def _step(
    loss_fn: Callable[..., Any], grad: bool, optimizer: Any, params: Any, state: Any
) -> tuple[jax.Array, Any, Any, Any]:
    """One step: the loss and gradient before it, parameters and state after."""
    loss_and_grad = loss_fn if grad else jax.value_and_grad(loss_fn)
    value_fn = (lambda params: loss_fn(params)[0]) if grad else loss_fn
    with standard_promotion():  # optax needs it
        loss, gradient = loss_and_grad(params)
        updates, state = optimizer.update(
            gradient, state, params, value=loss, grad=gradient, value_fn=value_fn
        )
        return loss, gradient, optax.apply_updates(params, updates), state


# A compiled loop hands control back about this often, for an interrupt to be seen.
_SECONDS = 0.5


def _state_like(optimizer: Any, params: Any) -> Any:
    """Zeros like the optimizer's state. They are not used: the loop makes the first state."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    leaves, tree = jax.tree.flatten(shapes)
    try:
        state = _shape_of_state(optimizer, tuple(leaves), tree)
    except TypeError:  # not hashable
        state = jax.eval_shape(optimizer.init, shapes)

    def zeros(x: jax.ShapeDtypeStruct) -> Any:
        if jnp.issubdtype(x.dtype, jax.dtypes.extended):
            return jnp.empty(x.shape, x.dtype)
        return np.zeros(x.shape, x.dtype)

    return jax.tree.map(zeros, state)


@functools.lru_cache(maxsize=64)
def _shape_of_state(optimizer: Any, leaves: Any, tree: Any) -> Any:
    return jax.eval_shape(optimizer.init, jax.tree.unflatten(tree, leaves))


def _in_turns(
    loop: Callable[..., Any], params: Any, state: Any, steps: int
) -> tuple[Any, int, bool]:
    """Runs the loop a few steps at a time: parameters, steps, and whether they converged."""
    carry = np.int64(0), np.int64(0), params, state
    turn = 1
    while True:
        began = time.monotonic()
        until = np.int64(min(int(carry[0]) + turn, steps))
        carry = loop(carry, until)
        # Waiting here, and not in what waits for a value, lets interrupts through.
        while not carry[0].is_ready():
            time.sleep(0.002)
        taken, converged = int(carry[0]), int(carry[1]) >= _STILL
        if taken >= steps or converged:
            return carry[2], taken, converged
        seconds = (time.monotonic() - began) / turn
        turn = max(1, min(4 * turn, int(_SECONDS / max(seconds, 1e-9))))


def _loop(
    loss_fn: Callable[..., Any], grad: bool, optimizer: Any, done: Any, carry: Any, until: Any
) -> Any:
    """The carry ``(i, still, params, state)``, after step ``until`` or convergence."""
    converges = optimizer is DEFAULT_OPTIMIZER or done is not None
    i, still, params, state = carry
    first = optimizer.init(params)
    state = jax.tree.map(lambda a, b: jnp.where(i == 0, a, b), first, state)

    def goes_on(carry: Any) -> Any:
        i, still, _, _ = carry
        return (i < until) & (still < _STILL)

    def body(carry: Any) -> Any:
        i, still, params, state = carry
        loss, gradient, new, state = _step(loss_fn, grad, optimizer, params, state)
        if converges:
            same = jax.tree.map(lambda a, b: jnp.all(a == b), params, new)
            still = jnp.where(
                jnp.all(jnp.stack(jax.tree.leaves(same))), still + 1, jnp.zeros_like(still)
            )
        if done is not None:
            still = jnp.where(done(loss, gradient), jnp.full_like(still, _STILL), still)
        return i + 1, still, new, state

    return jax.lax.while_loop(goes_on, body, (i, still, params, state))


# By the id of a loss function, as long as that lives: a reference to it, and its compiled loops and
# steps.
_cache: dict[int, tuple[weakref.ref[Any], dict[Any, Any]]] = {}


def _compiled(loss_fn: Any, body: Callable[..., Any], *options: Any) -> Any:
    """``body(loss_fn, *options, ...)``, jitted; the same one for the same arguments."""
    key = id(loss_fn)
    if key not in _cache:
        try:
            # The method, as globals are None at the end of the program.
            forget = _cache.pop
            _cache[key] = weakref.ref(loss_fn, lambda _: forget(key, None)), {}
        except TypeError:  # cannot be referenced weakly
            return jax.jit(functools.partial(body, loss_fn, *options))
    # Not loss_fn itself: what is cached must not keep it alive.
    reference, by_options = _cache[key]
    # Which implementations its ops take is settled when the loss is traced.
    choice = body, *options, ops.asked()
    if choice not in by_options:
        by_options[choice] = jax.jit(lambda *args: body(reference(), *options, *args))
    return by_options[choice]


def jitted(loss_fn: Callable[[ParamT], Any]) -> Callable[[ParamT], Any]:
    """The function, jitted: once for the same one, as :func:`optimize` does it."""
    compiled: Callable[[ParamT], Any] = _compiled(loss_fn, _value)
    return compiled


def _value(loss_fn: Callable[[ParamT], Any], params: ParamT) -> Any:
    with standard_promotion():
        return loss_fn(params)


def value_and_grad(loss_fn: Callable[[ParamT], Any]) -> Callable[[ParamT], tuple[Any, ParamT]]:
    """Its loss and gradient, jitted: once for the same function, as :func:`jitted` does it."""
    compiled: Callable[[ParamT], tuple[Any, ParamT]] = _compiled(loss_fn, _value_and_grad)
    return compiled


def _value_and_grad(loss_fn: Callable[[ParamT], Any], params: ParamT) -> tuple[Any, ParamT]:
    with standard_promotion():
        return jax.value_and_grad(loss_fn)(params)


def __dir__() -> list[str]:  # for completion: no imported names
    return sorted(__all__)
