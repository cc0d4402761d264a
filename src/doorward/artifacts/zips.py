"""Zip archives, of which two readers may see different members.

A zip archive has its directory at the end, and nothing makes the directory name all members, name each one
once, or be the only one. Python counts from the end of the file, torch from its beginning; some readers go
from member to member. What they would see differently is told, and what no directory names is read too.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO

from doorward.artifacts.examination import Budget
from doorward.artifacts.unpacking import inflate
from doorward.core.errors import CouldNotTell

HEAD = b"PK\x03\x04"
_END, _END_64, _LOCATOR_64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_LOCAL = struct.Struct("<4s5H3I2H")
_END_RECORD = struct.Struct("<4s4H2IH")
_UNKNOWN_16, _UNKNOWN_32 = 0xFFFF, 0xFFFFFFFF
_CHUNK = 1 << 20
#: Bytes read of a member that does not say its length.
_UNSTATED = 64 << 20


class _Local:
    """The header in front of a member."""

    def __init__(self, stream: IO[bytes], offset: int) -> None:
        stream.seek(offset)
        fields = stream.read(_LOCAL.size)
        if len(fields) < _LOCAL.size or fields[:4] != HEAD:
            raise zipfile.BadZipFile("a member has no header")
        (_, _, self.flags, self.method, _, _, _, self.packed, self.size, n_name, n_extra) = _LOCAL.unpack(
            fields
        )
        self.name = stream.read(n_name)
        self.data = offset + _LOCAL.size + n_name + n_extra


def disagreement(stream: IO[bytes], archive: zipfile.ZipFile, *, behind: bool = False) -> str | None:
    """Return in what readers of an archive could differ about its members, None if in nothing.

    Args:
        behind: whether it may stand behind other data.
    """
    size = stream.seek(0, io.SEEK_END)
    return _other_directory(stream, archive, size) or _members_apart(stream, archive, behind)


def _other_directory(stream: IO[bytes], archive: zipfile.ZipFile, size: int) -> str | None:
    start = archive.start_dir
    stream.seek(start)
    tail = stream.read(size - start)
    if tail.count(_END) != 1:
        return "it has two central directories"
    at = tail.index(_END)
    if len(tail) - at < _END_RECORD.size:
        return "its central directory ends early"
    _, _, _, _, entries, length, offset, _ = _END_RECORD.unpack_from(tail, at)
    locator = at - 20
    if locator >= 0 and tail[locator : locator + 4] == _LOCATOR_64:
        record = int.from_bytes(tail[locator + 8 : locator + 16], "little") - start
        if record != locator - 56 or tail[record : record + 4] != _END_64:
            return "it has two central directories"
        whole = struct.unpack_from("<3Q", tail, record + 32)
        for plain, wide, unknown in zip(
            (entries, length, offset), whole, (_UNKNOWN_16, _UNKNOWN_32, _UNKNOWN_32), strict=True
        ):
            if plain not in (unknown, wide):
                return "its two records of the central directory differ"
        entries, length, offset = whole
        at = record
    if offset != start:
        return "data stand in front of it, or it has two central directories"
    if length != at:
        return "there are data between its central directory and its end"
    if entries != len(archive.filelist):
        return "its directory has another number of members than it says"
    return None


def _members_apart(stream: IO[bytes], archive: zipfile.ZipFile, behind: bool) -> str | None:
    """Return whether members overlap, leave gaps, or are described differently in front of their data."""
    place = min((info.header_offset for info in archive.filelist), default=0) if behind else 0
    for info in sorted(archive.filelist, key=lambda one: one.header_offset):
        try:
            local = _Local(stream, info.header_offset)
        except zipfile.BadZipFile as error:
            return f"{info.filename}: {error}"
        name = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437", "replace")
        if (local.name, local.method) != (name, info.compress_type) or (local.flags ^ info.flag_bits) & 1:
            return f"{info.filename}: its header and the directory differ"
        unstated = {_UNKNOWN_32, 0} if local.flags & 8 else {_UNKNOWN_32}
        if not {local.packed} <= {info.compress_size, *unstated} or not {local.size} <= {
            info.file_size,
            *unstated,
        }:
            return f"{info.filename}: its header and the directory differ"
        if not _padding(stream, place, info.header_offset):
            return "it holds data that its directory does not name"
        place = local.data + info.compress_size
        if local.flags & 8:
            place += _descriptor(stream, place)
    return (
        None
        if _padding(stream, place, archive.start_dir)
        else "it holds data that its directory does not name"
    )


def _padding(stream: IO[bytes], start: int, end: int) -> bool:
    """Return whether there is nothing, or zeros alone, between two places."""
    if end < start or end - start > _CHUNK:
        return False
    stream.seek(start)
    return not stream.read(end - start).strip(b"\0")


def _descriptor(stream: IO[bytes], place: int) -> int:
    """Return the length of the record of sizes that may follow a member's data."""
    stream.seek(place)
    following = stream.read(28)
    ends = (16, 24) if following.startswith(b"PK\x07\x08") else (12, 20)
    for length in ends:
        if following[length : length + 2] == b"PK":
            return length
    return ends[0]


def hidden_members(stream: IO[bytes], archive: zipfile.ZipFile) -> Iterator[tuple[str, int]]:
    """Yield name and place of each member that the directory which Python reads does not name."""
    known = {info.header_offset for info in archive.filelist}
    for offset in _places(stream, HEAD):
        if offset in known:
            continue
        try:
            local = _Local(stream, offset)
        except zipfile.BadZipFile:
            continue
        if local.method in (0, 8) and local.name:
            yield local.name.decode("utf-8", "surrogateescape"), offset


def _places(stream: IO[bytes], pattern: bytes) -> Iterator[int]:
    """Yield where a pattern stands in a stream."""
    position, window = 0, b""
    while True:
        stream.seek(position + len(window))
        block = stream.read(_CHUNK)
        if not block:
            return
        window += block
        at = window.find(pattern)
        while at >= 0:
            yield position + at
            at = window.find(pattern, at + 1)
        keep = len(pattern) - 1
        position, window = position + len(window) - keep, window[-keep:]


def raw_member(stream: IO[bytes], offset: int, packed: int | None, limit: int, budget: Budget) -> bytes:
    """Return a member's content by the header in front of it, whatever its checksum and the directory say.

    Args:
        packed: its length as the directory has it; by its header if None.

    Raises:
        CouldNotTell: if it is too large, or packed in a way that is not read here.
    """
    local = _Local(stream, offset)
    length = packed or (local.packed if local.packed != _UNKNOWN_32 else 0)
    if length > limit:
        raise CouldNotTell(f"holds more than {limit >> 20} MiB")
    stream.seek(local.data)
    if local.method not in (0, 8):
        raise CouldNotTell(f"is packed in a way that is not read here (method {local.method})")
    raw = stream.read(length or min(limit, _UNSTATED))
    budget.spend(n_bytes=len(raw))
    if local.method == 8:
        return inflate(raw, limit, budget).data
    if not length:
        raw = raw[: raw.find(b"PK\x07\x08")] if b"PK\x07\x08" in raw else raw
    return raw


#: What Python's reader of zip archives raises on damaged ones.
FAULTS = (zipfile.BadZipFile, zlib.error, struct.error)
