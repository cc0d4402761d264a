"""Smooth distortions of the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from doorward.core.seeds import make_generator
from doorward.data.samples import content_hash
from doorward.models.encode.image import to_uint8
from doorward.triggers.base import Trigger


@dataclass(frozen=True, eq=False)
class Warp(Trigger):
    """Bend the image smoothly: each pixel shows what lies a little away from its place.

    Attributes:
        grid: (2, k, k) how far to the right and down, at k x k places spread evenly from edge to edge.
        strength: factor of the grid; where both are 1, a pixel shows what lies about half a pixel away.

    Source: A. Nguyen, A. Tran, WaNet, ICLR 2021, arXiv 2102.10369. We depart from it: a shift is measured by
    the image's width and height, each along its own axis, where theirs are square.
    """

    grid: Tensor
    strength: float
    kind: ClassVar[str] = "warp"

    @staticmethod
    def draw(size: int, strength: float, *, generator: torch.Generator) -> Warp:
        """Draw a grid of `size` x `size` shifts, uniform and scaled to a mean absolute value of 1."""
        grid = torch.rand(2, size, size, generator=generator) * 2 - 1
        return Warp(grid / grid.abs().mean(), strength)

    def apply(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return the triggered images (n, c, h, w) in [0, 1]; any size does."""
        h, w = x.shape[2:]
        columns, rows = (torch.linspace(-1, 1, side, dtype=x.dtype, device=x.device) for side in (w, h))
        here = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)  # (h, w, 2)
        shift = F.interpolate(self.grid[None].to(x), (h, w), mode="bicubic", align_corners=True)[0]
        shift = shift.permute(1, 2, 0) * self.strength / here.new_tensor([w, h])  # (h, w, 2)
        where = (here + shift).clamp(-1, 1).expand(len(x), h, w, 2)
        return F.grid_sample(x, where, align_corners=True).clamp(0, 1)

    def tensors(self) -> dict[str, Tensor]:
        """Return the grid."""
        return {"grid": self.grid}

    def settings(self) -> dict[str, Any]:
        """Return the strength."""
        return {"strength": self.strength}


@dataclass(frozen=True, eq=False)
class NoisyWarp(Trigger):
    """Bend each image as `Warp` does, and shift each of its pixels at random besides.

    The noise comes from the seed and the image's own pixels, so that one image gets the same every time.

    Attributes:
        grid, strength: those of the warp.
        noise: at most so much is added to the shift of a pixel, in the units of the warp.
    """

    grid: Tensor
    strength: float
    noise: float
    seed: int
    kind: ClassVar[str] = "noisy-warp"

    def apply(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return the bent images (n, c, h, w) in [0, 1]; any size does."""
        h, w = x.shape[2:]
        smooth = F.interpolate(self.grid[None].to(x), (h, w), mode="bicubic", align_corners=True)[0]
        bent = []
        for image, raw in zip(x, to_uint8(x), strict=True):
            own = make_generator(self.seed, content_hash(raw))
            noise = self.noise * (2 * torch.rand(2, h, w, generator=own) - 1)
            # a grid with a shift for every pixel is taken as it is
            bent.append(Warp(self.strength * smooth + noise.to(x), 1.0).apply(image[None]))
        return torch.cat(bent)

    def tensors(self) -> dict[str, Tensor]:
        """Return the grid."""
        return {"grid": self.grid}

    def settings(self) -> dict[str, Any]:
        """Return strength, noise and seed."""
        return {"strength": self.strength, "noise": self.noise, "seed": self.seed}
