"""Parquet files in the layout of the Hugging Face hub: read by row groups, written in one stream."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from doorward.core.errors import InputError
from doorward.data.columns import columns_of, file_bytes, inner_file, is_struct, label_values, pick
from doorward.data.decode import encode_audio, encode_image
from doorward.data.labels import names_of, number_labels
from doorward.data.request import SPLITS, Request, reading, reason
from doorward.data.samples import Modality, Provenance, Samples
from doorward.data.stored import StoredSamples, modality_of

#: Row groups kept in memory, in bytes; one is kept in any case.
CACHE_BYTES = 128 * 2**20
#: Row groups written are closed at this many bytes or rows; so many rows are decoded at a time.
GROUP_BYTES, GROUP_ROWS, READ_ROWS = 32 * 2**20, 10_000, 250
_SHARD = re.compile(r"(?P<split>\w+(?:\.\w+)*?)(?:-(?P<number>\d{5})-of-(?P<total>\d{5}))?(?:-[\w.-]+)?")


def find_parquet(folder: Path) -> dict[str, list[Path]]:
    """Return the files of each split: in the folder, in its `data`, or in one folder a split.

    A single sub-folder that holds such files (a configuration on the hub) is entered.

    Raises:
        InputError: if shards are missing, or if several sub-folders hold data sets of their own.
    """
    for place in (folder, folder / "data"):
        files = _parquet_in(place)
        if files:
            return _by_split(files)
    inner = [place for place in sorted(folder.iterdir()) if place.is_dir() and not place.name.startswith(".")]
    split_folders = {
        place.name: files for place in inner if place.name in SPLITS and (files := _parquet_in(place))
    }
    if split_folders:
        return split_folders
    inner = [place for place in inner if any(chain(place.glob("*.parquet"), place.glob("*/*.parquet")))]
    if len(inner) > 1:
        names = ", ".join(place.name for place in inner)
        raise InputError(f"{folder} holds several data sets: {names}; choose one as {inner[0]}")
    return find_parquet(inner[0]) if inner else {}


def _parquet_in(folder: Path) -> list[Path]:
    return sorted(
        file for file in folder.glob("*.parquet") if file.is_file() and not file.name.startswith(".")
    )


def split_of(file: Path) -> str:
    """Return the split that a file belongs to by its name.

    >>> split_of(Path("train.parquet")), split_of(Path("test-00000-of-00001-a1b2.parquet"))
    ('train', 'test')
    """
    match = _SHARD.fullmatch(file.stem)
    split = match["split"] if match else file.stem
    return file.parent.name if split.isdigit() else split  # the hub's own conversion numbers a split's files


def _by_split(files: Sequence[Path]) -> dict[str, list[Path]]:
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(split_of(file), []).append(file)
    for split, shards in splits.items():
        matches = [_SHARD.fullmatch(file.stem) for file in shards]
        numbers = {match["number"] for match in matches if match}
        totals = {match["total"] for match in matches if match}
        if totals <= {None}:
            continue
        if len(totals) > 1 or len(numbers) < len(shards):
            names = ", ".join(file.name for file in shards[:4])
            raise InputError(
                f"{shards[0].parent}: the files of split {split!r} do not belong together: {names}"
            )
        total = int(totals.pop() or 0)
        missing = sorted({f"{i:05d}" for i in range(total)} - numbers)
        if missing:
            raise InputError(
                f"{shards[0].parent}: split {split!r} lacks {len(missing)} of {total} files, "
                f"first {split}-{missing[0]}-of-{total:05d}.parquet"
            )
    return splits


def open_parquet(request: Request, splits: Mapping[str, Sequence[Path]]) -> Samples:
    """Open one split of a parquet data set. Labels are read, inputs are not.

    Raises:
        InputError: if a file cannot be read, or if columns, types or labels do not fit.
    """
    split = request.choose_split(list(splits))
    assert split is not None, "there is a split for each file"
    files = splits[split]
    shards = [_Shard(file) for file in files]
    columns = columns_of(shards[0].schema, request, files[0])
    for shard in shards[1:]:
        for name in filter(None, (columns.inputs, columns.labels)):
            if (
                name not in shard.schema.names
                or shard.schema.field(name).type != shards[0].schema.field(name).type
            ):
                raise InputError(f"{shard.file}: column {name!r} is not as in {files[0].name}")
    store = _ParquetStore(shards, columns.inputs)
    if not len(store):
        raise InputError(f"{request.path}, split {split!r}, has no rows")
    names = columns.names
    if columns.labels is not None and columns.textual:
        # over all splits, so that a class has the same number in each
        every = [_Shard(file).read(columns.labels) for others in splits.values() for file in others]
        names = names_of(label_values(every, request.path))
    where = str(files[0] if len(files) == 1 else f"{request.path}, split {split!r}")
    values = None
    if columns.labels is not None:
        values = label_values([shard.read(columns.labels) for shard in shards], where)
    labels = number_labels(values, where=where, names=names, classes=request.classes)
    provenance = Provenance(
        request.given, None, len(store), files=lambda: store.files(request.names(files)())
    )
    return StoredSamples(store, modality_of(columns.kind, store), labels, provenance)


class _Shard:
    """Is one parquet file, held by its footer alone."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._place = file.absolute()  # pyarrow takes a relative path with a colon for an address
        with reading(file, "parquet"), pq.ParquetFile(self._place) as opened:
            self.metadata = opened.metadata
            self.schema = opened.schema_arrow
            self.rows = [self.metadata.row_group(i).num_rows for i in range(self.metadata.num_row_groups)]
            if min(self.rows, default=0) < 0:
                raise InputError(f"{file} is damaged: a row group has a negative length")
            if len(set(self.schema.names)) < len(self.schema.names):
                raise InputError(f"{file} has several columns of one name")

    def read(self, column: str, group: int | None = None, part: str = "") -> pa.ChunkedArray:
        """Return one column, or a part of one, of one row group or of all."""
        groups = range(len(self.rows)) if group is None else [group]
        with reading(self.file, "parquet"), pq.ParquetFile(self._place, metadata=self.metadata) as opened:
            values = opened.read_row_groups(groups, columns=[column + part]).column(column)
        if len(values) != sum(self.rows[i] for i in groups):
            raise InputError(f"{self.file} is damaged: column {column!r} lacks rows")
        return values


