"""Measures against published tables, scikit-learn, SciPy and counts by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics

from doorward.stats.metrics import (
    accuracy,
    attack_success,
    confusion,
    confusion_of_ids,
    defense_effectiveness,
    ranking,
    rate,
    targeted_robust_accuracy,
    time_ratio,
    tpr_at_fpr,
    upper_bound,
)


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


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (0, 59), (5, 120), (6, 120), (40, 40), (39, 40)])
def test_a_one_sided_bound_is_where_the_binomial_test_begins_to_reject(successes: int, n: int) -> None:
    bound = upper_bound(successes, n)
    if successes == n:
        assert bound == 1
        return
    assert stats.binom.cdf(successes, n, bound) == pytest.approx(0.05)
    assert successes / n < bound < rate(successes, n).high


def test_a_bound_of_nothing_says_nothing() -> None:
    """None of 59 is the textbook's smallest sample that rules out one in twenty."""
    assert upper_bound(0, 0) == 1
    assert upper_bound(0, 59) < 0.05 < upper_bound(0, 58)
    with pytest.raises(ValueError, match="bound"):
        upper_bound(3, 2)


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


# --- what a method said against the truth

Cells = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40)


@given(Cells)
def test_confusion_agrees_with_scikit_learn(cells: list[tuple[bool, bool]]) -> None:
    flagged, positive = np.array(cells).T
    found = confusion(flagged, positive)
    (tn, fp), (fn, tp) = metrics.confusion_matrix(positive, flagged, labels=[False, True])
    assert found.true_positives == tp
    assert found.false_positives == fp
    assert found.false_negatives == fn
    assert found.true_negatives == tn
    assert (found.tpr, found.fpr, found.precision) == (
        rate(tp, tp + fn),
        rate(fp, fp + tn),
        rate(tp, tp + fp),
    )
    if positive.any() or flagged.any():
        assert found.f1 == pytest.approx(metrics.f1_score(positive, flagged, zero_division=0))
    else:
        assert found.f1 is None


def test_nothing_flagged_misses_every_poison_and_accuses_nobody() -> None:
    # A peer's tool records the reverse: as many false positives as there are poisons, and no misses.
    found = confusion(np.zeros(10, bool), np.arange(10) < 3)
    assert (found.true_positives, found.false_positives) == (0, 0)
    assert (found.false_negatives, found.true_negatives) == (3, 7)
    assert (found.tpr.value, found.fpr.value, found.f1) == (0, 0, 0)
    assert (found.precision.n, found.precision.low, found.precision.high) == (0, 0, 1)


def test_everything_flagged_catches_all_and_accuses_all() -> None:
    found = confusion(np.ones(10, bool), np.arange(10) < 3)
    assert (found.tpr.value, found.fpr.value) == (1, 1)
    assert found.precision == rate(3, 10)
    assert found.f1 == pytest.approx(6 / 13)


def test_without_positives_the_tpr_is_unknown() -> None:
    found = confusion(np.array([True, False]), np.array([False, False]))
    assert (found.tpr.n, found.tpr.low, found.tpr.high) == (0, 0, 1)
    assert (found.fpr, found.f1) == (rate(1, 2), 0)
    nothing = confusion([], [])
    assert (nothing.tpr.n, nothing.fpr.n, nothing.f1) == (0, 0, None)


def test_confusion_refuses_what_is_no_verdict() -> None:
    with pytest.raises(ValueError, match="of bool"):
        confusion([1, 0], [True, False])
    with pytest.raises(ValueError, match="of bool"):
        confusion([True], [True, False])


def test_ids_are_compared_by_name_and_not_by_position() -> None:
    # A peer's tool compares positions within a class with numbers within the data set.
    ids = ["d", "c", "b", "a"]
    found = confusion_of_ids({"b"}, ["c", "b"], ids)
    assert (found.true_positives, found.false_positives, found.false_negatives, found.true_negatives) == (
        1,
        0,
        1,
        2,
    )
    assert confusion_of_ids((), {"a"}, ids).tpr == rate(0, 1)
    for flagged, positive, examined, why in [
        (["0"], ["a"], ids, "1 ids are flagged and were never examined, such as '0'"),
        (["a"], ["0", "1"], ids, "2 ids are positive"),
        (["a", "a"], [], ids, "flagged twice"),
        ([], [], ["a", "a"], "examined twice"),
    ]:
        with pytest.raises(ValueError, match=why):
            confusion_of_ids(flagged, positive, examined)


