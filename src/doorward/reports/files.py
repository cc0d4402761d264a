"""All reports of one scan in one folder."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

from doorward.core.errors import InputError
from doorward.core.records import Report
from doorward.core.report_json import to_json
from doorward.reports.html import to_html
from doorward.reports.sarif import to_sarif
from doorward.reports.text import to_text


def write_reports(report: Report, directory: Path, *, fail_on: str = "suspicious") -> dict[str, Path]:
    """Write a report in every format into a folder, made if need be; return the path of each.

    `fail_on` is what the exit code in the SARIF file follows (see `exit_code`).
    All are replaced, or all are left as they were: each is written next to its place, and they are renamed
    once all are written.

    Raises:
        InputError: if the folder cannot be made or written.
    """
    texts = {
        "json": ("report.json", to_json(report)),
        "html": ("report.html", to_html(report)),
        "sarif": ("report.sarif", to_sarif(report, fail_on=fail_on)),
        "text": ("report.txt", to_text(report)),
    }
    paths = {name: directory / file for name, (file, _) in texts.items()}
    written: list[tuple[Path, Path]] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path in paths.values():
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, f"{path.name} is a folder")
        for name, (_, text) in texts.items():
            beside = paths[name].with_name(f".{paths[name].name}.{secrets.token_hex(4)}")
            written.append((beside, paths[name]))
            beside.write_text(text, encoding="utf-8", newline="\n")
        for beside, path in written:
            os.replace(beside, path)
    except OSError as error:
        raise InputError(
            f"the reports need a folder to write to; {directory}: {error.strerror}. Give another --out"
        ) from error
    finally:
        for beside, _ in written:
            beside.unlink(missing_ok=True)
    return paths
