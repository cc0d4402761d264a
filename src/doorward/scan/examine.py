"""Examine a classifier that is loaded: observe, conclude, draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from doorward.core.arguments import refuse_wrong, several
from doorward.core.budget import Deadline
from doorward.core.devices import check_device
from doorward.core.records import Finding, Observations, Report
from doorward.data import Samples
from doorward.data.given import as_samples
from doorward.detectors.base import Detector
from doorward.methods import registry
from doorward.models import Classifier
from doorward.models.errors import SizeUnknown
from doorward.models.formats.given import as_classifier
from doorward.scan.behaviour import choose, observe
from doorward.scan.calibration import CalibrationSet, calibrations
from doorward.scan.confirmation import illustrate
from doorward.scan.context import Progress, ScanContext, say_nothing
from doorward.scan.images import adopt_names
from doorward.scan.second_look import look_again
from doorward.scan.verdict import conclude


def examine(
    model: Any,
    samples: Any = None,
    *,
    size: tuple[int, int, int] | None = None,
    classes: Sequence[str] | None = None,
    detectors: Sequence[Detector | str] | Detector | str | None = None,
    seed: int = 0,
    device: str = "cpu",
    time_budget: float | None = None,
    memory: int | None = None,
    images: int = 300,
    progress: Progress | None = None,
) -> Report:
    """Examine a model's behaviour and return the report; `doorward.scan` does it for files.

    Args:
        model: a classifier, a path, a torch module (also of timm, or inside an object's `.model`), or a
            function of a batch of images (n, c, h, w) in [0, 1].
        samples: clean images, labelled or not: a path, an array or tensor, (images, labels), a torch Dataset,
            or a data set of the Hugging Face library; some detectors need none.
        size: (channels, height, width) of the model's images, where neither it nor the samples say so.
        classes: class names; those of the samples, or numbers, if None.
        detectors: those to run, or their names; all that examine behaviour if None.
        time_budget: seconds; no limit if None.
        memory: bytes that the scan may take beyond the model; see `doorward.core.memory` if None.
        images: most images used (see `ScanRequest`).

    Raises:
        InputError: if the images or their labels do not fit the model, or something is of a wrong type.
    """
    refuse_wrong(
        "examine",
        {"size": size, "seed": seed, "device": device, "time_budget": time_budget, "memory": memory}
        | {"images": images},
    )
    check_device(device)
    context = ScanContext(
        seed=seed,
        device=device,
        deadline=Deadline(time_budget),
        images=images,
        memory=memory,
        report_progress=progress or say_nothing,
    )
    classifier, clean = taken(model, samples, size=size, classes=classes, device=device)
    if not isinstance(model, Classifier):  # one that was given stays as it is
        adopt_names(classifier, clean)
    if detectors is None:
        every = choose((), clean=samples is not None)
        chosen = [d for d in every if not d.needs & {"artifact", "train"}]
    else:
        chosen = built("examine", detectors)
    return examine_in(context, classifier, clean, chosen)


def built(call: str, detectors: Any) -> list[Detector]:
    """Return detectors of what a Python user gave: names or detectors, or one alone.

    Raises:
        InputError: if something is neither.
    """
    given = several(call, "detectors", detectors, (str, Detector))
    return [registry.build("detector", one, {}) if isinstance(one, str) else one for one in given]


def taken(
    model: Any,
    samples: Any,
    *,
    what: str = "samples",
    size: tuple[int, int, int] | None = None,
    classes: Sequence[str] | None = None,
    device: str = "cpu",
) -> tuple[Classifier, Samples | None]:
    """Return a classifier and samples of what a Python user gave.

    Raises:
        InputError: if one is of a wrong type.
    """
    given = None if samples is None else as_samples(samples, what=what)
    if size is None and given is not None and given.modality == "image" and len(given):
        height, width, channels = given.raw([0])[0].shape
        try:
            return as_classifier(model, classes=classes, device=device), given
        except SizeUnknown:
            size = (channels, height, width)
    return as_classifier(model, size=size, classes=classes, device=device), given


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

    def again(names: Sequence[str], seed: int) -> Observations:
        asked = [one for one in detectors if one.method() in names]
        return observe(classifier, samples, asked, replace(context, seed=seed), role=role).observations

    report = conclude(observations, _calibration(observations))
    report = look_again(report, observations, again, _calibration, context)
    return illustrate(report, classifier, observed.trials)


def _calibration(seen: Observations) -> CalibrationSet:
    """Return the calibrations of the detectors that measured something, at the settings they ran with."""
    settings = {one.detector: one.settings for one in seen.measurements}
    return calibrations(settings, settings)
