"""Compiles every kernel in Triton as the ops launch it, for GPUs that need not be there.

Prints a line of JSON for every kernel and architecture. A process of its own: one that has imported
Triton to interpret kernels cannot compile them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import jax_privacy_kernels
from jax_privacy_kernels.ops import (
    BandedRecurrence,
    _jax_triton,
    _leaves,
    _registry,
    correlated_noise,
    dense_noise,
    min_sep_norm,
    toeplitz_multiply,
    toeplitz_solve,
)
from jax_privacy_kernels.ops import init_correlated_noise as init
from jax_privacy_kernels.ops._shards import Shard
from jax_privacy_kernels.ops.correlated_noise._contract import Inputs
from jax_privacy_kernels.ops.correlated_noise._filters import RecurrenceFilter
from jax_privacy_kernels.ops.dense_noise._contract import Inputs as RowInputs

ARCHITECTURES = (80, 90, 100)
TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}
TYPES |= {"int32": "i32", "uint32": "u32"}


def compiler(label):
    """A `_jax_triton.call` that compiles instead of launching."""

    def call(kernel, arrays, numbers, outs, *, programs, warps=4, aliases=None, **constants):
        del programs, aliases
        pointers = [f"*{TYPES[x.dtype.name]}" for x in (*arrays, *outs)]
        scalars = [scalar_type(number) for number in numbers]
        first = len(arrays)
        signature = dict(
            zip(kernel.arg_names, [*pointers[:first], *scalars, *pointers[first:]], strict=False)
        )
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, kind in enumerate(signature.values())
            if kind[0] == "*"
        }
        ones = {kernel.arg_names[first + i]: 1 for i, number in enumerate(numbers) if number == 1}
        constants |= ones
        signature |= dict.fromkeys(constants, "constexpr")
        for architecture in ARCHITECTURES:
            compiled = triton.compile(
                ASTSource(kernel, signature, constants, aligned),
                target=GPUTarget("cuda", architecture, 32),
                options={"num_warps": warps, "enable_fp_fusion": False},
            )
            result = {"case": label, "kernel": kernel.__name__, "sm": architecture}
            result |= usage(compiled.asm["cubin"])
            result["shared"] = compiled.metadata.shared
            result["barriers"] = compiled.asm["ttir"].count("gpu.barrier")
            print(json.dumps(result), flush=True)
        return [jnp.zeros(out.shape, out.dtype) for out in outs]

    return call


def scalar_type(number):
    """As jax-triton has it."""
    if -(2**31) <= number < 2**31:
        return "i32"
    return "u32" if 0 <= number < 2**32 else "i64"


def usage(cubin):
    """Registers of a thread, and bytes of its stack: where what is spilled goes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "stack": found["STACK"], "local": found["LOCAL"]}


def noise(coef, size, dtype="float32"):
    def step():
        key, matrix = jax.random.key(0), BandedRecurrence(jnp.asarray(coef))
        grads = jnp.zeros(size, dtype)
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


def noise_of_shard(slots, shard, leaf_size=10_000):
    def step():
        inputs = Inputs(
            **on_shard(shard, leaf_size),
            rings=[jnp.zeros((slots, shard.size))] if slots else [],
            filter=RecurrenceFilter(True, slots),
            step=jnp.int32(0),
            keys=jax.random.split(jax.random.key(0), slots or 1),
            coef=jnp.ones((1, slots + 1)),
            scale=jnp.ones(()),
        )
        return _registry.table("correlated_noise")["triton"].run(inputs)

    return step


def row_of_shard(shard):
    def step():
        inputs = RowInputs(
            **on_shard(shard), rings=[], ahead=True, key=jax.random.key(0), row=jnp.ones(5)
        )
        return _registry.table("dense_noise")["triton"].run(inputs)

    return step


def dense():
    return dense_noise(jnp.zeros(1000), jnp.ones(5), key=jax.random.key(0))


def multiply():
    return toeplitz_multiply(jnp.ones(9), jnp.ones((20, 2)))


def solve():
    return toeplitz_solve(jnp.ones(9), jnp.ones((20, 2)))


def norm():
    return min_sep_norm(jnp.ones(9), n=10, min_sep=3, max_participations=2)


CASES = {
    "1 band": noise(jnp.ones(1), 1000),
    "2 bands": noise(jnp.ones(2), 1000),
    "8 bands": noise(jnp.ones(8), 1000),
    "64 bands": noise(jnp.ones(64), 1000),
    "64 bands by row, bfloat16, an odd size": noise(jnp.ones((70, 64)), 1001, "bfloat16"),
    "8 bands, more than 2^31 elements": noise(jnp.ones(8), 2**31 + 9),
    "8 bands, more than 2^32 elements": noise(jnp.ones(8), 2**32 + 9),
    "2 bands, a shard in one run": noise_of_shard(1, Shard(999)),
    "8 bands, a shard in one run": noise_of_shard(7, Shard(1000)),
    "64 bands, a shard in one run": noise_of_shard(63, Shard(1000)),
    "64 bands, a shard in two runs": noise_of_shard(63, Shard(999, ((2, 3000),))),
    "1 band, a shard in two runs": noise_of_shard(0, Shard(999, ((2, 3000),))),
    "8 bands, a shard of more than 2^32 elements": noise_of_shard(7, Shard(2**32 + 9), 2**34),
    "a dense row": dense,
    "a dense row, a shard in one run": row_of_shard(Shard(1000)),
    "a product": multiply,
    "a solution": solve,
    "a norm": norm,
}


def main(names):
    with contextlib.ExitStack() as stack:
        for table in filter(lambda table: "triton" in table, map(_registry.table, _registry.OPS)):
            entry = table["triton"]._replace(platforms=("cpu",), unavailable=lambda: None)
            stack.enter_context(mock.patch.dict(table, triton=entry))
        for name in names or CASES:
            compiling = mock.patch.object(_jax_triton, "call", compiler(name))
            with compiling, jax_privacy_kernels.implementation("triton"):
                jax.clear_caches()
                jax.eval_shape(CASES[name])


if __name__ == "__main__":
    main(sys.argv[1:])
