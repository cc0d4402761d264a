"""Samples of whatever a Python user has: paths, arrays, tensors, lists, data sets of other libraries."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from doorward.core.errors import InputError
from doorward.data.arrays import to_images
from doorward.data.samples import InMemorySamples, Samples
from doorward.data.sources import open_samples

#: What is read from a data set in memory at most: a scan needs some hundreds.
MOST = 100_000
TAKES = (
    "a path, an array or tensor of images, (images, labels), a list of arrays, pictures or texts, a torch "
    "Dataset, or a data set of the Hugging Face library"
)


def as_samples(given: Any, *, what: str = "data", prefer: Sequence[str] | None = None) -> Samples:
    """Return samples of whatever holds some.

    Args:
        given: see `TAKES`. Images are uint8, or floats in [0, 1], and not normalised.
        what: the argument, for messages.
        prefer: splits of a path to take, the best first.

    Raises:
        InputError: if it is none of these, or its images or labels do not fit.
    """
    if isinstance(given, Samples):
        return given
    if isinstance(given, str | Path):
        return open_samples(given) if prefer is None else open_samples(given, prefer=tuple(prefer))
    if hasattr(given, "column_names") and hasattr(given, "features"):
        from doorward.data.hub import samples_of

        return samples_of({"train": given})
    if isinstance(given, dict) and given and all(hasattr(one, "column_names") for one in given.values()):
        from doorward.data.hub import samples_of

        return samples_of(given)
    if isinstance(given, tuple) and len(given) == 2 and _is_array(given[0]):
        return _of_arrays(given[0], given[1], what)
    if _is_array(given):
        return _of_arrays(given, None, what)
    if hasattr(given, "__getitem__") and hasattr(given, "__len__") and not isinstance(given, dict | bytes):
        return _of_items(given, what)
    if isinstance(given, Iterable) and hasattr(given, "dataset"):
        return as_samples(given.dataset, what=what)  # of a DataLoader, which would batch and shuffle them
    raise InputError(f"{what}: expected {TAKES}, got {_kind(given)}")


def _kind(given: Any) -> str:
    return (
        "None"
        if given is None
        else f"{type(given).__module__}.{type(given).__qualname__}".removeprefix("builtins.")
    )


def _is_array(given: Any) -> bool:
    torch = sys.modules.get("torch")
    return isinstance(given, np.ndarray) or (torch is not None and isinstance(given, torch.Tensor))


def _array(given: Any) -> npt.NDArray[Any]:
    return np.asarray(given if isinstance(given, np.ndarray) else given.detach().cpu().numpy())


def _of_arrays(images: Any, labels: Any, what: str) -> Samples:
    pixels = _array(images)
    if pixels.ndim == 3 and {pixels.shape[0], pixels.shape[2]} & {1, 3} and labels is None:
        raise InputError(f"{what}: expected many images (n, h, w, c) or (n, c, h, w), got {pixels.shape}")
    return InMemorySamples(to_images(pixels, what), _labels(labels, len(pixels), what))


def _labels(labels: Any, n: int, what: str) -> npt.NDArray[np.int64] | None:
    if labels is None:
        return None
    try:
        numbers = _array(labels) if _is_array(labels) else np.asarray(labels)
    except (ValueError, TypeError):
        numbers = np.zeros(())
    if numbers.shape != (n,) or numbers.dtype.kind not in "iu":
        raise InputError(
            f"{what}: expected one class number for each of {n} images, got labels of shape {numbers.shape} "
            f"and type {numbers.dtype}"
        )
    return numbers.astype(np.int64)


def _of_items(given: Any, what: str) -> Samples:
    """Return samples of a list or a torch Dataset, whose items are inputs or (input, label)."""
    try:
        items = [given[i] for i in range(min(len(given), MOST))]
    except Exception as error:  # a data set's own code
        raise InputError(f"{what}: the data set's own code fails: {type(error).__name__}: {error}") from error
    if not items:
        raise InputError(f"{what}: it holds no samples")
    pairs = all(isinstance(one, tuple | list) and len(one) == 2 for one in items)
    inputs = [one[0] for one in items] if pairs else items
    labels = _labels([int(one[1]) for one in items], len(items), what) if pairs else None
    classes = getattr(given, "classes", None)
    named = tuple(map(str, classes)) if pairs and isinstance(classes, list | tuple) else None
    if all(isinstance(one, str) for one in inputs):
        return InMemorySamples(inputs, labels, classes=named, modality="text")
    return InMemorySamples([_image(one, what) for one in inputs], labels, classes=named)


def _image(given: Any, what: str) -> npt.NDArray[np.uint8]:
    """Return one image (h, w, c) uint8."""
    if type(given).__module__.startswith("PIL."):
        given = np.asarray(given.convert("L" if given.mode in ("1", "L", "LA") else "RGB"))
    if not _is_array(given):
        raise InputError(
            f"{what}: expected images or texts, or pairs of them and class numbers, got {_kind(given)}"
        )
    return np.asarray(to_images(_array(given)[None], what)[0])
