"""Image processors of transformers: what they declare, as fields of an input spec."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from doorward.core.errors import InputError
from doorward.models.encode.image import fit_image, to_float
from doorward.models.errors import NotExamined
from doorward.models.formats.input_options import first_line
from doorward.models.spec import InputSpec

#: Name of the file that says how images are made to fit.
PREPROCESSOR = "preprocessor_config.json"
#: Pixel levels by which our preprocessing may differ from the model's own.
_TOLERANCE = 1.0
#: What a processor calls the images that it makes.
_PIXELS = "pixel_values"


def load_processor(path: Path) -> Any | None:
    """Return the model's own image processor, in its Pillow form, or None if it declares none."""
    import transformers

    if not (path / PREPROCESSOR).is_file():
        return None
    try:
        return transformers.AutoImageProcessor.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False, use_fast=False
        )
    except Exception as error:  # as above
        raise InputError(
            f"{path / PREPROCESSOR}: cannot make the image processor: {first_line(error)}"
        ) from error


def describe_processor(processor: Any, path: Path) -> dict[str, Any]:
    """Return what an image processor of transformers declares, as fields of an input spec.

    Raises:
        NotExamined: if it makes no image of an image, as that of ImageGPT does.
        InputError: if it declares what a spec cannot hold.
    """
    file = path / PREPROCESSOR
    kind = type(processor).__name__
    made = getattr(processor, "model_input_names", None) or [_PIXELS]
    if made[0] != _PIXELS:
        raise NotExamined(
            f"{path}: only its files were examined: its {kind} turns an image into {made[0]!r}, and models "
            "are examined that take the colours of an image"
        )
    declared = _Declared(processor)
    try:
        return _describe_colours(declared) | _describe_size(declared)
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise InputError(f"{file}: not understood ({kind}): {first_line(error)}") from error


