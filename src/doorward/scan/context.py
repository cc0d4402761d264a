"""What every part of a scan is given: seed, device, time, images, and whom to tell how far it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from doorward.core.budget import Deadline

#: Told to the caller as the scan goes on: what is being done now.
Progress = Callable[[str], None]


def say_nothing(_: str) -> None:
    """Tell nobody how far it is."""


@dataclass(frozen=True, kw_only=True)
class ScanContext:
    """What every part of a scan is given.

    Attributes:
        seed: one seed for everything.
        device: torch device.
        deadline: when it has to be done; without one there is no limit.
        images: most clean images that are used (see `ScanRequest`).
        memory: bytes that it may take beyond the model; the default of `doorward.core.memory` if None.
        report_progress: called with what is being done now.
    """

    seed: int = 0
    device: str = "cpu"
    deadline: Deadline = field(default_factory=Deadline)
    images: int = 300
    memory: int | None = None
    report_progress: Progress = say_nothing
