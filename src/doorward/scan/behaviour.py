"""Examine a classifier's behaviour: draw the images, run the detectors, try what they recovered.

What is seen is kept apart from what is concluded (`doorward.scan.verdict`), which costs nothing and can be
done again from the record alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats

from doorward.core.errors import CouldNotTell
from doorward.core.memory import default_memory
from doorward.core.records import (
    Finding,
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
from doorward.models.output_check import check_logits
from doorward.models.preparation import prepared
from doorward.scan.confirmation import TriedTrigger, confirm
from doorward.scan.context import ScanContext
from doorward.scan.environment import environment
from doorward.scan.images import ImageSplit, affordable, draw_images, unmatched_note, with_other_classes
from doorward.scan.plan import MEASURED
from doorward.scan.preprocessing import TRIED, better_fit, passes
from doorward.scan.saturation import unless_saturated
from doorward.scan.schedule import run_in_time
from doorward.stats import metrics

#: Clean accuracy must be above chance at this level, else nothing is judged.
CHANCE_LEVEL = 0.05
#: How many recovered triggers of a detector are tried out, about.
TRIED_OUT = 3
#: Share of the time in which preprocessings are compared, and images below which that says nothing.
TRYING, FEWEST_TRIED = 0.1, 20


def choose(
    names: Sequence[str],
    *,
    strict_files: bool = False,
    clean: bool = True,
    settings: Sequence[str] = (),
) -> list[Detector]:
    """Return the named detectors, or all that examine models, the cheap and safe ones first.

    Args:
        clean: whether there are clean images; those that stand in for them are left out then, unless named.
        settings: of the named ones, each as DETECTOR.NAME=VALUE.
        strict_files: for those that take the setting: files that loading never opens count as well.
    """
    detectors = []
    for name in dict.fromkeys(names or registry.modules("detector")):
        cls = registry.get("detector", name)
        if not names and cls.level == "input":
            continue  # it filters inputs and says nothing of a model
        if not names and clean and "clean" in cls.stands_in_for:
            continue
        strict = strict_files and "strict_files" in cls.model_fields
        own = _settings_for(name, settings)
        detectors.append(registry.build("detector", name, {"strict_files": True} | own if strict else own))
    return sorted(detectors, key=lambda d: (d.order, d.method()))


def _settings_for(name: str, settings: Sequence[str]) -> dict[str, Any]:
    """Return the settings among DETECTOR.NAME=VALUE that are a detector's."""
    own: dict[str, Any] = {}
    for one in settings:
        place, _, value = one.partition("=")
        detector, _, field = place.rpartition(".")
        if detector == name:
            try:
                own[field.replace("-", "_")] = json.loads(value)
            except ValueError:
                own[field.replace("-", "_")] = value
    return own


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
    with _limited(classifier, context.memory):
        return _observe(classifier, samples, detectors, context, role)


@contextmanager
def _limited(classifier: Classifier, memory: int | None) -> Iterator[None]:
    """Let a classifier take no more than some bytes inside the block, or than is usual."""
    before = classifier.memory
    classifier.memory = default_memory() if memory is None else memory
    try:
        yield
    finally:
        classifier.memory = before


def _observe(
    classifier: Classifier,
    samples: Samples | None,
    detectors: Sequence[Detector],
    context: ScanContext,
    role: Literal["clean", "train"],
) -> Observed:
    seen = _Seen()
    images = None if samples is None else _drawn(seen, classifier, samples, context)
    if len(classifier.classes) < 2:
        seen.reason = f"the model has {len(classifier.classes)} class; a backdoor needs at least two"
    else:
        context.report_progress("measuring clean accuracy" if images else "trying the model")
        _check(seen, classifier, images, context)
    subject = Subject(classifier=classifier, clean=images.fit if images else None, seed=context.seed)
    if seen.reason is not None:
        for detector in detectors:
            seen.not_run.append(NotRun(detector=detector.method(), reason=seen.reason))
    else:
        pixels = None if images is None else decoded(images, classifier)
        with prepared(classifier, pixels) as preparation:
            seen.warnings += [f"the model is searched with care: {note}" for note in preparation.notes]
            seen.reason = preparation.consistency.reason
            runnable = _allowed(seen, detectors, subject, blocked=preparation.reason)
            if runnable:
                timed_on = _timed_on(classifier, pixels, context)
                afterwards = TRIED_OUT * len(runnable) * (len(images.confirm) if images else 0)
                ran = run_in_time(runnable, subject, context, timed_on, afterwards=afterwards)
                seen.findings = [_without_part(one) for one in ran.measurements if isinstance(one, Finding)]
                seen.warnings += [f"{one.detector}: {one.reason}" for one in seen.findings if one.reason]
                measured = [one for one in ran.measurements if not isinstance(one, Finding)]
                seen.measurements = [unless_saturated(one) for one in measured]
                seen.reason = seen.reason or ran.reason
                seen.not_run += ran.not_run
                seen.left_out += ran.notes
            if images is not None:
                seen.trials = confirm([*seen.findings, *seen.measurements], classifier, images)
    return Observed(
        Observations(
            subject=subject_record(classifier, accuracy=seen.accuracy),
            data=(images.record(role),) if images else (),
            reason=seen.reason,
            warnings=tuple(
                dict.fromkeys([*seen.left_out, *classifier.notes, *_told(samples), *seen.warnings])
            ),
            confirmations=tuple(trial.confirmation for trial in seen.trials),
            findings=tuple(seen.findings),
            measurements=tuple(seen.measurements),
            not_run=tuple(seen.not_run),
            seconds=context.deadline.spent(),
            environment=environment(context.device),
        ),
        tuple(seen.trials),
    )


