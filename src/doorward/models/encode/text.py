"""Texts: from strings to rows of token numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from doorward.data import Samples
    from doorward.models.spec import TextSpec

#: The type of token numbers in the compact tensor.
DTYPE = torch.int32

#: The number that fills a row up behind its text.
PADDING = 0
_CHUNK = 1024


def to_tensor(samples: Samples, spec: TextSpec) -> Tensor:
    """Turn all samples into token numbers (n, 1, 1, l) int32, l being the longest text's length.

    Texts longer than the spec allows are cut as it says; shorter ones are filled up with zeros.
    """
    rows: list[list[int]] = []
    for start in range(0, len(samples), _CHUNK):
        texts = samples.raw(range(start, min(start + _CHUNK, len(samples))))
        for row in spec.tokens(texts):
            begin, end = spec.kept(len(row))
            rows.append(row[:begin] + row[len(row) - end :])
    length = max(1, max(map(len, rows), default=1))
    flat = [number for row in rows for number in (*row, *[PADDING] * (length - len(row)))]
    return torch.tensor(flat, dtype=torch.int32).view(len(rows), 1, 1, length)


def to_float(x: Tensor) -> Tensor:
    """Return token numbers as float32, which is exact for all of them."""
    return x.float()
