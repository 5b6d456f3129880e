"""The transformer example learns, and a run that was killed ends where one that was not does."""

from __future__ import annotations

import importlib
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

for _module in ("matplotlib", "tqdm", "orbax.checkpoint"):
    pytest.importorskip(_module, reason=f"{_module} is missing; install the test extra")

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
SMALL = "--steps=6 --batch-size=8 --micro-batch=4 --bands=3 --save-every=2 --measure-every=3"


@pytest.fixture(scope="module")
def example():
    return importlib.import_module("train_transformer")


def test_clipped_gradients_are_within_the_clip_norm(example):
    windows = jnp.asarray(example.load_text()[0][:4])
    params = example.init_params(jax.random.key(0))
    clipped = jax.jit(jax.vmap(example.clipped_gradient, in_axes=(None, 0)))(params, windows)
    squared = sum(np.asarray(leaf, np.float64).reshape(4, -1) ** 2 @ np.ones(leaf[0].size)
                  for leaf in jax.tree.leaves(clipped))  # fmt: skip
    assert (squared <= example.CLIP_NORM**2).all()
    assert (squared > 0.5).all()  # at initialization they are larger than the norm
    # A gradient that is not finite takes no part, rather than all of it.
    params["bytes"] = params["bytes"].at[0, 0].set(jnp.nan)
    clipped = jax.jit(example.clipped_gradient)(params, windows[0])
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(clipped))


def test_a_run_of_other_settings_is_not_continued(example, tmp_path, capsys):
    where = [f"--checkpoints={tmp_path}", f"--output={tmp_path / 'plot.png'}"]
    example.parse_args([*SMALL.split(), *where])
    with pytest.raises(SystemExit):
        example.parse_args([*SMALL.split(), *where, "--epsilon=1", "--lr=1"])
    assert "holds a run with another epsilon, lr: use another folder" in capsys.readouterr().err


def test_a_run_that_dies_in_its_first_step_repeats_it_with_the_same_noise(
    example, tmp_path, monkeypatch
):
    arguments = [*SMALL.split(), f"--checkpoints={tmp_path}", f"--output={tmp_path / 'plot.png'}"]
    noise = []

    def die(run, batch, **_):
        noise.append(np.asarray(run.noise.clock.keys))
        raise KeyboardInterrupt

    monkeypatch.setattr(example, "train_step", die)
    monkeypatch.setattr(example.dp_accounting, "calibrate_dp_mechanism", lambda *_: 1.0)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            example.train(example.parse_args(arguments))
    np.testing.assert_array_equal(*noise)


@pytest.mark.nightly  # three runs of it, each in a process of its own
@pytest.mark.subprocess
def test_a_run_that_is_killed_goes_on(tmp_path):
    def run(name: str, *more: str) -> subprocess.CompletedProcess:
        arguments = [*SMALL.split(), "--noise-seed=5", f"--checkpoints={name}", *more]
        return subprocess.run(
            [sys.executable, EXAMPLES / "train_transformer.py", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    whole = run("whole", "--output=whole.png")
    assert whole.returncode == 0, whole.stderr
    killed = run("killed", "--die-at=5")
    assert killed.returncode == -signal.SIGKILL
    resumed = run("killed", "--output=resumed.png")
    assert resumed.returncode == 0, resumed.stderr
    assert "Goes on from step 4" in resumed.stdout

    def loss(text: str) -> str:
        return next(line for line in text.splitlines() if line.startswith("Loss on"))

    assert loss(resumed.stdout) == loss(whole.stdout)
    assert "train_transformer" not in resumed.stderr  # progress is for terminals
    for name in ("whole.png", "resumed.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
