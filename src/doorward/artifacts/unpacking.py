"""Compressed files as Python's libraries and joblib would read them, also where they are damaged.

A reader that unpacks as it goes hands on what stands before the damage, and a pickle runs up to there. So
what was unpacked is returned together with what stopped it, and checksums are not checked at all.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from doorward.artifacts.examination import Budget
from doorward.core.errors import CouldNotTell

#: Bytes asked for at once; what a damaged piece would have given is lost, so it is small.
_STEP = 1 << 12
#: Bytes given to bz2 and lzma at once.
_FEED = 1 << 16
_ZFILE_LENGTHS = (21, 22)
#: Bytes of memory that unpacking LZMA data may ask for.
_MEMORY = 2 << 30
_EARLY = "the compressed data end early"


@dataclass
class Unpacked:
    """What was unpacked.

    Attributes:
        data: the content, up to where it is damaged.
        error: what stopped the unpacking, or None.
    """

    data: bytes
    error: str | None = None

    @property
    def damaged(self) -> bool:
        """Return whether more of the packed data would not help."""
        return self.error is not None and self.error != _EARLY


class _Room:
    """Collect output up to a limit."""

    def __init__(self, limit: int, budget: Budget) -> None:
        self.data, self._limit, self._budget = bytearray(), limit, budget

    def add(self, piece: bytes) -> None:
        """Take a piece.

        Raises:
            CouldNotTell: if there is no room for it.
        """
        self._budget.spend(n_bytes=len(piece))
        self.data += piece
        if len(self.data) > self._limit:
            raise CouldNotTell(f"unpacks to more than {self._limit >> 20} MiB")


def compression(head: bytes, suffix: str) -> str | None:
    """Return how a file is compressed, by its first bytes (and for lzma without a header its suffix).

    >>> compression(b"BZh9", ".bin"), compression(b"x\\x9c", ".dat"), compression(b"xyz", ".bz2")
    ('bzip2', 'zlib', None)
    """
    if head.startswith(b"\x1f\x8b\x08"):
        return "gzip"
    if head.startswith(b"BZh"):
        return "bzip2"
    if head.startswith(b"\xfd7zXZ\x00"):
        return "xz"
    if head.startswith(b"\x5d\x00") or (suffix in (".lzma", ".xz") and head[:1] < b"\xe1"):
        return "lzma"
    if head.startswith(b"ZF0x"):
        return "zfile"
    if len(head) > 1 and head[0] & 0x8F == 8 and head[1] & 0x20 == 0 and (head[0] << 8 | head[1]) % 31 == 0:
        return "zlib"  # RFC 1950, without a dictionary
    return None


def unpack(kind: str, raw: bytes, limit: int, budget: Budget) -> Unpacked:
    """Unpack a whole compressed file in memory, with all of its parts.

    Args:
        kind: what `compression` says.
        limit: most bytes of content.

    Raises:
        CouldNotTell: if the content is larger than the limit or the budget.
    """
    room = _Room(limit, budget)
    error: str | None = None
    if kind == "gzip":
        error = _gunzip(raw, room)
    elif kind == "zlib":
        error, _ = _inflate(raw, 2, room)
    elif kind == "zfile":
        start = next((at for at in _ZFILE_LENGTHS if raw[at : at + 1] == b"\x78"), None)
        if start is not None:
            error, _ = _inflate(raw, start + 2, room)
    else:
        error = _parts(raw, bz2.BZ2Decompressor if kind == "bzip2" else _lzma, room)
    return Unpacked(bytes(room.data), error)


def inflate(raw: bytes, limit: int, budget: Budget) -> Unpacked:
    """Unpack bare deflated data, as a member of a zip archive holds it.

    Raises:
        CouldNotTell: if the content is larger than the limit or the budget.
    """
    room = _Room(limit, budget)
    error, _ = _inflate(raw, 0, room)
    return Unpacked(bytes(room.data), error)


def _lzma() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(memlimit=_MEMORY)


def _inflate(raw: bytes, at: int, room: _Room) -> tuple[str | None, int]:
    """Unpack deflated data without header or checksum; return what stopped it, and where they end."""
    worker = zlib.decompressobj(-15)
    while not worker.eof:
        if at >= len(raw):
            return _EARLY, at
        before, piece = worker.copy(), raw[at : at + _STEP]
        at += len(piece)
        try:
            while not worker.eof:
                given = worker.decompress(piece, _STEP)
                room.add(given)
                piece = worker.unconsumed_tail
                if not piece and len(given) < _STEP:
                    break
                before = worker.copy()
        except zlib.error as error:
            _one_by_one(before, piece, room)
            return f"the compressed data are damaged ({error})", at
    return None, at - len(worker.unused_data)


def _one_by_one(worker: Any, piece: bytes, room: _Room) -> None:
    """Take out what a damaged piece gives before the damage."""
    try:
        for i in range(len(piece)):
            room.add(worker.decompress(piece[i : i + 1]))
    except zlib.error:
        return


def _gunzip(raw: bytes, room: _Room) -> str | None:
    at = 0
    while raw.startswith(b"\x1f\x8b\x08", at):
        start = _gzip_header(raw, at)
        if start is None:
            return _EARLY
        error, at = _inflate(raw, start, room)
        if error:
            return error
        at = _behind_zeros(raw, at + 8)
    return None


def _gzip_header(raw: bytes, at: int) -> int | None:
    """Return where the compressed data begin behind a header (RFC 1952)."""
    if len(raw) < at + 10:
        return None
    flags, at = raw[at + 3], at + 10
    if flags & 4:
        at += 2 + int.from_bytes(raw[at : at + 2], "little")
    for flag in (8, 16):  # a name, a comment
        if flags & flag:
            end = raw.find(b"\0", at)
            if end < 0:
                return None
            at = end + 1
    return at + (2 if flags & 2 else 0)


def _behind_zeros(raw: bytes, at: int) -> int:
    """Return the place of the first byte that is not zero."""
    while at < len(raw) and not raw[at]:
        block = raw[at : at + _STEP]
        at += len(block) - len(block.lstrip(b"\0"))
    return at


def _parts(raw: bytes, make: Callable[[], Any], room: _Room) -> str | None:
    """Unpack one compressed stream after another; what follows the last one is left out, as readers do."""
    at, complete = 0, False
    while at < len(raw):
        worker, before = make(), len(room.data)
        try:
            while not worker.eof:
                piece = raw[at : at + _FEED] if worker.needs_input else b""
                if worker.needs_input and not piece:
                    return None if complete and len(room.data) == before else _EARLY
                at += len(piece)
                room.add(worker.decompress(piece, _STEP))
        except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
            if "emory" in str(error):
                raise CouldNotTell(f"unpacking it takes more than {_MEMORY >> 20} MiB of memory") from error
            trailing = complete and len(room.data) == before
            return None if trailing else f"the compressed data are damaged ({error})"
        at, complete = _behind_zeros(raw, at - len(worker.unused_data)), True
    return None
