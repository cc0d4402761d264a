from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from doorward.errors import CouldNotTell
from doorward.outliers import Spread, deleted_residuals, gamma_order_p, mad_index

VALUES = np.array([1.0, 1.2, 0.9, 1.1, 1.05, 3.0, 0.95])


def test_index_is_the_prediction_t_of_each_class_against_the_others() -> None:
    test = deleted_residuals(VALUES)
    for i, value in enumerate(VALUES):
        others = np.delete(VALUES, i)
        by_hand = (value - others.mean()) / (others.std(ddof=1) * np.sqrt(1 + 1 / len(others)))
        assert test.index[i] == pytest.approx(by_hand)


def test_critical_value_is_that_of_grubbs_table() -> None:
    # Grubbs' one-sided table, level .05: G = 2.176 for n = 10, 1.822 for n = 6
    for n, tabled in ((10, 2.176), (6, 1.822)):
        t = deleted_residuals(np.arange(n, dtype=float)).critical
        g = (n - 1) / np.sqrt(n) * np.sqrt(t**2 / (n - 2 + t**2))
        assert g == pytest.approx(tabled, abs=2e-3)


def test_one_alarm_in_twenty_under_equal_normal_classes() -> None:
    rng = np.random.default_rng(0)
    p = np.array([deleted_residuals(rng.normal(size=10)).p_value for _ in range(2000)])
    low, high = stats.binom.interval(0.999, 2000, 0.05)
    assert low <= (p <= 0.05).sum() <= high
    # the published rule raises several times as many, which is why it decides nothing here
    raised = sum(np.max(mad_index(rng.normal(size=10))) > 2 for _ in range(500))
    assert raised > 0.1 * 500


def test_p_value_and_critical_agree() -> None:
    test = deleted_residuals(VALUES)
    assert (test.p_value <= 0.05) == (np.nanmax(test.index) >= test.critical)
    assert int(np.argmax(test.index)) == 5


def test_missing_values_stay_missing() -> None:
    with_hole = np.append(VALUES, np.nan)
    test = deleted_residuals(with_hole)
    assert np.isnan(test.index[-1])
    assert test.p_value == deleted_residuals(VALUES).p_value


def test_equal_values_raise_no_alarm() -> None:
    test = deleted_residuals(np.ones(10))
    assert test.p_value == 1.0
    assert (test.index == 0).all()


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 2.0, 9.0], [1.0, 2.0, np.nan, 9.0]])
def test_few_classes_mean_nothing(values: list[float]) -> None:
    with pytest.raises(CouldNotTell, match="at least 4 classes"):
        deleted_residuals(values)


def test_mad_index_by_hand() -> None:
    assert mad_index([1.0, 2.0, 3.0, 4.0, 10.0]) == pytest.approx(np.array([-2, -1, 0, 1, 7]) / 1.4826)
    assert mad_index([1.0, 1.0, 1.0, 5.0]).tolist() == [0, 0, 0, np.inf]


def test_gamma_order_p_by_hand() -> None:
    values = np.array([5.0, 6.0, 7.0, 5.5, 6.5, 12.0])
    shape, _, scale = stats.gamma.fit(values[:-1], floc=0)
    assert gamma_order_p(values) == pytest.approx(1 - stats.gamma(shape, scale=scale).cdf(12.0) ** 6)


def test_gamma_order_p_of_degenerate_values() -> None:
    assert gamma_order_p([2.0, 2.0, 2.0, 2.0]) == 1.0
    assert gamma_order_p([2.0, 2.0, 2.0, 2.5]) == 0.0
    with pytest.raises(CouldNotTell):
        gamma_order_p([1.0, 2.0, -1.0, 3.0])


def test_a_prior_is_averaged_with_the_variance_by_degrees_of_freedom() -> None:
    test = deleted_residuals(VALUES, level=0.05, prior=Spread(0.4, 5))
    others = np.delete(VALUES, 5)
    sd = np.sqrt((5 * others.var(ddof=1) + 5 * 0.4**2) / 10)
    by_hand = (VALUES[5] - others.mean()) / (sd * np.sqrt(1 + 1 / 6))
    assert test.index[5] == pytest.approx(by_hand)
    assert test.p_value == pytest.approx(7 * stats.t.sf(by_hand, 10))
    assert test.critical == pytest.approx(stats.t.isf(0.05 / 7, 10))


def test_a_heavy_prior_is_a_normal_test_with_a_known_deviation() -> None:
    test = deleted_residuals(VALUES, prior=Spread(0.5, 1e9))
    others = np.delete(VALUES, 5)
    z = (VALUES[5] - others.mean()) / (0.5 * np.sqrt(1 + 1 / 6))
    assert test.p_value == pytest.approx(7 * stats.norm.sf(z), rel=1e-3)


def test_a_right_prior_finds_more_and_raises_no_more_false_alarms() -> None:
    rng = np.random.default_rng(1)
    clean = rng.normal(size=(2000, 10)) * 0.3
    planted = clean.copy()
    planted[:, 0] += 1.2
    prior = Spread(0.3, 5)
    alarms = np.mean([deleted_residuals(v, prior=prior).p_value <= 0.05 for v in clean])
    found = np.mean([deleted_residuals(v, prior=prior).p_value <= 0.05 for v in planted])
    found_without = np.mean([deleted_residuals(v).p_value <= 0.05 for v in planted])
    assert alarms < 0.065
    assert found > found_without + 0.05
