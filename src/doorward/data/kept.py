"""Write some samples of a source in the form that the source has."""

from __future__ import annotations

import csv
import gzip
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from doorward.core.errors import InputError
from doorward.data.arrays import find_idx, idx_label_file, npz_keys, read_idx
from doorward.data.parquet import find_parquet, write_parquet
from doorward.data.request import Request
from doorward.data.samples import Samples
from doorward.data.sources import request_of
from doorward.data.tables import read_table

Rows = npt.NDArray[np.int64]


def write_kept(
    samples: Samples,
    rows: Rows,
    source: str | Path,
    out: Path,
    *,
    column: str | None = None,
    label_column: str | None = None,
) -> Path:
    """Write some rows of a source into a folder, in the form that they came in, and return what was written.

    Files keep their names. Parquet files, and data sets of the hub, become one parquet file in the hub's
    layout with the inputs and the labels; of tables, all columns are kept.

    Args:
        samples: all rows of the source, as `open_samples` opened it.
        rows: those to write, ascending.
        out: a folder, which is made; it must be empty.

    Raises:
        InputError: if nothing is left, or something cannot be read or written.
    """
    if not len(rows):
        raise InputError(f"no sample is left to write to {out}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is no empty folder; name another for the cleaned data")
    request = request_of(source, column=column, label_column=label_column, prefer=("train",))
    try:
        return _writer(request)(samples, rows, request, out)
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error.strerror or error})") from error


def _writer(request: Request) -> Callable[[Samples, Rows, Request, Path], Path]:
    path, name = request.path, request.path.name.lower()
    if path.is_dir():
        if find_parquet(path):
            return _parquet
        return _idx if find_idx(path) else _media
    if not path.exists() or name.endswith(".parquet"):
        return _parquet
    if name.endswith(".npz"):
        return _npz
    if name.endswith((".csv", ".tsv")):
        return _table
    return _lines if name.endswith((".jsonl", ".ndjson", ".json")) else _idx


def _parquet(samples: Samples, rows: Rows, request: Request, out: Path) -> Path:
    return write_parquet(samples.select(rows), out, split=request.split or "train")


def _media(samples: Samples, rows: Rows, request: Request, out: Path) -> Path:
    for row in rows.tolist():
        file = Path(samples.where(row))
        place = out / file.relative_to(request.path)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, place)
    return out


def _npz(samples: Samples, rows: Rows, request: Request, out: Path) -> Path:
    with np.load(request.path, allow_pickle=False) as archive:
        cut = {key for key in npz_keys(archive.files, request) if key is not None}
        arrays = {key: archive[key][rows] if key in cut else archive[key] for key in archive.files}
    out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out / request.path.name, **arrays)
    return out / request.path.name


def _idx(samples: Samples, rows: Rows, request: Request, out: Path) -> Path:
    splits = find_idx(request.path) if request.path.is_dir() else {}
    split = request.choose_split(list(splits))
    images = splits[split] if split is not None else request.path
    out.mkdir(parents=True, exist_ok=True)
    for file in filter(None, (images, idx_label_file(images))):
        _write_idx(read_idx(file)[rows], out / file.name)
    return out


def _write_idx(array: npt.NDArray[Any], file: Path) -> None:
    codes = {"u1": 8, "i1": 9, "i2": 11, "i4": 12, "f4": 13, "f8": 14}
    head = struct.pack(">HBB", 0, codes[array.dtype.str[1:]], array.ndim)
    data = (
        head
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.astype(array.dtype.newbyteorder(">")).tobytes()
    )
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)


def _table(samples: Samples, rows: Rows, request: Request, out: Path) -> Path:
    table = read_table(request.path)
    out.mkdir(parents=True, exist_ok=True)
    file = out / request.path.name
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter=delimiter, lineterminator="\n")
        writer.writerow(table)
        columns = list(table.values())
        writer.writerows([column[row] for column in columns] for row in rows.tolist())
    return file


def _lines(samples: Samples, rows: Rows, request: Request, out: Path) -> Path:
    with request.path.open(encoding="utf-8-sig") as stream:
        lines = [line for line in stream if line.strip()]
    out.mkdir(parents=True, exist_ok=True)
    file = out / request.path.name
    with file.open("w", encoding="utf-8", newline="") as stream:
        stream.writelines(lines[row].rstrip("\r\n") + "\n" for row in rows.tolist())
    return file
