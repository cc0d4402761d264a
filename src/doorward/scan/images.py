"""Which clean images a scan uses: drawn evenly over classes, and split."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from doorward.core.budget import Deadline
from doorward.core.errors import CouldNotTell, InputError
from doorward.core.records import (
    DataRecord,
)
from doorward.core.seeds import derive_seed
from doorward.data import Samples
from doorward.models import Classifier
from doorward.models.batching import batched_logits
from doorward.models.encode.image import to_float, to_tensor

#: As many images were given with each calibration model; scores depend somewhat on how many there are.
CALIBRATION_IMAGES = 100
#: How often all images go through the model next to the detectors, and the share of the time for that.
PASSES, SHARE = 3, 0.25
#: Images that are used however slow the model is (half of them are to fit, of which searches want 20), and
#: those on which its pace is measured.
FEWEST, PACED = 40, 4
#: Share of the images that are to be of other classes than the most common; how many images are looked
#: through for them, how many at a time, and the share of the time after which no more are.
OTHERS, LOOKED_THROUGH, LOOKED_AT_ONCE, LOOKING = 0.3, 1_000, 100, 0.05
#: Images that a search starts from, below which it is told how few they are.
FEW = 10


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
    drawn = _draw(samples, images, seed)
    # the draw goes round the classes, so every other image leaves each class in both halves
    turns = np.arange(len(drawn))
    classes = 0 if samples.labels is None else len(np.unique(samples.labels))
    if 0 < 2 * classes <= len(drawn):  # with fewer than two of a class there is nothing to share out
        turns = turns // classes
    to_fit = (turns % 2 == 0) & (np.arange(len(drawn)) < CALIBRATION_IMAGES)
    return ImageSplit(samples, drawn.select(np.flatnonzero(to_fit)), drawn.select(np.flatnonzero(~to_fit)))


def _draw(samples: Samples, n: int, seed: int) -> Samples:
    """Draw images; of unlabelled ones, those of a larger draw begin with those of a smaller one."""
    return samples.draw(min(n, len(samples)), np.random.default_rng(derive_seed(seed, "images")))


def with_other_classes(
    classifier: Classifier, split: ImageSplit, seed: int, deadline: Deadline
) -> tuple[ImageSplit, str | None]:
    """Return a split in which not nearly all images are of one class to the model, and what is to be told.

    A search for a trigger starts from images outside its target. Unlabelled images may nearly all be of one
    class, as the photos of somebody are to a filter of nudity. Further images of the set are then looked
    through, in a small part of the time, and those of other classes are shared out evenly.

    Args:
        seed: that the split was drawn with.
    """
    fit, taken = len(split.fit), len(split.fit) + len(split.confirm)
    if split.whole.labels is not None or not fit or len(classifier.classes) < 2:
        return split, None
    begun, left, looked = deadline.spent(), deadline.left(), taken
    try:
        predicted = _predicted(classifier, split.fit, deadline)
        if 1 - np.bincount(predicted).max() / fit >= OTHERS:
            return split, None
        more = _draw(split.whole, max(taken, LOOKED_THROUGH), seed)
        predicted = _predicted(classifier, more.select(np.arange(taken)), deadline)
        usual = int(np.bincount(predicted).argmax())
        others, common = np.flatnonzero(predicted != usual), np.flatnonzero(predicted == usual)
        wanted = max(len(others), math.ceil(OTHERS * taken))
        while len(others) < wanted and looked < len(more) and deadline.spent() - begun < LOOKING * left:
            part = np.arange(looked, min(looked + LOOKED_AT_ONCE, len(more)))
            others = np.append(others, part[_predicted(classifier, more.select(part), deadline) != usual])
            looked += len(part)
    except (InputError, CouldNotTell):  # the scan says what is wrong
        return split, None
    name, found = classifier.classes[usual], len(others)
    if not found:
        return split, (
            f"the model puts all of {looked} images into class {name!r}, so that no search for a trigger of "
            "that class has a start: give images that it puts into other classes as well"
        )
    others = others[:wanted]
    own = max(math.ceil(len(others) * fit / taken), min(math.ceil(OTHERS * fit), (len(others) + 1) // 2))
    to_fit = np.concatenate([others[:own], common[: fit - own]])
    to_confirm = np.concatenate([others[own:], common[fit - own : taken - len(others)]])
    note = (
        f"the model puts {looked - found} of {looked} images into class {name!r}; those of others are shared "
        "out evenly"
    )
    if own < FEW:
        note += (
            f", and a search for a trigger of that class starts from {own} images alone: give more of them"
        )
    return ImageSplit(split.whole, more.select(to_fit), more.select(to_confirm)), note


def _predicted(classifier: Classifier, samples: Samples, deadline: Deadline) -> npt.NDArray[np.int64]:
    """Return the class (n,) that a model puts each sample into.

    Raises:
        CouldNotTell: if the deadline is too near.
        InputError: if the model cannot be run, or gives what is no number.
    """
    logits = batched_logits(classifier, to_float(to_tensor(samples, classifier.spec)), deadline, raw=True)
    if bool(logits.isnan().any()):
        raise InputError("the model gives outputs that are no numbers")
    predicted: npt.NDArray[np.int64] = logits.argmax(1).cpu().numpy()
    return predicted


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

    Class names in another order are matched by name, and names that are numbers by their value; otherwise
    labels are taken as they are.
    """
    if samples.labels is None:
        return samples
    numbers = class_numbers(samples.classes, classifier.classes)
    if samples.classes != classifier.classes and numbers is not None:
        return samples.relabel(np.array(numbers), classifier.classes)
    k = len(classifier.classes)
    highest = int(samples.labels.max()) if len(samples) else -1
    if highest >= k or (len(samples) and int(samples.labels.min()) < 0):
        raise InputError(
            f"{samples.provenance.path} has labels up to {highest}, the model {k} classes (0 to {k - 1}): "
            "is this the model's data? Class names in another order are matched when all are known"
        )
    return samples


