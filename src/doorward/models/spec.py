"""How a classifier wants its input, and what its output means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from doorward.core.errors import InputError
from doorward.models.encode.words import hash_words

Layout = Literal["NCHW", "NHWC"]
Output = Literal["logits", "probabilities", "one_logit"]
ChannelOrder = Literal["RGB", "BGR"]
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "uint8": torch.uint8,
}


#: What hardly any image processor does; a report says it where it is done.
_SELDOM = {"square", "nearest"}


class Resize(BaseModel):
    """Describe what a model's own image processor does before normalisation (Pillow semantics).

    Attributes:
        height, width: size of the resized image, before the crop; with `shortest_edge` the shorter side.
        resample: Pillow's resampling filter number (2 is bilinear, 3 bicubic).
        crop: (height, width) of the centre crop after resizing, or None.
        convert_rgb: whether colours are converted to those that the model takes: three, or grey.
        square: side of the square that is cut out around the centre before resizing, as a share of the
            image's shorter side; None if nothing is cut out.
        nearest: whether the longer side is rounded to the nearest pixel, and not down.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    height: int = Field(gt=0)
    width: int = Field(gt=0)
    shortest_edge: bool = False
    resample: int = Field(2, ge=0, le=5)
    crop: tuple[int, int] | None = None
    convert_rgb: bool = True
    square: float | None = Field(None, gt=0, le=1)
    nearest: bool = False


class InputSpec(BaseModel):
    """What a classifier takes: exactly this size, images in [0, 1], NCHW, before normalisation.

    A model sees `(x * (high - low) + low - mean) / std` in its own layout and type.

    Attributes:
        channels, height, width: size of one image.
        layout: order of the axes that the model itself takes.
        range: (low, high) that the model's [0, 1] is stretched to before mean and std.
        mean, std: one value per channel of the model's own order, in units of the stretched range.
        channel_order: order of the colours that the model itself takes.
        dtype: number type that the model itself takes.
        output: what the model gives; probabilities become log p, one logit z becomes (0, z).
        resize: the model's own resizing, where it declares one.
        assumed: names of the fields that nothing stated.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    #: The kind of input.
    modality: ClassVar[Literal["image", "text", "audio"]] = "image"
    #: Whether an output's gradient by the input means anything.
    differentiable: ClassVar[bool] = True

    channels: int = Field(ge=1, le=4)
    height: int = Field(gt=0)
    width: int = Field(gt=0)
    layout: Layout = "NCHW"
    range: tuple[float, float] = (0.0, 1.0)
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    channel_order: ChannelOrder = "RGB"
    dtype: Literal["float32", "float16", "bfloat16", "float64", "uint8"] = "float32"
    output: Output = "logits"
    resize: Resize | None = None
    assumed: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise ValueError(f"{name} takes one value, or one for each channel, got {len(values)}")
        if any(value <= 0 for value in self.std):
            raise ValueError("std must be positive")
        if self.range[0] >= self.range[1]:
            raise ValueError("range must be (low, high) with low < high")
        if self.channel_order == "BGR" and self.channels != 3:
            raise ValueError(f"BGR goes with three channels, and there are {self.channels}")
        return self

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (channels, height, width)."""
        return self.channels, self.height, self.width

    @property
    def trial_shape(self) -> tuple[int, int, int]:
        """Return the shape of a small input that shows whether a model runs."""
        return self.shape

    def describe(self) -> dict[str, Any]:
        """Return what a report tells of the spec, in JSON types."""
        usual = {"channel_order"} if self.channel_order == "RGB" else set()
        told = self.model_dump(mode="json", exclude={"assumed", *usual})
        if told["resize"] is not None:  # few processors do these
            told["resize"] = {
                name: value for name, value in told["resize"].items() if value or name not in _SELDOM
            }
        return told

    def check(self, x: Tensor) -> None:
        """Raise InputError unless x is a float batch (n, c, h, w) of this size."""
        if x.ndim != 4 or tuple(x.shape[1:]) != self.shape or not x.is_floating_point():
            raise InputError(
                f"the model takes float images (n, {self.channels}, {self.height}, {self.width}) in [0, 1], "
                f"got {x.dtype} {tuple(x.shape)}"
            )

    def to_model(self, x: Tensor) -> Tensor:
        """Turn images (n, c, h, w) in [0, 1] into what the model itself takes. Differentiable."""
        low, high = self.range
        if (low, high) != (0.0, 1.0):
            x = x * (high - low) + low
        if self.channel_order == "BGR":
            x = x.flip(1)
        if any(self.mean) or any(value != 1 for value in self.std):
            mean = torch.tensor(self.mean, dtype=x.dtype, device=x.device).view(1, -1, 1, 1)
            std = torch.tensor(self.std, dtype=x.dtype, device=x.device).view(1, -1, 1, 1)
            x = (x - mean) / std
        if self.dtype == "uint8":
            x = x.round()
        x = x.to(DTYPES[self.dtype])
        return x.permute(0, 2, 3, 1) if self.layout == "NHWC" else x

    def to_logits(self, y: Tensor) -> Tensor:
        """Turn the model's own output into logits (n, k) float with k >= 2. Differentiable."""
        y = y.flatten(1).float()
        tiny = torch.finfo(y.dtype).tiny
        if self.output == "one_logit":
            return torch.cat([torch.zeros_like(y), y], dim=1)  # (n, 2)
        if self.output == "probabilities":
            if y.shape[1] == 1:
                y = torch.cat([1 - y, y], dim=1)  # (n, 2)
            return y.clamp_min(tiny).log()
        return y


