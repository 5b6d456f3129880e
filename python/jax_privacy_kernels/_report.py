"""Reports what would run on this machine, and why not something else."""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import textwrap
from importlib import metadata

import jax

from jax_privacy_kernels import _swap
from jax_privacy_kernels.ops import _dispatch, _ffi, _registry

__all__ = ["EXAMPLES", "add_arguments", "main", "report"]

EXAMPLES = """
  report
"""

_PACKAGES = (
    "jax-privacy-kernels",
    "jax",
    "jaxlib",
    "optax",
    "numpy",
    "dp-accounting",
    "jax-privacy",
    "triton",
    "jax-triton",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It takes none."""


def main(options: argparse.Namespace) -> None:
    del options
    print(report())


def report() -> str:
    """Versions, devices, the implementation of every op on each platform, and what is swapped."""
    lines = ["versions"]
    lines += [f"  {'python':<20} {platform.python_version()}"]
    lines += [f"  {name:<20} {_version(name)}" for name in _PACKAGES]
    lines += ["devices"]
    lines += _device_lines()
    missing = _ffi.unavailable()
    lines += ["compiled kernels", *_wrapped(missing or f"SIMD target: {_ffi.simd_target()}", 2)]
    asked = os.environ.get(_dispatch.ENVIRONMENT)
    lines += ["asked for", f"  {_dispatch.ENVIRONMENT}={asked}" if asked else "  nothing"]
    lines += ["noise streams of privatizers"]
    lines += [f"  {'without a key':<20} chacha20, from the operating system's entropy"]
    lines += [f"  {'of a seed':<20} {getattr(jax.config, 'jax_default_prng_impl', '')}"]
    lines += [f"  {'of a key':<20} that of its type"]
    for op in _registry.OPS:
        table = _registry.table(op)
        lines += [f"{op} takes"]
        try:
            name = _dispatch.requested(op, table, None)
        except ValueError as error:
            lines += _wrapped(f"nothing: {error}", 2)
            continue
        usable = [n for n in table if name in (None, n) and not table[n].unavailable()]
        for on in _dispatch.PLATFORMS:
            taken = next((n for n in usable if on in table[n].platforms), "nothing")
            lines += [f"  {f'on {on}':<20} {taken}"]
        for name, entry in table.items():
            reason = entry.unavailable()
            if reason:
                lines += _wrapped(f"{f'not {name}:':<20} {reason}", 2, 23)
            elif entry.limits:
                lines += _wrapped(f"{f'{name} leaves':<20} {entry.limits}", 2, 23)
    return "\n".join([*lines, *_swap_lines()])


def _wrapped(text: str, indent: int, next_indent: int | None = None) -> list[str]:
    """Lines of at most 80 columns, as long as words are not longer."""
    indents = " " * indent, " " * (indent if next_indent is None else next_indent)
    return textwrap.wrap(
        text,
        80,
        initial_indent=indents[0],
        subsequent_indent=indents[1],
        break_long_words=False,
        break_on_hyphens=False,
    )


def _device_lines() -> list[str]:
    """The devices, or why there are none."""
    try:
        return [f"  {device.platform:<20} {device.device_kind}" for device in jax.devices()]
    # A platform that JAX_PLATFORMS names is not there, on which JAX may fail without a word.
    except (RuntimeError, AssertionError) as error:
        asked = getattr(jax.config, "jax_platforms", None)
        why = str(error) or f"JAX finds no platform of {asked!r}"
        return _wrapped(f"none: {why}", 2)


def _swap_lines() -> list[str]:
    """Whether jax_privacy runs on this library, and the names that do or would."""
    try:
        table = _swap.replacements()
    except ModuleNotFoundError as error:
        return ["swap", f"  {error}"]
    except Exception as error:  # a jax-privacy that cannot be imported, say
        return ["swap", f"  jax_privacy cannot be looked at: {error!r}"]
    state = "installed, replaces" if _swap.is_installed() else "not installed, would replace"
    lines = [f"swap {state}, of jax-privacy {_swap.version()}"]
    for module, entries in itertools.groupby(table, lambda entry: entry.module):
        lines += [f"  jax_privacy.{module}"]
        by_note: dict[str, list[str]] = {}
        for entry in entries:
            by_note.setdefault(entry.note, []).append(entry.name)
        for note, names in by_note.items():
            text = ", ".join(names) + (f" ({note})" if note else "")
            lines += _wrapped(text, 4)
    return lines


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
