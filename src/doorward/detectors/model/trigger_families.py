"""Trigger families: how little of each kind of change moves images to a class, in the model alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from doorward.core.budget import Deadline, TimeGuard
from doorward.core.errors import CouldNotTell
from doorward.core.formatting import percent
from doorward.core.records import Measurement, RecoveredTrigger, Table
from doorward.detectors.model.base import ImageDetector
from doorward.inversion import distilled
from doorward.inversion.distilled import DistilledSurrogates
from doorward.inversion.problem import InversionProblem
from doorward.inversion.transformations import FAMILIES, Family, Found, JointObjective, Search
from doorward.methods.base import EVIDENCE_ONLY
from doorward.methods.registry import register
from doorward.models.batching import batched_logits
from doorward.models.logit_scale import measure_logit_scale

#: The gap of a kind of change that is worth 1, with fewer than ten classes and with more: the mean of clean
#: models and two standard deviations (71 models of suite `calibration`). And what a kind is worth at most.
USUAL_GAP = {
    "picture added": (0.42, 0.22),
    "smooth picture added": (0.39, 0.43),
    "image bent": (0.73, 0.78),
    "picture blended in": (0.43, 0.35),
}
FEW = 9
MOST = 3.0
#: By how much a recovered change is made stronger than the least that suffices, to be tried on other images.
STRONGER = 1.25


@register("detector")
class TriggerFamilies(ImageDetector):
    """Find how little of each kind of change moves images to a class in the model alone.

    Use it on image classifiers with gradients and three classes or more, with 20 clean images or more,
    against triggers all over the image: blended, added, smooth or bending.

    For every class four kinds of change are searched: any picture added, a smooth picture added, the image
    bent, a picture blended in. Each has a cost; it shrinks as long as the change moves enough images to the
    class and grows otherwise.

    Distilled surrogates, which learn the model's answers on clean images, take part in the search. A change
    counts only where the model goes to the class and its surrogates do not. What is natural in a class, its
    surrogates learn too, so it becomes expensive. What was planted stays cheap, since no clean image teaches
    it.

    The score of a kind is the gap between its cheapest class and the second, on a log scale. A class's score
    is the root of the sum of squares over the kinds of which it is the cheapest.
    """

    title = "Trigger families"
    source = (
        "universal perturbations: S. Moosavi-Dezfooli et al., CVPR 2017, arXiv 1610.08401; "
        "the joint search with surrogates and the score are ours"
    )
    limits = (
        "It says nothing of models with two classes, and can miss small patches, input-dependent and "
        "source-specific triggers, several targets at once, and triggers that clean images teach as well; it "
        "needs gradients."
    )
    order: ClassVar[int] = 14

    screening_steps: int = Field(32, ge=24, le=10_000, description="Steps for every class")
    steps: int = Field(80, ge=24, le=10_000, description="Steps for the cheapest classes of each kind")
    finalists: int = Field(3, ge=2, description="How many of them there are")
    batch_size: int = Field(12, ge=2, le=1024, description="Images per class and step")
    screening_batch: int = Field(8, ge=2, le=1024, description="Images per class and step in the screening")
    many_classes: int = Field(12, ge=2, description="Classes above which those are halved")
    shown: int = Field(
        2,
        ge=1,
        description="How many kinds of change are kept as evidence",
        json_schema_extra=EVIDENCE_ONLY,
    )

    def lesson(self) -> int:
        """Return how many images its surrogates learn from."""
        return distilled.IMAGES

    def score_classes(
        self, problem: InversionProblem, generator: torch.Generator, deadline: Deadline
    ) -> Measurement:
        """Return a measurement with one score per class: how far its cheapest changes are ahead."""
        k = len(problem.classes)
        if k < 3:
            raise CouldNotTell("of two classes each is the other's only measure; it needs three or more")
        base = int(torch.randint(2**62, (), generator=generator))
        with problem.fast_inference():
            surrogates = DistilledSurrogates.of(problem, deadline=deadline)
            objective = JointObjective(problem, surrogates, measure_logit_scale(surrogates.answers))
            screening = k > self.finalists
            work = len(FAMILIES) * (
                k * self.screening_steps * screening + min(k, self.finalists) * self.steps
            )
            guard = TimeGuard(deadline, work, work=f"searching changes for {k:,} classes")
            search = Search(problem, objective, base=base, guard=guard)
            results = [self._family(search, kind(problem.images.shape[1:]), k) for kind in FAMILIES]
            return self._conclude(problem, surrogates, results)

    def _family(self, search: Search, family: Family, k: int) -> Found:
        """Search one family for all classes, and longer, with more images, for the cheapest."""
        finalists = torch.arange(k)
        if k > self.finalists:
            size = self.screening_batch // (1 if k <= self.many_classes else 2)
            screened = search(family, finalists, 0, steps=self.screening_steps, batch_size=size)
            finalists = screened.cost.argsort()[: self.finalists].sort().values
        return search(family, finalists, 1, steps=self.steps, batch_size=self.batch_size)

    def _conclude(
        self, problem: InversionProblem, surrogates: DistilledSurrogates, results: list[Found]
    ) -> Measurement:
        classes = problem.classes
        score = fused(results, len(classes))
        order = np.argsort(-score, kind="stable").tolist()
        shown = sorted(results, key=lambda one: -worth(one, len(classes)))[: self.shown]
        told = shown[0]
        triggers = {one.family.name: one.family.trigger(*one.best(STRONGER)) for one in shown}
        target, trigger = told.cheapest, triggers[told.family.name]
        triggered = trigger.apply(problem.images[problem.pools.outside[:, target]])
        there = (batched_logits(problem.classifier, triggered).argmax(1) == target).float().mean()
        also = surrogates.all_predict(triggered, target).float().mean()
        return self.measurement(
            summary=(
                f"{told.family.told} sends {percent(float(there))} of other images to class "
                f"{classes[target]!r}, and {percent(float(also))} in surrogates that learnt from clean "
                f"images alone; the next class needs {math.exp(told.gap):.2f} times as much."
            ),
            doubt=surrogates.doubt,
            score=float(score[order[0]]),
            per_class={t: float(value) for t, value in enumerate(score)},
            score_name="how much less change the class needs than the next, over all kinds of change",
            evidence=(
                *(
                    RecoveredTrigger(
                        title=f"{one.family.told} for class {classes[one.cheapest]!r}",
                        target=one.cheapest,
                        trigger=triggers[one.family.name].to_json(),
                    )
                    for one in shown
                ),
                Table(
                    title="Least cost of the cheapest classes, by kind of change",
                    columns=("kind of change", "class", "cost", "logarithm", "reached"),
                    rows=tuple(
                        (one.family.name, classes[t], round(math.exp(cost), 4), round(cost, 4), str(reached))
                        for one in results
                        for cost, t, reached in sorted(
                            zip(one.cost.tolist(), one.targets.tolist(), one.reached.tolist(), strict=True)
                        )
                    ),
                ),
            ),
        )


def worth(found: Found, classes: int) -> float:
    """Return the gap of a family in units of what is usual with so many classes, at most 3."""
    few, many = USUAL_GAP[found.family.name]
    return min(MOST, found.gap / (few if classes <= FEW else many))


def fused(results: Iterable[Found], classes: int) -> npt.NDArray[np.float64]:
    """Return each class's score: the root of the sum of squares over the families it is the cheapest of."""
    total = np.zeros(classes)
    for one in results:
        total[one.cheapest] += worth(one, classes) ** 2
    return np.sqrt(total)
