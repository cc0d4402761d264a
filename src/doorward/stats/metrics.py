"""Measures: pure functions from counts and arrays to numbers that carry their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Literal

import numpy as np
import numpy.typing as npt

from doorward.core.records import Rate, Record

#: Two-sided 95 % quantile of the standard normal distribution.
_Z = 1.959963984540054


class Confusion(Record):
    """What was flagged against what should have been; positive means infected, poisoned or triggered.

    A rate of which there were no trials has n = 0 and the interval [0, 1].

    Attributes:
        tpr, fpr: share of the positives, and of the negatives, that were flagged.
        precision: share of the flagged that are positive.
        f1: harmonic mean of precision and TPR; None when nothing was flagged and nothing was positive.
    """

    true_positives: int
    false_positives: int
    false_negatives: int
    true_negatives: int
    tpr: Rate
    fpr: Rate
    precision: Rate
    f1: float | None


class Ranking(Record):
    """How well scores tell positives from negatives, whatever the threshold.

    Attributes:
        auroc: the chance that a positive scores above a negative, ties counting half; None without either.
        low, high: its 95 % interval; None where there is no AUROC.
        tpr_at_1, tpr_at_5: the greatest TPR at an FPR of at most 1 % and 5 %; None without negatives. The
            threshold is the best one for these very negatives: with fewer than 100 of them, 1 % is none.
    """

    positives: int
    negatives: int
    auroc: float | None
    low: float | None
    high: float | None
    tpr_at_1: Rate | None
    tpr_at_5: Rate | None


class TimeRatio(Record):
    """How many times as long one thing takes as another, measured in pairs.

    Attributes:
        ratio: geometric mean of the pairs' ratios.
        low, high: its 95 % interval by Student's t on the logarithms; None with a single pair.
    """

    pairs: int
    ratio: float
    low: float | None
    high: float | None


def rate(successes: int, n: int) -> Rate:
    """Return a proportion with its 95 % interval after Clopper and Pearson (doi:10.1093/biomet/26.4.404).

    The interval is exact: it covers the true proportion in at least 95 of 100 experiments. Of no trials
    nothing is known: the value is undefined, and given as 0 with the interval [0, 1].

    Raises:
        ValueError: unless 0 <= successes <= n.
    """
    from scipy.stats import beta

    successes, n = int(successes), int(n)
    if not 0 <= successes <= n:
        raise ValueError(f"a rate needs 0 <= successes <= n, got {successes} of {n}")
    low = float(beta.ppf(0.025, successes, n - successes + 1)) if successes else 0.0
    high = float(beta.ppf(0.975, successes + 1, n - successes)) if successes < n else 1.0
    return Rate(successes=successes, n=n, value=successes / n if n else 0.0, low=low, high=high)


def upper_bound(successes: int, n: int) -> float:
    """Return what a proportion is at most, with 95 % confidence: one-sided, after Clopper and Pearson.

    It is where a test of "at least so much" begins to reject; the upper end of `rate` is one of 97.5 %, since
    two ends share the error there. Of no trials it is 1.

    Raises:
        ValueError: unless 0 <= successes <= n.
    """
    from scipy.stats import beta

    if not 0 <= successes <= n:
        raise ValueError(f"a bound needs 0 <= successes <= n, got {successes} of {n}")
    return float(beta.ppf(0.95, successes + 1, n - successes)) if successes < n else 1.0


def accuracy(predicted: npt.ArrayLike, labels: npt.ArrayLike) -> Rate:
    """Return how many predictions (n,) equal their labels (n,).

    Raises:
        ValueError: if the shapes differ.
    """
    a, b = np.asarray(predicted), np.asarray(labels)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"predictions and labels must be two arrays (n,), got {a.shape} and {b.shape}")
    return rate(int((a == b).sum()), len(a))


def attack_success(predicted: npt.ArrayLike, labels: npt.ArrayLike, wanted: npt.ArrayLike) -> Rate:
    """Return how often triggered inputs are predicted as what the attack wants (ASR).

    Inputs that belong there anyway are left out: they would count for an attack that does nothing.

    Args:
        predicted: (n,) predictions on inputs with the trigger.
        labels: (n,) their true classes.
        wanted: the target class, or (n,) one for each input.

    Raises:
        ValueError: if the shapes differ.
    """
    return _on_other_classes(predicted, labels, wanted, wanted)


def targeted_robust_accuracy(predicted: npt.ArrayLike, labels: npt.ArrayLike, wanted: npt.ArrayLike) -> Rate:
    """Return how often triggered inputs are predicted as their true class all the same (RA of BackdoorBench).

    It is counted on the inputs that `attack_success` counts, and differs from 1 - ASR by those that go to a
    third class. Accuracy under adversarial noise, which goes by the same name, is plain `accuracy`.

    Raises:
        ValueError: if the shapes differ.
    """
    return _on_other_classes(predicted, labels, wanted, labels)


def _on_other_classes(
    predicted: npt.ArrayLike, labels: npt.ArrayLike, wanted: npt.ArrayLike, hit: npt.ArrayLike
) -> Rate:
    p, y, w, h = np.asarray(predicted), np.asarray(labels), np.asarray(wanted), np.asarray(hit)
    if p.shape != y.shape or p.ndim != 1 or w.shape not in ((), p.shape):
        raise ValueError(
            f"predictions and labels must be two arrays (n,), wanted one class or (n,); "
            f"got {p.shape}, {y.shape} and {w.shape}"
        )
    other = y != w
    return rate(int(((p == h) & other).sum()), int(other.sum()))


def defense_effectiveness(
    *, accuracy_before: float, accuracy_after: float, success_before: float, success_after: float
) -> float:
    """Return the defense effectiveness rating (DER): 1 at best, 0.5 for doing nothing, 0 at worst.

    `(max(0, fall of ASR) - max(0, fall of clean accuracy) + 1) / 2`, all in [0, 1].

    Raises:
        ValueError: if a value is outside [0, 1]; percentages are.

    Source: M. Zhu et al., Enhancing Fine-Tuning Based Backdoor Defense, ICCV 2023, arXiv 2304.11823.
    """
    values = (accuracy_before, accuracy_after, success_before, success_after)
    if not all(0 <= value <= 1 for value in values):
        raise ValueError(f"accuracy and attack success are shares in [0, 1], got {values}")
    return (max(0.0, success_before - success_after) - max(0.0, accuracy_before - accuracy_after) + 1) / 2


def confusion(flagged: npt.ArrayLike, positive: npt.ArrayLike) -> Confusion:
    """Count flagged (n,) bool against positive (n,) bool.

    Raises:
        ValueError: if the arrays differ in shape or are no booleans.
    """
    f, p = np.asarray(flagged), np.asarray(positive)
    if f.shape != p.shape or f.ndim != 1 or not _are_bool(f, p):
        raise ValueError(
            f"flagged and positive must be two arrays (n,) of bool, "
            f"got {f.dtype} {f.shape} and {p.dtype} {p.shape}"
        )
    f, p = f.astype(np.bool_), p.astype(np.bool_)
    tp, fp = int((f & p).sum()), int((f & ~p).sum())
    fn, tn = int((~f & p).sum()), int((~f & ~p).sum())
    return Confusion(
        true_positives=tp,
        false_positives=fp,
        false_negatives=fn,
        true_negatives=tn,
        tpr=rate(tp, tp + fn),
        fpr=rate(fp, fp + tn),
        precision=rate(tp, tp + fp),
        f1=2 * tp / (2 * tp + fp + fn) if tp + fp + fn else None,
    )


def confusion_of_ids(flagged: Collection[str], positive: Collection[str], ids: Collection[str]) -> Confusion:
    """Count flagged ids against positive ids, both among all the ids that were examined.

    Raises:
        ValueError: if an id occurs twice, or is flagged or positive and not among those examined.
    """
    known = set(ids)
    for name, some in (("examined", ids), ("flagged", flagged), ("positive", positive)):
        if len(set(some)) != len(some):
            raise ValueError(f"some ids are {name} twice")
        if strange := set(some) - known:
            raise ValueError(
                f"{len(strange)} ids are {name} and were never examined, such as {min(strange)!r}"
            )
    order = sorted(known)
    f, p = set(flagged), set(positive)
    return confusion(
        np.array([i in f for i in order], dtype=np.bool_), np.array([i in p for i in order], dtype=np.bool_)
    )


def ranking(scores: npt.ArrayLike, positive: npt.ArrayLike) -> Ranking:
    """Return how well scores (n,), higher for more suspicious, find positives (n,) bool.

    The interval of the AUROC is Newcombe's method 5 (doi:10.1002/sim.2324), which holds for small samples
    and for an AUROC of 1.

    Raises:
        ValueError: if the shapes differ, or a score is NaN.
    """
    s, p = _scores(scores, positive)
    m, n = int(p.sum()), int((~p).sum())
    area = low = high = None
    if m and n:
        negatives = np.sort(s[~p])
        below = np.searchsorted(negatives, s[p], "left")
        not_above = np.searchsorted(negatives, s[p], "right")
        area = float((below + not_above).sum()) / (2 * m * n)
        low, high = _auroc_bound(area, m, n, 0), _auroc_bound(area, m, n, 1)
    return Ranking(
        positives=m,
        negatives=n,
        auroc=area,
        low=low,
        high=high,
        tpr_at_1=tpr_at_fpr(s, p, 0.01) if n else None,
        tpr_at_5=tpr_at_fpr(s, p, 0.05) if n else None,
    )


def tpr_at_fpr(scores: npt.ArrayLike, positive: npt.ArrayLike, fpr: float) -> Rate:
    """Return the greatest TPR that a threshold gives at an FPR of at most `fpr`, without interpolation.

    Equal scores are flagged together or not at all.

    Raises:
        ValueError: if the shapes differ, a score is NaN, `fpr` is outside [0, 1] or there are no negatives.
    """
    s, p = _scores(scores, positive)
    negatives = np.sort(s[~p])[::-1]
    if not len(negatives) or not 0 <= fpr <= 1:
        raise ValueError(
            f"TPR at an FPR of {fpr} needs it in [0, 1] and negatives; there are {len(negatives)}"
        )
    # a hair more, since .05 * 20 may come out below 1
    allowed = math.floor(fpr * len(negatives) + 1e-9)
    caught = int(p.sum()) if allowed == len(negatives) else int((s[p] > negatives[allowed]).sum())
    return rate(caught, int(p.sum()))


def time_ratio(theirs: npt.ArrayLike, ours: npt.ArrayLike) -> TimeRatio:
    """Return how many times as long theirs (n,) takes as ours (n,), pair by pair in positive seconds.

    Raises:
        ValueError: if the shapes differ, there are no pairs, or a time is not positive and finite.
    """
    from scipy.stats import t

    a, b = np.asarray(theirs, dtype=np.float64), np.asarray(ours, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"paired times are two arrays (n,) with n > 0, got {a.shape} and {b.shape}")
    if not (np.isfinite([a, b]).all() and (a > 0).all() and (b > 0).all()):
        raise ValueError("paired times are positive and finite seconds")
    logs = np.log(a / b)
    n, mean = len(logs), float(logs.mean())
    if n == 1:
        return TimeRatio(pairs=1, ratio=math.exp(mean), low=None, high=None)
    half = float(t.isf(0.025, n - 1) * logs.std(ddof=1)) / math.sqrt(n)
    return TimeRatio(pairs=n, ratio=math.exp(mean), low=math.exp(mean - half), high=math.exp(mean + half))


def _are_bool(*arrays: npt.NDArray[np.generic]) -> bool:
    """Return whether all arrays hold booleans; of an empty list numpy makes an array of floats."""
    return all(a.dtype == np.bool_ or not a.size for a in arrays)


def _scores(
    scores: npt.ArrayLike, positive: npt.ArrayLike
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    s, p = np.asarray(scores, dtype=np.float64), np.asarray(positive)
    if s.shape != p.shape or s.ndim != 1 or not _are_bool(p):
        raise ValueError(
            f"scores must be (n,) numbers and positive (n,) bool, got {s.shape} and {p.dtype} {p.shape}"
        )
    if np.isnan(s).any():
        raise ValueError(
            f"{int(np.isnan(s).sum())} of {len(s)} scores are NaN: what could not be told is no score"
        )
    return s, p.astype(np.bool_)


def _auroc_bound(area: float, positives: int, negatives: int, end: Literal[0, 1]) -> float:
    """Return the area, towards one end, that lies 1.96 of its own standard errors away from the one found."""
    from scipy.optimize import brentq

    if area == end:
        return float(end)
    extra = (positives + negatives) / 2 - 1

    def excess(theta: float) -> float:
        spread = 1 + extra * (1 - theta) / (2 - theta) + extra * theta / (1 + theta)
        variance = theta * (1 - theta) * spread / (positives * negatives)
        return (area - theta) ** 2 - _Z**2 * variance

    # an area of 0 or 1 has no error of its own, and is a root that is not meant
    return float(brentq(excess, min(max(area, 1e-12), 1 - 1e-12), end))
