"""Which clean images a scan uses: drawn evenly over classes, and split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from doorward.core.errors import InputError
from doorward.core.records import (
    DataRecord,
)
from doorward.core.seeds import derive_seed
from doorward.data import Samples
from doorward.models import Classifier

#: As many images were given with each calibration model; scores depend somewhat on how many there are.
CALIBRATION_IMAGES = 100


@dataclass(frozen=True)
class ImageSplit:
    """The images in use: some to fit, some to confirm on."""

    whole: Samples
    fit: Samples
    confirm: Samples

    def record(self, role: Literal["clean", "train"]) -> DataRecord:
        """Return what was read and how much of it is used."""
        origin = self.whole.provenance
        return DataRecord(
            role=role,
            path=origin.path,
            sha256=origin.sha256,
            rows=origin.rows,
            used=len(self.fit) + len(self.confirm),
            labelled=self.whole.labels is not None,
        )


def draw_images(classifier: Classifier, samples: Samples, images: int, seed: int) -> ImageSplit:
    """Draw images evenly over the classes and split them into those to fit and those to confirm on.

    Half of the first hundred or so are to fit, as with the models of the calibration set: scores depend
    somewhat on how many there are. All others confirm, so more images make a confirmation surer.
    """
    if samples.modality != "image":
        raise InputError(f"the model takes images, {samples.provenance.path} holds {samples.modality}")
    samples = match_labels(samples, classifier)
    rng = np.random.default_rng(derive_seed(seed, "images"))
    drawn = samples.draw(min(images, len(samples)), rng)
    # the draw goes round the classes, so every other image leaves each class in both halves
    turns = np.arange(len(drawn))
    classes = 0 if samples.labels is None else len(np.unique(samples.labels))
    if 0 < 2 * classes <= len(drawn):  # with fewer than two of a class there is nothing to share out
        turns = turns // classes
    to_fit = (turns % 2 == 0) & (np.arange(len(drawn)) < CALIBRATION_IMAGES)
    return ImageSplit(samples, drawn.select(np.flatnonzero(to_fit)), drawn.select(np.flatnonzero(~to_fit)))


def adopt_names(classifier: Classifier, samples: Samples | None) -> None:
    """Give a model without class names those of labelled samples, in the order of their numbers."""
    numbers = tuple(map(str, range(len(classifier.classes))))
    if samples is None or samples.labels is None or classifier.classes != numbers:
        return
    if len(samples.classes) == len(numbers) and samples.classes != numbers:
        classifier.classes = samples.classes
        classifier.notes = (
            *classifier.notes,
            f"the model states no class names: those of {samples.provenance.path} are used, in their order",
        )


def match_labels(samples: Samples, classifier: Classifier) -> Samples:
    """Return the samples with labels that are class numbers of the model.

    Class names in another order are matched by name; otherwise numbers are taken as they are.
    """
    if samples.labels is None:
        return samples
    names = {name: i for i, name in enumerate(classifier.classes)}
    if samples.classes != classifier.classes and set(samples.classes) <= set(names):
        return samples.relabel(np.array([names[name] for name in samples.classes]), classifier.classes)
    k = len(classifier.classes)
    highest = int(samples.labels.max()) if len(samples) else -1
    if highest >= k or (len(samples) and int(samples.labels.min()) < 0):
        raise InputError(
            f"{samples.provenance.path} has labels up to {highest}, the model {k} classes (0 to {k - 1}): "
            "is this the model's data? Class names in another order are matched when all are known"
        )
    return samples
