"""Which cases run by default."""

from __future__ import annotations

import itertools

import pytest
from support import sweeps


@pytest.mark.parametrize("sizes", [(1,), (5,), (3, 4), (2, 6, 3), (4, 4, 4, 4)])
def test_every_value_of_every_parameter_is_kept(sizes):
    values = [[f"{i}{j}" for j in range(size)] for i, size in enumerate(sizes)]
    cases = {"-".join(case): case for case in itertools.product(*values)}
    kept = sweeps.covering(cases)
    assert kept <= set(cases)
    for i, of_parameter in enumerate(values):
        assert {cases[name][i] for name in kept} == set(of_parameter)
    if len(sizes) < 3:
        assert len(kept) == max(sizes)
    assert sweeps.covering(cases) == kept


def test_nothing_is_kept_of_nothing():
    assert sweeps.covering({}) == set()


def test_two_tests_combine_values_in_different_ways():
    cases = list(itertools.product("abcdef", "uvwxyz"))
    one, two = (
        {name[-2:] for name in sweeps.covering({f"{test}-{a}{b}": (a, b) for a, b in cases})}
        for test in ("test_one", "test_two")
    )
    assert len(one) == len(two) == 6
    assert one != two


def test_cases_that_are_not_named_are_nightly():
    params = sweeps.cases({"a": 1, "b": 2, "c": 3}, ["b"])
    assert [param.values for param in params] == [(1,), (2,), (3,)]
    assert [param.id for param in params] == ["a", "b", "c"]
    assert [[mark.name for mark in param.marks] for param in params] == [
        ["nightly"],
        [],
        ["nightly"],
    ]
    with pytest.raises(ValueError, match=r"found \{'d'\}"):
        sweeps.cases(["a", "b"], ["d"])
