"""Repair a model: scan it and its data, choose a method by what is found, mend, and look again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from doorward.core.budget import Deadline
from doorward.core.devices import check_device
from doorward.core.errors import InputError
from doorward.core.records import NotRun, Rate, Record, Verdict
from doorward.data import Samples, open_samples
from doorward.methods import registry
from doorward.models import LoadOptions, TorchClassifier, open_classifier
from doorward.models.formats.saving import save_classifier
from doorward.repairs.base import Damage, Repair, Repaired, RepairRecord
from doorward.scan.behaviour import choose
from doorward.scan.context import Progress, ScanContext, say_nothing
from doorward.scan.images import match_labels
from doorward.scan.training_data import Inspection, inspect, labelled_for, looks_at_training_data
from doorward.stats import metrics
from doorward.training import TrainingProgress, evaluate, predict

#: Share of the flagged samples that a mended model may still give their flagged label.
KEPT_LABEL = 0.05


@dataclass(frozen=True, kw_only=True)
class RepairRequest:
    """A repair's arguments.

    Attributes:
        model: path or hub id, as `open_classifier` takes it.
        train, clean: data paths, as `open_samples` takes them.
        method: name of a repair, or "auto" for the first that fits.
        settings: of the method.
        seed, device, time_budget: as those of a scan.
        data_column, label_column: where inputs and labels are, where it cannot be told.
        options: what the user states of the model.
    """

    model: str
    train: str | None = None
    clean: str | None = None
    method: str = "auto"
    settings: dict[str, object] | None = None
    seed: int = 0
    device: str = "cpu"
    time_budget: float | None = None
    data_column: str | None = None
    label_column: str | None = None
    options: LoadOptions | None = None


class RepairReport(Record):
    """What a repair found, did, and found afterwards.

    Attributes:
        before, after: verdicts on the training data, with the model as it came and with the mended one.
        flagged: how many samples.
        flagged_label_before, flagged_label_after: how often the model gives flagged samples the label that
            they were flagged with.
        accuracy_before, accuracy_after: on the clean samples; on training samples that were kept, where none
            are given.
        measured_on: which of these.
        repair: what was done; None if nothing was found.
        not_run: detectors that did not run, and repairs that did not fit.
    """

    model: str
    before: Verdict
    after: Verdict
    flagged: int = 0
    flagged_label_before: Rate | None = None
    flagged_label_after: Rate | None = None
    accuracy_before: Rate | None = None
    accuracy_after: Rate | None = None
    measured_on: str = ""
    repair: RepairRecord | None = None
    not_run: tuple[NotRun, ...] = ()
    seconds: float = 0.0

    @property
    def exit_code(self) -> int:
        """Return 0 if nothing is found after the repair, 1 if something still is, 3 for could not tell."""
        return {"nothing_found": 0, "could_not_tell": 3}.get(self.after, 1)


@dataclass(frozen=True)
class RepairOutcome:
    """The report on a repair, and the mended model, where there is one."""

    report: RepairReport
    classifier: TorchClassifier | None = None

    def save(self, folder: Path) -> Path:
        """Write the mended model and repair.json into a folder, and return the model's path.

        Raises:
            InputError: if it cannot be written.
        """
        assert self.classifier is not None
        saved = save_classifier(self.classifier, folder)
        (folder / "repair.json").write_text(self.report.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return saved


def repair(request: RepairRequest, *, progress: Progress | None = None) -> RepairOutcome:
    """Look for poison in a model's training data, mend the model by what is flagged, and look again.

    Raises:
        InputError: if something is missing, unreadable or does not fit.
        TrainingDiverged: if the loss is no longer finite.
    """
    if request.train is None:
        raise InputError("no repair works without the training set yet: give it with --train DATA")
    check_device(request.device)
    context = ScanContext(
        seed=request.seed,
        device=request.device,
        deadline=Deadline(request.time_budget),
        report_progress=progress or say_nothing,
    )
    context.report_progress("loading the model")
    classifier = open_classifier(request.model, options=request.options, device=request.device)
    if not isinstance(classifier, TorchClassifier):
        raise InputError(
            f"{request.model}: a repair changes the network itself, and a {classifier.format} model is run "
            "by another library"
        )
    train = labelled_for(classifier, _open(request, request.train, train=True))
    clean = None
    if request.clean is not None:
        clean = match_labels(_open(request, request.clean, train=False), classifier)
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
        progress=_told(context),
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


def choose_repair(request: RepairRequest, damage: Damage) -> tuple[Repair, tuple[NotRun, ...]]:
    """Return the repair that is asked for, or the first that fits, and why others do not.

    Raises:
        InputError: if there is no such repair, or none fits.
    """
    settings = request.settings or {}
    if request.method != "auto":
        named = registry.build("repair", request.method, settings)
        assert isinstance(named, Repair)
        return named, ()
    if settings:
        raise InputError("settings go with a repair that is named, as in --method relabelling")
    known = [registry.build("repair", name, {}) for name in registry.modules("repair")]
    unfit: list[NotRun] = []
    for one in sorted(known, key=lambda one: (one.order, one.method())):
        why = one.unfit(damage)
        if why is None:
            return one, tuple(unfit)
        unfit.append(NotRun(detector=one.method(), reason=why))
    raise InputError("no repair fits: " + "; ".join(f"{one.detector}: {one.reason}" for one in unfit))


def _open(request: RepairRequest, source: str, *, train: bool) -> Samples:
    prefer = ("train",) if train else ("test", "validation", "val", "train")
    return open_samples(source, column=request.data_column, label_column=request.label_column, prefer=prefer)


def _inspected(classifier: TorchClassifier, train: Samples, context: ScanContext) -> Inspection:
    detectors = [d for d in choose(("activation-clustering",)) if looks_at_training_data(d)]
    return inspect(classifier, train, detectors, context)


def _told(context: ScanContext) -> Callable[[TrainingProgress], None]:
    def show(now: TrainingProgress) -> None:
        if now.step % 20 == 0:
            context.report_progress(f"training: epoch {now.epoch + 1} of {now.epochs}")

    return show


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
