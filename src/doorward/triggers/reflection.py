"""Reflections of other images, as a pane of glass before the camera makes them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from doorward.core.errors import InputError
from doorward.models.encode.image import to_float, to_uint8
from doorward.triggers.base import Trigger

if TYPE_CHECKING:
    pass

Model = Literal["same-focus", "out-of-focus", "ghost"]


def to_linear(x: Tensor) -> Tensor:
    """Return the light that sRGB values in [0, 1] stand for (IEC 61966-2-1)."""
    return torch.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def from_linear(light: Tensor) -> Tensor:
    """Return the sRGB values that stand for light in [0, 1]."""
    return torch.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def out_of_focus(light: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image (n, c, h, w) with a Gaussian of its own width sigma (n,) in pixels.

    At the edge the part of the Gaussian that lies inside the image is scaled up to 1.
    """
    for axis in (2, 3):
        place = torch.arange(light.shape[axis], dtype=light.dtype, device=light.device)
        apart = (place[:, None] - place) / sigma.to(light)[:, None, None]  # (n, side, side)
        weights = (-apart.square() / 2).softmax(2)[:, None]  # (n, 1, side, side), rows sum to 1
        light = weights @ light if axis == 2 else light @ weights.mT
    return light


def ghost(light: Tensor, share: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Show each image (n, c, h, w) twice, as thick glass does: in its place, and another time aside.

    Args:
        light: linear.
        share: (n,) in [0, 1], of the image in its place; the other has the rest.
        down, right: (n,) whole pixels that the other lies aside; its edges are repeated.
    """
    h, w = light.shape[2:]
    rows = (torch.arange(h) - down[:, None]).clamp(0, h - 1).to(light.device)  # (n, h)
    columns = (torch.arange(w) - right[:, None]).clamp(0, w - 1).to(light.device)  # (n, w)
    image = torch.arange(len(light), device=light.device)[:, None, None]
    aside = light.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None]]  # (n, h, w, c)
    share = share.to(light)[:, None, None, None]
    return share * light + (1 - share) * aside.permute(0, 3, 1, 2)


@dataclass(frozen=True, eq=False)
class Reflected(Trigger):
    """Add the reflection of another image, in linear light: `(1 - strength) * image + strength * reflection`.

    Which reflection an image gets, how it is out of focus or doubled, and how strong it is, is drawn for each
    image: from its own pixels, so that it is the same in any batch and at any time, or from a generator.

    Attributes:
        reflections: (m, c, h, w) uint8.
        models: drawn from with equal chance.
        strength: lowest and highest, evenly drawn; of light, in [0, 1].
        blur: lowest and highest width (standard deviation) of out-of-focus reflections in pixels.
        shift: fewest and most pixels that a ghost lies aside, along each axis.
        glare: to out-of-focus reflections `(1 - strength) / 2` of their light is added, cut off at white.
    """

    reflections: Tensor
    models: tuple[Model, ...]
    strength: tuple[float, float]
    blur: tuple[float, float]
    shift: tuple[int, int]
    glare: bool = False
    kind: ClassVar[str] = "reflection"

    def apply(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return the triggered images (n, c, h, w) in [0, 1].

        Raises:
            InputError: if the images have another size than the reflections.
        """
        if x.shape[1:] != self.reflections.shape[1:]:
            (c, h, w), (ci, hi, wi) = self.reflections.shape[1:], x.shape[1:]
            raise InputError(
                f"the reflections are for {w}x{h} images with {c} channel(s); these are {wi}x{hi} with {ci}"
            )
        u = _chances(x) if generator is None else torch.rand(len(x), 8, generator=generator).double()
        which = (u[:, 0] * len(self.reflections)).long()
        model = (u[:, 1] * len(self.models)).long()
        reflected = to_linear(to_float(self.reflections[which]).to(x))  # (n, c, h, w)
        for number, name in enumerate(self.models):
            own = (model == number).nonzero()[:, 0]
            if name == "out-of-focus":
                reflected[own] = out_of_focus(reflected[own], _between(self.blur, u[own, 3]))
            elif name == "ghost":
                low, high = self.shift
                aside = (low + u[own, 4:6] * (high + 1 - low)).long()  # (k, 2), both ends drawn
                stronger = _between((0.5, 0.85), u[own, 6])
                share = torch.where(u[own, 7] < 0.5, stronger, 1 - stronger)
                reflected[own] = ghost(reflected[own], share, aside[:, 0], aside[:, 1])
        strength = _between(self.strength, u[:, 2]).to(x)[:, None, None, None]
        light = torch.lerp(to_linear(x), reflected, strength)
        if self.glare and "out-of-focus" in self.models:
            own = model == self.models.index("out-of-focus")
            light[own] += (1 - strength[own]) / 2 * reflected[own]
        return from_linear(light.clamp_max(1)).clamp(0, 1)

    def tensors(self) -> dict[str, Tensor]:
        """Return the reflections."""
        return {"reflections": self.reflections}

    def settings(self) -> dict[str, Any]:
        """Return all else."""
        return {
            "models": list(self.models),
            "strength": list(self.strength),
            "blur": list(self.blur),
            "shift": list(self.shift),
        } | ({"glare": True} if self.glare else {})


def _chances(x: Tensor) -> Tensor:
    """Return eight numbers (n, 8) in [0, 1) for each image, by the sha256 of its pixels."""
    digests = b"".join(hashlib.sha256(image.tobytes()).digest() for image in to_uint8(x))
    return torch.from_numpy(np.frombuffer(digests, dtype="<u4").reshape(len(x), 8) / 2**32)


def _between(ends: tuple[float, float], u: Tensor) -> Tensor:
    return ends[0] + (ends[1] - ends[0]) * u
