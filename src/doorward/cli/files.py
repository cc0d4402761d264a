"""`doorward scan --files-only`: what loading files would run, without loading anything."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from doorward.cli.options import Format

if TYPE_CHECKING:
    from doorward.core.records import Report


def check_files(paths: list[str], format: Format, *, strict: bool) -> int:
    """Check files and folders, print a line or a report for each, and return the exit code.

    Args:
        strict: files that loading never opens count as well.

    Returns:
        1 if anything is unsafe, else 2 if a path cannot be read, else 3 if one could not be checked to its
        end, else 0.
    """
    from doorward import reports
    from doorward.core.formatting import plain, sentence
    from doorward.scan.files import scan_files

    codes = set()
    for path in paths:
        if not Path(path).exists():
            typer.echo(f"error: {plain(path)} does not exist", err=True)
            codes.add(2)
            continue
        report = scan_files(Path(path), strict=strict)
        if format is Format.json:
            typer.echo(reports.to_json(report), nl=False)
        elif format is Format.sarif:
            typer.echo(reports.to_sarif(report), nl=False)
        else:
            typer.echo(sentence(f"{plain(path)}: {_said(report)}"))
        codes.add({"unsafe": 1, "could_not_tell": 3}.get(report.verdict, 0))
    return next((code for code in (1, 2, 3) if code in codes), 0)


def _said(report: Report) -> str:
    from doorward.core.formatting import plain

    (finding,) = report.findings
    return plain(finding.reason or finding.summary)
