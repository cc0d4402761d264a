"""Images: from raw uint8 pixels to the exact size that a classifier takes, and to pictures for reports."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from doorward.core.errors import InputError

if TYPE_CHECKING:
    from doorward.data import Samples
    from doorward.models.spec import InputSpec

#: The type of pixels in the compact tensor.
DTYPE = torch.uint8


def fit_image(image: npt.NDArray[np.uint8], spec: InputSpec) -> npt.NDArray[np.uint8]:
    """Return one image (h, w, c) uint8 at the size of the spec.

    Only what is stated, or the model's own processor declares, is done: conversion to RGB or to grey,
    resizing, centre crop.

    Raises:
        InputError: if the image does not fit and nothing declares how to make it fit.
    """
    if spec.resize is not None:
        pil = Image.fromarray(image.squeeze(-1) if image.shape[2] == 1 else image)
        if spec.channels == 3 and pil.mode != "RGB" and spec.resize.convert_rgb:
            pil = pil.convert("RGB")
        if spec.channels == 1 and pil.mode != "L" and spec.resize.convert_rgb:
            pil = pil.convert("L")
        if spec.resize.square is not None:
            side = int(spec.resize.square * min(pil.height, pil.width))
            pil = _central(pil, max(1, side), max(1, side))
        height, width = spec.resize.height, spec.resize.width
        if spec.resize.shortest_edge:
            short = min(pil.height, pil.width)
            # int() of the product is what the transformers library does
            whole = round if spec.resize.nearest else int
            height, width = whole(pil.height * height / short), whole(pil.width * height / short)
        if (pil.height, pil.width) != (height, width):
            pil = pil.resize((width, height), Image.Resampling(spec.resize.resample))
        if spec.resize.crop is not None:
            pil = _central(pil, *spec.resize.crop)
        image = np.array(pil, dtype=np.uint8)  # a copy: torch warns of arrays that cannot be written
        image = image[..., None] if image.ndim == 2 else image
    if image.shape != (spec.height, spec.width, spec.channels):
        raise InputError(_unfit(image.shape, spec))
    return image


def _central(pil: Image.Image, height: int, width: int) -> Image.Image:
    """Return what lies around the centre of an image, with black beyond its edges."""
    top, left = (pil.height - height) // 2, (pil.width - width) // 2
    return pil.crop((left, top, left + width, top + height))


def _unfit(shape: tuple[int, ...], spec: InputSpec) -> str:
    """Say in what an image (h, w, c) differs from what a model takes, and what would make it fit."""
    h, w, c = shape
    both = (
        f"the model takes {spec.width}x{spec.height} images with {spec.channels} channel(s); "
        f"this one is {w}x{h} with {c}. "
    )
    if spec.channels not in (1, 3):
        return (
            both
            + "Images are read as grey or RGB, alpha left out: a model of other channels cannot be given "
            "images. Without --clean, a scan examines its files and what needs no images"
        )
    if (h, w) == (spec.height, spec.width):
        side = f"{h},{w}" if h != w else str(h)
        return both + f"Only the colours differ: --resize {side} makes them as the model takes them"
    return (
        both + "Give images of that size, or state how they are made to fit: --resize SIDE, or a "
        "preprocessor_config.json next to the model"
    )


def to_tensor(samples: Samples, spec: InputSpec) -> Tensor:
    """Decode all samples into one uint8 tensor (n, c, h, w) at the size of the spec.

    Raises:
        InputError: if an image does not fit; the message names it.
    """
    out = torch.empty((len(samples), *spec.shape), dtype=torch.uint8)
    size = 512
    for start in range(0, len(samples), size):
        positions = range(start, min(start + size, len(samples)))
        for i, raw in zip(positions, samples.raw(list(positions)), strict=True):
            try:
                fitted = fit_image(raw, spec)
            except InputError as error:
                raise InputError(f"{samples.where(i)}, id {samples.ids[i]}: {error}") from error
            out[i] = torch.from_numpy(np.ascontiguousarray(fitted.transpose(2, 0, 1)))  # (c, h, w)
    return out


def from_raw(images: Sequence[npt.NDArray[np.uint8]]) -> Tensor:
    """Return images (h, w, c) uint8 of one size as float32 (n, c, h, w) in [0, 1].

    Raises:
        InputError: if they differ in size.
    """
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        sizes = ", ".join(f"{w}x{h} with {c} channel(s)" for h, w, c in sorted(shapes)[:3])
        raise InputError(f"images of one size are needed; these differ: {sizes}")
    return to_float(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))


def to_float(x: Tensor) -> Tensor:
    """Return uint8 images as float32 in [0, 1]."""
    return x.float().div_(255)


def to_uint8(x: Tensor) -> npt.NDArray[np.uint8]:
    """Return float images (n, c, h, w) in [0, 1] as uint8 (n, h, w, c), rounded to the nearest level."""
    y = x.detach().clamp(0, 1).mul(255).round().to(torch.uint8)
    return np.ascontiguousarray(y.permute(0, 2, 3, 1).cpu().numpy())


def encode_png(image: npt.NDArray[np.uint8]) -> str:
    """Return an image (h, w, c) uint8 with 1, 3 or 4 channels as a PNG file in base64."""
    buffer = io.BytesIO()
    Image.fromarray(image.squeeze(-1) if image.shape[2] == 1 else image).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def picture(x: Tensor) -> str:
    """Return one image (c, h, w) in [0, 1] as a PNG file in base64."""
    return encode_png(to_uint8(x[None])[0])


def side_by_side(images: Sequence[Tensor]) -> Tensor:
    """Put images (c, h, w) of one size side by side, one white pixel apart: (c, h, w')."""
    gap = torch.ones_like(images[0][:, :, :1])
    parts = [part for image in images for part in (image, gap)]
    return torch.cat(parts[:-1], dim=2)
