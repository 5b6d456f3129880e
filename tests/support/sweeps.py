"""How many examples hypothesis makes: the profiles `dev`, `ci` and `nightly`.

The profile `dev` makes a fifth of the examples that a test asks for, `ci` half of them, `nightly`
ten times as many and others every time. The option `--hypothesis-profile` chooses one, or the
environment variable HYPOTHESIS_PROFILE; else it is `dev`.
"""

from __future__ import annotations

import os

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
