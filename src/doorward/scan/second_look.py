"""Look again, from other random starts, where a class stands out little more than in some clean model.

A search finds now more, now less. A clean model that raises an alarm may owe it to one lucky search: it was
picked for that. Further looks were not, and what they see on average decides. So looking again can only
take alarms away, and the p-value of the first look holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from doorward.core.budget import about
from doorward.core.formatting import joined, p_value
from doorward.core.records import Look, Observations, Report
from doorward.core.seeds import derive_seed
from doorward.scan.calibration import CalibrationSet, judge
from doorward.scan.context import ScanContext
from doorward.scan.verdict import doubted, standing_out

#: Further looks.
LOOKS = 2
#: How far a class stands out beyond the farthest clean model for one look to do; 1 is what the farther half
#: of clean models spread.
BEYOND = 1.0
#: Times that detectors took at first, which have to be left for another look.
SLACK = 1.3


def look_again(
    first: Report,
    seen: Observations,
    again: Callable[[Sequence[str], int], Observations],
    calibration: Callable[[Observations], CalibrationSet],
    context: ScanContext,
) -> Report:
    """Return the report of a scan once its alarm has been looked at again, where there is one to doubt.

    What was read in the graph or in files is proved, and is not looked at again. Detectors that raised no
    alarm keep what they measured. Where there is no time for another look, the alarm stays and that is told.

    Args:
        first: the report on what the first look saw.
        again: lets detectors, by name, look from another seed.
        calibration: returns what measurements are compared with.
    """
    flagged = [one for one in first.findings if one.flagged]
    if not flagged or first.verdict == "could_not_tell" or any(one.p_value is None for one in flagged):
        return first
    if judge(seen.measurements, calibration(seen)).beyond >= BEYOND:
        return first
    names, targets = [one.detector for one in flagged], list(first.targets)
    needed = SLACK * sum(one.seconds for one in flagged)
    looks, margins = list[Look](), list[list[float]]()
    for number in range(LOOKS):
        if needed > context.deadline.left():
            return _hurried(first, looks, f"one more takes about {about(needed)}")
        context.report_progress(f"looking again from other random starts: {joined(names)}")
        seed = derive_seed(context.seed, "look", str(number)) >> 32
        other = again(names, seed)
        mixed = _mixed(seen, other)
        judged = judge(mixed.measurements, calibration(mixed))
        compared = {one.detector for one in judged.findings if one.p_value is not None}
        if not set(names) <= compared or not np.isfinite(judged.margins).all():
            return _hurried(first, looks, "one more did not come to its end")
        margins.append([judged.margins[target] for target in targets])
        looks.append(Look(seed=seed, p_value=judged.p_value, margin=max(margins[-1])))
    report = first.model_copy(update={"looks": tuple(looks), "seconds": context.deadline.spent()})
    if np.mean(margins, axis=0).max() > 0:
        return report
    told = joined([p_value(one.p_value) for one in looks if one.p_value is not None])
    doubt = f"hardly in {LOOKS} more looks from other random starts ({told})"
    return doubted(report, f"{standing_out(first)}, but {doubt}", doubt)


def _mixed(seen: Observations, other: Observations) -> Observations:
    """Return what another look saw, and of detectors that had no part in it what was seen at first."""
    newer = {one.detector: one for one in other.measurements}
    measurements = tuple(newer.get(one.detector, one) for one in seen.measurements)
    return seen.model_copy(update={"measurements": measurements})


def _hurried(first: Report, looks: Sequence[Look], why: str) -> Report:
    """Return the report with what is to be known of an alarm that was not looked at as often as it should."""
    told = f"the alarm rests on {1 + len(looks)} of {1 + LOOKS} looks, so that it might be chance: {why}; "
    warnings = (f"{told}give more time with --time-budget", *first.warnings)
    return first.model_copy(update={"warnings": warnings, "looks": tuple(looks)})
