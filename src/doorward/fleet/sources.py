"""Where the models of a fleet are: folders, addresses, and tables with a path and the options of a scan."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

from fsspec.implementations.local import LocalFileSystem
from pydantic import TypeAdapter, ValidationError

from doorward.core.errors import InputError
from doorward.fleet import remote
from doorward.models import LoadOptions
from doorward.models.formats.loading import SUFFIXES
from doorward.scan.request import ScanRequest

#: Tables, by the ending of their names.
TABLES = (".csv", ".parquet")
#: The column that says where a model is.
PATH = "path"
#: What a row may say of a scan, besides what may be said of a model.
_SCAN = tuple(
    one.name for one in fields(ScanRequest) if one.name not in ("model", "options", "folder", "keep_model")
)
_MODEL = tuple(one.name for one in fields(LoadOptions))


@dataclass(frozen=True)
class Place:
    """A model that is to be scanned.

    Attributes:
        path: as a reader finds it again; an address where it is in object storage.
        request: how it is scanned.
        listing: of what is stored at the address, where that is known already.
    """

    path: str
    request: ScanRequest
    listing: remote.Listing | None = None


def find_models(sources: Iterable[str], common: ScanRequest) -> Iterator[Place]:
    """Yield the models of some sources, each path once.

    Args:
        sources: folders, tables, or models themselves, as paths or addresses.
        common: how all are scanned, where a row of a table says nothing else.

    Raises:
        InputError: if a source is not there, holds no model, or a table cannot be understood.
    """
    seen = set()
    for source in map(_local, sources):
        empty = True
        for place in _of_source(source, common):
            empty = False
            if place.path not in seen:
                seen.add(place.path)
                yield place
        if empty and _is_table(source):
            raise InputError(f"{source} has no rows")
        if empty:
            raise InputError(f"{source} holds no model; {', '.join(SUFFIXES)} and Hugging Face folders are")


def _local(source: str) -> str:
    """Return the path of an address that names a file on this machine; others as they are."""
    return str(LocalFileSystem._strip_protocol(source)) if source.startswith("file://") else source


def _of_source(source: str, common: ScanRequest) -> Iterator[Place]:
    address = remote.is_address(source)
    if not address and not Path(source).exists():
        raise InputError(f"{source} does not exist; give a folder, a table or a model")
    if _is_table(source):
        return _of_table(source, common)
    return _of_address(source, common) if address else _of_path(Path(source), common)


def _is_table(source: str) -> bool:
    return PurePosixPath(source).suffix.lower() in TABLES


def _of_address(url: str, common: ScanRequest) -> Iterator[Place]:
    for listing in remote.models_at(url):
        yield Place(listing.url, replace(common, model=listing.url), listing)


def _of_path(path: Path, common: ScanRequest) -> Iterator[Place]:
    """Yield the models below a folder: files by their endings, and folders that are a model as a whole."""
    if path.is_file() or _is_model(path):
        yield _place(path, common)
        return
    for below in sorted(path.iterdir()):
        if below.name.startswith(".") or (below.is_symlink() and below.is_dir()):
            continue  # a link could lead back up
        if below.is_dir():
            yield from _of_path(below, common)
        elif below.suffix.lower() in SUFFIXES:
            yield _place(below, common)


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / "doorward.json").is_file()


def _place(path: Path, common: ScanRequest) -> Place:
    where = str(path.resolve())
    return Place(where, replace(common, model=where))


def _of_table(table: str, common: ScanRequest) -> Iterator[Place]:
    """Yield the models of a table; relative paths count from its folder."""
    for number, given in enumerate(rows(table), start=2):
        yield place_of(table, number, given, common)


def place_of(
    table: str, number: int, row: Mapping[str, Any], common: ScanRequest, *, folder: str | None = None
) -> Place:
    """Return the model that a table's row names, and how it is scanned.

    Args:
        table: its path or address.
        row: what is not blank in it, by column.
        common: how it is scanned where the row says nothing else.
        folder: where its path counts from; the table's own folder if None.

    Raises:
        InputError: if it names no model, or a column is no option of a scan.
    """
    given = dict(row)
    where = given.pop(PATH, None)
    if not isinstance(where, str):
        raise InputError(f"{table}, row {number}: there is nothing in the column {PATH!r}")
    unknown = sorted(set(given) - set(_SCAN) - set(_MODEL))
    if unknown:
        known = ", ".join(sorted((*_SCAN, *_MODEL)))
        raise InputError(f"{table}: there is no option {unknown[0]!r}; there are: {known}")
    model = _below(folder or remote.folder_of(table), _local(where))
    return Place(model, _stated(table, number, common, model, given))


def _below(folder: str, where: str) -> str:
    """Return a path or address, which may be relative to a folder or to the address of one."""
    if remote.is_address(where):
        return where.rstrip("/")
    if remote.is_address(folder) and not where.startswith("/"):
        return remote.join(folder, where)
    return str((Path(folder) / where).resolve())


def rows(table: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table, each with what is not blank in it.

    Args:
        table: its path or address.

    Raises:
        InputError: if it cannot be read, or has no column `path`.
    """
    for row in _rows(table):
        yield {name: value for name, value in row.items() if not _blank(value)}


