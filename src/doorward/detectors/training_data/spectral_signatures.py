"""Spectral signatures: poison lies far out along the direction in which a class's features vary most."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from doorward.core.budget import Deadline
from doorward.core.errors import CouldNotTell
from doorward.core.records import Measurement, Table
from doorward.detectors.subject import Subject
from doorward.detectors.training_data._learned import Learned
from doorward.detectors.training_data.base import FEWEST, TrainingDataDetector, rows_by_class
from doorward.methods.registry import register

Floats = npt.NDArray[np.float64]
#: Rows that are held in double precision at a time.
CHUNK = 16_384
#: The share of a class that the paper removes, in units of the share that may be poison.
MARGIN = 1.5


def outlier_scores(features: Tensor, rows: npt.NDArray[np.int64]) -> Floats:
    """Return the squared projection of each row on the first right singular vector of the centred rows: (n,).

    Features (n, d) are centred on the mean of these very rows, those of one label, poison included. Neither
    rows nor columns are scaled.
    """
    parts: tuple[Tensor, ...] = torch.split(torch.from_numpy(rows), CHUNK)
    mean = torch.stack([features[part].double().sum(0) for part in parts]).sum(0) / len(rows)  # (d,)
    scatter = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for part in parts:
        x = features[part].double() - mean
        scatter += x.T @ x
    first = torch.linalg.eigh(scatter).eigenvectors[:, -1]  # (d,)
    return torch.cat([((features[part].double() - mean) @ first).square() for part in parts]).numpy()


@register("detector")
class SpectralSignatures(TrainingDataDetector):
    """Score each sample by how far it lies from its class's mean, along the direction of greatest variance.

    Use it next to activation clustering: it gives an order in which to look at samples, and no verdict.

    The features are centred on the mean of the samples of one label. As published, the highest scores of
    every class are removed, 1.5 times as many as may be poisoned, whether there is poison or not.

    We depart from the paper in what is said of a class: its score is how much of the class's variance the
    first direction holds among the samples that would be removed, next to what a normal distribution
    would have there.
    """

    title = "Spectral signatures"
    source = "B. Tran, J. Li, A. Madry, NeurIPS 2018, arXiv 1811.00636"
    limits = (
        "It ranks samples and cannot tell whether there is poison; it fails where poison is most of a class "
        "or where a class varies more by itself than by the poison."
    )
    order: ClassVar[int] = 61

    poison_share: float = Field(
        0.05, gt=0, lt=0.5, description="Share of a class that may be poisoned (epsilon of the paper)"
    )

    def score_samples(
        self, seen: Learned, subject: Subject, generator: torch.Generator, deadline: Deadline
    ) -> Measurement:
        """Return each sample's outlier score, and how heavy the tail of each class is."""
        assert subject.classifier is not None
        assert subject.train is not None
        classes, ids = subject.classifier.classes, subject.train.ids
        rows, few = rows_by_class(seen.labels, len(classes))
        if not rows:
            raise CouldNotTell(f"no class has {FEWEST} samples")
        scores, heavy, suspects = np.zeros(len(ids)), {}, {}
        for c, own in rows.items():
            scores[own] = outlier_scores(seen.features, own)
            removed = own[np.argsort(-scores[own], kind="stable")[: self._removed(len(own))]]
            heavy[c] = tail(scores[own], len(removed))
            suspects[c] = tuple(ids[i] for i in removed)
        top = max(heavy, key=lambda c: heavy[c])
        return self.measurement(
            summary=f"The samples far out weigh most in class {classes[top]!r}: {heavy[top]:.1f} times what "
            "a normal distribution would give",
            score=heavy[top],
            per_class={c: heavy.get(c) for c in range(len(classes))},
            unknown_classes=few,
            score_name="weight of the tail, in units of a normal distribution's",
            scores=dict(zip(ids, scores.tolist(), strict=True)),
            suspects={top: suspects[top]},
            evidence=(
                Table(
                    title="Each class's tail along its first direction",
                    columns=("class", "samples", "tail"),
                    rows=tuple(
                        (classes[c], len(rows[c]), round(heavy[c], 2))
                        for c in sorted(heavy, key=lambda c: -heavy[c])
                    ),
                ),
            ),
        )

    def _removed(self, n: int) -> int:
        return min(n, max(1, round(MARGIN * self.poison_share * n)))


def tail(scores: Floats, count: int) -> float:
    """Return the share that the largest scores have of all, over that of squared normal variables."""
    from scipy import stats

    total = float(scores.sum())
    if not total:
        return 0.0
    share, cut = count / len(scores), stats.norm.isf(count / len(scores) / 2)
    usual = share + 2 * cut * stats.norm.pdf(cut)  # of x squared, beyond the cut on both sides
    return float(np.sort(scores)[::-1][:count].sum() / total / usual)
