"""What became of a trial."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from doorward.bench.inspection import Inspection
from doorward.bench.mending import Mending
from doorward.bench.planting import Planting
from doorward.core.errors import InputError
from doorward.core.records import Observations, Rate, Record


class Truth(Record):
    """What is known of a trial's model: its accuracy and, where one is planted, its backdoor.

    Attributes:
        robust_accuracy: of an adversarially trained model, under an attack stronger than in training.
    """

    classes: int
    clean_accuracy: Rate
    robust_accuracy: Rate | None = None
    attack: str | None = None
    targets: tuple[int, ...] = ()
    attack_success: Rate | None = None


class Outcome(Record):
    """What one trial gave.

    Attributes:
        seen: by the scan, if there is one.
        planting: what planting did, where that is measured instead.
        inspection: what detectors of poison found in the training set, where that is inspected.
        mending: what repairs made of the model, where that is measured.
        trained: seconds that the training took, now or when the model was cached.
        seconds: of the scan, or of measuring.
        peak_memory: bytes of the process at most during the scan; None where the system does not tell.
    """

    truth: Truth
    seen: Observations | None = None
    planting: Planting | None = None
    inspection: Inspection | None = None
    mending: Mending | None = None
    cached: bool
    trained: float
    seconds: float
    peak_memory: int | None


def stored_outcome(trial: str, result: dict[str, Any]) -> Outcome:
    """Return the outcome that a results store holds of a trial.

    Raises:
        InputError: if it cannot be understood.
    """
    try:
        return Outcome.model_validate(result)
    except ValidationError as error:
        raise InputError(
            f"the results store holds a result of {trial} that this version does not understand; "
            "run it again with another --store"
        ) from error


def without_pictures(seen: Observations) -> Observations:
    """Return observations without pictures, triggers and scores of samples, which would fill the store."""
    measurements = tuple(
        one.model_copy(
            update={"scores": None, "suspects": {}, "sources": {}} if one.level == "sample" else {}
        )
        for one in seen.measurements
    )
    measurements = tuple(
        one.model_copy(
            update={"evidence": tuple(e for e in one.evidence if e.type not in ("picture", "trigger"))}
        )
        for one in measurements
    )
    return seen.model_copy(update={"measurements": measurements})
