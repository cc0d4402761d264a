"""Text and audio classifiers to train: small enough for two cores.

Like those for images, every network ends in a plain `nn.Linear` whose input are the features. What a row is
filled up with changes no answer, so none depends on what else is in a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from doorward.core.errors import InputError
from doorward.data.samples import Samples
from doorward.models.architectures import initialise
from doorward.models.encode.text import PADDING
from doorward.models.encode.words import words
from doorward.models.spec import AudioSpec, InputSpec, TextSpec

#: Token numbers of texts, and samples a second of recordings, of the networks that are trained here.
VOCABULARY, RATE = 1 << 15, 8000
#: Tokens and seconds at most.
LONGEST_TEXT, LONGEST_SOUND = 512, 10
#: Frequencies in Hertz from which on sound is looked at, and bands that it is put into.
LOWEST, BANDS = 50.0, 40


def lengths_of(x: Tensor) -> Tensor:
    """Return how long each row is without the zeros at its end: (n, m) to (n,) int64."""
    there = (x != 0).flip(1)
    return (x.shape[1] - there.to(torch.uint8).argmax(1)) * there.any(1)


class TextCNN(nn.Module):
    """Convolve word vectors over two, three and four words, and keep the largest answer of each filter.

    Source: Y. Kim, Convolutional Neural Networks for Sentence Classification, EMNLP 2014 (arXiv 1408.5882).
    Departs from the paper: words are numbered by their hash, the vectors are learnt and have 64 values, there
    are 64 filters of each length, and word vectors are dropped out too.
    """

    LENGTHS, SIZE, FILTERS = (2, 3, 4), 64, 64

    def __init__(self, vocabulary: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, self.SIZE)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(1, self.FILTERS, (length, self.SIZE)) for length in self.LENGTHS
        )
        self.drop_words, self.drop_features = nn.Dropout(0.3), nn.Dropout(0.5)
        self.linear = nn.Linear(self.FILTERS * len(self.LENGTHS), classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, k) for token numbers (n, m)."""
        x = x[:, : max([1, *lengths_of(x).tolist()])]
        e = self.embedding(x) * (x != PADDING)[..., None]  # (n, m, d)
        e = self.drop_words(e)[:, None]  # (n, 1, m, d)
        found = []
        for length, convolution in zip(self.LENGTHS, self.convolutions, strict=True):
            # so that each word is seen in every place, and every text has a place without any
            z = F.relu(convolution(F.pad(e, (0, 0, length - 1, length))))  # (n, f, m + length, 1)
            found.append(z.amax((2, 3)))
        y: Tensor = self.linear(self.drop_features(torch.cat(found, 1)))  # (n, 3f) -> (n, k)
        return y


