"""Images in arrays: .npz files of numpy, and idx files as MNIST has them."""

from __future__ import annotations

import gzip
import math
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from doorward.core.errors import InputError
from doorward.data.labels import number_labels
from doorward.data.request import Request, reading
from doorward.data.samples import InMemorySamples, Samples
from doorward.data.stored import DARK, MANY, SURVEYED, nearly_black

_INPUTS, _LABELS = ("x", "images", "image", "data"), ("y", "labels", "label", "targets", "target")
_SPLIT = "train|test|validation|val|valid"
_KEY = re.compile(
    rf"((?P<before>{_SPLIT})[_-])?(?P<name>{'|'.join(_INPUTS + _LABELS)})([_-](?P<after>{_SPLIT}))?"
)
_IDX_FILE = re.compile(r"(?P<split>.+)[-.]images[-.]idx[34][-.]ubyte(\.gz)?")
_IDX_TYPES: dict[int, str] = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


def to_images(array: npt.NDArray[Any], where: str) -> npt.NDArray[np.uint8]:
    """Return an array of images as uint8 (n, h, w, c), c in {1, 3}.

    Accepted are (n, h, w), (n, h, w, c) and (n, c, h, w), c in {1, 3, 4}; the fourth channel is dropped.
    Numbers are uint8, integers from 0 to 255, or floats in [0, 1], which are rounded to 255 levels.

    Raises:
        InputError: if shape, type or range do not fit.
    """
    if array.ndim == 3:
        array = array[..., None]  # (n, h, w, 1)
    elif array.ndim == 4 and array.shape[3] not in (1, 3, 4) and array.shape[1] in (1, 3, 4):
        array = array.transpose(0, 2, 3, 1)  # (n, h, w, c)
    if array.ndim != 4 or array.shape[3] not in (1, 3, 4) or 0 in array.shape[1:]:
        raise InputError(
            f"images in {where} must be (n, h, w), (n, h, w, c) or (n, c, h, w), got {array.shape}"
        )
    if not len(array):
        raise InputError(f"{where} has no rows")
    return _levels(array[..., :3], where)


def _levels(array: npt.NDArray[Any], where: str) -> npt.NDArray[np.uint8]:
    if array.dtype == np.uint8:
        return np.asarray(array)
    if array.dtype.kind not in "iuf":
        raise InputError(f"images in {where} must be numbers, got {array.dtype}")
    low, high = float(array.min()), float(array.max())
    if array.dtype.kind == "f" and low >= 0 and high <= 1:  # NaN fails both
        return np.asarray(np.rint(array * 255), dtype=np.uint8)
    if array.dtype.kind != "f" and low >= 0 and high <= 255:
        return np.asarray(array, dtype=np.uint8)
    raise InputError(
        f"images in {where} must be integers from 0 to 255 or floats from 0 to 1, "
        f"got {array.dtype} from {low:g} to {high:g}"
        + ("; give them before normalisation" if low < 0 else "")
    )