# scores with many ties
Scored = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=60)


@given(Scored)
def test_ranking_agrees_with_scikit_learn(cells: list[tuple[int, bool]]) -> None:
    scores, positive = np.array([s for s, _ in cells], float), np.array([p for _, p in cells])
    found = ranking(scores, positive)
    m, n = int(positive.sum()), int((~positive).sum())
    assert (found.positives, found.negatives) == (m, n)
    if not m or not n:
        assert (found.auroc, found.low, found.high) == (None, None, None)
    else:
        area = metrics.roc_auc_score(positive, scores)
        assert found.auroc == pytest.approx(area)
        assert found.low - 1e-9 <= area <= found.high + 1e-9
    if not n:
        assert (found.tpr_at_1, found.tpr_at_5) == (None, None)
    elif not m:
        assert (found.tpr_at_1, found.tpr_at_5) == (rate(0, 0), rate(0, 0))
    else:
        fpr, tpr, _ = metrics.roc_curve(positive, scores, drop_intermediate=False)
        for level, got in ((0.01, found.tpr_at_1), (0.05, found.tpr_at_5)):
            assert got.value == pytest.approx(tpr[fpr <= level + 1e-12].max())
            assert got.n == m


def test_all_scores_equal_tell_nothing() -> None:
    found = ranking([0.5] * 8, [True] * 4 + [False] * 4)
    assert found.auroc == 0.5
    assert (found.tpr_at_1, found.tpr_at_5) == (rate(0, 4), rate(0, 4))


def test_tpr_at_fpr_by_hand() -> None:
    scores = np.r_[np.arange(20), 18.5, 19.0, 19.5, 3.0]  # twenty negatives, then four positives
    positive = np.r_[np.zeros(20, bool), np.ones(4, bool)]
    assert tpr_at_fpr(scores, positive, 0.01) == rate(1, 4), (
        "a positive that ties with the top negative is out"
    )
    assert tpr_at_fpr(scores, positive, 0.05) == rate(3, 4), "one of twenty is 5 %"
    assert tpr_at_fpr(scores, positive, 1.0) == rate(4, 4)
    with pytest.raises(ValueError, match="negatives; there are 0"):
        tpr_at_fpr([1.0], [True], 0.01)
    with pytest.raises(ValueError, match="in \\[0, 1\\]"):
        tpr_at_fpr(scores, positive, 5)


def test_infinite_scores_rank_and_nan_is_refused() -> None:
    found = ranking([math.inf, 1.0, -math.inf, 0.0], [True, True, False, False])
    assert (found.auroc, found.tpr_at_1) == (1, rate(2, 2))
    with pytest.raises(ValueError, match="1 of 2 scores are NaN"):
        ranking([math.nan, 1.0], [True, False])
    with pytest.raises(ValueError, match="NaN"):
        tpr_at_fpr([math.nan, 1.0], [True, False], 0.05)
    with pytest.raises(ValueError, match=r"\(n,\) bool"):
        ranking([0.0, 1.0], [0, 1])


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.5])
def test_the_auroc_interval_covers_the_truth(shift: float) -> None:
    truth = stats.norm.cdf(shift / math.sqrt(2))  # of two normal distributions a shift apart
    rng = np.random.default_rng(1)
    positive = np.r_[np.ones(20, bool), np.zeros(20, bool)]
    runs = [ranking(rng.normal(size=40) + shift * positive, positive) for _ in range(300)]
    covered = sum(run.low <= truth <= run.high for run in runs)
    # three standard deviations of the binomial count about 95 %; more than that would be a wide interval
    assert 273 <= covered <= 297


def test_the_auroc_interval_of_a_perfect_ranking_has_a_width() -> None:
    found = ranking([1.0] * 10 + [0.0] * 10, [True] * 10 + [False] * 10)
    assert found.high == 1
    # (1 - theta) m n = z^2 theta (1 + 9 (1 - theta) / (2 - theta) + 9 theta / (1 + theta)), by hand at .791
    theta = found.low
    side = 1.959964**2 * theta * (1 + 9 * (1 - theta) / (2 - theta) + 9 * theta / (1 + theta))
    assert (1 - theta) * 100 == pytest.approx(side, rel=1e-5)
    assert 0.7 < theta < 0.9
    mirrored = ranking([0.0] * 10 + [1.0] * 10, [True] * 10 + [False] * 10)
    assert (mirrored.low, mirrored.high) == (0, pytest.approx(1 - theta))


