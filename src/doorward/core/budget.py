"""Time budgets: how much is left, and giving work up early when it will not suffice."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from doorward.core.errors import CouldNotTell

if TYPE_CHECKING:
    pass


@dataclass
class Deadline:
    """How much time is left. Without a limit it never ends."""

    seconds: float | None = None
    started: float = field(default_factory=time.monotonic)

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
            raise CouldNotTell(f"the time budget ended before {work}")

    def advance(self, amount: float) -> None:
        """Count a part of the work as done.

        Raises:
            CouldNotTell: if the time is over, or will be before the work is done; the message says how much
                it would take.
        """
        self._done += amount
        self._parts += 1
        spent = self.deadline.spent() - self._began
        needed = spent * (self.total - self._done) / max(self._done, 1e-9)
        left = self.deadline.left()
        # the first part is slower than the others, since libraries warm up in it
        trust = {1: 1 / 3, 3: 1.0}.get(self._parts, 0.0)
        if needed > 0 and (left == 0 or needed * trust > left):
            raise CouldNotTell(
                f"{self.work} would take {_about(needed)} more, and {_about(left)} of the time budget are "
                "left; give more with --time-budget, or use a faster device"
            )


def _about(seconds: float) -> str:
    """Write a time roughly.

    >>> _about(0), _about(95.2), _about(600), _about(1e6)
    ('0 seconds', '96 seconds', '10 minutes', '278 hours')
    """
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds > 2 * size:
            return f"{math.ceil(seconds / size)} {unit}"
    return f"{math.ceil(seconds)} seconds"
