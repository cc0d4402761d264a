"""The exception tree. Every message says what was expected, what came, and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from doorward.core.records import Finding


class DoorwardError(Exception):
    """Is the base of all errors that Doorward raises on purpose; the command line prints its one line."""


class InputError(DoorwardError):
    """Tells that something the user gave is missing, unreadable or does not fit (exit code 2)."""


class MissingExtra(InputError):
    """Tells that an optional dependency is needed and how to install it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}: pip install 'doorward[{extra}]'")


class UnsafeArtifact(DoorwardError):
    """Tells that an artifact was not loaded because loading it would execute code (exit code 1)."""

    def __init__(self, message: str, finding: Finding | None = None) -> None:
        super().__init__(message)
        self.finding = finding


class TrainingDiverged(DoorwardError):
    """Tells that training was begun and its loss is no longer finite (exit code 4)."""


class CouldNotTell(DoorwardError):
    """Tells why a method cannot reach a conclusion; becomes a value in the record (exit code 3)."""
