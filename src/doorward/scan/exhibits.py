"""Flagged samples next to kept ones, for a reader's own eyes: pictures, words, spectrograms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from doorward.core.errors import InputError
from doorward.core.records import Evidence, FlaggedSample, Picture, Table, Text
from doorward.data import Samples
from doorward.data.samples import Waveform
from doorward.models.encode.audio import resample
from doorward.models.encode.image import from_raw, picture, side_by_side
from doorward.models.encode.words import words
from doorward.models.sequences import LogMel

#: Samples on each sheet, and of which the mean image is taken at most.
SHOWN, AVERAGED = 10, 500
#: Classes that are drawn at most.
DRAWN = 3
#: Words and phrases that are listed, and how many words a phrase has at most.
LISTED, LONGEST = 15, 4
#: Texts that are counted at most, and that are quoted.
COUNTED, QUOTED = 2_000, 3
#: Samples a second at which recordings are drawn.
RATE = 8_000


def exhibits(
    train: Samples, flagged: Sequence[FlaggedSample], classes: Sequence[str]
) -> tuple[Evidence, ...]:
    """Return flagged samples next to kept ones of the same label, for the labels that have most of them."""
    assert train.labels is not None
    drawn: list[Evidence] = []
    counts = Counter(one.label for one in flagged)
    every = {one.row for one in flagged}
    for label, _ in counts.most_common(DRAWN):
        best = sorted((one for one in flagged if one.label == label), key=lambda one: -(one.score or 0.0))
        rows = [one.row for one in best]
        kept = [row for row in np.flatnonzero(train.labels == label).tolist() if row not in every]
        drawn += _SHOW[train.modality](train, rows, kept, classes[label])
    return tuple(drawn)


def _images(train: Samples, rows: list[int], kept: list[int], name: str) -> list[Evidence]:
    sheets = []
    for what, chosen in (("Flagged", rows), ("Kept", kept)):
        if not chosen:
            continue
        try:
            shown = from_raw(train.raw(_spread(chosen, AVERAGED)))  # (n, c, h, w)
        except InputError:  # images of several sizes have no mean
            shown = from_raw(train.raw(chosen[:1]))
        sheets.append(
            Picture(
                title=f"{what}: the mean of {len(shown):,} samples of {name}",
                alt=f"The mean of {what.lower()} images with label {name}",
                png=picture(shown.mean(0)),
            )
        )
        sheets.append(
            Picture(
                title=f"{what} samples of {name}",
                alt=f"{min(SHOWN, len(shown))} {what.lower()} images with label {name}",
                png=picture(side_by_side(list(shown[:SHOWN]))),
            )
        )
    return [*sheets]


def _texts(train: Samples, rows: list[int], kept: list[int], name: str) -> list[Evidence]:
    """Return the words and phrases that are commoner in the flagged texts, and some of these."""
    parts = [train.raw(_spread(chosen, COUNTED)) if chosen else [] for chosen in (rows, kept)]
    inside, outside = (_document_counts(part) for part in parts)
    n, m = len(parts[0]), len(parts[1])
    least = max(2, n // 10)

    def weight(phrase: str) -> float:
        """Return the log ratio of the shares of texts that have it, times its share."""
        share = inside[phrase] / n
        return float(share * np.log((share + 1e-3) / (outside[phrase] / max(1, m) + 1e-3)))

    often = (p for p, count in inside.items() if count >= least)
    found = sorted(often, key=lambda phrase: (-weight(phrase), phrase))
    listed = [p for p in _longest(found[: 4 * LISTED], inside) if weight(p) > 0][:LISTED]
    return [
        Table(
            title=f"Words and phrases of flagged texts with label {name}",
            columns=("phrase", "of flagged texts", "of kept texts"),
            rows=tuple((p, f"{inside[p] / n:.0%}", f"{outside[p] / max(1, m):.0%}") for p in listed),
        ),
        Text(
            title=f"Flagged texts with label {name}", text="\n".join(str(text) for text in parts[0][:QUOTED])
        ),
    ]


def _document_counts(texts: Sequence[str]) -> Counter[str]:
    """Return in how many texts each word and phrase occurs."""
    counts: Counter[str] = Counter()
    for text in texts:
        own = words(text)
        counts.update(
            {
                " ".join(own[i : i + size])
                for size in range(1, LONGEST + 1)
                for i in range(len(own) - size + 1)
            }
        )
    return counts


def _longest(phrases: Sequence[str], counts: Counter[str]) -> list[str]:
    """Leave out phrases that stand in a longer one and occur hardly more often."""

    def within(phrase: str) -> bool:
        return any(
            phrase != other and f" {phrase} " in f" {other} " and counts[other] >= 0.9 * counts[phrase]
            for other in phrases
        )

    return [phrase for phrase in phrases if not within(phrase)]


def _recordings(train: Samples, rows: list[int], kept: list[int], name: str) -> list[Evidence]:
    sheets: list[Evidence] = []
    for what, chosen in (("Flagged", rows), ("Kept", kept)):
        if not chosen:
            continue
        drawn = [spectrogram(one) for one in train.raw(chosen[:SHOWN])]
        sheets.append(
            Picture(
                title=f"{what} recordings of {name}: frequency upwards, time to the right",
                alt=f"Spectrograms of {len(drawn)} {what.lower()} recordings with label {name}",
                png=picture(side_by_side(drawn)),
            )
        )
    return sheets


def spectrogram(sound: Waveform) -> Tensor:
    """Return the log-mel spectrogram of at most a second as a grey picture (1, bands, t)."""
    pcm = sound.pcm if sound.pcm.ndim == 1 else sound.pcm.mean(1)
    row: npt.NDArray[np.float32] = np.zeros(RATE, dtype=np.float32)
    heard = resample(pcm, sound.rate, RATE)[:RATE]
    row[: len(heard)] = heard
    bands = LogMel(RATE)(torch.from_numpy(row)[None])[0].flip(1)  # (1, bands, t), low ones at the bottom
    low, high = bands.amin(), bands.amax()
    grey: Tensor = (bands - low) / (high - low).clamp_min(1e-6)
    return grey


def _spread(rows: list[int], most: int) -> list[int]:
    """Return at most so many of the rows: the first ones, which come first on a sheet, then evenly spaced."""
    if len(rows) <= most:
        return rows
    rest = rows[SHOWN:]
    return rows[:SHOWN] + [rest[i] for i in np.linspace(0, len(rest) - 1, most - SHOWN).astype(int)]


_SHOW: dict[str, Callable[[Samples, list[int], list[int], str], list[Any]]] = {
    "image": _images,
    "text": _texts,
    "audio": _recordings,
}
