"""What holds for all tests: devices, profiles, which cases run, and memory given back."""

from __future__ import annotations

import collections
import ctypes
import gc
import pathlib
import resource
import sys
import zlib

import jax
import pytest
from support import sweeps  # registers the profiles before pytest chooses one

__all__ = ["sweeps"]

# Of this process alone: programs that tests start have the devices that they ask for.
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def eight_devices():
    """For tests of meshes."""
    if jax.device_count() < 8:
        pytest.skip(f"needs eight devices, found {jax.devices()}: set JAX_PLATFORMS=cpu")


@pytest.fixture(autouse=True)
def _ranks_of_the_reference(request):
    """jax_privacy promotes ranks, and fails where JAX has been told to refuse that."""
    if {"reference", "theirs"}.isdisjoint(request.fixturenames):
        yield
    else:
        with jax.numpy_rank_promotion("allow"):
            yield


# -- Which cases run ---------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)  # before pytest looks at markers
def pytest_collection_modifyitems(items):
    """Marks the cases that are only for the night, and those that quick runs leave out."""
    tests = collections.defaultdict(list)
    for item in items:
        if "run" in getattr(item, "fixturenames", ()):  # of tests of benchmarks and of examples
            item.add_marker(pytest.mark.slow)
        if not item.get_closest_marker("gpu"):  # which costs little, and has no other run
            tests[item.nodeid.partition("[")[0]].append(item)
    for cases in tests.values():
        if has(cases[0], "each_value"):
            # Interpreters skip what takes them too long, and one of them may not be there.
            for kernels in ("triton", "pallas", None):
                leave_to_the_night([case for case in cases if interpreter(case) == kernels])
        if has(cases[0], "interpreted_nightly"):
            for case in filter(interpreter, cases):
                case.add_marker(pytest.mark.nightly)
        leave_out_of_quick_runs(cases)


def has(item, *names):
    return any(item.get_closest_marker(name) for name in names)


def interpreter(case):
    """Of the kernels that it runs, or None."""
    if not has(case, "interpreted"):
        return None
    return "triton" if has(case, "triton") else "pallas"


def leave_to_the_night(cases):
    """All but some in which every value of every parameter occurs."""
    # Values by their names: what callspec.indices has are numbers of cases.
    named = {c: c.callspec._idlist for c in cases if not has(c, "nightly")}
    kept = sweeps.covering({case.nodeid: names for case, names in named.items()})
    for case in named:
        if case.nodeid not in kept:
            case.add_marker(pytest.mark.nightly)


def leave_out_of_quick_runs(cases):
    """All but one of those that run by default; another test has another implementation."""
    left = [case for case in cases if not has(case, "interpreted", "nightly", "slow")]
    name = cases[0].nodeid.partition("[")[0]
    quick = left[zlib.crc32(name.encode()) % len(left)] if left else None
    for case in cases:
        if has(case, "nightly") or (case in left and case is not quick):
            case.add_marker(pytest.mark.slow)


# -- Memory -----------------------------------------------------------------------------------

GROWTH = 2**30  # bytes

_left = pytest.StashKey[int]()  # what is in use when all that can be given back has been


def in_use():
    """Bytes of memory that this process has."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_teardown(item):
    """JAX keeps every program that it has compiled: gigabytes, over all files.

    glibc keeps what JAX then frees, in an arena for every thread that compiled, until it is told.
    """
    result = yield
    left = item.session.stash.setdefault(_left, in_use())
    if sys.platform == "linux" and in_use() > left + GROWTH:
        jax.clear_caches()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        item.session.stash[_left] = in_use()
    return result
