"""What attacks, detectors and repairs have in common: frozen settings and a derived generator."""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

from doorward.errors import CouldNotTell
from doorward.registry import method_name

if TYPE_CHECKING:
    import torch


class Method(BaseModel):
    """Is the base of all methods: a frozen record of keyword-only settings, checked when it is made."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=False)

    #: Title in the field's own words.
    title: ClassVar[str]
    #: Where the method was published: authors, venue, year, DOI or arXiv id.
    source: ClassVar[str]
    #: One sentence: what the method cannot do or see.
    limits: ClassVar[str]
    #: MITRE ATLAS technique ids that the method plants, finds or mitigates.
    atlas: ClassVar[tuple[str, ...]] = ()
    #: Kinds of input the method works on.
    modalities: ClassVar[frozenset[str]] = frozenset({"image"})
    #: Grows when a change of the source changes results, so that cached work is made again.
    revision: ClassVar[int] = 1

    @classmethod
    def method(cls) -> str:
        """Return the method's name, which is its file's."""
        return method_name(cls.__module__)

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return self.model_dump(mode="json")


def derive_seed(seed: int, *labels: str) -> int:
    """Derive a 63-bit seed for one purpose, so that methods draw independent numbers from one seed."""
    text = "\0".join([str(seed), *labels])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def make_generator(seed: int, *labels: str) -> torch.Generator:
    """Return a CPU generator for one purpose; draws are made on the CPU so that devices agree."""
    import torch

    return torch.Generator().manual_seed(derive_seed(seed, *labels))


@dataclass
class Deadline:
    """Tell how much time is left. Without a limit it never ends."""

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


class Pace:
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
