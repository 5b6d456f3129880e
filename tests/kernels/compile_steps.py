"""Compiles whole steps for an H100 that need not be there, and prints what they move.

XLA compiles for a GPU that it is only told about. What it adds to a kernel shows in its program:
copies of the state, though the state is donated, and memory for what lies between its own kernels.
Prints a line of JSON for every step. Its unit is a pass: as many bytes as the model has.

    pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt    # of the version of jaxlib
    python tests/kernels/compile_steps.py [IMPLEMENTATION ...]    # all of ours, if none is named

The implementation "jax_privacy" is that library's own step, and taken only if it is named.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import pathlib
import re
import sys
import tempfile

import compile_triton
import jax
import jax.numpy as jnp
from jax.experimental import topologies

PARAMETERS = 2**26  # 64 bands of 2^28 would not fit
ELEMENT = 4  # bytes
IMPLEMENTATIONS = ("triton", "pallas")
STEPS = ((1, 1), (8, 1), (64, 1), (64, 16))  # bands and leaves

# The fields that XLA wants of `stream_executor::GpuTargetConfigProto`, of NVIDIA's data sheet and
# of CUDA's limits for compute capability 9.0.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  device_memory_size: 85899345920
  device_address_bits: 64
  device_vendor: "NVIDIA Corporation"
  name: "NVIDIA H100 80GB HBM3"
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
"""

# An instruction in XLA's text: its name, its shape or shapes, what it is, its operands, the rest.
INSTRUCTION = re.compile(r"^ *(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\(([^)]*)\)(.*)", re.M)
SHAPE = re.compile(r"\b[a-z]+(\d+)\[([\d,]*)\]")


def passes(shapes):
    """The size of what XLA writes as `(f32[7,67108864]{1,0}, u32[2]{0})`."""
    return sum(
        int(bits) / 8 * math.prod(map(int, filter(None, dimensions.split(","))))
        for bits, dimensions in SHAPE.findall(shapes)
    ) / (ELEMENT * PARAMETERS)


def step(implementation, bands, leaves):
    """A step of a banded strategy, compiled for an H100; leaves are of one size."""
    library = "jax_privacy" if implementation == "jax_privacy" else "jax_privacy_kernels"
    toeplitz = importlib.import_module(f"{library}.matrix_factorization.toeplitz")
    make = importlib.import_module(f"{library}.noise_addition").matrix_factorization_privatizer
    matrix = toeplitz.inverse_as_streaming_matrix(toeplitz.optimal_max_error_strategy_coefs(bands))
    options = {} if library == "jax_privacy" else {"implementation": implementation}
    privatizer = make(matrix, stddev=1.0, prng_key=jax.random.key(0), **options)

    target = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    (device,) = target.devices
    place = jax.sharding.SingleDeviceSharding(device)

    def placed(tree):
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree
        )

    grads = [jax.ShapeDtypeStruct((PARAMETERS // leaves,), jnp.float32)] * leaves
    state = jax.eval_shape(privatizer.init, grads)
    update = jax.jit(privatizer.update, donate_argnums=1)
    with jax.sharding.use_abstract_mesh(compile_triton.mesh_of(compile_triton.GPUS[1])):
        return update.lower(placed(grads), placed(state)).compile()


def moved(text):
    """What XLA's own kernels move in a program, and what of that are copies."""
    shapes, in_place, kernels, branches, own = {}, set(), 0, 0, 0.0
    for name, shape, kind, operands, rest in INSTRUCTION.findall(text[text.index("ENTRY ") :]):
        shapes[name] = shape
        names = re.findall(r"%([\w.-]+)", operands)
        read = [passes(shapes.get(operand, "")) for operand in names]
        if kind == "custom-call":
            kernels += passes(shape) >= 0.01
        elif kind == "conditional":
            branches += 1
        elif "dynamic_update_slice" in rest:  # it reads what is new, and writes that
            in_place.add(name)
            own += 2 * (sum(read) - max(read))
        elif kind.endswith("-start"):  # its result is that of its end
            own += sum(read)
        elif kind.endswith("-done"):
            own += 0 if in_place.intersection(names) else passes(shape)
        elif kind in ("fusion", "copy"):
            own += sum(read) + passes(shape)
    return {
        "kernels": kernels,  # of this library, on leaves
        # Not known where a branch is not taken at every step.
        "own": None if branches else round(own, 2),
        "copied": round(sum(map(passes, re.findall(r" = (\S+) copy\(", text))), 2),
    }


def main(names):
    for name in names or IMPLEMENTATIONS:
        for bands, leaves in STEPS:
            compiled = step(name, bands, leaves)
            memory = compiled.memory_analysis()
            line = {
                "implementation": name,
                "bands": bands,
                "leaves": leaves,
                **moved(compiled.as_text()),
                "temporary": round(memory.temp_size_in_bytes / ELEMENT / PARAMETERS, 2),
                "aliased": round(memory.alias_size_in_bytes / ELEMENT / PARAMETERS, 2),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # there is no driver
    from triton.backends import nvidia
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        # What XLA looks for of CUDA, as it comes with Triton; an older assembler than its newest
        # does not read what it writes.
        tools, library = pathlib.Path(folder, "bin"), pathlib.Path(folder, "nvvm", "libdevice")
        tools.mkdir()
        library.mkdir(parents=True)
        (tools / "ptxas").symlink_to(get_ptxas(100).path)
        name = "libdevice.10.bc"
        (library / name).symlink_to(pathlib.Path(*nvidia.__path__, "lib", name))
        os.environ["PATH"] = os.pathsep.join([str(tools), os.environ["PATH"]])
        flags = [os.environ.get("XLA_FLAGS", ""), f"--xla_gpu_cuda_data_dir={folder}"]
        os.environ["XLA_FLAGS"] = " ".join([*flags, "--xla_gpu_autotune_level=0"])
        main(sys.argv[1:])
