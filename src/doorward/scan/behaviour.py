"""Examine a classifier's behaviour: draw the images, run the detectors, try what they recovered.

What is seen is kept apart from what is concluded (`doorward.scan.verdict`), which costs nothing and can be
done again from the record alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy import stats

from doorward.core.budget import Deadline
from doorward.core.errors import CouldNotTell
from doorward.core.records import (
    Measurement,
    NotRun,
    Observations,
    Rate,
    SubjectRecord,
)
from doorward.core.seeds import derive_seed
from doorward.data import Samples
from doorward.detectors.base import Detector
from doorward.detectors.subject import Subject
from doorward.methods import registry
from doorward.models import Classifier
from doorward.models.batching import batched_logits
from doorward.models.encode.image import to_float, to_tensor
from doorward.scan.confirmation import TriedTrigger, confirm
from doorward.scan.context import ScanContext
from doorward.scan.environment import environment
from doorward.scan.images import ImageSplit, draw_images
from doorward.stats import metrics

#: Clean accuracy must be above chance at this level, else nothing is judged.
CHANCE_LEVEL = 0.05


def choose(names: Sequence[str], *, strict_files: bool = False) -> list[Detector]:
    """Return the named detectors, or all, the cheap and safe ones first.

    Args:
        strict_files: for those that take the setting: files that loading never opens count as well.
    """
    detectors = []
    for name in dict.fromkeys(names or registry.modules("detector")):
        strict = strict_files and "strict_files" in registry.get("detector", name).model_fields
        detectors.append(registry.build("detector", name, {"strict_files": True} if strict else {}))
    return sorted(detectors, key=lambda d: (d.order, d.method()))


@dataclass(frozen=True)
class Observed:
    """What was seen of a classifier's behaviour, and what its pictures are drawn from."""

    observations: Observations
    trials: tuple[TriedTrigger, ...]


def observe(
    classifier: Classifier,
    samples: Samples | None,
    detectors: Sequence[Detector],
    context: ScanContext,
    *,
    role: Literal["clean", "train"] = "clean",
) -> Observed:
    """Examine a classifier's behaviour: run detectors, try what they recovered; conclude nothing.

    Args:
        samples: clean images, labelled or not; some detectors need none.
        role: of the samples, for the record.

    Raises:
        InputError: if the images or their labels do not fit the model.
    """
    images = None if samples is None else draw_images(classifier, samples, context.images, context.seed)
    accuracy = None
    reason = None
    if len(classifier.classes) < 2:
        reason = f"the model has {len(classifier.classes)} class; a backdoor needs at least two"
    else:
        context.report_progress("measuring clean accuracy" if images else "trying the model")
        accuracy, reason = _sanity(classifier, images, context.seed, context.deadline)
    measurements: list[Measurement] = []
    not_run: list[NotRun] = []
    subject = Subject(classifier=classifier, clean=images.fit if images else None)
    for detector in detectors:
        missing = detector.missing(subject)
        if reason is not None:
            not_run.append(NotRun(detector=detector.method(), reason=reason))
        elif missing:
            not_run.append(NotRun(detector=detector.method(), reason=_why_missing(missing, classifier)))
        else:
            context.report_progress(f"{detector.method()}: {detector.title}")
            measurements.append(
                detector(subject, seed=context.seed, device=context.device, deadline=context.deadline)
            )
    trials = confirm(measurements, classifier, images) if images and reason is None else []
    return Observed(
        Observations(
            subject=subject_record(classifier, accuracy=accuracy),
            data=(images.record(role),) if images else (),
            reason=reason,
            confirmations=tuple(trial.confirmation for trial in trials),
            measurements=tuple(measurements),
            not_run=tuple(not_run),
            seconds=context.deadline.spent(),
            environment=environment(context.device),
        ),
        tuple(trials),
    )


def subject_record(classifier: Classifier, *, accuracy: Rate | None = None) -> SubjectRecord:
    """Describe a model; where it lies is for the caller to add."""
    return SubjectRecord(
        path="<memory>",
        format=classifier.format,
        classes=classifier.classes,
        parameters=classifier.parameters,
        convolutions=classifier.convolutions,
        spec=classifier.spec.describe(),
        assumed=classifier.spec.assumed,
        architecture=classifier.architecture,
        clean_accuracy=accuracy,
    )


def _sanity(
    classifier: Classifier, evidence: ImageSplit | None, seed: int, deadline: Deadline
) -> tuple[Rate | None, str | None]:
    """Return the clean accuracy, and why the model's behaviour cannot be judged (None if it can)."""
    if evidence is None:
        generator = torch.Generator().manual_seed(derive_seed(seed, "noise"))
        images = torch.rand(8, *classifier.spec.shape, generator=generator)
        labels = None
    else:
        parts = [part for part in (evidence.fit, evidence.confirm) if len(part)]
        images = to_float(torch.cat([to_tensor(part, classifier.spec) for part in parts]))
        known = [part.labels for part in parts if part.labels is not None]
        labels = np.concatenate(known) if known else None
    try:
        logits = batched_logits(classifier, images, deadline)
    except CouldNotTell as why:
        return None, f"{why}, or fewer --images"
    if not bool(torch.isfinite(logits).all()):
        return None, "the model gives outputs that are not finite"
    if len(logits) > 1 and bool((logits - logits[:1]).abs().amax() <= 1e-6 * logits.abs().amax()):
        return None, "the model gives the same output for every image"
    if labels is None:
        return None, None
    predicted = logits.argmax(1).cpu().numpy()
    accuracy = metrics.rate(int((predicted == labels).sum()), len(labels))
    if len(np.unique(labels)) == 1 < len(labels):
        only = classifier.classes[int(labels[0])]
        return accuracy, f"all {len(labels)} images are of one class, {only!r}; give images of several"
    guess = max(1 / len(classifier.classes), np.bincount(labels).max() / len(labels))
    if stats.binomtest(accuracy.successes, accuracy.n, guess, alternative="greater").pvalue > CHANCE_LEVEL:
        return accuracy, (
            f"it is right on {accuracy.successes} of {accuracy.n} clean images, no better than chance. "
            "Is the preprocessing right (--input-range, --mean, --std, --layout), and are the labels its own?"
        )
    return accuracy, None


def _why_missing(missing: frozenset[str], classifier: Classifier) -> str:
    """Return what evidence a detector lacks and how to give it."""
    limitation = getattr(classifier, "limitation", None)
    if missing & {"gradients", "features", "weights", "graph"}:
        why = limitation or f"not reachable in this {classifier.format} model"
        return f"needs {', '.join(sorted(missing))}: {why}"
    if "clean" in missing:
        return "needs clean images: give them with --clean DATA"
    return f"needs {', '.join(sorted(missing))}, which were not given"