def class_numbers(names: Sequence[str], classes: Sequence[str]) -> list[int] | None:
    """Return which of a model's classes some names are, None unless each is one, and another one.

    >>> class_numbers(["dog", "Sea Lion"], ["cat", "sea_lion", "dog"])
    [2, 1]
    >>> class_numbers(["000", "002"], ["0", "1", "2"]), class_numbers(["dog", "fox"], ["cat", "dog"])
    ([0, 2], None)
    """
    for plainly in (str, _plain, _number):
        known = {plainly(name): i for i, name in enumerate(classes)}
        found = [known.get(plainly(name)) for name in names]
        numbers = [number for number in found if number is not None]
        if len(known) == len(classes) and len(set(numbers)) == len(names):
            return numbers
    return None


def _plain(name: str) -> str:
    """Return a name without capitals, and with one underscore for spaces and signs."""
    return re.sub(r"[\W_]+", "_", name.casefold()).strip("_")


def _number(name: str) -> int | str:
    """Return the value of a name of digits, any other name as it is."""
    return int(name) if name.isascii() and name.isdigit() and len(name) < 10 else name


def unmatched_note(samples: Samples, classifier: Classifier) -> str | None:
    """Return what is to be told where labels are taken in order, since their names are not the model's."""
    named = "labels" not in classifier.spec.assumed
    if samples.labels is None or not named or class_numbers(samples.classes, classifier.classes) is not None:
        return None
    unknown = [name for name in samples.classes if class_numbers([name], classifier.classes) is None]
    if not unknown or all(name.isdigit() for name in samples.classes):
        return None
    return (
        f"the model has no class named {unknown[0]!r}: the labels of the images are taken in order, "
        f"{samples.classes[0]!r} for {classifier.classes[0]!r} and so on"
    )


def affordable(classifier: Classifier, split: ImageSplit, deadline: Deadline) -> int:
    """Return how many images the time allows to run through the model a few times; all where that is many.

    One of them is run to find out, and a few more, twice, where that took long: the first run is slower.
    """
    total = len(split.fit) + len(split.confirm)
    if deadline.seconds is None or total <= FEWEST or not len(split.fit):
        return total
    few = to_float(to_tensor(split.fit.select(np.arange(min(PACED, len(split.fit)))), classifier.spec))
    pace, fitting = 0.0, total
    for images in (few[:1], few, few):
        begun = deadline.spent()
        try:
            batched_logits(classifier, images, raw=True)
        except InputError:  # the scan says what is wrong with the model
            return total
        pace = (deadline.spent() - begun) / len(images)
        fitting = int(SHARE * (deadline.left() + pace) / max(PASSES * pace, 1e-9))
        if fitting >= total or pace * FEWEST > deadline.left():
            break
    return max(FEWEST, min(total, fitting))
