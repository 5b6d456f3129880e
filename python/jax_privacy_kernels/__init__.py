"""A compiled backend for correlated-noise differentially private training in JAX.

The modules mirror those of jax_privacy, in names, arguments, semantics and noise stream; `install`
makes programs that use jax_privacy run on them as they are.

    >>> from jax_privacy_kernels.matrix_factorization import toeplitz
    >>> with implementation("jax"):  # all ops in the block are plain JAX
    ...     product = toeplitz.multiply([1.0, 0.5], [1.0, 0.25])
"""

from jax_privacy_kernels import (
    grid,
    matrix_factorization,
    noise_addition,
    optimizers,
    random,
    sharding_utils,
)
from jax_privacy_kernels._swap import install, installed, uninstall
from jax_privacy_kernels._version import __version__
from jax_privacy_kernels.ops import disabled_safety_checks, implementation

__all__ = [
    "__version__",
    "disabled_safety_checks",
    "grid",
    "implementation",
    "install",
    "installed",
    "matrix_factorization",
    "noise_addition",
    "optimizers",
    "random",
    "sharding_utils",
    "uninstall",
]


def __dir__() -> list[str]:  # for completion: no imported names
    return sorted(__all__)
