"""Check files for what loading them would run. Neither torch nor a model is loaded."""

from __future__ import annotations

from pathlib import Path

from doorward.core.records import Finding, Observations, Report, SubjectRecord
from doorward.detectors.subject import Subject
from doorward.methods import registry
from doorward.scan.environment import environment
from doorward.scan.verdict import conclude_files


def scan_files(path: Path, *, strict: bool = False) -> Report:
    """Return a report on what loading a file or folder would run.

    Args:
        strict: files that loading never opens count as well if they would run code when opened.

    Raises:
        InputError: if there is nothing at the path.
    """
    detector = registry.build("detector", "unsafe-code", {"strict_files": strict})
    found = detector.read(Subject(artifact=path))
    assert isinstance(found, Finding)
    seen = Observations(
        subject=SubjectRecord(path=str(path), format="not loaded"),
        findings=(found,),
        seconds=found.seconds,
        environment=environment("cpu"),
    )
    return conclude_files(seen)
