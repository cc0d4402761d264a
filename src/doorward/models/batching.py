"""Images through a classifier in chunks, and the margins of its logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from doorward.core.budget import Deadline, TimeGuard
from doorward.models import Classifier

#: Elements of input that go through the model at once: 128 images of 32x32 with 3 channels. More are slower
#: on processors, whose caches they overflow (512 by a third on ResNet-8).
CHUNK_ELEMENTS = 128 * 3 * 32 * 32


def chunk_images(classifier: Classifier) -> int:
    """Return how many images go through the model at once: four times as many where it is no processor.

    Fewer where they would take more memory than the classifier may.
    """
    elements = CHUNK_ELEMENTS * (1 if classifier.device.type == "cpu" else 4)
    usual, most = max(1, elements // math.prod(classifier.spec.shape)), classifier.most_at_once
    return usual if most is None else min(usual, most)


def batched_logits(
    classifier: Classifier, images: Tensor, deadline: Deadline | None = None, *, raw: bool = False
) -> Tensor:
    """Return logits (n, k) for float images (n, c, h, w) of any number, without gradients.

    Args:
        raw: in the model's own scale, finite or not.

    Raises:
        CouldNotTell: if the deadline is too near; the message says how long it would take.
    """
    guard = TimeGuard(deadline or Deadline(), len(images), work=f"running the model on {len(images)} images")
    logits, run = [], classifier.raw_logits if raw else classifier.logits
    with torch.no_grad():
        for part in torch.split(images, chunk_images(classifier)):
            logits.append(run(part.to(classifier.device)))
            guard.advance(len(part))
    return torch.cat(logits)


def margin(logits: Tensor, targets: Tensor) -> Tensor:
    """Return target logit minus the largest other one, for logits (n, k) and targets (n,): (n,)."""
    own = logits.gather(1, targets[:, None]).squeeze(1)
    others = logits.scatter(1, targets[:, None], -torch.inf).amax(1)
    return own - others
