"""Recovered triggers tried on a model as it came and mended, on samples that the repair has not seen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from doorward.core.records import Finding, Rate, RecoveredTrigger
from doorward.models import TorchClassifier
from doorward.models.batching import batched_logits
from doorward.repair.report import TriggerRecord
from doorward.stats import metrics
from doorward.triggers.base import Trigger

Named = tuple[str, RecoveredTrigger]


def named_triggers(findings: Sequence[Finding]) -> list[Named]:
    """Return the recovered triggers of the classes that findings name, each with its detector."""
    named = {target for f in findings if f.flagged for target in f.targets}
    return [
        (finding.detector, one)
        for finding in findings
        for one in finding.evidence
        if isinstance(one, RecoveredTrigger) and one.target in named
    ]


def try_triggers(
    triggers: Sequence[Named], before: TorchClassifier, after: TorchClassifier, images: Tensor, labels: Tensor
) -> tuple[TriggerRecord, ...]:
    """Return how often each trigger works before and after a repair.

    Args:
        images: (n, c, h, w) in [0, 1].
        labels: (n,) of the images.
    """
    return tuple(
        TriggerRecord(
            detector=detector,
            target=one.target,
            before=success(before, one, images, labels),
            after=success(after, one, images, labels),
        )
        for detector, one in triggers
    )


def success(classifier: TorchClassifier, recovered: RecoveredTrigger, images: Tensor, labels: Tensor) -> Rate:
    """Return how often a trigger leads images of other classes to its target.

    Images that the model puts there anyway are left out: they say nothing of the trigger.

    Args:
        images: (n, c, h, w) in [0, 1].
        labels: (n,) of the images.
    """
    others = images[labels != recovered.target]
    with torch.no_grad():
        elsewhere = batched_logits(classifier, others).argmax(1).cpu() != recovered.target
        others = others[elsewhere]
        triggered = Trigger.from_json(recovered.trigger).apply(others)
        given = batched_logits(classifier, triggered).argmax(1).cpu() if len(others) else torch.empty(0)
    return metrics.rate(int((given == recovered.target).sum()), len(others))
