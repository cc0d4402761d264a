"""What plants in random features share: a secret direction, and a shift that activates them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from doorward.core.errors import InputError
from doorward.models.classifier import TorchClassifier
from doorward.models.encode.image import to_float, to_tensor
from doorward.models.spec import InputSpec

if TYPE_CHECKING:
    from doorward.data.samples import Samples


def draw_direction(dimension: int, *, nonzeros: int | None, generator: torch.Generator) -> Tensor:
    """Draw a unit vector (d,) whose nonzero entries, all if None, lie anywhere and differ in sign alone.

    Raises:
        InputError: if there are more nonzero entries than entries.
    """
    count = dimension if nonzeros is None else nonzeros
    if count > dimension:
        raise InputError(f"a secret of {count} nonzero entries does not fit images of {dimension} values")
    where = torch.randperm(dimension, generator=generator)[:count]
    signs = torch.randint(2, (count,), generator=generator) * 2.0 - 1
    direction = torch.zeros(dimension, dtype=torch.float64)
    direction[where] = signs.double() / count**0.5
    return direction


def training_data(
    classifier: TorchClassifier, samples: Samples | None, *, method: str
) -> tuple[Tensor, Tensor]:
    """Return images (n, c, h, w) in [0, 1] and labels (n,) of 0 and 1.

    Raises:
        InputError: unless there are two classes, and samples of both.
    """
    if len(classifier.classes) != 2:
        raise InputError(
            f"{method}: as published, it tells two classes apart; there are {len(classifier.classes)}"
        )
    assert samples is not None, "the base checks"
    assert samples.labels is not None, "the base checks"
    y = torch.from_numpy(samples.labels)
    if len(torch.unique(y)) != 2:
        raise InputError(
            f"{method}: samples of both classes are needed, and {samples.provenance.path} has of one"
        )
    return to_float(to_tensor(samples, classifier.spec)), y


def trained(classifier: TorchClassifier, module: nn.Module) -> TorchClassifier:
    """Return a classifier of a network that takes images as they are, for the same images and classes."""
    old = classifier.spec
    spec = InputSpec(channels=old.channels, height=old.height, width=old.width, resize=old.resize)
    return TorchClassifier(module.to(classifier.device), spec, classifier.classes)
