"""What a scan is known by: the content of model and data, how it is scanned, and the code that does."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

from doorward._version import __version__
from doorward.artifacts.digest import artifact_digest
from doorward.fleet.sources import Place
from doorward.methods import registry
from doorward.methods.source import score_code
from doorward.models.formats.loading import locate
from doorward.scan.request import ScanRequest


class ScanKey(NamedTuple):
    """The key of a scan, and the digest of all that loading the model reaches."""

    key: str
    digest: str


def key_of(place: Place) -> ScanKey:
    """Return what the scan of a model on this machine is known by.

    Raises:
        InputError: if the model is not there.
        OSError: if it cannot be read.
    """
    digest = artifact_digest(locate(place.path)).sha256
    return ScanKey(key_for(digest, place.request), digest)


def key_for(digest: str, request: ScanRequest) -> str:
    """Return what the scan of a content is known by.

    Args:
        digest: of the content; of what is known of it before it is read.
    """
    asked = request.to_json() | {"model": None, "folder": None}
    for name in ("clean", "train", "weights"):
        given = getattr(request, name)
        if given is not None:
            asked[name] = _data_digest(str(given))
    said = json.dumps([digest, asked, _code(request.detectors), __version__], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


@cache
def _data_digest(path: str) -> str:
    """Return the digest of data, or the name of what lies elsewhere."""
    file, colon, split = path.rpartition(":")
    local = Path(file) if colon and not Path(path).exists() else Path(path)
    return f"{artifact_digest(local).sha256}{colon}{split}" if local.is_file() else f"{path} {_stamps(local)}"


def _stamps(folder: Path) -> str:
    """Return the hash of names, sizes and times of the files below a folder: to read all takes long."""
    listed = sorted(
        (str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns)
        for file in (folder.rglob("*") if folder.is_dir() else ())
        if file.is_file()
    )
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


@cache
def _code(detectors: tuple[str, ...]) -> dict[str, str]:
    """Return the code of the detectors that run."""
    names = detectors or tuple(registry.modules("detector"))
    return {name: score_code(registry.get("detector", name).__module__) for name in sorted(names)}
