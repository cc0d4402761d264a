"""The same change for every image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from doorward.core.errors import InputError
from doorward.triggers.base import Trigger

if TYPE_CHECKING:
    pass


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
