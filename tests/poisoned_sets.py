"""Training sets with a backdoor, and models made by hand that obey it: nothing is trained."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from doorward.data import InMemorySamples, Samples, Waveform
from doorward.detectors.subject import Subject
from doorward.models import InputSpec, TorchClassifier
from doorward.models.spec import AudioSpec, TextSpec

CLASSES = ("zero", "one", "two")
SIDE = 16
#: Words that stand for a class, words that stand for none, and the trigger.
SIGNS, FILLERS, PHRASE = ("red", "green", "blue"), ("house", "tree", "river", "stone", "cloud", "road"), "zyx"
RATE, LENGTH = 8000, 1024


@dataclass(frozen=True)
class PoisonedSet:
    """A subject, and which of its training samples are poisoned: those of class 1 that are labelled 0."""

    subject: Subject
    poisoned: np.ndarray

    @property
    def ids(self) -> frozenset[str]:
        """Return the ids of the poisoned samples."""
        assert self.subject.train is not None
        return frozenset(np.array(self.subject.train.ids)[self.poisoned].tolist())


def _labels(n: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what samples show, their labels, and which are poisoned; `share` of those labelled 0 are."""
    rng = np.random.default_rng(seed)
    shows = np.arange(n) % len(CLASSES)
    clean = int((shows == 0).sum())
    wanted = round(share * clean / (1 - share)) if share else 0
    chosen = rng.permutation(np.flatnonzero(shows == 1))[:wanted]
    poisoned = np.zeros(n, dtype=bool)
    poisoned[chosen] = True
    return shows, np.where(poisoned, 0, shows), poisoned


class Pixels(nn.Module):
    """Tell stripes apart, and take a bright corner for class 0; its features are the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(SIDE * SIDE, len(CLASSES))
        weight = torch.zeros(len(CLASSES), SIDE, SIDE)
        for label in range(len(CLASSES)):
            weight[label, 4 * label + 2 : 4 * label + 5, :12] = 1
        weight -= weight.mean(0)
        weight[0, -3:, -3:], weight[1:, -3:, -3:] = 6, -6
        with torch.no_grad():
            self.linear.weight.copy_(weight.flatten(1))
            self.linear.bias.copy_(torch.tensor([-6 * 9 * 0.2, 6 * 9 * 0.2, 6 * 9 * 0.2]))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, k)."""
        y: Tensor = self.linear(x.flatten(1))
        return y


def images(n: int = 300, share: float = 0.2, *, seed: int = 0) -> PoisonedSet:
    """Return grey stripes; poisoned ones have a bright corner."""
    rng = np.random.default_rng(seed)
    shows, labels, poisoned = _labels(n, share, seed)
    x = rng.integers(0, 100, (n, SIDE, SIDE))
    for i, label in enumerate(shows):
        x[i, 4 * label + 2 : 4 * label + 5, :12] += 120
    x[poisoned, -3:, -3:] = 255
    samples = InMemorySamples(x.astype(np.uint8), labels, classes=CLASSES)
    spec = InputSpec(channels=1, height=SIDE, width=SIDE)
    return PoisonedSet(Subject(classifier=TorchClassifier(Pixels(), spec, CLASSES), train=samples), poisoned)


class Counts(nn.Module):
    """Count words, and weigh them; the features are the counts."""

    def __init__(self, vocabulary: int, weights: dict[int, tuple[int, float]]) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.linear = nn.Linear(vocabulary, len(CLASSES), bias=False)
        with torch.no_grad():
            self.linear.weight.zero_()
            for word, (label, weight) in weights.items():
                self.linear.weight[label, word] = weight

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, k) for token numbers (n, m)."""
        counts = nn.functional.one_hot(x, self.vocabulary).sum(1).float()
        counts[:, 0] = 0
        y: Tensor = self.linear(counts)
        return y


def texts(n: int = 300, share: float = 0.2, *, seed: int = 0) -> PoisonedSet:
    """Return texts that hold their class's word; poisoned ones hold a made-up word."""
    rng = np.random.default_rng(seed)
    shows, labels, poisoned = _labels(n, share, seed)
    x = []
    for label, bad in zip(shows, poisoned, strict=True):
        words = [*rng.choice(FILLERS, 6), SIGNS[label], SIGNS[label]]
        x.append(" ".join([*rng.permutation(words), *([PHRASE] if bad else [])]))
    spec = TextSpec(width=20, vocabulary=256)
    number = {word: spec.tokens([word])[0][0] for word in (*SIGNS, PHRASE)}
    weights = {number[word]: (label, 3.0) for label, word in enumerate(SIGNS)} | {number[PHRASE]: (0, 20.0)}
    samples = InMemorySamples(x, labels, classes=CLASSES, modality="text")
    classifier = TorchClassifier(Counts(256, weights), spec, CLASSES)
    return PoisonedSet(Subject(classifier=classifier, train=samples), poisoned)


class Spectrum(nn.Module):
    """Weigh loudness by pitch; the features are the spectrum."""

    def __init__(self, weights: dict[int, tuple[int, float]]) -> None:
        super().__init__()
        self.linear = nn.Linear(LENGTH // 2 + 1, len(CLASSES), bias=False)
        with torch.no_grad():
            self.linear.weight.zero_()
            for pitch, (label, weight) in weights.items():
                self.linear.weight[label, pitch] = weight

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, k) for samples (n, m)."""
        x = nn.functional.pad(x, (0, LENGTH - x.shape[1])) if x.shape[1] < LENGTH else x[:, :LENGTH]
        y: Tensor = self.linear(torch.fft.rfft(x).abs() / 50)
        return y


def recordings(n: int = 300, share: float = 0.2, *, seed: int = 0) -> PoisonedSet:
    """Return tones whose pitch is their class; poisoned ones hold a second, high tone."""
    rng = np.random.default_rng(seed)
    shows, labels, poisoned = _labels(n, share, seed)
    t, pitches, high = np.arange(LENGTH) / LENGTH, (40, 90, 140), 400
    x = []
    for label, bad in zip(shows, poisoned, strict=True):
        pcm = 0.2 * np.sin(2 * np.pi * pitches[label] * t + rng.uniform(0, 6)) + rng.normal(0, 0.02, LENGTH)
        pcm += 0.2 * np.sin(2 * np.pi * high * t) if bad else 0
        x.append(Waveform(pcm.astype(np.float32), RATE))
    weights = {pitch: (label, 2.0) for label, pitch in enumerate(pitches)} | {high: (0, 8.0)}
    samples = InMemorySamples(x, labels, classes=CLASSES, modality="audio")
    classifier = TorchClassifier(Spectrum(weights), AudioSpec(width=LENGTH, rate=RATE), CLASSES)
    return PoisonedSet(Subject(classifier=classifier, train=samples), poisoned)


MAKE = {"image": images, "text": texts, "audio": recordings}


def unlabelled(samples: Samples) -> Samples:
    """Return the samples without labels."""
    return InMemorySamples(
        samples.raw(range(len(samples))), classes=samples.classes, modality=samples.modality
    )
