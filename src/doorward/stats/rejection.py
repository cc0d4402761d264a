"""Thresholds that reject a preset share of clean inputs. Pure functions; a higher score is more suspicious.

An input is rejected if its score is at or above the threshold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

from doorward.core.errors import CouldNotTell
from doorward.core.formatting import percent

Floats = npt.NDArray[np.float64]
#: How a threshold follows from clean scores: with a guarantee for any distribution, from a Normal
#: distribution fitted to them, or as their plain quantile.
Rule = Literal["conformal", "normal", "quantile"]
#: Keeps `0.07 * 100` from counting as less than 7.
_ROUNDING = 1e-9


def rejection_thresholds(
    clean: Floats, rate: float, *, rule: Rule = "conformal", highest: Sequence[float] | None = None
) -> Floats:
    """Return a threshold for each filter, so that all together reject about `rate` of clean inputs.

    Args:
        clean: scores (f, n) that f filters give to the same n clean inputs.
        rate: of the clean inputs that may be rejected, in (0, 1).
        highest: the largest score that each filter can give, (f,); what lies above it rejects nothing.

    Raises:
        CouldNotTell: if the clean inputs are too few, or a threshold would reject nothing at all.
    """
    scores = np.atleast_2d(np.asarray(clean, dtype=np.float64))
    if not np.isfinite(scores).all():
        raise CouldNotTell("the scores of clean inputs are not finite")
    if rule == "conformal":
        found = joint_conformal(scores, rate)
    else:
        one = normal_threshold if rule == "normal" else quantile_threshold
        found = np.array([one(row, rate / len(scores)) for row in scores])
    for threshold, most in zip(found, highest if highest is not None else (), strict=False):
        if threshold > most:
            raise CouldNotTell(
                f"no threshold rejects {percent(rate)} of clean inputs: their scores reach the highest one "
                "that there is; allow a higher rate of false rejections"
            )
    return found


def joint_conformal(clean: Floats, rate: float) -> Floats:
    """Return thresholds (f,) such that a further clean input passes all filters with probability 1 - rate.

    That holds for any distribution, if the further input is exchangeable with the n clean ones of (f, n).
    A filter gives an input the rank of its score among the clean ones, and the lowest rank over the filters
    counts. The thresholds are at the highest rank that few enough clean inputs reach.

    Raises:
        CouldNotTell: if the clean inputs are too few for that rate.
    """
    filters, n = clean.shape
    allowed = math.floor(rate * (n + 1) + _ROUNDING)
    rising = np.sort(clean, axis=1)  # (f, n)
    if filters == 1:
        rank = min(allowed, n)
    else:
        # how many clean scores are at or above each one
        ranks = [n - np.searchsorted(row, own) for row, own in zip(rising, clean, strict=True)]
        lowest = np.sort(np.min(ranks, axis=0))  # (n,)
        # the further input lowers no rank of the others, and takes one place itself
        rank = int(lowest[min(allowed, n) - 1] - 1) if allowed else 0
    if rank < 1:
        enough = math.ceil(((filters + 1 if filters > 1 else 1) / rate) - 1 - _ROUNDING)
        raise CouldNotTell(
            f"{n} clean inputs are too few to reject only {percent(rate)} of them; give {enough} more than a "
            "filter keeps for itself, or allow a higher rate of false rejections"
        )
    found: Floats = np.nextafter(rising[:, n - rank], np.inf)
    return found


def normal_threshold(clean: Floats, rate: float) -> float:
    """Return the score that a Normal distribution fitted to clean scores (n,) exceeds at a rate."""
    if len(clean) < 2:
        raise CouldNotTell("a Normal distribution needs the scores of two clean inputs or more")
    return float(stats.norm.isf(rate, loc=clean.mean(), scale=clean.std(ddof=0)))


def quantile_threshold(clean: Floats, rate: float) -> float:
    """Return the least score above the clean score (n,) at place ceil(n (1 - rate)) in rising order."""
    if not len(clean):
        raise CouldNotTell("a quantile needs the score of a clean input")
    place = max(1, math.ceil(len(clean) * (1 - rate) - _ROUNDING))
    return float(np.nextafter(np.sort(clean)[place - 1], np.inf))
