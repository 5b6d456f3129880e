"""Runs a program that was written for jax_privacy on this library.

The program runs as `python program.py ...` would run it, after `jax_privacy_kernels.install()`. JAX
is imported before the program: set JAX_* variables in the shell, not in it.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import io
import os
import pkgutil
import sys
import types
import warnings
from typing import Any

from jax_privacy_kernels._swap import install

__all__ = ["EXAMPLES", "add_arguments", "main"]

EXAMPLES = """
  run train.py --steps 1000
  run -m package.train
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="however old jax-privacy is")
    parser.add_argument("-m", action="store_true", dest="module", help="program is a module's name")
    parser.add_argument("program", nargs="?", help="a Python file, or a folder or zip of them")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="the program's own arguments")
    parser.set_defaults(fail=parser.error)


def main(options: argparse.Namespace) -> None:
    """Runs ``options.program``, with ``options.args``, as ``__main__``."""
    if options.program is None:
        options.fail(f"expected {'the name of a module' if options.module else 'a program'}")
    if not options.module and not os.path.exists(options.program):
        options.fail(f"expected a command or a program, found no file {options.program!r}")
    try:
        install(force=options.force)
    except ModuleNotFoundError as error:
        if error.name is not None:
            raise  # it is jax_privacy that lacks something
        options.fail(f"{error}: pip install jax-privacy")
    except RuntimeError as error:
        options.fail(str(error))
    sys.addaudithook(_warn_of_late_variables)
    program = types.ModuleType("__main__")
    sys.argv = [options.program, *options.args]
    find = _module if options.module else _file
    try:
        code = find(program, options.program)
    except _NotFoundError as error:
        options.fail(str(error))
    # For good: threads, exit handlers and pickles look the program up there.
    sys.modules["__main__"] = program
    exec(code, vars(program))


class _NotFoundError(Exception):
    """There is no such program. What a program lacks itself is told by a traceback."""


def _warn_of_late_variables(event: str, arguments: tuple[Any, ...]) -> None:
    """Says so where a program sets what JAX, already imported, has read and will not read again."""
    if event == "os.putenv":
        name, value = (os.fsdecode(x) for x in arguments)
        if name.startswith("JAX_") and os.environ.get(name) != value:
            warnings.warn(
                f"{name}={value} comes too late: python -m jax_privacy_kernels imports JAX before "
                "the program. Set it in the shell, or use jax.config.update",
                stacklevel=3,
            )


def _module(program: types.ModuleType, name: str) -> types.CodeType:
    """The code of a module, or of a package's ``__main__``, that ``python -m`` would run."""
    if not sys.flags.safe_path:
        # A console script has its own folder there.
        sys.path[0] = os.getcwd()
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # a package around the module lacks it
        spec = None
    if spec is not None and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{name}.__main__")
    if spec is None:
        raise _NotFoundError(f"expected a module to run, found none named {name!r}")
    code = _of_spec(program, spec)
    sys.argv[0] = program.__file__ or name
    return code


def _file(program: types.ModuleType, path: str) -> types.CodeType:
    """The code of a file, or of the ``__main__`` in a folder or zip, that ``python`` would run."""
    if pkgutil.get_importer(path) is not None:
        sys.path[0] = path = os.path.abspath(path)
        spec = importlib.machinery.PathFinder.find_spec("__main__", [path])
        if spec is None:
            raise _NotFoundError(f"expected a program, found no __main__ in {path!r}")
        return _of_spec(program, spec)
    if not sys.flags.safe_path:
        # In place of the current directory, for which `python -m` is the reason.
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    program.__file__ = path = os.path.abspath(path)
    program.__package__ = None
    with io.open_code(path) as file:
        return compile(file.read(), path, "exec", dont_inherit=True)


def _of_spec(program: types.ModuleType, spec: importlib.machinery.ModuleSpec) -> types.CodeType:
    loader: Any = spec.loader
    code = loader.get_code(spec.name)
    if code is None:
        raise ImportError(f"expected Python code in {spec.name!r}, found none")
    program.__spec__, program.__loader__, program.__package__ = spec, loader, spec.parent
    program.__file__ = spec.origin
    return code
