"""The command line: ``python -m jax_privacy_kernels``, or ``jax-privacy-kernels``."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from jax_privacy_kernels._version import __version__

__all__ = ["main"]

PROGRAM = "python -m jax_privacy_kernels"
WIDTH = 79
# Modules with EXAMPLES, add_arguments(parser) and main(options); the first line of their text is
# their help.
COMMANDS = {
    "report": "_report",
    "bench": "_bench_command",
    "plan": "_plan_command",
    "run": "_run_command",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command; without any it reports, and what is no command is a program to run."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] in (["-h"], ["--help"]):
        return _print(_help())
    if argv[:1] == ["--version"]:
        return _print(f"jax-privacy-kernels {__version__}")
    name, arguments = (argv[0], argv[1:]) if argv else ("report", [])
    if name not in COMMANDS:
        name, arguments = "run", argv
    module = _module(name)
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} {name}",
        description="\n\n".join(textwrap.fill(x, WIDTH) for x in str(module.__doc__).split("\n\n")),
        epilog="examples:\n" + _examples(module),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    if name == "run":
        # What follows the program is not parsed: argparse would drop a "--".
        own = next((i + 1 for i, x in enumerate(arguments) if not x.startswith("-")), None)
        options = parser.parse_args(arguments[:own])
        options.args = [] if own is None else arguments[own:]
        module.main(options)
    else:
        _piped(module.main, parser.parse_args(arguments))


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"jax_privacy_kernels.{COMMANDS[name]}")


def _help() -> str:
    modules = {name: _module(name) for name in COMMANDS}
    lines = {name: str(module.__doc__).splitlines()[0] for name, module in modules.items()}
    return "\n".join(
        [
            f"usage: {PROGRAM} [COMMAND] [arguments]",
            "",
            "Correlated noise for differentially private training in JAX, compiled.",
            "",
            "commands (without one: report):",
            *(f"  {name:<8}{line}" for name, line in lines.items()),
            "",
            "options:",
            "  -h, --help   this text, or that of a command: COMMAND --help",
            "  --version    the version",
            "",
            "examples:",
            *(_examples(module) for module in modules.values()),
        ]
    ).rstrip()


def _examples(module: ModuleType) -> str:
    """The examples of a command, as one types them; options alone continue the line before."""
    lines = [line.strip() for line in module.EXAMPLES.strip("\n").splitlines()]
    return "\n".join(f"  {'  ' if x.startswith('--') else PROGRAM} {x}" for x in lines)


def _print(text: str) -> None:
    _piped(print, text)


def _piped(call: Callable[..., None], *arguments: Any) -> None:
    """Calls, and ends without a word at Ctrl-C, or where nobody reads what is printed any more."""
    try:
        call(*arguments)
        sys.stdout.flush()
        return
    except KeyboardInterrupt:
        pass  # so that the frames of the call go, with their progress bars
    except BrokenPipeError:
        # Python flushes once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    # At once: what JAX still computes would find an interpreter that is half gone, and crash.
    os._exit(130)  # as shells count it: 128 + SIGINT


if __name__ == "__main__":
    main()
