"""Deviation factors of DeepInspect: how far below the median a class's perturbation lies.

As all outlier statistics over the classes of one model they are no p-values, see `doorward.stats.outliers`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from doorward.stats.outliers import Floats

#: What makes the median absolute deviation of normal numbers their standard deviation.
NORMAL = 1.4826
#: The factor above which the authors call a class infected, at a significance level of .05.
PUBLISHED_CUTOFF = 2.0


def left_deviation_factors(values: npt.ArrayLike) -> Floats:
    """Return how far each value (k,) lies below the median, in units of 1.4826 MAD of the left half.

    The double MAD: absolute deviations from the median are taken of values up to the median alone, since the
    distribution may be skewed. A MAD of 0 gives 0 at the median and infinity below it.

    >>> left_deviation_factors([1.0, 8.0, 9.0, 10.0, 30.0]).round(2).tolist()
    [5.4, 0.67, 0.0, -0.67, -14.16]

    Source: H. Chen et al., DeepInspect, IJCAI 2019.
    """
    v = np.asarray(values, dtype=np.float64)
    middle = float(np.median(v))
    left = middle - v[v <= middle]
    return _factors(v, middle, NORMAL * float(np.median(left)))


def mean_deviation_factors(values: npt.ArrayLike) -> Floats:
    """Return how far each value (k,) lies below the mean, in units of the mean absolute deviation.

    A slide deck on the method gives this form.

    >>> mean_deviation_factors([1.0, 2.0, 3.0]).round(2).tolist()
    [1.5, 0.0, -1.5]
    """
    v = np.asarray(values, dtype=np.float64)
    return _factors(v, float(v.mean()), float(np.abs(v - v.mean()).mean()))


def _factors(values: Floats, middle: float, spread: float) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Floats = np.where(values == middle, 0.0, (middle - values) / spread)
    return found
