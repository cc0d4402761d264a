"""Scan a model: choose detectors by the evidence at hand, run them, and conclude one verdict."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import TypeAdapter
from scipy import stats

from doorward import __version__, measures, registry
from doorward.data import Samples, open_samples
from doorward.detectors.base import Detector
from doorward.devices import check_device
from doorward.errors import CouldNotTell, InputError, UnsafeArtifact
from doorward.inversion import batched_logits
from doorward.methods import Deadline, derive_seed
from doorward.modalities.image import picture, side_by_side, to_float, to_tensor
from doorward.models import Classifier, LoadOptions, open_classifier
from doorward.models.loading import artifact_digest, locate
from doorward.records import (
    SEVERITY,
    Confirmation,
    DataRecord,
    Environment,
    Finding,
    NotRun,
    Picture,
    Rate,
    RecoveredTrigger,
    Report,
    SubjectRecord,
    Verdict,
)
from doorward.subject import Subject
from doorward.triggers import Trigger

#: Told to the caller as the scan goes on: what is being done now.
Progress = Callable[[str], None]

SUSPICIOUS, BACKDOORED, CONFIRMED = 0.05, 0.01, 0.75
PICTURES = 6


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
        images: most clean images that are used; every class gives its share. Half of them are kept back to
            confirm a recovered trigger.
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
    chosen = _choose(request.detectors)
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
    assert report.subject is not None
    named = {"path": request.model, **artifact_digest(path)._asdict()}
    subject = report.subject.model_copy(update=named)
    return report.model_copy(update={"subject": subject, "request": request.to_json()})


def examine(
    classifier: Classifier,
    samples: Samples | None = None,
    *,
    detectors: Sequence[Detector] | None = None,
    seed: int = 0,
    device: str = "cpu",
    deadline: Deadline | None = None,
    images: int = 300,
    role: Literal["clean", "train"] = "clean",
    progress: Progress | None = None,
    before: tuple[Finding, ...] = (),
) -> Report:
    """Examine a classifier's behaviour and return the report; `scan` does it for files.

    Args:
        samples: clean images, labelled or not; some detectors need none.
        detectors: those to run; all model detectors if None.
        images: most images used (see ScanRequest).
        before: findings made already, on the files.

    Raises:
        InputError: if the images or their labels do not fit the model.
    """
    tell = progress or (lambda _: None)
    deadline = deadline or Deadline()
    if detectors is None:
        detectors = [d for d in _choose(()) if "artifact" not in d.needs]
    evidence = _draw(classifier, samples, images, seed) if samples is not None else None
    accuracy = None
    reason = None
    if len(classifier.classes) < 2:
        reason = f"the model has {len(classifier.classes)} class; a backdoor needs at least two"
    else:
        tell("measuring clean accuracy" if evidence else "trying the model")
        accuracy, reason = _sanity(classifier, evidence, seed, deadline)
    findings = list(before)
    not_run: list[NotRun] = []
    subject = Subject(classifier=classifier, clean=evidence.fit if evidence else None)
    for detector in detectors:
        missing = detector.missing(subject)
        if reason is not None:
            not_run.append(NotRun(detector=detector.method(), reason=reason))
        elif missing:
            not_run.append(NotRun(detector=detector.method(), reason=_why_missing(missing, classifier)))
        else:
            tell(f"{detector.method()}: {detector.title}")
            findings.append(detector(subject, seed=seed, device=device, deadline=deadline))
    conclusion = _conclude(findings, reason)
    confirmations: list[Confirmation] = []
    if evidence is not None and reason is None:
        findings = [_confirm(f, classifier, evidence, confirmations) for f in findings]
    verdict = conclusion.verdict
    return Report(
        subject=SubjectRecord(
            path="<memory>",
            format=classifier.format,
            classes=classifier.classes,
            parameters=classifier.parameters,
            spec=classifier.spec.model_dump(mode="json", exclude={"assumed"}),
            assumed=classifier.spec.assumed,
            architecture=classifier.architecture,
            clean_accuracy=accuracy,
        ),
        data=(evidence.record(role),) if evidence else (),
        verdict=verdict,
        reason=conclusion.reason,
        targets=conclusion.targets,
        p_value=conclusion.p_value,
        confirmations=tuple(confirmations),
        findings=tuple(findings),
        not_run=tuple(not_run),
        seconds=deadline.spent(),
        environment=environment(device),
    )


@dataclass(frozen=True)
class _Evidence:
    """Hold the images in use: some to fit, some to confirm on."""

    whole: Samples
    fit: Samples
    confirm: Samples

    def record(self, role: Literal["clean", "train"]) -> DataRecord:
        origin = self.whole.provenance
        return DataRecord(
            role=role,
            path=origin.path,
            sha256=origin.sha256,
            rows=origin.rows,
            used=len(self.fit) + len(self.confirm),
            labelled=self.whole.labels is not None,
        )


@dataclass(frozen=True)
class _Conclusion:
    verdict: Verdict
    targets: tuple[int, ...] = ()
    p_value: float | None = None
    reason: str | None = None


def _choose(names: Sequence[str]) -> list[Detector]:
    """Return the named detectors, or all, the cheap and safe ones first."""
    detectors = [
        registry.build("detector", name, {}) for name in dict.fromkeys(names or registry.modules("detector"))
    ]
    return sorted(detectors, key=lambda d: (d.order, d.method()))


def _draw(classifier: Classifier, samples: Samples, images: int, seed: int) -> _Evidence:
    """Draw images evenly over the classes and split them into those to fit and those to confirm on."""
    if samples.modality != "image":
        raise InputError(f"the model takes images, {samples.provenance.path} holds {samples.modality}")
    samples = _match_labels(samples, classifier)
    rng = np.random.default_rng(derive_seed(seed, "images"))
    drawn = samples.draw(min(images, len(samples)), rng)
    # the draw goes round the classes, so every other image leaves each class in both halves
    turns = np.arange(len(drawn))
    classes = 0 if samples.labels is None else len(np.unique(samples.labels))
    if 0 < 2 * classes <= len(drawn):  # with fewer than two of a class there is nothing to share out
        turns = turns // classes
    fit, confirm = (drawn.select(np.flatnonzero(turns % 2 == half)) for half in (0, 1))
    return _Evidence(samples, fit, confirm)


def _match_labels(samples: Samples, classifier: Classifier) -> Samples:
    """Return the samples with labels that are class numbers of the model.

    Class names in another order are matched by name; otherwise numbers are taken as they are.
    """
    if samples.labels is None:
        return samples
    names = {name: i for i, name in enumerate(classifier.classes)}
    if samples.classes != classifier.classes and set(samples.classes) <= set(names):
        return samples.relabel(np.array([names[name] for name in samples.classes]), classifier.classes)
    k = len(classifier.classes)
    highest = int(samples.labels.max()) if len(samples) else -1
    if highest >= k or (len(samples) and int(samples.labels.min()) < 0):
        raise InputError(
            f"{samples.provenance.path} has labels up to {highest}, the model {k} classes (0 to {k - 1}): "
            "is this the model's data? Class names in another order are matched when all are known"
        )
    return samples


def _sanity(
    classifier: Classifier, evidence: _Evidence | None, seed: int, deadline: Deadline
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
    accuracy = measures.rate(int((predicted == labels).sum()), len(labels))
    if len(np.unique(labels)) == 1 < len(labels):
        only = classifier.classes[int(labels[0])]
        return accuracy, f"all {len(labels)} images are of one class, {only!r}; give images of several"
    guess = max(1 / len(classifier.classes), np.bincount(labels).max() / len(labels))
    if stats.binomtest(accuracy.successes, accuracy.n, guess, alternative="greater").pvalue > SUSPICIOUS:
        return accuracy, (
            f"it is right on {accuracy.successes} of {accuracy.n} clean images, no better than chance. "
            "Is the preprocessing right (--input-range, --mean, --std, --layout), and are the labels its own?"
        )
    return accuracy, None


def _why_missing(missing: frozenset[str], classifier: Classifier) -> str:
    """Say what evidence a detector lacks and how to give it."""
    limitation = getattr(classifier, "limitation", None)
    if missing & {"gradients", "features", "weights", "graph"}:
        why = limitation or f"not reachable in this {classifier.format} model"
        return f"needs {', '.join(sorted(missing))}: {why}"
    if "clean" in missing:
        return "needs clean images: give them with --clean DATA"
    return f"needs {', '.join(sorted(missing))}, which were not given"


def _conclude(findings: Sequence[Finding], reason: str | None) -> _Conclusion:
    """Combine findings into one verdict: found before could-not-tell before nothing-found.

    One p-value for the report: the smallest of the detectors', each weighted by its share of the 5 %. Until
    a bank of clean models calibrates them, it is at most "suspicious".
    """
    if any(f.verdict == "unsafe" for f in findings):
        return _Conclusion("unsafe")
    if reason is not None:
        return _Conclusion("could_not_tell", reason=reason)
    judged = {f.detector: share_p(f) for f in findings if f.kind == "backdoor" and f.p_value is not None}
    others = [f for f in findings if f.flagged and f.detector not in judged]
    if not judged and not others:
        reason = _what_stopped(findings) or "no detector that looks at behaviour ran"
        return _Conclusion("could_not_tell", reason=reason)
    p = min(judged.values(), default=None)
    guilty = others + [f for f in findings if judged.get(f.detector, 1.0) <= SUSPICIOUS]
    if guilty:
        guilty.sort(key=lambda f: judged.get(f.detector, 0.0))
        targets = tuple(dict.fromkeys(t for f in guilty for t in f.targets))
        return _Conclusion(max((f.verdict for f in guilty), key=SEVERITY.__getitem__), targets, p)
    if stopped := _what_stopped(findings):
        return _Conclusion("could_not_tell", (), p, reason=stopped)
    return _Conclusion("nothing_found", (), p)


def _what_stopped(findings: Sequence[Finding]) -> str:
    """Say why detectors of backdoors could not tell, each reason once; empty if all could."""
    speakers: dict[str, list[str]] = {}
    for f in findings:
        if f.kind == "backdoor" and f.reason:
            speakers.setdefault(f.reason, []).append(f.detector)
    return "; ".join(f"{' and '.join(names)}: {reason}" for reason, names in speakers.items())


def share_p(finding: Finding) -> float:
    """Return a finding's p-value for the whole report: weighted Bonferroni, by its share of the 5 %."""
    assert finding.p_value is not None
    return min(1.0, finding.p_value * SUSPICIOUS / float(finding.settings.get("level_of_test", SUSPICIOUS)))


