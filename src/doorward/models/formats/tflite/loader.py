"""TensorFlow Lite models as classifiers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from doorward.core.errors import InputError
from doorward.models.classifier import Classifier
from doorward.models.formats.input_options import LoadOptions, guess_layout, trial_inputs
from doorward.models.formats.other_formats import TFLITE
from doorward.models.formats.rebuilt import Built, Description, Unknown, image_facts, open_rebuilt
from doorward.models.formats.tflite.metadata import read_metadata
from doorward.models.formats.tflite.network import Clip, build_network, unrounded
from doorward.models.formats.tflite.reading import TfliteFile, Value, read_tflite
from doorward.models.outputs import leaves
from doorward.models.spec import InputSpec

#: Ranges that images usually come in, and how far a quantised input may miss them, as a share of their width.
_USUAL, _NEAR = ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)), 0.05
_ROUNDED = (
    "this model computes with whole numbers; here it does with the real numbers that they stand for, so that "
    "its answers differ a little"
)


def open_tflite(path: Path, options: LoadOptions) -> Classifier:
    """Open a TensorFlow Lite file.

    Raises:
        NotExamined: if it cannot be read, or holds an operator or an input that is not read.
        InputError: if what was stated does not fit it.
    """
    return open_rebuilt(path, options, TFLITE, "tflite", _described)


def _described(path: Path) -> Description:
    file = read_tflite(path)
    if len(file.inputs) != 1:
        raise Unknown(f"{len(file.inputs)} inputs")
    image = file.value(file.inputs[0])
    if image.kind not in ("FLOAT32", "UINT8") and image.range is None:
        raise Unknown(f"an input of numbers of the type {image.kind}")
    if image.shape[:1] not in ((1,), (-1,)):
        raise Unknown(f"images in groups of {image.shape[0] if image.shape else 0}")
    held, metadata = _held_range(file, image), read_metadata(file.metadata, file.content)
    stated = metadata.input
    if held is not None and not (stated and _fits(*_ends(stated), held)):
        stated = _of_range(held)
    sizes = [None if size == -1 else size for size in image.shape]
    layout = guess_layout(sizes) if len(sizes) == 4 else None
    return Description(
        image_facts(sizes, layout or "NHWC"),
        lambda spec: _built(path, file, spec, held),
        stated=stated,
        labels=metadata.labels,
    )


def _held_range(file: TfliteFile, image: Value) -> tuple[float, float] | None:
    """Return what numbers the model's input can hold, None where any."""
    if image.kind == "UINT8" and image.range is None:
        return 0.0, 255.0
    first = next((node for node in file.nodes if image.number in node.takes), None)
    if image.range is None and first is not None and first.kind == "QUANTIZE" and first.gives:
        return file.value(first.gives[0]).range
    return image.range


def _of_range(held: tuple[float, float]) -> dict[str, Any]:
    """Return how images are taken whose numbers fill a range: as usual, where that is near."""
    near = _NEAR * (held[1] - held[0])
    for usual in _USUAL:
        if max(abs(a - b) for a, b in zip(held, usual, strict=True)) < near:
            return {"range": usual}
    return {"range": held, "assumed": ("range", "mean", "std")}


def _fits(low: float, high: float, held: tuple[float, float]) -> bool:
    """Return whether images from low to high lie in a range, or not far outside."""
    spare = (held[1] - held[0]) / 2
    return held[0] - spare <= low and high <= held[1] + spare


def _ends(stated: Mapping[str, Any]) -> tuple[float, float]:
    """Return the least and the largest number that images have once they are normalised."""
    pairs = list(zip(stated["mean"], stated["std"], strict=True))
    low, high = stated["range"]
    return min((low - mean) / std for mean, std in pairs), max((high - mean) / std for mean, std in pairs)


def _built(path: Path, file: TfliteFile, spec: InputSpec, held: tuple[float, float] | None) -> Built:
    """Return the network for images as a spec has them.

    Raises:
        InputError: if the model's input cannot hold their numbers.
    """
    low, high = _ends({name: getattr(spec, name) for name in ("range", "mean", "std")})
    if held is not None and not _fits(low, high, held):
        raise InputError(
            f"{path}: the model's input holds numbers from {held[0]:g} to {held[1]:g}, and the images that "
            f"were stated have some from {low:g} to {high:g}: leave out what was stated of them"
        )
    network = build_network(file, spec.to_model(trial_inputs(spec, 1)).shape)
    module, image = network.module, file.value(file.inputs[0])
    if image.range is not None:
        module = nn.Sequential(Clip(*image.range, image.step), module)
    module.eval()
    return Built(module, _batch(module, spec), (_ROUNDED,) if network.rounded else ())


def _batch(module: nn.Module, spec: InputSpec) -> int | None:
    """Return how many images a network takes at a time: None for any number, if it gives the same for each.

    A file describes what becomes of one image.
    """
    images = spec.to_model(trial_inputs(spec))
    with torch.no_grad(), unrounded(module):
        apart = [[y for _, y in leaves(module(one[None]))] for one in images]
        try:
            together = [y for _, y in leaves(module(images))]
            same = all(
                torch.allclose(y, torch.cat(ys), rtol=1e-4, atol=1e-5 * float(y.abs().max()), equal_nan=True)
                for y, ys in zip(together, zip(*apart, strict=True), strict=True)
            )
        except (RuntimeError, IndexError, ValueError):  # what is made for one image fails for several
            same = False
    return None if same else 1
