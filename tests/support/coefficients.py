"""What the tests of the ops on coefficients share: references, tolerances and checks of dispatch.

References are made in long double, from the definitions. An actual result may be off by what its
op may round away, and by half a unit in the last place of its dtype.
"""

import dataclasses
import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import jax_privacy_kernels
from jax_privacy_kernels.ops import _dispatch, _ffi
from support.implementations import CUDA_CALLS, CUDA_TARGETS, first_on_cuda

UNIT = 2.0**-53  # the relative error of one operation in float64

# Sizes around those of the kernels' tiles and of the oracle's blocks.
sizes = st.one_of(
    st.integers(1, 20),
    st.sampled_from([size + d for size in (8, 64, 128, 256, 512) for d in (-1, 0, 1)]),
    st.integers(1, 1100),
)


def close(actual, expected, error=0.0):
    """Checks that actual is expected, but for the error, rounded to its dtype."""
    dtype, actual = actual.dtype, np.asarray(actual, np.longdouble)
    expected = np.asarray(expected, np.longdouble)
    assert actual.shape == expected.shape
    allowed = error + float(jnp.finfo(dtype).eps) / 2 * (1 + 1e-6) * (np.abs(expected) + error)
    excess = np.broadcast_to(np.abs(actual - expected) - allowed, actual.shape)
    wrong = np.flatnonzero(~(excess <= 0))
    assert wrong.size == 0, (
        f"{wrong.size} of {excess.size} entries differ, the first at {wrong[0]}: "
        f"{actual.flat[wrong[0]]!r}, not {expected.flat[wrong[0]]!r}"
    )


def cancelling(n):
    """float32 numbers whose sums up to 2, 5, 8, .. are small, all others large."""
    x = np.random.default_rng(0).uniform(0.5, 1.5, n).astype(np.float32)
    x[0::3], x[2::3] = 2**27, -(2**27)
    return x


def trees_close(actual, expected):
    """As `close`, for two ways to make the same, both of which round."""

    def check(a, b):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        b = np.asarray(b, np.longdouble)
        close(a, b, (1e-12 if a.dtype == jnp.float64 else 1e-5) * np.abs(b).max(initial=0))

    jax.tree.map(check, actual, expected)


# -- Toeplitz matrices ------------------------------------------------------------------------


def product(coef, x, *, transpose=False):
    """T x or T^T x, where T is the sum of the coefficients' diagonals."""
    coef, x = np.asarray(coef, np.longdouble), np.asarray(x, np.longdouble)
    n, out = len(x), np.zeros_like(x)
    for lag, c in enumerate(coef[:n]):
        if transpose:
            out[: n - lag] += c * x[lag:]
        else:
            out[lag:] += c * x[: n - lag]
    return out


def solution(coef, u, *, transpose=False):
    """x with T x = u or T^T x = u, row by row."""
    coef, u = np.asarray(coef, np.longdouble), np.asarray(u, np.longdouble)
    if transpose:  # T^T is T between reversed vectors
        return solution(coef, u[::-1])[::-1]
    x = np.zeros_like(u)
    for t in range(len(u)):
        lags = min(t, len(coef) - 1)
        past = np.tensordot(coef[1 : lags + 1], x[t - lags : t][::-1], axes=1) if lags else 0
        x[t] = (u[t] - past) / coef[0]
    return x


def matrix(coef, n):
    """T, as JAX differentiates it."""
    lag = np.arange(n)[:, None] - np.arange(n)
    return jnp.where((lag >= 0) & (lag < len(coef)), coef[np.clip(lag, 0, len(coef) - 1)], 0)


@dataclasses.dataclass(frozen=True)
class Case:
    """A Toeplitz matrix and vectors; sum |c_l| < 2 |c_0|, so that errors do not build up."""

    n: int
    m: int
    shape: tuple[int, ...] = ()
    transpose: bool = False
    rows: int | None = None
    coef_dtype: str = "float32"
    rhs_dtype: str = "float32"
    x64: bool = False
    used: int | None = None  # coefficients from here on are zero
    seed: int = 0

    @functools.cached_property
    def coef(self):
        rng = np.random.default_rng(self.seed)
        tail = rng.standard_normal(self.m - 1)
        c_0 = rng.choice([-1, 1]) * rng.uniform(0.5, 2)
        coef = np.array([c_0, *(0.9 * c_0 * tail / max(np.abs(tail).sum(), 0.1))])
        coef[self.m if self.used is None else self.used :] = 0
        return coef.astype(self.coef_dtype)

    @functools.cached_property
    def rhs(self):
        rng = np.random.default_rng(self.seed + 1)
        return rng.standard_normal((self.n, *self.shape)).astype(self.rhs_dtype)

    @property
    def dtype(self):
        return np.result_type(self.coef, self.rhs)

    def arrays(self):
        return jnp.asarray(self.coef), jnp.asarray(self.rhs)

    def __str__(self):
        changed = (f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default)
        return " ".join(f"{f.name}={getattr(self, f.name)}" for f in changed)