def open_npz(request: Request) -> Samples:
    """Open an .npz file: keys x, images or data, and y or labels; `train_` before or `_train` after: splits.

    Raises:
        InputError: if it cannot be read without unpickling, or if keys, shapes or labels do not fit.
    """
    path = request.path
    with reading(path, "an .npz file"), path.open("rb") as stream:
        archive = np.load(stream, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise InputError(
                f"{path} is one array, not an .npz file; save it by numpy.savez(path, x=..., y=...)"
            )
        inputs, labels = npz_keys(archive.files, request)
        x = to_images(_array(archive, inputs, path), f"{path}, key {inputs!r}")
        y = None if labels is None else _array(archive, labels, path)
    if y is not None:
        y = y.reshape(len(y)) if y.ndim == 2 and y.shape[1] == 1 else y  # MedMNIST has (n, 1)
        if y.dtype.kind == "U":
            y = y.tolist()
    return _samples(request, x, y, [path])


def _array(archive: Any, key: str, path: Path) -> npt.NDArray[Any]:
    try:
        array: npt.NDArray[Any] = archive[key]
    except ValueError as error:
        if "allow_pickle" in str(error):
            raise InputError(
                f"{path}, key {key!r} holds pickled objects, which could execute code; save numbers instead"
            ) from error
        raise
    return array


def npz_keys(keys: Sequence[str], request: Request) -> tuple[str, str | None]:
    """Return the keys of the images and of the labels."""
    for key in (request.column, request.label_column):
        if key is not None and key not in keys:
            raise InputError(f"{request.path} has no key {key!r}; its keys are: {', '.join(keys) or 'none'}")
    found: dict[tuple[str, bool], str] = {}  # (split, labels?) -> key
    for key in keys:
        if match := _KEY.fullmatch(key.lower()):
            found.setdefault((match["before"] or match["after"] or "", match["name"] in _LABELS), key)
    split: str | None = ""
    if request.column is not None:
        split = next((split for (split, _), key in found.items() if key == request.column), "")
    elif ("", False) not in found or request.split is not None:
        split = request.choose_split([split for split, labels in found if split and not labels])
    inputs = request.column or found.get((split or "", False))
    if inputs is None:
        raise InputError(
            f"{request.path} has no images under one of the keys {', '.join(_INPUTS)} (or x_train, ...); "
            f"its keys are: {', '.join(keys) or 'none'}; choose one "
            "(column, on the command line --data-column)"
        )
    return inputs, request.label_column or found.get((split or "", True))


def find_idx(folder: Path) -> dict[str, Path]:
    """Return the image files of each split in a folder of idx files; `t10k` is the test split."""
    found = {}
    for file in sorted(folder.iterdir()):
        if match := _IDX_FILE.fullmatch(file.name):
            found["test" if match["split"] == "t10k" else match["split"]] = file
    return found


def open_idx(request: Request, splits: Mapping[str, Path]) -> Samples:
    """Open the images of an idx file, and the labels of the file next to it if there is one.

    Raises:
        InputError: if a file is damaged or does not hold images, or if the labels do not fit.
    """
    split = request.choose_split(list(splits))
    images = splits[split] if split is not None else request.path
    array = read_idx(images)
    if array.ndim < 3:
        raise InputError(
            f"{images} holds {array.ndim} dimension(s), no images; give the file with the images"
        )
    files = [images]
    x, y = to_images(array, str(images)), None
    labels = idx_label_file(images)
    if labels is not None:
        files.append(labels)
        y = read_idx(labels)
    return _samples(request, x, y, files)


def idx_label_file(images: Path) -> Path | None:
    """Return the file with the labels of an idx file of images, which lies next to it; None without one."""
    return next((file for file in _label_files(images) if file.is_file()), None)


def _label_files(images: Path) -> list[Path]:
    name = images.name.replace("images", "labels").replace("idx3", "idx1").replace("idx4", "idx1")
    if name == images.name:
        return []
    plain = name.removesuffix(".gz")
    return [images.with_name(name), images.with_name(plain), images.with_name(plain + ".gz")]


def read_idx(path: Path) -> npt.NDArray[Any]:
    """Return the array in an idx file, mapped from the disk where it is not compressed.

    Raises:
        InputError: if it is damaged.
    """
    packed = path.suffix == ".gz"
    with reading(path, "an idx file"), gzip.open(path) if packed else path.open("rb") as stream:
        zero, code, dimensions = struct.unpack(">HBB", stream.read(4))
        if zero or code not in _IDX_TYPES or not 1 <= dimensions <= 4:
            raise InputError(f"{path} does not begin as an idx file does")
        shape = struct.unpack(f">{dimensions}I", stream.read(4 * dimensions))
        dtype = np.dtype(_IDX_TYPES[code])
        size = math.prod(shape) * dtype.itemsize
        if not size:
            raise InputError(f"{path} has no rows")
        if not packed:
            if path.stat().st_size != stream.tell() + size:
                raise InputError(f"{path} is damaged: shape {shape} needs {size} bytes after the head")
            # mode c: pages are shared with the file until somebody writes, which never reaches the file
            return np.memmap(path, dtype, "c", offset=stream.tell(), shape=shape)
        parts, left = [], size + 1  # one more, to see whether the file ends where it should
        while left and (part := stream.read(min(left, 2**24))):
            parts.append(part)
            left -= len(part)
        if left != 1:
            raise InputError(f"{path} is damaged: shape {shape} needs {size} bytes after the head")
        return np.frombuffer(bytearray(b"".join(parts)), dtype).reshape(shape)


def _samples(request: Request, x: npt.NDArray[np.uint8], y: Any, files: Sequence[Path]) -> Samples:
    where = str(files[-1])
    labels = number_labels(y, where=where, classes=request.classes)
    if y is not None and len(y) != len(x):
        raise InputError(f"{where} has {len(y)} labels for {len(x)} images")
    some = x[:: max(1, len(x) // SURVEYED)]
    dark = len(some) >= MANY and int(some.max()) <= DARK
    return InMemorySamples(
        x,
        labels.numbers,
        classes=labels.classes,
        path=request.given,
        files=request.names(files),
        notes=[nearly_black(request.given, f"{DARK} of 255")] if dark else [],
    )
