"""Kernels in Triton on CPUs, in Triton's interpreter."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import sys
import threading
from unittest import mock

import jax
import numpy as np

from jax_privacy_kernels.ops import _jax_triton, _registry
from jax_privacy_kernels.ops.correlated_noise import _triton as correlated_noise_triton
from jax_privacy_kernels.ops.toeplitz_multiply import _triton as toeplitz_multiply_triton

INTERPRET = {"TRITON_INTERPRET": "1"}  # Triton looks for it when it is imported, and later


def unavailable():
    """Why nothing can be interpreted, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if "triton" in sys.modules and not _interprets():
        return "this process has imported triton to compile"
    with contextlib.suppress(RuntimeError):
        jax.devices("cuda")
        return "there is a GPU, and a process cannot both compile and interpret"
    return None


def _interprets():
    import triton.language as tl
    from triton.runtime import interpreter

    return isinstance(tl.zeros, interpreter.InterpretedFunction)


GUARD = 4096  # elements at both ends of a result, which must stay as they are
_ONE_AT_A_TIME = threading.Lock()  # XLA has many threads; the interpreter knows of one program


class _Array:
    """A NumPy array, with what the interpreter asks of an array in PyTorch."""

    def __init__(self, array):
        self._array = array
        self.dtype = array.dtype.name

    def data_ptr(self):
        return self._array.ctypes.data

    def untyped_storage(self):
        return self

    # It works on a copy on the host, as it believes.

    def cpu(self):
        return self

    def new_empty(self, *_, **__):
        return self

    def size(self):
        return self._array.shape

    def set_(self, *_):
        pass

    def copy_(self, *_):
        pass

    def storage_offset(self):
        return 0

    def stride(self):
        return self._array.strides


def call(kernel, arrays, numbers, outs, *, programs, warps=4, aliases=None, **constants):
    """As `_jax_triton.call`, by a callback to the host."""
    del warps
    dtypes = [x.dtype for x in arrays]

    def run(*arrays):
        arrays = [np.array(x).view(dtype) for x, dtype in zip(arrays, dtypes, strict=True)]
        guarded = [np.full(math.prod(out.shape) + 2 * GUARD, 77, out.dtype) for out in outs]
        results = [x[GUARD:-GUARD] for x in guarded]
        for operand, result in (aliases or {}).items():
            results[result][:] = arrays[operand]
        with _ONE_AT_A_TIME:
            kernel[(programs,)](*map(_Array, arrays), *numbers, *map(_Array, results), **constants)
        for x in guarded:
            assert (x[:GUARD] == 77).all(), "it has written before a result"
            assert (x[-GUARD:] == 77).all(), "it has written behind a result"
        return [x.view(np.uint8) for x in results]

    # Bytes: XLA calls from any thread, and x64 mode is that of the one where this is traced.
    sizes = [math.prod(out.shape) * out.dtype.itemsize for out in outs]
    results = jax.pure_callback(
        run,
        [jax.ShapeDtypeStruct((size,), np.uint8) for size in sizes],
        *map(_to_bytes, arrays),
        vmap_method="sequential",
    )
    return [_from_bytes(x, out) for x, out in zip(results, outs, strict=True)]


def _to_bytes(x):
    return jax.lax.bitcast_convert_type(x.reshape(-1), np.uint8).reshape(-1)


def _from_bytes(x, out):
    x = x.reshape(*out.shape, out.dtype.itemsize)
    return jax.lax.bitcast_convert_type(x, out.dtype)


LOG2_ERROR = 2.0**-22  # of lg2.approx, by PTX: absolute between 0.5 and 2, relative elsewhere


class Assembly:
    """What inline assembly computes, instead of the interpreter, which takes none."""

    def __init__(self, log2_error=0.0):
        """With this error of the logarithm, everywhere."""
        self._error = log2_error

    def __call__(self, code, constraints, values, types, is_pure, pack):
        del constraints, types, is_pure, pack
        assert code == "lg2.approx.ftz.f32 $0, $1;", code
        (x,) = values
        y = np.log2(x.data, dtype=np.float64)
        y += self._error * np.where((x.data > 0.5) & (x.data < 2), 1, np.abs(y))
        self._result = dataclasses.replace(x, data=y.astype(np.float32))
        return self

    def get_result(self, _):
        return self._result


@contextlib.contextmanager
def _patched_language():
    """triton.language in the interpreter's version, for all kernels that are run.

    The interpreter itself patches it at every call of a function and undoes less; and it takes
    arrays of one element for numbers, which NumPy allows no more.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    from jax_privacy_kernels.kernels import correlated_noise_triton as kernels

    # What kernels see of it, and what its own functions do.
    scopes = [interpreter._patch_lang(f.fn) for f in (kernels.recurrence, tl.zeros)]
    scopes[-1].set_attr(tl.tensor, "__index__", lambda self: self.handle.data.item())
    # Samples overflow by design, and to look for it takes half of the time.
    builder = interpreter.interpreter_builder
    options = dataclasses.replace(builder.options, sanitize_overflow=False)
    try:
        with (
            mock.patch.object(interpreter, "_patch_lang", mock.MagicMock()),
            mock.patch.object(builder, "options", options),
            mock.patch.object(builder, "create_inline_asm", Assembly()),
        ):
            yield
    finally:
        for scope in reversed(scopes):
            scope.restore()


@contextlib.contextmanager
def interpreted():
    """Kernels in Triton run on CPUs. Nothing traced here stays."""
    with contextlib.ExitStack() as stack:
        for patch in (
            mock.patch.dict(os.environ, INTERPRET),
            _patched_language(),
            mock.patch.object(_jax_triton, "call", call),
            # What takes time is the number of operations, not of elements.
            mock.patch.object(correlated_noise_triton, "PART", 512),
            mock.patch.multiple(toeplitz_multiply_triton, ROWS=128, LAGS=256),
        ):
            stack.enter_context(patch)
        for op in _registry.OPS:  # all: the derivative of one may call another
            table = _registry.table(op)
            if "triton" not in table:
                continue
            entry = table["triton"]._replace(platforms=("cpu",), unavailable=lambda: None)
            stack.enter_context(mock.patch.dict(table, triton=entry))
        jax.clear_caches()
        yield
    jax.clear_caches()