CORNERS = [
    Case(1, 1),
    Case(1, 5, (2,), transpose=True),
    Case(2, 2, coef_dtype="float64", rhs_dtype="float64", x64=True),
    Case(5, 9, (2, 3)),
    Case(7, 8, transpose=True),
    Case(8, 8, (1,)),
    Case(9, 9, (2,), coef_dtype="float64", x64=True),
    Case(17, 3, (1, 2), rhs_dtype="float64", transpose=True, x64=True),
    Case(64, 64),
    Case(65, 65, (2,), transpose=True),
    Case(257, 257, (3,), transpose=True, x64=True),
    Case(512, 512, coef_dtype="float64", rhs_dtype="float64", x64=True),
    Case(513, 513, (2,)),
    Case(70, 65, used=1),
    Case(700, 650, transpose=True, used=514),
    Case(1025, 513, coef_dtype="float64", rhs_dtype="float64", transpose=True, x64=True),
    Case(4096, 700),
    Case(4097, 4097, (2,), transpose=True),
    Case(8200, 600, coef_dtype="float64", rhs_dtype="float64", x64=True),
    Case(8193, 9000, (1,), transpose=True),
]


@st.composite
def cases(draw):
    n = draw(sizes)
    m = draw(st.one_of(sizes, st.integers(1, n + 3)))
    x64 = draw(st.booleans())
    dtype = st.sampled_from(["float32", "float64"] if x64 else ["float32"])
    return Case(
        n,
        m,
        draw(st.sampled_from([(), (1,), (3,), (2, 2)])),
        transpose=draw(st.booleans()),
        rows=draw(st.none() | st.integers(1, n)),
        coef_dtype=draw(dtype),
        rhs_dtype=draw(dtype),
        x64=x64,
        used=draw(st.none() | st.integers(1, m)),
        seed=draw(st.integers(0, 2**31 - 1)),
    )


# -- Transformations --------------------------------------------------------------------------


def _with_gradients(function):
    def both(*arguments):
        every = tuple(range(len(arguments)))
        gradients = jax.grad(lambda *a: jnp.sum(jnp.sin(function(*a))), every)
        return function(*arguments), gradients(*arguments)

    return both


_found = {}


def once(name, run, reference, arguments):
    """``run(reference, arguments)`` as NumPy arrays, compiled once for all implementations.

    Args:
      name: of what ``run`` does.
    """
    arrays = [np.asarray(x) for x in jax.tree.leaves(arguments)]
    values = tuple((x.shape, x.dtype, x.tobytes()) for x in arrays)
    key = name, reference, jax.tree.structure(arguments), values
    if key not in _found:
        _found[key] = jax.tree.map(np.asarray, run(reference, arguments))
    return _found[key]


def check_derivatives(function, reference, case, *, second=False):
    """Derivatives with respect to both arguments, against JAX's of the reference."""

    def run(f, arguments):
        derivatives = _with_gradients(f)
        if second:
            derivatives = jax.jacrev(derivatives, argnums=(0, 1))
        return jax.jit(derivatives)(*arguments)

    with jax.enable_x64(True):
        arguments = case.arrays()
        expected = once(f"derivatives, {second=}", run, reference, arguments)
        trees_close(run(function, arguments), expected)


def check_vmap(function, reference, *cases):
    """The function maps as the reference does, and so do gradients of both, one level inside.

    Args:
      function: the op.
      reference: the same, of operations of JAX.
      *cases: which axes to map over, a list from the innermost map to the outermost, and arguments.
    """

    def run(f, axes, arguments):
        for inner in axes[:-1]:
            f = jax.vmap(f, inner)
        return jax.vmap(_with_gradients(f), axes[-1])(*arguments)

    @functools.partial(jax.jit, static_argnums=0)
    def run_all(f, arguments):
        return [run(f, axes, a) for (axes, *_), a in zip(cases, arguments, strict=True)]

    arguments = [case[1:] for case in cases]
    expected = once(f"maps over {[axes for axes, *_ in cases]}", run_all, reference, arguments)
    trees_close(run_all(function, arguments), expected)


