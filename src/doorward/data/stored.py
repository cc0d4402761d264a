"""Samples that lie encoded somewhere and are decoded when asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from doorward.core.errors import InputError, MissingExtra
from doorward.data.columns import Kind, sniff
from doorward.data.decode import decode_audio, decode_image
from doorward.data.labels import Labels
from doorward.data.request import reading, reason
from doorward.data.samples import Modality, Provenance, Raw, Samples


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
        self._decode = _DECODERS[modality]

    def __len__(self) -> int:
        return len(self._store)

    def raw(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[Any]:
        """Decode some samples, in the order asked. Arrays may be shared: do not change them in place."""
        rows, back = np.unique(np.asarray(indices, dtype=np.int64), return_inverse=True)
        if len(rows) and (rows[0] < 0 or rows[-1] >= len(self)):
            raise IndexError(f"positions must be in [0, {len(self)}), got {rows[0]} to {rows[-1]}")
        cells = self._store.cells(rows)
        decoded = [self._one(cell, int(row)) for cell, row in zip(cells, rows, strict=True)]
        return [decoded[i] for i in back]

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


def _text(data: bytes | str) -> str:
    return data if isinstance(data, str) else data.decode()


_DECODERS: dict[Modality, Callable[[Any], Raw]] = {
    "image": decode_image,
    "audio": decode_audio,
    "text": _text,
}
