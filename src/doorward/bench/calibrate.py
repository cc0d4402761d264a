"""Make a detector's calibration from its scores on clean models (suite `calibration`)."""

from __future__ import annotations

from collections.abc import Sequence

from doorward.bench.store import Row
from doorward.bench.suite import MethodChoice, Scale, Trial, expand, get_suite, matching
from doorward.core.errors import InputError
from doorward.core.records import Measurement, Observations
from doorward.detectors.base import Detector
from doorward.methods import registry
from doorward.scan.calibration import Calibration, ScoredModel

#: Decimals of scores that are kept.
DIGITS = 3


def calibration_trials(detector: str, scale: Scale, only: str | None = None) -> tuple[Trial, ...]:
    """Return the trials that scan clean models with one detector.

    Raises:
        InputError: if there is no such detector or scale, or `only` matches nothing.
    """
    registry.get("detector", detector)
    suite = get_suite("calibration")
    settings = suite.scan_settings.model_copy(update={"detectors": (MethodChoice(name=detector),)})
    return matching(expand(suite.model_copy(update={"scan_settings": settings}), scale), only)


def calibration_of(detector: str, rows: Sequence[Row], *, weight: float = 1.0) -> Calibration:
    """Return a detector's calibration from the stored scans of clean models.

    Models that are no better than chance, of which no detector measures anything, are left out.

    Args:
        detector: a name, or `file.py:Class`.
        weight: of the detector in the sum that is fused.

    Raises:
        InputError: if no scan has a measurement, or they are by several versions or settings.
    """
    method = registry.build("detector", detector, {})
    assert isinstance(method, Detector)
    name = method.method()
    measured = [(row, seen) for row in rows if (seen := _measurement(row, name)) is not None]
    if not measured:
        raise InputError(f"no clean model has been scanned by {name}")
    versions = [row.versions for row, _ in measured]
    codes = {seen.code for _, seen in measured}
    images = {row.given["scan_settings"]["images"] for row, _ in measured}
    if len(codes) > 1 or len(images) > 1 or any(one != versions[0] for one in versions):
        raise InputError("the clean models were scanned by several versions; scan them again")
    return Calibration(
        detector=name,
        weight=weight,
        images=images.pop(),
        settings=method.score_settings(),
        code=str(codes.pop()),
        made_with=versions[0],
        models=tuple(_scored(row, seen) for row, seen in measured),
    )


def _measurement(row: Row, detector: str) -> Measurement | None:
    if row.status != "done" or row.result is None or row.result["seen"] is None:
        return None
    seen = Observations.model_validate(row.result["seen"])
    return next((one for one in seen.measurements if one.detector == detector), None)


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
