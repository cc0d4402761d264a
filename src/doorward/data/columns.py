"""Which column holds inputs and which labels: by the Hugging Face features, or else by type and name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from doorward.core.errors import InputError
from doorward.data.request import Request, reading

#: `encoded` is a media file that no feature describes; `class` is an integer with class names; `empty` has no
#: values and thus no type.
Kind = Literal["image", "audio", "encoded", "text", "class", "integer", "empty", "other"]
#: Names of columns that are taken for labels, the surest first.
LABEL_NAMES = ("label", "labels", "target", "class")
#: Columns that a message names.
_NAMED = 10
_SOUND = (b"fLaC", b"OggS", b"ID3", b"\xff\xfb", b"\xff\xf3", b"\xff\xf2")


@dataclass(frozen=True)
class Columns:
    """Which columns to read.

    Attributes:
        inputs: the column of the inputs.
        kind: what it holds.
        labels: the column of the labels, None if there is none.
        names: the class names of integer labels, None if nothing gives them.
        textual: whether labels are strings.
    """

    inputs: str
    kind: Kind
    labels: str | None
    names: tuple[str, ...] | None = None
    textual: bool = False


def columns_of(schema: pa.Schema, request: Request, where: Path | str) -> Columns:
    """Return the columns to read from a table.

    Raises:
        InputError: if the features are damaged, or as `choose_columns` does.
    """
    features = features_of(schema, where)
    with reading(where, "a table with Hugging Face features"):
        kinds = kinds_of(schema, features)
    chosen = choose_columns(kinds, request)
    if chosen.labels is None:
        return chosen
    names = class_names(features.get(chosen.labels, {}), where)
    return replace(chosen, names=names, textual=kinds[chosen.labels] == "text")


def features_of(schema: pa.Schema, where: Path | str) -> dict[str, dict[str, Any]]:
    """Return the Hugging Face features in a schema's metadata by column, empty if there are none.

    Raises:
        InputError: if they are damaged.
    """
    with reading(where, "a table with Hugging Face features"):
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = (info.get("info") or {}).get("features") or {}
        # lists of features are written as lists and describe no input
        return {str(name): dict(value) for name, value in features.items() if isinstance(value, Mapping)}


def class_names(feature: Mapping[str, Any], where: Path | str) -> tuple[str, ...] | None:
    """Return the names of a ClassLabel feature, None for any other.

    Raises:
        InputError: if they are no list of strings.
    """
    names = feature.get("names") if feature.get("_type") == "ClassLabel" else None
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{where}: the class names in the Hugging Face features must be a list of strings")
    return tuple(names)


def kinds_of(schema: pa.Schema, features: Mapping[str, Mapping[str, Any]]) -> dict[str, Kind]:
    """Return what each column holds. Types go before features, which may say anything."""
    return {field.name: _kind(field.type, features.get(field.name, {}).get("_type")) for field in schema}


def _kind(type_: pa.DataType, feature: object) -> Kind:
    if pa.types.is_null(type_):
        return "empty"
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    if pa.types.is_integer(type_):
        return "class" if feature == "ClassLabel" else "integer"
    if pa.types.is_string(type_) or pa.types.is_large_string(type_):
        return "text"
    if is_struct(type_) or pa.types.is_binary(type_) or pa.types.is_large_binary(type_):
        known: dict[object, Kind] = {"Image": "image", "Audio": "audio", "Value": "encoded", None: "encoded"}
        return known.get(feature, "other")
    return "other"


def is_struct(type_: pa.DataType) -> bool:
    """Return whether a type is the hub's pair of bytes and path."""
    return bool(pa.types.is_struct(type_) and type_.get_field_index("bytes") >= 0)


def choose_columns(kinds: Mapping[str, Kind], request: Request) -> Columns:
    """Return the columns to read.

    Inputs: the column asked for; else the only one with media; else `text`; else the only one with text.
    Labels: the column asked for; else `label` or the only one with class names; else a column called label,
    labels, target or class.

    Raises:
        InputError: if a column asked for is missing or holds something else, or if there are several or none.
    """
    for name in (request.column, request.label_column):
        if name is not None and name not in kinds:
            raise InputError(f"{request.path} has no column {name!r}; its columns are: {', '.join(kinds)}")
    label = request.label_column or _find_label(kinds, request)
    if label is not None and kinds[label] not in ("class", "integer", "text", "empty"):
        raise InputError(f"column {label!r} of {request.path} holds neither integers nor strings: no labels")
    inputs = request.column or _find_inputs(
        {name: kind for name, kind in kinds.items() if name != label}, request
    )
    if kinds[inputs] not in ("image", "audio", "encoded", "text"):
        raise InputError(f"column {inputs!r} of {request.path} holds no images, recordings or texts")
    return Columns(inputs, kinds[inputs], label)


