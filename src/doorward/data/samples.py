"""Samples: raw inputs with labels and ids that come from their content."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from doorward.core.errors import InputError

Modality = Literal["image", "text", "audio"]


@dataclass(frozen=True)
class Waveform:
    """One recording.

    Attributes:
        pcm: shape (frames,) for one channel, (frames, channels) for several, float32 in [-1, 1].
        rate: samples per second.
    """

    pcm: npt.NDArray[np.float32]
    rate: int


#: One raw input: uint8 image (h, w, c) with c in {1, 3}, a string, or a waveform.
Raw: TypeAlias = npt.NDArray[np.uint8] | str | Waveform


@dataclass(frozen=True)
class Batch:
    """Some samples: ids, raw inputs in a list, labels (n,) int64 or None."""

    ids: tuple[str, ...]
    x: list[Any]
    y: npt.NDArray[np.int64] | None


class Provenance:
    """Where samples came from.

    Attributes:
        path: as the user gave it.
        rows: how many samples lie there.
    """

    def __init__(
        self,
        path: str,
        sha256: str | None,
        rows: int,
        *,
        files: Callable[[], Mapping[str, Path]] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.path, self.rows = path, rows
        self._sha256, self._files = sha256, files
        self._notes = list(notes)

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what was left out, shifted or guessed, one sentence each, for reports.

        Some is seen when samples are decoded, so ask after that.
        """
        return tuple(self._notes)

    def note(self, text: str) -> None:
        """Add a note, once."""
        if text not in self._notes:
            self._notes.append(text)

    @cached_property
    def sha256(self) -> str | None:
        """Return the sha256 over the files that were read, None if no file is known.

        One file gives its plain sha256; several give the sha256 of their `sha256  name` lines, sorted by
        name and ended by line feeds, with names relative to the path. Made on first use, since it reads every
        file.

        Raises:
            InputError: if a file cannot be read any more.
        """
        if self._sha256 is not None or self._files is None:
            return self._sha256
        digests = {}
        for name, file in self._files().items():
            try:
                with file.open("rb") as stream:
                    digests[name] = hashlib.file_digest(stream, "sha256").hexdigest()
            except OSError as error:
                raise InputError(f"{file} cannot be read any more ({error.strerror})") from error
        if len(digests) == 1:
            return next(iter(digests.values()))
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
        # a name that is not UTF-8 counts by its bytes
        return hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()


def content_hash(raw: Raw) -> str:
    """Return the first 16 hexadecimal digits of the sha256 of one raw input's decoded content.

    The shape (or the sampling rate) is part of it, so that equal bytes of another shape differ.
    """
    if isinstance(raw, str):
        data = b"text\0" + raw.encode("utf-8", "surrogatepass")
    elif isinstance(raw, Waveform):
        pcm = np.ascontiguousarray(raw.pcm, dtype="<f4")
        data = f"audio\0{raw.rate}\0{pcm.shape}\0".encode() + pcm.tobytes()
    else:
        data = f"image\0{raw.shape}\0".encode() + np.ascontiguousarray(raw).tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


def number_ids(hashes: Sequence[str]) -> tuple[str, ...]:
    """Turn content hashes into ids: the first occurrence bare, the k-th with `-k` (from 1).

    >>> number_ids(["aa", "bb", "aa"])
    ('aa', 'bb', 'aa-1')
    """
    seen: Counter[str] = Counter()
    ids = []
    for value in hashes:
        ids.append(f"{value}-{seen[value]}" if seen[value] else value)
        seen[value] += 1
    return tuple(ids)


