"""The one training loop, its settings and its record."""

from doorward.training.augment import AUGMENTATIONS
from doorward.training.loop import evaluate, measure_spec, predict, train
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
    "TrainingRecord",
    "TrainingSettings",
    "default_settings",
    "evaluate",
    "measure_spec",
    "predict",
    "train",
]
