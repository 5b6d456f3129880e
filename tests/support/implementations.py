"""What the tests of all ops share: every implementation in turn, where it can run."""

from __future__ import annotations

import contextlib
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from jax_privacy_kernels.ops import _registry
from support import triton_interpreter

# What XLA calls the kernels of each. Pallas leaves the compiling to XLA, jax-triton does it itself.
CUDA_CALLS = {"triton": "triton_kernel_call", "pallas": "__gpu$xla.gpu.triton"}
# As jax.export wants them named; since 0.4 jax-triton says it otherwise.
CUDA_TARGETS = (*CUDA_CALLS.values(), "triton_kernel_call_ffi")


@contextlib.contextmanager
def _interpreted_pallas():
    """Kernels in Pallas run in its interpreter, on CPUs. Nothing that is traced here stays."""
    from jax._src.pallas import hlo_interpreter
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    interpret = hlo_interpreter.pallas_call_hlo_interpret

    def in_its_own_mode(*arrays, **params):
        """It runs when XLA lowers, out of the x64 mode that a kernel may have been called in."""
        wide = any(x.dtype == jnp.float64 for x in arrays)
        with jax.enable_x64(True) if wide else contextlib.nullcontext():
            return interpret(*arrays, **params)

    call = functools.partial(pl.pallas_call, interpret=True)
    jax.clear_caches()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(pl, "pallas_call", call))
        patch = mock.patch.object(hlo_interpreter, interpret.__name__, in_its_own_mode)
        stack.enter_context(patch)
        # Programs run one after the other, as one thread.
        stack.enter_context(mock.patch.object(triton, "debug_barrier", return_value=None))
        for table in filter(lambda table: "pallas" in table, map(_registry.table, _registry.OPS)):
            entry = table["pallas"]._replace(platforms=("cpu",))
            stack.enter_context(mock.patch.dict(table, pallas=entry))
        yield
    jax.clear_caches()


INTERPRETERS = {"triton": triton_interpreter.interpreted, "pallas": _interpreted_pallas}
MARKS = {
    "triton": (pytest.mark.interpreted, pytest.mark.triton),
    "pallas": pytest.mark.interpreted,
}


def is_interpreted(table, name):
    """Whether it is a kernel for GPUs that runs on the CPU."""
    return name in INTERPRETERS and table[name].platforms == ("cpu",)


def is_slow(table, name):
    """Whether every operation is a call of NumPy: what Pallas interprets, XLA compiles."""
    return name == "triton" and is_interpreted(table, name)


def first_on_cuda(table):
    """The name of the implementation that CUDA takes, if it refuses nothing."""
    return next(
        name
        for name, entry in table.items()
        if "cuda" in entry.platforms and not entry.unavailable()
    )


def fixture(table):
    """A fixture: the name of each implementation in turn, on a device that it runs on.

    Kernels for GPUs run on one in the tests marked so, and are interpreted, on CPUs, in others.
    """
    kernels = [name for name, entry in table.items() if entry.platforms == ("cuda",)]
    params = [
        pytest.param(name, marks=MARKS.get(name, ()))
        for name in table
        if name in INTERPRETERS or name not in kernels
    ]
    params += [pytest.param((n, "cuda"), marks=pytest.mark.gpu, id=f"{n}-gpu") for n in kernels]

    @pytest.fixture(scope="class", params=params)
    def implementation(request):
        on_gpu = isinstance(request.param, tuple)
        name = request.param[0] if on_gpu else request.param
        interpret = name in INTERPRETERS and not on_gpu
        # Triton's interpreter needs neither jax-triton nor a GPU.
        by_triton = interpret and name == "triton"
        reason = triton_interpreter.unavailable() if by_triton else table[name].unavailable()
        if reason:
            pytest.skip(reason)
        try:
            device = jax.devices("cuda" if on_gpu else "cpu")[0]
        except RuntimeError:
            pytest.skip("there is no CUDA device here")
        interpreted = INTERPRETERS[name] if interpret else contextlib.nullcontext
        with interpreted(), jax.default_device(device):
            yield name

    return implementation
