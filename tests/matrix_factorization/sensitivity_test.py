from __future__ import annotations

import jax
import numpy as np
import pytest

from jax_privacy_kernels.matrix_factorization import sensitivity


def longest_pattern(n, min_sep, limit):
    """Picks rounds greedily, which no other pattern beats."""
    rounds = range(0, n, min_sep)
    return len(rounds) if limit is None else min(len(rounds), limit)


@pytest.mark.parametrize("limit", [None, 0, 1, 2, 5, 100])
def test_max_participations_counts_the_longest_pattern(limit):
    for n in range(1, 12):
        for min_sep in range(1, 15):
            actual = sensitivity.minsep_true_max_participations(n, min_sep, limit)
            assert actual == longest_pattern(n, min_sep, limit)
            assert type(actual) is int


def test_max_participations_agrees_with_reference():
    reference = pytest.importorskip("jax_privacy.matrix_factorization.sensitivity")
    for arguments in [(10, 3), (10, 3, 2), (10, 20), (1, 1, 1), (9, 3, 7), (9, 3, 0)]:
        expected = reference.minsep_true_max_participations(*arguments)
        assert sensitivity.minsep_true_max_participations(*arguments) == expected


def test_max_participations_takes_numpy_integers():
    assert sensitivity.minsep_true_max_participations(np.int64(10), np.int32(3), np.int8(2)) == 2


def test_max_participations_of_traced_integers():
    count = sensitivity.minsep_true_max_participations
    assert jax.jit(count)(10, 3) == 4
    assert jax.jit(count)(10, 3, 2) == 2
    assert jax.jit(lambda n: count(n, 3, 2))(10) == 2
    assert jax.jit(lambda n: count(n, 3, 20))(10) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1), "n >= 1, found n=0"),
        ((5, 0), "min_sep >= 1, found min_sep=0"),
        ((5, -2), "min_sep >= 1, found min_sep=-2"),
        ((5, 1, -1), "max_participations >= 0, found max_participations=-1"),
    ],
)
def test_max_participations_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        sensitivity.minsep_true_max_participations(*arguments)


@pytest.mark.parametrize("arguments", [(5.0, 1), (5, 1.5), (5, 1, 2.0), ("5", 1)])
def test_max_participations_of_non_integers(arguments):
    with pytest.raises(TypeError, match="to be an integer"):
        sensitivity.minsep_true_max_participations(*arguments)