class RowSpec(InputSpec):
    """What a classifier takes whose input is one row: float (n, 1, 1, m), m at most `width`.

    What concerns pixels has no meaning here, and is left out of what is written.

    Attributes:
        cut: what is left out of inputs that are longer than a row: their end, or their middle.
    """

    channels: Literal[1] = 1
    height: Literal[1] = 1
    layout: Literal["NCHW"] = Field("NCHW", exclude=True)
    range: tuple[float, float] = Field((0.0, 1.0), exclude=True)
    mean: tuple[float, ...] = Field((0.0,), exclude=True)
    std: tuple[float, ...] = Field((1.0,), exclude=True)
    channel_order: Literal["RGB"] = Field("RGB", exclude=True)
    dtype: Literal["float32"] = Field("float32", exclude=True)
    resize: None = Field(None, exclude=True)
    cut: Literal["end", "middle"] = "end"

    #: What one column of the row holds, for messages.
    unit: ClassVar[str]

    @property
    def trial_shape(self) -> tuple[int, int, int]:
        """Return the shape of a short row."""
        return 1, 1, min(self.width, 16)

    def kept(self, length: int) -> tuple[int, int]:
        """Return how much of an input stays: so many columns of its beginning, and so many of its end.

        >>> TextSpec(width=5, vocabulary=9, cut="middle").kept(8), TextSpec(width=5, vocabulary=9).kept(8)
        ((3, 2), (5, 0))
        """
        if self.cut == "end" or length <= self.width:
            return min(length, self.width), 0
        return self.width - self.width // 2, self.width // 2

    def check(self, x: Tensor) -> None:
        """Raise InputError unless x is a float batch (n, 1, 1, m) of at most this width."""
        if x.ndim != 4 or x.shape[1:3] != (1, 1) or x.shape[3] > self.width or not x.is_floating_point():
            raise InputError(
                f"the model takes float rows (n, 1, 1, m) of at most {self.width} {self.unit}, "
                f"got {x.dtype} {tuple(x.shape)}"
            )

    def describe(self) -> dict[str, Any]:
        """Return what a report tells of the spec: the kind of input, and what concerns it."""
        stated = self.model_dump(mode="json", exclude={"assumed", "channels", "height", "width"})
        return {"modality": self.modality, f"most {self.unit}": self.width, **stated}

    def to_model(self, x: Tensor) -> Tensor:
        """Return the rows (n, m)."""
        return x.flatten(1)


class TextSpec(RowSpec):
    """What a text classifier takes: rows of token numbers, 0 behind the text's end.

    Attributes:
        width: tokens at most; of what is longer, something is cut.
        vocabulary: how many token numbers there are.
        encode: turns texts into token numbers; hashes of their words if None.
    """

    modality: ClassVar[Literal["image", "text", "audio"]] = "text"
    unit: ClassVar[str] = "token numbers"
    differentiable: ClassVar[bool] = False

    vocabulary: int = Field(ge=2, le=1 << 24)  # float32 holds them exactly
    encode: Callable[[Sequence[str]], list[list[int]]] | None = Field(None, exclude=True, repr=False)

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token numbers of each text, however long."""
        if self.encode is not None:
            return self.encode(texts)
        return [hash_words(text, self.vocabulary) for text in texts]

    def to_model(self, x: Tensor) -> Tensor:
        """Return the rows (n, m) int64."""
        return x.flatten(1).long()


class AudioSpec(RowSpec):
    """What an audio classifier takes: one channel of samples in [-1, 1], silence behind its end.

    Attributes:
        width: samples at most; of what is longer, something is cut.
        rate: samples per second; recordings of another rate are brought to it.
    """

    modality: ClassVar[Literal["image", "text", "audio"]] = "audio"
    unit: ClassVar[str] = "samples"

    rate: int = Field(ge=1000, le=192_000)

    @property
    def trial_shape(self) -> tuple[int, int, int]:
        """Return the shape of half a second."""
        return 1, 1, min(self.width, self.rate // 2)
