"""The images from which each class is to be reached."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from doorward.core.budget import Deadline
from doorward.core.errors import CouldNotTell
from doorward.models import Classifier
from doorward.models.batching import batched_logits


class SourcePools:
    """Hold, for each target, the images from which it can be reached: those outside the target class.

    Args:
        outside: (n, k) bool, whether image n counts as a source for target k.

    Raises:
        CouldNotTell: if a target has no source images.
    """

    def __init__(self, outside: Tensor) -> None:
        self.outside = outside
        self.count = outside.sum(0)  # (k,)
        if int(self.count.min()) == 0:
            raise CouldNotTell(f"there are no images outside class {int(self.count.argmin())}")
        # stable sort puts each target's sources first: (k, n)
        self.order = (~outside).T.to(torch.uint8).sort(dim=1, stable=True).indices

    def draw(self, targets: Tensor, size: int, generators: Sequence[torch.Generator]) -> Tensor:
        """Draw `size` source positions for each target, each by its own generator: (k, size)."""
        u = torch.stack([torch.rand(size, generator=g) for g in generators])
        pick = (u * self.count[targets, None]).long()
        return self.order[targets].gather(1, pick)


def outside_class(
    classifier: Classifier, images: Tensor, labels: Tensor | None, deadline: Deadline | None = None
) -> Tensor:
    """Return which images (n, c, h, w) count as sources for which class: (n, k) bool.

    An image is no source for its own class, nor for the class that the model puts it in anyway.

    Raises:
        CouldNotTell: if the deadline is too near.
    """
    predicted = batched_logits(classifier, images, deadline).argmax(1).cpu()  # (n,)
    outside = torch.ones(len(images), len(classifier.classes), dtype=torch.bool)
    outside[torch.arange(len(images)), predicted] = False
    if labels is not None:
        outside[torch.arange(len(images)), labels] = False
    return outside
