"""All reports of one scan in one folder."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

from doorward.core.errors import InputError
from doorward.core.formatting import plain
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


def write_flagged(report: Report, directory: Path) -> dict[str, Path]:
    """Write the flagged training samples as flagged.csv and flagged.parquet; return the path of each.

    Nothing is written where no training data were inspected.

    Raises:
        InputError: if the folder cannot be written.
    """
    if not report.covered.training_data:
        return {}
    import csv
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "id": one.id,
            "row": one.row,
            "place": one.place,
            "label": report.class_name(one.label),
            "source": None if one.source is None else report.class_name(one.source),
            "score": one.score,
            "detector": finding.detector,
        }
        for finding in report.findings
        for one in finding.flagged_samples
    ]
    types = [pa.string(), pa.int64(), pa.string(), pa.string(), pa.string(), pa.float64(), pa.string()]
    names = ("id", "row", "place", "label", "source", "score", "detector")
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _harmless(value) for name, value in row.items()} for row in rows)
    paths = {"flagged csv": directory / "flagged.csv", "flagged parquet": directory / "flagged.parquet"}
    try:
        _replace(paths["flagged csv"], text.getvalue())
        table = pa.Table.from_pylist(rows, pa.schema(list(zip(names, types, strict=True))))
        pq.write_table(table, paths["flagged parquet"])
    except OSError as error:
        raise InputError(f"{directory}: cannot write the flagged samples: {error.strerror}") from error
    return paths


def _harmless(value: object) -> object:
    """Return a cell that a spreadsheet does not take for a formula, nor a terminal for a command."""
    if not isinstance(value, str):
        return value
    shown = plain(value)
    return f"'{shown}" if shown[:1] in ("=", "+", "-", "@") else shown


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        beside.write_text(text, encoding="utf-8", newline="\n")
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
