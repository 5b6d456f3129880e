"""Steps of correlated noise, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

__all__ = ["Runner", "bytes_per_step", "look_ahead_passes"]


class Runner:
    """A privatizer with its state; a call takes one step, or some, and gives the last gradients.

    Args:
      privatizer: of either library.
      grads: what goes into every step.
      donate: arguments of ``update(grads, state)`` whose memory it may take; gradients that are
        donated are those that the step before returned.
      scan: steps of a call, in one `jax.lax.scan`; None for one step without it.
    """

    def __init__(
        self,
        privatizer: optax.GradientTransformation,
        grads: Any,
        *,
        donate: Sequence[int] = (1,),
        scan: int | None = None,
    ):
        def update(grads: Any, state: Any) -> tuple[Any, Any]:
            return privatizer.update(grads, state)

        def scanned(grads: Any, state: Any) -> tuple[Any, Any]:
            def body(carry: Any, _: None) -> tuple[Any, None]:
                return update(grads, carry[1]), None

            # The output is carried, so that none of it is dead code.
            return jax.lax.scan(body, (grads, state), length=scan)[0]

        self._update = jax.jit(scanned if scan else update, donate_argnums=tuple(donate))
        self._feed_back = 0 in donate
        self._grads = jax.tree.map(jnp.copy, grads) if self._feed_back else grads
        self._state = jax.block_until_ready(privatizer.init(grads))

    def __call__(self) -> Any:
        out, self._state = self._update(self._grads, self._state)
        if self._feed_back:
            self._grads = out
        return out


def look_ahead_passes(bands: int) -> float:
    """Reads plus writes of a slot, for each parameter and step of a banded strategy.

    With S slots a step refreshes 1/S of the tiles, reading and writing S slots of each, and reads
    one slot of the others.
    """
    slots = bands - 1
    return 3 - 1 / slots if slots else 0


def bytes_per_step(sizes: tuple[int, int, int], slot_passes: float) -> float:
    """Memory traffic of a step, for (parameters, bytes of a gradient, of a slot)."""
    parameters, grad, slot = sizes
    return parameters * (2 * grad + slot * slot_passes)
