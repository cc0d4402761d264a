"""Judge what detectors measured of training data: pure functions of that and of the calibration."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from doorward.core.records import Coverage, Finding, Measurement, NotRun, Observations, Report, Verdict
from doorward.scan.calibration import BACKDOORED, CalibrationSet

#: Share of clean training sets that may be flagged: the p-value up to which there is an alarm; and that up to
#: which further classes of a flagged set are.
ALARM, FURTHER = BACKDOORED, 0.05


def of_training_data(seen: Observations) -> bool:
    """Return whether all that was measured are samples."""
    return bool(seen.measurements) and all(one.level == "sample" for one in seen.measurements)


def conclude_training_data(seen: Observations, calibration: CalibrationSet) -> Report:
    """Return the report on training data: every detector's scores judged, and one verdict."""
    spec = seen.subject.spec if seen.subject else {}
    modality = str(spec.get("modality", "image"))
    findings = tuple(judge_samples(one, calibration, modality=modality) for one in seen.measurements)
    verdict, reason = verdict_on(findings, seen.not_run)
    judged = [f for f in findings if f.threshold is not None]
    return Report(
        subject=seen.subject,
        data=seen.data,
        verdict=verdict,
        reason=reason,
        targets=tuple(dict.fromkeys(t for f in findings if f.flagged for t in f.targets)),
        p_value=judged[0].p_value if judged else None,
        calibrated=bool(judged) and judged[0].calibrated,
        warnings=seen.warnings,
        covered=Coverage(training_data=tuple(f.detector for f in judged)),
        findings=findings,
        not_run=seen.not_run,
        seconds=seen.seconds,
        environment=seen.environment,
    )


def judge_samples(seen: Measurement, calibration: CalibrationSet, *, modality: str = "image") -> Finding:
    """Return what follows from a detector's scores of a training set's classes.

    A set is suspicious if a class's score reaches the threshold that the method's authors give, and at most
    one in a hundred clean training sets has a class with so high a score. In a suspicious set, a further
    class is flagged if one in twenty has one at most: who poisons one may poison others. Where no clean sets
    were measured, or only of another kind of input, that threshold decides alone, and the finding is not
    calibrated. A detector without either has no part in the verdict.
    """
    base = {name: getattr(seen, name) for name in Measurement.model_fields}
    base |= {"atlas": (), "suspects": {}, "sources": {}, "scores": None}
    if seen.reason is not None or seen.score is None:
        return Finding(**base | {"verdict": "could_not_tell", "reason": seen.reason or "it gives no score"})
    unfit = _unfit(seen, calibration, modality)
    if seen.published_threshold is None and unfit is not None:
        return Finding(**base | {"verdict": "nothing_found", "uncalibrated": unfit})
    least = threshold = seen.published_threshold or 0.0
    p_value = None
    if unfit is None:
        highest = _highest(seen.detector, calibration)
        p_value = (1 + sum(one >= seen.score for one in highest)) / (1 + len(highest))
        least, threshold = (max(least, _enough(highest, level)) for level in (FURTHER, ALARM))
        least = min(least, threshold)  # clean sets may be enough for the lower level alone
    suspicious = any(one is not None and one >= threshold for one in seen.per_class.values())
    flagged = tuple(
        c for c, one in sorted(seen.per_class.items()) if suspicious and one is not None and one >= least
    )
    ids = tuple(dict.fromkeys(one for c in flagged for one in seen.suspects.get(c, ())))
    scores = seen.scores if isinstance(seen.scores, dict) else {}
    return Finding(
        **base
        | {
            "verdict": "suspicious" if flagged else "nothing_found",
            "threshold": threshold,
            "p_value": p_value,
            "calibrated": unfit is None,
            "targets": flagged,
            "flagged_ids": ids,
            "scores": {one: scores[one] for one in ids if one in scores},
            "sources": {one: seen.sources[one] for one in ids if one in seen.sources},
            "atlas": seen.atlas if flagged else (),
        }
    )


def _enough(highest: Sequence[float], level: float) -> float:
    """Return the score from which on the p-value is at most `level`; 0 where there are too few clean sets.

    Args:
        highest: scores of clean sets, in falling order.
    """
    above = int(level * (1 + len(highest)) + 1e-9) - 1  # so many clean sets may score as high
    return float(np.nextafter(highest[above], np.inf)) if 0 <= above < len(highest) else 0.0


def _unfit(seen: Measurement, calibration: CalibrationSet, modality: str) -> str | None:
    """Return why a measurement cannot be compared with clean training sets, None if it can."""
    if modality != "image":
        return "clean training sets of images alone have been measured"
    why = calibration.mismatch(seen)
    return None if why is None else why.replace("models were scanned", "training sets were inspected")


def _highest(detector: str, calibration: CalibrationSet) -> list[float]:
    """Return the highest score that a class of each clean training set has, in falling order."""
    scores = (model.scores.get(detector) for model in calibration.models)
    found = [max((one for one in own if one is not None), default=0.0) for own in scores if own is not None]
    return sorted(found, reverse=True)


def verdict_on(findings: Sequence[Finding], not_run: Sequence[NotRun]) -> tuple[Verdict, str | None]:
    """Return the verdict on a training set, and why there is none."""
    if any(finding.flagged for finding in findings):
        return "suspicious", None
    if any(finding.threshold is not None for finding in findings):
        return "nothing_found", None
    reasons = dict.fromkeys(
        [*(f.reason for f in findings if f.reason), *(f"{n.detector} {n.reason}" for n in not_run)]
    )
    ranked = "the detectors that ran rank samples, and none says whether there is poison"
    return "could_not_tell", "; ".join(reasons) or ranked
