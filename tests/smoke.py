"""Does an installed package work here? Needs nothing but the package itself.

CI runs it on the oldest and the newest supported JAX: the extension loads, takes part in a jitted
and a scanned step, updates its ring in place, and agrees with the plain JAX implementation.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels import noise_addition
from jax_privacy_kernels._report import report
from jax_privacy_kernels.matrix_factorization import toeplitz


def run(implementation: str, bands: int, steps: int) -> np.ndarray:
    """Noise of all steps on a small mixed tree, flattened."""
    grads = {"w": jnp.zeros((70, 129)), "b": jnp.zeros(3), "h": jnp.zeros(2048, jnp.bfloat16)}
    coef = toeplitz.optimal_max_error_strategy_coefs(bands)
    privatizer = noise_addition.matrix_factorization_privatizer(
        toeplitz.inverse_as_streaming_matrix(coef),
        stddev=1.0,
        prng_key=jax.random.key(bands),
        dtype=jnp.float32,
        implementation=implementation,
    )
    update = jax.jit(privatizer.update, donate_argnums=1)
    state = privatizer.init(grads)
    rows = []
    for _ in range(steps):
        pointer = state.buffers["w"].unsafe_buffer_pointer()
        noisy, state = update(grads, state)
        if implementation == "cpp" and bands > 1:
            assert state.buffers["w"].unsafe_buffer_pointer() == pointer, "the ring was copied"
        rows.append(noisy)

    def step(state, _):
        noisy, state = privatizer.update(grads, state)
        return state, noisy

    scanned = jax.lax.scan(step, state, length=3)[1]
    rows = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]).astype(jnp.float32), rows, scanned)
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(both)])


def main() -> None:
    print(report())
    for bands in (1, 2, 5, 9):
        cpp, plain = (run(name, bands, 2 * bands + 1) for name in ("cpp", "jax"))
        # A rounding of the 16-bit leaf may fall the other way: one unit in its last place.
        np.testing.assert_allclose(cpp, plain, rtol=2**-7, atol=1e-5)
        assert 0.5 < np.std(cpp) < 2
        print(f"{bands} bands: cpp and jax agree on {cpp.size} samples")


if __name__ == "__main__":
    main()
