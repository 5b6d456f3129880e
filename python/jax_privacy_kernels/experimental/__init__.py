"""What jax_privacy has as experimental."""

from jax_privacy_kernels.experimental import monte_carlo

__all__ = ["monte_carlo"]


def __dir__() -> list[str]:  # for completion: no imported names
    return sorted(__all__)