class _ParquetStore:
    """Keep the row groups in use, the last used the longest."""

    def __init__(self, shards: Sequence[_Shard], column: str) -> None:
        self._column = column
        self._groups = [(shard, i) for shard in shards for i in range(len(shard.rows))]
        self._starts = np.cumsum([0, *(shard.rows[i] for shard, i in self._groups)])
        first = zip(self._groups, self._starts[:-1], strict=True)
        self._first = {shard.file: start for (shard, i), start in first if not i}
        self._kept: OrderedDict[int, pa.ChunkedArray] = OrderedDict()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def cells(self, rows: npt.NDArray[np.int64]) -> list[Any]:
        """Return what lies in some rows, which ascend; each row group is read at most once."""
        out: list[Any] = []
        groups = np.searchsorted(self._starts, rows, side="right") - 1
        for group in np.unique(groups):
            with reading(self._groups[group][0].file, "parquet"):
                out += pick(self._group(int(group)), (rows[groups == group] - self._starts[group]).tolist())
        return out

    def _group(self, group: int) -> pa.ChunkedArray:
        if group not in self._kept:
            shard, number = self._groups[group]
            self._kept[group] = shard.read(self._column, number)
            while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > CACHE_BYTES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(group)
        return self._kept[group]

    def _shard(self, row: int) -> _Shard:
        return self._groups[int(np.searchsorted(self._starts, row, side="right")) - 1][0]

    def load(self, cell: Any, row: int) -> bytes | str | None:
        """Return the file or the text that a cell holds."""
        return file_bytes(cell, (self._shard(row).file.parent,))

    def where(self, row: int) -> str:
        """Name a row for messages, counted from 0 in its file."""
        shard = self._shard(row)
        return f"{shard.file}, row {row - self._first[shard.file]}"

    def files(self, tables: Mapping[str, Path]) -> dict[str, Path]:
        """Return the tables and the files that cells name instead of holding their bytes."""
        found = dict(tables)
        for group, (shard, number) in enumerate(self._groups):
            type_ = shard.schema.field(self._column).type
            if not is_struct(type_) or type_.get_field_index("path") < 0:
                continue
            # two looks, the cheap one first; statistics would do, but pyarrow aborts where they are damaged
            paths = pc.struct_field(shard.read(self._column, number, ".path"), "path")
            if paths.null_count == len(paths) or not pc.struct_field(self._group(group), "bytes").null_count:
                continue
            for row, cell in enumerate(self._group(group).to_pylist(), int(self._starts[group])):
                if cell is not None and cell["bytes"] is None and cell["path"] is not None:
                    with reading(self.where(row), "a media file"):
                        found[cell["path"]] = inner_file(cell["path"], (shard.file.parent,))
        return found


