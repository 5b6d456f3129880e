"""Which cases run by default, and how many examples hypothesis makes.

Of the profiles `dev`, `ci` and `nightly`, `dev` makes a fifth of the examples that a test asks
for, `ci` half of them, `nightly` ten times as many and others every time. The option
`--hypothesis-profile` chooses one, or the environment variable HYPOTHESIS_PROFILE. The default is
`dev`.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

# In per cent of what tests ask for.
for _name, _percent, _same in (("dev", 20, True), ("ci", 50, True), ("nightly", 1000, False)):
    settings.register_profile(
        _name,
        max_examples=_percent,
        derandomize=_same,
        print_blob=not _same,
        deadline=None,  # many examples compile
    )
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def examples(count: int) -> int:
    """So many, or what the profile makes of them."""
    return max(1, count * settings().max_examples // 100)


def compiling(count: int) -> settings:
    """Of tests in which every example compiles, so that shrinking one takes minutes."""
    return settings(
        max_examples=examples(count),
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def cases(values: Mapping[str, Any] | Iterable[Any], by_default: Iterable[Any]) -> list[Any]:
    """Parameters, of which those that are not in ``by_default`` are nightly.

    Of a mapping, ``by_default`` are keys, which are the names of the cases as well.
    """
    named = values if isinstance(values, Mapping) else {value: value for value in values}
    default = set(by_default)
    if unknown := default - set(named):
        raise ValueError(f"expected some of {list(named)}, found {unknown}")
    ids = {name: str(name) if isinstance(values, Mapping) else None for name in named}
    return [
        pytest.param(value, id=ids[name], marks=() if name in default else pytest.mark.nightly)
        for name, value in named.items()
    ]


def covering(cases: Mapping[str, Sequence[str]]) -> set[str]:
    """Some of the cases, in which every value of every parameter occurs.

    Args:
      cases: from names to the values of the parameters, one each.
    """
    left = {name: set(enumerate(values)) for name, values in cases.items()}
    missing = set().union(*left.values())
    kept = set()
    while missing:
        # Where several cases would do, another test takes another.
        best = max(left, key=lambda name: (len(missing & left[name]), zlib.crc32(name.encode())))
        missing -= left.pop(best)
        kept.add(best)
    return kept
