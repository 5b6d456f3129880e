"""Lowers every kernel in Triton as the ops launch it, for GPUs that need not be there.

Prints a line of JSON for what went in, for every lowered program, and for every kernel that
jax-triton made for one. A process of its own: one that has imported Triton to interpret kernels
cannot compile them. Exits with 77, and says why, where these packages do not compile kernels.

    python tests/kernels/compile_triton.py [CASE or GPU ...]    # all, where none is named
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import pathlib
import re
import subprocess
import sys
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import machine_code

import jax_privacy_kernels
from jax_privacy_kernels import random
from jax_privacy_kernels.ops import (
    BandedRecurrence,
    _jax_triton,
    _leaves,
    _registry,
    correlated_noise,
    dense_noise,
    init_dense_noise,
    min_sep_norm,
    toeplitz_multiply,
    toeplitz_solve,
)
from jax_privacy_kernels.ops import init_correlated_noise as init
from jax_privacy_kernels.ops._shards import Shard
from jax_privacy_kernels.ops.correlated_noise._contract import Inputs
from jax_privacy_kernels.ops.correlated_noise._filters import RecurrenceFilter
from jax_privacy_kernels.ops.dense_noise._contract import Inputs as RowInputs

GPUS = ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA B200")
# Additions and products in PTX that its compiler may fuse: those that do not say how they round.
FUSIBLE = re.compile(r"\b(?:add|sub|mul)(?:\.ftz)?(?:\.sat)?\.f(?:16|32|64)\b")


class Recorder:
    """Stands in for the constructor of kernels by which jax-triton hands them to XLA."""

    def __init__(self, construct):
        self._construct = construct
        self.kernels = []

    def __call__(self, name, warps, ctas, shared, ptx, ttir, capability, *scratch):
        self.kernels.append((name, capability, shared, ptx, ttir))
        return self._construct(name, warps, ctas, shared, ptx, ttir, capability, *scratch)


def described(name, capability, shared, ptx, ttir, launch):
    """What the tests look at of a kernel, which this compiles to machine code."""
    function = re.search(r"tt\.func public @(\w+)", ttir)[1]
    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder, "kernel.cubin")
        assemble(ptx, capability, cubin)
        instructions = machine_code.parse(printed("nvdisasm", "-c", cubin))
        used = printed("cuobjdump", "--dump-resource-usage", cubin)
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", used)}
    return {
        "kernel": function,
        "sm": capability,
        "shared": shared,
        "barriers": len(re.findall(r"^ *(?:gpu|ttg)\.barrier\b", ttir, re.M)),
        "waits": len(re.findall(r"\bbar(?:rier\.cta)?\.sync\b", ptx)),
        "fusible": len(FUSIBLE.findall(ptx)),
        "registers": found["REG"],
        "stack": found["STACK"],  # bytes; where what is spilled goes
        "local": found["LOCAL"],
        "instructions": len(instructions),
        "per_sample": per_sample(instructions, **launch),
    }


def assemble(ptx, capability, cubin):
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"^\.target (\w+)", ptx, re.M)[1]
    source = cubin.with_suffix(".ptx")
    source.write_text(ptx)
    command = [get_ptxas(capability).path, f"--gpu-name={target}", source, "-o", cubin]
    subprocess.run(command, check=True)


def printed(tool, *arguments):
    import triton

    command = [getattr(triton.knobs.nvidia, tool).path, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def per_sample(instructions, *, warps=4, STREAM=None, TILE=0, SLOTS=1, GROUP=1, PART=None, **_):
    """The longest way through a program, by the samples that a thread makes on it, or None.

    A program that refreshes goes SLOTS / GROUP times through its loops. It takes the longest way,
    but for 2 slots, where warming up is longer. With keys of chacha20 there are loops of 10 rounds,
    too, so that this cannot tell.
    """
    if STREAM != "threefry2x32":
        return None
    samples = SLOTS * (PART or TILE) / (32 * warps)
    return round(machine_code.longest(instructions, -(-SLOTS // GROUP)) / samples, 1)


THREEFRY, CHACHA20 = jax.random.key(0), random.secure_key(bytes(32))


def noise(coef, size, dtype="float32", key=THREEFRY):
    """A step of one leaf, or of some, if there are several sizes."""

    def step():
        matrix = BandedRecurrence(jnp.asarray(coef))
        grads = jax.tree.map(lambda size: jnp.zeros(size, dtype), size)
        options = {"dtype": "float32"}
        state = init(grads, matrix, key=key, **options)
        impl = jax.random.key_impl(key)
        return correlated_noise(grads, state, matrix, stddev=1.0, key_impl=impl, **options)

    return step


def on_shard(shard, leaf_size=10_000):
    """A leaf of which a shard is here, and what inputs have of it, but for the ring."""
    struct = jax.ShapeDtypeStruct((leaf_size,), jnp.float32)
    (leaf,) = _leaves.plan([struct], jnp.float32, None)
    leaf = dataclasses.replace(leaf, shard=shard)
    base = jnp.zeros((1, 2), jnp.uint32)
    return {"leaves": (leaf,), "base": base, "grads": [jnp.zeros(shard.size)]}


def noise_of_shard(slots, shard, leaf_size=10_000, key=THREEFRY):
    def step():
        inputs = Inputs(
            **on_shard(shard, leaf_size),
            rings=[jnp.zeros((slots, shard.size))] if slots else [],
            filter=RecurrenceFilter(True, slots),
            step=jnp.int32(0),
            keys=jax.random.split(key, slots or 1),
            coef=jnp.ones((1, slots + 1)),
            stddevs=None,
            scale=jnp.ones(()),
        )
        return _registry.table("correlated_noise")["triton"].run(inputs)

    return step


def row_of_shard(shard, key=THREEFRY):
    def step():
        inputs = RowInputs(**on_shard(shard), rings=[], ahead=True, key=key, row=jnp.ones(5))
        return _registry.table("dense_noise")["triton"].run(inputs)

    return step


def dense():
    key, matrix, grads = jax.random.key(0), jnp.ones((1, 5)), jnp.zeros(1000)
    state = init_dense_noise(grads, matrix, key=key)
    impl = jax.random.key_impl(key)
    return dense_noise(grads, state, matrix, stddev=1.0, key_impl=impl)


def multiply():
    return toeplitz_multiply(jnp.ones(9), jnp.ones((20, 2)))


def solve():
    return toeplitz_solve(jnp.ones(9), jnp.ones((20, 2)))


def norm():
    return min_sep_norm(jnp.ones(9), n=10, min_sep=3, max_participations=2)


CASES = {
    "1 band": noise([1.0], 1000),
    "2 bands": noise([1.0] * 2, 1000),
    "3 bands, one element": noise([1.0] * 3, 1),
    "8 bands": noise([1.0] * 8, 1000),
    "32 bands, 2^26 elements": noise([1.0] * 32, 2**26),
    "64 bands": noise([1.0] * 64, 1000),
    "64 bands, 2^26 elements": noise([1.0] * 64, 2**26),
    "64 bands by row, bfloat16, an odd size": noise([[1.0] * 64] * 70, 1001, "bfloat16"),
    "64 bands, bfloat16, 2^26 elements": noise([1.0] * 64, 2**26, "bfloat16"),
    "8 bands, 3 leaves": noise([1.0] * 8, [1000, 8, 5000]),
    "64 bands, 8 leaves": noise([1.0] * 64, [1000] * 8),
    "64 bands by row, bfloat16, 8 odd leaves": noise([[1.0] * 64] * 70, [1001] * 8, "bfloat16"),
    "8 bands, more than 2^31 elements": noise([1.0] * 8, 2**31 + 9),
    "8 bands, more than 2^32 elements": noise([1.0] * 8, 2**32 + 9),
    "2 bands, a shard in one run": noise_of_shard(1, Shard(999)),
    "8 bands, a shard in one run": noise_of_shard(7, Shard(1000)),
    "64 bands, a shard in one run": noise_of_shard(63, Shard(1000)),
    "64 bands, a shard in two runs": noise_of_shard(63, Shard(999, ((2, 3000),))),
    "1 band, a shard in two runs": noise_of_shard(0, Shard(999, ((2, 3000),))),
    "8 bands, a shard of more than 2^32 elements": noise_of_shard(7, Shard(2**32 + 9), 2**34),
    "a dense row": dense,
    "a dense row, a shard in one run": row_of_shard(Shard(1000)),
    "1 band, chacha20": noise([1.0], 1000, key=CHACHA20),
    "2 bands, chacha20": noise([1.0] * 2, 1000, key=CHACHA20),
    "8 bands, chacha20": noise([1.0] * 8, 1000, key=CHACHA20),
    "64 bands, chacha20": noise([1.0] * 64, 1000, key=CHACHA20),
    "64 bands by row, bfloat16, an odd size, chacha20": noise(
        [[1.0] * 64] * 70, 1001, "bfloat16", CHACHA20
    ),
    "2 bands, 8 leaves, chacha20": noise([1.0] * 2, [1000] * 8, key=CHACHA20),
    "64 bands, 8 leaves, chacha20": noise([1.0] * 64, [1000] * 8, key=CHACHA20),
    "64 bands by row, bfloat16, 8 odd leaves, chacha20": noise(
        [[1.0] * 64] * 70, [1001] * 8, "bfloat16", CHACHA20
    ),
    "64 bands, a shard in two runs, chacha20": noise_of_shard(
        63, Shard(999, ((2, 3000),)), key=CHACHA20
    ),
    "a dense row, a shard in one run, chacha20": row_of_shard(Shard(1000), CHACHA20),
    "a product": multiply,
    "a solution": solve,
    "a norm": norm,
}


def mesh_of(kind):
    """A mesh without axes, which says what GPU programs are for."""
    fields = [field.name for field in dataclasses.fields(jax.sharding.AbstractDevice)]
    platform = {"platform": "gpu"} if "platform" in fields else {}  # not in jax 0.8 and 0.9
    device = jax.sharding.AbstractDevice(kind, None, **platform)
    return jax.sharding.AbstractMesh((), (), abstract_device=device)


def lowered(step, kind):
    """The StableHLO of a step for a GPU of that kind."""
    implementation = jax_privacy_kernels.implementation("triton")
    with jax.sharding.use_abstract_mesh(mesh_of(kind)), implementation:
        return jax.jit(step).trace().lower(lowering_platforms=("cuda",)).as_text()


def main(arguments):
    names = [name for name in arguments if name not in GPUS]
    kinds = [kind for kind in GPUS if kind in arguments]
    with jax.sharding.use_abstract_mesh(mesh_of(GPUS[0])):
        if reason := _jax_triton.unavailable():
            print(reason)
            sys.exit(77)
    from jaxlib import gpu_triton

    versions = {name: importlib.metadata.version(name) for name in ("jax", "jax-triton", "triton")}
    print(json.dumps(versions), flush=True)
    for name in names or CASES:
        for kind in kinds or GPUS:
            recorder = Recorder(gpu_triton.TritonKernel)
            launch = mock.Mock(wraps=_jax_triton.call)
            with (
                mock.patch.object(gpu_triton, "TritonKernel", recorder),
                mock.patch.object(_jax_triton, "call", launch),
            ):
                text = lowered(CASES[name], kind)
            calls = [line for line in text.splitlines() if "@triton_kernel_call" in line]
            aliased = sum(call.count("output_operand_alias<") for call in calls)
            program = {"case": name, "gpu": kind, "calls": len(calls), "aliased": aliased}
            print(json.dumps(program), flush=True)
            for kernel in recorder.kernels:
                line = {"case": name, **described(*kernel, launch.call_args.kwargs)}
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
