"""Open a model, and repair it by its training data or by clean samples."""

from __future__ import annotations

from doorward.core.budget import Deadline
from doorward.core.devices import check_device
from doorward.core.errors import InputError
from doorward.models import TorchClassifier, open_classifier
from doorward.repair.by_clean_data import repair_by_clean_data
from doorward.repair.by_model_alone import repair_by_model_alone
from doorward.repair.by_training_data import repair_by_training_data
from doorward.repair.report import RepairOutcome
from doorward.repair.request import RepairRequest
from doorward.scan.context import Progress, ScanContext, say_nothing


def repair(request: RepairRequest, *, progress: Progress | None = None) -> RepairOutcome:
    """Scan a model, mend it by what is found, and scan it again.

    With its training set, poison is looked for in that; otherwise a trigger is looked for in the model, and
    clean samples mend it, also where nothing is found. Without any data the model alone has to do: a trigger
    that is found in it is unlearnt on images that are made from it.

    Raises:
        InputError: if something is missing, unreadable or does not fit.
        TrainingDiverged: if the loss is no longer finite.
    """
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
    if request.train is not None:
        return repair_by_training_data(request, classifier, context)
    if request.clean is not None:
        return repair_by_clean_data(request, classifier, context)
    return repair_by_model_alone(request, classifier, context)
