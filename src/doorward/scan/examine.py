"""Examine a classifier that is loaded: observe, conclude, draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from doorward.core.budget import Deadline
from doorward.core.records import Finding, Report
from doorward.data import Samples
from doorward.detectors.base import Detector
from doorward.models import Classifier
from doorward.scan.behaviour import choose, observe
from doorward.scan.calibration import calibrations
from doorward.scan.confirmation import illustrate
from doorward.scan.context import Progress, ScanContext, say_nothing
from doorward.scan.verdict import conclude


def examine(
    classifier: Classifier,
    samples: Samples | None = None,
    *,
    detectors: Sequence[Detector] | None = None,
    seed: int = 0,
    device: str = "cpu",
    time_budget: float | None = None,
    memory: int | None = None,
    images: int = 300,
    progress: Progress | None = None,
) -> Report:
    """Examine a classifier's behaviour and return the report; `doorward.scan` does it for files.

    Args:
        samples: clean images, labelled or not; some detectors need none.
        detectors: those to run; all that examine behaviour if None.
        time_budget: seconds; no limit if None.
        memory: bytes that the scan may take beyond the model; see `doorward.core.memory` if None.
        images: most images used (see `ScanRequest`).

    Raises:
        InputError: if the images or their labels do not fit the model.
    """
    context = ScanContext(
        seed=seed,
        device=device,
        deadline=Deadline(time_budget),
        images=images,
        memory=memory,
        report_progress=progress or say_nothing,
    )
    if detectors is None:
        chosen = choose((), clean=samples is not None)
        detectors = [d for d in chosen if not d.needs & {"artifact", "train"}]
    return examine_in(context, classifier, samples, detectors)


def examine_in(
    context: ScanContext,
    classifier: Classifier,
    samples: Samples | None,
    detectors: Sequence[Detector],
    *,
    role: Literal["clean", "train"] = "clean",
    findings: tuple[Finding, ...] = (),
) -> Report:
    """Examine a classifier's behaviour as part of a scan.

    Args:
        role: of the samples, for the record.
        findings: made already, on the files.

    Raises:
        InputError: if the images or their labels do not fit the model.
    """
    observed = observe(classifier, samples, detectors, context, role=role)
    read = (*findings, *observed.observations.findings)
    observations = observed.observations.model_copy(update={"findings": read})
    settings = {seen.detector: seen.settings for seen in observations.measurements}
    report = conclude(observations, calibrations(settings, settings))
    return illustrate(report, classifier, observed.trials)
