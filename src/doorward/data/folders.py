"""Folders of images or recordings, one sub-folder a class, with or without a folder a split above."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from doorward.core.errors import InputError
from doorward.core.files import irregularity, is_inside, open_regular
from doorward.core.paths import refuse_unreadable_name
from doorward.data.labels import Labels, number_labels, sort_names
from doorward.data.metadata import METADATA, read_metadata
from doorward.data.request import SPLITS, Request, reading
from doorward.data.samples import Modality, Provenance, Samples
from doorward.data.stored import StoredSamples

_SUFFIXES: dict[str, Modality] = {
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"), "image"),
    **dict.fromkeys((".ppm", ".pgm", ".pbm", ".jp2"), "image"),
    **dict.fromkeys((".wav", ".flac", ".ogg", ".mp3"), "audio"),
}
#: What lies next to images and is none: a folder with such files alone is no class.
_DOCUMENTS = frozenset(
    ".csv .htm .html .ini .json .jsonl .log .md .pdf .py .toml .tsv .txt .xml .yaml .yml".split()  # noqa: SIM905
)
#: What file managers leave in folders.
_LEFT_BEHIND = frozenset({"thumbs.db", "desktop.ini"})
#: Folders of storage systems, which hold previews and what was deleted.
_SYSTEM = frozenset(
    {"@eadir", "#recycle", "#snapshot", "$recycle.bin", "lost+found", "system volume information"}
)


@dataclass(frozen=True)
class Media:
    """What lies below a folder, without what is hidden.

    Attributes:
        files: images and recordings, sorted by name.
        metadata: tables that say something of them.
        folders: every folder, and the names of the files in it that are neither.
        notes: links that were followed or not, and what was left out.
    """

    files: list[Path]
    metadata: list[Path]
    folders: dict[Path, list[str]]
    notes: list[str] = field(default_factory=list)


def find_media(folder: Path) -> Media:
    """Return the images and recordings below a folder.

    Symbolic links to folders are followed, but for those in a folder that is reached by one, and those to a
    folder that this one lies in.

    Raises:
        OSError: if a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error  # os.walk alone would leave out what it may not read

    found = Media([], [], {})
    followed: list[Path] = []
    dropped: list[str] = []
    for place, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        where = Path(place)
        inside_link = any(where.is_relative_to(link) for link in followed)
        folders[:] = [n for n in folders if not n.startswith((".", "__")) and n.lower() not in _SYSTEM]
        links = [name for name in folders if (where / name).is_symlink()]
        if inside_link:
            folders[:] = [name for name in folders if name not in links]
            dropped += [f"{where / name} (a link inside a linked folder)" for name in links]
        else:
            above = [name for name in links if is_inside(folder, where / name)]
            folders[:] = [name for name in folders if name not in above]
            dropped += [f"{where / name} (a link to a folder above)" for name in above]
            followed += [where / name for name in links if name not in above]
        found.folders[where] = []
        for name in files:
            file = where / name
            if name.startswith("."):
                continue
            if name.lower() in METADATA:
                found.metadata.append(file)
            elif file.suffix.lower() not in _SUFFIXES:
                found.folders[where].append(name)
            elif (kind := _irregular(file)) is not None:
                dropped.append(f"{file} ({kind})")
            else:
                found.files.append(file)
    found.files.sort()
    if followed:
        found.notes.append(
            f"{_counted(len(followed), 'folder')} followed as symbolic links, first {followed[0]}"
        )
    if dropped:
        found.notes.append(f"{_counted(len(dropped), 'entry', 'entries')} left out, first {dropped[0]}")
    return found


def _counted(count: int, one: str, many: str | None = None) -> str:
    return f"{count} {one} was" if count == 1 else f"{count} {many or one + 's'} were"


def _irregular(file: Path) -> str | None:
    """Return what a file is that cannot be read as one, None if it can."""
    try:
        mode = file.stat().st_mode
    except OSError:
        return "a broken link" if file.is_symlink() else None
    return None if stat.S_ISREG(mode) else irregularity(mode)


