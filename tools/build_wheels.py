"""Builds the wheels of a release on any Linux of x86_64, and proves what can be proved there.

    python tools/build_wheels.py --output dist

The compiler is Zig's, from PyPI: clang with its own C++ library, which is linked in, and glibc's
symbols as of 2.28, so that neither the compiler nor the libraries of this machine leave a trace. It
compiles for aarch64 and for macOS as well. Its run-time library does not look at the processor, so
that the slowest clone of a kernel would always run on x86_64: GCC's `cpuinfo.o`, which looks, is
linked in, and a GCC has to be there to take it from. What is checked of every wheel:

* for Linux, auditwheel finds nothing newer than manylinux_2_28 and no other library;
* abi3audit finds nothing outside the stable ABI, where the wheel promises it;
* it is smaller than 2 MB;
* for the machine that this runs on: it installs with `--only-binary :all:`, no compiler in sight,
  and tests/smoke.py passes on the oldest and the newest JAX, with the machine's SIMD target.

That of macOS is compiled and not run. .github/workflows/release.yml builds and tests all wheels on
machines of their kind, and those are what is published.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence

ROOT = pathlib.Path(__file__).parents[1]
GLIBC = "2.28"
MACOS = "11.0"
MACHINES = ("x86_64", "aarch64", "macos")
TOOLS = ("ziglang==0.17.1", "auditwheel==6.8.2", "abi3audit==0.0.26", "wheel>=0.45")
OLDEST_JAX = "0.8.0"
MOST_BYTES = 2 * 10**6
# Zig's linker for macOS reads no list of the names that Python will define, and makes no bundles;
# Python loads libraries as well.
IN_WORDS_OF_ZIG = """\
for word; do
  shift
  case $word in
    -bundle) word=-shared ;;
    -Wl,@*) word=-Wl,-undefined,dynamic_lookup ;;
  esac
  set -- "$@" "$word"
done
"""


def run(*command: str | os.PathLike[str], env: Mapping[str, str] | None = None, cwd=ROOT) -> str:
    """What a command prints; where it fails, all of that, and the end."""
    words = [os.fspath(word) for word in command]
    print("$", shlex.join(words), flush=True)
    done = subprocess.run(
        words, cwd=cwd, env={**os.environ, **(env or {})}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        print(done.stdout)
        sys.exit(f"failed: {shlex.join(words)}")
    return done.stdout


def environment(python: str, folder: pathlib.Path, *packages: str) -> pathlib.Path:
    """The interpreter of a new virtual environment with these packages, none compiled here."""
    run(python, "-m", "venv", folder)
    new = folder / "bin" / "python"
    run(new, "-m", "pip", "install", "--quiet", "--only-binary", ":all:", *packages)
    return new


def compilers(zig: pathlib.Path, machine: str, folder: pathlib.Path) -> dict[str, str]:
    """Variables that make CMake take Zig for a machine: it wants programs, not commands."""
    folder.mkdir(parents=True, exist_ok=True)
    variables = {}
    target = f"-target {machine}-linux-gnu.{GLIBC}"
    if machine == "macos":
        target = f"-target aarch64-macos.{MACOS}"
    for variable, tool, options in (
        ("CC", "cc", target),
        # The headers of nanobind 3.1 use stderr without having asked for it.
        ("CXX", "c++", f"{target} -include cstdio"),
        ("AR", "ar", ""),
        ("RANLIB", "ranlib", ""),
    ):
        script = folder / tool
        script.write_text(
            f"#!/bin/sh\n{IN_WORDS_OF_ZIG if machine == 'macos' else ''}"
            f'exec {shlex.quote(str(zig))} -m ziglang {tool} {options} "$@"\n'
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        variables[variable] = str(script)
    return variables


def cpu_detection(folder: pathlib.Path) -> pathlib.Path:
    """The object of GCC's run-time library by which clones of functions are chosen on x86-64."""
    library = run("gcc", "-print-libgcc-file-name").strip()
    run("ar", "x", library, "cpuinfo.o", cwd=folder)
    return folder / "cpuinfo.o"


def suffix(python: str | os.PathLike[str], machine: str) -> str:
    """How names of modules end that are compiled for an interpreter's version and a machine."""
    own = run(python, "-c", "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))")
    if machine == "macos":
        return own.strip().replace(f"{platform.machine()}-linux-gnu", "darwin")
    return own.strip().replace(platform.machine(), machine)


