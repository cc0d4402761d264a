"""A pattern that replaces, or is blended over, a part of the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from doorward.core.errors import InputError
from doorward.triggers.base import Trigger


@dataclass(frozen=True, eq=False)
class MaskedPattern(Trigger):
    """Blend a pattern over a place: `x * (1 - mask) + mask * pattern`.

    Attributes:
        mask: (1, h, w) in [0, 1]; 1 replaces the pixel.
        pattern: (c, h, w) in [0, 1].
    """

    mask: Tensor
    pattern: Tensor
    kind: ClassVar[str] = "masked-pattern"

    def apply(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return the triggered images (n, c, h, w) in [0, 1].

        Raises:
            InputError: if the images have another size than the pattern.
        """
        if x.shape[1:] != self.pattern.shape:
            (c, h, w), (ci, hi, wi) = self.pattern.shape, x.shape[1:]
            raise InputError(
                f"the trigger is for {w}x{h} images with {c} channel(s); these are {wi}x{hi} with {ci}"
            )
        mask, pattern = self.mask.to(x), self.pattern.to(x)
        return torch.lerp(x, pattern.expand_as(x), mask.expand_as(x))

    def tensors(self) -> dict[str, Tensor]:
        """Return mask and pattern."""
        return {"mask": self.mask, "pattern": self.pattern}
