"""Where jax_privacy is imported from, for the scripts beside this file."""

from __future__ import annotations

import os
import pathlib

import chex
import optax

__all__ = ["environment", "prepare"]

HERE = pathlib.Path(__file__).resolve().parent


def prepare() -> None:
    """To be called before jax_privacy is imported: its main branch needs that of optax."""
    if not hasattr(optax, "ArrayTree"):
        optax.ArrayTree = chex.ArrayTree


def environment(checkout: pathlib.Path, **variables: str) -> dict[str, str]:
    """The variables of a process that imports jax_privacy from a checkout."""
    paths = [str(checkout.resolve()), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    defaults = {"KERAS_BACKEND": "jax"}
    return {**defaults, **os.environ, "PYTHONPATH": os.pathsep.join(paths), **variables}
