"""The shell of filters: they compare inputs with clean ones and reject a preset share of those."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from doorward.core.budget import Deadline
from doorward.core.errors import CouldNotTell
from doorward.core.formatting import number, percent, sentence
from doorward.core.records import Kind, Level, Measurement, Need, Table
from doorward.detectors.base import Detector
from doorward.detectors.subject import Subject
from doorward.models import Classifier
from doorward.models.batching import batched_logits
from doorward.models.encode.image import to_float, to_tensor
from doorward.models.output_check import check_logits
from doorward.stats.rejection import Floats, Rule, rejection_thresholds

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Scored:
    """The scores of some inputs.

    Attributes:
        score: (n,), a higher one is more suspicious.
        told: what each score rests on, in words.
    """

    score: Floats
    told: tuple[str, ...]


class InputFilter(Detector):
    """Score inputs one by one, and reject those that score higher than clean ones do.

    Subclasses write `score`, and `learn` where they keep clean images.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"probabilities", "clean", "inputs"})
    level: ClassVar[Level] = "input"
    kind: ClassVar[Kind] = "backdoor"
    atlas = ("AML.T0043", "AML.T0043.004")
    #: The largest score that the filter can give.
    highest: ClassVar[float]

    false_rejection_rate: float = Field(0.01, gt=0, lt=1, description="Share of clean inputs to be rejected")
    rule: Rule = Field(
        "conformal",
        description="How the threshold follows from clean scores: conformal (holds for any distribution), "
        "normal (a percentile of a Normal distribution) or quantile (their plain quantile)",
    )

    @property
    def kept(self) -> int:
        """Return how many clean images the filter keeps for itself."""
        return 0

    def learn(self, images: Tensor) -> State:
        """Return what the filter keeps of `kept` clean images (n, c, h, w) uint8."""
        return {}

    def warning(self, clean: Floats, classes: int) -> str | None:
        """Return what the scores (n,) of clean images say against relying on the filter, if anything.

        Args:
            classes: of the model.
        """
        return None

    @abstractmethod
    def score(
        self,
        classifier: Classifier,
        images: Tensor,
        logits: Tensor,
        *,
        state: State,
        threshold: float | None = None,
        deadline: Deadline | None = None,
    ) -> Scored:
        """Return the scores of images (n, c, h, w) uint8, whose logits (n, k) are known.

        Args:
            state: what `learn` returned.
            threshold: if given, no more is computed than shows on which side of it a score lies.

        Raises:
            CouldNotTell: if the model's outputs are not finite, or the deadline is too near.
        """

    def examine(
        self, subject: Subject, *, generator: torch.Generator, device: torch.device, deadline: Deadline
    ) -> Measurement:
        """Fit the filter to the clean images and return the scores of the inputs."""
        classifier, clean, inputs = subject.classifier, subject.clean, subject.inputs
        assert classifier is not None
        assert clean is not None
        assert inputs is not None
        if classifier.spec.modality not in self.modalities:
            raise CouldNotTell(f"{self.method()} filters images, and this model takes something else")
        fitted = fit_filters(
            classifier,
            to_tensor(clean, classifier.spec),
            [self],
            rate=self.false_rejection_rate,
            rule=self.rule,
            generator=generator,
            deadline=deadline,
        )
        images = to_tensor(inputs, classifier.spec)
        logits = finite_logits(classifier, images, deadline)
        seen = fitted.score(classifier, images, logits, deadline)[0]
        rejected = seen.score >= fitted.thresholds[0]
        share = float(rejected.mean()) if len(images) else 0.0
        doubts = " ".join(sentence(one) for one in fitted.warnings(len(classifier.classes)))
        return self.measurement(
            summary=f"It rejects {int(rejected.sum()):,} of {len(images):,} inputs ({percent(share)}), where "
            f"{percent(self.false_rejection_rate)} of clean ones would be. {doubts}".rstrip(),
            score=share,
            score_name="share of inputs that are rejected",
            scores=dict(zip(inputs.ids, seen.score.tolist(), strict=True)),
            evidence=(fitted.table(),),
        )


@dataclass(frozen=True)
class FittedFilters:
    """Filters with what they learnt from clean images.

    Attributes:
        states: what each filter keeps.
        thresholds: (f,), at and above which a score is rejected.
        clean: scores (f, n) of the clean images that the thresholds come from.
    """

    filters: tuple[InputFilter, ...]
    states: tuple[State, ...]
    thresholds: Floats
    clean: Floats

    def score(
        self, classifier: Classifier, images: Tensor, logits: Tensor, deadline: Deadline | None = None
    ) -> list[Scored]:
        """Return each filter's scores of images (n, c, h, w) uint8 with logits (n, k)."""
        return [
            one.score(classifier, images, logits, state=state, threshold=float(threshold), deadline=deadline)
            for one, state, threshold in zip(self.filters, self.states, self.thresholds, strict=True)
        ]

    def warnings(self, classes: int) -> tuple[str, ...]:
        """Return what speaks against relying on filters for a model of so many classes."""
        told = (one.warning(row, classes) for one, row in zip(self.filters, self.clean, strict=True))
        return tuple(one for one in told if one is not None)

    def table(self) -> Table:
        """Return the thresholds and what clean images score, for readers."""
        rows = tuple(
            (one.method(), *(float(number(float(v))) for v in (threshold, row.mean(), row.std())))
            for one, threshold, row in zip(self.filters, self.thresholds, self.clean, strict=True)
        )
        return Table(
            title=f"Scores of {self.clean.shape[1]:,} clean images",
            columns=("filter", "threshold", "mean", "standard deviation"),
            rows=rows,
        )


def fit_filters(
    classifier: Classifier,
    images: Tensor,
    filters: Sequence[InputFilter],
    *,
    rate: float,
    rule: Rule,
    generator: torch.Generator,
    deadline: Deadline | None = None,
) -> FittedFilters:
    """Fit filters to clean images (n, c, h, w) uint8, so that together they reject a preset share of them.

    Some images are kept as material, and the thresholds come from the others, in an order that is drawn.

    Raises:
        CouldNotTell: if the images are too few, or the model's outputs say nothing.
    """
    shuffled = images[torch.randperm(len(images), generator=generator)]
    kept = max(one.kept for one in filters)
    material, rest = shuffled[:kept], shuffled[kept:]
    if len(rest) < 2:
        raise CouldNotTell(f"{len(images)} clean images are too few; the filters keep {kept} for themselves")
    logits = finite_logits(classifier, rest, deadline)
    if (reason := check_logits(logits).reason) is not None:
        raise CouldNotTell(reason)
    states = tuple(one.learn(material[: one.kept]) for one in filters)
    clean = np.stack(
        [
            one.score(classifier, rest, logits, state=state, deadline=deadline).score
            for one, state in zip(filters, states, strict=True)
        ]
    )
    thresholds = rejection_thresholds(clean, rate, rule=rule, highest=[one.highest for one in filters])
    return FittedFilters(tuple(filters), states, thresholds, clean)


def finite_logits(classifier: Classifier, images: Tensor, deadline: Deadline | None = None) -> Tensor:
    """Return logits (n, k), in the model's own scale, for images (n, c, h, w) uint8.

    Raises:
        CouldNotTell: if some are not finite, or the deadline is too near.
    """
    if not len(images):
        return torch.zeros(0, len(classifier.classes))
    logits = batched_logits(classifier, to_float(images), deadline, raw=True).cpu()
    if not bool(torch.isfinite(logits).all()):
        raise CouldNotTell("the model gives outputs that are not finite")
    return logits
