"""Squeezers: copies of images with less detail. Pure functions on uint8 images (n, c, h, w)."""

from __future__ import annotations

import math
import re
from functools import cache

import torch
from torch import Tensor

from doorward.core.errors import InputError
from doorward.models.encode.image import to_float

SHAPES = (
    "bits-B with 1 to 7 bits, median-2, median-3, or nlm-SEARCH-PATCH-STRENGTH with odd windows, as in "
    "nlm-13-3-2"
)


def squeeze(images: Tensor, squeezer: str) -> Tensor:
    """Return images (n, c, h, w) uint8 as a squeezer leaves them, float32 in [0, 1].

    Args:
        squeezer: `bits-5`, `median-2`, `median-3` or `nlm-13-3-2` (search window, patch, strength).

    Raises:
        InputError: if there is no such squeezer.
    """
    kind, numbers = parsed(squeezer)
    if kind == "bits":
        return reduce_bits(images, numbers[0])
    if kind == "median":
        return to_float(median_filter(images, numbers[0]))
    search, patch, strength = numbers
    denoise = non_local_means if images.shape[1] == 1 else non_local_means_colour
    return to_float(denoise(images, search=search, patch=patch, strength=strength))


def parsed(squeezer: str) -> tuple[str, tuple[int, ...]]:
    """Return the kind and the numbers of a squeezer's name.

    >>> parsed("nlm-13-3-2")
    ('nlm', (13, 3, 2))

    Raises:
        InputError: if there is no such squeezer.
    """
    match = re.fullmatch(r"bits-[1-7]|median-[23]|nlm-\d{1,2}-\d{1,2}-\d{1,3}", squeezer)
    kind, *numbers = squeezer.split("-") if match else ("", "0")
    values = tuple(int(one) for one in numbers)
    odd = kind != "nlm" or (values[0] % 2 == values[1] % 2 == 1 and values[2] > 0)
    if match is None or not odd:
        raise InputError(f"there is no squeezer {squeezer!r}; there are: {SHAPES}")
    return kind, values


def reduce_bits(images: Tensor, bits: int) -> Tensor:
    """Return images (n, c, h, w) uint8 rounded to 2^bits levels, float32 in [0, 1]."""
    most = 2**bits - 1
    # 255 is odd and 2 v most is even, so no value lies halfway between two levels
    levels = (2 * torch.arange(256) * most + 255) // 510
    squeezed: Tensor = (levels.float() / most)[images.long()]
    return squeezed


def median_filter(images: Tensor, size: int) -> Tensor:
    """Return the median (n, c, h, w) over windows of 2x2 or 3x3 pixels, as `scipy.ndimage` computes it.

    A window of 2x2 reaches up and left, and the upper one of its two middle values counts. Edges are
    mirrored.
    """
    before, after = size // 2, size - 1 - size // 2
    rows, columns = (
        torch.arange(-before, length + after).clamp(0, length - 1) for length in images.shape[2:]
    )  # a mirror one pixel deep repeats the edge
    padded = images[:, :, rows][:, :, :, columns]
    height, width = images.shape[2:]
    lines = [padded[:, :, i : i + height] for i in range(size)]
    if size == 2:
        low, high = torch.minimum(*lines), torch.maximum(*lines)
        lows, highs = ([x[..., j : j + width] for j in range(2)] for x in (low, high))
        return torch.maximum(torch.maximum(*lows), torch.minimum(*highs))
    low, middle, high = _sorted_three(*lines)
    shifted = [[x[..., j : j + width] for j in range(3)] for x in (low, middle, high)]
    highest_low = torch.maximum(torch.maximum(shifted[0][0], shifted[0][1]), shifted[0][2])
    lowest_high = torch.minimum(torch.minimum(shifted[2][0], shifted[2][1]), shifted[2][2])
    return _sorted_three(highest_low, _sorted_three(*shifted[1])[1], lowest_high)[1]


