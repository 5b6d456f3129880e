"""What jax_privacy has as experimental.

>>> from jax_privacy_kernels.experimental.monte_carlo import delta_calculation
>>> delta_calculation.delta_from_epsilon_and_samples(1.0, [0.5, 0.8])
0.0
"""

from jax_privacy_kernels.experimental import monte_carlo

__all__ = ["monte_carlo"]


def __dir__() -> list[str]:  # for completion: no imported names
    return sorted(__all__)
