"""The shell of detectors that look for poison among training samples."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import numpy.typing as npt
import torch

from doorward.core.budget import Deadline
from doorward.core.errors import CouldNotTell
from doorward.core.records import Measurement
from doorward.detectors.base import Detector
from doorward.detectors.subject import Subject
from doorward.detectors.training_data._learned import Learned, learned

#: Samples below which nothing is said of a class.
FEWEST = 10


class TrainingDataDetector(Detector):
    """Run the model over all training samples once, and score them. Subclasses write `score_samples`."""

    needs = frozenset({"train", "features"})
    level = "sample"
    kind = "poison"
    order = 60
    atlas = ("AML.T0020", "AML.T0019")
    modalities = frozenset({"image", "text", "audio"})

    @abstractmethod
    def score_samples(
        self, seen: Learned, subject: Subject, generator: torch.Generator, deadline: Deadline
    ) -> Measurement:
        """Return a score for each sample and each class.

        Raises:
            CouldNotTell: with a reason, when the evidence does not suffice or the deadline is too near.
        """

    def examine(
        self, subject: Subject, *, generator: torch.Generator, device: torch.device, deadline: Deadline
    ) -> Measurement:
        """Return what `score_samples` finds in the training set.

        Raises:
            CouldNotTell: if there are no labels, a single class, or the model tells no samples apart.
        """
        assert subject.classifier is not None
        assert subject.train is not None
        if subject.train.labels is None:
            raise CouldNotTell("the training samples have no labels, which are what poison changes")
        present = np.unique(subject.train.labels)
        if len(present) < 2:
            raise CouldNotTell(f"the training samples are of {len(present)} class; poison needs two at least")
        seen = learned(subject, deadline)
        if not bool((seen.features.float().std(0) > 0).any()):
            raise CouldNotTell("the model sees the same in all training samples: their features do not vary")
        return self.score_samples(seen, subject, generator, deadline)


def rows_by_class(
    labels: npt.NDArray[np.int64], classes: int, fewest: int = FEWEST
) -> tuple[dict[int, npt.NDArray[np.int64]], dict[int, str]]:
    """Return the rows of each class that has enough of them, and why the other classes have no score."""
    rows = {c: np.flatnonzero(labels == c) for c in range(classes)}
    few = {
        c: f"{len(own)} samples are too few, {fewest} are needed"
        for c, own in rows.items()
        if len(own) < fewest
    }
    return {c: own for c, own in rows.items() if c not in few}, few