def _confirm(
    finding: Finding, classifier: Classifier, evidence: _Evidence, confirmations: list[Confirmation]
) -> Finding:
    """Try a finding's triggers on the images kept back, and draw them on some."""
    recovered = [e for e in finding.evidence if isinstance(e, RecoveredTrigger)]
    if not recovered or not len(evidence.confirm):
        return finding
    images = to_float(to_tensor(evidence.confirm, classifier.spec))  # (n, c, h, w)
    before = batched_logits(classifier, images).argmax(1).cpu()
    labels = evidence.confirm.labels
    pictures: list[Picture] = []
    for item in recovered:
        trigger, target = Trigger.from_json(item.trigger), item.target
        outside = before != target
        if labels is not None:
            outside &= torch.from_numpy(labels) != target
        triggered = trigger.apply(images[outside])
        after = batched_logits(classifier, triggered).argmax(1).cpu()
        success = measures.rate(int((after == target).sum()), int(outside.sum()))
        confirmations.append(Confirmation(target=target, detector=finding.detector, success=success))
        name = classifier.classes[target]
        shown = range(min(PICTURES, len(triggered)))
        names = [classifier.classes[int(c)] for c in before[outside][: len(shown)]]
        seen = [classifier.classes[int(c)] for c in after[: len(shown)]]
        pictures += [
            Picture(
                title=f"Recovered trigger for {name}",
                alt=f"The recovered trigger for class {name} on grey",
                png=picture(trigger.apply(torch.full_like(images[:1], 0.5))[0]),
            ),
            Picture(
                title="Images before",
                alt=f"Images that the model sees as {', '.join(names)}",
                png=picture(side_by_side([images[outside][i] for i in shown])),
            ),
            Picture(
                title="The same images with the trigger",
                alt=f"The same images with the trigger; the model now sees {', '.join(seen)}",
                png=picture(side_by_side([triggered[i] for i in shown])),
            ),
        ]
    return finding.model_copy(update={"evidence": (*pictures, *finding.evidence)})


def environment(device: str) -> Environment:
    """Describe this machine and the versions in use."""
    packages = {}
    for name in ("torch", "numpy", "scipy", "transformers", "onnx", "onnxruntime"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return Environment(
        doorward=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        packages=packages,
        device=torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        threads=torch.get_num_threads(),
        peak_memory_bytes=_peak_memory(),
    )


def _peak_memory() -> int | None:
    """Return this process's largest resident size so far, where the system tells it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024
