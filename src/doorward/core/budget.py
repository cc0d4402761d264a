"""Time budgets: how much is left, and giving work up early when it will not suffice."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from doorward.core.errors import CouldNotTell


@dataclass
class Deadline:
    """How much time is left. Without a limit it never ends.

    Attributes:
        missed: whether work was given up because the time did not suffice, or would not.
        on_progress: called whenever a part of the work is done.
    """

    seconds: float | None = None
    started: float = field(default_factory=lambda: time.monotonic())
    missed: bool = False
    on_progress: Callable[[], None] | None = None

    def left(self) -> float:
        """Return the seconds left (infinite without a limit, never negative)."""
        if self.seconds is None:
            return float("inf")
        return max(0.0, self.seconds - (time.monotonic() - self.started))

    def spent(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self.started


class TimeGuard:
    """Give work up as soon as its first parts show that the time will not suffice.

    Args:
        deadline: when it has to be done.
        total: how much there is to do, in units of the caller's own.
        work: what is done, for the message: "inverting the triggers of 10 classes".

    Raises:
        CouldNotTell: if the time is over already.
    """

    def __init__(self, deadline: Deadline, total: float, *, work: str) -> None:
        self.deadline, self.total, self.work = deadline, total, work
        self._began, self._done, self._parts = deadline.spent(), 0.0, 0
        if deadline.left() == 0:
            deadline.missed = True
            raise CouldNotTell(f"the time budget ended before {work}")

    def advance(self, amount: float) -> None:
        """Count a part of the work as done.

        Raises:
            CouldNotTell: if the time is over, or will be before the work is done; the message says how much
                it would take.
        """
        self._done += amount
        self._parts += 1
        if self.deadline.on_progress is not None:
            self.deadline.on_progress()
        spent = self.deadline.spent() - self._began
        needed = spent * (self.total - self._done) / max(self._done, 1e-9)
        left = self.deadline.left()
        # the first part is slower than the others, since libraries warm up in it
        trust = {1: 1 / 3, 3: 1.0}.get(self._parts, 0.0)
        if needed > 0 and (left == 0 or needed * trust > left):
            self.deadline.missed = True
            raise CouldNotTell(
                f"{self.work} would take {about(needed)} more, and {about(left)} of the time budget are "
                "left; give more with --time-budget, or use a faster device"
            )


def about(seconds: float) -> str:
    """Write a time roughly.

    >>> about(0), about(95.2), about(600), about(1e6)
    ('0 seconds', '96 seconds', '10 minutes', '278 hours')
    """
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds > 2 * size:
            return f"{math.ceil(seconds / size)} {unit}"
    return f"{math.ceil(seconds)} seconds"
