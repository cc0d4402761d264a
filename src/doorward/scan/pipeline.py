"""Scan a model and its training data: choose detectors, run them, and conclude one verdict."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np

from doorward.artifacts import Examination, examine
from doorward.core.arguments import refuse_wrong, several
from doorward.core.budget import Deadline
from doorward.core.devices import check_device
from doorward.core.errors import CouldNotTell, InputError, TrainingDiverged, UnsafeArtifact
from doorward.core.formatting import did_you_mean
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
from doorward.data.readable import without_unreadable
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
from doorward.scan.examine import examine as examine_model
from doorward.scan.examine import examine_in
from doorward.scan.images import adopt_names, match_labels
from doorward.scan.power import measure_positive_control
from doorward.scan.request import ScanRequest
from doorward.scan.training_data import (
    Inspection,
    check_training_set,
    data_record,
    inspect,
    join,
    labelled_for,
    looks_at_training_data,
    train_on,
)
from doorward.scan.verdict import conclude
from doorward.training import evaluate

#: Splits of clean data, the best first.
SPLITS = ("test", "validation", "val", "train")
#: The kind of input whose models are examined for how they behave; of others only the files are.
EXAMINED = "image"


@dataclass(frozen=True)
class Scanned:
    """What a scan found.

    Attributes:
        inspection: of the training data, if there are any.
    """

    report: Report
    inspection: Inspection | None = None


def scan(
    request: Any = None,
    clean: Any = None,
    *,
    train: str | Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Report:
    """Scan a model from its file, its training data, or both, and return the report.

        report = scan("model.onnx", "images/")

    Args:
        request: what to scan in full, or the model alone: a path, or whatever `examine` takes.
        clean: clean images: a path, or whatever `examine` takes.
        train: the path of a training set.
        settings: further fields of a `ScanRequest`; of a model or images in memory, those of `examine`.

    Raises:
        InputError: if something is missing, unreadable, of a wrong type or does not fit.
    """
    if isinstance(request, ScanRequest):
        if clean is not None or train is not None or settings:
            raise InputError("scan: a ScanRequest says all; give nothing next to it but progress")
        return scan_in_full(request, progress=progress).report
    paths = (str, Path, type(None))
    in_files = isinstance(request, paths) and isinstance(clean, paths)
    known = (
        {one.name for one in fields(ScanRequest)} if in_files else set(signature(examine_model).parameters)
    )
    if strange := sorted(set(settings) - known):
        near = did_you_mean(strange[0], known) or f"; it takes {', '.join(sorted(known))}"
        raise InputError(f"scan: there is no argument {strange[0]!r}{near}")
    if not in_files:
        if train is not None:
            raise InputError("scan: train goes with a model that lies in a file")
        return examine_model(request, clean, progress=progress, **settings)
    for name, one in (("train", train), *settings.items()):
        if name in ("train", "factory", "weights", "keep_model") and not isinstance(one, paths):
            raise InputError(f"scan: {name}: expected a path, got {type(one).__name__}")
    refuse_wrong("scan", settings)
    if "detectors" in settings:
        settings["detectors"] = several("scan", "detectors", settings["detectors"])
    named: dict[str, Any] = {
        name: None if one is None else os.fspath(one)
        for name, one in (("model", request), ("clean", clean), ("train", train))
    }
    return scan_in_full(ScanRequest(**named, **settings), progress=progress).report


def scan_in_full(request: ScanRequest, *, progress: Progress | None = None) -> Scanned:
    """Scan a model from its file, its training data, or both.

    The files are examined before anything is loaded; what would execute code is reported and not loaded.
    Where no model is given, one is trained on the training data and these are inspected with it.

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
    chosen = _chosen(request)
    if request.model is None:
        return _scan_data(request, chosen, context)
    path = Path(request.weights or request.model) if request.factory else locate(request.model)
    examination = _read_files(path, context)
    findings = _examine_files(path, chosen, examination, context)
    behavioural = [d for d in chosen if d.method() not in {f.detector for f in findings}]
    control, inspection = PositiveControl(), None
    if any(f.verdict == "unsafe" for f in findings):
        report = _not_loaded(findings, behavioural, context)
    else:
        try:
            report, control, inspection = _examine_behaviour(
                request, examination, findings, behavioural, context
            )
        except UnsafeArtifact as refusal:
            if refusal.finding is None:
                raise
            report = _not_loaded((*findings, refusal.finding), behavioural, context)
        except NotExamined as why:
            report = _files_alone(findings, behavioural, str(why), context)
    subject = report.subject or SubjectRecord(path=request.model, format="not loaded")
    named = {"path": request.model, **artifact_digest(path)._asdict()}
    update = {"subject": subject.model_copy(update=named), "positive_control": control}
    return Scanned(_finished(report, request, context, **update), inspection)


def _finished(report: Report, request: ScanRequest, context: ScanContext, **update: object) -> Report:
    """Return a report with what was asked for and how long it took."""
    told = {"request": request.to_json(), "seconds": context.deadline.spent()}
    return report.model_copy(update={**update, **told})


