"""The files of a folder as an examination takes them: links are followed no further than the folder."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from doorward.artifacts.links import leaves
from doorward.core.files import irregularity

#: How the problem of an entry ends that was left alone although it is there.
NOT_OPENED = "and was not opened"


@dataclass
class Entry:
    """One file of a folder, or what stands in the place of one.

    Attributes:
        path: below the folder, as it is named.
        size: in bytes.
        problem: why it cannot be opened, or None.
        is_folder: whether it is a link to a folder that is not followed.
        is_limit: whether it stands for all that were left out.
    """

    path: Path
    size: int = 0
    problem: str | None = None
    is_folder: bool = False
    is_limit: bool = False


def walk(root: Path, limit: int) -> Iterator[Entry]:
    """Yield the files below a folder in the order of their names, also hidden ones.

    Links are followed within the folder, and into the store of the Hugging Face hub's cache; a file with
    several names is yielded by each. What is a pipe, a device, a broken link or a link out of the folder is
    yielded with the problem.

    Args:
        limit: most files and folders that are looked at; the one after it is yielded with the problem.

    Raises:
        OSError: if the folder itself cannot be read.
    """
    yield from _Walker(root, limit).below(root, frozenset({os.path.realpath(root)}))


class _Walker:
    def __init__(self, root: Path, limit: int) -> None:
        self.root, self.limit, self.seen = root, limit, 0

    def below(self, folder: Path, above: frozenset[str]) -> Iterator[Entry]:
        """Yield what is in a folder; `above` are the real paths of the folders that it lies in."""
        try:
            names = sorted(os.listdir(folder))
        except OSError as error:
            if folder == self.root:
                raise
            yield Entry(folder, problem=error.strerror or str(error), is_folder=True)
            return
        for name in names:
            if self.seen >= self.limit:
                if self.seen == self.limit:
                    self.seen += 1
                    why = f"more than {self.limit} files; this one and the rest were left out"
                    yield Entry(folder / name, problem=why, is_limit=True)
                return
            self.seen += 1
            yield from self._one(folder / name, above)

    def _one(self, path: Path, above: frozenset[str]) -> Iterator[Entry]:
        is_link = path.is_symlink()
        try:
            status = path.stat()
        except OSError as error:
            why = "is a link that leads nowhere" if is_link else error.strerror or str(error)
            yield Entry(path, problem=why)
            return
        is_folder = stat.S_ISDIR(status.st_mode)
        if is_link and leaves(path, self.root, is_folder=is_folder):
            yield Entry(path, problem=f"is a link out of the folder {NOT_OPENED}", is_folder=is_folder)
        elif is_folder:
            real = os.path.realpath(path)
            if real not in above:
                yield from self.below(path, above | {real})
        elif kind := irregularity(status.st_mode):
            yield Entry(path, problem=f"is {kind}, not a file, {NOT_OPENED}")
        else:
            yield Entry(path, status.st_size)
