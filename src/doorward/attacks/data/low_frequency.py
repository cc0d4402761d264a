"""A smooth picture of low frequencies, added to the image."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field

from doorward.attacks.data.base import DataAttack, Triggers
from doorward.methods.registry import register
from doorward.triggers.additive import Additive, cosines

if TYPE_CHECKING:
    from doorward.data.samples import Samples


@register("attack")
class LowFrequency(DataAttack):
    """Add a smooth picture, drawn at random from the lowest frequencies, to whole images.

    Use it to test defences against triggers that have no edge, no texture and no place.

    We depart from the paper, which searches the picture as a universal perturbation and then filters it: here
    the coefficients of the cosine transform are drawn, each channel its own.

    Attributes:
        frequencies: coefficients along each axis; the constant one is left out.
        strength: root mean square of the picture in grey levels of [0, 255].
        test_strength: that when the backdoor is activated; as in training if None.
    """

    title: ClassVar[str] = "Low-frequency picture"
    source: ClassVar[str] = "Y. Zeng, W. Park, Z. M. Mao, R. Jia, ICCV 2021, arXiv:2104.03413"
    limits: ClassVar[str] = "Bright or dark images cut off a part of what is added."
    atlas: ClassVar[tuple[str, ...]] = ("AML.T0020", "AML.T0043.004")

    frequencies: int = Field(4, ge=2, le=32)
    strength: float = Field(20.0, gt=0, le=128)
    test_strength: float | None = Field(None, gt=0, le=128)

    def make_triggers(self, samples: Samples, *, generator: torch.Generator) -> Triggers:
        """Return the pictures of training and test for images of this size."""
        h, w, c = samples.raw([0])[0].shape
        rows, columns = (cosines(min(self.frequencies, length), length) for length in (h, w))
        drawn = torch.randn(c, len(rows), len(columns), generator=generator)
        drawn[:, 0, 0] = 0
        picture = rows.T @ drawn @ columns
        picture = picture / picture.square().mean().sqrt() / 255
        test = self.strength if self.test_strength is None else self.test_strength
        return Triggers(training=Additive(self.strength * picture), test=Additive(test * picture))
