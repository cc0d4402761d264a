"""What a trigger search is given: a classifier, images, and which of them are sources for each class."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from doorward.inversion.sources import SourcePools
from doorward.models import Classifier
from doorward.models.batching import chunk_images


@dataclass(frozen=True)
class InversionProblem:
    """What is asked: a classifier, and images from which its classes shall be reached.

    Attributes:
        images: (n, c, h, w) float in [0, 1], on the classifier's device.
        pools: the sources of each class.
        seed: of what all searches on it share.
        shared: what one search has made of it and others use as well, by name.
    """

    classifier: Classifier
    images: Tensor
    pools: SourcePools
    seed: int = 0
    shared: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the names of the classes."""
        return self.classifier.classes

    @property
    def chunk(self) -> int:
        """Return how many images go through the model at once."""
        return chunk_images(self.classifier)

    def fast_inference(self) -> AbstractContextManager[None]:
        """Return a context in which the model runs on such images as fast as it can."""
        return self.classifier.fast_inference(self.images[: self.chunk])
