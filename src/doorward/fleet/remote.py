"""Models in object storage: what is stored at an address, and a copy of it for as long as it is scanned."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple
from urllib.parse import urlsplit

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from doorward.artifacts.onnx_files import external_names
from doorward.core.errors import DoorwardError, InputError, MissingExtra
from doorward.fleet.registry import SCHEME, RegistryFiles
from doorward.models.formats.loading import SUFFIXES

#: Files that make a folder a model as a whole.
WHOLE = frozenset({"config.json", "doorward.json"})
#: What a storage says of an object that changes whenever its content does, by the names that fsspec's file
#: systems have for it.
_SAYS = (
    *("ETag", "etag", "md5Hash", "crc32c", "checksum", "sha256", "blob_id", "generation", "source"),
    *("LastModified", "last_modified", "updated", "modified", "mtime", "created"),
)
_PREFIX = "doorward-fleet-"
#: Seconds before the folder of a process that is gone is removed.
_STALE = 60.0
_EXTRAS = {"s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3"), "models": ("mlflow-skinny", "mlflow")}


def is_address(text: str) -> bool:
    """Return whether a text is the address of an object, and not a path on this machine."""
    return "://" in text or text.startswith(SCHEME)


def join(folder: str, name: str) -> str:
    """Return the address of what is in a folder."""
    return f"{folder}{name}" if not folder or folder.endswith("/") else f"{folder}/{name}"


def folder_of(path: str) -> str:
    """Return the folder that an object, or a file of this machine, is in."""
    head, slash, _ = path.rpartition("/")
    return head + slash if head in ("", head.partition(":")[0] + ":/") else head


@dataclass(frozen=True)
class Listing:
    """The objects that make up a model, as the storage lists them.

    Attributes:
        url: of the model.
        objects: what fsspec says of each, by its name relative to the model, or by its own if it is one file.
        whole: whether the model is a folder.
    """

    url: str
    objects: Mapping[str, Mapping[str, Any]]
    whole: bool

    @property
    def stamp(self) -> str | None:
        """Return a hash that changes whenever the model does; None if the storage says too little for one."""
        return _stamp(self.url, self.objects)

    @property
    def size(self) -> int:
        """Return how many bytes the objects have.

        Raises:
            InputError: if the storage does not say so.
        """
        sizes = [one.get("size") for one in self.objects.values()]
        if None in sizes:
            raise InputError(f"{self.url}: the storage does not say how large it is")
        return sum(map(int, filter(None, sizes)))


class Copy(NamedTuple):
    """A model that was copied to this machine.

    Attributes:
        path: of the copy.
        stamp: of its listing.
        beyond: further files that an ONNX model names, relative to its folder.
        beyond_stamp: of their listing.
    """

    path: Path
    stamp: str | None
    beyond: tuple[str, ...]
    beyond_stamp: str | None


def models_at(url: str) -> Iterator[Listing]:
    """Yield the models at an address: files by their endings, and folders that are a model as a whole.

    Raises:
        InputError: if there is nothing, or it cannot be read.
    """
    with _told(url):
        files, path = _opened(url)
        info = files.info(path)
        if info["type"] == "file":
            yield _of_file(url, info)
        else:
            yield from _below(files, path, url)


def _below(files: AbstractFileSystem, folder: str, url: str) -> Iterator[Listing]:
    entries = {_name(one["name"]): one for one in files.ls(folder, detail=True)}
    if WHOLE & {name for name, one in entries.items() if one["type"] == "file"}:
        yield _of_folder(files, folder, url)
        return
    for name, one in sorted(entries.items()):
        if not name or name.startswith(".") or one["name"].strip("/") == folder.strip("/"):
            continue
        if one["type"] == "directory":
            yield from _below(files, one["name"], join(url, name))
        elif PurePosixPath(name).suffix.lower() in SUFFIXES:
            yield _of_file(join(url, name), one)


def _of_file(url: str, info: Mapping[str, Any]) -> Listing:
    return Listing(url, {_name(info["name"]): info}, whole=False)


def _of_folder(files: AbstractFileSystem, folder: str, url: str) -> Listing:
    objects = {}
    for path, info in files.find(folder, detail=True).items():
        name = path.strip("/").removeprefix(folder.strip("/")).strip("/")
        if name and not path.endswith("/"):  # what ends so only marks a folder
            objects[name] = info
    return Listing(url, objects, whole=True)


def _name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def list_model(url: str) -> Listing:
    """Return the objects of the one model at an address.

    Raises:
        InputError: if there is nothing, or it cannot be read.
    """
    with _told(url):
        files, path = _opened(url)
        info = files.info(path)
        return _of_file(url, info) if info["type"] == "file" else _of_folder(files, path, url)


def further(url: str, names: Iterable[str]) -> Listing:
    """Return those of the further files of a model that are there, by their names relative to its folder.

    Raises:
        InputError: if the storage cannot be read.
    """
    found = {}
    with _told(url):
        files, path = _opened(url)
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found[name] = files.info(join(folder_of(path), name))
    return Listing(url, found, whole=False)


def _stamp(url: str, objects: Mapping[str, Mapping[str, Any]]) -> str | None:
    said = []
    for name, info in sorted(objects.items()):
        values = {key: _plain(info[key]) for key in _SAYS if info.get(key)}
        if not values:
            return None
        said.append([name, info.get("size"), values])
    return hashlib.sha256(json.dumps([url, said], sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> str:
    """Return a value as a text; times alike, which some file systems write in two ways."""
    with contextlib.suppress(ValueError):
        value = datetime.fromisoformat(value) if isinstance(value, str) else value
    return str(value.timestamp() if isinstance(value, datetime) else value)


@contextlib.contextmanager
def fetched(url: str, most: int) -> Iterator[Copy]:
    """Copy a model to this machine, for the block alone.

    Args:
        most: bytes that the copy may have.

    Raises:
        InputError: if it is larger, cannot be read, or changes meanwhile.
    """
    with _temporary_folder() as folder:
        listing = list_model(url)
        target = folder / (_name(url) or "model")
        left = _fetch(listing, target if listing.whole else folder, most)
        named = external_names(target) if target.is_file() and target.suffix.lower() == ".onnx" else []
        more = further(url, named)
        _fetch(more, folder, left)
        if list_model(url).stamp != listing.stamp:
            raise InputError(f"{url} changed while it was fetched")
        yield Copy(target, listing.stamp, tuple(named), more.stamp)


def _fetch(listing: Listing, folder: Path, most: int) -> int:
    """Copy objects into a folder; return how many bytes more may be taken."""
    if listing.size > most:
        raise InputError(
            f"{listing.url}: it takes {listing.size / (1 << 30):.1f} GiB on disk, and a model may take "
            f"{most / (1 << 30):.1f}; see --disk"
        )
    sources, targets = [], []
    for name, info in listing.objects.items():
        if ".." in PurePosixPath(name).parts or name.startswith("/") or "\0" in name:
            raise InputError(f"{listing.url}: the object {name!r} would leave the model's folder")
        sources.append(info["name"])
        targets.append(folder / name)
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
    with _told(listing.url):
        _opened(listing.url)[0].get(sources, list(map(str, targets)))
    for target, info in zip(targets, listing.objects.values(), strict=True):
        if not target.is_file() or target.stat().st_size != info["size"]:
            raise InputError(f"{listing.url}: {target.name} did not arrive as a whole")
    return most - listing.size


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    """Make a folder that is there for the block alone; remove those whose process was killed."""
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if left.stat().st_uid == os.getuid() and left.stat().st_mtime < time.time() - _STALE:
                with _locked(left):
                    shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True) as name, _locked(Path(name)):
        yield Path(name)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, which ends with the process at the latest.

    Raises:
        OSError: if another process holds it.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def opened(url: str) -> Iterator[IO[bytes]]:
    """Open an object to be read.

    Raises:
        InputError: if there is none, or it cannot be read.
    """
    with _told(url):
        files, path = _opened(url)
        stream = files.open(path, "rb")
    with stream:
        yield stream


class Folder:
    """A folder for results, on this machine or at an address.

    Args:
        where: its path or address.

    Raises:
        InputError: if it cannot be reached.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        with self._told():
            if is_address(where):
                self._files, self._path = _opened(where)
                top = self._path.split("/")[0]
                if top and not self._files.exists(top):  # else makedirs would make the bucket
                    raise InputError(f"{where}: there is no {top!r}")
            else:
                self._files, self._path = LocalFileSystem(), os.path.abspath(where)

    def names(self, below: str) -> set[str]:
        """Return the names of the files in a folder below this one, which is made if there is none."""
        with self._told():
            folder = join(self._path, below)
            self._files.makedirs(folder, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # object storage has no empty folders
                return {_name(name) for name in self._files.ls(folder, detail=False)}
        return set()

    def write(self, name: str, text: str) -> None:
        """Write a file below this folder."""
        with self._told():
            self._files.pipe_file(join(self._path, name), text.encode("utf-8"))

    def _told(self) -> contextlib.AbstractContextManager[None]:
        return _told(self.where, "written")


def _opened(url: str) -> tuple[AbstractFileSystem, str]:
    """Return the file system of an address, and the path in it."""
    if url.startswith(SCHEME):
        return RegistryFiles(), url.removeprefix(SCHEME).strip("/")
    if "::" in url:
        raise InputError(f"{url}: addresses within addresses are not read")
    if urlsplit(url).password is not None:
        raise InputError(
            f"{url.split('://')[0]}://...: addresses are kept in the store and in reports: give the password "
            "by the environment or the configuration of fsspec"
        )
    files, path = url_to_fs(url, use_listings_cache=False)
    return files, path.rstrip("/") or path


@contextlib.contextmanager
def _told(url: str, done: str = "read") -> Iterator[None]:
    """Turn what a file system raises into one line; each has exceptions of its own."""
    try:
        yield
    except DoorwardError:
        raise
    except ImportError as error:
        protocol = url.split(":")[0]
        if protocol in _EXTRAS:
            raise MissingExtra(*_EXTRAS[protocol], url) from None
        raise InputError(f"{url}: {_first_line(error)}") from error
    except FileNotFoundError as error:
        said = _first_line(error)
        why = f" ({said})" if "bucket" in said.lower() else ""
        raise InputError(f"{url}: there is nothing{why}") from error
    except PermissionError as error:
        raise InputError(f"{url}: access is denied ({_first_line(error)}); check the credentials") from error
    except Exception as error:
        if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
            raise InputError(f"{url}: there are no credentials ({_first_line(error)})") from error
        raise InputError(f"{url}: cannot be {done} ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
