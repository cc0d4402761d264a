"""Rerun a report by its hashes and seeds, and say what differs."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from doorward.errors import InputError
from doorward.records import Report
from doorward.scan import Progress, ScanRequest, scan

#: Two runs on the same machine agree to this; other machines may round differently.
TOLERANCE = 1e-3


def verify(path: Path, *, progress: Progress | None = None) -> list[str]:
    """Return what differs between a report and a new scan with its arguments; nothing if they agree.

    Raises:
        InputError: if the report cannot be read, or does not say how it was made.
    """
    try:
        old = Report.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise InputError(f"{path}: not a Doorward report: {error.errors()[0]['msg']}") from None
    if not old.request:
        raise InputError(
            f"{path}: the report says nothing of how it was made; only scans of files can be rerun"
        )
    try:
        request = ScanRequest.from_json(old.request)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: the report's request cannot be read: {error}") from None
    return compare(old, scan(request, progress=progress))


def compare(old: Report, new: Report) -> list[str]:
    """Return what differs between two reports, in words; times and machines may differ."""
    differences = []

    def same(what: str, a: object, b: object) -> None:
        if a != b:
            differences.append(f"{what}: was {a}, is {b}")

    if old.subject and new.subject:
        same("model sha256", old.subject.sha256, new.subject.sha256)
        same("clean accuracy", old.subject.clean_accuracy, new.subject.clean_accuracy)
    same("data sha256", [d.sha256 for d in old.data], [d.sha256 for d in new.data])
    same("verdict", old.verdict, new.verdict)
    same("targets", old.targets, new.targets)
    same("detectors", [f.detector for f in old.findings], [f.detector for f in new.findings])
    for a, b in zip(old.findings, new.findings, strict=False):
        same(f"{a.detector} verdict", a.verdict, b.verdict)
        if (
            a.score is not None
            and b.score is not None
            and abs(a.score - b.score) > TOLERANCE * max(1, abs(a.score))
        ):
            differences.append(f"{a.detector} score: was {a.score:.4f}, is {b.score:.4f}")
    return differences
