"""How kernels in Pallas are called.

They keep to what Pallas has for every backend, but for loads and stores with a mask. Arguments are
whole arrays in device memory; a kernel finds its part by the index of its program.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

__all__ = ["call"]


def call(
    kernel: Callable[..., None],
    outs: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    *arrays: jax.Array,
    warps: int,
    aliases: Mapping[int, int] | None = None,
) -> Sequence[jax.Array]:
    """Runs ``kernel(*arrays, *outs)``, all of them references, once for every point of the grid.

    Args:
      kernel: named as it will be in profiles.
      outs: shapes and dtypes of the results.
      grid: up to three dimensions.
      *arrays: the arguments.
      warps: of 32 threads, in a program.
      aliases: argument i shares its memory with result ``aliases[i]``. Such a kernel only touches
        the result, which begins as the argument.
    """
    structs = [_like(arrays[0], out) for out in outs]
    whole = pl.BlockSpec(memory_space=pl.ANY)
    # One stage: overlapped iterations of a loop must not read what an earlier one has yet to write.
    params = plgpu.CompilerParams(num_warps=warps, num_stages=1)
    run = pl.pallas_call(
        kernel,
        out_shape=structs,
        grid=grid,
        in_specs=[whole] * len(arrays),
        out_specs=[whole] * len(outs),
        input_output_aliases=dict(aliases or {}),
        compiler_params=params,
    )
    with _some_gpu():
        return run(*arrays)


def _like(x: jax.Array, out: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """``out``, which in a shard_map differs over the mesh axes that x differs over."""
    aval: Any = jax.typeof(x)
    key = "manual_axis_type" if hasattr(aval, "manual_axis_type") else "vma"  # jax < 0.12
    return jax.ShapeDtypeStruct(out.shape, out.dtype, **{key: getattr(aval, key)})


def _some_gpu() -> contextlib.AbstractContextManager[Any]:
    """Where there is no GPU, one to lower for: which it is makes no difference to our kernels.

    Not where a mesh names one, nor in a mesh that the types of arrays speak of; JAX explains how.
    """
    mesh: Any = jax.sharding.get_abstract_mesh()
    config: Any = jax.config
    default = config.jax_default_device or jax.devices()[0]
    named = getattr(mesh.abstract_device, "platform", None) in ("gpu", "cuda")
    typed = any(kind != jax.sharding.AxisType.Auto for kind in mesh.axis_types)
    if named or typed or getattr(default, "platform", default) in ("gpu", "cuda"):
        return contextlib.nullcontext()
    try:
        device = jax.sharding.AbstractDevice("NVIDIA H200", 132, "gpu")
    except TypeError:  # jax 0.8 knows no platforms here, and asks for no GPU either
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.update(abstract_device=device))