def check_toeplitz_vmap(function, reference):
    rng = np.random.default_rng(0)
    coef, coefs, by_columns, rhs, vectors, columns = (
        jnp.asarray(rng.uniform(0.5, 1, shape), jnp.float32)
        for shape in ((3,), (4, 3), (3, 4), (6,), (4, 6), (6, 2, 4))
    )
    check_vmap(
        function,
        reference,
        ([(0, None)], coefs, rhs),
        ([(None, 0)], coef, vectors),
        ([(1, 2)], by_columns, columns),
        ([(0, None), (None, 2)], coefs, columns),
    )


def check_scan(function, reference, carry, *arguments):
    """scan of the function is a loop of the reference; so are gradients."""

    def scan(carry, *arguments):
        return jax.lax.scan(lambda c, _: (function(c, *arguments), None), carry, length=3)[0]

    def loop(carry, *arguments):
        for _ in range(3):
            carry = reference(carry, *arguments)
        return carry

    actual, expected = (jax.jit(_with_gradients(f))(carry, *arguments) for f in (scan, loop))
    trees_close(actual, expected)


# -- Types ------------------------------------------------------------------------------------

DTYPES = [  # of two arguments, in which mode, and of the result
    ("float32", "float32", True, "float32"),
    ("float32", "float64", True, "float64"),
    ("float64", "bfloat16", True, "float64"),
    ("bfloat16", "float16", False, "float32"),
    ("int32", "int8", False, "float32"),
    ("int32", "int8", True, "float64"),
]

DTYPES_OF_ONE = [
    ("float32", True, "float32"),
    ("float64", True, "float64"),
    ("bfloat16", False, "float32"),
    ("float16", True, "float32"),
    ("int8", False, "float32"),
    ("int32", True, "float64"),
]


def check_dtypes(function, dtypes, out, *values):
    """Narrow arguments are widened, and their gradients are as narrow as they are."""
    arguments = [jnp.asarray(v).astype(dtype) for v, dtype in zip(values, dtypes, strict=True)]
    actual = function(*arguments)
    assert actual.dtype == out
    trees_close(actual, function(*(x.astype(out) for x in arguments)))
    for i, x in enumerate(arguments):
        if jnp.issubdtype(x.dtype, jnp.floating):
            gradient = jax.eval_shape(jax.grad(lambda *a: jnp.sum(function(*a)), i), *arguments)
            assert (gradient.shape, gradient.dtype) == (x.shape, x.dtype)


def check_x64_mode_may_change(function):
    """Nothing traced in one mode is used in the other."""
    for x64 in (False, True, False):
        with jax.enable_x64(x64):
            for out in _sum_and_gradient(function)(*Case(300, 260).arrays()):
                assert out.dtype == jnp.float32


# -- Dispatch ---------------------------------------------------------------------------------

PLATFORMS = (("cpu",), ("cuda",), ("cpu", "cuda"))


def _sum_and_gradient(function):
    return jax.value_and_grad(lambda *arguments: jnp.sum(function(*arguments)))


def check_selection(name, op, table, monkeypatch, *arguments):
    """Which implementation runs, forward and backward, by the program that XLA gets."""
    if reason := table["cpp"].unavailable():
        pytest.skip(reason)
    monkeypatch.delenv(_dispatch.ENVIRONMENT, raising=False)

    def lowered(transform, implementation):
        function = transform(functools.partial(op, implementation=implementation))
        with jax.default_device(jax.devices("cpu")[0]):
            return jax.jit(function).lower(*arguments).as_text()

    def check(asked_for, compiled):
        forward = lowered(lambda function: lambda *arguments: function(*arguments), asked_for)
        assert (f"@jpk_{name}(" in forward) == compiled
        assert ("@jpk_" in lowered(_sum_and_gradient, asked_for)) == compiled

    check(None, True)
    check("cpp", True)
    check("jax", False)
    with jax_privacy_kernels.implementation("jax"):
        check(None, False)
        check("cpp", True)
    monkeypatch.setenv(_dispatch.ENVIRONMENT, "jax")
    check(None, False)
    with jax_privacy_kernels.implementation("cpp"):
        check(None, True)

    usable = [other for other, entry in table.items() if not entry.unavailable()]
    message = re.escape(f"of {name} was asked for, but there is none of that name; available: ")
    message = f"'fortran' {message}{re.escape(str(usable))}"
    with pytest.raises(ValueError, match=message):
        op(*arguments, implementation="fortran")
    monkeypatch.setenv(_dispatch.ENVIRONMENT, "fortran")
    with pytest.raises(ValueError, match=message):
        op(*arguments)


