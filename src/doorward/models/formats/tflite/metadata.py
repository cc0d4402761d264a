"""What TFLite Metadata says of images and classes: a flatbuffer within the file, and a zip behind it.

What does not fit is left out. Normalisation is of pixels from 0 to 255.

Source: TensorFlow Lite Support, metadata_schema.fbs.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

#: Bytes of a list of labels, and entries of a list in the description, that are read at most.
MOST_LABELS, MOST_ENTRIES = 1 << 20, 64
#: Places of fields in their tables, and numbers of kinds, by the schema.
_SUBGRAPHS, _INPUTS, _OUTPUTS, _UNITS, _FILES = 3, 2, 3, 4, 6
_KIND, _OPTIONS, _MEAN, _STD, _NAME, _FILE_KIND, _LOCALE = 0, 1, 0, 1, 0, 2, 3
_NORMALISATION, _AXIS_LABELS = 1, 2


@dataclass(frozen=True)
class Stated:
    """What the metadata states.

    Attributes:
        input: fields of an input spec.
        labels: class names, None where there are none.
    """

    input: dict[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] | None = None


def read_metadata(metadata: npt.NDArray[np.uint8] | None, content: bytes) -> Stated:
    """Return what a file's metadata states; nothing where it has none, or none that can be read.

    Args:
        content: the whole file.
    """
    if metadata is None:
        return Stated()
    try:
        return _read(metadata.tobytes(), content)
    except Exception:  # a damaged description describes nothing; flatbuffers raises what it likes
        return Stated()


def _read(metadata: bytes, content: bytes) -> Stated:
    from flatbuffers.table import Table

    start = Table(metadata, 0)
    graph = next(_tables(Table(metadata, start.Indirect(0)), _SUBGRAPHS))
    stated: dict[str, Any] = {}
    for image in _tables(graph, _INPUTS):
        for unit in _tables(image, _UNITS):
            if _number(unit, _KIND) == _NORMALISATION and (options := _table(unit, _OPTIONS)):
                found = {"mean": _floats(options, _MEAN), "std": _floats(options, _STD)}
                stated = {"range": (0.0, 255.0), **found} if all(found.values()) else {}
    for scores in _tables(graph, _OUTPUTS):
        for file in _tables(scores, _FILES):
            if _number(file, _FILE_KIND) == _AXIS_LABELS and not _text(file, _LOCALE):
                return Stated(stated, _labels(content, _text(file, _NAME)))
    return Stated(stated)


def _labels(content: bytes, name: str) -> tuple[str, ...] | None:
    """Return the lines of a file in the zip archive behind a model."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if archive.getinfo(name).file_size > MOST_LABELS:
            return None
        lines = archive.read(name).decode("utf-8").splitlines()
    names = tuple(line.strip() for line in lines if line.strip())
    return names if len(set(names)) == len(names) > 1 else None


def _place(table: Any, field: int) -> int:
    """Return where a field of a table lies, 0 where it is left out."""
    offset: int = table.Offset(4 + 2 * field)
    return offset + table.Pos if offset else 0


def _table(table: Any, field: int) -> Any:
    from flatbuffers.table import Table

    place = _place(table, field)
    return Table(table.Bytes, table.Indirect(place)) if place else None


def _list(table: Any, field: int) -> tuple[int, int]:
    """Return where a list begins, and how many entries it has."""
    offset = table.Offset(4 + 2 * field)
    if not offset:
        return 0, 0
    return table.Vector(offset), min(table.VectorLen(offset), MOST_ENTRIES)


def _tables(table: Any, field: int) -> Iterator[Any]:
    from flatbuffers.table import Table

    start, length = _list(table, field)
    for i in range(length):
        yield Table(table.Bytes, table.Indirect(start + 4 * i))


def _number(table: Any, field: int) -> int:
    place = _place(table, field)
    return int(table.Bytes[place]) if place else 0


def _floats(table: Any, field: int) -> tuple[float, ...]:
    start, length = _list(table, field)
    return tuple(np.frombuffer(table.Bytes, "<f4", length, start).tolist())


def _text(table: Any, field: int) -> str:
    place = _place(table, field)
    found: bytes = table.String(place)[:MOST_LABELS] if place else b""
    return found.decode("utf-8")
