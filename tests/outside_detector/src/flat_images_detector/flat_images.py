"""Flat images: does one class take images of a single grey level more surely than the others do?"""

from __future__ import annotations

import torch
from pydantic import Field

from doorward.core.budget import Deadline
from doorward.core.errors import CouldNotTell
from doorward.core.records import Measurement
from doorward.detectors.base import Detector
from doorward.detectors.subject import Subject
from doorward.methods.registry import register
from doorward.models.batching import batched_logits
from doorward.stats.outliers import gap_to_others


@register("detector")
class FlatImages(Detector):
    """Show a model images of a single grey level, and score how much of its probability each class takes."""

    title = "Flat images"
    source = "An example in Doorward's documentation, 2026"
    limits = "An example: it finds triggers that make a whole image brighter or darker, and no others."
    atlas = ("AML.T0018.000",)
    needs = frozenset({"probabilities"})

    levels: int = Field(64, ge=8, le=256, description="How many grey levels are shown")

    def examine(
        self, subject: Subject, *, generator: torch.Generator, device: torch.device, deadline: Deadline
    ) -> Measurement:
        """Return how far each class's mean log probability lies above the median of the other classes."""
        assert subject.classifier is not None
        classes = subject.classifier.classes
        flat = torch.linspace(0, 1, self.levels).view(-1, 1, 1, 1).expand(-1, *subject.classifier.spec.shape)
        log_p = batched_logits(subject.classifier, flat, deadline).log_softmax(1).double().cpu()  # (n, k)
        if not bool(log_p.isfinite().all()) or bool((log_p.std(0) == 0).all()):
            raise CouldNotTell("the model answers all flat images alike")
        score = gap_to_others(log_p.mean(0).numpy())
        top = int(score.argmax())
        return self.measurement(
            summary=f"Class {classes[top]!r} takes most of the flat images.",
            score=float(score[top]),
            per_class={t: float(value) for t, value in enumerate(score)},
            score_name="mean log probability above the other classes' median",
        )
