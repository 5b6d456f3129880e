"""A membership test that wins against noise in floats and learns nothing from noise on a grid.

The attacker sees one noisy gradient, knows how the noise is sampled, and asks of two gradients
which of them was released: that of a data set with an example, or that without it. With float32
noise he need not look at sizes. A sample is one of 2^23 numbers, so that after adding it only some
numbers can come out, other ones for each gradient. Each coordinate that could not have come from a
gradient rules it out for certain (Mironov, "On significance of the least significant bits for
differential privacy", CCS 2012).

On the grid every integer could come from either, and what is left is what epsilon allows.

    pip install "jax_privacy_kernels[examples]"
    python attack.py

The float noise here comes from a chacha20 key: it is not the cipher that fails.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import arguments
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from jax_privacy_kernels import grid, random
from jax_privacy_kernels.matrix_factorization import streaming_matrix

DIFFERENCES = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1)  # between two gradients, in standard deviations
GRID_SCALE = 2**20  # grid steps in one standard deviation
ALL = 2**23  # samples that there are
NEIGHBOURS = 16  # sums are rounded: samples next to the one that fits may give the same


@dataclasses.dataclass(frozen=True)
class Row:
    """What the attacker finds when he tries a gradient that differs from the true one.

    Attributes:
      difference: between the two, in standard deviations of the noise.
      possible: by path, the share of coordinates that could have come from the gradient he tries.
      identified: by path, whether one coordinate or more rules that gradient out.
    """

    difference: float
    possible: dict[str, float]
    identified: dict[str, bool]


# One program for all samples: XLA rounds the last bit of a sample by how it vectorizes the program,
# which whoever attacks finds out by running it.
@jax.jit
def float_samples(bits: jax.Array) -> jax.Array:
    """What `jax.random.normal` makes of bits ``[2^23]`` in float32: the noise that is added."""
    unit = jax.lax.bitcast_convert_type(bits >> 9 | 0x3F800000, jnp.float32) - 1.0
    lowest = np.nextafter(np.float32(-1.0), np.float32(0.0))
    uniform = jnp.maximum(lowest, unit * (1.0 - lowest) + lowest)
    return np.float32(np.sqrt(2)) * jax.lax.erf_inv(uniform)


def all_float_samples() -> np.ndarray:
    """The 2^23 numbers that samples can be, in order."""
    return np.sort(np.asarray(float_samples(jax.lax.iota(jnp.uint32, ALL) << 9)))


def possible_in_floats(noisy: np.ndarray, gradient: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """For each coordinate, whether some sample of noise makes it of the gradient."""
    nearest = np.searchsorted(samples, noisy - gradient)
    found = np.zeros(noisy.shape, bool)
    for shift in range(-NEIGHBOURS, NEIGHBOURS + 1):
        sample = samples[np.clip(nearest + shift, 0, samples.size - 1)]
        found |= gradient + sample == noisy
    return found


def possible_on_the_grid(noisy: np.ndarray, gradient: np.ndarray, stddev: float) -> np.ndarray:
    """The same for integers: every one within 13 standard deviations is a sample."""
    return np.abs(noisy.astype(np.int64) - gradient) <= int(13 * stddev)


def attack(coordinates: int) -> list[Row]:
    """Releases one gradient in floats and one on the grid, and tries others against them."""
    rng = np.random.default_rng(0)
    gradient = rng.standard_normal(coordinates).astype(np.float32)
    on_grid = np.round(gradient * GRID_SCALE).astype(np.int32)
    key = random.secure_key(bytes(32))  # for the example to repeat; leave it out otherwise
    noisy = gradient + np.asarray(float_samples(jax.random.bits(key, (ALL,))))[:coordinates]
    integers = grid.privatizer(streaming_matrix.identity(), stddev=float(GRID_SCALE), prng_key=key)
    released = jnp.asarray(on_grid)
    noisy_on_grid = np.asarray(integers.update(released, integers.init(released))[0])
    samples, rows = all_float_samples(), []
    for difference in DIFFERENCES:
        tried = gradient + np.float32(difference)
        tried_on_grid = on_grid + round(difference * GRID_SCALE)
        found = {
            "float": possible_in_floats(noisy, tried, samples),
            "grid": possible_on_the_grid(noisy_on_grid, tried_on_grid, GRID_SCALE),
        }
        possible = {path: float(of.mean()) for path, of in found.items()}
        identified = {path: not of.all() for path, of in found.items()}
        rows.append(Row(difference, possible, identified))
    return rows


def format_table(rows: Sequence[Row]) -> str:
    lines = ["difference   float: possible   ruled out   grid: possible   ruled out"]
    for row in rows:
        cells = [f"{row.difference:10.3f}"]
        for path in ("float", "grid"):
            cells.append(f"{100 * row.possible[path]:13.2f} %")
            cells.append(f"{'yes' if row.identified[path] else 'no':>9}")
        lines.append("   ".join(cells))
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: str) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(rows))
    colors = {"float": "#D55E00", "grid": "#0072B2"}  # told apart by colour-blind readers too
    for shift, (name, color) in zip((-0.2, 0.2), colors.items(), strict=True):
        percent = [100 * row.possible[name] for row in rows]
        axes.bar(places + shift, percent, 0.4, color=color, label=f"noise: {name}")
    axes.set_xticks(places, [f"{row.difference:g}" for row in rows])
    axes.set_xlabel("how far the gradient that is tried is from the true one (stddev = 1)")
    axes.set_ylabel("coordinates that it could have made (%)")
    axes.set_title("What low-order bits of a noisy gradient tell")
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = arguments.Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--coordinates", type=arguments.count, default=100_000, help="of the gradient (100000)"
    )
    parser.add_argument(
        "--output", type=arguments.output, default="attack.png", help="where the plot goes"
    )
    args = parser.parse_args(argv)
    rows = attack(args.coordinates)
    print(format_table(rows))
    plot(rows, args.output)
    print(f"\nPlot: {args.output}")
    return rows


if __name__ == "__main__":
    main()
