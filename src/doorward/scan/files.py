"""Check files for what loading them would run. Neither torch nor a model is loaded."""

from __future__ import annotations

from pathlib import Path

from doorward.core.budget import Deadline
from doorward.core.records import Observations, Report, SubjectRecord
from doorward.detectors.artifact.unsafe_code import UnsafeCode
from doorward.scan.environment import environment
from doorward.scan.verdict import conclude_files


def scan_files(path: Path, *, strict: bool = False) -> Report:
    """Return a report on what loading a file or folder would run.

    Args:
        strict: files that loading never opens count as well if they would run code when opened.

    Raises:
        InputError: if there is nothing at the path.
    """
    clock = Deadline()
    found = UnsafeCode(strict_files=strict).read(path)
    seen = Observations(
        subject=SubjectRecord(path=str(path), format="not loaded"),
        findings=(found,),
        seconds=clock.spent(),
        environment=environment("cpu"),
    )
    return conclude_files(seen)
