"""Noise that is saved by orbax, and goes on: on other meshes, after SIGKILL, as docs/ says.

What is tested is the code of docs/checkpointing.md. This file is also the program that is killed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import sweeps

from jax_privacy_kernels.matrix_factorization import (
    banded,
    buffered_toeplitz,
    sensitivity,
    streaming_matrix,
    toeplitz,
)
from jax_privacy_kernels.noise_addition import (
    SupportedStrategies,
    matrix_factorization_privatizer,
)
from jax_privacy_kernels.ops.correlated_noise import IMPLEMENTATIONS

ocp = pytest.importorskip("orbax.checkpoint")

ROOT = pathlib.Path(__file__).parents[1]
HAS_CPP = not IMPLEMENTATIONS["cpp"].unavailable()
EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"
DEFAULT, ZERO = SupportedStrategies.DEFAULT, SupportedStrategies.ZERO


def snippets():
    page = (ROOT / "docs" / "checkpointing.md").read_text()
    return re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def page():
    """What the page defines for its readers: save and restore."""
    names = {"jax": jax, "jnp": jnp, "np": np}
    (code,) = (code for code in snippets() if "def restore(" in code)
    exec(compile(code, "docs/checkpointing.md", "exec"), names)
    return names["save"], names["restore"]


def run(*arguments, **env):
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


# -- The page ---------------------------------------------------------------------------------


@pytest.mark.subprocess
def test_the_page(tmp_path):
    """All of it in one process of eight devices; then again, where checkpoints are found."""
    program = tmp_path / "page.py"
    program.write_text("\n".join(snippets()))
    code = f"import os; os.chdir({str(tmp_path)!r}); exec(open({str(program)!r}).read())"
    run("-c", code, XLA_FLAGS=EIGHT_DEVICES)
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [15, 20]
    shutil.rmtree(tmp_path / "checkpoints" / "20")
    for strategy in SupportedStrategies:
        shutil.rmtree(tmp_path / strategy.value)
    run("-c", code, XLA_FLAGS=EIGHT_DEVICES)
    assert (tmp_path / "checkpoints" / "20").exists()


@pytest.mark.parametrize(
    "coef", [(1.0, 0.5, 0.25), (0.9, 0.3, 0.2, 0.1, 0.4), tuple(0.9 ** np.arange(12))], ids=str
)
@pytest.mark.parametrize("min_sep", [1, 2, 4])
def test_noise_that_starts_anew_is_no_more_sensitive(coef, min_sep):
    n = 12
    strategy = np.array(toeplitz.materialize_lower_triangular(jnp.array(coef), n=n))

    def of(strategy):
        return sensitivity.get_min_sep_sensitivity_upper_bound(
            jnp.array(strategy), min_sep=min_sep, max_participations=3
        )

    for restart in range(1, n):
        parts = strategy.copy()
        parts[restart:, :restart] = 0
        assert of(parts) <= of(strategy) * (1 + 1e-6)


# -- SIGKILL ----------------------------------------------------------------------------------

STEPS, EVERY = 14, 4
FAILSAFE = 3600  # seconds, for a program that never says that it can be killed


def digest(tree):
    data = b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(tree))
    return hashlib.sha256(data).hexdigest()[:16]


def program(directory, pause):
    """Trains, and after every step prints digests of its gradients and of the noisy ones.

    Every EVERY steps it saves. At ``pause`` it waits to be killed: after that step ("6"), or when
    orbax has begun to save it ("8 saving").
    """
    save, restore = page()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((STEPS, 16, 12)).astype(np.float32)
    params = {"w": 0.3 * rng.standard_normal((12, 150)), "v": 0.3 * rng.standard_normal(150)}
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    optimizer = optax.adam(0.01)
    # No key: in a process that goes on, it is the saved one.
    privatizer = matrix_factorization_privatizer(MATRICES["banded"](), stddev=0.5)

    def clipped_grad(params, x):
        grad = jax.grad(lambda p: (jnp.tanh(x @ p["w"]) @ p["v"] - jnp.sin(x[0])) ** 2)(params)
        return optax.tree.scale(1 / jnp.maximum(1, optax.tree.norm(grad)), grad)

    @functools.partial(jax.jit, donate_argnums=0)
    def train(state, x):
        grads = jax.vmap(clipped_grad, in_axes=(None, 0))(state["params"], x)
        grads = jax.tree.map(lambda g: jnp.sum(g, axis=0), grads)
        noisy, noise = privatizer.update(grads, state["noise"])
        updates, opt_state = optimizer.update(noisy, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "optimizer": opt_state, "noise": noise}, grads, noisy

    def say(label, *digests):
        print(f"{label}:", *digests, flush=True)
        if label == pause:
            sys.stdin.read()  # until killed

    state = {
        "params": params,
        "optimizer": optimizer.init(params),
        "noise": privatizer.init(params),
    }
    with ocp.CheckpointManager(directory) as manager:
        step = manager.latest_step()
        if step is None:
            step = 0
            save(manager, step, state)
        else:
            state = restore(manager, step, state)
        while step < STEPS:
            state, grads, noisy = train(state, x[step])
            step += 1
            if step % EVERY == 0:
                save(manager, step, state)
                say(f"{step} saving")
                if not pause.endswith("saving"):
                    manager.wait_until_finished()
            say(f"{step}", digest(grads), digest(noisy))
    say("end", digest(state))


@pytest.mark.subprocess
def test_sigkill(tmp_path):
    def lines(text):
        """Digests by step."""
        pairs = (line.split(": ") for line in text.splitlines() if "saving" not in line)
        return {label: digests.split() for label, digests in pairs}

    whole = lines(run(__file__, tmp_path / "whole", "never"))
    assert list(whole) == [*map(str, range(1, STEPS + 1)), "end"]
    assert len({noisy for _, noisy in [whole[str(step)] for step in range(1, STEPS + 1)]}) == STEPS
    # With its key, which no process knows but from what was saved before the first step.
    shutil.copytree(tmp_path / "whole" / "0", tmp_path / "killed" / "0")

    def killed(pause):
        with (tmp_path / "log").open("w") as log:
            child = subprocess.Popen(
                [sys.executable, __file__, str(tmp_path / "killed"), pause],
                env={**os.environ, "JAX_PLATFORMS": "cpu"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        timer = threading.Timer(FAILSAFE, child.kill)
        timer.start()
        said = ""
        try:
            for line in child.stdout:
                said += line
                if line.startswith(f"{pause}:"):
                    break
        finally:
            timer.cancel()
            child.kill()
            child.communicate()
        assert child.returncode == -9, said + (tmp_path / "log").read_text()
        return lines(said)

    between = killed("6")  # two steps after a save
    assert list(between) == ["1", "2", "3", "4", "5", "6"]
    saving = killed("8 saving")  # which may be complete by then, or not
    assert list(saving) == ["5", "6", "7"]
    rest = lines(run(__file__, tmp_path / "killed", "never"))
    assert next(iter(rest)) in ("5", "9")
    for part in (between, saving, rest):
        assert part == {word: whole[word] for word in part}
    assert rest["end"] == whole["end"]


# -- Eight devices ----------------------------------------------------------------------------

SHAPES = {"w": (16, 200), "b": (8,), "scalar": ()}
DIVISIBLE = {"w": (16, 200), "b": (8,)}
SAVED = 3, 10  # in the first and in the second round of b - 1 = 7 steps
END = 12

# What orbax says of trees and of shapes that are not those saved.
ORBAX = r"(?i)tree structure|shape|do not match"

MATRICES = {
    "identity": streaming_matrix.identity,
    "column-normalized": lambda: banded.ColumnNormalizedBanded.default(
        END, 8
    ).inverse_as_streaming_matrix(),
    "banded": lambda: toeplitz.inverse_as_streaming_matrix(
        toeplitz.optimal_max_error_strategy_coefs(8)
    ),
    "buffers": lambda: buffered_toeplitz.BufferedToeplitz.build(
        [0.95, 0.5], [0.2, 0.3], dtype=jnp.float32
    ).inverse_as_streaming_matrix(),
    "banded inverse": lambda: toeplitz.noising_coef_as_streaming_matrix(
        toeplitz.optimal_max_error_noising_coefs(8)
    ),
    "no state": lambda: toeplitz.noising_coef_as_streaming_matrix(
        jnp.array([1.0, -0.5, -0.2]), look_ahead=0
    ),
    "product": lambda: streaming_matrix.prefix_sum() @ MATRICES["banded"](),
    "dense": lambda: np.linalg.inv(
        toeplitz.materialize_lower_triangular(toeplitz.optimal_max_error_strategy_coefs(END))
    ),
}

# Axes, kind and how gradients are laid out. Those not named are replicated.
LAYOUTS = {
    "no mesh": None,
    "1": ({"x": 1}, AxisType.Explicit, {}),
    "8": ({"x": 8}, AxisType.Explicit, {}),
    "8, sharded": ({"x": 8}, AxisType.Explicit, {"w": P("x"), "b": P("x")}),
    "4x2": ({"x": 4, "y": 2}, AxisType.Explicit, {"w": P("x", "y"), "b": P("y")}),
    "2x4": ({"x": 2, "y": 4}, AxisType.Explicit, {"w": P("y", "x")}),
    "2x4, both": ({"x": 2, "y": 4}, AxisType.Explicit, {"w": P(("x", "y")), "b": P(("x", "y"))}),
    "2x4, replicated": ({"x": 2, "y": 4}, AxisType.Explicit, {}),
    "8, automatic": ({"x": 8}, AxisType.Auto, {"w": P(None, "x"), "b": P("x")}),
}


# Each of them compiles its step once.
@functools.cache
def setting(matrix, layout, strategy=DEFAULT, *, divisible=False, **kwargs):
    return Setting(matrix, layout, strategy, DIVISIBLE if divisible else SHAPES, **kwargs)


class Setting:
    """A privatizer, and gradients that are laid out in some way."""

    def __init__(self, matrix, layout, strategy, shapes, prng_key=3, **kwargs):
        self.privatizer = matrix_factorization_privatizer(
            MATRICES[matrix](),
            stddev=1.5,
            prng_key=prng_key,
            intermediate_strategy=strategy,
            **kwargs,
        )
        self.update = jax.jit(self.privatizer.update, donate_argnums=1)
        self.shapes, self.mesh, self.specs = shapes, None, {}
        if LAYOUTS[layout] is not None:
            axes, kind, self.specs = LAYOUTS[layout]
            devices = jax.devices()[: np.prod(list(axes.values()))]
            kinds = (kind,) * len(axes)
            self.mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), kinds, devices=devices)

    def within(self):
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def grads(self, step):
        rng = np.random.default_rng(step)
        grads = {
            name: rng.standard_normal(shape, np.float32) for name, shape in self.shapes.items()
        }
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, grads)
        return {
            name: jax.device_put(g, NamedSharding(self.mesh, self.specs.get(name, P())))
            for name, g in grads.items()
        }

    def start(self):
        with self.within():
            return self.privatizer.init(self.grads(0))

    def steps(self, state, first, last):
        """What the steps give, as NumPy arrays, and the state after them."""
        noisy = {}
        with self.within():
            for step in range(first, last):
                noisy[step], state = self.update(self.grads(step), state)
        return jax.tree.map(np.array, noisy), state


class Saved:
    """A run from the start to the end, saved on the way."""

    def __init__(self, folder, setting):
        save, self._restore = page()
        self.folder = folder
        self.noisy = {}
        state, step = setting.start(), 0
        with ocp.CheckpointManager(folder) as manager:
            for stop in (*SAVED, END):
                noisy, state = setting.steps(state, step, stop)
                self.noisy |= noisy
                step = stop
                if stop in SAVED:
                    save(manager, stop, {"noise": state})  # whose next step donates it

    def restored(self, step, setting):
        like = {"noise": setting.start()}  # the page also makes it without data
        with ocp.CheckpointManager(self.folder) as manager, setting.within():
            return self._restore(manager, step, like)["noise"]

    def check(self, setting, exact=HAS_CPP):
        """The noise goes on in another setting as it would have."""
        for saved in SAVED:
            noisy, _ = setting.steps(self.restored(saved, setting), saved, END)
            assert list(noisy) == list(range(saved, END))
            for step, grads in noisy.items():
                for name, found in grads.items():
                    expected = self.noisy[step][name]
                    if exact:
                        np.testing.assert_array_equal(found, expected, err_msg=f"{name}, {step}")
                    else:
                        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("eight_devices")
class TestEightDevices:
    @pytest.mark.parametrize(
        "matrix",
        sweeps.cases(
            list(MATRICES), ["column-normalized", "banded", "buffers", "product", "dense"]
        ),
    )
    def test_default_moves_to_any_mesh(self, tmp_path, matrix):
        moves = [("8, sharded", "no mesh")]
        if matrix not in ("no state", "product"):
            moves += [("no mesh", "8, sharded"), ("4x2", "8, sharded")]
        if matrix == "banded":
            moves += [("4x2", "2x4"), ("4x2", "8, automatic")]
        runs = {layout: Saved(tmp_path / layout, setting(matrix, layout)) for layout, _ in moves}
        for before, after in moves:
            # Products make their noise in plain JAX, where XLA may round as it likes.
            runs[before].check(setting(matrix, after), exact=HAS_CPP and matrix != "product")

    def test_default_moves_from_automatic_axes(self, tmp_path):
        saved = Saved(tmp_path, setting("banded", "8, automatic"))
        saved.check(setting("banded", "2x4"))

    @pytest.mark.each_value
    @pytest.mark.parametrize("matrix", ["banded", "dense"])
    @pytest.mark.parametrize(
        ("before", "after"),
        [
            ("8", "1"),
            ("1", "8"),
            ("8", "2x4, replicated"),
            ("8, sharded", "2x4, both"),  # as many shards
        ],
    )
    def test_zero_moves_where_it_fits(self, tmp_path, matrix, before, after):
        def on(layout):
            return setting(matrix, layout, ZERO, divisible=True)

        Saved(tmp_path, on(before)).check(on(after))

    @pytest.mark.parametrize(
        ("before", "after", "leaf"),
        [
            ("8", "1", "scalar"),  # padded to 8, and to 1
            ("1", "8", "scalar"),
            ("8", "8, sharded", "b"),
            ("8, sharded", "8", "b"),
            ("4x2", "2x4", "b"),
        ],
    )
    def test_zero_does_not_move_where_it_does_not_fit(self, tmp_path, before, after, leaf):
        saved = Saved(tmp_path, setting("banded", before, ZERO))
        other = setting("banded", after, ZERO)
        with pytest.raises(ValueError, match=ORBAX):
            saved.restored(3, other)
        # Restored in another way
        state = jax.tree.map(np.asarray, saved.restored(3, setting("banded", before, ZERO)))
        with other.within():
            state = jax.device_put(state, NamedSharding(other.mesh, P()))
            padded = rf"noise_state\.inner\['{leaf}'\] to have shape"
            message = rf"expected ({padded}|.*for gradients that are split as these are)"
            with pytest.raises(ValueError, match=message):
                other.update(other.grads(3), state)

    @pytest.mark.parametrize("strategies", [(ZERO, DEFAULT), (DEFAULT, ZERO)])
    def test_strategies_do_not_take_each_others_states(self, tmp_path, strategies):
        before, after = (setting("banded", "8", strategy) for strategy in strategies)
        with pytest.raises(ValueError, match=ORBAX):
            Saved(tmp_path, before).restored(3, after)

    @pytest.mark.parametrize("matrix", ["buffers", "banded inverse"])
    def test_another_matrix_is_refused(self, tmp_path, matrix):
        saved = Saved(tmp_path, setting("banded", "no mesh"))
        with pytest.raises(ValueError, match=ORBAX):
            saved.restored(3, setting(matrix, "no mesh"))

    @pytest.mark.skipif(not HAS_CPP, reason="the extension is missing")
    @pytest.mark.parametrize("names", [("cpp", "jax"), ("jax", "cpp")], ids=str)
    def test_another_implementation_goes_on(self, tmp_path, names):
        before, after = (setting("banded", "no mesh", implementation=name) for name in names)
        Saved(tmp_path, before).check(after, exact=False)

    @pytest.mark.parametrize("matrix", ["banded", "dense"])
    def test_the_key_is_the_saved_one(self, tmp_path, matrix):
        saved = Saved(tmp_path, setting(matrix, "no mesh"))
        saved.check(setting(matrix, "no mesh", prng_key=4))
        rbg = Setting(matrix, "no mesh", DEFAULT, SHAPES, jax.random.key(3, impl="rbg"))
        with pytest.raises(ValueError, match=ORBAX):
            saved.restored(3, rbg)

    @pytest.mark.parametrize("matrix", ["banded", "dense"])
    def test_a_secure_key_is_the_saved_one(self, tmp_path, matrix):
        """On another mesh, and in a process that draws its own."""
        saved = Saved(tmp_path, setting(matrix, "8, sharded", prng_key=None))
        saved.check(setting(matrix, "4x2", prng_key=None))
        with pytest.raises(ValueError, match=ORBAX):
            saved.restored(3, setting(matrix, "8, sharded"))

    def test_what_is_being_saved_may_be_donated(self, tmp_path):
        save, restore = page()
        mesh = jax.make_mesh((8,), ("x",), (AxisType.Explicit,))
        state = {"w": jax.device_put(jnp.arange(2.0**22), NamedSharding(mesh, P("x")))}
        add = jax.jit(lambda state: {"w": state["w"] + 1}, donate_argnums=0)
        with ocp.CheckpointManager(tmp_path) as manager:
            save(manager, 0, state)
            for _ in range(5):
                state = add(state)
            saved = restore(manager, 0, state)
        np.testing.assert_array_equal(saved["w"], np.arange(2.0**22))


if __name__ == "__main__":
    program(*sys.argv[1:])
