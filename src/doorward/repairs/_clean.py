"""What repairs by clean samples have in common: samples to stop by, and how much accuracy may be lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pydantic import Field

from doorward.core.errors import InputError
from doorward.core.records import Need, Rate
from doorward.core.seeds import derive_seed
from doorward.data import Samples
from doorward.models import TorchClassifier
from doorward.repairs.base import Damage, Repair
from doorward.training import evaluate

#: Share of the clean samples that is kept back to decide by, and the least number of clean samples.
KEPT_BACK, FEWEST = 0.25, 10


@dataclass(frozen=True)
class CleanSplit:
    """Clean samples in two parts: those that a repair learns from, and those that it is judged by."""

    fit: Samples
    validation: Samples


def split_clean(samples: Samples, seed: int) -> CleanSplit:
    """Keep a part of the clean samples back, evenly over the classes.

    Classes of a single sample keep it to learn from. Where that leaves nothing to be kept back, all samples
    are in both parts.

    Raises:
        InputError: if there are too few samples, or they have no labels.
    """
    if samples.labels is None:
        raise InputError(
            f"a repair needs labelled clean samples, and {samples.provenance.path} has no labels"
        )
    if len(samples) < FEWEST:
        raise InputError(
            f"a repair needs {FEWEST} clean samples at least, and {samples.provenance.path} holds "
            f"{len(samples)}: give more"
        )
    rng = np.random.default_rng(derive_seed(seed, "validation"))
    kept: list[int] = []
    for label in np.unique(samples.labels):
        rows = rng.permutation(np.flatnonzero(samples.labels == label))
        count = min(len(rows) - 1, max(1, round(KEPT_BACK * len(rows))))
        kept += rows[:count].tolist()
    if len(kept) < FEWEST:
        return CleanSplit(samples, samples)
    rest = np.setdiff1d(np.arange(len(samples)), kept)
    return CleanSplit(samples.select(rest), samples.select(np.sort(kept)))


class CleanRepair(Repair):
    """Mend a model with clean samples, whether or not something was found."""

    modalities = frozenset({"image", "text", "audio"})
    needs: ClassVar[frozenset[Need]] = frozenset({"weights", "clean", "clean_labels"})
    mends = frozenset({"backdoor", "poison"})
    needs_findings: ClassVar[bool] = False
    atlas = ("AML.T0018.000", "AML.T0020")

    drop: float = Field(
        0.04, ge=0, le=1, description="Accuracy on samples kept back that may be lost, as a share of all"
    )


def judged_by(damage: Damage) -> Samples:
    """Return the samples that a repair decides by."""
    samples = damage.validation or damage.clean
    assert samples is not None
    return samples


def check_accuracy(mended: TorchClassifier, damage: Damage, drop: float, *, advice: str) -> Rate:
    """Return a mended model's accuracy on the samples kept back.

    Raises:
        InputError: if it is surely less than was allowed: so is the upper end of its 95 % interval.
    """
    samples = judged_by(damage)
    before, after = evaluate(damage.classifier, samples), evaluate(mended, samples)
    if after.high < before.value - drop:
        raise InputError(
            f"the mended model is right on {after.value:.1%} of {after.n:,} samples kept back, it was on "
            f"{before.value:.1%}, and at most {drop:.1%} may be lost: {advice}"
        )
    return after


def check_classes(damage: Damage) -> None:
    """Raise unless each class has a clean sample: a network forgets what it no longer sees.

    Raises:
        InputError: naming classes without one.
    """
    assert damage.clean is not None
    assert damage.clean.labels is not None
    names = damage.classifier.classes
    missing = sorted(set(range(len(names))) - set(damage.clean.labels.tolist()))
    if missing:
        listed = ", ".join(names[i] for i in missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise InputError(
            f"fine-tuning forgets classes that it does not see, and {len(missing)} of {len(names)} have no "
            f"clean sample ({listed}): give some of each"
        )
