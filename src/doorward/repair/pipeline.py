"""Open a model, and repair it by its training data or by clean samples."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from doorward.core.arguments import refuse_wrong, several
from doorward.core.budget import Deadline
from doorward.core.devices import check_device
from doorward.core.errors import InputError
from doorward.core.formatting import did_you_mean
from doorward.data.given import as_samples
from doorward.methods import registry
from doorward.models import Classifier, TorchClassifier, open_classifier
from doorward.repair.by_clean_data import repair_by_clean_data
from doorward.repair.by_model_alone import repair_by_model_alone
from doorward.repair.by_training_data import repair_by_training_data
from doorward.repair.report import RepairOutcome
from doorward.repair.request import RepairRequest
from doorward.scan.context import Progress, ScanContext, say_nothing
from doorward.scan.examine import built, taken


def repair(
    request: Any,
    *,
    clean: Any = None,
    train: Any = None,
    size: tuple[int, int, int] | None = None,
    classes: Sequence[str] | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> RepairOutcome:
    """Scan a model, mend it by what is found, and scan it again.

        outcome = repair(module, clean=(images, labels))

    With its training set, poison is looked for in that; otherwise a trigger is looked for in the model, and
    clean samples mend it, also where nothing is found. Without any data the model alone has to do: a trigger
    that is found in it is unlearnt on images that are made from it.

    Args:
        request: all that is asked for, or the model alone: a path, or whatever `examine` takes.
        clean, train: labelled samples: paths, or whatever `examine` takes.
        size, classes: of a model in memory, as `examine` takes them.
        settings: further fields of a `RepairRequest`; detectors may also be named.

    Raises:
        InputError: if something is missing, unreadable, of a wrong type or does not fit.
        TrainingDiverged: if the loss is no longer finite.
    """
    if not isinstance(request, RepairRequest):
        return _repair_given(request, clean, train, size, classes, progress, settings)
    return _repair(request, None, progress)


def _repair_given(
    model: Any,
    clean: Any,
    train: Any,
    size: tuple[int, int, int] | None,
    classes: Sequence[str] | None,
    progress: Progress | None,
    settings: dict[str, Any],
) -> RepairOutcome:
    known = {one.name for one in fields(RepairRequest)} - {"model", "clean", "train"}
    if strange := sorted(set(settings) - known):
        near = did_you_mean(strange[0], known) or f"; it takes {', '.join(sorted(known))}"
        raise InputError(f"repair: there is no argument {strange[0]!r}{near}")
    refuse_wrong("repair", {"size": size} | settings)
    if settings.get("method", "auto") != "auto":
        registry.refuse_unknown("repair", several("repair", "method", settings["method"]))
    named = settings.pop("detectors", None)
    detectors = () if named is None else tuple(built("repair", named))
    trusted = None if clean is None else as_samples(clean, what="clean")
    trained_on = None if train is None else as_samples(train, what="train", prefer=("train",))
    device = settings.get("device", "cpu")
    shown = trusted if trusted is not None else trained_on
    classifier, _ = taken(model, shown, size=size, classes=classes, device=device)
    path = os.fspath(model) if isinstance(model, str | os.PathLike) else "<memory>"
    return _repair(
        RepairRequest(model=path, clean=trusted, train=trained_on, detectors=detectors, **settings),
        classifier,
        progress,
    )


def _repair(
    request: RepairRequest, classifier: Classifier | None, progress: Progress | None
) -> RepairOutcome:
    check_device(request.device)
    context = ScanContext(
        seed=request.seed,
        device=request.device,
        deadline=Deadline(request.time_budget),
        report_progress=progress or say_nothing,
    )
    if classifier is None:
        context.report_progress("loading the model")
        classifier = open_classifier(
            request.model,
            options=request.options,
            factory=request.factory,
            weights=request.weights,
            device=request.device,
        )
    if not isinstance(classifier, TorchClassifier):
        raise InputError(
            f"{request.model}: a repair changes the network itself, and a {classifier.format} model is run "
            "by another library"
        )
    if request.train is not None:
        return repair_by_training_data(request, classifier, context)
    if request.clean is not None:
        return repair_by_clean_data(request, classifier, context)
    return repair_by_model_alone(request, classifier, context)