class Samples(ABC):
    """Raw inputs that are decoded when asked for.

    Ids come from the decoded content, so they survive slicing, shuffling and lossless re-export.
    They are made on first use, which reads everything once.
    """

    modality: Modality
    classes: tuple[str, ...]
    labels: npt.NDArray[np.int64] | None
    provenance: Provenance

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def raw(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[Any]:
        """Decode some samples, in the order asked. Arrays may be shared: do not change them in place.

        Raises:
            InputError: if one cannot be decoded; the message names its row (and file).
        """

    def where(self, row: int) -> str:
        """Name the place that a sample was read from, for people."""
        return f"{self.provenance.path}, row {row}"

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """Return every sample's id."""
        return number_ids([content_hash(x) for batch in self._chunks(1024) for x in self.raw(batch)])

    def _chunks(self, size: int) -> Iterator[npt.NDArray[np.int64]]:
        for start in range(0, len(self), size):
            yield np.arange(start, min(start + size, len(self)), dtype=np.int64)

    def batches(self, size: int) -> Iterator[Batch]:
        """Yield all samples in order, `size` at a time (the last batch may be smaller)."""
        for indices in self._chunks(size):
            y = None if self.labels is None else self.labels[indices]
            yield Batch(tuple(self.ids[i] for i in indices), self.raw(indices), y)

    def select(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Samples:
        """Return a view of some samples by position. Ids stay what they are in the whole."""
        return View(self, np.asarray(indices, dtype=np.int64))

    def take(self, ids: Sequence[str]) -> Samples:
        """Return a view of some samples by id, in the order asked.

        Raises:
            InputError: if an id is not among the samples.
        """
        position = {value: i for i, value in enumerate(self.ids)}
        missing = [value for value in ids if value not in position]
        if missing:
            raise InputError(
                f"{len(missing)} of {len(ids)} ids are not in {self.provenance.path}, first {missing[0]!r}"
            )
        return self.select([position[value] for value in ids])

    def relabel(self, numbers: npt.NDArray[np.int64], classes: Sequence[str]) -> Samples:
        """Return a view in which class i has become class `numbers[i]` of `classes`."""
        view = View(self, np.arange(len(self), dtype=np.int64))
        view.classes = tuple(classes)
        view.labels = None if self.labels is None else np.asarray(numbers, dtype=np.int64)[self.labels]
        return view

    def draw(self, n: int, rng: np.random.Generator) -> Samples:
        """Return at most n samples, drawn evenly over the labelled classes, without decoding any.

        Every class gives its share as long as it has samples; what small classes lack, larger ones give.
        A draw is a set of its own: its ids are numbered within it.
        """
        order = rng.permutation(len(self))
        if self.labels is not None:
            turn = np.empty(len(self), dtype=np.int64)  # the how-manieth of its class a sample is
            labels = self.labels[order]
            for label in np.unique(labels):
                turn[labels == label] = np.arange(int((labels == label).sum()))
            order = order[np.argsort(turn, kind="stable")]
        return View(self, order[:n].astype(np.int64), own_ids=True)


class View(Samples):
    """Show some samples of another set."""

    def __init__(self, base: Samples, indices: npt.NDArray[np.int64], *, own_ids: bool = False) -> None:
        if len(indices) and (indices.min() < 0 or indices.max() >= len(base)):
            raise IndexError(f"positions must be in [0, {len(base)}), got {indices.min()} to {indices.max()}")
        self._base, self._indices, self._own_ids = base, indices, own_ids
        self.modality, self.classes, self.provenance = base.modality, base.classes, base.provenance
        self.labels = None if base.labels is None else base.labels[indices]

    def __len__(self) -> int:
        return len(self._indices)

    def where(self, row: int) -> str:
        """Name the place that a sample of the whole was read from."""
        return self._base.where(int(self._indices[row]))

    def raw(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[Any]:
        """Decode some samples of the view."""
        return self._base.raw(self._indices[np.asarray(indices, dtype=np.int64)])

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """Return the ids: those of the whole, or numbered within a draw."""
        if self._own_ids:
            return number_ids([content_hash(x) for batch in self._chunks(1024) for x in self.raw(batch)])
        return tuple(self._base.ids[i] for i in self._indices)


class InMemorySamples(Samples):
    """Samples that are already decoded.

    Args:
        x: images (n, h, w, c) or (n, h, w) uint8, or a list of raw inputs.
        labels: (n,) class numbers, or None.
        classes: class names; numbers are made up from the labels where none are given.
        path: where they came from, for people.
        sha256: of the file they came from, if known.
        files: names and places of the files they came from, to be hashed when asked for.
        notes: what was left out, shifted or guessed.
    """

    def __init__(
        self,
        x: npt.NDArray[np.uint8] | Sequence[Any],
        labels: npt.ArrayLike | None = None,
        *,
        classes: Sequence[str] | None = None,
        modality: Modality = "image",
        path: str = "<memory>",
        sha256: str | None = None,
        files: Callable[[], Mapping[str, Path]] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        if isinstance(x, np.ndarray) and modality == "image":
            if x.dtype != np.uint8:
                raise InputError(f"images are uint8 in [0, 255], got {x.dtype}")
            x = x[..., None] if x.ndim == 3 else x
        self._x = x
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        if self.labels is not None and self.labels.shape != (len(x),):
            raise InputError(f"{len(x)} samples need {len(x)} labels, got shape {self.labels.shape}")
        count = 0 if self.labels is None or not len(self.labels) else int(self.labels.max()) + 1
        self.classes = tuple(classes) if classes is not None else tuple(str(i) for i in range(count))
        if self.labels is not None and len(self.labels):
            outside = {int(self.labels.min()), count - 1} - set(range(len(self.classes)))
            if outside:
                raise InputError(f"label {outside.pop()} is not among the {len(self.classes)} classes")
        self.modality = modality
        self.provenance = Provenance(path, sha256, len(x), files=files, notes=notes)

    def __len__(self) -> int:
        return len(self._x)

    def raw(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[Any]:
        """Return some samples."""
        return [self._x[int(i)] for i in indices]
