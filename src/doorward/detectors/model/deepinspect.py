"""DeepInspect: without any data, find the class that the smallest generated perturbation leads to."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field

from doorward.core.budget import Deadline
from doorward.core.errors import CouldNotTell
from doorward.core.formatting import percent
from doorward.core.records import Cost, Measurement, RecoveredTrigger, Table
from doorward.detectors.base import Detector
from doorward.detectors.subject import Subject
from doorward.inversion.conditional_generator import Perturbations, learn_perturbations
from doorward.inversion.model_inversion import InvertedImages, invert_classes
from doorward.inversion.problem import InversionProblem
from doorward.inversion.sources import SourcePools, outside_class
from doorward.methods.base import EVIDENCE_ONLY
from doorward.methods.registry import register
from doorward.models import Classifier
from doorward.models.batching import batched_logits
from doorward.models.encode.image import to_float, to_tensor
from doorward.stats.deviation import PUBLISHED_CUTOFF, left_deviation_factors, mean_deviation_factors
from doorward.stats.outliers import gap_to_nearest
from doorward.triggers.additive import Additive


@register("detector")
class DeepInspect(Detector):
    """Generate the smallest perturbation that sends images to each class, without any data.

    Use it on image classifiers with gradients and three classes or more of which you have no clean images.

    Images of every class are made from the model alone, by model inversion. One conditional generator then
    learns, for all classes at once, perturbations that send images of other classes to each. It has the
    losses of the paper: of the trigger, of the adversary and of the perturbation. The weight of the last
    follows the success of each class and aims at 95 %, which it often misses.

    The score of a class is how much smaller its perturbation is than the smallest of all other classes, as a
    logarithm. It is compared with the scores of clean models. The rule of the paper, a double-MAD deviation
    factor above 2, is in the evidence table next to it and decides nothing: it flags clean models by chance.

    Where clean images are given, the recovered triggers are tried on them; the score does not change.

    We depart from the paper in batch norm as a prior of the inversion, in a generator with an offset for each
    class, in weights that adapt, and in the rule.
    """

    title = "DeepInspect"
    source = "H. Chen et al., DeepInspect, IJCAI 2019, doi:10.24963/ijcai.2019/647"
    limits = (
        "It says nothing of models with two classes, and can miss large, input-dependent and source-specific "
        "triggers, several targets at once, and models whose inverted images are unlike real ones, such as "
        "those of large images."
    )
    atlas = ("AML.T0018.000", "AML.T0020", "AML.T0043.004")
    needs = frozenset({"gradients"})
    stands_in_for = frozenset({"clean"})
    order: ClassVar[int] = 12
    quick: ClassVar[dict[str, Any]] = {"inversion_steps": 40, "steps": 80, "batch_size": 6}

    inverted: int = Field(8, ge=2, le=1000, description="Images of each class that are made from the model")
    inversion_steps: int = Field(60, ge=5, le=10_000, description="Steps by which they are made")
    steps: int = Field(120, ge=10, le=10_000, description="Steps of the generator")
    batch_size: int = Field(8, ge=2, le=1024, description="Images per class and step")
    many_classes: int = Field(20, ge=2, description="Classes above which those are halved")
    learning_rate: float = Field(0.3, gt=0, description="Adam's step for what each class has of its own")
    success: float = Field(
        0.95, gt=0, lt=1, description="Share of images that a perturbation shall send to its class"
    )
    initial_weight: float = Field(0.05, gt=0, description="First weight of a perturbation's size in pixels")
    realism: float = Field(0.5, ge=0, description="Weight of the adversary's loss")
    free: float = Field(0.0, ge=0, description="Size of a perturbation in pixels that costs nothing")
    shown: int = Field(
        2,
        ge=1,
        description="How many perturbations are kept as evidence",
        json_schema_extra=EVIDENCE_ONLY,
    )

    def work(self, *, classes: int, images: int) -> Cost:
        """Return how many images it sends through a model, about."""
        made = classes * self._per_class(classes, self.inverted)
        learnt = classes * self._per_class(classes, self.batch_size) * self.steps
        return Cost(
            forwards=(classes + 2) * made + self.shown * images,
            gradients=made * self.inversion_steps + learnt,
        )

    def examine(
        self, subject: Subject, *, generator: torch.Generator, device: torch.device, deadline: Deadline
    ) -> Measurement:
        """Return a measurement with one score per class: how far its perturbation is ahead of all others.

        Raises:
            CouldNotTell: if there are two classes, the model is not reached, or the deadline is too near.
        """
        classifier = subject.classifier
        assert classifier is not None
        k = len(classifier.classes)
        if k < 3:
            raise CouldNotTell("of two classes each is the other's only measure; it needs three or more")
        made = invert_classes(
            classifier,
            per_class=self._per_class(k, self.inverted),
            steps=self.inversion_steps,
            generator=generator,
            deadline=deadline,
        )
        pools = SourcePools(outside_class(classifier, made.images, made.labels, deadline))
        found = learn_perturbations(
            InversionProblem(classifier, made.images, pools),
            steps=self.steps,
            batch_size=self._per_class(k, self.batch_size),
            learning_rate=self.learning_rate,
            success=self.success,
            initial_weight=self.initial_weight,
            realism=self.realism,
            free=self.free,
            generator=generator,
            deadline=deadline,
        )
        return self._conclude(classifier, subject, made, found)

    def _per_class(self, classes: int, count: int) -> int:
        return count if classes <= self.many_classes else max(2, count // 2)

    def _conclude(
        self, classifier: Classifier, subject: Subject, made: InvertedImages, found: Perturbations
    ) -> Measurement:
        classes, norm = classifier.classes, found.norm.double().cpu().numpy()
        score = gap_to_nearest(-np.log(np.maximum(norm, 1e-6)))
        factors, by_mean = left_deviation_factors(norm), mean_deviation_factors(norm)
        order = np.argsort(norm, kind="stable").tolist()
        top, second = order[:2]
        triggers = {t: Additive(found.picture[t].cpu()) for t in order[: self.shown]}
        real = _success_on_given(classifier, subject, triggers)
        return self.measurement(
            summary=(
                f"A perturbation of {norm[top]:.1f} pixels sends {percent(float(found.success[top]))} of "
                f"images made from the model to class {classes[top]!r}; the next class, {classes[second]!r}, "
                f"needs {norm[second]:.1f}. The published rule flags "
                f"{_named(classes, factors) or 'no class'}."
            ),
            score=float(score[top]),
            per_class={t: float(value) for t, value in enumerate(score)},
            score_name="log of how many times smaller the perturbation is than those of all other classes",
            published_flags=tuple(np.flatnonzero(factors > PUBLISHED_CUTOFF).tolist()),
            evidence=(
                *(
                    RecoveredTrigger(
                        title=f"Generated perturbation for class {classes[t]!r}",
                        target=t,
                        trigger=trigger.to_json(),
                    )
                    for t, trigger in triggers.items()
                ),
                Table(
                    title="Generated perturbations, the smallest first",
                    columns=(
                        "class",
                        "size in pixels",
                        "success on inverted images",
                        "success on images given",
                        "deviation factor (flagged above 2)",
                        "deviation factor by means",
                    ),
                    rows=tuple(
                        (
                            classes[t],
                            round(float(norm[t]), 2) if bool(found.reached[t]) else None,
                            round(float(found.success[t]), 3),
                            real.get(t),
                            _rounded(factors[t]),
                            _rounded(by_mean[t]),
                        )
                        for t in order
                    ),
                ),
                Table(
                    title="Images made from the model",
                    columns=("images", "confidently of their class"),
                    rows=((len(made.images), round(made.confident, 3)),),
                ),
            ),
        )


def _success_on_given(
    classifier: Classifier, subject: Subject, triggers: dict[int, Additive]
) -> dict[int, float]:
    """Return how often triggers send clean images of other classes to theirs; nothing without images."""
    if subject.clean is None or not len(subject.clean):
        return {}
    images = to_float(to_tensor(subject.clean, classifier.spec))
    before = batched_logits(classifier, images).argmax(1).cpu()
    found = {}
    for target, trigger in triggers.items():
        others = images[before != target]
        if len(others):
            there = batched_logits(classifier, trigger.apply(others)).argmax(1) == target
            found[target] = round(float(there.float().mean()), 3)
    return found


def _named(classes: tuple[str, ...], factors: Any) -> str:
    """Return the classes that the published rule flags, in words."""
    return ", ".join(repr(classes[t]) for t in np.flatnonzero(factors > PUBLISHED_CUTOFF))


def _rounded(value: float) -> float | None:
    return round(float(value), 2) if np.isfinite(value) else None