def builder(python: str, folder: pathlib.Path) -> pathlib.Path:
    """An environment that builds wheels, as pip would make one: it could not for another machine,
    whose packages it would install."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        requires = tomllib.load(file)["build-system"]["requires"]
    return environment(python, folder, "cmake", "ninja", *requires)


def build(
    python: pathlib.Path, machine: str, zig: pathlib.Path, work: pathlib.Path, folder: pathlib.Path
) -> pathlib.Path:
    """The wheel of a builder's Python for a machine, not yet named manylinux, in a new folder."""
    env = compilers(zig, machine, work / f"compilers-{machine}")
    env["PATH"] = f"{python.parent}{os.pathsep}{os.environ['PATH']}"  # cmake, ninja
    env["LDFLAGS"] = "-s"  # no symbols of debuggers: strip may not know the machine
    if machine == "x86_64":
        env["LDFLAGS"] += f" {cpu_detection(work / f'compilers-{machine}')}"
    options = ["-C", "install.strip=false"]
    if machine != platform.machine():
        macos = machine == "macos"
        env["_PYTHON_HOST_PLATFORM"] = f"macosx-{MACOS}-arm64" if macos else f"linux-{machine}"
        env["SETUPTOOLS_EXT_SUFFIX"] = suffix(python, machine)
        system = {
            "CMAKE_SYSTEM_NAME": "Darwin" if macos else "Linux",
            "CMAKE_SYSTEM_PROCESSOR": "arm64" if macos else machine,
        }
        if macos:
            system["CMAKE_INSTALL_NAME_TOOL"] = "true"  # CMake wants one, and does not call it
        for name, value in system.items():
            options += ["-C", f"cmake.define.{name}={value}"]
    pip = [python, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder]
    run(*pip, *options, ".", env=env)
    (wheel,) = folder.glob("*.whl")
    return wheel


def name_manylinux(wheel: pathlib.Path, machine: str, tools: pathlib.Path) -> pathlib.Path:
    """Gives the wheel its manylinux name, or ends."""
    tag = f"manylinux_{GLIBC.replace('.', '_')}_{machine}"
    text = run(tools, "-m", "auditwheel", "show", wheel)
    print(text.strip())
    # With libraries of its own, or newer symbols than any tag allows, it is none of these.
    found = re.search(rf'platform\s+tag:\s+"manylinux_2_(\d+)_{machine}"', text)
    if found is None or int(found[1]) > int(GLIBC.partition(".")[2]):
        sys.exit(f"expected a wheel that is consistent with {tag}")
    # Not by `auditwheel repair`, which knows only tags of the machine that it runs on.
    run(tools, "-m", "wheel", "tags", "--remove", "--platform-tag", tag, wheel)
    (named,) = wheel.parent.glob("*.whl")
    return named


def check(wheel: pathlib.Path, machine: str, tools: pathlib.Path, folder: pathlib.Path) -> str:
    """Puts the wheel into a folder, under its last name, or ends."""
    named = wheel if machine == "macos" else name_manylinux(wheel, machine, tools)
    renamed = pathlib.Path(shutil.move(named, folder / named.name))
    size = renamed.stat().st_size
    if size > MOST_BYTES:
        sys.exit(f"expected at most {MOST_BYTES:,} bytes, found {size:,} in {renamed.name}")
    if "-abi3-" in renamed.name:
        print(run(tools, "-m", "abi3audit", "--strict", "--verbose", renamed).strip())
    print(f"{renamed.name}: {size:,} bytes")
    return str(renamed)


def smoke(python: str, wheel: str, work: pathlib.Path) -> None:
    """The smoke test of a wheel, on the oldest and on the newest JAX, without a compiler."""
    bare = {"PATH": "/nonexistent", "JAX_PLATFORMS": "cpu"}
    for name, pins in (
        ("oldest", [f"jax=={OLDEST_JAX}", f"jaxlib=={OLDEST_JAX}"]),
        ("newest", []),
    ):
        folder = work / f"smoke-{name}-{pathlib.Path(wheel).stem}"
        new = environment(python, folder, wheel, *pins)
        found = run(new, ROOT / "tests" / "smoke.py", env=bare, cwd=work)
        if " avx2 " in pathlib.Path("/proc/cpuinfo").read_text() and "AVX" not in found:
            sys.exit(f"expected a SIMD target of this machine, found:\n{found}")
        print(found.splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "dist", help="(dist)")
    parser.add_argument(
        "--python", nargs="+", default=[sys.executable],
        help="interpreters to build for: 3.11 makes a wheel of its own, as does one without the "
        "GIL, any other later one abi3",
    )  # fmt: skip
    parser.add_argument("--machine", nargs="+", default=MACHINES, choices=MACHINES, help="(all)")
    parser.add_argument("--no-smoke", action="store_true", help="do not install what was built")
    options = parser.parse_args(argv)
    if sys.platform != "linux":
        parser.error(f"expected Linux, found {sys.platform}")
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        tools = environment(sys.executable, work / "tools", *TOOLS)
        for i, python in enumerate(options.python):
            building = builder(python, work / f"builder-{i}")
            for machine in options.machine:
                built = build(building, machine, tools, work, work / f"built-{i}-{machine}")
                wheel = check(built, machine, tools, output)
                if machine == platform.machine() and not options.no_smoke:
                    smoke(python, wheel, work)


if __name__ == "__main__":
    main()
