"""Optimizers that transform gradients before they are clipped.

What happens to per-example gradients before clipping may depend on the optimizer: scaling them by
its second moments makes clipping and noise fit the size of each coordinate. An
`AugmentedGradientTransformation` keeps such a transform and the optimizer together::

    optimizer = scale_then_privatize(optax.adamw(1e-3))
    state = optimizer.init(params)
    grad_fn = jax_privacy.clipped_grad(
        loss_fn, l2_clip_norm=1.0, pre_clipping_transform=optimizer.pre_clipping_transform(state)
    )
    noisy_grads, noise_state = privatizer.update(grad_fn(params, batch), noise_state)
    updates, state = optimizer.update(noisy_grads, state, params)
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from jax_privacy_kernels._checks import check_scalar, owned, standard_promotion

__all__ = [
    "AugmentedGradientTransformation",
    "PreClippingTransform",
    "as_augmented_optimizer",
    "scale_then_privatize",
]


class PreClippingTransform(Protocol):
    """Transforms the gradients of one example before they are clipped."""

    def __call__(self, updates: optax.Updates) -> optax.Updates:
        """Returns the tree to clip in place of ``updates``, a tree like the parameters."""
        ...


class AugmentedGradientTransformation(NamedTuple):
    """An optax optimizer and the transform that goes before clipping.

    Attributes:
      init: ``init(params) -> state``, as of an `optax.GradientTransformation`.
      update: ``update(updates, state, params=None, **extra_args) -> (updates, state)``. Takes the
        privatized sum of transformed gradients, and undoes the transform.
      pre_clipping_transform: ``pre_clipping_transform(state, inverse=False)`` gives the
        `PreClippingTransform` of this step, or what undoes it.
    """

    init: optax.TransformInitFn
    update: Callable[..., tuple[optax.Updates, optax.OptState]]
    pre_clipping_transform: Callable[..., PreClippingTransform]


def scale_then_privatize(
    base_optimizer: optax.GradientTransformation,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    extract_preconditioner_from_state_fn: Callable[[optax.OptState], optax.Updates] | None = None,
) -> AugmentedGradientTransformation:
    """Scales gradients by an adaptive optimizer's second moments before they are privatized.

    Algorithm 8 of https://arxiv.org/abs/2507.01129. With v the second moments after the last step,
    gradients g are clipped and noised as ``s * g``, ``s = 1 / (sqrt(v + eps_root) + eps)``, and
    divided by s before the optimizer sees them. Large eps make all coordinates alike: no scaling,
    up to a factor. Small ones, such as the optimizer's own, can put much noise on coordinates with
    small gradients. They are worth tuning.

        >>> params = {"w": jnp.zeros(2)}
        >>> optimizer = scale_then_privatize(optax.adam(0.1), eps=0.01)
        >>> state = optimizer.init(params)
        >>> grads = {"w": jnp.array([1.0, 0.01])}
        >>> _, state = optimizer.update(optimizer.pre_clipping_transform(state)(grads), state)
        >>> large, small = optimizer.pre_clipping_transform(state)(grads)["w"]
        >>> print(f"{large:.2f} {small:.2f}")
        24.03 0.97

    Scaling is done in float32 at least. At the first step v is 0 and s is 1 / eps, so that a
    scaled gradient may not fit its dtype (the largest float16 is 65504): it then becomes the
    largest finite number of its sign. Infinities and NaN stay what they are, for clipping to find.
    Dividing by s gives back the gradient up to rounding, if it has neither become the largest
    number nor, with large eps, too small a one (the smallest float16 is 6e-8).

    Gradients in float16 are best converted before they are scaled, as in
    ``lambda grads: transform(optax.tree.cast(grads, jnp.float32))``. Otherwise clipping that takes
    norms in float16, as `jax_privacy.clipped_grad` does, finds an infinite norm from 256 on, and
    drops the example. That costs accuracy, not privacy.

    Args:
      base_optimizer: An optax optimizer with second moments in its state, also inside of chains:
        Adam, AdamW, AMSGrad, RMSProp, AdaGrad. Of centered RMSProp v is the variance. Every leaf
        goes by the first in a chain that does not mask it out; one that all mask out, or that
        `optax.multi_transform` gives to an optimizer without second moments, is not scaled.
      eps: Added to the root; finite, at least 0.
      eps_root: Added to v; finite, at least 0.
      extract_preconditioner_from_state_fn: Gives v from a state of the optimizer: a tree like the
        gradients, of floating arrays of their shapes, with an `optax.MaskedNode` for parts that are
        not to be scaled. None finds it for the optimizers above.

    Returns:
      The optimizer with its transform, from trees of floating arrays to trees of the same shapes
      and dtypes. ``pre_clipping_transform(state, inverse=True)`` gives the division by s.

    Raises:
      ValueError: If eps or eps_root is out of range, or the optimizer is AdaMax, whose state looks
        like Adam's but holds an infinity norm. When the transform is made or the optimizer updated:
        if no second moments are found in its state. When gradients are scaled: if v is not a tree
        like them, or the shape of a gradient, batched or not, does not end with that of v.
      TypeError: If base_optimizer has no ``init`` or no ``update``, or eps or eps_root is no real
        number. When gradients are scaled: if one of them, or v, is not floating.
    """
    _check_optimizer("base_optimizer", base_optimizer)
    eps, eps_root = (
        check_scalar(name, value, lambda x: 0 <= x < math.inf, "in [0, inf)")
        for name, value in (("eps", eps), ("eps_root", eps_root))
    )
    extract = extract_preconditioner_from_state_fn
    if extract is None and _uses_adamax(base_optimizer):
        raise ValueError(
            "expected an optimizer with second moments, found optax.adamax, which keeps an "
            "infinity norm; pass extract_preconditioner_from_state_fn that gives its square"
        )

    def pre_clipping_transform(
        state: optax.OptState, inverse: bool = False
    ) -> PreClippingTransform:
        found = _second_moments(state) if extract is None else [extract(state)]

        def scaled(path: Any, update: jax.Array, *moments: Any) -> jax.Array:
            v = next((v for v in moments if not _is_masked(v)), None)
            if v is None:
                return update
            name = f"updates{jax.tree_util.keystr(path)}"
            update, v = owned(name, update), owned(f"the second moments of {name}", v)
            _check_leaf(name, update, v)
            wide = jnp.promote_types(jnp.result_type(update, v), jnp.float32)
            scale = 1 / (jnp.sqrt(v.astype(wide) + eps_root) + eps)
            scale = jnp.minimum(scale, jnp.finfo(wide).max)  # without any eps
            x = update.astype(wide)
            x = x / scale if inverse else x * scale
            most = jnp.finfo(update.dtype).max.astype(wide)
            saturated = jnp.clip(x, -most, most)
            return jnp.where(jnp.isfinite(update), saturated, x).astype(update.dtype)

        @standard_promotion()
        def transform(updates: optax.Updates) -> optax.Updates:
            moments = [_unfold(v, updates) for v in found]
            return jax.tree_util.tree_map_with_path(scaled, updates, *moments)

        return transform

    @standard_promotion()  # optax needs it
    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        updates = pre_clipping_transform(state, inverse=True)(updates)
        return base_optimizer.update(updates, state, params, **extra_args)

    return AugmentedGradientTransformation(base_optimizer.init, update, pre_clipping_transform)


def as_augmented_optimizer(
    optimizer: AugmentedGradientTransformation | optax.GradientTransformation,
) -> AugmentedGradientTransformation:
    """Returns the optimizer with a transform before clipping: its own, or else the identity.

    Raises:
      TypeError: If it has no ``init`` or no ``update``.
    """
    _check_optimizer("optimizer", optimizer)
    if isinstance(optimizer, AugmentedGradientTransformation):
        return optimizer
    if hasattr(optimizer, "pre_clipping_transform"):  # jax_privacy's
        return AugmentedGradientTransformation(*optimizer)
    return AugmentedGradientTransformation(
        optimizer.init, optimizer.update, lambda state, inverse=False: lambda updates: updates
    )


def _check_optimizer(name: str, optimizer: Any) -> None:
    if not all(callable(getattr(optimizer, method, None)) for method in ("init", "update")):
        raise TypeError(f"expected {name} to be a GradientTransformation, found {optimizer!r}")


def _check_leaf(name: str, update: Any, v: Any) -> None:
    """Raises unless v, of floating dtype as the update, applies to its last axes."""
    for what, x in ((name, update), (f"the second moments of {name}", v)):
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            raise TypeError(f"expected {what} to be floating, found dtype {jnp.result_type(x)}")
    shape, last = jnp.shape(update), jnp.shape(v)
    if len(shape) < len(last) or shape[len(shape) - len(last) :] != last:
        raise ValueError(
            f"expected {name} to have the shape of its second moments, {last}, or more axes before "
            f"it, found shape {shape}"
        )


def _variance(state: Any) -> optax.Updates:
    """Second moments about the mean; rounding makes none negative."""

    def of(nu: jax.Array, mu: jax.Array) -> jax.Array:
        wide = jnp.promote_types(nu.dtype, jnp.float32)
        return jnp.maximum(nu.astype(wide) - mu.astype(wide) ** 2, 0)

    return jax.tree.map(of, state.nu, state.mu)


def _uses_adamax(optimizer: Any) -> bool:
    """Whether an optimizer is, or holds, one that optax makes for AdaMax.

    The class of its state is Adam's. What tells are the names of functions: of its own, and of
    those that they hold, as the functions of a chain hold those of its parts.
    """
    seen: dict[int, Any] = {}
    parts = [optimizer]
    while parts:
        part = parts.pop()
        if id(part) in seen:
            continue
        seen[id(part)] = part
        if inspect.isfunction(part):
            of_optax = (part.__module__ or "").partition(".")[0] == "optax"
            if of_optax and "adamax" in part.__qualname__:
                return True
            cells = part.__closure__ or ()
            parts += [cell.cell_contents for cell in cells if cell != types.CellType()]
        elif inspect.ismethod(part):
            parts += [part.__func__, *_held_by(part.__self__)]
        elif isinstance(part, tuple | list | dict):
            parts += part.values() if isinstance(part, dict) else part
    return False


def _held_by(owner: Any) -> list[Any]:
    """What an object holds: as a tuple, in its __dict__ and in its slots."""
    slots = [getattr(kind, "__slots__", ()) for kind in type(owner).__mro__]
    names = [name for each in slots for name in ([each] if isinstance(each, str) else each)]
    named = [getattr(owner, name, None) for name in names]
    return [*named, getattr(owner, "__dict__", {}), *(owner if isinstance(owner, tuple) else ())]


# The second moments in the states of adaptive optimizers, by class; optax does not export them all.
_MOMENTS: dict[str, Callable[[Any], optax.Updates]] = {
    "ScaleByAdamState": lambda state: state.nu,
    "ScaleByAmsgradState": lambda state: state.nu_max,
    "ScaleByRmsState": lambda state: state.nu,
    "ScaleByRmsWithCountState": lambda state: state.nu,
    "ScaleByRStdDevState": _variance,
    "ScaleByRStdDevWithCountState": _variance,
    "ScaleByRssState": lambda state: state.sum_of_squares,
}


def _second_moments(state: optax.OptState) -> list[optax.Updates]:
    """Trees of second moments in the order of a chain, up to the first that masks no leaf out."""
    found = []
    for moments in _search(state):
        found.append(moments)
        if not any(map(_is_masked, jax.tree.leaves(moments, is_leaf=_is_masked))):
            break
    if not found:
        raise ValueError(
            "expected the state of an adaptive optimizer (Adam, AdamW, AMSGrad, RMSProp, AdaGrad), "
            f"found no second moments in {_names(state)}; for another optimizer pass "
            "extract_preconditioner_from_state_fn"
        )
    return found


def _search(state: Any) -> Iterator[optax.Updates]:
    moments_of = _MOMENTS.get(type(state).__name__)
    if moments_of is not None:
        yield moments_of(state)
    elif isinstance(state, tuple | list | dict):
        for part in state.values() if isinstance(state, dict) else state:
            yield from _search(part)


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _unfold(moments: optax.Updates, updates: optax.Updates) -> optax.Updates:
    """The moments with a MaskedNode for every leaf, where one stands for a part of the tree."""
    return jax.tree.map(
        lambda v, part: jax.tree.map(lambda _: v, part) if _is_masked(v) else v,
        moments,
        updates,
        is_leaf=_is_masked,
    )


def _names(state: Any) -> str:
    if type(state) in (tuple, list):
        return "(" + ", ".join(_names(part) for part in state) + ")"
    return type(state).__name__


def __dir__() -> list[str]:  # for completion: no imported names
    return sorted(__all__)
