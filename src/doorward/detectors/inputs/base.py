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
from doorward.core.errors import CouldNotTell, InputError
from doorward.core.formatting import number, percent, sentence
from doorward.core.records import Kind, Level, Measurement, Need, Table
from doorward.detectors.base import Detector
from doorward.detectors.subject import Subject
from doorward.models import Classifier, InputSpec
from doorward.models.batching import batched_logits
from doorward.models.encode.dispatch import NOUNS, to_float, to_tensor
from doorward.models.output_check import check_logits
from doorward.stats.rejection import Floats, Rule, rejection_thresholds

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Scored:
    """The scores of some inputs.

    Attributes:
        score: (n,), a higher one is more suspicious.
        told: what each score rests on, in words.
        parts: (n, m), of which each score is made, where a filter settles something by them.
    """

    score: Floats
    told: tuple[str, ...]
    parts: Floats | None = None


class InputFilter(Detector):
    """Score inputs one by one, and reject those that score higher than clean ones do.

    Subclasses write `score`, and `keep` where they keep clean inputs. Inputs are as compact as
    `models.encode` makes them: (n, c, h, w), images uint8, and of width m at most texts int32 and recordings
    int16, each (n, 1, 1, m).
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
        """Return how many clean inputs the filter keeps for itself."""
        return 0

    def keep(self, inputs: Tensor, spec: InputSpec, generator: torch.Generator) -> State:
        """Return what the filter keeps of `kept` clean inputs (n, c, h, w), in shapes that the spec sets."""
        return {}

    def learn(
        self, classifier: Classifier, inputs: Tensor, generator: torch.Generator, deadline: Deadline | None
    ) -> State:
        """Return what it keeps of `kept` clean inputs (n, c, h, w), with what the model's answers say of it.

        Raises:
            CouldNotTell: if the model's outputs are not finite, or the deadline is too near.
        """
        return self.keep(inputs, classifier.spec, generator)

    def settle(self, state: State, clean: Scored, threshold: float) -> State:
        """Return the state with what follows from the threshold and the scores that it comes from."""
        return state

    def check(self, spec: InputSpec) -> None:
        """Raise InputError unless the filter takes inputs of that kind."""
        if spec.modality not in self.modalities:
            takes = " or ".join(NOUNS[one] for one in sorted(self.modalities))
            raise InputError(f"{self.method()} filters {takes}, and this model takes {NOUNS[spec.modality]}")

    def warning(self, clean: Floats, classes: int) -> str | None:
        """Return what the scores (n,) of clean inputs say against relying on the filter, if anything.

        Args:
            classes: of the model.
        """
        return None

    @abstractmethod
    def score(
        self,
        classifier: Classifier,
        inputs: Tensor,
        logits: Tensor,
        *,
        state: State,
        threshold: float | None = None,
        deadline: Deadline | None = None,
    ) -> Scored:
        """Return the scores of inputs (n, c, h, w), whose logits (n, k) are known.

        Args:
            state: what `learn`, or later `settle`, returned.
            threshold: if given, no more is computed than shows on which side of it a score lies.

        Raises:
            CouldNotTell: if the model's outputs are not finite, or the deadline is too near.
        """

    def examine(
        self, subject: Subject, *, generator: torch.Generator, device: torch.device, deadline: Deadline
    ) -> Measurement:
        """Fit the filter to the clean inputs and return the scores of the others."""
        classifier, clean, inputs = subject.classifier, subject.clean, subject.inputs
        assert classifier is not None
        assert clean is not None
        assert inputs is not None
        try:
            self.check(classifier.spec)
        except InputError as error:
            raise CouldNotTell(str(error)) from None
        fitted = fit_filters(
            classifier,
            to_tensor(clean, classifier.spec),
            [self],
            rate=self.false_rejection_rate,
            rule=self.rule,
            generator=generator,
            deadline=deadline,
        )
        judged = to_tensor(inputs, classifier.spec)
        logits = finite_logits(classifier, judged, deadline)
        seen = fitted.score(classifier, judged, logits, deadline)[0]
        rejected = seen.score >= fitted.thresholds[0]
        share = float(rejected.mean()) if len(judged) else 0.0
        doubts = " ".join(sentence(one) for one in fitted.warnings(len(classifier.classes)))
        return self.measurement(
            summary=f"It rejects {int(rejected.sum()):,} of {len(judged):,} inputs ({percent(share)}), where "
            f"{percent(self.false_rejection_rate)} of clean ones would be. {doubts}".rstrip(),
            score=share,
            score_name="share of inputs that are rejected",
            scores=dict(zip(inputs.ids, seen.score.tolist(), strict=True)),
            evidence=(fitted.table(),),
        )


@dataclass(frozen=True)
class FittedFilters:
    """Filters with what they learnt from clean inputs.

    Attributes:
        states: what each filter keeps.
        thresholds: (f,), at and above which a score is rejected.
        clean: scores (f, n) of the clean inputs that the thresholds come from.
    """

    filters: tuple[InputFilter, ...]
    states: tuple[State, ...]
    thresholds: Floats
    clean: Floats

    def score(
        self, classifier: Classifier, inputs: Tensor, logits: Tensor, deadline: Deadline | None = None
    ) -> list[Scored]:
        """Return each filter's scores of inputs (n, c, h, w) with logits (n, k)."""
        return [
            one.score(classifier, inputs, logits, state=state, threshold=float(threshold), deadline=deadline)
            for one, state, threshold in zip(self.filters, self.states, self.thresholds, strict=True)
        ]

    def warnings(self, classes: int) -> tuple[str, ...]:
        """Return what speaks against relying on filters for a model of so many classes."""
        told = (one.warning(row, classes) for one, row in zip(self.filters, self.clean, strict=True))
        return tuple(one for one in told if one is not None)

    def table(self) -> Table:
        """Return the thresholds and what clean inputs score, for readers."""
        rows = tuple(
            (one.method(), *(float(number(float(v))) for v in (threshold, row.mean(), row.std())))
            for one, threshold, row in zip(self.filters, self.thresholds, self.clean, strict=True)
        )
        return Table(
            title=f"Scores of {self.clean.shape[1]:,} clean inputs",
            columns=("filter", "threshold", "mean", "standard deviation"),
            rows=rows,
        )


