"""Outlier statistics over the classes of one model. Pure functions on float64 arrays.

These compare the classes of *one* model, which are not exchangeable: their p-values are a first rule,
to be replaced by the comparison *between* models wherever a calibrated bank covers the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from doorward.errors import CouldNotTell

Floats = npt.NDArray[np.float64]
MIN_CLASSES = 4


@dataclass(frozen=True)
class OutlierTest:
    """Hold a test of the most outlying class.

    Attributes:
        index: (k,) how far each class lies outside the others; NaN where a class has no value.
        critical: the index above which the most outlying class is significant at `level`.
        p_value: of the most outlying class, corrected for having looked at all.
    """

    index: Floats
    critical: float
    p_value: float


@dataclass(frozen=True)
class Spread:
    """Hold what is known beforehand of how far the classes of a clean model spread.

    Attributes:
        deviation: typical standard deviation over the classes.
        weight: how many degrees of freedom that knowledge is worth; 0 for none.
    """

    deviation: float
    weight: float


#: Nothing is known beforehand: the plain Grubbs test.
UNKNOWN = Spread(1.0, 0.0)


def deleted_residuals(values: npt.ArrayLike, *, level: float = 0.05, prior: Spread = UNKNOWN) -> OutlierTest:
    """Test whether the largest value is an outlier (one-sided Grubbs test, in its deleted-residual form).

    Each value is compared with mean and standard deviation of all the *others*:
    `t_i = (v_i - mean) / (sd * sqrt(1 + 1 / (k - 1)))`, Student's t with k - 2 degrees of freedom under
    equal normal values; Bonferroni's correction over the k classes. Few classes estimate a deviation badly,
    so their variance is averaged with that of a prior, each weighted by its degrees of freedom (a moderated
    t): it has k - 2 + weight of them.

    Args:
        values: (k,) higher is more suspicious; NaN where there is none.
        level: significance of `critical`.
        prior: how far clean models' values usually spread.

    Raises:
        CouldNotTell: with fewer than 4 values, where an outlier rule means nothing.

    Source: F. E. Grubbs, Annals of Mathematical Statistics 21 (1950), doi 10.1214/aoms/1177729885;
    the moderated t: G. K. Smyth, Stat. Appl. Genet. Mol. Biol. 3 (2004), doi 10.2202/1544-6115.1027.
    """
    v = np.asarray(values, dtype=np.float64)
    known = ~np.isnan(v)
    k = int(known.sum())
    if k < MIN_CLASSES:
        raise CouldNotTell(
            f"the classes are compared with each other, which takes at least {MIN_CLASSES} classes with a "
            f"score; there {'is' if k == 1 else 'are'} {k}"
        )
    x = v[known]
    mean = (x.sum() - x) / (k - 1)
    squares = ((x[None, :] - mean[:, None]) ** 2).sum(axis=1) - (x - mean) ** 2
    freedom = k - 2 + prior.weight
    sd = np.sqrt((np.maximum(squares, 0) + prior.weight * prior.deviation**2) / freedom)
    tiny = np.finfo(np.float64).tiny
    t = (x - mean) / np.maximum(sd * np.sqrt(1 + 1 / (k - 1)), tiny)
    index = np.full(v.shape, np.nan)
    index[known] = t
    p = min(1.0, k * float(stats.t.sf(t.max(), freedom)))
    return OutlierTest(index, float(stats.t.isf(level / k, freedom)), p)


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
