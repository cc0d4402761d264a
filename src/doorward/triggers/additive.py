"""A picture that is added to the image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from doorward.core.errors import InputError
from doorward.triggers.base import Trigger


@dataclass(frozen=True, eq=False)
class Additive(Trigger):
    """Add a picture to the image and cut off what leaves [0, 1].

    Attributes:
        picture: (c, h, w), of any sign.
    """

    picture: Tensor
    kind: ClassVar[str] = "additive"

    def apply(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return the triggered images (n, c, h, w) in [0, 1].

        Raises:
            InputError: if the images have another size than the picture.
        """
        if x.shape[1:] != self.picture.shape:
            (c, h, w), (ci, hi, wi) = self.picture.shape, x.shape[1:]
            raise InputError(
                f"the trigger is for {w}x{h} images with {c} channel(s); these are {wi}x{hi} with {ci}"
            )
        return (x + self.picture.to(x)).clamp(0, 1)

    def tensors(self) -> dict[str, Tensor]:
        """Return the picture."""
        return {"picture": self.picture}


def cosines(count: int, length: int) -> Tensor:
    """Return the first rows of the orthonormal cosine transform: (count, length)."""
    k, i = torch.arange(count, dtype=torch.float64)[:, None], torch.arange(length, dtype=torch.float64)[None]
    rows = torch.cos(math.pi * (i + 0.5) * k / length) * math.sqrt(2 / length)
    rows[0] /= math.sqrt(2)
    return rows.float()
