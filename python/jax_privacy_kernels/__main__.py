"""``python -m jax_privacy_kernels``: the capability report, or a program under the swap."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence

from jax_privacy_kernels._report import report
from jax_privacy_kernels._swap import install


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m jax_privacy_kernels",
        description="Runs a program that uses jax_privacy on this library, as `python program.py "
        "...` would run it. Without a program: reports what runs on this machine, and what is "
        "swapped.",
    )
    parser.add_argument("--force", action="store_true", help="whatever jax-privacy's version is")
    parser.add_argument("-m", action="store_true", dest="module", help="program is a module's name")
    parser.add_argument("program", nargs="?", help="a Python file, or a folder or zip of them")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="the program's own arguments")
    options = parser.parse_args(argv)
    if options.program is None:
        if options.module:
            parser.error("-m: expected the name of a module")
        print(report())
        return
    if not options.module and not os.path.exists(options.program):
        parser.error(f"expected a program, found no file {options.program!r}")
    install(force=options.force)
    sys.argv = [options.program, *options.args]
    if options.module:
        runpy.run_module(options.program, run_name="__main__", alter_sys=True)
        return
    if os.path.isfile(options.program) and not sys.flags.safe_path:
        # In place of the current directory, for which `python -m` is the reason.
        sys.path[0] = os.path.dirname(os.path.realpath(options.program))
    runpy.run_path(options.program, run_name="__main__")


if __name__ == "__main__":
    main()
