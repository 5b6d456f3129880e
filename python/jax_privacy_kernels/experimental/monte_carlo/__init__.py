"""Monte Carlo accounting from samples that are at hand; mirrors jax_privacy's module.

`jax_privacy_kernels.monte_carlo` does the same without ever holding the samples, and much faster.

    >>> from jax_privacy_kernels.monte_carlo import BallsInBins
    >>> sampling = BallsInBins(iterations=20, cycle_length=5)
    >>> losses, _ = sample_generation.get_privacy_loss_sample(
    ...     sampling, 2.0, [1.0, 0.5], seed=0, num_samples=1000
    ... )
    >>> estimate = delta_calculation.delta_from_epsilon_and_samples(1.0, losses)
"""

from jax_privacy_kernels.experimental.monte_carlo import delta_calculation, sample_generation

__all__ = ["delta_calculation", "sample_generation"]


def __dir__() -> list[str]:  # for completion: no imported names
    return sorted(__all__)
