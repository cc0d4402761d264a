"""Repair a model by what is found in its training data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from doorward.data import Samples
from doorward.models import TorchClassifier
from doorward.repair.choice import choose_repair, open_data, told
from doorward.repair.report import RepairOutcome, RepairReport
from doorward.repair.request import RepairRequest
from doorward.repairs.base import Damage, Repaired
from doorward.scan.behaviour import choose
from doorward.scan.context import ScanContext
from doorward.scan.images import match_labels
from doorward.scan.training_data import Inspection, inspect, labelled_for, looks_at_training_data
from doorward.stats import metrics
from doorward.training import evaluate, predict

#: Share of the flagged samples that a mended model may still give their flagged label.
KEPT_LABEL = 0.05


def repair_by_training_data(
    request: RepairRequest, classifier: TorchClassifier, context: ScanContext
) -> RepairOutcome:
    """Look for poison in a model's training data, mend the model by what is flagged, and look again.

    Raises:
        InputError: if something is missing, unreadable or does not fit.
        TrainingDiverged: if the loss is no longer finite.
    """
    assert request.train is not None
    train = labelled_for(classifier, open_data(request, request.train, train=True))
    clean = None
    if request.clean is not None:
        clean = match_labels(open_data(request, request.clean, train=False), classifier)
    before = _inspected(classifier, train, context)
    base = RepairReport(
        model=request.model, before=before.verdict, after=before.verdict, not_run=before.not_run
    )
    damage = Damage(
        classifier=classifier,
        findings=before.findings,
        train=train,
        clean=clean,
        seed=request.seed,
        progress=told(context),
    )
    if not damage.flagged:
        return RepairOutcome(base.model_copy(update={"seconds": context.deadline.spent()}))
    method, unfit = choose_repair(request, damage)
    context.report_progress(f"{method.method()}: {method.title}")
    repaired = method(damage)
    report = base.model_copy(update=_compared(damage, repaired, context))
    return RepairOutcome(
        report.model_copy(update={"not_run": (*report.not_run, *unfit), "seconds": context.deadline.spent()}),
        repaired.classifier,
    )


def _inspected(classifier: TorchClassifier, train: Samples, context: ScanContext) -> Inspection:
    detectors = [d for d in choose(("activation-clustering",)) if looks_at_training_data(d)]
    return inspect(classifier, train, detectors, context)


def _compared(damage: Damage, repaired: Repaired, context: ScanContext) -> dict[str, object]:
    """Return what a mended model does, next to the one that was given."""
    train = damage.train
    assert train is not None
    assert train.labels is not None
    rows = np.array(sorted(one.row for one in damage.flagged.values()), dtype=np.int64)
    flagged = train.select(rows)
    kept = train.select(np.setdiff1d(np.arange(len(train)), rows))
    tests = kept if damage.clean is None or damage.clean.labels is None else damage.clean
    kept_label, accuracy = {}, {}
    for when, classifier in (("before", damage.classifier), ("after", repaired.classifier)):
        count = int((predict(classifier, flagged) == train.labels[rows]).sum())
        kept_label[when] = metrics.rate(count, len(rows))
        accuracy[when] = evaluate(classifier, tests)
    again = _inspected(repaired.classifier, repaired.train or kept, replace(context))
    still = kept_label["after"].value > KEPT_LABEL
    return {
        "after": "suspicious" if still else again.verdict,
        "flagged": len(rows),
        "flagged_label_before": kept_label["before"],
        "flagged_label_after": kept_label["after"],
        "accuracy_before": accuracy["before"],
        "accuracy_after": accuracy["after"],
        "measured_on": "kept training samples" if tests is kept else "clean samples",
        "repair": repaired.record,
    }
