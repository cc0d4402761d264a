"""What a file really holds, by its first and last bytes, where its name promises something else."""

from __future__ import annotations

from pathlib import Path

from doorward.core.files import open_regular

#: The first line of what Git leaves in place of a large file.
_POINTER = b"version https://git-lfs.github.com/spec/"
#: First bytes of kinds of files that are taken for others.
_HEADS: dict[bytes, str] = {
    b"PAR1": "a parquet file",
    b"ARROW1": "an Arrow file",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file, as Keras writes it",
    b"\x89PNG\r\n\x1a\n": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"GGUF": "a GGUF file",
    b"\x93NUMPY": "a file of one numpy array",
    b"\x1f\x8b": "a gzip file: unpack it first",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it first",
    b"%PDF": "a PDF document",
}
_END_OF_ZIP, _ZIP_TAIL = b"PK\x05\x06", 65_557
#: Stand-ins are no larger than this.
_SMALL = 4096


def stand_in(path: Path) -> str | None:
    """Return what lies in place of a file that was never fetched whole, None if nothing says so.

    Args:
        path: a regular file.
    """
    try:
        with open_regular(path) as stream:
            head = stream.read(_SMALL)
    except OSError:
        return None
    if not head:
        return "it is empty"
    if head.startswith(_POINTER):
        return (
            "it is a pointer of Git LFS, which stands for a file that was not fetched: "
            "run `git lfs pull` in its folder, or download the file itself"
        )
    text = head.lstrip()[:15].lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "it is a web page, such as a download leaves that failed or asked for a login"
    return None


def weights_kind(path: Path) -> str | None:
    """Return "safetensors" or "torch" by a file's first bytes, None if it begins as neither."""
    with open_regular(path) as stream:
        head = stream.read(9)
    if head[8:9] == b"{" and 0 < int.from_bytes(head[:8], "little") < 1 << 40:
        return "safetensors"
    starts = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    return "torch" if head.startswith(starts) else None


def cut_off(path: Path) -> str | None:
    """Return how much of a zip or safetensors file is missing at its end, None if nothing says so."""
    with open_regular(path) as stream:
        head = stream.read(8)
        size = stream.seek(0, 2)
        if head.startswith(b"PK\x03\x04"):
            stream.seek(max(0, size - _ZIP_TAIL))
            whole = _END_OF_ZIP in stream.read(_ZIP_TAIL)
            return None if whole else "it is cut off: its archive has no end. Fetch it again"
    if weights_kind(path) == "safetensors" and (wanted := _safetensors_size(path)) and size < wanted:
        return f"it is cut off: {size:,} of {wanted:,} bytes are there. Fetch it again"
    return None


def _safetensors_size(path: Path) -> int | None:
    """Return how long a safetensors file says it is, None where its header cannot be read."""
    import json

    with open_regular(path) as stream:
        length = int.from_bytes(stream.read(8), "little")
        size = stream.seek(0, 2)
        if length > size - 8:
            return 8 + length
        stream.seek(8)
        try:
            header = json.loads(stream.read(length))
            return 8 + length + max(int(one["data_offsets"][1]) for one in header.values() if "dtype" in one)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return None


def kind_of(path: Path) -> str | None:
    """Return what a file is by its first bytes, None if they say nothing.

    Raises:
        OSError: if it cannot be read.
    """
    with open_regular(path) as stream:
        head = stream.read(16)
    named = next((kind for start, kind in _HEADS.items() if head.startswith(start)), None)
    return named or {
        "safetensors": "a safetensors file",
        "torch": "a file of torch's, or another zip or pickle",
    }.get(weights_kind(path) or "")
