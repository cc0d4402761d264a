"""What training is asked to do, and what it did."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from doorward.core.records import Rate, Record


class TrainingSettings(Record):
    """How to train.

    Attributes:
        momentum: of SGD (Nesterov); AdamW has its own.
        schedule: of the learning rate over all steps; one-cycle climbs for a quarter of them and then falls.
        augment: `none`; `shift` moves images by up to a sixteenth of their side; `shift-flip` mirrors half of
            them besides (not for signs, digits or text).
        precision: `auto` is bfloat16 where the device computes in it natively, else float32. Weights are
            float32 always.
    """

    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(3e-3, gt=0)
    weight_decay: float = Field(1e-2, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    epochs: int = Field(5, ge=1)
    batch_size: int = Field(128, ge=1)
    schedule: Literal["one-cycle", "cosine", "constant"] = "one-cycle"
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    augment: Literal["none", "shift", "shift-flip"] = "none"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"

    def rate_at(self, progress: float) -> float:
        """Return the learning rate when this share [0, 1] of all steps is done.

        >>> [round(TrainingSettings(learning_rate=1).rate_at(t), 2) for t in (0, 0.25, 0.625, 1)]
        [0.04, 1.0, 0.5, 0.0]
        """
        if self.schedule == "constant":
            return self.learning_rate
        if self.schedule == "cosine":
            return self.learning_rate * (1 + math.cos(math.pi * progress)) / 2
        climb, start = 0.25, 0.04
        if progress < climb:
            return self.learning_rate * (start + (1 - start) * progress / climb)
        return self.learning_rate * (1 + math.cos(math.pi * (progress - climb) / (1 - climb))) / 2


#: Learning rates of AdamW that were best on Fashion-MNIST, MNIST, GTSRB and CIFAR-10.
_LEARNING_RATES = {"small-cnn": 3e-3, "vgg": 2e-3, "resnet-8": 1e-2, "resnet-14": 1e-2, "resnet-18": 2e-3}


#: How often texts and recordings go through in all, and how fast they are learnt.
_ROWS: dict[str, tuple[int, float]] = {"text-cnn": (34_000, 3e-3), "audio-cnn": (22_000, 1e-2)}


def default_settings(architecture: str, *, images: int, side: int) -> TrainingSettings:
    """Return settings that train an architecture of `doorward.models.networks` well in little time.

    About 120,000 images go through, in 3 to 40 epochs; few or larger images are moved a little. Of texts and
    recordings a third as many do.

    Args:
        images: number of training images, texts or recordings.
        side: the shorter side of the images in pixels.
    """
    if architecture in _ROWS:
        through, learning_rate = _ROWS[architecture]
        return TrainingSettings(
            learning_rate=learning_rate,
            epochs=min(40, max(4, round(through / max(1, images)))),
            batch_size=64 if images >= 2_000 else 16,
        )
    return TrainingSettings(
        learning_rate=_LEARNING_RATES.get(architecture, 2e-3),
        epochs=min(40, max(3, round(120_000 / max(1, images)))),
        batch_size=128 if images >= 20_000 else 64 if images >= 2_000 else 16,
        augment="shift" if side >= 32 or images < 10_000 else "none",
    )


@dataclass(frozen=True)
class TrainingProgress:
    """A callback how far training is; the loss is the mean of the last whole epoch, None before."""

    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float | None


class EpochRecord(Record):
    """One epoch's mean loss and accuracy on the training images as they went through."""

    loss: float
    accuracy: float


class TrainingRecord(Record):
    """What a training run did."""

    settings: TrainingSettings
    images: int = Field(description="Training images per epoch")
    steps: int
    epochs: tuple[EpochRecord, ...]
    test_accuracy: Rate | None
    precision: Literal["float32", "bfloat16"]
    device: str
    threads: int
    seconds: float
