"""Repair a model without any data: unlearn what a scan recovers from the model alone."""

from __future__ import annotations

from doorward.core.records import Finding, NotRun, Report
from doorward.models import TorchClassifier
from doorward.repair.choice import choose_repair, told
from doorward.repair.report import RepairOutcome, RepairReport, TriggerRecord
from doorward.repair.request import RepairRequest
from doorward.repair.tried import named_triggers, try_triggers
from doorward.repairs._without_data import make_images
from doorward.repairs.base import Damage
from doorward.scan.behaviour import choose
from doorward.scan.context import ScanContext
from doorward.scan.environment import environment
from doorward.scan.examine import examine_in

#: Images of each class that recovered triggers are tried on, four times as many as are kept back.
TRIED = 16


def repair_by_model_alone(
    request: RepairRequest, classifier: TorchClassifier, context: ScanContext
) -> RepairOutcome:
    """Scan a model without data, mend it by what is found, and scan it again.

    Where no trigger is recovered there is nothing to mend by, and the outcome holds no model.

    Raises:
        InputError: if the model cannot be mended, or the repair that is named does not fit.
        TrainingDiverged: if the loss is no longer finite.
    """
    before = _scan(classifier, context, "scanning the model")
    damage = Damage(
        classifier=classifier, findings=before.findings, seed=request.seed, progress=told(context)
    )
    if request.method == "auto" and not damage.triggers:
        report = RepairReport(
            model=request.model,
            before=before.verdict,
            after=before.verdict,
            not_run=before.not_run,
            without_data=True,
            seconds=context.deadline.spent(),
        )
        return RepairOutcome(report)
    method, unfit = choose_repair(request, damage)
    context.report_progress(f"{method.method()}: {method.title}")
    repaired = method(damage)
    after = _scan(repaired.classifier, context, "scanning the mended model")
    report = RepairReport(
        model=request.model,
        before=before.verdict,
        after=after.verdict,
        measured_on="images made from the model",
        without_data=True,
        triggers=_tried(before.findings, classifier, repaired.classifier, request.seed),
        parameters_before=classifier.parameters,
        parameters_after=repaired.classifier.parameters,
        repair=repaired.record,
        not_run=(*before.not_run, *unfit),
        seconds=context.deadline.spent(),
    )
    return RepairOutcome(report, repaired.classifier)


def _scan(classifier: TorchClassifier, context: ScanContext, what: str) -> Report:
    """Scan how a model behaves, without data."""
    if classifier.spec.modality != "image":
        why = "triggers are looked for in models of images alone"
        return Report(
            subject=None,
            verdict="could_not_tell",
            reason=why,
            not_run=(NotRun(detector="all", reason=why),),
            environment=environment(context.device),
        )
    context.report_progress(what)
    detectors = [d for d in choose((), clean=False) if not d.needs & {"artifact", "train"}]
    return examine_in(context, classifier, None, detectors)


def _tried(
    findings: tuple[Finding, ...], before: TorchClassifier, after: TorchClassifier, seed: int
) -> tuple[TriggerRecord, ...]:
    """Return how often the triggers of the classes that were named work on images made from the model."""
    triggers = named_triggers(findings)
    if not triggers:
        return ()
    made = make_images(before, seed, most=TRIED)
    return try_triggers(triggers, before, after, made.kept, made.kept_labels)
