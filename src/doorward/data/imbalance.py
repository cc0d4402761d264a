"""Imbalance: make some classes of a set rare, as they are in data that nobody balanced."""

from __future__ import annotations

import numpy as np

from doorward.core.errors import InputError
from doorward.data.samples import Samples


def step_imbalance(
    samples: Samples, minority_share: float, ratio: float, *, rng: np.random.Generator
) -> Samples:
    """Return a view in which some classes, drawn at random, are thinned; no sample is decoded.

    Args:
        minority_share: mu, the share of classes that become rare, in (0, 1); at least one does, and one does
            not.
        ratio: rho, how many samples the largest of the other classes has for each of a rare one, 1 or more.
            A class that has fewer anyway stays as it is.

    Raises:
        InputError: if there are no labels, a single class, or none of a rare class would be left.

    Source: Buda, Maki and Mazurowski, Neural Networks 106, 2018, arXiv:1710.05381 (step imbalance).
    """
    if samples.labels is None:
        raise InputError(f"imbalance needs labels, and {samples.provenance.path} has none")
    present = np.unique(samples.labels)
    if len(present) < 2:
        raise InputError(f"imbalance needs two classes, and {samples.provenance.path} has {len(present)}")
    rare = rng.permutation(present)[: min(max(round(minority_share * len(present)), 1), len(present) - 1)]
    counts = np.bincount(samples.labels)
    kept = round(max(counts[y] for y in present if y not in rare) / ratio)
    if not kept:
        raise InputError(
            f"a ratio of {ratio:g} leaves none of {counts.max():,} samples a class; give a lower one"
        )
    order = rng.permutation(len(samples))
    left = np.ones(len(samples), dtype=np.bool_)
    for y in rare:
        left[order[samples.labels[order] == y][kept:]] = False
    return samples.select(np.flatnonzero(left))