def _blank(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _rows(table: str) -> Iterator[Mapping[str, Any]]:
    try:
        with _opened(table) as stream:
            if PurePosixPath(table).suffix.lower() == ".csv":
                text = io.TextIOWrapper(stream, newline="", encoding="utf-8-sig")
                lines = csv.DictReader(text, strict=True)
                _check_columns(table, lines.fieldnames or ())
                for number, row in enumerate(lines, start=2):
                    if None in row:
                        raise InputError(f"{table}, row {number}: it has more cells than there are columns")
                    yield row
                return
            import pyarrow.parquet

            with pyarrow.parquet.ParquetFile(stream) as found:
                _check_columns(table, found.schema_arrow.names)
                for batch in found.iter_batches():
                    yield from batch.to_pylist()
    except (OSError, ValueError, csv.Error) as error:  # pyarrow's errors are some of these
        why = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error).splitlines()[0]
        raise InputError(f"{table}: cannot be read as a table, .csv or .parquet: {why}") from error


def _opened(table: str) -> AbstractContextManager[IO[bytes]]:
    return remote.opened(table) if remote.is_address(table) else Path(table).open("rb")


def _check_columns(table: str, names: Iterable[str]) -> None:
    if PATH not in names:
        raise InputError(f"{table} has no column {PATH!r}; it has {', '.join(names) or 'none'}")


def _stated(
    table: str, number: int, common: ScanRequest, model: str, given: Mapping[str, Any]
) -> ScanRequest:
    """Return how a row wants its model to be scanned."""
    whole = common.to_json()
    whole["options"] = whole["options"] | {n: _value(n, v) for n, v in given.items() if n in _MODEL}
    whole |= {n: _value(n, v) for n, v in given.items() if n in _SCAN} | {"model": model}
    for name in ("clean", "train"):
        local = Path(remote.folder_of(table)) / str(given.get(name, ""))
        if given.get(name) and local.exists():
            whole[name] = str(local.resolve())
    try:
        return TypeAdapter(ScanRequest).validate_python(whole)
    except ValidationError as error:
        first = error.errors()[0]
        where = first["loc"][-1] if first["loc"] else "a value"
        raise InputError(f"{table}, row {number}: {where}: {first['msg']}") from error


#: Options that take a list, which a table writes as JSON or with commas.
_LISTS = ("detectors", "labels", "mean", "std", "input_range", "size", "resize")


def _value(name: str, value: Any) -> Any:
    if name not in _LISTS or not isinstance(value, str):
        return value
    if value.startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    parts = [part.strip() for part in value.split(",")]
    return parts if name in ("detectors", "labels") else [_number(part) for part in parts]


def _number(text: str) -> float | int | str:
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        return text
