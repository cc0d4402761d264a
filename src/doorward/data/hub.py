"""Data sets of the Hugging Face hub, and those that its `datasets` library has saved to disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from doorward.core.errors import InputError, MissingExtra
from doorward.core.paths import neighbours
from doorward.data.columns import columns_of, file_bytes, label_values
from doorward.data.labels import names_of, number_labels
from doorward.data.request import Request, reading, reason
from doorward.data.samples import Provenance, Samples
from doorward.data.stored import StoredSamples, modality_of


def open_hub(request: Request) -> Samples:
    """Open a data set of the hub by its name; its files are fetched once and kept by the `datasets` library.

    Nothing of it is executed: data sets that come as scripts are refused. The sha256 is over the Arrow files
    in the library's cache.

    Raises:
        MissingExtra: if the library is not installed.
        InputError: if there is no such data set, if it cannot be fetched, or if its columns do not fit.
    """
    name = str(request.path)
    try:
        import datasets
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        purpose = (
            f"there is no file or folder {name!r}; reading a data set of that name from the Hugging Face hub"
        )
        raise MissingExtra("datasets", "hf", purpose) from error
    try:
        if not constants.HF_HUB_OFFLINE:
            HfApi().dataset_info(name, timeout=10)  # tells at once what load_dataset tells after many retries
        # versions before 4 would ask whether to run a script
        splits = datasets.load_dataset(name, trust_remote_code=False)
    except Exception as error:
        message = (
            f"there is no file or folder {name!r}, and the Hugging Face hub gives no data set of that name "
            f"({reason(error)})"
        )
        if not isinstance(error, HfHubHTTPError):
            message += "; offline, HF_HUB_OFFLINE=1 reads what is in its cache"
        raise InputError(message + neighbours(name)) from error
    roots = (Path(datasets.config.HF_DATASETS_CACHE), Path(constants.HF_HUB_CACHE))
    return _samples(request, splits, name, roots)


def is_saved(folder: Path) -> bool:
    """Return whether a folder was written by `save_to_disk` of the `datasets` library."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def open_saved(request: Request) -> Samples:
    """Open a folder that `save_to_disk` of the `datasets` library wrote. Nothing of it is executed.

    Raises:
        MissingExtra: if the library is not installed.
        InputError: if it cannot be read, or if its columns do not fit.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("datasets", "hf", f"reading {request.path}, which save_to_disk wrote,") from error
    with reading(request.path, "a folder of save_to_disk"):
        saved = datasets.load_from_disk(str(request.path))
    splits = saved if isinstance(saved, dict) else {"train": saved}
    return _samples(request, splits, str(request.path), (request.path,))


def samples_of(splits: Mapping[str, Any]) -> Samples:
    """Make samples of a data set of the library that is in memory, or of one of its splits.

    Raises:
        InputError: if its columns do not fit.
    """
    request = Request("<memory>", Path("<memory>"), None, None, None, None, ("test", "validation", "train"))
    roots = [Path(file["filename"]).parent for one in splits.values() for file in one.cache_files]
    return _samples(request, splits, "<memory>", roots)


def _samples(request: Request, splits: Mapping[str, Any], name: str, roots: Sequence[Path]) -> Samples:
    """Make samples of one split of a data set of the library.

    Raises:
        InputError: if there is no such split, or its columns do not fit.
    """
    split = request.choose_split(list(splits))
    assert split is not None, "a data set has a split"
    data = splits[split]
    if not len(data):
        raise InputError(f"{request.given}, split {split!r}, has no rows")
    columns = columns_of(data.features.arrow_schema, request, name)
    store = _HubStore(data, columns.inputs, f"{name}, split {split!r}", roots)
    names, values = columns.names, None
    if columns.labels is not None:
        values = label_values([_column(data, columns.labels)], name)
        if columns.textual:
            names = names_of(
                label_values([_column(other, columns.labels) for other in splits.values()], name)
            )
    labels = number_labels(values, where=name, names=names, classes=request.classes)
    files = [Path(file["filename"]) for file in data.cache_files]
    provenance = Provenance(
        request.given,
        None,
        len(data),
        files=(lambda: {file.name: file for file in files}) if files else None,
    )
    return StoredSamples(store, modality_of(columns.kind, store), labels, provenance)


def _column(data: Any, name: str) -> pa.ChunkedArray:
    with reading(name, "a column"):
        return data.select_columns([name]).with_format("arrow")[:].column(name)


class _HubStore:
    """Is one column of a data set that the `datasets` library maps from the disk."""

    def __init__(self, data: Any, column: str, name: str, roots: Sequence[Path]) -> None:
        self._data = data.select_columns([column]).with_format("arrow")
        self._column, self._name, self._roots = column, name, roots

    def __len__(self) -> int:
        return len(self._data)

    def cells(self, rows: npt.NDArray[np.int64]) -> list[Any]:
        """Return what lies in some rows."""
        with reading(self._name, "a data set"):
            cells: list[Any] = self._data[rows.tolist()].column(self._column).to_pylist()
        return cells

    def load(self, cell: Any, row: int) -> bytes | str | None:
        """Return the file or the text that a cell holds."""
        return file_bytes(cell, self._roots)

    def where(self, row: int) -> str:
        """Name a row for messages."""
        return f"{self._name}, row {row}"