def _drawn(seen: _Seen, classifier: Classifier, samples: Samples, context: ScanContext) -> ImageSplit:
    """Draw the images asked for, or as many as the time allows; what is to be told goes into `seen`."""
    images = draw_images(classifier, samples, context.images, context.seed)
    total = len(images.fit) + len(images.confirm)
    fitting = affordable(classifier, images, context.deadline)
    if note := unmatched_note(samples, classifier):
        seen.warnings.append(note)
    if fitting < total:
        seen.left_out.append(f"{fitting} of {total} images were used, so that the scan ends in time")
        images = draw_images(classifier, samples, fitting, context.seed)
    images, note = with_other_classes(classifier, images, context.seed, context.deadline)
    if note is not None:
        seen.left_out.append(note)
    return images


def _without_part(finding: Finding) -> Finding:
    """Return what a detector of graphs found; a graph that it cannot read says nothing of the behaviour."""
    if finding.reason is None:
        return finding
    return finding.model_copy(update={"uncalibrated": "a graph that is not read says nothing"})


@dataclass
class _Seen:
    """What has been seen so far.

    Attributes:
        findings: of detectors that read the network's graph and judge it themselves.
        left_out: what did not run, or not in full, for lack of time; a report says that first.
    """

    accuracy: Rate | None = None
    reason: str | None = None
    left_out: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    not_run: list[NotRun] = field(default_factory=list)
    trials: list[TriedTrigger] = field(default_factory=list)


def _allowed(
    seen: _Seen, detectors: Sequence[Detector], subject: Subject, *, blocked: str | None
) -> list[Detector]:
    """Return the detectors that the subject's evidence allows; why the others do not run goes into `seen`.

    Args:
        blocked: why a search by gradients would say nothing of this model.
    """
    assert subject.classifier is not None
    allowed = []
    for detector in detectors:
        name, missing = detector.method(), detector.missing(subject)
        if missing:
            seen.not_run.append(NotRun(detector=name, reason=_why_missing(missing, subject.classifier)))
        elif blocked is not None and "gradients" in detector.needs:
            seen.not_run.append(NotRun(detector=name, reason=blocked))
            seen.reason = blocked
        else:
            allowed.append(detector)
    return allowed


def _timed_on(classifier: Classifier, images: torch.Tensor | None, context: ScanContext) -> torch.Tensor:
    """Return images on which the model's pace is measured: some of those given, or noise."""
    return _noise(classifier, context) if images is None else images[:MEASURED]


def _noise(classifier: Classifier, context: ScanContext) -> torch.Tensor:
    generator = torch.Generator().manual_seed(derive_seed(context.seed, "noise"))
    return torch.rand(8, *classifier.spec.shape, generator=generator)


def decoded(images: ImageSplit, classifier: Classifier) -> torch.Tensor:
    """Return all images of a split, (n, c, h, w) in [0, 1]: those to fit, then those to confirm on."""
    parts = [part for part in (images.fit, images.confirm) if len(part)]
    return to_float(torch.cat([to_tensor(part, classifier.spec) for part in parts]))


def _told(samples: Samples | None) -> tuple[str, ...]:
    """Return what was left out, shifted or guessed when the images were opened."""
    return getattr(samples.provenance, "notes", ()) if samples is not None else ()


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


def _check(seen: _Seen, classifier: Classifier, split: ImageSplit | None, context: ScanContext) -> None:
    """Measure the clean accuracy, and find out whether the model's behaviour can be judged at all."""
    if split is None:
        images, labels = _noise(classifier, context), None
    else:
        images = decoded(split, classifier)
        known = [part.labels for part in (split.fit, split.confirm) if len(part) and part.labels is not None]
        labels = np.concatenate(known) if known else None
    begun = context.deadline.spent()
    try:
        logits = batched_logits(classifier, images, context.deadline, raw=True)
    except CouldNotTell as why:
        seen.reason = f"{why}, or fewer --images"
        return
    seen.reason = check_logits(logits).reason
    if seen.reason is None and labels is not None:
        seen.accuracy, seen.reason = _accuracy(classifier, logits.argmax(1).cpu().numpy(), labels)
    if split is not None:
        seconds = (context.deadline.spent() - begun) / len(images)
        _compare_preprocessing(seen, classifier, images, labels, seconds, context)


def _compare_preprocessing(
    seen: _Seen,
    classifier: Classifier,
    images: torch.Tensor,
    labels: npt.NDArray[np.int64] | None,
    seconds: float,
    context: ScanContext,
) -> None:
    """Try the usual preprocessings on as many images as a tenth of the time allows.

    Args:
        seconds: that an image takes through the model.
    """
    needed = seconds * passes(classifier, labelled=labels is not None)
    allowed = TRYING * context.deadline.left()
    tried = TRIED if needed * TRIED <= allowed else int(allowed / needed)
    if tried < FEWEST_TRIED:
        seen.warnings.append("the assumed preprocessing was not compared with others, for lack of time")
        return
    known = None if labels is None else torch.from_numpy(labels)
    better = better_fit(classifier, images, known, tried=tried)
    if better is not None:
        seen.reason = better.reason


def _accuracy(
    classifier: Classifier, predicted: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]
) -> tuple[Rate, str | None]:
    """Return the clean accuracy, and why it says that nothing can be judged (None if it does not)."""
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
    if "inputs" in missing:
        return "it filters inputs, of which a scan has none: use `doorward guard`"
    return f"needs {', '.join(sorted(missing))}, which were not given"
