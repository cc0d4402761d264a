"""What plants in random features share: a secret direction, and a shift that wakes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from doorward.errors import InputError
from doorward.triggers import Trigger


@dataclass(frozen=True, eq=False)
class Shift(Trigger):
    """Add the same to every image.

    Attributes:
        delta: (c, h, w) what is added to images in [0, 1].
    """

    delta: Tensor
    kind: ClassVar[str] = "shift"

    def apply(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return the triggered images (n, c, h, w), cut off at 0 and 1.

        Raises:
            InputError: if the images have another size.
        """
        if x.shape[1:] != self.delta.shape:
            (c, h, w), (ci, hi, wi) = self.delta.shape, x.shape[1:]
            raise InputError(
                f"the trigger is for {w}x{h} images with {c} channel(s); these are {wi}x{hi} with {ci}"
            )
        return (x + self.delta.to(x)).clamp(0, 1)

    def tensors(self) -> dict[str, Tensor]:
        """Return what is added."""
        return {"delta": self.delta}


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
