"""Scan a model: choose detectors by the evidence at hand, run them, and conclude one verdict."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from doorward.control import measure_power
from doorward.data import Samples, open_samples
from doorward.detectors.base import Detector
from doorward.devices import check_device
from doorward.errors import UnsafeArtifact
from doorward.examination import Progress, _match_labels, choose, environment, examine
from doorward.methods import Deadline, derive_seed
from doorward.modalities.kinds import NOUNS
from doorward.models import Classifier, LoadOptions, open_classifier
from doorward.models.loading import artifact_digest, locate
from doorward.records import DataRecord, Finding, NotRun, Power, Report, SubjectRecord
from doorward.subject import Subject
from doorward.training import evaluate

#: The kind of input whose models are examined for how they behave; of others only the files are.
EXAMINED = "image"


@dataclass(frozen=True, kw_only=True)
class ScanRequest:
    """Hold a scan's arguments; `doorward verify` reruns a report from them.

    Attributes:
        model: path or hub id, as `open_classifier` takes it.
        clean, train: data paths, as `open_samples` takes them. Training images serve where no clean ones are.
        detectors: names; all that the evidence allows if empty.
        seed: one seed for everything.
        device: torch device.
        time_budget: seconds for the whole scan; a detector that would not fit is not run.
        images: most clean images that are used; every class gives its share. Half of the first
            hundred, and all beyond, are kept back to confirm a recovered trigger.
        control: where nothing is found, plant known triggers in copies of the model and scan those.
        factory, weights: the user's own function that builds the module, and the weights for it.
        data_column, label_column: where the images and their labels are, where it cannot be told.
        options: what the user states of the model.
        folder: where the scan was asked for; `doorward.verify` finds relative paths from there.
    """

    model: str
    clean: str | None = None
    train: str | None = None
    detectors: tuple[str, ...] = ()
    seed: int = 0
    device: str = "cpu"
    time_budget: float = 900.0
    images: int = 300
    control: bool = False
    factory: str | None = None
    weights: str | None = None
    data_column: str | None = None
    label_column: str | None = None
    folder: str | None = None
    options: LoadOptions = field(default_factory=LoadOptions)

    def to_json(self) -> dict[str, Any]:
        """Return the arguments as JSON types."""
        return asdict(self) | {"detectors": list(self.detectors)}

    @staticmethod
    def from_json(form: dict[str, Any]) -> ScanRequest:
        """Rebuild a request from a report's `request`.

        Raises:
            pydantic.ValidationError: if it is none.
        """
        return TypeAdapter(ScanRequest).validate_python(form)


def scan(request: ScanRequest, *, progress: Progress | None = None) -> Report:
    """Scan a model from its file and return the report.

    The files are examined before anything is loaded; what would execute code is reported and not loaded.

    Raises:
        InputError: if something is missing, unreadable or does not fit.
    """
    tell = progress or (lambda _: None)
    deadline = Deadline(request.time_budget)
    check_device(request.device)
    chosen = choose(request.detectors)
    path = Path(request.weights or request.model) if request.factory else locate(request.model)
    findings: list[Finding] = []
    if path.exists():
        artifact = Subject(artifact=path)
        for detector in chosen:
            if detector.needs <= artifact.offers:
                tell(f"{detector.method()}: looking at the files")
                findings.append(detector(artifact, seed=request.seed, deadline=deadline))
    behavioural = [d for d in chosen if d.method() not in {f.detector for f in findings}]
    unsafe = any(f.verdict == "unsafe" for f in findings)
    if not unsafe:
        tell("loading the model")
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
        tell("opening the data")
        samples = open_samples(source, column=request.data_column, label_column=request.label_column)
    if classifier.spec.modality != EXAMINED:
        tell("measuring clean accuracy")
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
    power = Power()
    if request.control:
        power = measure_power(
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
            "power": power,
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
        drawn = _match_labels(samples, classifier).draw(min(request.images, len(samples)), rng)
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
        power=Power(reason=f"triggers are planted in models of {works} alone")
        if request.control
        else Power(),
        request=request.to_json(),
        seconds=deadline.spent(),
        environment=environment(request.device),
    )
