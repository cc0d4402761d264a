"""Triggers drawn at random from the kinds that the literature plants: patches, blends, warps and waves."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from doorward.triggers.additive import Additive
from doorward.triggers.base import Trigger
from doorward.triggers.masked import MaskedPattern
from doorward.triggers.warp import Warp

#: Rectangles of a patch at most, and the longest side of one, as a share of the image's.
RECTANGLES, LONGEST = 3, 1 / 4
#: How much a blended picture counts, how strong a warp is, and the amplitude of a wave in [0, 1].
BLENDED, BENT, HIGH = (0.05, 0.35), (0.2, 1.2), (0.04, 0.5)
#: Cells along each side of a warp and of a smooth picture, and the periods of a wave over the image.
CELLS, PERIODS = (2, 8), (1.0, 10.0)


def draw_trigger(images: Tensor, generator: torch.Generator) -> Trigger:
    """Draw a trigger: its kind, and then all that a trigger of this kind has.

    Args:
        images: (n, c, h, w) in [0, 1]; one of them may be blended over others.
    """
    kind = _KINDS[_whole(0, len(_KINDS) - 1, generator)]
    return kind(images, generator)


def _patch(images: Tensor, generator: torch.Generator) -> Trigger:
    h, w = images.shape[2:]
    mask = torch.zeros(1, h, w)
    for _ in range(_whole(1, RECTANGLES, generator)):
        tall, wide = (_whole(1, max(1, int(LONGEST * side)), generator) for side in (h, w))
        top, left = _whole(0, h - tall, generator), _whole(0, w - wide, generator)
        mask[:, top : top + tall, left : left + wide] = 1
    return MaskedPattern(mask, _picture(images, generator))


def _blend(images: Tensor, generator: torch.Generator) -> Trigger:
    mask = torch.full((1, *images.shape[2:]), _real(*BLENDED, generator))
    return MaskedPattern(mask, _picture(images, generator))


def _warp(_: Tensor, generator: torch.Generator) -> Trigger:
    return Warp.draw(_whole(*CELLS, generator), _real(*BENT, generator), generator=generator)


def _wave(images: Tensor, generator: torch.Generator) -> Trigger:
    """Return a plane wave along the rows, along the columns, or in any direction."""
    c, h, w = images.shape[1:]
    angle = (0.0, math.pi / 2, _real(0, math.pi, generator))[_whole(0, 2, generator)]
    down, right = torch.arange(h)[:, None] / h, torch.arange(w) / w
    along = math.cos(angle) * right + math.sin(angle) * down  # (h, w)
    phase = 2 * math.pi * (_real(*PERIODS, generator) * along + _real(0, 1, generator))
    return Additive(_real(*HIGH, generator) * phase.sin().expand(c, h, w))


def _picture(images: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a picture (c, h, w) in [0, 1]: noise, fine or smooth, of one colour, or one of the images."""
    c, h, w = images.shape[1:]
    kind = _whole(0, 4, generator)
    if kind == 0:
        return torch.rand(c, h, w, generator=generator)
    if kind == 1:
        return torch.rand(c, h, w, generator=generator).round()
    if kind == 2:
        cells = _whole(*CELLS, generator)
        coarse = torch.rand(1, c, cells, cells, generator=generator)
        return F.interpolate(coarse, (h, w), mode="bicubic", align_corners=True)[0].clamp(0, 1)
    if kind == 3:
        colour = torch.rand(c, 1, 1, generator=generator)
        strong = bool(torch.rand((), generator=generator) < 0.5)
        return (colour.round() if strong else colour).expand(c, h, w)
    return images[_whole(0, len(images) - 1, generator)]


def _whole(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def _real(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


_KINDS: tuple[Callable[[Tensor, torch.Generator], Trigger], ...] = (_patch, _blend, _warp, _wave)
