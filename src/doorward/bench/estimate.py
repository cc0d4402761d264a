"""How long a run takes: before it by a short calibration, during it by what has been done."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import mean

import numpy as np
import torch

from doorward.bench.cache import ModelCache
from doorward.bench.plan import Planned
from doorward.bench.suite import Trial
from doorward.core.records import Record
from doorward.data import InMemorySamples, Samples
from doorward.data.samples import Waveform
from doorward.detectors.subject import Subject
from doorward.methods import registry
from doorward.models import networks
from doorward.training import TrainingSettings, train_classifier

#: Input gradients that a scan by all detectors takes for each class, and next to that, about; as measured.
GRADIENTS_PER_CLASS, GRADIENTS_BESIDE = 5_000, 19_000


class Speed(Record):
    """What one architecture does with images of one shape: images, texts or recordings a second.

    Attributes:
        gradients: of images alone.
    """

    training: float
    gradients: float | None = None


class Estimate(Record):
    """What a run has to do, and about how many seconds it takes.

    Attributes:
        cached: models that need no training.
    """

    models: int
    cached: int
    training: float
    scanning: float


def estimate(
    plan: Sequence[Planned], cache: ModelCache, *, workers: int, threads: int, device: str
) -> Estimate:
    """Estimate what is left to do; a second or so is measured for each architecture and image shape.

    An attack that changes a trained model is taken to be as long as training it; measuring and repairs are
    left out, but for the scans of these.
    Threads of this process are set for the time of the calibration, and set back.
    """
    surrogates = [one.twin for one in plan if one.twin is not None]
    models = {one.model_key: one for one in (*plan, *surrogates) if one.missing is None}
    missing = {key: one for key, one in models.items() if cache.get(key) is None}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        kinds = {(one.trial.architecture, one.contents.shape) for one in models.values() if one.contents}
        speeds = {kind: _speed(*kind, device) for kind in sorted(kinds)}
    finally:
        torch.set_num_threads(before)
    training = scanning = 0.0
    for one in missing.values():
        assert one.contents is not None
        model = one.resolved["model"]
        images = one.contents.images * model["training"]["epochs"]
        if "adversarial" in model:  # a step of the attack takes about as long as one of training
            images *= 1 + model["adversarial"]["settings"]["steps"]
        training += images / speeds[one.trial.architecture, one.contents.shape].training
    for one in plan:
        if one.contents is not None and (scans := _scans(one.trial)):
            gradients = one.contents.classes * GRADIENTS_PER_CLASS + GRADIENTS_BESIDE
            speed = speeds[one.trial.architecture, one.contents.shape].gradients
            scanning += scans * gradients / speed if speed else 0.0
    return Estimate(
        models=len(models),
        cached=len(models) - len(missing),
        training=training / workers,
        scanning=scanning / workers,
    )


def _scans(trial: Trial) -> int:
    """Return how often a trial scans a model: a repair does it before and after."""
    if trial.repair_settings is not None:
        return 2
    return int(trial.scan_settings.detectors is not None)


def _speed(architecture: str, shape: tuple[int, int, int], device: str) -> Speed:
    """Train a network on noise for a moment, and let a detector take input gradients of images."""
    samples = _noise(networks.NAMES[architecture], shape)
    settings = TrainingSettings(epochs=1)
    probe = registry.build("detector", "max-margin", {"starts": 32, "steps": 5})
    gradients = None
    for part in (samples.select(range(64)), samples):  # the first warms up
        trained = train_classifier(architecture, part, seed=0, settings=settings, device=device)
        if samples.modality == "image":
            found = probe(Subject(classifier=trained.classifier), device=device)
            gradients = found.cost.gradients / found.seconds
    return Speed(training=len(samples) / trained.record.seconds, gradients=gradients)


def _noise(modality: str, shape: tuple[int, int, int]) -> Samples:
    """Return 256 images of a shape, or as many texts of 20 words or recordings of half a second."""
    rng = np.random.default_rng(0)
    labels = np.arange(256) % 4
    if modality == "text":
        texts = [" ".join(map(str, rng.integers(1000, size=20))) for _ in labels]
        return InMemorySamples(texts, labels, modality="text")
    if modality == "audio":
        sounds = [Waveform(rng.uniform(-1, 1, 4000).astype(np.float32), 8000) for _ in labels]
        return InMemorySamples(sounds, labels, modality="audio")
    channels, height, width = shape
    return InMemorySamples(rng.integers(0, 256, (256, height, width, channels), dtype=np.uint8), labels)


class TimeLeft:
    """How long the rest takes, from how long trials of the same kind took.

    Args:
        todo: the trials to be run.
    """

    def __init__(self, todo: Sequence[Planned], *, workers: int) -> None:
        self._left = {one.key: one for one in todo if one.missing is None}
        self._workers = workers
        self._took: defaultdict[tuple[object, ...], list[float]] = defaultdict(list)

    def ended(self, one: Planned, seconds: float) -> None:
        """Note that a trial has ended, and how long it took: none if the result is another's copy."""
        self._left.pop(one.key, None)
        for kind in _kinds(one) if seconds else ():
            self._took[kind].append(seconds)

    def seconds(self) -> float | None:
        """Return about how many seconds are left; None before anything has ended, and when all has."""
        if not self._took or not self._left:
            return None
        known = [
            next(mean(self._took[k]) for k in _kinds(one) if k in self._took) for one in self._left.values()
        ]
        return sum(known) / self._workers


def _kinds(one: Planned) -> list[tuple[object, ...]]:
    """Return what a trial can be compared by, the closest first."""
    trial = one.trial
    return [(trial.group, trial.architecture), (trial.group,), (trial.architecture,), ()]