class LogMel(nn.Module):
    """Turn samples (n, m) into the logarithm of their power in bands of the mel scale: (n, 1, bands, t).

    Windows of 32 ms, 10 ms apart; the bands are triangles, evenly spaced on the scale of O'Shaughnessy (2595
    log10(1 + f / 700)) from 50 Hz to half the sampling rate.
    """

    def __init__(self, rate: int) -> None:
        super().__init__()
        self.rate = rate
        self.window, self.hop = 1 << round(math.log2(rate * 0.032)), rate // 100

    def forward(self, x: Tensor) -> Tensor:
        """Return the logarithms."""
        with torch.autocast(x.device.type, enabled=False):  # sums of squares need the digits
            x = F.pad(x.float(), (self.window // 2, self.window // 2))  # (n, m + window)
            waves = torch.stft(
                x,
                self.window,
                self.hop,
                window=torch.hann_window(self.window, device=x.device),
                center=False,
                return_complex=True,
            )  # (n, bins, t)
            positive_control = waves.real.square() + waves.imag.square()
            return torch.log(mel_filters(self.rate, self.window).to(x.device) @ positive_control + 1e-5)[
                :, None
            ]


@lru_cache(8)
def mel_filters(rate: int, window: int) -> Tensor:
    """Return how much each frequency of a window's transform counts for each band: (bands, bins)."""

    def mel(f: float) -> float:
        return 2595 * math.log10(1 + f / 700)

    edges = np.linspace(mel(LOWEST), mel(rate / 2), BANDS + 2)
    hertz = 700 * (10 ** (edges / 2595) - 1)  # (bands + 2,)
    bins = np.linspace(0, rate / 2, window // 2 + 1)
    up = (bins - hertz[:-2, None]) / (hertz[1:-1] - hertz[:-2])[:, None]  # (bands, bins)
    down = (hertz[2:, None] - bins) / (hertz[2:] - hertz[1:-1])[:, None]
    return torch.from_numpy(np.maximum(0, np.minimum(up, down))).float()


class AudioCNN(nn.Module):
    """Convolve and pool the log-mel spectrogram of a recording; take mean and maximum over its time.

    Silence in 16 bits at the end of a row is what rows are filled up with, so it does not count.
    """

    WIDTHS = (16, 32, 64)
    #: Frames of silence behind the longest recording: more than the last that counts can see.
    BEHIND = 16

    def __init__(self, rate: int, classes: int) -> None:
        super().__init__()
        self.spectrogram = LogMel(rate)
        layers: list[nn.Module] = [nn.BatchNorm2d(1)]
        inner = 1
        for outer in self.WIDTHS:
            layers += [nn.Conv2d(inner, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer), nn.ReLU()]
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
            inner = outer
        self.convolutions = nn.Sequential(*layers)
        self.linear = nn.Linear(2 * inner * math.ceil(BANDS / 2 ** len(self.WIDTHS)), classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, k) for samples (n, m) in [-1, 1]."""
        lengths, hop = lengths_of(x), self.spectrogram.hop  # (n,)
        x = F.pad(x[:, : max([0, *lengths.tolist()])], (0, self.BEHIND * hop))
        z = self.convolutions(self.spectrogram(x))  # (n, 64, bands / 8, t / 8)
        counts = lengths // hop // 2 ** len(self.WIDTHS) + 1  # (n,)
        z = z * (torch.arange(z.shape[3], device=z.device) < counts[:, None])[:, None, None]
        mean, most = z.sum(3) / counts[:, None, None], z.amax(3)  # what does not count is 0, and none is less
        y: Tensor = self.linear(torch.cat([mean, most], 1).flatten(1))  # (n, d) -> (n, k)
        return y


def measure_text(samples: Samples) -> TextSpec:
    """Return the spec of a model for these texts: a quarter longer than the longest, up to 512 words.

    Of longer ones it reads the beginning and the end, where what matters is more often than in the middle
    (C. Sun et al., How to Fine-Tune BERT for Text Classification?, 2019, arXiv 1905.05583).
    """
    longest = max(
        (len(words(text)) for i in range(0, len(samples), 1024) for text in _part(samples, i)), default=0
    )
    width = min(LONGEST_TEXT, max(16, longest + longest // 4))
    return TextSpec(width=width, vocabulary=VOCABULARY, cut="middle")


def measure_audio(samples: Samples) -> AudioSpec:
    """Return the spec of a model for these recordings: 8 kHz, a quarter longer than the longest, up to 10 s.

    Of longer ones it hears the beginning and the end, as of texts.
    """
    longest = max(
        len(sound.pcm) / sound.rate for i in range(0, len(samples), 64) for sound in _part(samples, i, 64)
    )
    tenths = min(10 * LONGEST_SOUND, max(1, math.ceil(12.5 * longest)))
    return AudioSpec(width=tenths * RATE // 10, rate=RATE, cut="middle")


def _part(samples: Samples, start: int, size: int = 1024) -> list[Any]:
    return samples.raw(range(start, min(start + size, len(samples))))


_BUILDERS: dict[str, Callable[[Any, int], nn.Module]] = {
    "text-cnn": lambda spec, classes: TextCNN(spec.vocabulary, classes),
    "audio-cnn": lambda spec, classes: AudioCNN(spec.rate, classes),
}

#: The names that `build` knows, and the spec that each takes.
NAMES: dict[str, type[InputSpec]] = {"text-cnn": TextSpec, "audio-cnn": AudioSpec}


def build(name: str, spec: InputSpec, *, classes: int, generator: torch.Generator | None = None) -> nn.Module:
    """Return a network with random weights, in training mode.

    Args:
        name: one of `NAMES`; the spec is of its class.
        generator: source of the weights; seed 0 if None. The global generator is left alone.

    Raises:
        InputError: if there are fewer than two classes.
    """
    if classes < 2:
        raise InputError(f"{name} takes 2 classes at least; got {classes}")
    with torch.device("meta"):  # torch's own initialisation would draw from the global generator
        network = _BUILDERS[name](spec, classes)
    network.to_empty(device="cpu")
    generator = generator or torch.Generator().manual_seed(0)
    for part in network.children():
        if isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=0.1, generator=generator)
        else:
            initialise(part, generator)
    return network
