"""What detectors of poison found in one training set, next to the truth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from pydantic import Field

from doorward.core.records import Measurement, Rate, Record
from doorward.data import Samples
from doorward.stats import metrics
from doorward.stats.clustering import split_groups
from doorward.stats.metrics import Ranking, ranking

Mask = npt.NDArray[np.bool_]
#: Raw inputs are clustered in so many dimensions, and in no class with fewer samples.
DIMENSIONS, FEWEST = 10, 11


class ClassCounts(Record):
    """One class, by the labels given: how many samples are poisoned, and what would be flagged.

    Attributes:
        poisoned: of its samples.
        hit, wrong: poisoned and clean ones among those that a detector would flag in this class.
    """

    samples: int
    poisoned: int
    hit: int
    wrong: int

    @property
    def f1(self) -> float | None:
        """Return the harmonic mean of precision and TPR; None where nothing is poisoned."""
        if not self.poisoned:
            return None
        return 2 * self.hit / (self.hit + self.wrong + self.poisoned)

    @property
    def accuracy(self) -> float:
        """Return the share of samples that are rightly flagged or not."""
        return 1 - (self.wrong + self.poisoned - self.hit) / self.samples


class Scored(Record):
    """One detector: how its scores rank the samples, and what it would flag in each class."""

    ranking: Ranking
    classes: dict[int, ClassCounts]
    score: float | None = None
    reason: str | None = None


class Inspection(Record):
    """A training set whose poison is known, as detectors see it.

    Attributes:
        samples, poisoned: how many there are.
        detectors: by name.
        raw: the smaller cluster of each class's inputs themselves, which is the paper's baseline; of images.
    """

    samples: int
    poisoned: int
    detectors: dict[str, Scored]
    raw: dict[int, ClassCounts] = Field(default_factory=dict)


class FlaggedCounts(Record):
    """What is flagged in several training sets, over all their samples.

    Attributes:
        tpr, fpr: of samples.
        f1: over the classes with poison, the least and the mean.
    """

    tpr: Rate
    fpr: Rate
    f1_least: float | None
    f1_mean: float | None
    accuracy_least: float | None


def compared(seen: Measurement, samples: Samples, poisoned: Mask) -> Scored:
    """Return how a detector's scores and suspects fit the truth (n,)."""
    ids = samples.ids
    assert samples.labels is not None
    if not isinstance(seen.scores, dict):
        return Scored(ranking=ranking([], []), classes={}, reason=seen.reason)
    scores = [seen.scores[one] for one in ids]
    row = {one: i for i, one in enumerate(ids)}
    inside = {c: np.array([row[one] for one in own], dtype=np.int64) for c, own in seen.suspects.items()}
    return Scored(
        ranking=ranking(scores, poisoned.tolist()),
        classes=counted(samples.labels, poisoned, inside),
        score=seen.score,
        reason=seen.reason,
    )


def counted(
    labels: npt.NDArray[np.int64], poisoned: Mask, inside: Mapping[int, npt.NDArray[np.int64]]
) -> dict[int, ClassCounts]:
    """Count, for each class, the samples and those of them that would be flagged.

    Args:
        inside: rows that would be flagged, by class.
    """
    found = {}
    for c in np.unique(labels).tolist():
        rows = inside.get(c, np.empty(0, dtype=np.int64))
        own = labels == c
        found[c] = ClassCounts(
            samples=int(own.sum()),
            poisoned=int((own & poisoned).sum()),
            hit=int(poisoned[rows].sum()),
            wrong=int((~poisoned[rows]).sum()),
        )
    return found


def raw_baseline(samples: Samples, poisoned: Mask, seed: int) -> dict[int, ClassCounts]:
    """Return what the smaller cluster of each class's own pixels would flag; nothing where sizes differ.

    Source: B. Chen et al., SafeAI at AAAI 2019, arXiv 1811.03728 (the paper's baseline).
    """
    import torch

    from doorward.core.seeds import make_generator

    assert samples.labels is not None
    images = samples.raw(np.arange(len(samples)))
    if len({image.shape for image in images}) > 1:
        return {}
    x = torch.from_numpy(np.stack(images).reshape(len(images), -1))
    groups = {c: np.flatnonzero(samples.labels == c) for c in np.unique(samples.labels).tolist()}
    groups = {c: rows for c, rows in groups.items() if len(rows) >= FEWEST}
    splits = split_groups(
        x.half() / 255, list(groups.values()), dimensions=DIMENSIONS, generator=make_generator(seed, "raw")
    )
    inside = {c: rows[one.minor] for (c, rows), one in zip(groups.items(), splits, strict=True)}
    return counted(samples.labels, poisoned, inside)


def flagged_counts(found: Iterable[tuple[Mapping[int, ClassCounts], Sequence[int] | None]]) -> FlaggedCounts:
    """Pool what is flagged in several sets.

    Args:
        found: the classes of each set, and which of them are flagged; all if None.
    """
    hit = wrong = poisoned = clean = 0
    each = []
    for classes, flagged in found:
        for c, one in classes.items():
            if flagged is not None and c not in flagged:
                one = one.model_copy(update={"hit": 0, "wrong": 0})
            hit, wrong = hit + one.hit, wrong + one.wrong
            poisoned, clean = poisoned + one.poisoned, clean + one.samples - one.poisoned
            if one.poisoned:
                each.append(one)
    f1 = [one.f1 or 0.0 for one in each]
    return FlaggedCounts(
        tpr=metrics.rate(hit, poisoned),
        fpr=metrics.rate(wrong, clean),
        f1_least=min(f1, default=None),
        f1_mean=float(np.mean(f1)) if f1 else None,
        accuracy_least=min((one.accuracy for one in each), default=None),
    )
