"""Deviation factors: the published rule, worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from doorward.stats.deviation import left_deviation_factors, mean_deviation_factors


def test_the_left_half_alone_is_the_measure() -> None:
    # median 10, deviations of the left half 0, 1, 2, 9: their median is 1.5
    factors = left_deviation_factors([1.0, 8.0, 9.0, 10.0, 11.0, 50.0, 90.0])
    assert factors[0] == pytest.approx(9 / (1.4826 * 1.5))
    assert factors[3] == 0
    assert factors[6] == pytest.approx(-80 / (1.4826 * 1.5))


def test_a_right_tail_changes_nothing() -> None:
    near, far = [1.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0], [1.0, 8.0, 9.0, 10.0, 110.0, 120.0, 130.0]
    assert left_deviation_factors(near)[0] == left_deviation_factors(far)[0]
    assert mean_deviation_factors(near)[0] != mean_deviation_factors(far)[0]


def test_values_that_are_all_alike_are_no_outliers() -> None:
    assert left_deviation_factors([3.0] * 5).tolist() == [0.0] * 5
    assert np.isinf(left_deviation_factors([1.0, 3.0, 3.0, 3.0, 3.0])[0])


def test_the_rule_flags_clean_models_by_chance() -> None:
    rng = np.random.default_rng(0)
    flagged = [left_deviation_factors(rng.lognormal(0, 0.3, 10)).max() > 2 for _ in range(500)]
    assert np.mean(flagged) > 0.15
