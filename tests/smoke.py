"""Does an installed package work here? Needs nothing but the package itself.

CI runs it on JAX from the oldest supported to the newest: the extension loads, takes part in a
jitted and a scanned step, updates its ring in place, and agrees with the plain JAX implementation;
so do the ops on coefficients, their gradients and their maps; and a strategy is optimized.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jax_privacy_kernels import noise_addition, ops
from jax_privacy_kernels._report import report
from jax_privacy_kernels.matrix_factorization import banded, buffered_toeplitz, toeplitz


def noising_matrices():
    """One of every kind, by name."""
    matrices = {}
    for bands in (1, 2, 5, 9):
        coef = toeplitz.optimal_max_error_strategy_coefs(bands)
        matrices[f"{bands} bands"] = toeplitz.inverse_as_streaming_matrix(coef)
    C = banded.ColumnNormalizedBanded.default(20, 4)
    matrices["banded"] = C.inverse_as_streaming_matrix()
    inverse = toeplitz.banded_inverse_square_root_noising_coefs(4)
    for slots in (0, 3):
        matrices[f"banded inverse, {slots} slots"] = toeplitz.noising_coef_as_streaming_matrix(
            inverse, look_ahead=slots
        )
    blt = buffered_toeplitz.BufferedToeplitz.build([0.9, 0.5], [0.2, 0.1], dtype=jnp.float32)
    matrices["buffers"] = blt.inverse_as_streaming_matrix()
    matrices["dense"] = jnp.asarray(np.tri(20, dtype=np.float32))
    return matrices


def run(implementation: str, matrix, steps: int) -> np.ndarray:
    """Noise of all steps on a small mixed tree, flattened."""
    grads = {"w": jnp.zeros((70, 129)), "b": jnp.zeros(3), "h": jnp.zeros(2048, jnp.bfloat16)}
    privatizer = noise_addition.matrix_factorization_privatizer(
        matrix,
        stddev=1.0,
        prng_key=jax.random.key(steps),
        dtype=jnp.float32,
        implementation=implementation,
    )
    update = jax.jit(privatizer.update, donate_argnums=1)
    state = privatizer.init(grads)
    rows = []
    for _ in range(steps):
        pointers = [ring.unsafe_buffer_pointer() for ring in jax.tree.leaves(state.inner)]
        noisy, state = update(grads, state)
        if implementation == "cpp":
            moved = [ring.unsafe_buffer_pointer() for ring in jax.tree.leaves(state.inner)]
            assert moved == pointers, "a ring was copied"
        rows.append(noisy)

    def step(state, _):
        noisy, state = privatizer.update(grads, state)
        return state, noisy

    scanned = jax.lax.scan(step, state, length=3)[1]
    rows = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]).astype(jnp.float32), rows, scanned)
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(both)])


def coefficients(implementation: str, n: int) -> list[np.ndarray]:
    """Values and gradients of the ops on coefficients, one by one and mapped."""
    coef = toeplitz.optimal_max_error_strategy_coefs(7)
    x = jnp.sin(jnp.arange(2.0 * n)).reshape(n, 2)
    named = {"implementation": implementation}

    def product(c):
        return ops.toeplitz_multiply(c, x, **named)

    def solution(c):
        return ops.toeplitz_solve(c, x, transpose=True, **named)

    def norm(c):
        return ops.min_sep_norm(c, n=n, min_sep=3, max_participations=5, **named)

    def most(c):
        return ops.participation_max(c, min_sep=2, max_participations=2, **named)

    results = []
    for f in (product, solution, norm, most):
        gradient = jax.grad(lambda c, f=f: jnp.sum(f(c) ** 2))
        results += [f(coef), gradient(coef), jax.vmap(gradient)(jnp.stack([coef, -2 * coef]))]
    return [np.asarray(result) for result in results]


def main() -> None:
    print(report())
    for kind, matrix in noising_matrices().items():
        cpp, plain = (run(name, matrix, 15) for name in ("cpp", "jax"))
        # A rounding of the 16-bit leaf may fall the other way: one unit in its last place.
        np.testing.assert_allclose(cpp, plain, rtol=2**-7, atol=1e-5)
        assert 0.5 < np.std(cpp) < 5
        print(f"{kind}: cpp and jax agree on {cpp.size} samples")
    for x64 in (False, True):
        with jax.enable_x64(x64):
            for n in (5, 300):
                for cpp, plain in zip(*(coefficients(i, n) for i in ("cpp", "jax")), strict=True):
                    np.testing.assert_allclose(cpp, plain, rtol=1e-9 if x64 else 1e-4, atol=1e-5)
    print("cpp and jax agree on coefficients")
    coef = toeplitz.optimize_banded_toeplitz(100, 4)
    assert toeplitz.loss(coef, 100) < toeplitz.loss(toeplitz.pad_coefs_to_n([1.0], 4), 100) / 2
    assert not jax.config.jax_enable_x64
    print("a strategy was optimized")


if __name__ == "__main__":
    main()