class _Declared:
    """The settings of an image processor."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def get(self, name: str, default: Any = None) -> Any:
        """Return a setting, the default where there is none."""
        value = getattr(self._processor, name, None)
        return default if value is None else value

    def belongs_to(self, model: str) -> bool:
        """Return whether this is the processor of that model, which computes in its own way."""
        return type(self._processor).__name__.startswith(f"{model}ImageProcessor")

    def has_own(self, name: str) -> bool:
        """Return whether the class of this very processor has a setting that others lack."""
        return name in type(self._processor).__dict__


def _describe_colours(declared: _Declared) -> dict[str, Any]:
    """Return range, mean, standard deviation, and the order of the colours."""
    get = declared.get
    high = 255 * float(get("rescale_factor", 1 / 255)) if get("do_rescale") else 255.0
    low = -1.0 if get("rescale_offset") else 0.0
    stated: dict[str, Any] = {"range": (low, _rounded(high) + low), "mean": (0.0,), "std": (1.0,)}
    if get("do_normalize"):
        stated["mean"], stated["std"] = (_per_channel(get(f"image_{name}")) for name in ("mean", "std"))
        if get("include_top"):  # EfficientNet divides once more
            stated["std"] = tuple(value**2 for value in stated["std"])
    if get("do_flip_channel_order") or declared.belongs_to("PPLCNet"):
        # colours are swapped after all else, and a spec has mean and std in the order of the model
        turned = {name: stated[name][::-1] for name in ("mean", "std")}
        stated |= {"channel_order": "BGR"} | turned
    return stated


def _describe_size(declared: _Declared) -> dict[str, Any]:
    """Return height, width and resizing."""
    get = declared.get
    crop = _pair(get("crop_size")) if get("do_center_crop") else None
    if not get("do_resize"):
        if crop is None:
            return {}
        raise ValueError("do_center_crop without do_resize is not supported")
    if not get("size"):
        any_size = get("patch_size") is not None
        raise ValueError("it makes patches of images of any size" if any_size else "it states no size")
    size, resample = dict(get("size")), int(get("resample", 2))
    if size.get("longest_edge") or size.get("max_height"):
        raise ValueError("size with longest_edge or max_height is not supported")
    if declared.belongs_to("Perceiver") and crop:
        return _cut_before_resizing(size, crop, resample)
    edge = size.get("shortest_edge")
    if declared.belongs_to("PPLCNet"):
        edge = get("resize_short", edge)
        if get("size_divisor", 1) != 1:
            raise ValueError("size_divisor is not supported")
    if edge and declared.belongs_to("Levit"):
        edge = int(256 / 224 * edge)
    if edge and declared.has_own("crop_pct"):
        # ConvNeXt's rule: below 384 pixels resize to a little more and crop, else squeeze into a square
        if edge < 384:
            crop = crop or (edge, edge)
            edge = int(edge / get("crop_pct"))
        else:
            size, edge = {"height": edge, "width": edge}, None
    resize = {"resample": resample, "crop": crop}
    if edge:
        resize |= {"height": edge, "width": edge, "shortest_edge": True}
        resize |= {"nearest": True} if declared.belongs_to("PPLCNet") else {}
    else:
        resize |= {"height": size["height"], "width": size["width"]}
    height, width = crop or (resize["height"], resize["width"])
    return {"height": height, "width": width, "resize": resize}


def _cut_before_resizing(size: dict[str, Any], crop: tuple[int, int], resample: int) -> dict[str, Any]:
    """Return height, width and resizing of a processor that cuts a square out first."""
    height, width = size["height"], size["width"]
    share = height / crop[0]
    if share != width / crop[1] or not 0 < share <= 1:
        raise ValueError("a crop that is no square, or is larger than the image, is not supported")
    resize = {"height": height, "width": width, "resample": resample, "square": share}
    return {"height": height, "width": width, "resize": resize}


def refuse_difference(processor: Any, spec: InputSpec, path: Path) -> None:
    """Raise if our preprocessing of a few images differs from that of the model's own processor.

    Images are opened as RGB (or grey, for models with one channel), as transformers' pipelines do.

    Raises:
        InputError: naming the processor's settings.
    """
    rng = np.random.default_rng(0)
    mode = "L" if spec.channels == 1 else "RGB"
    free = spec.resize is not None and (not spec.resize.shortest_edge or spec.resize.crop is not None)
    sizes = (
        [(spec.height + 37, 2 * spec.width + 1), (spec.height // 2 + 3, spec.width // 2 + 3)] if free else []
    )
    for height, width in [(spec.height, spec.width), *sizes]:
        coarse = rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, spec.channels), dtype=np.uint8)
        pixels = coarse.repeat(4, 0).repeat(4, 1)[:height, :width]
        try:
            own = processor(Image.fromarray(pixels.squeeze()).convert(mode), return_tensors="np")[_PIXELS][0]
        except Exception as error:  # whatever it is, the processor does not take an image
            raise InputError(
                f"{path / PREPROCESSOR}: the image processor fails: {first_line(error)}"
            ) from error
        fitted = torch.from_numpy(fit_image(pixels, spec).transpose(2, 0, 1).copy())
        ours = spec.to_model(to_float(fitted[None]))[0].numpy()
        scale = (spec.range[1] - spec.range[0]) / 255 / min(spec.std)
        if ours.shape != own.shape or np.abs(ours - own).max() > _TOLERANCE * scale + 1e-4:
            settings = {
                key: value for key, value in processor.to_dict().items() if key.startswith("do_") and value
            }
            raise InputError(
                f"{path / PREPROCESSOR}: the preprocessing of {type(processor).__name__} is not supported "
                f"({', '.join(settings)}); state the input in doorward.json and give images of the final size"
            )


def _rounded(value: float) -> float:
    """Return 1.0 for what 255 * (1 / 255) gives in floating point."""
    return round(value, 9)


def _per_channel(value: Any) -> tuple[float, ...]:
    return tuple(float(one) for one in value) if isinstance(value, list | tuple) else (float(value),)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size["height"]), int(size["width"]))
