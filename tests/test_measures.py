"""Rates against published tables and the definition of their interval."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doorward.measures import accuracy, rate


# Clopper and Pearson, 95 %, four places, as tables of exact binomial intervals print them
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.3085),
        (10, 10, 0.6915, 1.0),
        (5, 10, 0.1871, 0.8129),
        (8, 10, 0.4439, 0.9748),
        (1, 20, 0.0013, 0.2487),
        (0, 1, 0.0, 0.975),
        (1, 1, 0.025, 1.0),
    ],
)
def test_intervals_are_those_of_tables(successes: int, n: int, low: float, high: float) -> None:
    found = rate(successes, n)
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    assert found.value == successes / n


def tail(successes: int, n: int, p: float) -> float:
    """Return the probability of at least so many successes."""
    return math.fsum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(successes, n + 1))


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_each_bound_leaves_a_fortieth_outside(pair: tuple[int, int]) -> None:
    successes, n = pair
    found = rate(successes, n)
    assert 0 <= found.low <= found.value <= found.high <= 1
    if successes:
        assert tail(successes, n, found.low) == pytest.approx(0.025, abs=1e-9)
    if successes < n:
        assert 1 - tail(successes + 1, n, found.high) == pytest.approx(0.025, abs=1e-9)


def test_of_no_trials_nothing_is_known() -> None:
    assert rate(0, 0).model_dump() == {"successes": 0, "n": 0, "value": 0.0, "low": 0.0, "high": 1.0}


@pytest.mark.parametrize(("successes", "n"), [(-1, 3), (4, 3), (0, -1)])
def test_impossible_counts_are_refused(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="0 <= successes <= n"):
        rate(successes, n)


def test_accuracy_counts_what_is_equal() -> None:
    assert accuracy([1, 2, 3, 3], [1, 0, 3, 3]) == rate(3, 4)
    assert accuracy([], []) == rate(0, 0)
    with pytest.raises(ValueError, match="two arrays"):
        accuracy([1], [1, 2])
    with pytest.raises(ValueError, match="two arrays"):
        accuracy([[1]], [[1]])
