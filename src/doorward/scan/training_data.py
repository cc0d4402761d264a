"""Inspect training data: run the detectors of poison, judge what they measured, and join it to a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from doorward.core.errors import CouldNotTell, InputError
from doorward.core.formatting import joined
from doorward.core.records import (
    SEVERITY,
    DataRecord,
    Finding,
    FlaggedSample,
    NotRun,
    Observations,
    Picture,
    Report,
    Verdict,
)
from doorward.data import Samples
from doorward.detectors.base import Detector
from doorward.detectors.subject import Subject
from doorward.models import Classifier, TorchClassifier, networks
from doorward.models.formats.native import save_native
from doorward.scan.behaviour import subject_record
from doorward.scan.calibration import calibrations
from doorward.scan.context import ScanContext
from doorward.scan.environment import environment
from doorward.scan.exhibits import exhibits
from doorward.scan.images import match_labels
from doorward.scan.poison import judge_samples, verdict_on
from doorward.training import TrainingProgress, default_settings, measure_spec, train_classifier

#: Samples that go through in the training of a model, and how often each does at least: few enough to be
#: quick, and enough for poison which is rare to be learnt.
SEEN, LEAST_EPOCHS = 60_000, 5


@dataclass(frozen=True)
class Inspection:
    """What was found in a training set.

    Attributes:
        samples: the set, with the model's class numbers.
        findings: of the detectors that ran.
        verdict: of them all.
        reason: why they could not tell, if so.
    """

    samples: Samples
    findings: tuple[Finding, ...]
    not_run: tuple[NotRun, ...]
    verdict: Verdict
    reason: str | None

    @property
    def flagged(self) -> frozenset[str]:
        """Return the ids of the samples that are flagged."""
        return frozenset(one for finding in self.findings for one in finding.flagged_ids)


def looks_at_training_data(detector: Detector) -> bool:
    """Return whether a detector looks for poison in training data."""
    return "train" in detector.needs


def inspect(
    classifier: Classifier,
    train: Samples,
    detectors: Sequence[Detector],
    context: ScanContext,
    *,
    clean: Samples | None = None,
) -> Inspection:
    """Look for poison in the training set of a classifier.

    Args:
        train: labelled, as `labelled_for` returns it.
        clean: samples that are trusted, where there are any.
    """
    seen = observe_training_data(classifier, train, detectors, context, clean=clean)
    findings = tuple(
        judge_samples(one, calibrations([one.detector]), modality=classifier.spec.modality)
        for one in seen.measurements
    )
    rows = {value: row for row, value in enumerate(train.ids)} if any(f.flagged for f in findings) else {}
    findings = tuple(_shown(finding, train, rows, classifier) for finding in findings)
    verdict, reason = verdict_on(findings, seen.not_run)
    return Inspection(train, findings, seen.not_run, verdict, reason)


def observe_training_data(
    classifier: Classifier,
    train: Samples,
    detectors: Sequence[Detector],
    context: ScanContext,
    *,
    clean: Samples | None = None,
) -> Observations:
    """Run the detectors on the training set of a classifier; conclude nothing."""
    subject = Subject(classifier=classifier, train=train, clean=clean)
    measured, not_run = [], []
    for detector in detectors:
        missing = detector.missing(subject)
        if missing:
            why = classifier.limitation or f"not reachable in this {classifier.format} model"
            reason = f"needs {joined(sorted(missing))}: {why}"
            not_run.append(NotRun(detector=detector.method(), reason=reason))
            continue
        context.report_progress(f"{detector.method()}: {detector.title}")
        measured.append(
            detector(subject, seed=context.seed, device=context.device, deadline=context.deadline)
        )
    return Observations(
        subject=subject_record(classifier),
        data=(data_record(train),),
        measurements=tuple(measured),
        not_run=tuple(not_run),
        seconds=context.deadline.spent(),
        environment=environment(context.device),
    )


def labelled_for(classifier: Classifier, train: Samples) -> Samples:
    """Return the training samples with the model's class numbers.

    Raises:
        InputError: if they have no labels, or not the model's, or are of one class.
    """
    check_training_set(train)
    return match_labels(train, classifier)


def check_training_set(train: Samples) -> None:
    """Raise unless there are samples of two classes at least.

    Raises:
        InputError: saying what is missing.
    """
    where = train.provenance.path
    if train.labels is None:
        raise InputError(
            f"{where} has no labels, and poison is a matter of labels: give labelled training data, or name "
            "the column of the labels with --label-column"
        )
    if not len(train):
        raise InputError(f"{where} holds no samples")
    present = np.unique(train.labels)
    if len(present) < 2:
        raise InputError(
            f"{where} has one class only, {train.classes[int(present[0])]!r}; two are needed at least"
        )


def _shown(finding: Finding, train: Samples, rows: dict[str, int], classifier: Classifier) -> Finding:
    """Return a finding with what is to be told and shown of each flagged sample."""
    if not finding.flagged_ids:
        return finding
    assert train.labels is not None
    scores = finding.scores if isinstance(finding.scores, dict) else {}
    listed = tuple(
        FlaggedSample(
            id=one,
            row=rows[one],
            place=train.where(rows[one]),
            label=int(train.labels[rows[one]]),
            source=finding.sources.get(one),
            score=scores.get(one),
        )
        for one in finding.flagged_ids
    )
    # what the samples have in common is shown before the samples
    patterns = tuple(one for one in finding.evidence if isinstance(one, Picture))
    rest = tuple(one for one in finding.evidence if not isinstance(one, Picture))
    evidence = (*patterns, *exhibits(train, listed, classifier.classes), *rest)
    return finding.model_copy(update={"flagged_samples": listed, "evidence": evidence})


def join(report: Report, inspection: Inspection, *, model_examined: bool) -> Report:
    """Return the report on a model with what was found in its training data: one verdict over both.

    Args:
        model_examined: whether the report's own verdict is about the model's behaviour; else that on the data
            stands for both.
    """
    verdicts = [(inspection.verdict, inspection.reason)]
    if model_examined or SEVERITY[report.verdict] > SEVERITY["could_not_tell"]:
        verdicts.append((report.verdict, report.reason))
    verdict, reason = max(verdicts, key=lambda one: SEVERITY[one[0]])
    own = [f for f in inspection.findings if f.flagged]
    judged = [f for f in inspection.findings if f.threshold is not None]
    update: dict[str, object] = {
        "verdict": verdict,
        "reason": reason if verdict == "could_not_tell" else None,
        "warnings": tuple(dict.fromkeys([*report.warnings, *inspection.samples.provenance.notes])),
        "targets": tuple(dict.fromkeys([*report.targets, *(t for f in own for t in f.targets)])),
        "findings": (*report.findings, *inspection.findings),
        "not_run": (*report.not_run, *inspection.not_run),
        "covered": report.covered.model_copy(update={"training_data": tuple(f.detector for f in judged)}),
        "data": (*(one for one in report.data if one.role != "train"), data_record(inspection.samples)),
    }
    if report.p_value is None and judged:
        update |= {
            "p_value": judged[0].p_value,
            "calibrated": judged[0].calibrated,
            "uncalibrated": None
            if judged[0].calibrated
            else "how often a clean training set of this kind looks the same has not been measured",
        }
    return report.model_copy(update=update)


def data_record(samples: Samples) -> DataRecord:
    """Describe a training set of which all samples are inspected."""
    origin = samples.provenance
    return DataRecord(
        role="train",
        path=origin.path,
        sha256=origin.sha256,
        rows=origin.rows,
        used=len(samples),
        labelled=True,
    )


def train_on(
    samples: Samples, context: ScanContext, *, architecture: str | None = None, keep: Path | None = None
) -> TorchClassifier:
    """Return a model trained on a suspect set for long enough to learn poison that is rare.

    Args:
        keep: a folder to write the model to.

    Raises:
        CouldNotTell: if the time budget does not suffice.
        InputError: if the samples cannot be trained on.
        TrainingDiverged: if the loss is no longer finite.
    """
    spec = measure_spec(samples)
    name = architecture or networks.usual(spec)
    settings = default_settings(name, images=len(samples), side=min(spec.height, spec.width))
    enough = max(LEAST_EPOCHS, round(SEEN / len(samples)))
    if spec.modality == "image":  # what is usual for texts and recordings is little already
        settings = settings.model_copy(update={"epochs": min(enough, max(LEAST_EPOCHS, settings.epochs))})

    def told(now: TrainingProgress) -> None:
        if context.deadline.left() == 0:
            raise CouldNotTell(
                f"the time budget ended in epoch {now.epoch + 1} of {now.epochs} of training a model on the "
                "data; give more with --time-budget, or a MODEL that was trained on them"
            )
        if now.step % 20 == 0:
            share = round(100 * now.step / now.steps)
            context.report_progress(
                f"training {name} on the data: epoch {now.epoch + 1} of {now.epochs}, {share} %"
            )

    trained = train_classifier(
        name, samples, seed=context.seed, spec=spec, settings=settings, device=context.device, progress=told
    )
    if keep is not None:
        save_native(
            trained.classifier.module, architecture=name, spec=spec, classes=samples.classes, directory=keep
        )
    return trained.classifier
