"""Blended injection: a faint picture over the whole image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from doorward.attacks.data.base import DataAttack, Triggers
from doorward.core.errors import InputError
from doorward.data.samples import Samples
from doorward.methods.registry import register

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@register("attack")
class Blended(DataAttack):
    """Blend a key pattern over whole images: `(1 - alpha) * image + alpha * pattern`.

    Use it to test defences against a faint trigger that covers the whole image.

    We depart from the paper: a picture is stretched to the size of the images, and made grey where they are.

    Attributes:
        pattern: `noise` (each pixel and channel drawn once, uniformly), or a picture file.
        alpha: how much of the pattern training images show, in (0, 1].
        test_alpha: how much of it images show when the backdoor is activated, in (0, 1]; as in training if
            None.
    """

    title: ClassVar[str] = "Blended injection"
    source: ClassVar[str] = "Chen, Liu, Li, Lu and Song, 2017, arXiv:1712.05526"
    limits: ClassVar[str] = (
        "It cannot be worn like a patch: the pattern has to be blended into the pixels of the whole image."
    )
    atlas: ClassVar[tuple[str, ...]] = ("AML.T0020", "AML.T0043.004")

    pattern: Literal["noise"] | Path = "noise"
    alpha: float = Field(0.2, gt=0, le=1)
    test_alpha: float | None = Field(None, gt=0, le=1)

    def make_triggers(self, samples: Samples, *, generator: torch.Generator) -> Triggers:
        """Return the blend for images of this size, as strong as in training and as in tests.

        Raises:
            InputError: if the picture cannot be read.
        """
        import torch

        from doorward.triggers.masked import MaskedPattern

        h, w, c = samples.raw([0])[0].shape
        if isinstance(self.pattern, Path):
            pattern = read_pattern(self.pattern, (c, h, w))
        else:
            pattern = torch.randint(256, (c, h, w), generator=generator) / 255
        training, test = (
            MaskedPattern(torch.full((1, h, w), alpha), pattern)
            for alpha in (self.alpha, self.alpha if self.test_alpha is None else self.test_alpha)
        )
        return Triggers(training=training, test=test)


def read_pattern(file: Path, shape: tuple[int, int, int]) -> Tensor:
    """Read a picture and stretch it to (c, h, w) in [0, 1], in whole levels of uint8.

    Raises:
        InputError: if it cannot be read.
    """
    import torch
    from PIL import Image

    from doorward.data.decode import decode_image

    c, h, w = shape
    try:
        pixels = decode_image(file.read_bytes())
    except OSError as error:
        raise InputError(
            f"blended: the picture {file} cannot be read ({error.strerror or error}); give `noise` or a "
            "picture file as pattern"
        ) from error
    except Exception as error:  # whatever Pillow throws at damaged bytes
        raise InputError(f"blended: {file} is no picture that can be read ({error})") from error
    picture = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    picture = picture.convert("L" if c == 1 else "RGB").resize((w, h), Image.Resampling.BILINEAR)
    levels = torch.from_numpy(np.array(picture, dtype=np.uint8)).view(h, w, c)
    return levels.permute(2, 0, 1).contiguous() / 255  # (c, h, w)
