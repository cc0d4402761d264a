"""Thresholds for a preset rate of false rejections, against definitions and by exhaustion."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from doorward.core.errors import CouldNotTell
from doorward.stats.rejection import (
    joint_conformal,
    normal_threshold,
    quantile_threshold,
    rejection_thresholds,
)


@settings(max_examples=25)
@given(
    st.integers(1, 3),
    st.integers(20, 40),
    st.sampled_from([0.05, 0.07, 0.1, 0.25]),
    st.sampled_from([3, 50, 10_000]),
    st.integers(0, 10_000),
)
def test_no_more_than_the_preset_share_is_rejected(
    filters: int, n: int, rate: float, levels: int, seed: int
) -> None:
    """Each of n + 1 exchangeable inputs is held against the n others: that is the guarantee itself."""
    scores = np.random.default_rng(seed).integers(0, levels, (filters, n + 1)).astype(float)
    rejected = 0
    for i in range(n + 1):
        try:
            thresholds = joint_conformal(np.delete(scores, i, axis=1), rate)
        except CouldNotTell:
            return
        rejected += bool((scores[:, i] >= thresholds).any())
    assert rejected <= rate * (n + 1) + 1e-9


def test_one_filter_rejects_as_many_as_it_may() -> None:
    clean = np.arange(99.0)[None]
    assert rejection_thresholds(clean, 0.01)[0] == np.nextafter(98.0, np.inf)
    assert rejection_thresholds(clean, 0.05)[0] == np.nextafter(94.0, np.inf)
    assert rejection_thresholds(clean, 0.07)[0] == np.nextafter(92.0, np.inf), "0.07 * 100 is 7"


def test_several_filters_share_one_budget() -> None:
    rng = np.random.default_rng(0)
    one = rng.normal(size=4999)
    alone = joint_conformal(one[None], 0.05)[0]
    same = joint_conformal(np.stack([one, one]), 0.05)
    different = joint_conformal(rng.normal(size=(2, 4999)), 0.05)
    assert (same >= alone).all()
    assert np.sum(one >= same[0]) >= np.sum(one >= alone) - 1, "filters that agree cost nothing"
    assert (different > same).all(), "filters that differ share the budget"
    rejected = (rng.normal(size=(2, 20_000)) >= different[:, None]).any(0).mean()
    assert 0.035 < rejected < 0.065


@pytest.mark.parametrize(("filters", "enough"), [(1, 99), (2, 299), (3, 399)])
def test_too_few_clean_inputs_are_refused(filters: int, enough: int) -> None:
    # the worst case: each filter is highest on another input
    clean = np.stack([np.roll(np.arange(float(enough)), 7 * i) for i in range(filters)])
    assert joint_conformal(clean, 0.01).shape == (filters,)
    with pytest.raises(
        CouldNotTell, match=f"98 clean inputs are too few to reject only 1.0 %.*give {enough}"
    ):
        joint_conformal(clean[:, :98], 0.01)


def test_normal_and_quantile_are_as_published() -> None:
    scores = np.random.default_rng(3).normal(-0.2, 0.07, 500)
    boundary = stats.norm.ppf(0.01, (-scores).mean(), (-scores).std())
    assert normal_threshold(scores, 0.01) == pytest.approx(-boundary)
    fifty = scores[:50]
    published = sorted(fifty)[math.ceil(50 * 0.95) - 1]
    assert ((fifty >= quantile_threshold(fifty, 0.05)) == (fifty > published)).all()
    both = np.stack([scores, scores])
    assert (rejection_thresholds(both, 0.02, rule="normal") == normal_threshold(scores, 0.01)).all()
    assert (rejection_thresholds(both, 0.1, rule="quantile") == quantile_threshold(scores, 0.05)).all()


def test_a_threshold_that_rejects_nothing_is_refused() -> None:
    wide = -np.linspace(0, 1, 200)[None]  # a Normal distribution reaches above 0
    with pytest.raises(CouldNotTell, match=r"no threshold rejects 1.0 % of clean inputs"):
        rejection_thresholds(wide, 0.01, rule="normal", highest=[0.0])
    sure = -np.concatenate([np.zeros(10), np.ones(190)])[None]
    with pytest.raises(CouldNotTell, match="no threshold"):
        rejection_thresholds(sure, 0.01, highest=[0.0])
    with pytest.raises(CouldNotTell, match="not finite"):
        rejection_thresholds(np.array([[0.0, np.nan]]), 0.5)
