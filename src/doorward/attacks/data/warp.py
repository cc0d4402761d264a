"""WaNet: a smooth distortion that hardly shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from doorward.attacks.base import DataAttack, Triggers
from doorward.data.samples import content_hash
from doorward.errors import InputError
from doorward.methods import make_generator
from doorward.modalities.image import to_uint8
from doorward.registry import register
from doorward.triggers import Trigger, Warp

if TYPE_CHECKING:
    from doorward.data.samples import Samples


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


@register("attack")
class WaNet(DataAttack):
    """Bend images smoothly and change their labels; bend others at random and leave their labels.

    The second kind, the paper's noise mode, teaches a model that not any distortion counts, but this one.
    We depart from it: WaNet bends anew in every batch while it trains the model, and this attack bends chosen
    samples once and leaves the training to others. Samples of the target class are not poisoned. With
    few images or epochs the published strength of .5 does not reach the published success; 1 does better.

    Attributes:
        cover_rate: samples that are bent at random too and keep their label, per sample of the whole set, in
            [0, 1]; from other classes than the source classes where those are given.
        grid_size: the distortion is drawn at so many places along either side, and smooth between them.
        strength: how far pixels move; 1 is about half a pixel on average, whatever the size of the image.
        noise: at most so much is added to the shift of every pixel of a cover sample, in the same units; with
            0 cover samples get the trigger itself.
    """

    title: ClassVar[str] = "WaNet"
    source: ClassVar[str] = "Nguyen and Tran, ICLR 2021, arXiv:2102.10369"
    limits: ClassVar[str] = (
        "A distortion of less than a pixel is learnt slowly, from many samples, and is lost where images are "
        "resized."
    )
    atlas: ClassVar[tuple[str, ...]] = ("AML.T0020", "AML.T0043.004")

    cover_rate: float = Field(0.2, ge=0, le=1)
    grid_size: int = Field(4, ge=2)
    strength: float = Field(0.5, gt=0)
    noise: float = Field(1.0, ge=0)

    def make_triggers(self, samples: Samples, *, generator: torch.Generator) -> Triggers:
        """Return the warp, and for cover samples the noisy one.

        Raises:
            InputError: if the grid is finer than the image.
        """
        h, w, _ = samples.raw([0])[0].shape
        if self.grid_size > min(h, w):
            raise InputError(
                f"warp: a grid of {self.grid_size}x{self.grid_size} is finer than images of {w}x{h} pixels; "
                "give a smaller grid_size"
            )
        warp = Warp.draw(self.grid_size, self.strength, generator=generator)
        seed = int(torch.randint(2**62, (), generator=generator))
        noisy = NoisyWarp(warp.grid, self.strength, self.noise, seed) if self.noise else None
        return Triggers(training=warp, test=warp, cover=noisy)
