"""Outlier statistics over the classes of one model. Pure functions on float64 arrays.

They compare the classes of *one* model, which are not exchangeable, so none of them is a p-value that can be
trusted: that comes from comparing models, see `doorward.scan.calibration`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import stats

from doorward.core.errors import CouldNotTell

Floats = npt.NDArray[np.float64]
MIN_CLASSES = 4


def gap_to_others(values: npt.ArrayLike) -> Floats:
    """Return how far each value (k,) lies above the median of the *others*; NaN where there is none.

    Leaving the class itself out gives two classes a meaning, and a class of many none more.

    >>> gap_to_others([1.0, 5.0]).tolist(), gap_to_others([0.0, 1.0, 5.0]).tolist()
    ([-4.0, 4.0], [-3.0, -1.5, 4.5])
    """
    v = np.asarray(values, dtype=np.float64)
    gaps = np.full(v.shape, np.nan)
    known = np.flatnonzero(~np.isnan(v))
    if len(known) > 1:
        for i in known:
            gaps[i] = v[i] - np.median(v[known[known != i]])
    return gaps


def gap_to_nearest(values: npt.ArrayLike) -> Floats:
    """Return how far each value (k,) lies above the highest of the *others*; NaN where there is none.

    >>> gap_to_nearest([1.0, 5.0]).tolist(), gap_to_nearest([0.0, 1.0, 5.0]).tolist()
    ([-4.0, 4.0], [-5.0, -4.0, 4.0])
    """
    v = np.asarray(values, dtype=np.float64)
    known = np.flatnonzero(~np.isnan(v))
    gaps = np.full(v.shape, np.nan)
    if len(known) > 1:
        first, second = known[np.argsort(-v[known], kind="stable")[:2]]
        gaps[known] = v[known] - v[first]
        gaps[first] = v[first] - v[second]
    return gaps


def mad_index(values: npt.ArrayLike) -> Floats:
    """Return each value's distance above the median in units of 1.4826 MAD (Neural Cleanse's index, signed).

    Simulated clean models have an index above 2 in 17 to 33 % of cases at ten classes, so it is shown
    for comparison with the literature and decides nothing. NaN stays NaN; a MAD of 0 gives 0 or infinity.

    Source: B. Wang et al., IEEE S&P 2019, doi 10.1109/SP.2019.00031.
    """
    v = np.asarray(values, dtype=np.float64)
    median = np.nanmedian(v)
    mad = 1.4826 * np.nanmedian(np.abs(v - median))
    with np.errstate(divide="ignore", invalid="ignore"):
        index: Floats = np.where(v == median, 0.0, (v - median) / mad)
    return np.where(np.isnan(v), np.nan, index)


def gamma_order_p(values: npt.ArrayLike) -> float:
    """Return MM-BD's p-value of the largest of k positive values: `1 - F(max) ** k`.

    F is a gamma distribution fitted to the others. For fewer than 4 values there is no p-value.

    Raises:
        CouldNotTell: with fewer than 4 positive values.

    Source: H. Wang et al., IEEE S&P 2024, arXiv 2205.06900.
    """
    v = np.asarray(values, dtype=np.float64)
    v = v[~np.isnan(v)]
    if len(v) < MIN_CLASSES or (v <= 0).any():
        raise CouldNotTell(f"a gamma fit needs at least {MIN_CLASSES} positive values")
    others = np.delete(v, v.argmax())
    if np.ptp(others) == 0:
        return 0.0 if v.max() > others[0] else 1.0
    shape, _, scale = stats.gamma.fit(others, floc=0)
    return float(-np.expm1(len(v) * stats.gamma.logcdf(v.max(), shape, scale=scale)))