def check_export(name, op, table, monkeypatch, platforms, *arguments):
    monkeypatch.delenv(_dispatch.ENVIRONMENT, raising=False)
    compiled = not table["cpp"].unavailable()
    targets = ("toeplitz_multiply", "toeplitz_solve", "min_sep_norm", "participation_max")
    custom_call = jax.export.DisabledSafetyCheck.custom_call

    def export(implementation):
        function = jax.jit(_sum_and_gradient(functools.partial(op, implementation=implementation)))
        checks = [custom_call(f"jpk_{target}") for target in targets]
        checks += map(custom_call, CUDA_TARGETS)
        export = jax.export.export(function, platforms=platforms, disabled_checks=checks)
        return export(*arguments)

    exported = export(None)
    assert exported.platforms == platforms
    assert (f"@jpk_{name}(" in exported.mlir_module()) == (compiled and "cpu" in platforms)
    first = first_on_cuda(table) if "cuda" in platforms else None
    for kernel, target in CUDA_CALLS.items():
        assert (target in exported.mlir_module()) == (kernel == first)
    if jax.default_backend() in platforms:
        trees_close(exported.call(*arguments), _sum_and_gradient(op)(*arguments))
    assert "@jpk_" not in export("jax").mlir_module()
    if compiled and "cuda" in platforms:
        with pytest.raises(NotImplementedError, match=rf"{name}.*'cpp'.*cpu"):
            export("cpp")


def check_pallas_lowers(op, table, *arguments):
    """Values and gradients, also where the kernels' mode is not the caller's."""
    if reason := table["pallas"].unavailable():
        pytest.skip(reason)
    function = _sum_and_gradient(functools.partial(op, implementation="pallas"))
    for x64 in (False, True):
        with jax.enable_x64(x64):
            traced = jax.jit(jax.vmap(function)).trace(*(jnp.stack([x, x]) for x in arguments))
            assert CUDA_CALLS["pallas"] in traced.lower(lowering_platforms=("cuda",)).as_text()


def check_long_ones_are_refused(op, table, monkeypatch, shapes):
    """Kernels with indices of 32 bits take problems of 2^30 rows, and no longer ones.

    Args:
      shapes: from a number of rows to an op of that many and the shapes of its arguments.
    """
    for name in CUDA_CALLS:
        entry = table[name]._replace(unavailable=lambda: None, run=table["jax"].run)
        monkeypatch.setitem(table, name, entry)
    for rows in (2**30, 2**30 + 1, 2**31 + 1):
        function, *shape = shapes(rows)
        arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shape]
        for name in CUDA_CALLS:
            call = functools.partial(
                jax.eval_shape, functools.partial(function, implementation=name), *arguments
            )
            if rows == 2**30:
                call()
            else:
                with pytest.raises(ValueError, match=f"{op}.*{name}: {rows} rows.*most {2**30}"):
                    call()
        jax.eval_shape(function, *arguments)


F = "float32"
WRONG_ROWS = {  # messages of functions of rows, and arguments and results that they are about
    "needs float32 or float64 rows": [
        ([((5,), "int32")], [((), F)]),
        ([((5,), "bfloat16")], [((), F)]),
        ([((0,), F)], [((), F)]),
        ([((2, 0), F)], [((2,), F)]),
    ],
    "needs one result for every row": [
        ([((5,), F)], []),
        ([((5,), F)], [((), "int32")]),
        ([((5,), F)], [((2,), F)]),
        ([((3, 5), F)], [((), F)]),
        ([((3, 5), F)], [((5,), F)]),
    ],
    "needs gradients of the shape of the rows": [
        ([((5,), F)], [((), F), ((), F)]),
        ([((5,), F)], [((), F), ((4,), F)]),
        ([((5,), F)], [((), F), ((5,), "int32")]),
        ([((3, 5), F)], [((3,), F), ((2, 5), F)]),
    ],
}


def call_handler(target, arguments, results, values=None, **attributes):
    """Calls a handler with arguments and results of the (shape, dtype) pairs given.

    Args:
      values: of the arguments, by default ones.
    """
    if reason := _ffi.unavailable():  # which registers the handlers
        pytest.skip(reason)
    if values is None:
        values = [np.ones(shape) for shape, _ in arguments]
    arguments = [jnp.asarray(v, dtype) for v, (_, dtype) in zip(values, arguments, strict=True)]
    results = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in results]
    # As if it had a side effect, so that XLA calls it also when it has no results.
    call = jax.ffi.ffi_call(target, results, has_side_effect=True)
    with jax.default_device(jax.devices("cpu")[0]):
        out = jax.jit(lambda *arguments: call(*arguments, **attributes))(*arguments)
        jax.effects_barrier()
        return jax.block_until_ready(out)


def check_refusal(target, message, arguments, results, **attributes):
    """The handler says what is wrong, and touches no memory."""
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        call_handler(target, arguments, results, **attributes)