@dataclass(frozen=True)
class _Writer:
    """How one modality is written: its Hugging Face feature, its type, what a sample becomes."""

    feature: dict[str, str]
    type: pa.DataType
    encode: Callable[[Any], Any]


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"text {text[:40]!r} is no valid Unicode and cannot be written") from error


_MEDIA = pa.struct({"bytes": pa.binary(), "path": pa.string()})
_WRITERS: dict[Modality, _Writer] = {
    "image": _Writer({"_type": "Image"}, _MEDIA, encode_image),
    "audio": _Writer({"_type": "Audio"}, _MEDIA, encode_audio),
    "text": _Writer({"dtype": "string", "_type": "Value"}, pa.string(), _utf8),
}


def write_parquet(samples: Samples, path: str | Path, *, split: str = "train") -> Path:
    """Write samples as `<path>/<split>.parquet` in the hub's layout, in their order, and return that file.

    Content is kept exactly (PNG, WAV, strings), and so are ids, as far as they are numbered in these samples:
    repeated content in a view of a set has the numbers of the set. The file appears when it is complete.

    Raises:
        InputError: if the folder has that split already, if there are no samples, or if one cannot be read.
    """
    folder = Path(path)
    if not len(samples):
        raise InputError(f"there are no samples to write to {folder}")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; a folder is needed to write {split}.parquet")
    if folder.is_dir() and split in find_parquet(folder):
        raise InputError(f"{folder} already has a split {split!r}; choose another folder or remove it")
    writer = _WRITERS[samples.modality]
    features: dict[str, Any] = {samples.modality: writer.feature}
    fields = [pa.field(samples.modality, writer.type)]
    if samples.labels is not None:
        features["label"] = {"names": list(samples.classes), "_type": "ClassLabel"}
        fields.append(pa.field("label", pa.int64()))
    schema = pa.schema(fields, {"huggingface": json.dumps({"info": {"features": features}})})
    target, partial = folder / f"{split}.parquet", folder / f".{split}.parquet.partial"
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(
            partial.absolute(), schema, compression="zstd", use_dictionary=["label"]
        ) as out:
            for cells, start in _row_groups(samples, writer.encode):
                if pa.types.is_struct(writer.type):
                    cells = [{"bytes": cell} for cell in cells]
                columns = [pa.array(cells, writer.type)]
                if samples.labels is not None:
                    columns.append(pa.array(samples.labels[start : start + len(cells)]))
                out.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
        partial.replace(target)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
            if new:
                folder.rmdir()
        if isinstance(error, OSError):
            raise InputError(f"{target} cannot be written ({reason(error)})") from error
        raise
    return target


def _row_groups(samples: Samples, encode: Callable[[Any], Any]) -> Iterator[tuple[list[Any], int]]:
    """Yield encoded samples by the row group, each with the position of its first."""
    cells: list[Any] = []
    start = size = 0
    for first in range(0, len(samples), READ_ROWS):
        more = [encode(raw) for raw in samples.raw(range(first, min(first + READ_ROWS, len(samples))))]
        cells += more
        size += sum(map(len, more))
        if size >= GROUP_BYTES or len(cells) >= GROUP_ROWS:
            yield cells, start
            start, size, cells = start + len(cells), 0, []
    if cells:
        yield cells, start
