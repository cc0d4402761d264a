"""The digest of a model's files, over every byte that loading can reach."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import NamedTuple

from doorward.artifacts.folders import walk
from doorward.artifacts.onnx_files import external_files
from doorward.artifacts.reach import Reach
from doorward.core.errors import InputError
from doorward.core.files import open_regular

#: Left out of the digest of a folder unless a configuration names them: words about the model, reports on
#: it, and git's own files.
_LEFT_OUT = re.compile(
    r"(.*/)?((README|LICEN[CS]E|NOTICE|CHANGELOG|CITATION)[^/]*|[^/]*\.md|\.gitattributes|\.gitignore"
    r"|report\.(json|html|sarif|txt)|plant\.json|training\.json|\.DS_Store)|(.*/)?(\.git|\.cache)/.*",
    re.IGNORECASE,
)
_MOST_FILES = 1_000_000


class Digest(NamedTuple):
    """The sha256 of an artifact, in hexadecimal, and its size in bytes."""

    sha256: str
    bytes: int


def artifact_digest(path: Path) -> Digest:
    """Return the digest and size of a model file or directory.

    A single file's is its plain sha256. That of a directory, or of an ONNX file with weights next to it, is
    the sha256 over the lines "sha256  relative name" of its files, by name: all of a directory's but texts
    about it, reports and git's own, and those too where loading the model opens them. What is not opened
    (a pipe, a link out of the directory) is no part of it.

    Raises:
        InputError: if there are too many files.
        OSError: if one cannot be read.
    """
    if path.is_dir():
        folder, files = path, _files(path)
    else:
        folder, files = path.parent, [path]
        if path.suffix.lower() == ".onnx":
            files += [folder / name for name in external_files(path)]
    total, lines = 0, []
    known: dict[str, tuple[str, int]] = {}
    for file in files:
        real = os.path.realpath(file)
        if real not in known:
            known[real] = _hash(file)
        digest, size = known[real]
        total += size
        lines.append(f"{digest}  {file.relative_to(folder).as_posix()}\n")
    if path.is_file() and len(files) == 1:
        return Digest(lines[0].split()[0], total)
    return Digest(hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest(), total)


def _files(path: Path) -> list[Path]:
    reach, found = Reach(path), []
    for entry in walk(path, _MOST_FILES):
        if entry.problem is None:
            left_out = _LEFT_OUT.fullmatch(entry.path.relative_to(path).as_posix())
            if reach.names(entry.path) or (not left_out and os.access(entry.path, os.R_OK)):
                found.append(entry.path)
        elif entry.is_limit:
            raise InputError(f"{path}: the folder has more than {_MOST_FILES:,} files; give the model's own")
    return sorted(found)


def _hash(file: Path) -> tuple[str, int]:
    with open_regular(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest(), stream.tell()
