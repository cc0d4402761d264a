"""What somebody asks of a data source, and the one way in which all sources fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from doorward.core.contents import stand_in
from doorward.core.errors import DoorwardError, InputError

#: Folder names that are taken for splits.
SPLITS = frozenset({"train", "test", "validation", "val", "valid", "dev"})


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Attributes:
        given: the path as the user gave it, for messages and provenance.
        path: the same without its split.
        column: the column (or npz key) of the inputs; None to find it.
        label_column: the column (or npz key) of the labels; None to find it.
        split: the split asked for; None to choose.
        classes: class names in the order of their numbers; None to take the source's own.
        prefer: the splits to take, the best first, when none is asked for.
    """

    given: str
    path: Path
    column: str | None
    label_column: str | None
    split: str | None
    classes: tuple[str, ...] | None
    prefer: tuple[str, ...]

    def choose_split(self, splits: Sequence[str]) -> str | None:
        """Return the split to read, None where the source has none.

        Raises:
            InputError: if the split asked for is not there, or if nothing tells which to take.
        """
        names = ", ".join(splits) or "none"
        if self.split is not None:
            if self.split not in splits:
                raise InputError(f"{self.path} has no split {self.split!r}; its splits are: {names}")
            return self.split
        if len(splits) < 2:
            return splits[0] if splits else None
        for name in self.prefer:
            if name in splits:
                return name
        raise InputError(f"{self.path} has several splits: {names}; choose one as {self.path}:{splits[0]}")

    def names(self, files: Sequence[Path]) -> Callable[[], Mapping[str, Path]]:
        """Return a function that names files relative to the path, as provenance wants it."""
        if self.path.is_file():
            return lambda: {file.name: file for file in files}
        return lambda: {file.relative_to(self.path).as_posix(): file for file in files}


@contextmanager
def reading(path: Path | str, what: str) -> Iterator[None]:
    """Turn whatever a parser throws at damaged bytes into one InputError that names the file."""
    try:
        yield
    except DoorwardError:
        raise
    except Exception as error:
        why = stand_in(Path(path)) if isinstance(path, Path) else None
        raise InputError(
            f"{path}: {why}" if why else f"{path} cannot be read as {what} ({reason(error)})"
        ) from error


def reason(error: Exception) -> str:
    """Return the first line of an error's message, its type where it has none."""
    lines = str(error).strip().splitlines()
    return (lines[0][:200].rstrip(". ") if lines else "") or type(error).__name__
