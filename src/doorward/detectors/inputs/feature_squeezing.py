"""Feature squeezing: an input whose answer changes when its detail is reduced was made to mislead."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from doorward.core.budget import Deadline
from doorward.core.errors import InputError
from doorward.core.formatting import number
from doorward.detectors.inputs._squeezers import parsed
from doorward.detectors.inputs._squeezers import squeeze as squeeze
from doorward.detectors.inputs.base import InputFilter, Scored, State
from doorward.methods.registry import register
from doorward.models import Classifier
from doorward.models.batching import batched_logits, chunk_images
from doorward.stats.rejection import Rule

#: The published joint sets: for grey images that of MNIST, for colours that of CIFAR-10.
GREY, COLOUR = ("bits-1", "median-2"), ("bits-5", "median-2", "nlm-13-3-2")


@register("detector")
class FeatureSqueezing(InputFilter):
    """Compare the answer to an input with those to squeezed copies of it, and reject it if they differ.

    Use it to filter the inputs of an image classifier as they arrive, against adversarial examples and
    triggers of fine detail.

    A copy has fewer bits per value, or goes through a median filter or non-local means. Detail that means
    little to people is lost. The score is the largest L1 distance between the probabilities of the input and
    those of a copy, from 0 to 2. All copies go through the model in one batch.
    """

    title = "Feature squeezing"
    source = "W. Xu, D. Evans and Y. Qi, NDSS 2018, arXiv 1704.01155"
    limits = (
        "It misses triggers that survive squeezing, such as patches of several pixels, weak attacks on "
        "colour images, and attackers who know the squeezers."
    )
    highest: ClassVar[float] = 2.0

    false_rejection_rate: float = Field(0.05, gt=0, lt=1, description="Share of clean inputs to be rejected")
    rule: Rule = Field(
        "conformal",
        description="How the threshold follows from clean scores: conformal (holds for any distribution), "
        "normal (a percentile of a Normal distribution) or quantile (as published)",
    )
    squeezers: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        max_length=16,
        description="bits-B, median-2, median-3, nlm-SEARCH-PATCH-STRENGTH; if none are given bits-1 and "
        "median-2 for grey images, and bits-5, median-2 and nlm-13-3-2 for colours",
    )

    @field_validator("squeezers")
    @classmethod
    def _known(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        try:
            for one in value or ():
                parsed(one)
        except InputError as error:
            raise ValueError(str(error)) from error
        return value

    def chosen(self, channels: int) -> tuple[str, ...]:
        """Return the squeezers for images of so many channels."""
        return self.squeezers or (GREY if channels == 1 else COLOUR)

    def score(
        self,
        classifier: Classifier,
        inputs: Tensor,
        logits: Tensor,
        *,
        state: State,
        threshold: float | None = None,
        deadline: Deadline | None = None,
    ) -> Scored:
        """Return the largest L1 distance (n,) for images (n, c, h, w) uint8 with logits (n, k)."""
        names = self.chosen(inputs.shape[1])
        largest = self.distances(classifier, inputs, logits, deadline).max(1)
        told = tuple(
            f"{names[which]} changes the model's probabilities by {number(by)} in L1"
            for which, by in zip(largest.indices.tolist(), largest.values.tolist(), strict=True)
        )
        return Scored(largest.values.numpy(), told)

    def distances(
        self, classifier: Classifier, images: Tensor, logits: Tensor, deadline: Deadline | None = None
    ) -> Tensor:
        """Return the L1 distance (n, s) of each squeezer's probabilities from those of the image itself."""
        names = self.chosen(images.shape[1])
        if not len(images):
            return torch.zeros(0, len(names), dtype=torch.float64)
        rows = []
        size = max(1, 4 * chunk_images(classifier) // len(names))
        for part, own in zip(torch.split(images, size), torch.split(logits, size), strict=True):
            copies = torch.cat([squeeze(part, name) for name in names])  # (s n, c, h, w)
            squeezed = batched_logits(classifier, copies, deadline, raw=True).cpu().double().softmax(1)
            change = squeezed.view(len(names), len(part), -1) - own.double().softmax(1)
            rows.append(change.abs().sum(2).T)
        return torch.cat(rows)