def _chosen(request: ScanRequest) -> list[Detector]:
    """Return the detectors to run: those named, or all for which there is a model or training data."""
    # images of the training set serve where no clean ones are given
    images = request.clean is not None or request.train is not None
    chosen = choose(
        request.detectors, strict_files=request.strict_files, clean=images, settings=request.settings
    )
    if request.detectors:
        return chosen
    if request.model is None:
        return [d for d in chosen if looks_at_training_data(d)]
    return [d for d in chosen if request.train is not None or not looks_at_training_data(d)]


def _scan_data(request: ScanRequest, chosen: list[Detector], context: ScanContext) -> Scanned:
    """Train a model on training data and inspect them with it.

    Detectors of models run if they are named: the model is our own, made to see what is in the data.

    Raises:
        InputError: if the data are missing, unreadable or unfit.
    """
    if request.train is None:
        raise InputError("give a MODEL to scan, or training data with --train DATA, or both")
    context.report_progress("opening the data")
    train = _open(request, request.train, train=True)
    check_training_set(train)
    keep = Path(request.keep_model) if request.keep_model else None
    try:
        classifier = train_on(train, context, keep=keep)
    except (CouldNotTell, TrainingDiverged) as why:
        return Scanned(_finished(_untrained(train, chosen, str(why), context), request, context))
    files = [d for d in chosen if "artifact" in d.needs]
    report, _, inspection = _examine(
        request, classifier, None, train, (), [d for d in chosen if d not in files], context
    )
    notes = f"no model was given: a {classifier.architecture} was trained on the data to inspect them with"
    update = {
        "subject": subject_record(classifier).model_copy(
            update={"path": request.keep_model or f"(trained on {request.train})", "format": "trained here"}
        ),
        "warnings": (*report.warnings, notes),
        "not_run": (
            *report.not_run,
            *(NotRun(detector=d.method(), reason="needs the files of a model") for d in files),
        ),
    }
    return Scanned(_finished(report, request, context, **update), inspection)


def _untrained(train: Samples, chosen: list[Detector], reason: str, context: ScanContext) -> Report:
    """Report on training data on which no model could be trained."""
    seen = Observations(
        subject=None,
        data=(data_record(train),),
        not_run=tuple(NotRun(detector=d.method(), reason="there is no model to look with") for d in chosen),
        reason=reason,
        environment=environment(context.device),
    )
    return conclude(seen, CalibrationSet.of(()))


def _open(request: ScanRequest, source: str, *, train: bool) -> Samples:
    """Open data as the request says where inputs and labels are; of training data, the training split."""
    column, label_column = request.data_column, request.label_column
    prefer = ("train",) if train else SPLITS
    samples = open_samples(source, column=column, label_column=label_column, prefer=prefer)
    return without_unreadable(samples, request.skip_unreadable) if request.skip_unreadable else samples


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
) -> tuple[Report, PositiveControl, Inspection | None]:
    """Load the model and its data, and examine how it behaves.

    Raises:
        InputError: if something is missing, unreadable or does not fit.
        UnsafeArtifact: if loading the model would execute code after all.
    """
    assert request.model is not None, "else there is nothing to load"
    context.report_progress("loading the model")
    classifier = open_classifier(
        request.model,
        options=request.options,
        factory=request.factory,
        weights=Path(request.weights) if request.weights else None,
        device=request.device,
        examination=examination,
    )
    context.report_progress("opening the data")
    clean = None if request.clean is None else _open(request, request.clean, train=False)
    train = None if request.train is None else _open(request, request.train, train=True)
    adopt_names(classifier, train if clean is None else clean)
    return _examine(request, classifier, clean, train, findings, detectors, context)


def _examine(
    request: ScanRequest,
    classifier: Classifier,
    clean: Samples | None,
    train: Samples | None,
    findings: tuple[Finding, ...],
    detectors: list[Detector],
    context: ScanContext,
) -> tuple[Report, PositiveControl, Inspection | None]:
    """Examine how a model behaves and what it was trained on.

    Raises:
        InputError: if the data do not fit the model.
    """
    of_data = [d for d in detectors if looks_at_training_data(d)]
    of_models = [d for d in detectors if d not in of_data]
    if train is not None and of_data:
        train = labelled_for(classifier, train)
    report, control = _examine_model(
        request, classifier, train if clean is None else clean, findings, of_models, context
    )
    if train is None or not of_data:
        without = [
            NotRun(detector=d.method(), reason="needs training data: give them with --train DATA")
            for d in of_data
        ]
        return report.model_copy(update={"not_run": (*report.not_run, *without)}), control, None
    trusted = clean if clean is None else match_labels(clean, classifier)
    inspection = inspect(classifier, train, of_data, context, clean=trusted)
    examined = bool(of_models) and classifier.spec.modality == EXAMINED
    return join(report, inspection, model_examined=examined), control, inspection


def _examine_model(
    request: ScanRequest,
    classifier: Classifier,
    samples: Samples | None,
    findings: tuple[Finding, ...],
    detectors: list[Detector],
    context: ScanContext,
) -> tuple[Report, PositiveControl]:
    """Examine how a model behaves.

    Raises:
        InputError: if the samples do not fit the model.
    """
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
