"""What holds for all tests: devices, profiles, what quick runs take, and memory given back."""

from __future__ import annotations

import collections
import ctypes
import gc
import pathlib
import resource
import sys

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


# -- Quick runs -------------------------------------------------------------------------------

QUICK = 2  # cases of a test


@pytest.hookimpl(tryfirst=True)  # before pytest looks at markers
def pytest_collection_modifyitems(items):
    """Quick runs take no whole program, and of every test a few cases from all over its list."""
    cases = collections.defaultdict(list)
    for item in items:
        if "run" in getattr(item, "fixturenames", ()):  # of tests of benchmarks and of examples
            item.add_marker(pytest.mark.slow)
        elif not any(item.get_closest_marker(name) for name in ("gpu", "interpreted", "slow")):
            cases[item.nodeid.partition("[")[0]].append(item)
    for of_test in cases.values():
        quick = {len(of_test) * i // QUICK for i in range(QUICK)}
        for i, item in enumerate(of_test):
            if i not in quick:
                item.add_marker(pytest.mark.slow)


# -- Memory -----------------------------------------------------------------------------------

GROWTH = 2**30  # bytes

_left = pytest.StashKey[int]()  # what is in use when all that can be given back has been


def in_use():
    """Bytes of memory that this process has."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """JAX keeps every program that it has compiled: gigabytes, over all files.

    glibc keeps what JAX then frees, in an arena for every thread that compiled, until it is told.
    """
    result = yield
    left = item.session.stash.setdefault(_left, in_use())
    next_file = nextitem is None or nextitem.path != item.path
    if sys.platform == "linux" and (next_file or in_use() > left + GROWTH):
        jax.clear_caches()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        item.session.stash[_left] = in_use()
    return result
