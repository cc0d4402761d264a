"""Scan a model: choose detectors by the evidence at hand, run them, and conclude one verdict."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from doorward.core.budget import Deadline
from doorward.core.devices import check_device
from doorward.core.errors import UnsafeArtifact
from doorward.core.records import DataRecord, Finding, NotRun, PositiveControl, Report, SubjectRecord
from doorward.core.seeds import derive_seed
from doorward.data import Samples, open_samples
from doorward.detectors.base import Detector
from doorward.detectors.subject import Subject
from doorward.models import Classifier, open_classifier
from doorward.models.encode.dispatch import NOUNS
from doorward.models.formats.loading import artifact_digest, locate
from doorward.scan.behaviour import Progress, choose, examine
from doorward.scan.environment import environment
from doorward.scan.images import match_labels
from doorward.scan.power import measure_positive_control
from doorward.scan.request import ScanRequest
from doorward.training import evaluate

#: The kind of input whose models are examined for how they behave; of others only the files are.
EXAMINED = "image"


def scan(request: ScanRequest, *, progress: Progress | None = None) -> Report:
    """Scan a model from its file and return the report.

    The files are examined before anything is loaded; what would execute code is reported and not loaded.

    Raises:
        InputError: if something is missing, unreadable or does not fit.
    """
    report_progress = progress or (lambda _: None)
    deadline = Deadline(request.time_budget)
    check_device(request.device)
    chosen = choose(request.detectors)
    path = Path(request.weights or request.model) if request.factory else locate(request.model)
    findings: list[Finding] = []
    if path.exists():
        artifact = Subject(artifact=path)
        for detector in chosen:
            if detector.needs <= artifact.offers:
                report_progress(f"{detector.method()}: looking at the files")
                findings.append(detector(artifact, seed=request.seed, deadline=deadline))
    behavioural = [d for d in chosen if d.method() not in {f.detector for f in findings}]
    unsafe = any(f.verdict == "unsafe" for f in findings)
    if not unsafe:
        report_progress("loading the model")
        try:
            classifier = open_classifier(
                request.model,
                options=request.options,
                factory=request.factory,
                weights=Path(request.weights) if request.weights else None,
                device=request.device,
            )
        except UnsafeArtifact as refusal:
            if refusal.finding is None:
                raise
            findings.append(refusal.finding)
            unsafe = True
    if unsafe:
        reason = "the model was not loaded, because loading it would execute code"
        return Report(
            subject=SubjectRecord(path=request.model, format="not loaded", **artifact_digest(path)._asdict()),
            verdict="unsafe",
            findings=tuple(findings),
            not_run=tuple(NotRun(detector=d.method(), reason=reason) for d in behavioural),
            request=request.to_json(),
            seconds=deadline.spent(),
            environment=environment(request.device),
        )
    source = request.train if request.clean is None else request.clean
    samples = None
    if source is not None:
        report_progress("opening the data")
        samples = open_samples(source, column=request.data_column, label_column=request.label_column)
    if classifier.spec.modality != EXAMINED:
        report_progress("measuring clean accuracy")
        return _unexamined(request, classifier, samples, path, findings, behavioural, deadline)
    report = examine(
        classifier,
        samples,
        detectors=behavioural,
        seed=request.seed,
        device=request.device,
        deadline=deadline,
        images=request.images,
        role="clean" if request.clean else "train",
        progress=progress,
        before=tuple(findings),
    )
    positive_control = PositiveControl()
    if request.control:
        positive_control = measure_positive_control(
            classifier,
            samples,
            report,
            detectors=behavioural,
            seed=request.seed,
            device=request.device,
            deadline=deadline,
            images=request.images,
            progress=progress,
        )
    assert report.subject is not None
    named = {"path": request.model, **artifact_digest(path)._asdict()}
    subject = report.subject.model_copy(update=named)
    return report.model_copy(
        update={
            "subject": subject,
            "positive_control": positive_control,
            "request": request.to_json(),
            "seconds": deadline.spent(),
        }
    )


def _unexamined(
    request: ScanRequest,
    classifier: Classifier,
    samples: Samples | None,
    path: Path,
    findings: list[Finding],
    detectors: list[Detector],
    deadline: Deadline,
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
    return Report(
        subject=SubjectRecord(
            path=request.model,
            format=classifier.format,
            classes=classifier.classes,
            parameters=classifier.parameters,
            spec=classifier.spec.describe(),
            architecture=classifier.architecture,
            clean_accuracy=accuracy,
            **artifact_digest(path)._asdict(),
        ),
        data=data,
        verdict="could_not_tell",
        reason=f"only the files were examined: the detectors of backdoors look for triggers in {works}, and "
        f"this model takes {takes}",
        findings=tuple(findings),
        not_run=tuple(NotRun(detector=d.method(), reason=reason) for d in detectors),
        positive_control=PositiveControl(reason=f"triggers are planted in models of {works} alone")
        if request.control
        else PositiveControl(),
        request=request.to_json(),
        seconds=deadline.spent(),
        environment=environment(request.device),
    )
