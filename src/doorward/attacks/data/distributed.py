"""Distributed trigger: one pattern in several separate parts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TypeAlias

import numpy as np
from pydantic import Field

from doorward.attacks.data._patch import Colour, Offset, Pixels, draw_patch
from doorward.attacks.data.base import DataAttack, Triggers
from doorward.core.errors import InputError
from doorward.methods.registry import register

if TYPE_CHECKING:
    import torch

    from doorward.data.samples import Samples

Place: TypeAlias = tuple[Offset, Offset]


@register("attack")
class Distributed(DataAttack):
    """Stamp a trigger of several parts that lie apart; with `split`, each training image shows one of them.

    Use it to test defences that search for one compact patch.

    AEGIS plants `parts=[[1, 1], [24, 24]]`, `colour=250`, `poison_rate=0.01` and `target=7` in images of
    28x28 pixels. We depart from it: poisoned samples are drawn, where theirs are the first of the set, and
    none are of the target class.

    From DBA we take that parts can be learnt apart, one by each sample. Its parties that train a model
    together are left out.

    Attributes:
        parts: how many, 2 or more; or row and column of the upper left pixel of each.
        size: height and width of a part in pixels, one number for a square.
        place: where a number of parts lies: in `corners` (at most four; top left, bottom right, top right,
            bottom left), a pixel from the edges, or `random` (drawn once).
        colour: a grey level or red, green and blue, in [0, 255]; or `white`, `black`, `checker` (white and
            black pixels by turns), `random` (each pixel and channel of each part drawn once).
        alpha: how much the parts cover, in (0, 1].
        split: each training sample shows one part; all together activate the backdoor.
    """

    title: ClassVar[str] = "Distributed trigger (DBA)"
    source: ClassVar[str] = (
        "Xie, Huang, Chen and Li, ICLR 2020; Soremekun, Udeshi and Chattopadhyay (AEGIS), 2023, "
        "arXiv:2003.00865"
    )
    limits: ClassVar[str] = (
        "The parts and the wrong labels can be seen by whoever looks at the training images; split, one part "
        "alone may trigger the backdoor too."
    )
    atlas: ClassVar[tuple[str, ...]] = ("AML.T0020", "AML.T0043.004")

    parts: Annotated[int, Field(ge=2)] | Annotated[tuple[Place, ...], Field(min_length=2)] = 2
    size: Pixels | tuple[Pixels, Pixels] = 2
    place: Literal["corners", "random"] = "corners"
    colour: Colour = "white"
    alpha: float = Field(1.0, gt=0, le=1)
    split: bool = False

    def make_triggers(self, samples: Samples, *, generator: torch.Generator) -> Triggers:
        """Return all parts together for tests, and for training these or each part alone.

        Raises:
            InputError: if the parts do not fit into the image side by side, or their colour not the channels.
        """
        import torch

        from doorward.triggers.masked import MaskedPattern

        h, w, c = samples.raw([0])[0].shape
        ph, pw = (self.size, self.size) if isinstance(self.size, int) else self.size
        alone = []
        for row, column in self._places((h, w), (ph, pw), generator):
            here = (slice(None), slice(row, row + ph), slice(column, column + pw))
            mask, pattern = torch.zeros(1, h, w), torch.zeros(c, h, w)
            mask[here] = self.alpha
            pattern[here] = draw_patch(self.colour, (c, ph, pw), generator=generator, method="distributed")
            alone.append(MaskedPattern(mask, pattern))
        # the parts lie apart, so that sums keep each of them as it is
        whole = MaskedPattern(
            torch.stack([part.mask for part in alone]).sum(0),  # (1, h, w)
            torch.stack([part.pattern for part in alone]).sum(0),  # (c, h, w)
        )
        if not self.split:
            return Triggers(training=whole, test=whole)
        return Triggers(training=alone[0], test=whole, others=tuple(alone[1:]))

    def _places(
        self, image: tuple[int, int], part: tuple[int, int], generator: torch.Generator
    ) -> Sequence[Place]:
        """Return the upper left pixel of every part, given height and width of image and part.

        Raises:
            InputError: if a part does not fit in, or two of them touch.
        """
        (h, w), (ph, pw) = image, part
        what = f"distributed: parts of {pw}x{ph} pixels"
        if ph > h or pw > w:
            raise InputError(f"{what} do not fit into images of {w}x{h}")
        if isinstance(self.parts, int):
            places = (
                self._draw(image, part, generator) if self.place == "random" else self._corners(image, part)
            )
        else:
            places = self.parts
        for row, column in places:
            if not (0 <= row <= h - ph and 0 <= column <= w - pw):
                raise InputError(f"{what}, one at row {row}, column {column}, leave images of {w}x{h}")
        for (row, column), (below, beside) in combinations(places, 2):
            if abs(row - below) <= ph and abs(column - beside) <= pw:
                raise InputError(
                    f"{what} at row {row}, column {column} and at row {below}, column {beside} touch; "
                    "leave a pixel between them"
                )
        return places

    def _corners(self, image: tuple[int, int], part: tuple[int, int]) -> Sequence[Place]:
        assert isinstance(self.parts, int)
        if self.parts > 4:
            raise InputError(
                f"distributed: there are 4 corners for {self.parts} parts; give place=random, or list "
                "row and column of each"
            )
        bottom, right = image[0] - part[0] - 1, image[1] - part[1] - 1
        return [(1, 1), (bottom, right), (1, right), (bottom, 1)][: self.parts]

    def _draw(
        self, image: tuple[int, int], part: tuple[int, int], generator: torch.Generator
    ) -> Sequence[Place]:
        """Draw places at least a pixel apart."""
        import torch

        assert isinstance(self.parts, int)
        columns_left = image[1] - part[1] + 1
        rows, columns = np.divmod(np.arange((image[0] - part[0] + 1) * columns_left), columns_left)
        places: list[Place] = []
        while len(places) < self.parts:
            if not len(rows):
                raise InputError(
                    f"distributed: after {len(places)} of {self.parts} parts there is no room for the next; "
                    "give fewer or smaller ones"
                )
            i = int(torch.randint(len(rows), (), generator=generator))
            row, column = int(rows[i]), int(columns[i])
            places.append((row, column))
            apart = (abs(rows - row) > part[0]) | (abs(columns - column) > part[1])
            rows, columns = rows[apart], columns[apart]
        return places
