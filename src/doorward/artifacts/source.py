"""Read a stream piece by piece as an unpickler does, at a budget's expense and with little memory."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import IO

from doorward.artifacts.examination import Budget

#: Bytes of a string or line that are kept; no name that matters is longer.
KEPT = 512
_FIRST, _MOST = 512, 1 << 18


class Broken(Exception):  # noqa: N818 (it is a state of the file, as in the words of the report)
    """Tells that every unpickler stops here with an error, so that nothing behind it runs."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A string or line of which the middle may be left out.

    Attributes:
        head: its first bytes.
        last: its last byte (b"" if it is empty).
        whole: whether `head` is all of it.
    """

    head: bytes
    last: bytes
    whole: bool


class Source:
    """A stream with a position.

    Args:
        stream: to read from, at its beginning.
        budget: what may be spent.
        size: bytes in the stream, if known; a length that points beyond it is then told at once.
    """

    def __init__(self, stream: IO[bytes], budget: Budget, size: int | None = None) -> None:
        self._stream, self._budget, self._size = stream, budget, size
        self._base, self._at, self._window, self._step = stream.tell(), 0, b"", _FIRST
        # skipping costs nothing where the operating system or the memory does it
        self._free_skips = size is not None and isinstance(stream, io.BufferedReader | io.BytesIO)

    @property
    def position(self) -> int:
        """Return the place of the next byte."""
        return self._base + self._at

    def seek(self, position: int) -> None:
        """Go to a place."""
        self._stream.seek(position)
        self._base, self._at, self._window = position, 0, b""

    def take(self, n: int) -> bytes:
        """Return the next n bytes, n being small.

        Raises:
            Broken: if the stream ends before.
        """
        end = self._at + n
        while len(self._window) < end:
            self._fill()
            end = self._at + n
        data = self._window[self._at : end]
        self._at = end
        return data

    def counted(self, n: int) -> Piece:
        """Return a string of n bytes.

        Raises:
            Broken: if the stream ends before.
        """
        if n <= KEPT:
            data = self.take(n)
            return Piece(data, data[-1:], True)
        head = self.take(KEPT)
        self.skip(n - KEPT - 1)
        return Piece(head, self.take(1), False)

    def skip(self, n: int) -> None:
        """Leave n bytes out.

        Raises:
            Broken: if the stream ends before.
        """
        if self._size is not None and self.position + n > self._size:
            raise Broken("a length points beyond the end of the file")
        inside = min(n, len(self._window) - self._at)
        self._at += inside
        n -= inside
        if n and self._free_skips:
            self.seek(self.position + n)
            return
        while n:
            self._fill()
            inside = min(n, len(self._window) - self._at)
            self._at += inside
            n -= inside

    def line(self) -> Piece:
        """Return what stands before the next newline, which is taken too; lines may have any length.

        The last line of a file may lack its newline: then its last byte goes, as in Python's unpickler.

        Raises:
            Broken: if the stream has ended.
        """
        head, length, last = b"", 0, b""
        while True:
            end = self._window.find(b"\n", self._at)
            piece = self._window[self._at : end if end >= 0 else len(self._window)]
            head, length, last = head + piece[: KEPT - len(head)], length + len(piece), piece[-1:] or last
            if end >= 0:
                self._at = end + 1
                return Piece(head, last, length <= KEPT)
            self._at = len(self._window)
            try:
                self._fill()
            except Broken:
                if not length:
                    raise
                return Piece(head[: length - 1], head[length - 2 : length - 1], length - 1 <= KEPT)

    def _fill(self) -> None:
        data = self._stream.read(self._step)
        if not data:
            raise Broken("it ends without its last instruction")
        self._budget.spend(n_bytes=len(data))
        self._base += self._at
        self._window, self._at = self._window[self._at :] + data, 0
        self._step = min(4 * self._step, _MOST)
