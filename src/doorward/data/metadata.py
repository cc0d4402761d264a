"""Tables next to images: metadata.csv or metadata.jsonl, as the hub's folders have them, or labels.csv."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from doorward.core.errors import InputError
from doorward.data.columns import LABEL_NAMES
from doorward.data.labels import Labels, names_of, number_labels
from doorward.data.request import Request
from doorward.data.tables import read_table

#: Names of such tables, and of their column with a file's place below the table's folder, the hub's first.
METADATA = frozenset({"metadata.csv", "metadata.jsonl", "labels.csv"})
FILE_NAME, OTHER_NAMES = "file_name", ("filename", "file", "image", "path", "image_path", "img")


@dataclass(frozen=True)
class MetadataTable:
    """What tables say of some files.

    Attributes:
        labels: None where no column holds any.
        files: the tables that were read.
        notes: what was taken, what was left out.
    """

    labels: Labels | None
    files: list[Path]
    notes: list[str]


def read_metadata(request: Request, tables: Sequence[Path], files: Sequence[Path]) -> MetadataTable:
    """Read the labels of files from the tables next to them.

    Args:
        tables: all below the folder, so that a class has the same number in each split.
        files: those whose labels are wanted.

    Raises:
        InputError: if a table cannot be read, or names some of the files and not others.
    """
    values: dict[Path, Any] = {}
    notes: list[str] = []
    column = None
    for table in sorted(tables):
        name = table.relative_to(request.path).as_posix()
        columns = read_table(table)
        places = next((one for one in (FILE_NAME, *OTHER_NAMES) if one in columns), None)
        if places is None:
            notes.append(f"{name} was not used: it has no column {FILE_NAME!r}")
            continue
        column = _label_column(request, table, list(columns))
        if column is None:
            others = ", ".join(one for one in columns if one != places)
            notes.append(
                f"{name} names no labels; --label-column takes one of its columns: {others or 'none'}"
            )
            continue
        rows = zip(columns[places], columns[column], strict=True)
        own = {Path(table.parent, str(file)): None if value == "" else value for file, value in rows}
        gone = [file for file in own if not file.is_file()]
        if gone:
            notes.append(f"{name} names {len(gone)} files that are not there, first {gone[0].name}")
        notes.append(f"labels are read from {name}, column {column!r}")
        values |= own
    if not values:
        return MetadataTable(None, [], notes)
    missing = [file for file in files if file not in values]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(files)} images are not named in {tables[0].name}, first {missing[0]}: "
            "name them, or take the table away"
        )
    where = f"{request.path}, {', '.join(sorted({table.name for table in tables}))}"
    strings = all(isinstance(value, str) for value in values.values() if value is not None)
    names = names_of(value for value in values.values() if value is not None) if strings else None
    labels = number_labels(
        [values[file] for file in files], where=where, names=names, classes=request.classes
    )
    return MetadataTable(labels, sorted(tables), notes)


def _label_column(request: Request, table: Path, columns: Sequence[str]) -> str | None:
    """Return the column of the labels.

    Raises:
        InputError: if the one asked for is not there.
    """
    if request.label_column is not None:
        if request.label_column not in columns:
            raise InputError(
                f"{table} has no column {request.label_column!r}; its columns are: {', '.join(columns)}"
            )
        return request.label_column
    return next((name for name in LABEL_NAMES if name in columns), None)