def _sorted_three(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the lowest, the middle and the highest of three tensors, element by element."""
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    rest = torch.minimum(high, c)
    return torch.minimum(low, rest), torch.maximum(low, rest), torch.maximum(high, c)


def non_local_means(images: Tensor, *, search: int, patch: int, strength: float) -> Tensor:
    """Return denoised images (n, c, h, w) uint8, as OpenCV's `fastNlMeansDenoising` computes them.

    Each pixel becomes a mean of those in its search window, weighted by how alike the patches around them
    are. Like OpenCV, it computes in integers: distances by a shift, weights from a table.

    Args:
        search, patch: sides of the windows, odd.
        strength: the larger, the smoother.
    """
    n, channels, height, width = images.shape
    half, reach = patch // 2, search // 2
    weights, shift = _weights(search, patch, float(strength), channels)
    weights = weights.to(images.device)
    border = half + reach
    rows, columns = (_mirrored(length, border).to(images.device) for length in (height, width))
    wide = images[:, :, rows][:, :, :, columns].to(torch.int32)  # (n, c, h + 2 border, w + 2 border)
    own = wide[:, :, reach : reach + height + 2 * half, reach : reach + width + 2 * half]
    total = torch.zeros(n, channels, height, width, dtype=torch.int32, device=images.device)
    norm = torch.zeros(n, 1, height, width, dtype=torch.int32, device=images.device)
    for dy in range(search):
        for dx in range(search):
            other = wide[:, :, dy : dy + height + 2 * half, dx : dx + width + 2 * half]
            squares = (own - other).square_().sum(1, keepdim=True, dtype=torch.int32)
            lines = sum(squares[:, :, i : i + height] for i in range(patch))
            assert isinstance(lines, Tensor)
            distance = sum(lines[..., j : j + width] for j in range(patch))
            assert isinstance(distance, Tensor)
            weight = weights[(distance >> shift).long()]
            total += weight * other[:, :, half : half + height, half : half + width]
            norm += weight
    return ((total.long() + norm // 2) // norm).to(torch.uint8)  # the sum may leave int32


def _mirrored(length: int, border: int) -> Tensor:
    """Return the positions of a row with a border on both sides, mirrored at its end pixels."""
    period = max(1, 2 * (length - 1))
    at = torch.arange(-border, length + border) % period
    return torch.minimum(at, period - at) if length > 1 else torch.zeros_like(at)


@cache
def _weights(search: int, patch: int, strength: float, channels: int) -> tuple[Tensor, int]:
    """Return OpenCV's table of weights by the shifted distance of two patches, and that shift."""
    shift = math.ceil(math.log2(patch * patch))
    scale = 2**shift / (patch * patch)
    fixed = (2**31 - 1) // (search * search * 255)
    count = int(255 * 255 * channels / scale + 1)
    distance = torch.arange(count, dtype=torch.float64) * scale
    weights = (fixed * torch.exp(-distance / (strength * strength * channels))).round().to(torch.int32)
    weights[weights < 0.001 * fixed] = 0
    return weights, shift


#: Linear RGB to XYZ under the white point D65, each row divided by the white's value.
_TO_XYZ = torch.tensor(
    [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]],
    dtype=torch.float64,
) / torch.tensor([[0.950456], [1.0], [1.088754]], dtype=torch.float64)


def non_local_means_colour(images: Tensor, *, search: int, patch: int, strength: float) -> Tensor:
    """Return denoised colour images (n, 3, h, w) uint8: in Lab, lightness and colours each for themselves.

    After OpenCV's `fastNlMeansDenoisingColored`, whose channel order is BGR and was given RGB images by the
    authors. It converts colours in integers and we do in floats, so pixels may differ by a few levels.
    """
    lab = _to_lab(images.flip(1))  # the authors' red is OpenCV's blue
    parts = (lab[:, :1], lab[:, 1:])
    means = [non_local_means(part, search=search, patch=patch, strength=strength) for part in parts]
    return _from_lab(torch.cat(means, dim=1)).flip(1)


def _to_lab(images: Tensor) -> Tensor:
    """Return linear RGB images (n, 3, h, w) uint8 as Lab in 8 bits."""
    xyz = torch.einsum("ij,njhw->nihw", _TO_XYZ.to(images.device), images.double() / 255)
    f = torch.where(xyz > 0.008856, xyz.clamp_min(1e-12) ** (1 / 3), 7.787 * xyz + 16 / 116)
    lightness = (116 * f[:, 1] - 16) * 255 / 100
    a, b = 500 * (f[:, 0] - f[:, 1]) + 128, 200 * (f[:, 1] - f[:, 2]) + 128
    return torch.stack([lightness, a, b], dim=1).round().clamp(0, 255).to(torch.uint8)


def _from_lab(lab: Tensor) -> Tensor:
    """Return Lab images (n, 3, h, w) uint8 as linear RGB in 8 bits."""
    values = lab.double()
    y = (values[:, 0] * 100 / 255 + 16) / 116
    f = torch.stack([y + (values[:, 1] - 128) / 500, y, y - (values[:, 2] - 128) / 200], dim=1)
    xyz = torch.where(f > 6 / 29, f**3, (f - 16 / 116) / 7.787)
    rgb = torch.einsum("ij,njhw->nihw", torch.linalg.inv(_TO_XYZ).to(lab.device), xyz)
    return (rgb * 255).round().clamp(0, 255).to(torch.uint8)
