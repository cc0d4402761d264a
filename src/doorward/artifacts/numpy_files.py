"""Where numpy's own files hold pickled objects.

Source: numpy.lib.format, version 1.0 to 3.0.
"""

from __future__ import annotations

import ast
import re
import struct
import warnings
from collections.abc import Iterator
from typing import IO, Any

from doorward.core.errors import CouldNotTell

MAGIC = b"\x93NUMPY"
#: Types of elements that are numbers, texts or raw bytes; whatever else a header says may be objects.
_PLAIN = re.compile(r"[<>|=]?[?biufcmMSUV]\d*(\[\w+(/\d+)?\])?")
_PYTHON_2 = re.compile(r"\b(\d+)L\b")
_LONGEST_HEADER = 1 << 20


def holds_objects(stream: IO[bytes]) -> bool:
    """Return whether an array's elements are pickled; the stream is then at the pickle.

    A header that cannot be read counts as one of objects, as long as its length is known.

    Raises:
        CouldNotTell: if the length of the header is not known, or too large.
    """
    start = stream.read(len(MAGIC) + 2)
    wide = start[6:7] != b"\x01"
    field = stream.read(4 if wide else 2)
    if len(field) != (4 if wide else 2):
        raise CouldNotTell("the header of the array ends early")
    (length,) = struct.unpack("<I" if wide else "<H", field)
    if length > _LONGEST_HEADER:
        raise CouldNotTell("the header of the array is too long to check")
    header = stream.read(length).decode("utf-8" if start[6:7] == b"\x03" else "latin-1", "replace")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in names
            described = ast.literal_eval(_PYTHON_2.sub(r"\1", header.strip()))["descr"]
    except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError):
        return True
    return not all(isinstance(one, str) and _PLAIN.fullmatch(one) for one in _types(described))


def _types(described: Any) -> Iterator[Any]:
    """Yield the types in a description: one, or one for each field, nested."""
    if isinstance(described, list):
        for field in described:
            yield from _types(field[1]) if isinstance(field, tuple) and len(field) in (2, 3) else [None]
    elif isinstance(described, tuple):  # a type and its shape
        yield from _types(described[0]) if described else [None]
    else:
        yield described
