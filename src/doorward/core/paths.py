"""Names of files that people and reports can hold."""

from __future__ import annotations

import os
from pathlib import Path

from doorward.core.errors import InputError


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
