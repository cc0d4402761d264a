"""Unlearn triggers without any data: on images that are made from the model itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from doorward.core.errors import CouldNotTell, InputError
from doorward.core.records import Rate
from doorward.core.seeds import make_generator
from doorward.inversion.model_inversion import invert_classes, smooth_noise
from doorward.models import TorchClassifier
from doorward.models.batching import batched_logits
from doorward.repairs._relearning import recovered, relearn
from doorward.repairs.base import Damage
from doorward.stats import metrics

#: Images of each class that are made, at most so many in all, and steps by which triggers are unlearnt.
PER_CLASS, MOST, STEPS = 32, 1_024, 200
#: First steps of the inversion: short ones leave images close to where they began, long ones make them more
#: like their class. Half of the images is made by each.
PACES = (0.004, 0.03)
#: The probability of its class from which on an image counts as of it, and the share of them that is needed.
RIGHT = 0.5
#: Of every so many images one is kept back, to measure on.
KEPT = 4


@dataclass(frozen=True)
class MadeImages:
    """Images (n, c, h, w) that were made from a model, and the class of each (n,), in two parts."""

    fit: Tensor
    fit_labels: Tensor
    kept: Tensor
    kept_labels: Tensor


def make_images(classifier: TorchClassifier, seed: int, *, most: int = PER_CLASS) -> MadeImages:
    """Make images of every class by model inversion, and keep a quarter of each class's back.

    Args:
        most: how many of each class.

    Raises:
        InputError: if the model has no gradients, or hardly any image reaches its class.
    """
    if "gradients" not in classifier.capabilities:
        raise InputError(
            "without clean samples images are made from the model itself, which takes gradients that this "
            "model does not give: give labelled samples with --clean DATA"
        )
    k = len(classifier.classes)
    per_class = max(KEPT, min(most, MOST // k) // len(PACES) // KEPT * KEPT)
    generator = make_generator(seed, "model inversion")
    try:
        with classifier.frozen():
            parts = [
                invert_classes(classifier, per_class=per_class, learning_rate=pace, generator=generator)
                for pace in PACES
            ]
    except CouldNotTell as why:
        raise InputError(
            f"no images can be made from the model ({why}): give some with --clean DATA"
        ) from why
    images, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("images", "labels"))
    right = float((torch.cat([part.probability for part in parts]) > RIGHT).float().mean())
    if right < RIGHT:
        raise InputError(
            f"of the images made from the model it puts {right:.0%} alone into their class, too few to mend "
            "it by: give labelled samples with --clean DATA"
        )
    kept = (torch.arange(len(labels)) // k) % KEPT == 0  # the classes come by turns
    return MadeImages(images[~kept], labels[~kept], images[kept], labels[kept])


def unlearn(network: TorchClassifier, damage: Damage, made: MadeImages) -> str:
    """Teach a network in place to answer images with a trigger as without; return what was done.

    Raises:
        TrainingDiverged: if the loss is no longer finite.
    """
    generator = make_generator(damage.seed, "unlearning")
    # what the images began as, too: answers there are kept as well
    noise = smooth_noise(len(made.fit) // 2, network.spec.shape, generator)
    relearn(
        network,
        damage.classifier,
        torch.cat([made.fit.cpu(), noise]),
        recovered(damage.triggers, generator),
        steps=STEPS,
        generator=generator,
        progress=damage.progress,
    )
    return f"it was trained for {STEPS} steps on {len(made.fit):,} images made from the model itself"


def agreement(before: TorchClassifier, after: TorchClassifier, images: Tensor) -> Rate:
    """Return on which share of images two networks give the same class."""
    answers = [batched_logits(one, images).argmax(1) for one in (before, after)]
    return metrics.rate(int((answers[0] == answers[1]).sum()), len(images))
