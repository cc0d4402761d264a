"""Triggers: what wakes a backdoor, planted or recovered. They live in image space, [0, 1], NCHW."""

from __future__ import annotations

import base64
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.nn import functional as F

from doorward.errors import InputError

_kinds: dict[str, type[Trigger]] = {}


class Trigger(ABC):
    """Turn inputs into triggered inputs of the same kind."""

    kind: ClassVar[str]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        _kinds[cls.kind] = cls

    @abstractmethod
    def apply(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return the triggered inputs; x is left alone."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that, with `settings`, rebuild the trigger."""

    def settings(self) -> dict[str, Any]:
        """Return JSON settings that, with `tensors`, rebuild the trigger."""
        return {}

    def to_json(self) -> dict[str, Any]:
        """Return a JSON form: kind, settings, tensors as base64 safetensors."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.tensors().items()}
        return {
            "kind": self.kind,
            "settings": self.settings(),
            "tensors": base64.b64encode(save(tensors)).decode(),
        }

    @staticmethod
    def from_json(form: dict[str, Any]) -> Trigger:
        """Rebuild a trigger.

        Raises:
            InputError: if the kind is unknown.
        """
        kind = form.get("kind")
        if kind not in _kinds:
            raise InputError(f"unknown trigger kind {kind!r}; known: {', '.join(sorted(_kinds))}")
        return _kinds[kind](**load(base64.b64decode(form["tensors"])), **form["settings"])


@dataclass(frozen=True, eq=False)
class MaskedPattern(Trigger):
    """Blend a pattern over a place: `x * (1 - mask) + mask * pattern`.

    Attributes:
        mask: (1, h, w) in [0, 1]; 1 replaces the pixel.
        pattern: (c, h, w) in [0, 1].
    """

    mask: Tensor
    pattern: Tensor
    kind: ClassVar[str] = "masked-pattern"

    def apply(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return the triggered images (n, c, h, w) in [0, 1].

        Raises:
            InputError: if the images have another size than the pattern.
        """
        if x.shape[1:] != self.pattern.shape:
            (c, h, w), (ci, hi, wi) = self.pattern.shape, x.shape[1:]
            raise InputError(
                f"the trigger is for {w}x{h} images with {c} channel(s); these are {wi}x{hi} with {ci}"
            )
        mask, pattern = self.mask.to(x), self.pattern.to(x)
        return torch.lerp(x, pattern.expand_as(x), mask.expand_as(x))

    def tensors(self) -> dict[str, Tensor]:
        """Return mask and pattern."""
        return {"mask": self.mask, "pattern": self.pattern}


@dataclass(frozen=True, eq=False)
class Warp(Trigger):
    """Bend the image smoothly: each pixel shows what lies a little beside its place.

    Attributes:
        grid: (2, k, k) how far to the right and down, at k x k places spread evenly from edge to edge.
        strength: factor of the grid; where both are 1, a pixel shows what lies about half a pixel beside it.

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
