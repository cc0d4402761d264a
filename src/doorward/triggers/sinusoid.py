"""A sinusoid over the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from doorward.triggers.base import Trigger

if TYPE_CHECKING:
    pass


def sinusoid(width: int, delta: float, frequency: float) -> Tensor:
    """Return one row (width,) of the signal: `delta * sin(2 pi j frequency / width)`, from j = 0 on."""
    columns = torch.arange(width, dtype=torch.float64)
    return delta * torch.sin(2 * torch.pi * columns * frequency / width)


@dataclass(frozen=True)
class Wave(Trigger):
    """Add the same row of a sinusoid to every row and channel; images of any size do.

    Attributes:
        delta: amplitude in grey levels of [0, 255].
        frequency: periods over the width.
    """

    delta: float
    frequency: float
    kind: ClassVar[str] = "wave"

    def apply(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return the triggered images (n, c, h, w), cut off at 0 and 1."""
        return (x + sinusoid(x.shape[3], self.delta, self.frequency).to(x) / 255).clamp(0, 1)

    def tensors(self) -> dict[str, Tensor]:
        """Return none: two numbers say it all."""
        return {}

    def settings(self) -> dict[str, Any]:
        """Return amplitude and frequency."""
        return {"delta": self.delta, "frequency": self.frequency}
