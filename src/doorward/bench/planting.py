"""What planting did: how well the trigger works, and what it cost in accuracy, next to clean counterparts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

from doorward.core.records import Rate, Record
from doorward.stats.metrics import rate

#: What planting may cost at most, in mean accuracy next to clean counterparts.
KEPT = 0.01


class Planting(Record):
    """What planting one model did, measured on the whole test split.

    Attributes:
        accuracy: of the planted model, on clean images.
        twin: of its clean counterpart: the same data, seed, architecture and training, without the attack.
        success: how often the trigger turns images of the source classes into their target; None without
            a trigger.
        poison_rate: poisoned samples per sample; None where the model itself is changed.
        robust_accuracy: of the planted model, if it is adversarially trained.
        planted: processor seconds that planting took: poisoning all samples, or changing the model.
        trained: seconds that the training took; that of the counterpart where the model itself is changed.
    """

    accuracy: Rate
    twin: Rate
    success: Rate | None = None
    poison_rate: float | None = None
    robust_accuracy: Rate | None = None
    planted: float | None = None
    trained: float

    @property
    def change(self) -> float:
        """Return how much more accurate the planted model is than its counterpart."""
        return self.accuracy.value - self.twin.value


def pooled(rates: Iterable[Rate | None]) -> Rate | None:
    """Return the rate over the images of all models together; None if there is nothing to count."""
    found = [one for one in rates if one is not None]
    return rate(sum(one.successes for one in found), sum(one.n for one in found)) if found else None


def kept(plantings: Sequence[Planting]) -> bool:
    """Return whether planted models are on average at most a point less accurate than their counterparts."""
    # the sum of such differences is a hair off what it should be
    return fmean(one.change for one in plantings) >= -KEPT - 1e-9
