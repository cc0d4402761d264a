"""Scores that are alike for most classes: the search met a bound of the outputs, and says nothing."""

from __future__ import annotations

from typing import Any

from doorward.core.records import Measurement

#: How near scores lie to each other that count as alike. None of the calibration models comes near: with all
#: detectors, the highest score of each is shared by fewer than half of its classes.
ALIKE = 1e-3


def unless_saturated(measured: Measurement) -> Measurement:
    """Return a measurement, as one that could not tell if more than half of its classes share its top score.

    Where a model's outputs are bounded, every class reaches the same margin, and none can stand out.
    """
    known = sorted((s for s in measured.per_class.values() if s is not None), reverse=True)
    if measured.reason is not None or len(known) < 2 or known[0] - known[len(known) // 2] > ALIKE:
        return measured
    reason = "most classes reach the same score, as where a model's outputs are bounded"
    told: dict[str, Any] = {"reason": reason, "score": None, "per_class": {}}
    return measured.model_copy(update=told | {"summary": f"Could not tell: {reason}"})
