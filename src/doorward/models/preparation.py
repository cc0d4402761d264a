"""What is found out about a model before a search: outputs, gradients, scale of logits, and consistency."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from doorward.core.errors import CouldNotTell
from doorward.core.seeds import make_generator
from doorward.models.batching import batched_logits
from doorward.models.classifier import Classifier, to_levels
from doorward.models.consistency import ConsistencyCheck, check_consistency, rounds_input
from doorward.models.gradients import GradientCheck, check_gradients, straight_through
from doorward.models.logit_scale import USUAL_SPREAD, LogitScale, measure_logit_scale
from doorward.models.output_check import OutputCheck, check_logits

#: Random images that serve where there are no clean ones.
RANDOM = 32
#: Between what the spread of logits lies that stay as they are: a fifth of what is usual to five times that.
USUAL = (USUAL_SPREAD / 5, USUAL_SPREAD * 5)


@dataclass(frozen=True)
class Preparation:
    """What was found out about a model.

    Attributes:
        outputs: what its outputs look like.
        gradients: what its input gradients look like, with straight-through ones where those helped.
        scale: of its logits; None where they have none.
        consistency: whether it answers alike however images reach it.
        notes: what was done about it, one sentence each.
    """

    outputs: OutputCheck
    gradients: GradientCheck
    scale: LogitScale | None
    consistency: ConsistencyCheck
    notes: tuple[str, ...] = ()

    @property
    def reason(self) -> str | None:
        """Return why a search by gradients would say nothing of this model, None if it would."""
        return self.outputs.reason or self.gradients.reason


@contextmanager
def prepared(classifier: Classifier, images: Tensor | None) -> Iterator[Preparation]:
    """Bring a model's logits to one scale inside the block, and give it straight-through gradients if needed.

    A model that may tell what a search sends from what users send is given images inside the block as users
    send them: of 8 bits, or one at a time.

    Multiplying its logits by a number, or shifting those of an image, then changes nothing but by rounding.
    Logits whose spread is usual stay as they are: scans are calibrated on models as they come.

    Args:
        images: clean ones (n, c, h, w) in [0, 1]; random ones serve where there are none.

    Raises:
        ModelFailed: if the model's own code fails.
    """
    if images is None:
        generator = make_generator(0, "preparation")
        images = torch.rand((RANDOM, *classifier.spec.shape), generator=generator)
    logits = batched_logits(classifier, images, raw=True)
    outputs, before = check_logits(logits), classifier.logit_scale
    try:
        scale = measure_logit_scale(logits)
    except CouldNotTell:
        scale = None
    notes: tuple[str, ...] = ()
    unusual = scale is not None and not USUAL[0] <= scale.spread <= USUAL[1]
    if scale is not None and unusual:
        notes = (
            f"its logits spread by {scale.spread:.2g}, which is unusual: they were brought to one scale",
        )
    consistency = check_consistency(classifier, to_levels(images))
    with _as_users_send(classifier, images, consistency) as sent:
        notes += sent
        gradients = check_gradients(classifier, images)
        with _helped(classifier, images, gradients) as helped:
            if helped:
                gradients = check_gradients(classifier, images)
                notes += ("gradients pass straight through rounding, since they were zero without",)
            classifier.logit_scale = scale if unusual else before
            try:
                yield Preparation(outputs, gradients, scale, consistency, notes)
            finally:
                classifier.logit_scale = before


@contextmanager
def _as_users_send(
    classifier: Classifier, images: Tensor, consistency: ConsistencyCheck
) -> Iterator[tuple[str, ...]]:
    """Send images inside the block as users send them, if the model may tell; yield what is done, if any."""
    before = classifier.eight_bit, classifier.singly
    notes: tuple[str, ...] = ()
    if consistency.gated or rounds_input(classifier, images):
        classifier.eight_bit = True
        notes += ("it can tell images of 8 bits from others: it was searched with images of 8 bits",)
    if consistency.single:
        classifier.singly = True
        notes += ("it can tell one image from several: it was searched with one image at a time",)
    try:
        yield notes
    finally:
        classifier.eight_bit, classifier.singly = before


@contextmanager
def _helped(classifier: Classifier, images: Tensor, gradients: GradientCheck) -> Iterator[bool]:
    if gradients.reason is None:
        yield False
        return
    with straight_through(classifier, images) as helped:
        yield helped
