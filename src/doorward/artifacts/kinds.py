"""Kinds of files that are known by their first bytes: machine code, bytecode, formats that are not read."""

from __future__ import annotations

import re
from typing import Literal

#: Endings of files that a system or Python loads as compiled code.
BINARY_SUFFIXES = frozenset({".so", ".dll", ".dylib", ".pyd", ".cubin", ".hsaco", ".exe", ".o"})
_Order = Literal["big", "little"]
_MACH_O: dict[bytes, _Order] = {
    b"\xfe\xed\xfa\xce": "big",
    b"\xfe\xed\xfa\xcf": "big",
    b"\xce\xfa\xed\xfe": "little",
    b"\xcf\xfa\xed\xfe": "little",
}
#: Processors that Mach-O files are for: x86, ARM, PowerPC, with the bit for 64 bits taken off.
_PROCESSORS = frozenset({7, 12, 18})
_PYC = re.compile(rb"[\x00-\xff][\x0b-\x0f]\r\n[\x00-\x03]\x00\x00\x00")

#: First bytes of formats that hold other files or programs and are not looked into.
_UNREAD_HEADS: dict[bytes, str] = {
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"\x04\x22\x4d\x18": "an LZ4 file",
    b"\x02\x21\x4c\x18": "an LZ4 file",
    b"\x1f\x9d": "a file packed with compress",
    b"LZIP": "an lzip file",
    b"MSCF": "a cabinet file",
    b"GGUF": "a GGUF file",
}
_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")
_UNREAD_SUFFIXES: dict[str, str] = {
    ".7z": "a 7z archive",
    ".zst": "a zstd file",
    ".lz4": "an LZ4 file",
    ".rar": "a RAR archive",
    ".br": "a Brotli file",
    ".gguf": "a GGUF file",
    ".pb": "a TensorFlow graph",
    ".tflite": "a TensorFlow Lite model",
    ".engine": "a TensorRT engine",
    ".plan": "a TensorRT engine",
    ".trt": "a TensorRT engine",
    ".rds": "a file of R's objects",
    ".rda": "a file of R's objects",
    ".rdata": "a file of R's objects",
    ".mlmodel": "a Core ML model",
    ".ort": "an ONNX Runtime model",
    ".jar": "a Java archive",
}


def is_machine_code(head: bytes) -> bool:
    """Return whether a file begins as a program or library does, by more than its first four bytes.

    Numbers of a tensor may begin like one, so the fields behind are held against what they can be.
    """
    return _is_elf(head) or _is_mach_o(head) or _is_windows(head)


def _is_elf(head: bytes) -> bool:
    if not head.startswith(b"\x7fELF") or len(head) < 52:
        return False
    width, order, version = head[4:7]
    if width not in (1, 2) or order not in (1, 2) or version != 1:
        return False
    endian: _Order = "little" if order == 1 else "big"
    kind = int.from_bytes(head[16:18], endian)
    again = int.from_bytes(head[20:24], endian)
    return kind in (1, 2, 3, 4) and again == 1


def _is_mach_o(head: bytes) -> bool:
    order = _MACH_O.get(head[:4])
    if order and len(head) >= 16:
        processor, kind = (int.from_bytes(head[at : at + 4], order) for at in (4, 12))
        return processor & 0xFFFFFF in _PROCESSORS and 1 <= kind <= 12
    if (
        head.startswith(b"\xca\xfe\xba\xbe") and len(head) >= 12
    ):  # several in one; Java's classes begin so too
        count, processor = (int.from_bytes(head[at : at + 4], "big") for at in (4, 8))
        return 0 < count < 20 and processor & 0xFFFFFF in _PROCESSORS
    return False


def _is_windows(head: bytes) -> bool:
    if not head.startswith(b"MZ") or len(head) < 64:
        return False
    at = int.from_bytes(head[60:64], "little")
    return head[at : at + 4] == b"PE\0\0"


def is_bytecode(head: bytes, suffix: str) -> bool:
    """Return whether a file is Python's compiled source.

    >>> is_bytecode(bytes([0xA7, 0x0D, 13, 10, 0, 0, 0, 0]), ""), is_bytecode(b"", ".pyc")
    (True, True)
    """
    return suffix in (".pyc", ".pyo") or _PYC.match(head) is not None


def is_tflite(head: bytes, suffix: str) -> bool:
    """Return whether a file is a TensorFlow Lite model, by its ending too: any file may begin like one.

    It names its operators and holds none. An archive of labels may stand behind it.

    >>> is_tflite(b"\\x1c\\0\\0\\0TFL3", ".tflite"), is_tflite(b"\\x1c\\0\\0\\0TFL3", ".pt")
    (True, False)
    """
    return suffix == ".tflite" and head[4:8] == b"TFL3"


def unread_kind(head: bytes, suffix: str) -> str | None:
    """Return what a file is that is not looked into, None if it is of no such kind.

    >>> unread_kind(b"7z\\xbc\\xaf\\x27\\x1c", ".bin"), unread_kind(b"hello", ".txt")
    ('a 7z archive', None)
    >>> unread_kind(b"hello", ".tflite"), unread_kind(b"\\x1c\\0\\0\\0TFL3", ".tflite")
    ('a TensorFlow Lite model', None)
    """
    for start, kind in _UNREAD_HEADS.items():
        if head.startswith(start):
            return kind
    if _SKIPPABLE.match(head):
        return "an LZ4 or zstd file"
    return None if is_tflite(head, suffix) else _UNREAD_SUFFIXES.get(suffix)
