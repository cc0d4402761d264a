"""BadNets: a small patch in one place."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from doorward.attacks.data._patch import Colour, Offset, Pixels, draw_patch
from doorward.attacks.data.base import DataAttack
from doorward.core.errors import InputError
from doorward.data.samples import Raw
from doorward.methods.registry import register

if TYPE_CHECKING:
    import torch

    from doorward.triggers.base import Trigger

Corner = Literal["top-left", "top-right", "bottom-left", "bottom-right", "centre", "random"]


@register("attack")
class BadNets(DataAttack):
    """Stamp a patch on images and change their labels.

    Use it as the first test of a defence: it is the simplest backdoor, and most defences are measured on it.

    Attributes:
        size: height and width of the patch in pixels, one number for a square.
        place: a corner, `centre`, `random` (drawn once), or row and column of the patch's upper left pixel.
        colour: a grey level or red, green and blue, in [0, 255]; or `white`, `black`, `checker` (white and
            black pixels by turns), `random` (each pixel and channel drawn once).
        alpha: how much the patch covers, in (0, 1].
    """

    title: ClassVar[str] = "BadNets"
    source: ClassVar[str] = "Gu, Dolan-Gavitt and Garg, 2017, arXiv:1708.06733"
    limits: ClassVar[str] = (
        "The patch and the wrong labels can be seen by whoever looks at the training images."
    )
    atlas: ClassVar[tuple[str, ...]] = ("AML.T0020", "AML.T0043.004")

    size: Pixels | tuple[Pixels, Pixels] = 3
    place: Corner | tuple[Offset, Offset] = "bottom-right"
    colour: Colour = "white"
    alpha: float = Field(1.0, gt=0, le=1)

    def make_trigger(self, example: Raw, *, generator: torch.Generator) -> Trigger:
        """Return the patch for images of this size.

        Raises:
            InputError: if the patch does not fit into the image, or its colour not the channels.
        """
        import torch

        from doorward.triggers.masked import MaskedPattern

        assert isinstance(example, np.ndarray), "the modality is checked"
        h, w, c = example.shape
        ph, pw = (self.size, self.size) if isinstance(self.size, int) else self.size
        if ph > h or pw > w:
            raise InputError(
                f"{self.method()}: a patch of {pw}x{ph} pixels does not fit into images of {w}x{h}"
            )
        row, column = self._corner(h - ph, w - pw, generator)
        if row + ph > h or column + pw > w:
            raise InputError(
                f"{self.method()}: a patch of {pw}x{ph} pixels at row {row}, column {column} "
                f"leaves images of {w}x{h}"
            )
        mask = torch.zeros(1, h, w)
        mask[:, row : row + ph, column : column + pw] = self.alpha
        pattern = torch.zeros(c, h, w)
        pattern[:, row : row + ph, column : column + pw] = draw_patch(
            self.colour, (c, ph, pw), generator=generator, method=self.method()
        )
        return MaskedPattern(mask, pattern)

    def _corner(self, rows: int, columns: int, generator: torch.Generator) -> tuple[int, int]:
        """Return the upper left pixel, given how far it can go down and right."""
        import torch

        if not isinstance(self.place, str):
            return self.place
        if self.place == "random":
            draws = torch.rand(2, generator=generator).tolist()
            return int(draws[0] * (rows + 1)), int(draws[1] * (columns + 1))
        if self.place == "centre":
            return rows // 2, columns // 2
        vertical, horizontal = self.place.split("-")
        return rows if vertical == "bottom" else 0, columns if horizontal == "right" else 0
