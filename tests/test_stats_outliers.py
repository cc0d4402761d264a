from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from doorward.core.errors import CouldNotTell
from doorward.stats.outliers import gamma_order_p, gap_to_others, mad_index


def test_a_gap_is_measured_from_the_median_of_the_others() -> None:
    values = np.array([1.0, 1.2, 0.9, 1.1, 1.05, 3.0, 0.95])
    for i, gap in enumerate(gap_to_others(values)):
        assert gap == pytest.approx(values[i] - np.median(np.delete(values, i)))


def test_two_classes_are_compared_with_each_other() -> None:
    assert gap_to_others([2.0, 0.5]).tolist() == [1.5, -1.5]


def test_what_is_missing_stays_missing_and_counts_for_nothing() -> None:
    assert gap_to_others([1.0, np.nan, 4.0, 2.0]) == pytest.approx([-2.0, np.nan, 2.5, -0.5], nan_ok=True)
    assert np.isnan(gap_to_others([np.nan, 1.0])).all()
    assert np.isnan(gap_to_others([1.0])).all()
    assert gap_to_others([]).shape == (0,)


def test_equal_values_have_no_gap() -> None:
    assert gap_to_others(np.ones(10)).tolist() == [0.0] * 10


def test_mad_index_by_hand() -> None:
    assert mad_index([1.0, 2.0, 3.0, 4.0, 10.0]) == pytest.approx(np.array([-2, -1, 0, 1, 7]) / 1.4826)
    assert mad_index([1.0, 1.0, 1.0, 5.0]).tolist() == [0, 0, 0, np.inf]


def test_the_published_index_raises_too_many_alarms_to_decide_anything() -> None:
    rng = np.random.default_rng(0)
    assert sum(np.max(mad_index(rng.normal(size=10))) > 2 for _ in range(500)) > 0.1 * 500


def test_gamma_order_p_by_hand() -> None:
    values = np.array([5.0, 6.0, 7.0, 5.5, 6.5, 12.0])
    shape, _, scale = stats.gamma.fit(values[:-1], floc=0)
    assert gamma_order_p(values) == pytest.approx(1 - stats.gamma(shape, scale=scale).cdf(12.0) ** 6)


def test_gamma_order_p_of_degenerate_values() -> None:
    assert gamma_order_p([2.0, 2.0, 2.0, 2.0]) == 1.0
    assert gamma_order_p([2.0, 2.0, 2.0, 2.5]) == 0.0
    with pytest.raises(CouldNotTell):
        gamma_order_p([1.0, 2.0, -1.0, 3.0])
