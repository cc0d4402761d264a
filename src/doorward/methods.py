"""What attacks, detectors and repairs have in common: frozen settings and a derived generator."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

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