def _find_label(kinds: Mapping[str, Kind], request: Request) -> str | None:
    named = [name for name, kind in kinds.items() if kind == "class" and name != request.column]
    if len(named) > 1 and "label" not in named:
        raise InputError(
            f"{request.path} has several label columns: {', '.join(named)}; choose one (label_column, "
            "on the command line --label-column)"
        )
    if named:
        return "label" if "label" in named else named[0]
    for name in LABEL_NAMES:
        if name in kinds and name != request.column:
            return name
    return None


def _find_inputs(kinds: Mapping[str, Kind], request: Request) -> str:
    media = [name for name, kind in kinds.items() if kind in ("image", "audio", "encoded")]
    texts = [name for name, kind in kinds.items() if kind == "text"]
    found = media or (["text"] if "text" in texts else texts)
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(
            f"{request.path} has several columns that could be the inputs: {', '.join(found)}; choose one "
            "(column, on the command line --data-column)"
        )
    named, hint = ", ".join(kinds), ""
    if len(kinds) > _NAMED:
        named = f"{', '.join(list(kinds)[:_NAMED])} and {len(kinds) - _NAMED:,} more"
        hint = "; where each is a pixel, write images of them: numpy.savez('clean.npz', x=images, y=labels)"
    raise InputError(
        f"{request.path} has no column with images, recordings or texts; its columns are: "
        f"{named or 'none but labels'}{hint}"
    )


def sniff(data: bytes) -> Literal["image", "audio"]:
    """Tell a recording from a picture by its first bytes."""
    wave = data[:4] == b"RIFF" and data[8:12] == b"WAVE"
    return "audio" if wave or data.startswith(_SOUND) else "image"


def pick(column: pa.ChunkedArray, rows: Sequence[int]) -> list[Any]:
    """Return some rows, ascending, of a column as Python values, copying nothing else.

    Chunks are taken one by one, since putting them together fails beyond 2 GiB of bytes.
    """
    out: list[Any] = []
    start, at = 0, 0
    for chunk in column.chunks:
        end = at
        while end < len(rows) and rows[end] < start + len(chunk):
            end += 1
        if end > at:
            out += chunk.take(pa.array([row - start for row in rows[at:end]], pa.int64())).to_pylist()
        start, at = start + len(chunk), end
    return out


def label_values(columns: Sequence[pa.ChunkedArray], where: Path | str) -> npt.NDArray[Any] | list[Any]:
    """Return the labels in a column's parts as an integer array, as a list if some are strings or null.

    Raises:
        InputError: if strings are not UTF-8.
    """
    if all(pa.types.is_integer(column.type) and not column.null_count for column in columns):
        return np.concatenate([column.to_numpy() for column in columns])
    with reading(where, "labels"):
        return [value for column in columns for value in column.to_pylist()]


def file_bytes(value: Any, roots: Sequence[Path]) -> bytes | str | None:
    """Return the bytes of a media file, or the text, that one cell holds; None for an empty cell.

    A cell may name a file instead of holding its bytes. Only files under the roots are read, since a table
    from elsewhere must not reach the rest of the disk; relative names are relative to the first root.

    Raises:
        InputError: if the file lies elsewhere or cannot be read.
    """
    if not isinstance(value, dict):
        return value if isinstance(value, bytes | str) or value is None else bytes(value)
    data, path = value.get("bytes"), value.get("path")
    if data is not None or path is None:
        return data
    return inner_file(path, roots).read_bytes()


def inner_file(path: str, roots: Sequence[Path]) -> Path:
    """Return the file that a cell names.

    Raises:
        InputError: if it lies outside the roots.
    """
    file = (roots[0] / path).resolve()
    if not any(file.is_relative_to(root.resolve()) for root in roots):
        raise InputError(f"it names a file outside the data set's folder, {path!r}; embed the bytes instead")
    return file