def open_folder(request: Request, media: Media) -> Samples:
    """Open a folder of media files: classes are its sub-folders; without any there are no labels.

    A first level of folders is taken for splits if all have names of splits, or if the split asked for is
    among them and has sub-folders. Class numbers follow the names over all splits; a class without images
    keeps its number. A metadata.csv or metadata.jsonl with labels, as the hub's image folders have it, goes
    before the folders.

    Raises:
        InputError: if images and recordings are mixed, or if some files lie outside the class folders.
    """
    parts = {file: file.relative_to(request.path).parts for file in media.files}
    first = {names[0] for names in parts.values() if len(names) > 1}
    deep = {names[0] for names in parts.values() if len(names) > 2}
    by_split = all(len(names) > 1 for names in parts.values()) and (first <= SPLITS or request.split in deep)
    split = request.choose_split(sorted(first) if by_split else ())
    skip = 1 if by_split else 0
    labelled = {file: names[skip] for file, names in parts.items() if len(names) > skip + 1}
    files = [file for file in media.files if not by_split or parts[file][0] == split]
    modalities = {_SUFFIXES[file.suffix.lower()] for file in files}
    if len(modalities) > 1:
        raise InputError(f"{request.path} mixes images and recordings; give a folder with one of them")
    notes = list(media.notes)
    table = read_metadata(request, media.metadata, files) if media.metadata else None
    notes += table.notes if table is not None else []
    if table is not None and table.labels is not None:
        if labelled:
            notes.append("labels are the table's, not the names of folders")
        labels = table.labels
    else:
        labels = _folder_labels(request, media, files, labelled, skip, notes)
    read = [*files, *(table.files if table is not None else [])]
    provenance = Provenance(
        request.given,
        None,
        len(files),
        files=request.names(read),
        notes=[f"{request.given}: {note}" for note in notes],
    )
    return StoredSamples(_FileStore(files), modalities.pop(), labels, provenance)


def _folder_labels(
    request: Request,
    media: Media,
    files: Sequence[Path],
    labelled: dict[Path, str],
    skip: int,
    notes: list[str],
) -> Labels:
    """Return labels by the names of folders, and add to the notes what is to be told of them.

    Args:
        labelled: the class of each file that lies in a class folder.
        skip: how many folders there are above those of the classes.
    """
    loose = [file for file in files if file not in labelled]
    if loose and len(loose) < len(files):
        raise InputError(
            f"{len(loose)} of {len(files)} files lie outside the class folders, first {loose[0]}"
        )
    if loose:
        return number_labels(None, where=str(request.path), classes=request.classes)
    named = set(labelled.values())
    for name in named:
        refuse_unreadable_name(name)
    empty = _empty_classes(request, media, named, skip, notes)
    return number_labels(
        [labelled[file] for file in files],
        where=str(request.path),
        names=sort_names(named | set(empty)),
        # a class without images need not be among those asked for
        classes=request.classes,
    )


def _empty_classes(request: Request, media: Media, named: set[str], skip: int, notes: list[str]) -> list[str]:
    """Return the names of class folders without images, and add to the notes what is taken for one or not."""
    others: dict[str, list[str]] = {}
    for place, names in media.folders.items():
        parts = place.relative_to(request.path).parts
        if len(parts) > skip and parts[skip] not in named:
            kept = [name for name in names if name.lower() not in _LEFT_BEHIND]
            others.setdefault(parts[skip], []).extend(kept)
    documents = sorted(
        name
        for name, files in others.items()
        if name in SPLITS or (files and all(Path(file).suffix.lower() in _DOCUMENTS for file in files))
    )
    empty = sorted(set(others) - set(documents))
    if empty:
        unread = [f"{name}/{others[name][0]}" for name in empty if others[name]]
        notes.append(
            f"no images in the class folder{'s' if len(empty) > 1 else ''} {', '.join(map(repr, empty[:5]))}"
            + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
            + (f" (files of other kinds, first {unread[0]})" if unread else "")
            + ": classes keep their numbers"
        )
    if documents:
        notes.append(f"not taken for classes: {', '.join(map(repr, documents[:5]))}, which hold no images")
    return empty


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
        with reading(cell, "a file"), open_regular(cell) as stream:
            return stream.read()

    def where(self, row: int) -> str:
        """Name a file for messages."""
        return str(self._files[row])
