"""Repair a model by clean samples: scan it, mend it, and scan it again, as long as something is found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from doorward.core.errors import InputError
from doorward.core.records import Finding, NotRun, Report, Verdict
from doorward.data import Samples
from doorward.detectors.base import Detector
from doorward.models import TorchClassifier
from doorward.models.encode.image import to_float, to_tensor
from doorward.repair.choice import choose_repair, fitting_repairs, open_data, told
from doorward.repair.report import RepairOutcome, RepairReport, TriggerRecord
from doorward.repair.request import RepairRequest
from doorward.repair.tried import named_triggers, try_triggers
from doorward.repairs._clean import CleanSplit, split_clean
from doorward.repairs.base import Damage, Repaired, RepairRecord
from doorward.scan.behaviour import choose
from doorward.scan.context import ScanContext
from doorward.scan.examine import examine_in
from doorward.scan.images import match_labels
from doorward.training import evaluate

#: Formats whose files say how large each layer is by its kind alone.
FIXED_SHAPES = frozenset({"huggingface"})
#: How often a model is mended at most, as long as a scan finds something with a trigger in it.
ROUNDS = 3


@dataclass(frozen=True)
class Scanned:
    """A scan's verdict on a model, and the findings that repairs go by."""

    verdict: Verdict
    findings: tuple[Finding, ...] = ()
    not_run: tuple[NotRun, ...] = ()

    @property
    def alarm(self) -> bool:
        """Return whether a backdoor is found."""
        return any(f.flagged and f.kind == "backdoor" for f in self.findings)


def repair_by_clean_data(
    request: RepairRequest,
    classifier: TorchClassifier,
    context: ScanContext,
    before: Scanned | None = None,
) -> RepairOutcome:
    """Scan a model, mend it with clean samples, and scan it again.

    A part of the samples is kept back: repairs stop by it, and what is reported is measured on it. Where a
    scan of the mended model finds a trigger again, that is unlearnt too.

    Args:
        before: what a scan has said of the model already.

    Raises:
        InputError: if something is missing, unreadable or does not fit.
        TrainingDiverged: if the loss is no longer finite.
    """
    assert request.clean is not None
    clean = match_labels(open_data(request, request.clean, train=False), classifier)
    parts = split_clean(clean, request.seed)
    _check_known(classifier, clean)

    def scanned(model: TorchClassifier, what: str) -> Scanned:
        return scan_model(model, clean, context, request.detectors, what=what)

    before = before or scanned(classifier, "scanning the model")
    damage = replace(damaged(classifier, before, parts, request.seed), progress=told(context))
    repaired, unfit = _mend(request, damage, context)
    done: list[RepairRecord] = [repaired.record]
    after = scanned(repaired.classifier, "scanning the mended model")
    while request.method == "auto" and after.alarm and len(done) < ROUNDS:
        again = replace(damage, classifier=repaired.classifier, findings=(*damage.findings, *after.findings))
        if len(again.triggers) == len(damage.triggers):
            break
        damage = again
        repaired, _ = _mend(request, damage, context)
        done.append(repaired.record)
        after = scanned(repaired.classifier, "scanning the mended model")
    report = RepairReport(
        model=request.model,
        before=before.verdict,
        after=after.verdict,
        accuracy_before=evaluate(classifier, parts.validation),
        accuracy_after=evaluate(repaired.classifier, parts.validation),
        measured_on="clean samples kept back",
        triggers=_tried(before, classifier, repaired.classifier, parts.validation),
        parameters_before=classifier.parameters,
        parameters_after=repaired.classifier.parameters,
        repair=done[0],
        further=tuple(done[1:]),
        not_run=(*before.not_run, *unfit),
        seconds=context.deadline.spent(),
    )
    return RepairOutcome(report, repaired.classifier)


def _check_known(classifier: TorchClassifier, clean: Samples) -> None:
    """Raise unless a model is right on clean samples more often than by chance.

    Raises:
        InputError: if not, since nothing can be judged by such samples.
    """
    right = evaluate(classifier, clean)
    if right.value <= 1 / len(classifier.classes):
        raise InputError(
            f"the model is right on {right.successes:,} of {right.n:,} clean samples, no better than chance, "
            "so they cannot say what a repair costs: are they of the kind it was trained on, and the labels "
            "its own?"
        )


def damaged(classifier: TorchClassifier, scanned: Scanned, parts: CleanSplit, seed: int) -> Damage:
    """Return what is to be mended, and with what."""
    return Damage(
        classifier=classifier,
        findings=scanned.findings,
        clean=parts.fit,
        validation=parts.validation,
        keep_shapes=classifier.format in FIXED_SHAPES,
        seed=seed,
    )


def scan_model(
    classifier: TorchClassifier,
    clean: Samples,
    context: ScanContext,
    detectors: Sequence[Detector] = (),
    *,
    what: str,
) -> Scanned:
    """Scan how a model behaves; of models of other inputs than images nothing can be told.

    Args:
        detectors: all that examine behaviour if empty.
        what: is said to be done.
    """
    if classifier.spec.modality != "image":
        return Scanned("could_not_tell")
    context.report_progress(what)
    asked = detectors or [d for d in choose(()) if not d.needs & {"artifact", "train"}]
    report: Report = examine_in(context, classifier, clean, asked)
    return Scanned(report.verdict, report.findings, report.not_run)


def _mend(
    request: RepairRequest, damage: Damage, context: ScanContext
) -> tuple[Repaired, tuple[NotRun, ...]]:
    """Mend a model by the repair that is asked for, or by the first that fits and succeeds.

    Raises:
        InputError: if none does.
    """
    if request.method != "auto" or request.settings:
        method, unfit = choose_repair(request, damage)
        context.report_progress(f"{method.method()}: {method.title}")
        return method(damage), unfit
    fitting, unfit = fitting_repairs(damage)
    failed: list[NotRun] = []
    for method in fitting:
        context.report_progress(f"{method.method()}: {method.title}")
        try:
            return method(damage), (*unfit, *failed)
        except InputError as error:
            failed.append(NotRun(detector=method.method(), reason=str(error)))
    raise InputError(
        "no repair succeeds: " + "; ".join(f"{o.detector}: {o.reason}" for o in (*failed, *unfit))
    )


def _tried(
    scanned: Scanned, before: TorchClassifier, after: TorchClassifier, samples: Samples
) -> tuple[TriggerRecord, ...]:
    """Return how often the triggers of the classes that were named work on samples kept back."""
    assert samples.labels is not None
    images = to_float(to_tensor(samples, before.spec))
    return try_triggers(
        named_triggers(scanned.findings), before, after, images, torch.from_numpy(samples.labels)
    )
