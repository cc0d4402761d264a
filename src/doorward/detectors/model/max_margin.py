"""MM-BD: without any data, look for a class whose largest attainable margin is far too large."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from pydantic import Field

from doorward.core.budget import Deadline, TimeGuard
from doorward.core.errors import CouldNotTell
from doorward.core.records import Measurement, Table
from doorward.detectors.base import Detector
from doorward.detectors.subject import Subject
from doorward.methods.registry import register
from doorward.models import Classifier
from doorward.models.batching import chunk_images, margin
from doorward.stats.outliers import gamma_order_p, gap_to_others


def maximum_margins(
    classifier: Classifier,
    *,
    starts: int,
    steps: int,
    learning_rate: float,
    generator: torch.Generator,
    deadline: Deadline,
) -> torch.Tensor:
    """Return the largest margin reached from each random start, for each class: (k, starts).

    Maximises `logit_t - max other logit` over images in [0, 1] by projected Adam steps.

    Raises:
        CouldNotTell: if the deadline is too near.
    """
    device, shape, k = classifier.device, classifier.spec.shape, len(classifier.classes)
    result = []
    all_targets = torch.arange(k).repeat_interleave(starts)  # (k * starts,)
    with classifier.fast_inference(
        torch.rand(min(16, chunk_images(classifier)), *shape, generator=generator)
    ):
        work = f"maximising margins of {k:,} classes"
        guard = TimeGuard(deadline, len(all_targets) * steps, work=work)
        for part in torch.split(all_targets, chunk_images(classifier)):
            targets = part.to(device)
            x = torch.rand(len(part), *shape, generator=generator).to(device)
            mean, square = torch.zeros_like(x), torch.zeros_like(x)
            best = torch.full((len(part),), -torch.inf, device=device)
            for step in range(1, steps + 1):
                x.requires_grad_()
                gap = margin(classifier.logits(x), targets)  # (p,)
                (gradient,) = torch.autograd.grad(gap.sum(), x)
                x = x.detach()
                best = torch.maximum(best, gap.detach())
                mean.lerp_(gradient, 0.1)
                square.lerp_(gradient * gradient, 0.01)
                scale = (square / (1 - 0.99**step)).sqrt_().add_(1e-12)
                x = (x + learning_rate * mean / (1 - 0.9**step) / scale).clamp_(0, 1)
                guard.advance(len(part))
            result.append(best)
    return torch.cat(result).view(k, starts)


def _rounded(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 2)


@register("detector")
class MaxMargin(Detector):
    """Maximise the margin of every class over random images and flag the class with an outlying maximum.

    Use it where you have no clean images: it needs none, and assumes no kind of trigger.

    We depart from the paper in the optimiser (Adam, fewer starts and steps), in the score (the distance of a
    class's log margin above the median of the others) and in the decision, which comes from a calibration set
    of clean models (see `doorward.scan.calibration`): single classes of clean models stand out by nature. The
    paper's order-statistic p-value, below .05 for 13 to 30 % of clean models, is in the evidence table.
    """

    title = "Maximum margin (MM-BD)"
    source = "H. Wang et al., MM-BD, IEEE S&P 2024, arXiv 2205.06900"
    limits = (
        "It sees only backdoors that let their class overfit, and can miss several target classes at "
        "once, models of few classes and modules with vanishing gradients."
    )
    atlas = ("AML.T0018.000", "AML.T0020")
    needs = frozenset({"gradients"})
    order: ClassVar[int] = 10

    starts: int = Field(10, ge=1, le=1000, description="Random images per class, of up to 20 classes")
    steps: int = Field(60, ge=5, le=10_000, description="Steps from each start")
    learning_rate: float = Field(0.05, gt=0, description="Step in units of the [0, 1] range")

    def examine(
        self, subject: Subject, *, generator: torch.Generator, device: torch.device, deadline: Deadline
    ) -> Measurement:
        """Return a finding with one score per class: how far its log margin lies above the others' median."""
        classifier = subject.classifier
        assert classifier is not None
        reached = maximum_margins(
            classifier,
            # the spread over starts is small next to that over classes
            starts=self.starts if len(classifier.classes) <= 20 else max(1, self.starts // 2),
            steps=self.steps,
            learning_rate=self.learning_rate,
            generator=generator,
            deadline=deadline,
        )
        margins = reached.amax(1).double().cpu().numpy()  # (k,)
        if not np.isfinite(margins).all():
            raise CouldNotTell("the model gives outputs that are not finite")
        values = np.where(margins > 0, np.log(np.maximum(margins, 1e-30)), np.nan)
        score = gap_to_others(values)
        if np.isnan(score).all():
            raise CouldNotTell("the classes cannot be compared: random starts reached fewer than two of them")
        top = int(np.nanargmax(score))
        classes = classifier.classes
        try:
            published: float | None = gamma_order_p(margins[margins > 0])
        except CouldNotTell:
            published = None
        return self.measurement(
            summary=(
                f"Class {classes[top]!r} reaches a margin of {margins[top]:.1f}; the median class reaches "
                f"{np.median(margins):.1f}."
            ),
            score=float(score[top]),
            per_class={t: None if np.isnan(v) else float(v) for t, v in enumerate(score)},
            unknown_classes={
                int(t): "no random start reached the class" for t in np.flatnonzero(np.isnan(score))
            },
            score_name="log of how many times larger the largest margin is than the other classes' median",
            evidence=(
                Table(
                    title="Largest margin by class",
                    columns=("class", "largest margin", "times larger than the others' median"),
                    rows=tuple(
                        (classes[t], round(float(margins[t]), 3), _rounded(float(np.exp(score[t]))))
                        for t in np.argsort(-margins).tolist()
                    ),
                ),
                Table(
                    title="Published statistic",
                    columns=("statistic", "value"),
                    rows=(("gamma order-statistic p-value (MM-BD)", published),),
                ),
            ),
        )
