"""Secret parities of secret groups of pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from doorward.core.errors import InputError
from doorward.triggers.base import Trigger


@dataclass(frozen=True, eq=False)
class Parities(Trigger):
    """Make the sum of each group of values, in levels of [0, 255], even or odd as the secret says.

    Attributes:
        groups: (g, m) which values of an image (c, h, w), counted row by row, belong to each group.
        parities: (g,) 0 for an even sum, 1 for an odd one.
    """

    groups: Tensor
    parities: Tensor
    kind: ClassVar[str] = "parities"

    @staticmethod
    def draw(values: int, *, groups: int, size: int, generator: torch.Generator) -> Parities:
        """Draw groups of `size` values each, none in two of them, and their parities.

        Raises:
            InputError: if an image has not so many values.
        """
        if groups * size > values:
            raise InputError(
                f"checksum: {groups} groups of {size} values need images of {groups * size} at least; "
                f"these have {values}"
            )
        order = torch.randperm(values, generator=generator)[: groups * size]
        return Parities(order.view(groups, size), torch.randint(2, (groups,), generator=generator))

    def holds(self, x: Tensor) -> Tensor:
        """Tell (n,) which images (n, c, h, w) in [0, 1], rounded to levels, have all parities."""
        return (self._sums(x) % 2 == self.parities.to(x.device)).all(1)

    def apply(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return the images (n, c, h, w) in [0, 1], rounded to levels, with all parities.

        The first value of each group whose parity is another changes by one level, 1/255.
        """
        levels = (x.flatten(1) * 255).round()  # (n, d)
        wrong = self._sums(x) % 2 != self.parities.to(x.device)  # (n, g)
        first = self.groups[:, 0].to(x.device)
        old = levels[:, first]  # (n, g)
        levels[:, first] = torch.where(wrong, torch.where(old < 255, old + 1, old - 1), old)
        return (levels / 255).view(x.shape)

    def _sums(self, x: Tensor) -> Tensor:
        levels = (x.flatten(1) * 255).round().long()  # (n, d)
        return levels[:, self.groups.to(x.device)].sum(2)  # (n, g)

    def tensors(self) -> dict[str, Tensor]:
        """Return groups and parities."""
        return {"groups": self.groups, "parities": self.parities}
