"""Monte Carlo accounting from samples that are at hand; mirrors jax_privacy's module.

`jax_privacy_kernels.monte_carlo` does the same without ever holding the samples, and much faster.
"""

from jax_privacy_kernels.experimental.monte_carlo import delta_calculation, sample_generation

__all__ = ["delta_calculation", "sample_generation"]


def __dir__() -> list[str]:  # for completion: no imported names
    return sorted(__all__)
