"""The cache of trained models: by content, written whole or not at all, checked by hash when read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from doorward.core.errors import InputError

META, SUMS = "meta.json", "SHA256SUMS"


class ModelCache:
    """Keep model directories by key; what is broken or partial counts as absent and is removed.

    An entry is a Doorward directory with `plant.json` (of planted models), `meta.json`, and `SHA256SUMS` over
    all of them. It is made in a folder of its own and renamed when whole, so that other processes see all of
    it or nothing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def place(self, key: str) -> Path:
        """Return where an entry lies, or would."""
        return self.folder / "models" / key[:2] / key

    def get(self, key: str) -> Path | None:
        """Return a whole entry's directory; a damaged one is removed."""
        place = self.place(key)
        if not place.is_dir():
            return None
        if self._whole(place):
            return place
        self._discard(place)
        return None

    def put(self, key: str, write: Callable[[Path], dict[str, Any]]) -> Path:
        """Make an entry and return its directory.

        Args:
            write: writes the files into the given folder and returns what `meta.json` shall hold.

        Raises:
            InputError: if the cache cannot be written to.
        """
        place, making = self.place(key), self.folder / "making"
        try:
            for folder in (place.parent, making):
                folder.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=making))
        except OSError as error:
            raise InputError(f"the cache {self.folder} cannot be written to ({error.strerror})") from error
        try:
            meta = json.dumps(write(scratch), indent=2, sort_keys=True) + "\n"
            (scratch / META).write_text(meta, encoding="utf-8")
            (scratch / SUMS).write_text(_sums(scratch), encoding="ascii")
            try:
                scratch.rename(place)
            except OSError:
                if not place.is_dir():  # else another process was quicker, with the same content
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        if not self._whole(place):
            raise InputError(f"the cache entry {place} is not what was just written; is the disk sound?")
        return place

    def meta(self, key: str) -> dict[str, Any]:
        """Return what an entry that `get` or `put` has just found whole says of itself."""
        meta: dict[str, Any] = json.loads((self.place(key) / META).read_text(encoding="utf-8"))
        return meta

    def sweep(self) -> None:
        """Remove what processes that are gone have left half made."""
        for scratch in (self.folder / "making").glob("*-*"):
            if not _alive(int(scratch.name.split("-")[0])):
                shutil.rmtree(scratch, ignore_errors=True)

    def _whole(self, place: Path) -> bool:
        try:
            return (place / SUMS).read_text(encoding="ascii") == _sums(place)
        except (OSError, UnicodeDecodeError):
            return False

    def _discard(self, place: Path) -> None:
        """Move an entry out of the way before it is removed, so that nobody meets half of it."""
        making = self.folder / "making"
        making.mkdir(parents=True, exist_ok=True)
        away = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=making))
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            place.rename(away / "broken")
        shutil.rmtree(away, ignore_errors=True)


def _sums(place: Path) -> str:
    """Return the lines of `sha256sum` for every file of an entry."""
    files = sorted(file for file in place.iterdir() if file.name != SUMS)
    return "".join(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files)


def _alive(process: int) -> bool:
    """Return whether there is a process of that number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
