"""What jax_privacy has as experimental."""
