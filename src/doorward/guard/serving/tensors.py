"""The input tensor of a request: images, texts or recordings, in JSON or as binary data."""

from __future__ import annotations

import math
import struct
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from doorward.data import InMemorySamples
from doorward.models import InputSpec
from doorward.models.encode.audio import to_levels
from doorward.models.encode.dispatch import NOUNS, to_tensor

#: Types by the kind of input, as the protocol and as NumPy have them; the first one is that of the metadata.
TYPES: dict[str, dict[str, Any]] = {
    "image": {"UINT8": np.uint8, "FP32": np.float32},
    "text": {"BYTES": bytes},
    "audio": {"INT16": np.int16, "FP32": np.float32},
}
#: The range of numbers with a point by the kind of input.
RANGES = {"image": (0, 1), "audio": (-1, 1)}


class BadRequestError(ValueError):
    """A request that says something else than the protocol or the model allows."""


class TensorIn(BaseModel):
    """An input tensor: in `data`, or of `binary_data_size` bytes behind the JSON."""

    model_config = ConfigDict(extra="ignore")

    name: str
    shape: list[int] = Field(min_length=1, max_length=8)
    datatype: Literal["UINT8", "FP32", "INT16", "BYTES"]
    parameters: dict[str, Any] = Field(default_factory=dict)
    data: list[Any] | None = None


def metadata(spec: InputSpec) -> dict[str, Any]:
    """Return what a model's metadata say of its input; -1 is any length."""
    kind = spec.modality
    return {"name": NOUNS[kind], "datatype": next(iter(TYPES[kind])), "shape": [-1, *_rest(spec)]}


def read(tensor: TensorIn, tail: bytes, spec: InputSpec, *, most: int) -> Tensor:
    """Return inputs as a guard takes them.

    Args:
        tail: what follows the JSON.
        most: inputs that a request may hold.

    Raises:
        BadRequestError: if they do not fit the model.
    """
    name, rest, shape = NOUNS[spec.modality], _rest(spec), tensor.shape
    if tensor.datatype not in TYPES[spec.modality]:
        known = " or ".join(TYPES[spec.modality])
        raise BadRequestError(f"input {name!r} has the datatype {known}, got {tensor.datatype}")
    pairs = zip(shape[1:], rest, strict=False)
    fits = len(shape) == 1 + len(rest) and all(
        own == wanted or (wanted < 0 and 1 <= own <= spec.width) for own, wanted in pairs
    )
    if not fits or shape[0] < 1:
        sides = ", ".join(["n", *(str(one) if one > 0 else f"1 to {spec.width}" for one in rest)])
        raise BadRequestError(f"input {name!r} has shape [{sides}], got {shape}")
    if shape[0] > most:
        raise BadRequestError(f"a request may hold {most} {name}, got {shape[0]}; send several requests")
    if spec.modality == "text":
        return to_tensor(InMemorySamples(_texts(tensor, tail), modality="text"), spec)
    levels = _levels(tensor, _values(tensor, tail), spec)
    return levels.reshape(shape if spec.modality == "image" else (shape[0], 1, 1, shape[1]))


def _rest(spec: InputSpec) -> list[int]:
    """Return the shape of one input; -1 is any length."""
    return {"image": list(spec.shape), "text": [], "audio": [-1]}[spec.modality]


def _binary_size(tensor: TensorIn, tail: bytes) -> Any:
    """Return how many bytes of binary data there are by the JSON part, None if the values are there."""
    size = tensor.parameters.get("binary_data_size")
    if size is None and tail:
        raise BadRequestError("binary data follow the JSON, and no input has a binary_data_size")
    if size is None and tensor.data is None:
        raise BadRequestError(f"input {tensor.name!r} has no data")
    if size is not None and tensor.data is not None:
        raise BadRequestError(f"input {tensor.name!r} has data and a binary_data_size; it takes one of them")
    return size


def _values(tensor: TensorIn, tail: bytes) -> npt.NDArray[Any]:
    """Return the flat values of a tensor of numbers, as NumPy's own type of it."""
    kind = np.dtype({"UINT8": np.uint8, "INT16": np.int16, "FP32": np.float32}[tensor.datatype])
    count, size = math.prod(tensor.shape), _binary_size(tensor, tail)
    if size is None:
        return _from_json(tensor, kind, count)
    needed = count * kind.itemsize
    if size != needed or len(tail) != needed:
        raise BadRequestError(
            f"input {tensor.name!r} of shape {tensor.shape} and type {tensor.datatype} takes {needed} bytes; "
            f"binary_data_size says {str(size)[:20]}, and {len(tail)} were sent"
        )
    return np.frombuffer(tail, dtype=kind.newbyteorder("<"))


def _from_json(tensor: TensorIn, kind: np.dtype[Any], count: int) -> npt.NDArray[Any]:
    name = tensor.name
    try:
        values = np.asarray(tensor.data, dtype=np.float64).reshape(-1)  # nested or flat
    except (ValueError, TypeError, OverflowError):
        raise BadRequestError(f"input {name!r}: its data are not numbers, or rows differ in length") from None
    if len(values) != count:
        raise BadRequestError(
            f"input {name!r} of shape {tensor.shape} takes {count} values, got {len(values)}"
        )
    if kind.kind in "iu":
        low, high = np.iinfo(kind).min, np.iinfo(kind).max
        if not ((values >= low) & (values <= high) & (values == np.floor(values))).all():
            raise BadRequestError(
                f"input {name!r} of type {tensor.datatype} takes whole numbers from {low} to {high}"
            )
    return values.astype(kind)


def _levels(tensor: TensorIn, values: npt.NDArray[Any], spec: InputSpec) -> Tensor:
    """Return flat values as the levels of images or recordings."""
    if tensor.datatype != "FP32":
        return torch.from_numpy(values.astype(values.dtype.newbyteorder("=")))
    low, high = RANGES[spec.modality]
    if not (np.isfinite(values).all() and values.min() >= low and values.max() <= high):
        raise BadRequestError(f"input {tensor.name!r} of type FP32 takes finite numbers from {low} to {high}")
    if spec.modality == "audio":
        return torch.from_numpy(to_levels(values))
    return torch.from_numpy(np.round(values * 255).astype(np.uint8))


def _texts(tensor: TensorIn, tail: bytes) -> list[str]:
    """Return the texts of a tensor; as binary data each has its length before it, in four bytes."""
    name, count, size = tensor.name, tensor.shape[0], _binary_size(tensor, tail)
    texts: list[Any] = []
    if size is None:
        texts = tensor.data or []
    elif size != len(tail):
        raise BadRequestError(f"binary_data_size says {str(size)[:20]} bytes, and {len(tail)} were sent")
    else:
        at = 0
        while at + 4 <= len(tail) and len(texts) <= count:
            (length,) = struct.unpack_from("<I", tail, at)
            texts.append(tail[at + 4 : at + 4 + length].decode(errors="replace"))
            at += 4 + length
        if at != len(tail):
            raise BadRequestError(f"input {name!r}: a text has another length than is told before it")
    if not all(isinstance(one, str) for one in texts):
        raise BadRequestError(f"input {name!r} takes texts")
    if len(texts) != count:
        raise BadRequestError(f"input {name!r} of shape {tensor.shape} takes {count} texts, got {len(texts)}")
    return [one.encode(errors="replace").decode() for one in texts]  # JSON has halves of characters
