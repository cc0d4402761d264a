"""Noise response: what the model recognises by a trigger keeps its label when the rest drowns in noise."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from scipy import stats

from doorward.core.budget import Deadline, TimeGuard
from doorward.core.errors import CouldNotTell
from doorward.core.records import Measurement, Table
from doorward.data import Samples
from doorward.detectors.subject import Subject
from doorward.detectors.training_data._learned import Learned, batches
from doorward.detectors.training_data._noise import NOISE, STRENGTHS
from doorward.detectors.training_data.base import TrainingDataDetector, rows_by_class
from doorward.methods.registry import register
from doorward.models import Classifier

Floats = npt.NDArray[np.float64]
#: Clean samples of a class below which its own threshold cannot be told.
FEWEST_CLEAN = 19


def retained(
    classifier: Classifier,
    samples: Samples,
    *,
    strengths: tuple[float, ...],
    draws: int,
    generator: torch.Generator,
    deadline: Deadline,
) -> Floats:
    """Return the probability that each sample's label keeps under noise, the mean over strengths and draws.

    Raises:
        CouldNotTell: if the deadline is too near.
        InputError: if a sample cannot be decoded or does not fit the model.
    """
    assert samples.labels is not None, "the caller checks"
    labels, found = torch.from_numpy(samples.labels), np.zeros(len(samples))
    spread = NOISE[classifier.spec.modality]
    rounds = len(strengths) * draws
    guard = TimeGuard(
        deadline, rounds * len(samples), work=f"running the model on {len(samples):,} noisy samples"
    )
    for rows, x in batches(classifier, samples):
        for strength in strengths:
            for _ in range(draws):
                with torch.no_grad():
                    # in single precision, whatever is sure is equally sure
                    likely = classifier.logits(spread(x, strength, generator)).cpu().double().softmax(1)
                found[rows] += likely.gather(1, labels[rows][:, None])[:, 0].numpy() / rounds
                guard.advance(len(x))
    return found


def conformal_p(scores: Floats, clean: Floats) -> Floats:
    """Return the share of clean scores, and of the sample itself, that are as high as each score: (n,).

    Of a clean sample that is exchangeable with the others, it is at most a in a share a of cases.
    """
    above = len(clean) - np.searchsorted(np.sort(clean), scores, side="left")
    return np.asarray((1 + above) / (1 + len(clean)))


@register("detector")
class NoiseResponse(TrainingDataDetector):
    """Put noise on every sample and score how much of its label's probability the model keeps.

    Use it next to activation clustering where classes are of very unequal size.

    Images get normal noise, recordings noise by their loudness, and of texts some words become others.
    With clean labelled samples, each class has a threshold of its own (Mondrian conformal prediction):
    whatever the size of the classes, at most the share `most_false` of clean samples of each is expected
    above it, if they are like the given ones. Without any, samples are scored and none is suspect.

    We depart from the paper in the thresholds, which are those of each class, and in strengths and number
    of draws, which it does not state.
    """

    title = "Noise response"
    source = "Lin et al., RPP, 2026, arXiv 2602.00183"
    limits = (
        "It misses triggers that noise destroys, such as faint ones, and takes samples that are easy for the "
        "model for poisoned ones; samples that were trained on keep more than clean ones that were not."
    )
    order: ClassVar[int] = 62

    draws: int = Field(2, ge=1, le=100, description="Draws of noise at each strength")
    strengths: tuple[float, ...] = Field(
        (), description="Strengths of the noise; those usual for the kind of input if none is given"
    )
    most_false: float = Field(
        0.05, gt=0, lt=1, description="Share of a class's clean samples that may lie above its threshold"
    )

    def score_samples(
        self, seen: Learned, subject: Subject, generator: torch.Generator, deadline: Deadline
    ) -> Measurement:
        """Return what each sample keeps; with clean data, how unusual that is in its class."""
        classifier, samples = subject.classifier, subject.train
        assert classifier is not None
        assert samples is not None
        kept = self._retained(classifier, samples, generator, deadline)
        rows, few = rows_by_class(seen.labels, len(classifier.classes))
        if not rows:
            raise CouldNotTell("no class has enough samples")
        base: dict[str, object] = {
            "unknown_classes": few,
            "evidence": (_table(rows, kept, classifier.classes),),
        }
        enough = _classes_with(subject.clean, FEWEST_CLEAN)
        if subject.clean is not None and enough:
            known = {c: own for c, own in rows.items() if c in enough}
            if known:
                return self._with_thresholds(
                    classifier, subject.clean, samples, kept, known, generator, deadline, base
                )
        means = {c: float(kept[own].mean()) for c, own in rows.items()}
        top = max(means, key=lambda c: means[c])
        return self.measurement(
            summary=f"Samples of class {classifier.classes[top]!r} keep most of the label's probability "
            f"under noise: {means[top]:.2f} on average. Without {FEWEST_CLEAN} clean samples of a class "
            "there is no threshold",
            score=means[top],
            per_class={c: means.get(c) for c in range(len(classifier.classes))},
            score_name="mean probability that the label keeps under noise",
            scores=dict(zip(samples.ids, kept.tolist(), strict=True)),
            **base,
        )

    def _retained(
        self, classifier: Classifier, samples: Samples, generator: torch.Generator, deadline: Deadline
    ) -> Floats:
        return retained(
            classifier,
            samples,
            strengths=self.strengths or STRENGTHS[classifier.spec.modality],
            draws=self.draws,
            generator=generator,
            deadline=deadline,
        )

    def _with_thresholds(
        self,
        classifier: Classifier,
        clean: Samples,
        samples: Samples,
        kept: Floats,
        rows: dict[int, npt.NDArray[np.int64]],
        generator: torch.Generator,
        deadline: Deadline,
        base: dict[str, object],
    ) -> Measurement:
        """Return how unusual each sample is in its class, and for each class how many are."""
        assert clean.labels is not None
        own = self._retained(classifier, clean, generator, deadline)
        p = np.ones(len(kept))
        excess: dict[int, float] = {}
        for c, members in rows.items():
            given = own[clean.labels == c]
            p[members] = conformal_p(kept[members], given)
            count = int((p[members] <= self.most_false).sum())
            excess[c] = -float(stats.binom.logsf(count - 1, len(members), self.most_false)) / np.log(10)
        top = max(excess, key=lambda c: excess[c])
        names, ids = classifier.classes, samples.ids
        unusual = p[rows[top]] <= self.most_false
        return self.measurement(
            summary=f"{int(unusual.sum()):,} of {len(rows[top]):,} samples of class {names[top]!r} keep "
            f"their label under noise as at most {self.most_false:.0%} of its clean samples do",
            score=excess[top],
            per_class={c: excess.get(c) for c in range(len(names))},
            score_name="how unlikely so many unusual samples are, in powers of ten",
            scores=dict(zip(ids, (1 - p).tolist(), strict=True)),
            suspects={c: tuple(ids[i] for i in rows[c][p[rows[c]] <= self.most_false]) for c in excess},
            **base,
        )


def _classes_with(clean: Samples | None, count: int) -> set[int]:
    """Return the classes of which so many labelled samples are given."""
    if clean is None or clean.labels is None:
        return set()
    return {c for c, n in enumerate(np.bincount(clean.labels).tolist()) if n >= count}


def _table(rows: dict[int, npt.NDArray[np.int64]], kept: Floats, classes: tuple[str, ...]) -> Table:
    return Table(
        title="Probability that labels keep under noise",
        columns=("class", "samples", "mean", "highest twentieth"),
        rows=tuple(
            (
                classes[c],
                len(own),
                round(float(kept[own].mean()), 3),
                round(float(np.quantile(kept[own], 0.95)), 3),
            )
            for c, own in sorted(rows.items(), key=lambda item: -kept[item[1]].mean())
        ),
    )
