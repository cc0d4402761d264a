"""The shell of detectors that show a model changed images and see where they go."""

from __future__ import annotations

from abc import abstractmethod

import torch
from pydantic import Field

from doorward.core.budget import Deadline
from doorward.core.errors import CouldNotTell
from doorward.core.records import Measurement
from doorward.detectors.base import Detector
from doorward.detectors.subject import Subject
from doorward.inversion.problem import InversionProblem
from doorward.inversion.sources import SourcePools, outside_class
from doorward.methods.base import EVIDENCE_ONLY
from doorward.models.encode.image import to_float, to_tensor


class ImageDetector(Detector):
    """Check the images, sort out which are sources for which class, and ask. Subclasses write
    `score_classes`."""

    needs = frozenset({"gradients", "clean"})
    atlas = ("AML.T0018.000", "AML.T0020", "AML.T0043.004")

    min_images: int = Field(
        20,
        ge=2,
        description="Clean images below which nothing is concluded",
        json_schema_extra=EVIDENCE_ONLY,
    )

    @abstractmethod
    def score_classes(
        self, problem: InversionProblem, generator: torch.Generator, deadline: Deadline
    ) -> Measurement:
        """Return a finding with one score per class.

        Raises:
            CouldNotTell: with a reason, when the evidence does not suffice or the deadline is too near.
        """

    def examine(
        self, subject: Subject, *, generator: torch.Generator, device: torch.device, deadline: Deadline
    ) -> Measurement:
        """Return what `look` finds with the images given."""
        classifier, samples = subject.classifier, subject.clean
        assert classifier is not None
        assert samples is not None
        if len(samples) < self.min_images:
            raise CouldNotTell(f"{len(samples)} clean images are too few; give at least {self.min_images}")
        problem = shared_problem(subject)
        if problem is None:
            images = to_float(to_tensor(samples, classifier.spec))  # (n, c, h, w)
            labels = None if samples.labels is None else torch.from_numpy(samples.labels)
            pools = SourcePools(outside_class(classifier, images, labels, deadline))
            problem = InversionProblem(classifier, images.to(classifier.device), pools, subject.seed)
            subject.keep(problem, _NAME, classifier, samples)
        return self.score_classes(problem, generator, deadline)


def shared_problem(subject: Subject) -> InversionProblem | None:
    """Return the problem that the detectors of a subject share, None before the first of them ran."""
    problem: InversionProblem | None = subject.kept(_NAME, subject.classifier, subject.clean)
    return problem


_NAME = "inversion problem"
