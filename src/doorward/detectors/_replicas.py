"""Replicas of inputs: images and recordings with others laid over them, texts with words of others.

Pure functions on what `models.encode` makes of samples.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from doorward.models.encode.text import PADDING


def superimpose(inputs: Tensor, overlays: Tensor, *, weights: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Return every input (b, c, h, w) with every overlay (m, c, h, w) laid over it: (b, m, c, h, w).

    Images are uint8 and recordings int16. Sums beyond the lowest or the highest level stay there, as in
    OpenCV's `addWeighted`. Of two recordings the shorter one is filled up with silence.
    """
    width = max(inputs.shape[-1], overlays.shape[-1])
    inputs, overlays = (pad(x, (0, width - x.shape[-1])) for x in (inputs, overlays))
    levels = torch.iinfo(inputs.dtype)
    if weights == (1.0, 1.0):
        wide = torch.int16 if inputs.dtype == torch.uint8 else torch.int32
        total: Tensor = inputs[:, None].to(wide) + overlays.to(wide)
        return total.clamp_(levels.min, levels.max).to(inputs.dtype)
    mixed = weights[0] * inputs[:, None].double() + weights[1] * overlays.double()
    return mixed.round_().clamp_(levels.min, levels.max).to(inputs.dtype)


def rank_words(texts: Tensor) -> Tensor:
    """Return the different words (m, l) of texts (m, 1, 1, l), those of the highest TF-IDF first, then 0.

    TF is how often a text has a word, and IDF the logarithm of how many texts there are to each with it.
    """
    rows = texts.flatten(1).numpy()
    ranked = np.full_like(rows, PADDING)
    own = [np.unique(row[row != PADDING], return_counts=True) for row in rows]
    every, containing = np.unique(np.concatenate([words for words, _ in own]), return_counts=True)
    for row, (words, counts) in zip(ranked, own, strict=True):
        rarity = np.log(len(rows) / containing[np.searchsorted(every, words)])
        row[: len(words)] = words[np.argsort(-counts * rarity, kind="stable")]
    return torch.from_numpy(ranked)


def common_words(words: Tensor) -> Tensor:
    """Return the words (v,) that every row of (m, v) has, then 0.

    Tokenizers put some at the beginning and the end of each text.
    """
    different, containing = np.unique(words.numpy(), return_counts=True)  # a row has each of its words once
    found = different[(containing == len(words)) & (different != PADDING)]
    return pad(torch.from_numpy(found), (0, words.shape[1] - len(found)))


def replace_words(texts: Tensor, words: Tensor, turns: Tensor, common: Tensor, *, share: float) -> Tensor:
    """Return every text (b, 1, 1, l) with words of every other one in some places: (b, m, 1, 1, l).

    Args:
        words: (m, v), what is put in, the first ones first, with zeros behind; again from the first if there
            are too few.
        turns: (m, w), w >= l, the turn of each place to be replaced, another order in each row.
        common: (v,), words that stay, with zeros among them.
        share: of the words that may be replaced.
    """
    rows = texts.flatten(1)
    stay = (rows == PADDING) | torch.isin(rows, common)  # (b, l)
    turn = turns[:, : rows.shape[1]] + turns.shape[1] * stay[:, None]  # what stays comes last
    turn = turn.argsort(2).argsort(2)  # (b, m, l)
    known = (words != PADDING).sum(1)[:, None]  # (m, 1)
    put = words[torch.arange(len(words))[:, None], turn % known.clamp_min(1)]
    count = (share * (~stay).sum(1)).round()[:, None, None]
    return torch.where((turn < count) & (known > 0), put, rows[:, None])[:, :, None, None]
