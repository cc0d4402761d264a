"""WaNet: a smooth distortion that hardly shows."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field

from doorward.attacks.data.base import DataAttack, Triggers
from doorward.core.errors import InputError
from doorward.methods.registry import register
from doorward.triggers.warp import Warp

if TYPE_CHECKING:
    from doorward.data.samples import Samples
from doorward.triggers.warp import NoisyWarp


@register("attack")
class WaNet(DataAttack):
    """Bend images smoothly and change their labels; bend others at random and leave their labels.

    Use it to test defences against a trigger that adds nothing to the image and only moves its pixels.

    The second kind, the paper's noise mode, teaches a model that not any distortion counts, but this one.

    We depart from the paper: WaNet bends again in every batch while it trains the model, and this attack
    bends chosen samples once and leaves the training to others. Samples of the target class are not poisoned.
    With few images or epochs the published strength of .5 does not reach the published success; 1 does
    better.

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
