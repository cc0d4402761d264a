"""Scan a model: choose detectors by the evidence at hand, run them, and conclude one verdict."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from doorward.artifacts import Examination, examine
from doorward.core.budget import Deadline
from doorward.core.devices import check_device
from doorward.core.errors import CouldNotTell, UnsafeArtifact
from doorward.core.memory import GIB
from doorward.core.records import (
    DataRecord,
    Finding,
    NotRun,
    Observations,
    PositiveControl,
    Report,
    SubjectRecord,
)
from doorward.core.seeds import derive_seed
from doorward.data import Samples, open_samples
from doorward.detectors.base import Detector
from doorward.detectors.subject import Subject
from doorward.models import Classifier, open_classifier
from doorward.models.encode.dispatch import NOUNS
from doorward.models.errors import NotExamined
from doorward.models.formats.loading import artifact_digest, locate
from doorward.scan.behaviour import choose, subject_record
from doorward.scan.calibration import CalibrationSet
from doorward.scan.context import Progress, ScanContext, say_nothing
from doorward.scan.environment import environment
from doorward.scan.examine import examine_in
from doorward.scan.images import match_labels
from doorward.scan.power import measure_positive_control
from doorward.scan.request import ScanRequest
from doorward.scan.verdict import conclude
from doorward.training import evaluate

#: The kind of input whose models are examined for how they behave; of others only the files are.
EXAMINED = "image"


def scan(request: ScanRequest, *, progress: Progress | None = None) -> Report:
    """Scan a model from its file and return the report.

    The files are examined before anything is loaded; what would execute code is reported and not loaded.

    Raises:
        InputError: if something is missing, unreadable or does not fit.
    """
    context = ScanContext(
        seed=request.seed,
        device=request.device,
        deadline=Deadline(request.time_budget),
        images=request.images,
        memory=None if request.memory is None else int(request.memory * GIB),
        report_progress=progress or say_nothing,
    )
    check_device(request.device)
    chosen = choose(request.detectors, strict_files=request.strict_files)
    path = Path(request.weights or request.model) if request.factory else locate(request.model)
    examination = _read_files(path, context)
    findings = _examine_files(path, chosen, examination, context)
    behavioural = [d for d in chosen if d.method() not in {f.detector for f in findings}]
    control = PositiveControl()
    if any(f.verdict == "unsafe" for f in findings):
        report = _not_loaded(findings, behavioural, context)
    else:
        try:
            report, control = _examine_behaviour(request, examination, findings, behavioural, context)
        except UnsafeArtifact as refusal:
            if refusal.finding is None:
                raise
            report = _not_loaded((*findings, refusal.finding), behavioural, context)
        except NotExamined as why:
            report = _files_alone(findings, behavioural, str(why), context)
    subject = report.subject or SubjectRecord(path=request.model, format="not loaded")
    named = {"path": request.model, **artifact_digest(path)._asdict()}
    return report.model_copy(
        update={
            "subject": subject.model_copy(update=named),
            "positive_control": control,
            "request": request.to_json(),
            "seconds": context.deadline.spent(),
        }
    )


def _read_files(path: Path, context: ScanContext) -> Examination | None:
    """Return what opening the files at a path would run: read once, for the detector and for the loader.

    Returns:
        None where there are none, they cannot be read, or the time was over before all were.
    """
    if not path.exists():
        return None
    context.report_progress("looking at the files")
    try:
        found = examine(path, deadline=context.deadline)
    except CouldNotTell:
        return None
    return found if context.deadline.left() > 0 else None


def _examine_files(
    path: Path, detectors: list[Detector], examination: Examination | None, context: ScanContext
) -> tuple[Finding, ...]:
    """Return what detectors find in the files at a path, nothing where there are none."""
    if not path.exists():
        return ()
    files = Subject(artifact=path, examination=examination)
    findings = []
    for detector in detectors:
        if detector.needs <= files.offers:
            context.report_progress(f"{detector.method()}: looking at the files")
            found = detector(files, seed=context.seed, deadline=context.deadline)
            assert isinstance(found, Finding), f"{detector.method()} reads files and gives no verdict"
            findings.append(found)
    return tuple(findings)


def _not_loaded(findings: tuple[Finding, ...], behavioural: list[Detector], context: ScanContext) -> Report:
    """Report on a model that was not loaded, since that would execute code."""
    reason = "the model was not loaded, because loading it would execute code"
    seen = Observations(
        subject=None,
        findings=findings,
        not_run=tuple(NotRun(detector=d.method(), reason=reason) for d in behavioural),
        environment=environment(context.device),
    )
    return conclude(seen, CalibrationSet.of(()))


def _files_alone(
    findings: tuple[Finding, ...], behavioural: list[Detector], why: str, context: ScanContext
) -> Report:
    """Report on a model of which the files alone can be examined."""
    seen = Observations(
        subject=None,
        findings=findings,
        not_run=tuple(
            NotRun(detector=d.method(), reason="its behaviour is not examined") for d in behavioural
        ),
        reason=why,
        environment=environment(context.device),
    )
    return conclude(seen, CalibrationSet.of(()))


def _examine_behaviour(
    request: ScanRequest,
    examination: Examination | None,
    findings: tuple[Finding, ...],
    detectors: list[Detector],
    context: ScanContext,
) -> tuple[Report, PositiveControl]:
    """Load the model and its data, and examine how it behaves.

    Raises:
        InputError: if something is missing, unreadable or does not fit.
        UnsafeArtifact: if loading the model would execute code after all.
    """
    context.report_progress("loading the model")
    classifier = open_classifier(
        request.model,
        options=request.options,
        factory=request.factory,
        weights=Path(request.weights) if request.weights else None,
        device=request.device,
        examination=examination,
    )
    source = request.train if request.clean is None else request.clean
    samples = None
    if source is not None:
        context.report_progress("opening the data")
        samples = open_samples(source, column=request.data_column, label_column=request.label_column)
    if classifier.spec.modality != EXAMINED:
        context.report_progress("measuring clean accuracy")
        report = _unexamined(request, classifier, samples, findings, detectors, context)
        why = f"triggers are planted in models of {NOUNS[EXAMINED]} alone"
        return report, PositiveControl(reason=why) if request.control else PositiveControl()
    report = examine_in(
        context,
        classifier,
        samples,
        detectors,
        role="clean" if request.clean else "train",
        findings=findings,
    )
    if not request.control:
        return report, PositiveControl()
    return report, measure_positive_control(classifier, samples, report, detectors=detectors, context=context)


def _unexamined(
    request: ScanRequest,
    classifier: Classifier,
    samples: Samples | None,
    findings: tuple[Finding, ...],
    detectors: list[Detector],
    context: ScanContext,
) -> Report:
    """Report on a model whose behaviour no detector can examine: its files and its clean accuracy.

    Raises:
        InputError: if the samples do not fit the model.
    """
    takes, works = NOUNS[classifier.spec.modality], NOUNS[EXAMINED]
    accuracy = None
    data: tuple[DataRecord, ...] = ()
    if samples is not None:
        rng = np.random.default_rng(derive_seed(request.seed, "images"))
        drawn = match_labels(samples, classifier).draw(min(request.images, len(samples)), rng)
        if drawn.labels is not None:
            accuracy = evaluate(classifier, drawn)
        origin = samples.provenance
        data = (
            DataRecord(
                role="clean" if request.clean else "train",
                path=origin.path,
                sha256=origin.sha256,
                rows=origin.rows,
                used=len(drawn),
                labelled=drawn.labels is not None,
            ),
        )
    reason = f"it looks for triggers in {works}, and this model takes {takes}"
    seen = Observations(
        subject=subject_record(classifier, accuracy=accuracy),
        data=data,
        findings=findings,
        not_run=tuple(NotRun(detector=d.method(), reason=reason) for d in detectors),
        reason=f"only the files were examined: the detectors of backdoors look for triggers in {works}, and "
        f"this model takes {takes}",
        environment=environment(context.device),
    )
    return conclude(seen, CalibrationSet.of(()))
