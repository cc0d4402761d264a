"""The one training loop, its settings and its record."""

from doorward.training.adversarial import AdversarialSettings, adversarial_batches, perturb, robust_accuracy
from doorward.training.augment import AUGMENTATIONS
from doorward.training.loop import (
    Trained,
    evaluate,
    example_shape,
    measure_spec,
    predict,
    train,
    train_classifier,
)
from doorward.training.settings import (
    EpochRecord,
    TrainingProgress,
    TrainingRecord,
    TrainingSettings,
    default_settings,
)

__all__ = [
    "AUGMENTATIONS",
    "AdversarialSettings",
    "EpochRecord",
    "Trained",
    "TrainingProgress",
    "TrainingRecord",
    "TrainingSettings",
    "adversarial_batches",
    "default_settings",
    "evaluate",
    "example_shape",
    "measure_spec",
    "perturb",
    "predict",
    "robust_accuracy",
    "train",
    "train_classifier",
]
