"""What the tests of the benchmarks share."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from jax_privacy_kernels.ops import _ffi


def fixture(name: str) -> Callable[[], ModuleType]:
    """A fixture: the script of that name."""

    @pytest.fixture(scope="module")
    def bench() -> ModuleType:
        for module in ("matplotlib", "jax_privacy"):
            pytest.importorskip(module, reason=f"{module} is missing; install the bench extra")
        if reason := _ffi.unavailable():
            pytest.skip(reason)
        return importlib.import_module(name)

    return bench


def numbers(tree: Any) -> list[float]:
    """All numbers in a report, or in a part of one."""
    if isinstance(tree, dict | list):
        return [n for v in (tree.values() if isinstance(tree, dict) else tree) for n in numbers(v)]
    return [tree] if isinstance(tree, int | float) else []


def check_report(report: dict[str, Any]) -> None:
    """All is there and finite, and quantiles are in order."""
    assert all(map(math.isfinite, numbers(report)))
    assert all(report["environment"].values())
    for row in report["rows"]:
        for times in row["implementations"].values():
            assert 0 < times["min_s"] <= times["median_s"] <= times["p90_s"] <= times["max_s"]
            assert times["first_call_s"] > 0
            assert times["rounds"] > 0
