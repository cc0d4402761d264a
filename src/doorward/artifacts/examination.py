"""What an examination of files finds, and how far it goes."""

from __future__ import annotations

from dataclasses import dataclass, field

from doorward.core.budget import Deadline
from doorward.core.errors import CouldNotTell

#: Why a file that a model names, and a script in its folder, are told.
OUTSIDE = "is read although it lies outside of the model's folder"
SOURCE = "is Python source, which runs when it is imported"


def printable(text: str) -> str:
    r"""Return a text without what cannot be written as UTF-8, as names of files and members may hold it.

    >>> printable("caf\udce9.bin")
    'caf\\udce9.bin'
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@dataclass(frozen=True)
class Reference:
    """One piece of code that opening a file would import or run.

    Attributes:
        file: file, and member inside an archive after a colon.
        name: the function, class or expression.
        position: where in the file.
        why: what makes it dangerous, in words.
        excerpt: the instructions around it.
        reached: whether loading the model opens the file; else only somebody who opens it by hand runs it.
    """

    file: str
    name: str
    position: str
    why: str
    excerpt: str = ""
    reached: bool = True


@dataclass(frozen=True)
class Doubt:
    """A file that could not be examined to its end.

    Attributes:
        file: file, and member inside an archive after a colon.
        why: what stopped the examination.
        reached: whether loading the model opens the file.
    """

    file: str
    why: str
    reached: bool = True

    def __str__(self) -> str:
        return f"{self.file}: {self.why}"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much an examination reads before it gives up.

    Attributes:
        depth: archives inside archives.
        members: files and archive members.
        opcodes: pickle instructions.
        bytes: bytes read as pickle or unpacked.
        unpacked: bytes of one unpacked archive that are held in memory.
    """

    depth: int = 4
    members: int = 100_000
    opcodes: int = 5_000_000
    bytes: int = 4 << 30
    unpacked: int = 1 << 30


@dataclass
class Examination:
    """What was found in an artifact.

    Attributes:
        references: code that opening its files would import or run.
        doubts: what could not be checked to its end.
        files: how many files and members were looked at.
    """

    references: list[Reference] = field(default_factory=list)
    doubts: list[Doubt] = field(default_factory=list)
    files: int = 0


class Exhausted(CouldNotTell):
    """Tells that an examination has used up what it may spend, so that nothing more is read."""


@dataclass
class Budget:
    """Count down what one examination may still read.

    Attributes:
        opcodes: pickle instructions left.
        bytes: bytes left to unpack or to read as pickle.
        deadline: when the examination has to end.
    """

    opcodes: int
    bytes: int
    deadline: Deadline = field(default_factory=Deadline)
    _untimed: int = 0

    def spend(self, *, opcodes: int = 0, n_bytes: int = 0) -> None:
        """Take from the budget.

        Raises:
            Exhausted: if it is used up, or the time is over.
        """
        self.opcodes -= opcodes
        self.bytes -= n_bytes
        if self.opcodes < 0:
            raise Exhausted("too many pickle instructions to check")
        if self.bytes < 0:
            raise Exhausted("too many bytes to check")
        self._untimed += 1
        if self._untimed >= 1000:  # the clock is slow next to one instruction
            self.check_time()

    @property
    def is_used_up(self) -> bool:
        """Return whether nothing more can be read."""
        return self.opcodes < 0 or self.bytes < 0 or self.deadline.left() == 0

    def check_time(self) -> None:
        """Look at the clock.

        Raises:
            Exhausted: if the time is over.
        """
        self._untimed = 0
        if self.deadline.left() == 0:
            raise Exhausted("the time budget ended before all files were checked")
