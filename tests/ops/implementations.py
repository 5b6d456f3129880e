"""What the tests of all ops share: every implementation in turn, where it can run."""

from __future__ import annotations

import contextlib
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from jax_privacy_kernels.ops.correlated_noise import IMPLEMENTATIONS as CORRELATED_NOISE
from jax_privacy_kernels.ops.min_sep_norm import IMPLEMENTATIONS as MIN_SEP_NORM
from jax_privacy_kernels.ops.toeplitz_multiply import IMPLEMENTATIONS as TOEPLITZ_MULTIPLY
from jax_privacy_kernels.ops.toeplitz_solve import IMPLEMENTATIONS as TOEPLITZ_SOLVE

INTERPRETED = "pallas"
TRITON_CALL = "__gpu$xla.gpu.triton"  # what XLA calls the kernels that Pallas lowers


@contextlib.contextmanager
def interpreted():
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
        for table in (CORRELATED_NOISE, MIN_SEP_NORM, TOEPLITZ_MULTIPLY, TOEPLITZ_SOLVE):
            entry = table[INTERPRETED]._replace(platforms=("cpu",))
            stack.enter_context(mock.patch.dict(table, {INTERPRETED: entry}))
        yield
    jax.clear_caches()


def is_interpreted(table, name):
    return name == INTERPRETED and table[name].platforms == ("cpu",)


def fixture(table):
    """A fixture: the name of each implementation in turn, on a device that it runs on.

    Kernels for GPUs run on one in the tests marked so; those in Pallas are also interpreted, on
    CPUs.
    """
    kernels = [name for name, entry in table.items() if entry.platforms == ("cuda",)]
    params = [name for name in table if name == INTERPRETED or name not in kernels]
    params += [pytest.param((n, "cuda"), marks=pytest.mark.gpu, id=f"{n}-gpu") for n in kernels]

    @pytest.fixture(scope="class", params=params)
    def implementation(request):
        on_gpu = isinstance(request.param, tuple)
        name = request.param[0] if on_gpu else request.param
        if reason := table[name].unavailable():
            pytest.skip(reason)
        try:
            device = jax.devices("cuda" if on_gpu else "cpu")[0]
        except RuntimeError:
            pytest.skip("there is no CUDA device here")
        interpret = name == INTERPRETED and not on_gpu
        with interpreted() if interpret else contextlib.nullcontext(), jax.default_device(device):
            yield name

    return implementation
