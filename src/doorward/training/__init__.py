"""The one training loop, its settings and its record."""

from doorward.training.augment import AUGMENTATIONS
from doorward.training.loop import Trained, evaluate, measure_spec, predict, train, train_classifier
from doorward.training.settings import (
    EpochRecord,
    Progress,
    TrainingRecord,
    TrainingSettings,
    default_settings,
)

__all__ = [
    "AUGMENTATIONS",
    "EpochRecord",
    "Progress",
    "Trained",
    "TrainingRecord",
    "TrainingSettings",
    "default_settings",
    "evaluate",
    "measure_spec",
    "predict",
    "train",
    "train_classifier",
]
