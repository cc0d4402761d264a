"""Names of files that people and reports can hold."""

from __future__ import annotations

import os
import re
from pathlib import Path

from doorward.core.errors import InputError
from doorward.core.formatting import did_you_mean

_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_HUB_PAGE = re.compile(r"https://(?:huggingface\.co|hf\.co)/(?:datasets/)?([\w.-]+/[\w.-]+)")
#: Endings of files that hold a model or its weights.
MODEL_SUFFIXES = frozenset({".onnx", ".pt2", ".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pkl"})


def refuse_unreadable_name(path: str | Path) -> None:
    """Raise unless a path is text: what is not UTF-8 can stand in no report.

    Raises:
        InputError: with the name, its bytes written out.
    """
    name = os.fspath(path)
    try:
        name.encode()
    except UnicodeEncodeError as error:
        shown = os.fsencode(name).decode("utf-8", "backslashreplace")
        raise InputError(f"{shown[:200]}: the name is not UTF-8; rename it") from error


def neighbours(path: str | Path) -> str:
    """Return a question for files that are named much like one that is not there, empty where none is."""
    given = Path(path)
    try:
        names = [entry.name for entry in given.absolute().parent.iterdir()]
    except OSError:
        return ""
    return did_you_mean(given.name, names)


def refused_url(address: str) -> InputError:
    """Return the error for an address of the web where a path is expected.

    >>> print(refused_url("https://hf.co/microsoft/resnet-18/tree/main"))
    https://hf.co/microsoft/resnet-18/tree/main: nothing is fetched from a URL: give 'microsoft/resnet-18'
    """
    found = _HUB_PAGE.match(address)
    better = f"give {found[1]!r}" if found else "download it and give its path, or a hub id (owner/name)"
    return InputError(f"{address}: nothing is fetched from a URL: {better}")


def model_exists(path: str) -> bool:
    """Return whether a model lies at a path on this machine; False if it may be a name on the hub.

    Raises:
        InputError: if it can be neither.
    """
    refuse_unreadable_name(path)
    try:
        if Path(path).exists():
            return True
    except OSError as error:
        raise InputError(f"{path[:200]}: no usable path: {error.strerror}") from error
    if Path(path).is_symlink():
        raise InputError(f"{path}: it is a link to {os.readlink(path)!r}, where nothing is")
    if "://" in path:
        raise refused_url(path)
    if _HUB_ID.fullmatch(path) and Path(path).suffix not in MODEL_SUFFIXES:
        return False
    raise InputError(f"{path}: no such file or directory, and no hub id (owner/name){neighbours(path)}")
