"""Exit codes of the command line."""

from __future__ import annotations

from doorward.core.records import (
    SEVERITY,
    Verdict,
)

# --- the exit code -------------------------------------------------------------------------------


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
