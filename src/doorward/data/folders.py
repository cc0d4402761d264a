"""Folders of images or recordings, one sub-folder a class, with or without a folder a split above."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from doorward.core.errors import InputError
from doorward.data.labels import number_labels, sort_names
from doorward.data.request import SPLITS, Request, reading
from doorward.data.samples import Modality, Provenance, Samples
from doorward.data.stored import StoredSamples

_SUFFIXES: dict[str, Modality] = {
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"), "image"),
    **dict.fromkeys((".ppm", ".pgm", ".pbm", ".jp2"), "image"),
    **dict.fromkeys((".wav", ".flac", ".ogg", ".mp3"), "audio"),
}


def find_media(folder: Path) -> list[Path]:
    """Return the images and recordings below a folder, sorted by name, without hidden ones.

    Raises:
        OSError: if a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error  # os.walk alone would leave out what it may not read

    found = []
    for place, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        found += [Path(place, name) for name in files if not name.startswith(".")]
    return sorted(file for file in found if file.suffix.lower() in _SUFFIXES)


def open_folder(request: Request, media: Sequence[Path]) -> Samples:
    """Open a folder of media files: classes are its sub-folders; without any there are no labels.

    A first level of folders is taken for splits if all have names of splits, or if the split asked for is
    among them and has sub-folders. Class numbers follow the names over all splits.

    Raises:
        InputError: if images and recordings are mixed, or if some files lie outside the class folders.
    """
    parts = {file: file.relative_to(request.path).parts for file in media}
    first = {names[0] for names in parts.values() if len(names) > 1}
    deep = {names[0] for names in parts.values() if len(names) > 2}
    by_split = all(len(names) > 1 for names in parts.values()) and (first <= SPLITS or request.split in deep)
    split = request.choose_split(sorted(first) if by_split else ())
    skip = 1 if by_split else 0
    labelled = {file: names[skip] for file, names in parts.items() if len(names) > skip + 1}
    files = [file for file in media if not by_split or parts[file][0] == split]
    modalities = {_SUFFIXES[file.suffix.lower()] for file in files}
    if len(modalities) > 1:
        raise InputError(f"{request.path} mixes images and recordings; give a folder with one of them")
    loose = [file for file in files if file not in labelled]
    if loose and len(loose) < len(files):
        raise InputError(
            f"{len(loose)} of {len(files)} files lie outside the class folders, first {loose[0]}"
        )
    labels = number_labels(
        None if loose else [labelled[file] for file in files],
        where=str(request.path),
        names=sort_names(labelled.values()),
        classes=request.classes,
    )
    provenance = Provenance(request.given, None, len(files), files=request.names(files))
    return StoredSamples(_FileStore(files), modalities.pop(), labels, provenance)


class _FileStore:
    """Is a list of files."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def cells(self, rows: npt.NDArray[np.int64]) -> list[Any]:
        """Return the paths of some files."""
        return [self._files[row] for row in rows]

    def load(self, cell: Any, row: int) -> bytes:
        """Return the bytes of a file."""
        with reading(cell, "a file"):
            data: bytes = cell.read_bytes()
            return data

    def where(self, row: int) -> str:
        """Name a file for messages."""
        return str(self._files[row])