def fit_filters(
    classifier: Classifier,
    inputs: Tensor,
    filters: Sequence[InputFilter],
    *,
    rate: float,
    rule: Rule,
    generator: torch.Generator,
    deadline: Deadline | None = None,
) -> FittedFilters:
    """Fit filters to clean inputs (n, c, h, w), so that together they reject a preset share of them.

    Some inputs are kept as material, and the thresholds come from the others, in an order that is drawn.

    Raises:
        InputError: if a filter takes inputs of another kind.
        CouldNotTell: if the inputs are too few, or the model's outputs say nothing.
    """
    for one in filters:
        one.check(classifier.spec)
    shuffled = inputs[torch.randperm(len(inputs), generator=generator)]
    kept = max(one.kept for one in filters)
    material, rest = shuffled[:kept], shuffled[kept:]
    if len(rest) < 2:
        raise CouldNotTell(f"{len(inputs)} clean inputs are too few; the filters keep {kept} for themselves")
    logits = finite_logits(classifier, rest, deadline)
    if (reason := check_logits(logits).reason) is not None:
        raise CouldNotTell(reason)
    states = [one.learn(classifier, material[: one.kept], generator, deadline) for one in filters]
    scored = [
        one.score(classifier, rest, logits, state=state, deadline=deadline)
        for one, state in zip(filters, states, strict=True)
    ]
    clean = np.stack([one.score for one in scored])
    thresholds = rejection_thresholds(clean, rate, rule=rule, highest=[one.highest for one in filters])
    settled = [
        one.settle(state, seen, float(threshold))
        for one, state, seen, threshold in zip(filters, states, scored, thresholds, strict=True)
    ]
    return FittedFilters(tuple(filters), tuple(settled), thresholds, clean)


def finite_logits(classifier: Classifier, inputs: Tensor, deadline: Deadline | None = None) -> Tensor:
    """Return logits (n, k), in the model's own scale, for inputs (n, c, h, w).

    Raises:
        CouldNotTell: if some are not finite, or the deadline is too near.
    """
    if not len(inputs):
        return torch.zeros(0, len(classifier.classes))
    logits = batched_logits(classifier, to_float(inputs, classifier.spec), deadline, raw=True).cpu()
    if not bool(torch.isfinite(logits).all()):
        raise CouldNotTell("the model gives outputs that are not finite")
    return logits
