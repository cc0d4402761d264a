"""`doorward scan --files-only`: what loading files would run, without loading anything."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from doorward.cli.options import FailOn, Format, check_folder, written
from doorward.core.errors import InputError

if TYPE_CHECKING:
    from doorward.core.records import Report


def check_files(
    paths: list[str],
    format: Format,
    *,
    strict: bool,
    fail_on: FailOn = FailOn.suspicious,
    out: Path | None = None,
) -> int:
    """Check files and folders, print a line or a report for each, and return the exit code.

    Args:
        strict: files that loading never opens count as well.
        fail_on: with never, what is found changes no exit code.
        out: folder for the reports on the one path that is given.

    Returns:
        1 if anything is unsafe, else 2 if a path cannot be read, else 3 if one could not be checked to its
        end, else 0.

    Raises:
        InputError: if there are several paths and one folder for reports, or it cannot be written.
    """
    from doorward import reports
    from doorward.core.formatting import plain, sentence
    from doorward.scan.files import scan_files

    if out is not None:
        if len(paths) > 1:
            raise InputError(f"--out takes the reports on one file or folder, got {len(paths)}")
        check_folder(out)
    codes = set()
    for path in paths:
        if not Path(path).exists():
            typer.echo(f"error: {plain(path)} does not exist", err=True)
            codes.add(2)
            continue
        report = scan_files(Path(path), strict=strict)
        if out is not None or format is not Format.text:
            report = _with_digest(report, Path(path))
        if (text := written(report, format, fail_on)) is not None:
            typer.echo(text, nl=False)
        else:
            typer.echo(sentence(f"{plain(path)}: {_said(path, report)}"))
        codes.add(reports.exit_code(report.verdict, fail_on.value))
        if out is not None:
            files = reports.write_reports(report, out, fail_on=fail_on.value)
            names = ", ".join(sorted(file.name for file in files.values()))
            typer.echo(f"written: {out} ({names})", err=True)
    return next((code for code in (1, 2, 3) if code in codes), 0)


def _with_digest(report: Report, path: Path) -> Report:
    """Return a report that says which content was read, where all of it can be."""
    from doorward.artifacts.digest import artifact_digest

    assert report.subject is not None
    try:
        found = artifact_digest(path)
    except (OSError, InputError):
        return report
    subject = report.subject.model_copy(update=found._asdict())
    return report.model_copy(update={"subject": subject})


def _said(path: str, report: Report) -> str:
    """Return what a line says of a path, without the path at its beginning."""
    from doorward.core.contents import stand_in
    from doorward.core.formatting import plain

    (finding,) = report.findings
    if report.verdict == "could_not_tell" and Path(path).is_file() and (instead := stand_in(Path(path))):
        return instead
    return plain(finding.reason or finding.summary).removeprefix(f"{plain(Path(path).name)}: ")
