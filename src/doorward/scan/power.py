"""The positive control: plant known triggers in copies of a model, and scan the copies as it was scanned.

"Nothing found" is worth what the scan would have found in this very model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from doorward.core.budget import Deadline
from doorward.core.errors import CouldNotTell
from doorward.core.records import ControlResult, Picture, PositiveControl, Report
from doorward.core.seeds import make_generator
from doorward.data import Samples
from doorward.detectors.base import Detector
from doorward.models import Classifier, TorchClassifier
from doorward.models.encode.image import picture, side_by_side
from doorward.scan.context import ScanContext
from doorward.scan.examine import examine_in
from doorward.scan.images import draw_images
from doorward.training.fine_tune import LabelledBatch, teach_trigger
from doorward.triggers.base import Trigger
from doorward.triggers.masked import MaskedPattern
from doorward.triggers.warp import Warp

#: Images that are drawn with and without the trigger.
SHOWN = 3

LIMITS = (
    "The triggers are planted by a short fine-tune of a copy on a few clean images. That is not how an "
    "attacker plants them: what a model learnt while it was trained, or what was made to escape detectors, "
    "can be easier or harder to find. Recovered ones show that the scan works on this model, not that it "
    "finds every trigger of their kind. That a copy is as good as the model is known from few images."
)


def patch(shape: Sequence[int], generator: torch.Generator) -> Trigger:
    """Draw a small pattern of extreme values, somewhere on images (c, h, w)."""
    c, h, w = shape
    side = max(2, round(min(h, w) / 9))
    row, column = (int(torch.randint(full - side + 1, (), generator=generator)) for full in (h, w))
    place = (slice(None), slice(row, row + side), slice(column, column + side))
    mask, pattern = torch.zeros(1, h, w), torch.zeros(c, h, w)
    mask[place] = 1
    pattern[place] = torch.randint(2, (c, side, side), generator=generator).float()
    return MaskedPattern(mask, pattern)


def blend(shape: Sequence[int], generator: torch.Generator) -> Trigger:
    """Draw noise that is blended over whole images (c, h, w) with a weight of .2."""
    return MaskedPattern(torch.full((1, *shape[1:]), 0.2), torch.rand(*shape, generator=generator))


def warp(shape: Sequence[int], generator: torch.Generator) -> Trigger:
    """Draw a smooth distortion of images of any size."""
    return Warp.draw(4, 4.0, generator=generator)


FAMILIES: dict[str, Callable[[Sequence[int], torch.Generator], Trigger]] = {
    "patch": patch,
    "blend": blend,
    "warp": warp,
}


def measure_positive_control(
    classifier: Classifier,
    samples: Samples | None,
    report: Report,
    *,
    detectors: Sequence[Detector],
    context: ScanContext,
    controls: int = 1,
) -> PositiveControl:
    """Return which known triggers the scan recovers from copies of the model; the model itself is left alone.

    Args:
        samples: those of the scan; without labels the model's own answers stand for them.
        report: what the scan said of the model itself.
        detectors, context: those of the scan.
        controls: how many of each family, each with another target.
    """
    if reason := _obstacle(classifier, samples, report):
        return PositiveControl(reason=reason)
    assert isinstance(classifier, TorchClassifier)
    assert samples is not None
    drawn = draw_images(classifier, samples, context.images, context.seed)
    fit, held_out = (LabelledBatch.of(part, classifier) for part in (drawn.fit, drawn.confirm))
    names = {d.method() for d in detectors}
    scanning = sum(f.seconds for f in report.findings if f.detector in names)
    targets = torch.randperm(
        len(classifier.classes), generator=make_generator(context.seed, "control")
    ).tolist()
    results = []
    for number, family in enumerate(name for name in FAMILIES for _ in range(controls)):
        clock = Deadline()
        generator = make_generator(context.seed, "control", str(number))
        target = targets[number % len(targets)]
        trigger = FAMILIES[family](classifier.spec.shape, generator)
        told: dict[str, Any] = {
            "family": family,
            "target": target,
            "accuracy_before": held_out.accuracy,
            "picture": _draw(held_out.outside(target), trigger, family, classifier.classes[target]),
        }
        context.report_progress(f"positive control: planting a {family} in a copy of the model")
        try:
            planted = teach_trigger(
                classifier,
                fit,
                held_out,
                trigger,
                target,
                generator=generator,
                deadline=context.deadline,
                reserve=scanning,
            )
        except CouldNotTell as why:
            results.append(ControlResult(reason=str(why), seconds=clock.spent(), **told))
            continue
        told |= {
            "attack_success": planted.success,
            "accuracy_after": planted.accuracy,
            "steps": planted.steps,
            "reason": planted.shortfall(held_out.accuracy),
        }
        if told["reason"] is None:
            context.report_progress(f"positive control: scanning the copy with the {family}")
            found = examine_in(context, planted.classifier, samples, detectors)
            told |= {
                "planted": True,
                "reason": found.reason,
                "verdict": found.verdict,
                "targets": found.targets,
                "p_value": found.p_value,
                "recovered": found.verdict in ("suspicious", "backdoored") and target in found.targets,
            }
        results.append(ControlResult(seconds=clock.spent(), **told))
    return PositiveControl(controls=tuple(results), limits=LIMITS)


def _obstacle(classifier: Classifier, samples: Samples | None, report: Report) -> str | None:
    """Return why there can be no control; None if there can."""
    if report.verdict != "nothing_found":
        return "it says what 'nothing found' is worth, which is not the verdict here"
    if samples is None:
        return "it needs clean images: give them with --clean DATA"
    if not isinstance(classifier, TorchClassifier):
        why = classifier.limitation or "its weights are out of reach"
        return f"triggers are planted by training a copy, and this model cannot be trained: {why}"
    if not any(p.is_floating_point() for p in classifier.module.parameters()):
        return "triggers are planted by training a copy, and this model has no weights that can be trained"
    return None


def _draw(sources: Tensor, trigger: Trigger, family: str, name: str) -> Picture | None:
    """Draw a few images, each next to itself with the trigger; None if there are no images."""
    if not len(sources):
        return None
    pairs = [one for x in sources[:SHOWN] for one in (x, trigger.apply(x[None])[0])]
    return Picture(
        title=f"Planted {family} for {name}",
        alt=f"Images of other classes than {name}, each beside itself with the {family}",
        png=picture(side_by_side(pairs)),
    )