# --- attacks and repairs


def test_attack_success_leaves_the_target_class_out() -> None:
    labels, predicted = [0, 0, 1, 2, 2], [0, 0, 0, 0, 2]
    # every input of class 0 "goes" to 0 without any attack
    assert attack_success(predicted, labels, 0) == rate(2, 3)
    assert attack_success(predicted, labels, [1, 2, 0, 0, 2]) == rate(2, 4), "each input with its own target"
    assert attack_success([0, 0], [0, 0], 0) == rate(0, 0)
    with pytest.raises(ValueError, match="one class or"):
        attack_success(predicted, labels, [0, 0])
    with pytest.raises(ValueError, match="two arrays"):
        attack_success([0], [0, 1], 0)


def test_robust_accuracy_is_not_what_attack_success_leaves_over() -> None:
    labels, predicted = [0, 1, 1, 1, 2], [0, 0, 1, 1, 1]
    assert attack_success(predicted, labels, 0) == rate(1, 4)
    assert targeted_robust_accuracy(predicted, labels, 0) == rate(2, 4), "one of four goes to a third class"


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((0.9, 1.0), (0.9, 0.0), 1.0),  # (accuracy, ASR): a perfect repair
        ((0.9, 1.0), (0.9, 1.0), 0.5),  # nothing happens
        ((0.9, 0.9), (0.95, 0.95), 0.5),  # gains count for nothing, and neither does a worse ASR
        ((1.0, 0.0), (0.0, 0.0), 0.0),
        ((0.92, 0.98), (0.89, 0.03), 0.96),  # (.95 - .03 + 1) / 2
    ],
)
def test_defense_effectiveness_by_hand(
    before: tuple[float, float], after: tuple[float, float], expected: float
) -> None:
    found = defense_effectiveness(
        accuracy_before=before[0], success_before=before[1], accuracy_after=after[0], success_after=after[1]
    )
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("value", [92.0, -0.1, math.nan])
def test_defense_effectiveness_refuses_percentages(value: float) -> None:
    with pytest.raises(ValueError, match="shares in"):
        defense_effectiveness(accuracy_before=value, accuracy_after=0, success_before=1, success_after=0)


# --- times


def test_time_ratio_agrees_with_scipy() -> None:
    rng = np.random.default_rng(0)
    ours = rng.uniform(1, 3, 12)
    theirs = ours * 8 * np.exp(rng.normal(0, 0.3, 12))
    found = time_ratio(theirs, ours)
    assert found.ratio == pytest.approx(stats.gmean(theirs / ours))
    interval = stats.ttest_1samp(np.log(theirs / ours), 0).confidence_interval(0.95)
    assert (found.low, found.high) == (
        pytest.approx(math.exp(interval.low)),
        pytest.approx(math.exp(interval.high)),
    )
    back = time_ratio(ours, theirs)
    assert back.ratio == pytest.approx(1 / found.ratio)
    assert back.low == pytest.approx(1 / found.high)


def test_time_ratio_by_hand() -> None:
    assert time_ratio([2.0, 8.0], [1.0, 1.0]).ratio == pytest.approx(4), "not the mean of ratios, which is 5"
    one = time_ratio([6.0], [2.0])
    assert (one.pairs, one.ratio, one.low, one.high) == (1, pytest.approx(3), None, None)
    same = time_ratio([3.0, 6.0], [1.0, 2.0])
    assert (same.low, same.high) == (pytest.approx(3), pytest.approx(3))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ([], []),
        ([1.0], [1.0, 2.0]),
        ([1.0], [0.0]),
        ([math.nan], [1.0]),
        ([math.inf], [1.0]),
        ([-1.0], [-1.0]),
    ],
)
def test_time_ratio_refuses_what_is_no_pair_of_times(theirs: list[float], ours: list[float]) -> None:
    with pytest.raises(ValueError, match="paired times"):
        time_ratio(theirs, ours)
