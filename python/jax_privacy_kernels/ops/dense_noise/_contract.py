"""The contract between dense_noise and its implementations."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Protocol

import jax

from jax_privacy_kernels.ops._noise import NoiseInputs, NoiseOutputs, register

__all__ = ["Inputs", "Run"]


@register
@dataclasses.dataclass(frozen=True)
class Inputs(NoiseInputs):
    """A row of a dense noising matrix and some or all leaves of a tree, or shards of them.

    Attributes:
      ahead: whether bits are a function of the key and the index of an element, static.
      key: typed key, shape (). The key of sample j of a leaf is ``fold_in(leaf_key, j)``, for the
        key ``leaf_key`` of ``split(key, count)`` at the leaf's index.
      row: ``[m]``, the weights of the samples, float32 or float64.
    """

    static_fields: ClassVar[tuple[str, ...]] = (*NoiseInputs.static_fields, "ahead")
    ahead: bool
    key: jax.Array
    row: jax.Array

    @property
    def choice(self) -> bool:
        return self.ahead

    @property
    def stream(self) -> str:
        return str(jax.random.key_impl(self.key))


class Run(Protocol):
    """An implementation: it gives ``grads + sum_j row[j] z_j``, and no rings."""

    def __call__(self, inputs: Inputs, /) -> NoiseOutputs: ...
