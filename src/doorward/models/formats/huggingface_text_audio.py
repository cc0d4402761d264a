"""Text and audio classifiers of transformers, with the tokenizer or feature extractor that they come with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from doorward.core.errors import InputError
from doorward.models.formats.input_options import first_line
from doorward.models.spec import AudioSpec, TextSpec

#: Tokens at most where nothing tells; seconds of sound at most, as the longest inputs of common models.
LONGEST_TEXT, LONGEST_SOUND = 512, 30
#: Shorter recordings, in seconds, are filled up with silence: models need some frames.
SHORTEST_SOUND = 0.1
#: Where tokenizers keep their words; without any, transformers would make up an empty one.
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model")


class TextModule(nn.Module):
    """Run a text model on rows of token numbers (n, m), raised by one so that 0 is behind a text's end."""

    def __init__(self, model: nn.Module, padding: int) -> None:
        super().__init__()
        self.model, self.padding = model, padding

    def forward(self, rows: Tensor) -> Tensor:
        """Return the model's own outputs (n, k)."""
        there = rows > 0
        there = there[:, : max(1, int(there.any(0).sum()))]  # what is behind the longest is left out
        rows = rows[:, : there.shape[1]]
        tokens = torch.where(there, rows - 1, self.padding)
        there[:, 0] = True  # attention to nothing at all is no number
        y: Tensor = self.model(input_ids=tokens, attention_mask=there.long()).logits
        return y


class AudioModule(nn.Module):
    """Run an audio model on one row of samples (1, m), through its own feature extractor.

    Silence in 16 bits at the end of a row is what rows are filled up with, so it is left out.
    """

    def __init__(self, model: nn.Module, extractor: Any, rate: int) -> None:
        super().__init__()
        self.model, self.extractor, self.rate = model, extractor, rate

    def forward(self, rows: Tensor) -> Tensor:
        """Return the model's own outputs (1, k)."""
        (row,) = rows.detach().float().cpu().numpy()
        sound = np.flatnonzero(row)
        end = max(int(sound[-1]) + 1 if len(sound) else 0, round(SHORTEST_SOUND * self.rate))
        row = np.pad(row[:end], (0, max(0, end - len(row))))
        features = self.extractor(row, sampling_rate=self.rate, return_tensors="pt")
        y: Tensor = self.model(**{name: value.to(rows.device) for name, value in features.items()}).logits
        return y


def text_spec(model: nn.Module, path: Path) -> tuple[TextSpec, TextModule]:
    """Return what a text model takes, by its tokenizer, and the module that takes it.

    Raises:
        InputError: if there is no tokenizer that can be read.
    """
    import transformers

    if not any(file for pattern in VOCABULARIES for file in path.glob(pattern)):
        raise InputError(f"{path}: no tokenizer: expected one of {', '.join(VOCABULARIES)}")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # files that are missing or damaged fail in many kinds
        raise InputError(f"{path}: its tokenizer cannot be made: {first_line(error)}") from error
    places = [
        layer.num_embeddings - (0 if layer.padding_idx is None else layer.padding_idx + 1)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Embedding) and "position" in name
    ]
    stated = int(min(tokenizer.model_max_length, 1 << 30))  # where nothing is stated, it is 10 to the 30th
    places += [most] if (most := getattr(model.config, "max_position_embeddings", None) or 0) > 0 else []
    longest = min([stated if stated < 1 << 30 else LONGEST_TEXT, *places])
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= vocabulary:
        raise InputError(
            f"{path}: the tokenizer has tokens up to {highest}, and the model {vocabulary:,} of them"
        )

    def encode(texts: Sequence[str]) -> list[list[int]]:
        rows = tokenizer(list(texts), truncation=True, max_length=longest)["input_ids"]
        return [[token + 1 for token in row] for row in rows]

    # the model's own comes first: some take what is before the padding for the last token
    known = [getattr(model.config, "pad_token_id", None), tokenizer.pad_token_id, 0]
    padding = next(number for number in known if number is not None)
    return TextSpec(width=longest, vocabulary=vocabulary + 1, encode=encode), TextModule(model, padding)


def audio_spec(model: nn.Module, path: Path) -> tuple[AudioSpec, AudioModule]:
    """Return what an audio model takes, by its feature extractor, and the module that takes it.

    Raises:
        InputError: if there is no feature extractor that can be read.
    """
    import transformers

    try:
        extractor = transformers.AutoFeatureExtractor.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
        rate = int(extractor.sampling_rate)
        spec = AudioSpec(width=LONGEST_SOUND * rate, rate=rate)
    except Exception as error:  # as above
        raise InputError(f"{path}: its feature extractor cannot be made: {first_line(error)}") from error
    return spec, AudioModule(model, extractor, rate)
