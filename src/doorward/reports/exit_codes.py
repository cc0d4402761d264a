"""Exit codes of the command line."""

from __future__ import annotations

from collections.abc import Iterable

from doorward.core.records import SEVERITY, Report, Verdict

#: What `--require` takes besides the names of detectors.
BEHAVIOUR = "behaviour"


def exit_code(verdict: Verdict, fail_on: str = "suspicious") -> int:
    """Return a scan's exit code: 1 at or above `fail_on`, 3 for could not tell, else 0.

    Args:
        verdict: the report's verdict.
        fail_on: "suspicious", "backdoored" or "never"; with "never" it is always 0.
    """
    if fail_on == "never":
        return 0
    if verdict == "could_not_tell":
        return 3
    return int(SEVERITY[verdict] >= SEVERITY["backdoored" if fail_on == "backdoored" else "suspicious"])


def not_covered(report: Report, required: Iterable[str]) -> list[str]:
    """Return what was required to run and had no part in the verdict.

    Args:
        required: names of detectors, or "behaviour" for any that examines it.
    """
    covered = {*report.covered.files, *report.covered.behaviour, *report.covered.training_data}
    covered |= {BEHAVIOUR} if report.covered.behaviour else set()
    return [name for name in dict.fromkeys(required) if name not in covered]
