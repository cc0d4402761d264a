"""Texts in CSV and JSON-lines files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv

from doorward.core.errors import InputError
from doorward.data.columns import Kind, choose_columns
from doorward.data.labels import number_labels
from doorward.data.request import Request, reading
from doorward.data.samples import InMemorySamples, Samples

_NUMBER = re.compile(r"[+-]?\d+(?P<fraction>\.\d*)?([eE][+-]?\d+)?")

_PICTURE = re.compile(r"\S+\.(png|jpe?g|webp|gif|bmp|tiff?)", re.IGNORECASE)


def open_table(request: Request) -> Samples:
    """Open the texts of a CSV (.csv, .tsv; with a header) or JSON-lines file in UTF-8.

    Raises:
        InputError: if it cannot be read, or if columns or labels do not fit.
    """
    request.choose_split(())
    table = read_table(request.path)
    rows = len(next(iter(table.values()), ()))
    if not rows:
        raise InputError(f"{request.path} has no rows")
    kind = _csv_kind if _is_csv(request.path) else _json_kind
    columns = choose_columns({name: kind(values) for name, values in table.items()}, request)
    texts = table[columns.inputs]
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"{request.path}, row {row}: column {columns.inputs!r} holds {text!r}, no text")
    if all(_PICTURE.fullmatch(text) for text in texts):
        raise InputError(
            f"{request.path}: column {columns.inputs!r} holds the names of pictures. Give their folder, with "
            "this table in it as metadata.csv and the names in a column file_name"
        )
    labels = number_labels(
        None
        if columns.labels is None
        else [None if value == "" else value for value in table[columns.labels]],
        where=str(request.path),
        classes=request.classes,
    )
    return InMemorySamples(
        texts,
        labels.numbers,
        classes=labels.classes,
        modality="text",
        path=request.given,
        files=request.names([request.path]),
    )


def read_table(path: Path) -> Mapping[str, list[Any]]:
    """Return the columns of a CSV file, all as strings, or of a JSON-lines file.

    Raises:
        InputError: if it cannot be read.
    """
    return _read_csv(path) if _is_csv(path) else _read_json(path)


def _is_csv(path: Path) -> bool:
    return path.suffix.lower() in (".csv", ".tsv")


def _csv_kind(values: Sequence[str]) -> Kind:
    """Return what a column holds: CSV knows no types, so numbers are what looks like them."""
    matches = [_NUMBER.fullmatch(value) for value in values if value]
    if not matches:
        return "empty"
    if not all(matches):
        return "text"
    return "integer" if all(match and match.lastindex is None for match in matches) else "other"


def _json_kind(values: Sequence[Any]) -> Kind:
    """Return what a column holds by its first value."""
    kinds: dict[type, Kind] = {str: "text", int: "integer", type(None): "empty"}
    return kinds.get(type(next((value for value in values if value is not None), None)), "other")


def _read_csv(path: Path) -> Mapping[str, list[Any]]:
    parse = pa.csv.ParseOptions(
        delimiter="\t" if path.suffix.lower() == ".tsv" else ",", newlines_in_values=True
    )
    with reading(path, "a UTF-8 table with a header"):
        # a row must fit into a block
        read = pa.csv.ReadOptions(block_size=min(max(path.stat().st_size, 2**20), 2**30))
        with pa.csv.open_csv(path, read, parse) as stream:
            names = stream.schema.names
        if len(set(names)) < len(names):
            raise InputError(f"{path} has several columns of one name: {', '.join(names)}")
        # as strings, since a text such as 1.0 or 2020-01-01 must stay what it is
        convert = pa.csv.ConvertOptions(column_types={name: pa.string() for name in names})
        table = pa.csv.read_csv(path, read, parse, convert)
        return {name: table.column(name).to_pylist() for name in names}


def _read_json(path: Path) -> Mapping[str, list[Any]]:
    rows: list[dict[str, Any]] = []
    with reading(path, "UTF-8 text"), path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            with reading(f"{path}, line {number},", "JSON"):
                row = json.loads(line)
            if not isinstance(row, dict):
                raise InputError(
                    f"{path}, line {number}: each line must be one JSON object, got {type(row).__name__}"
                )
            rows.append(row)
    return {name: [row.get(name) for row in rows] for name in (rows[0] if rows else ())}
