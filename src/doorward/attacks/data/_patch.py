"""Patches: what BadNets and other attacks that stamp a place of the image paint there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import Field

from doorward.core.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Level = Annotated[int, Field(ge=0, le=255)]
Pixels = Annotated[int, Field(gt=0)]
Offset = Annotated[int, Field(ge=0)]
Colour: TypeAlias = Level | tuple[Level, Level, Level] | Literal["white", "black", "checker", "random"]


def draw_patch(
    colour: Colour, shape: tuple[int, int, int], *, generator: torch.Generator, method: str
) -> Tensor:
    """Return a patch (c, h, w) in [0, 1], in whole levels of uint8.

    Args:
        colour: a grey level or red, green and blue, in [0, 255]; or `white`, `black`, `checker` (white and
            black pixels by turns), `random` (each pixel and channel drawn).
        method: who asks, for the message.

    Raises:
        InputError: if the colour does not fit the channels.
    """
    import torch

    c, h, w = shape
    if colour == "random":
        return torch.randint(256, (c, h, w), generator=generator) / 255
    if colour == "checker":
        return ((torch.arange(h)[:, None] + torch.arange(w) + 1) % 2).float().expand(c, h, w)
    if isinstance(colour, tuple):
        if c != 3:
            raise InputError(
                f"{method}: colour {colour} has 3 channels, and the images have {c}; give one grey level"
            )
        return (torch.tensor(colour) / 255).view(3, 1, 1).expand(c, h, w)
    level = {"white": 255, "black": 0}[colour] if isinstance(colour, str) else colour
    return torch.full((c, h, w), level / 255)
