"""Recovered triggers, tried on images that were kept back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from doorward.core.errors import InputError
from doorward.core.records import (
    Confirmation,
    Measurement,
    Picture,
    RecoveredTrigger,
    Report,
)
from doorward.models import Classifier
from doorward.models.batching import batched_logits
from doorward.models.classifier import to_levels
from doorward.models.encode.image import picture, side_by_side, to_float, to_tensor
from doorward.scan.images import ImageSplit
from doorward.stats import metrics
from doorward.triggers.base import Trigger

#: Images that are drawn with and without a trigger.
PICTURES = 6
#: How many images with a trigger go through one at a time, to see whether that makes a difference.
ALONE = 8
#: A trigger that changes no pixel of a grey image by more than this is drawn on a grid of so many lines.
SEEN, GRID = 0.02, 9


@dataclass(frozen=True)
class TriedTrigger:
    """What a recovered trigger did to images that were kept back.

    Attributes:
        images, before: the first of those outside the target class, (n, c, h, w), and what the model sees in
            them, (n,).
        triggered, after: the same with the trigger.
    """

    confirmation: Confirmation
    trigger: Trigger
    images: torch.Tensor
    before: torch.Tensor
    triggered: torch.Tensor
    after: torch.Tensor


def confirm(
    measurements: Sequence[Measurement], classifier: Classifier, evidence: ImageSplit
) -> list[TriedTrigger]:
    """Try all recovered triggers on the images that were kept back, sent as users would: rounded to 8 bits.

    A few go through one at a time as well. If any is answered otherwise than among others, all do.
    """
    recovered = [(m, e) for m in measurements for e in m.evidence if isinstance(e, RecoveredTrigger)]
    if not recovered or not len(evidence.confirm):
        return []
    images = to_float(to_tensor(evidence.confirm, classifier.spec))  # (n, c, h, w)
    before = batched_logits(classifier, images).argmax(1).cpu()
    labels = evidence.confirm.labels
    tried = []
    for measurement, item in recovered:
        trigger, target = Trigger.from_json(item.trigger), item.target
        outside = before != target
        if labels is not None:
            outside &= torch.from_numpy(labels) != target
        triggered = to_levels(trigger.apply(images[outside]))
        after = _answers(classifier, triggered)
        success = metrics.rate(int((after == target).sum()), int(outside.sum()))
        confirmation = Confirmation(target=target, detector=measurement.detector, success=success)
        # a copy of the few that are drawn: all of them, for every trigger, would fill the memory
        drawn = [one[:PICTURES].clone() for one in (images[outside], before[outside], triggered, after)]
        tried.append(TriedTrigger(confirmation, trigger, *drawn))
    return tried


def _answers(classifier: Classifier, images: torch.Tensor) -> torch.Tensor:
    """Return the class (n,) that users see for each image (n, c, h, w)."""
    together = batched_logits(classifier, images).argmax(1).cpu()
    some = images[:ALONE]
    if classifier.singly or torch.equal(_alone(classifier, some, together[:ALONE]), together[:ALONE]):
        return together
    return _alone(classifier, images, together)


def _alone(classifier: Classifier, images: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    """Return the class (n,) of each image on its own; `otherwise` where the model takes no single image."""
    try:
        return torch.cat([batched_logits(classifier, one).argmax(1).cpu() for one in torch.split(images, 1)])
    except InputError:
        return otherwise


def illustrate(report: Report, classifier: Classifier, trials: Sequence[TriedTrigger]) -> Report:
    """Draw the triggers of the classes that a finding names, or of its first one, and drop the others."""
    findings = []
    for finding in report.findings:
        own = [t for t in trials if t.confirmation.detector == finding.detector]
        named = [t for t in own if t.confirmation.target in finding.targets] or own[:1]
        targets = {t.confirmation.target for t in named}
        kept = [e for e in finding.evidence if not isinstance(e, RecoveredTrigger) or e.target in targets]
        pictures = [one for t in named for one in _pictures(t, classifier.classes, flagged=finding.flagged)]
        findings.append(
            finding.model_copy(update={"evidence": (*pictures, *(kept if own else finding.evidence))})
        )
    return report.model_copy(update={"findings": tuple(findings)})


def _pictures(tried: TriedTrigger, classes: tuple[str, ...], *, flagged: bool) -> list[Picture]:
    """Draw a trigger alone, and each image without and with it, under what the model answers to both.

    Args:
        flagged: whether its detector raises an alarm; without one it is not called a trigger.
    """
    name = classes[tried.confirmation.target]
    title = f"Recovered trigger for {name}" if flagged else f"Strongest pattern towards {name}, no alarm"
    drawn = [
        Picture(
            title=title,
            alt=f"A pattern, alone, that was fitted to lead to class {name}",
            png=picture(tried.trigger.apply(_ground(tried))[0]),
            role="trigger",
        )
    ]
    for image, changed, before, after in zip(
        tried.images, tried.triggered, tried.before, tried.after, strict=True
    ):
        seen, then = classes[int(before)], classes[int(after)]
        drawn.append(
            Picture(
                title=f"{seen} \N{RIGHTWARDS ARROW} {then}",
                alt=f"An image that the model answers with {seen}, and the same image with the pattern: "
                f"it answers {then}",
                png=picture(side_by_side([image, changed])),
                role="example",
            )
        )
    return drawn


def _ground(tried: TriedTrigger) -> torch.Tensor:
    """Return what a trigger is drawn on (1, c, h, w): grey, or a grid where it only moves what is there."""
    grey = torch.full_like(tried.images[:1], 0.5)
    if (tried.trigger.apply(grey) - grey).abs().max() > SEEN:
        return grey
    grid = grey.clone()
    step = max(2, grid.shape[2] // GRID)
    grid[:, :, ::step] = grid[:, :, :, ::step] = 0.9
    return grid
