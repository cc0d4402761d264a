"""Examine a classifier's behaviour: draw the images, run the detectors, try what they recovered.

What is seen is kept apart from what is concluded (`doorward.verdict`), which costs nothing and can be done
anew from the record alone.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

import numpy as np
import torch
from scipy import stats

from doorward import __version__, measures, registry
from doorward.calibration import shipped
from doorward.data import Samples
from doorward.detectors.base import Detector
from doorward.errors import CouldNotTell, InputError
from doorward.inversion import batched_logits
from doorward.methods import Deadline, derive_seed
from doorward.modalities.image import picture, side_by_side, to_float, to_tensor
from doorward.models import Classifier
from doorward.records import (
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
)
from doorward.subject import Subject
from doorward.triggers import Trigger
from doorward.verdict import conclude

#: Told to the caller as the scan goes on: what is being done now.
Progress = Callable[[str], None]

#: Clean accuracy must be above chance at this level, else nothing is judged.
CHANCE_LEVEL = 0.05
PICTURES = 6


def choose(names: Sequence[str]) -> list[Detector]:
    """Return the named detectors, or all, the cheap and safe ones first."""
    detectors = [
        registry.build("detector", name, {}) for name in dict.fromkeys(names or registry.modules("detector"))
    ]
    return sorted(detectors, key=lambda d: (d.order, d.method()))


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
        detectors = [d for d in choose(()) if "artifact" not in d.needs]
    evidence = draw_images(classifier, samples, images, seed) if samples is not None else None
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
    trials = _confirm(findings, classifier, evidence) if evidence and reason is None else []
    report = Report(
        subject=SubjectRecord(
            path="<memory>",
            format=classifier.format,
            classes=classifier.classes,
            parameters=classifier.parameters,
            convolutions=classifier.convolutions,
            spec=classifier.spec.model_dump(mode="json", exclude={"assumed"}),
            assumed=classifier.spec.assumed,
            architecture=classifier.architecture,
            clean_accuracy=accuracy,
        ),
        data=(evidence.record(role),) if evidence else (),
        verdict="could_not_tell",  # until it is concluded
        reason=reason,
        confirmations=tuple(trial.confirmation for trial in trials),
        findings=tuple(findings),
        not_run=tuple(not_run),
        seconds=deadline.spent(),
        environment=environment(device),
    )
    return _illustrate(conclude(report), classifier, trials)


@dataclass(frozen=True)
class Drawn:
    """Hold the images in use: some to fit, some to confirm on."""

    whole: Samples
    fit: Samples
    confirm: Samples

    def record(self, role: Literal["clean", "train"]) -> DataRecord:
        """Say what was read and how much of it is used."""
        origin = self.whole.provenance
        return DataRecord(
            role=role,
            path=origin.path,
            sha256=origin.sha256,
            rows=origin.rows,
            used=len(self.fit) + len(self.confirm),
            labelled=self.whole.labels is not None,
        )


def draw_images(classifier: Classifier, samples: Samples, images: int, seed: int) -> Drawn:
    """Draw images evenly over the classes and split them into those to fit and those to confirm on.

    Half of the first hundred or so are to fit, as with the models of the bank: scores depend somewhat on
    how many there are. All others confirm, so more images make a confirmation surer.
    """
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
    to_fit = (turns % 2 == 0) & (np.arange(len(drawn)) < shipped().images)
    return Drawn(samples, drawn.select(np.flatnonzero(to_fit)), drawn.select(np.flatnonzero(~to_fit)))


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
    classifier: Classifier, evidence: Drawn | None, seed: int, deadline: Deadline
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
    if stats.binomtest(accuracy.successes, accuracy.n, guess, alternative="greater").pvalue > CHANCE_LEVEL:
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


@dataclass(frozen=True)
class _TriedTrigger:
    """Hold what a recovered trigger did to images that were kept back.

    Attributes:
        images, before: those outside the target class, (n, c, h, w), and what the model sees in them, (n,).
        triggered, after: the same with the trigger.
    """

    confirmation: Confirmation
    trigger: Trigger
    images: torch.Tensor
    before: torch.Tensor
    triggered: torch.Tensor
    after: torch.Tensor


def _confirm(findings: Sequence[Finding], classifier: Classifier, evidence: Drawn) -> list[_TriedTrigger]:
    """Try all recovered triggers on the images that were kept back."""
    recovered = [(f, e) for f in findings for e in f.evidence if isinstance(e, RecoveredTrigger)]
    if not recovered or not len(evidence.confirm):
        return []
    images = to_float(to_tensor(evidence.confirm, classifier.spec))  # (n, c, h, w)
    before = batched_logits(classifier, images).argmax(1).cpu()
    labels = evidence.confirm.labels
    tried = []
    for finding, item in recovered:
        trigger, target = Trigger.from_json(item.trigger), item.target
        outside = before != target
        if labels is not None:
            outside &= torch.from_numpy(labels) != target
        triggered = trigger.apply(images[outside])
        after = batched_logits(classifier, triggered).argmax(1).cpu()
        success = measures.rate(int((after == target).sum()), int(outside.sum()))
        confirmation = Confirmation(target=target, detector=finding.detector, success=success)
        tried.append(_TriedTrigger(confirmation, trigger, images[outside], before[outside], triggered, after))
    return tried


def _illustrate(report: Report, classifier: Classifier, trials: Sequence[_TriedTrigger]) -> Report:
    """Draw the triggers of the classes that a finding names, or of its first one, and drop the others."""
    findings = []
    for finding in report.findings:
        own = [t for t in trials if t.confirmation.detector == finding.detector]
        named = [t for t in own if t.confirmation.target in finding.targets] or own[:1]
        targets = {t.confirmation.target for t in named}
        kept = [e for e in finding.evidence if not isinstance(e, RecoveredTrigger) or e.target in targets]
        pictures = [one for t in named for one in _pictures(t, classifier.classes)]
        findings.append(
            finding.model_copy(update={"evidence": (*pictures, *(kept if own else finding.evidence))})
        )
    return report.model_copy(update={"findings": tuple(findings)})


def _pictures(tried: _TriedTrigger, classes: tuple[str, ...]) -> list[Picture]:
    name = classes[tried.confirmation.target]
    shown = slice(PICTURES)
    names = [classes[int(c)] for c in tried.before[shown]]
    seen = [classes[int(c)] for c in tried.after[shown]]
    return [
        Picture(
            title=f"Recovered trigger for {name}",
            alt=f"The recovered trigger for class {name} on grey",
            png=picture(tried.trigger.apply(torch.full_like(tried.images[:1], 0.5))[0]),
        ),
        Picture(
            title="Images before",
            alt=f"Images that the model sees as {', '.join(names)}",
            png=picture(side_by_side(list(tried.images[shown]))),
        ),
        Picture(
            title="The same images with the trigger",
            alt=f"The same images with the trigger; the model now sees {', '.join(seen)}",
            png=picture(side_by_side(list(tried.triggered[shown]))),
        ),
    ]


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
