"""Augmentations of a batch of images (n, c, h, w). Draws are made on the CPU so that devices agree."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def shift(x: Tensor, *, generator: torch.Generator) -> Tensor:
    """Move each image by up to a sixteenth of its side along both axes; edges are repeated."""
    n, _, h, w = x.shape
    return moved(x, *shifted_places(n, (h, w), generator))


def shifted_places(count: int, size: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw for each image which rows (n, h) and columns (n, w) it shows where it is shifted."""
    indices = []
    for side in size:
        reach = max(1, side // 16)
        offset = torch.randint(-reach, reach + 1, (count, 1), generator=generator)
        indices.append((torch.arange(side) + offset).clamp_(0, side - 1))  # (n, side)
    return indices[0], indices[1]


def moved(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return images that show the given rows (n, h) and columns (n, w) of others."""
    rows, columns = rows.to(x.device), columns.to(x.device)
    image = torch.arange(len(x), device=x.device)
    shown = x.permute(0, 2, 3, 1)[image[:, None, None], rows[:, :, None], columns[:, None, :]]  # (n, h, w, c)
    return shown.permute(0, 3, 1, 2)


def flip(x: Tensor, *, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability one half."""
    mirrored = torch.rand(len(x), generator=generator).lt(0.5).to(x.device)
    return torch.where(mirrored[:, None, None, None], x.flip(3), x)


def shift_flip(x: Tensor, *, generator: torch.Generator) -> Tensor:
    """Move each image and mirror half of them."""
    return flip(shift(x, generator=generator), generator=generator)


def none(x: Tensor, *, generator: torch.Generator) -> Tensor:
    """Return the images as they are."""
    return x


AUGMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "none": none,
    "shift": shift,
    "shift-flip": shift_flip,
}
