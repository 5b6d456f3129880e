"""How many examples hypothesis makes: the profiles `dev`, `ci` and `nightly`.

A test says how many the profile `ci` makes of it. The option `--hypothesis-profile` chooses
another, or the environment variable HYPOTHESIS_PROFILE.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

# In per cent of what tests ask for. Only nightly runs differ from each other.
for _name, _percent, _same in (("dev", 50, True), ("ci", 100, True), ("nightly", 2000, False)):
    settings.register_profile(
        _name,
        max_examples=_percent,
        derandomize=_same,
        print_blob=not _same,
        deadline=None,  # many examples compile
    )
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def examples(count: int) -> int:
    """So many in the profile `ci`, and in others in proportion."""
    return max(1, count * settings().max_examples // 100)


def compiling(count: int) -> settings:
    """Of tests in which every example compiles, so that shrinking one takes minutes."""
    return settings(
        max_examples=examples(count),
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
