"""Make a detector's calibration from its scores on clean models, or clean training sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from doorward.bench.results import observations_of
from doorward.bench.store import Row
from doorward.bench.suite import MethodChoice, Scale, Trial, expand, get_suite, matching
from doorward.core.errors import InputError
from doorward.core.records import Measurement
from doorward.detectors.base import Detector
from doorward.methods import registry
from doorward.scan.calibration import Calibration, ScoredModel
from doorward.scan.plan import quick_settings

#: Decimals of scores that are kept.
DIGITS = 3


def calibrated_settings(detector: str, *, quick: bool) -> dict[str, Any]:
    """Return the settings that a calibration is made at: none but the defaults, or the quick ones.

    Raises:
        InputError: if there is no such detector, or it has no quick settings.
    """
    if not quick:
        return {}
    settings = quick_settings(registry.build("detector", detector, {}))
    if not settings:
        raise InputError(f"{detector} has no quick settings; its class names them as `quick`")
    return settings


def calibration_trials(
    detector: str, scale: Scale, only: str | None = None, *, quick: bool = False
) -> tuple[Trial, ...]:
    """Return the trials that scan clean models with one detector.

    Args:
        detector: a name, or `file.py:Class`.
        quick: at the settings with which it runs where the time does not suffice for its defaults.

    Raises:
        InputError: if there is no such detector or scale, it reads files alone, or `only` matches nothing.
    """
    method = registry.get("detector", detector)
    needs = method.needs
    if method.level == "artifact":
        raise InputError(f"{detector} reads files; it measures no model and needs no calibration")
    choice = MethodChoice(name=detector, settings=calibrated_settings(detector, quick=quick))
    suite = get_suite("training-calibration" if "train" in needs else "calibration")
    settings = suite.scan_settings.model_copy(update={"detectors": (choice,)})
    return matching(expand(suite.model_copy(update={"scan_settings": settings}), scale), only)


def calibration_of(
    detector: str,
    rows: Sequence[Row],
    *,
    weight: float = 1.0,
    witness: str | None = None,
    quick: bool = False,
) -> Calibration:
    """Return a detector's calibration from the stored scans of clean models.

    Models that are no better than chance, of which no detector measures anything, are left out.

    Args:
        detector: a name, or `file.py:Class`.
        weight: of the detector in the sum that is fused.
        witness: name of the group of detectors in which it is judged; None for the usual ones.
        quick: whether they were made at the detector's quick settings.

    Raises:
        InputError: if no scan has a measurement, they are by several versions, or by other settings than the
            detector's defaults.
    """
    method = registry.build("detector", detector, calibrated_settings(detector, quick=quick))
    assert isinstance(method, Detector)
    name, settings = method.method(), method.score_settings()
    measured = [(row, seen) for row in rows if (seen := _measurement(row, name)) is not None]
    if not measured:
        raise InputError(f"no clean model has been scanned by {name}")
    versions = [row.versions for row, _ in measured]
    codes = {seen.code for _, seen in measured}
    images = {row.given["scan_settings"]["images"] for row, _ in measured}
    if len(codes) > 1 or len(images) > 1 or any(one != versions[0] for one in versions):
        raise InputError("the clean models were scanned by several versions; scan them with another --store")
    kind = "at its quick settings" if quick else "by default"
    if any(seen.settings.get(key) != value for _, seen in measured for key, value in settings.items()):
        raise InputError(f"the clean models were scanned with other settings than {detector} has {kind}")
    return Calibration(
        detector=name,
        weight=weight,
        witness=witness,
        images=images.pop(),
        settings=settings,
        code=str(codes.pop()),
        made_with=versions[0],
        models=tuple(_scored(row, seen) for row, seen in measured),
    )


def _measurement(row: Row, detector: str) -> Measurement | None:
    seen = observations_of(row)
    measurements = seen.measurements if seen is not None else ()
    return next((one for one in measurements if one.detector == detector), None)


def _scored(row: Row, seen: Measurement) -> ScoredModel:
    assert row.result is not None
    truth, spec = row.result["truth"], row.result["seen"]["subject"]["spec"]
    scores = [seen.per_class[t] for t in sorted(seen.per_class)]
    rounded = tuple(None if score is None else round(score, DIGITS) for score in scores)
    return ScoredModel(
        name=row.trial,
        data=row.given["data"]["name"],
        architecture=row.given["architecture"],
        classes=truth["classes"],
        shape=(spec["channels"], spec["height"], spec["width"]),
        robust=bool(row.given.get("robust")),
        accuracy=round(truth["clean_accuracy"]["value"], DIGITS),
        scores=None if seen.reason is not None else rounded,
    )
