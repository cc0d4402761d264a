"""Open files of unknown origin: regular files alone, and never in a way that waits."""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def irregularity(mode: int) -> str | None:
    """Return what a file is that is not a regular one, by its `st_mode`; None for a regular file.

    >>> irregularity(stat.S_IFIFO), irregularity(stat.S_IFREG)
    ('a pipe', None)
    """
    if stat.S_ISREG(mode):
        return None
    return next((name for test, name in _KINDS if test(mode)), "a special file")


def open_regular(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Open a regular file for reading, in binary.

    Opening a pipe waits for a writer, and reading a device may never end; both are refused before anything
    is read, also if the file changes between the look at it and the opening.

    Raises:
        OSError: if it cannot be opened, or is no regular file (`strerror` says what it is).
    """
    _refuse_irregular(os.stat(path).st_mode, path)
    flags = (
        os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
    )
    descriptor = os.open(path, flags)
    try:
        _refuse_irregular(os.fstat(descriptor).st_mode, path)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _refuse_irregular(mode: int, path: str | os.PathLike[str]) -> None:
    if kind := irregularity(mode):
        raise OSError(errno.EINVAL, f"it is {kind}, and a regular file is needed", os.fspath(path))


def is_inside(path: Path, root: Path) -> bool:
    """Return whether a path, with its links followed, lies in a folder or is that folder."""
    real, base = os.path.realpath(path), os.path.realpath(root)
    return real == base or real.startswith(base.rstrip(os.sep) + os.sep)
