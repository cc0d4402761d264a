"""Measures: pure functions from counts and arrays to numbers that carry their uncertainty."""

from __future__ import annotations

import numpy.typing as npt

from doorward.records import Rate


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


def accuracy(predicted: npt.ArrayLike, labels: npt.ArrayLike) -> Rate:
    """Return how many predictions (n,) equal their labels (n,).

    Raises:
        ValueError: if the shapes differ.
    """
    import numpy as np

    a, b = np.asarray(predicted), np.asarray(labels)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"predictions and labels must be two arrays (n,), got {a.shape} and {b.shape}")
    return rate(int((a == b).sum()), len(a))
