"""Open a model, and repair it by its training data or by clean samples."""

from __future__ import annotations

from doorward.core.budget import Deadline
from doorward.core.devices import check_device
from doorward.core.errors import InputError
from doorward.models import TorchClassifier, open_classifier
from doorward.repair.by_clean_data import repair_by_clean_data
from doorward.repair.by_training_data import repair_by_training_data
from doorward.repair.report import RepairOutcome
from doorward.repair.request import RepairRequest
from doorward.scan.context import Progress, ScanContext, say_nothing


def repair(request: RepairRequest, *, progress: Progress | None = None) -> RepairOutcome:
    """Scan a model, mend it by what is found, and scan it again.

    With its training set, poison is looked for in that; otherwise a trigger is looked for in the model, and
    clean samples mend it, also where nothing is found.

    Raises:
        InputError: if something is missing, unreadable or does not fit.
        TrainingDiverged: if the loss is no longer finite.
    """
    if request.train is None and request.clean is None:
        raise InputError(
            "a repair needs data: labelled samples that you trust with --clean DATA, or the training set "
            "with --train DATA"
        )
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
    run = repair_by_clean_data if request.train is None else repair_by_training_data
    return run(request, classifier, context)
