"""Samples that lie encoded somewhere and are decoded when asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from doorward.core.errors import InputError, MissingExtra
from doorward.data.columns import Kind, sniff
from doorward.data.decode import decode_audio, decode_image, deep_maximum
from doorward.data.labels import Labels
from doorward.data.request import reading, reason
from doorward.data.samples import Modality, Provenance, Raw, Samples

#: Bits of 16 that images may use, and images by which it is told how many they do.
DEPTHS, SURVEYED = (8, 10, 12, 14, 16), 64
#: The largest value, of 255, of images that count as nearly black, and how many of them make a note.
DARK, MANY = 15, 16


class Store(Protocol):
    """Is where encoded samples lie."""

    def __len__(self) -> int: ...

    def cells(self, rows: npt.NDArray[np.int64]) -> list[Any]:
        """Return what lies in some rows, which ascend."""

    def load(self, cell: Any, row: int) -> bytes | str | None:
        """Return the file or the text that a cell holds, None if it is empty."""

    def where(self, row: int) -> str:
        """Name a row for messages."""


class StoredSamples(Samples):
    """Decode samples from a store, each batch in the order of the store."""

    def __init__(self, store: Store, modality: Modality, labels: Labels, provenance: Provenance) -> None:
        self._store, self.modality, self.provenance = store, modality, provenance
        self.labels, self.classes = labels.numbers, labels.classes
        decoders: dict[Modality, Callable[[Any], Raw]] = {
            "image": lambda data: decode_image(data, lambda: self._depth),
            "audio": decode_audio,
            "text": _text,
        }
        self._decode = decoders[modality]
        self._dark = 0  # images decoded so far, none of which has a bright pixel; -1 once one has

    def __len__(self) -> int:
        return len(self._store)

    def raw(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[Any]:
        """Decode some samples, in the order asked. Arrays may be shared: do not change them in place."""
        rows, back = np.unique(np.asarray(indices, dtype=np.int64), return_inverse=True)
        if len(rows) and (rows[0] < 0 or rows[-1] >= len(self)):
            raise IndexError(f"positions must be in [0, {len(self)}), got {rows[0]} to {rows[-1]}")
        cells = self._store.cells(rows)
        decoded = [self._one(cell, int(row)) for cell, row in zip(cells, rows, strict=True)]
        if self.modality == "image" and self._dark >= 0:
            self._look_for_light(decoded)
        return [decoded[i] for i in back]

    def where(self, row: int) -> str:
        """Name the file, or the row of a file, that a sample lies in."""
        return self._store.where(row)

    @cached_property
    def _depth(self) -> int:
        """Return how many bits images of 16 bits use, by the largest value in some of them."""
        rows = np.unique(np.linspace(0, len(self) - 1, min(len(self), SURVEYED)).astype(np.int64))
        largest = 0
        for cell, row in zip(self._store.cells(rows), rows.tolist(), strict=True):
            with suppress(Exception):  # what cannot be decoded is told when it is asked for
                data = self._store.load(cell, row)
                largest = max(largest, deep_maximum(data) or 0) if isinstance(data, bytes) else largest
        depth = next(bits for bits in DEPTHS if largest < 1 << bits)
        if depth < 16:
            self.provenance.note(
                f"{self.provenance.path}: images of 16 bits have no value above {largest:,}: they are taken "
                f"for images of {depth} bits"
            )
        return depth

    def _look_for_light(self, images: Sequence[Any]) -> None:
        """Note it once if the first images that are decoded are all nearly black."""
        if any(int(image.max()) > DARK for image in images):
            self._dark = -1
            return
        self._dark += len(images)
        if self._dark >= MANY:
            self._dark = -1
            self.provenance.note(nearly_black(self.provenance.path, f"{DARK} of 255"))

    def _one(self, cell: Any, row: int) -> Raw:
        data: bytes | str | None = None
        try:
            data = self._store.load(cell, row)
            if data is None:
                raise InputError("it is empty")
            return self._decode(data)
        except MissingExtra:
            raise
        except Exception as error:  # damaged bytes make decoders throw anything
            content = f", id {hashlib.sha256(data).hexdigest()[:16]}" if isinstance(data, bytes) else ""
            raise InputError(
                f"{self._store.where(row)}{content}: this {self.modality} cannot be decoded ({reason(error)})"
            ) from error


def modality_of(kind: Kind, store: Store) -> Modality:
    """Return the modality of a column; a look at the first files tells where no feature does.

    Raises:
        InputError: if a file cannot be read.
    """
    if kind != "encoded":
        return cast(Modality, kind)
    for row in range(min(len(store), 100)):
        with reading(store.where(row), "a media file"):
            data = store.load(store.cells(np.array([row]))[0], row)
        if isinstance(data, bytes):
            return sniff(data)
    return "image"


def nearly_black(where: str, bound: str) -> str:
    """Return the note that images hold no value above a bound."""
    return f"{where}: the images are nearly black, with no value above {bound}: do they use another range?"


def _text(data: bytes | str) -> str:
    return data if isinstance(data, str) else data.decode()
