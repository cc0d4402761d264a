"""STRIP: an input whose class hardly changes when other images are laid over it holds a trigger."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from doorward.core.budget import Deadline, TimeGuard
from doorward.core.formatting import number
from doorward.detectors.inputs.base import InputFilter, Scored, State, finite_logits
from doorward.methods.registry import register
from doorward.models import Classifier
from doorward.models.batching import chunk_images
from doorward.stats.rejection import Floats


def superimpose(images: Tensor, overlays: Tensor, *, weights: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Return every image (b, c, h, w) with every overlay (m, c, h, w) laid over it: (b, m, c, h, w), uint8.

    Sums of pixels above 255 stay at 255, as in OpenCV's `addWeighted`.
    """
    if weights == (1.0, 1.0):
        total: Tensor = images[:, None].short() + overlays.short()
        return total.clamp(max=255).to(torch.uint8)
    mixed = weights[0] * images[:, None].double() + weights[1] * overlays.double()
    return mixed.round().clamp_(0, 255).to(torch.uint8)


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy over the classes in bits, (...), of logits (..., k)."""
    nats: Tensor = torch.special.entr(logits.double().softmax(-1)).sum(-1)
    return nats / math.log(2)


#: Share of the largest entropy from which on answers are almost random. The published adaptive attack, which
#: gives superimposed images random labels, makes it more than 3.0 of 3.32 bits (Section 6.6).
ALMOST_RANDOM = 0.9


@register("detector")
class Strip(InputFilter):
    """Lay clean images over an input and reject it if the model's answers hardly vary.

    Use it to filter the inputs of an image classifier as they arrive, against triggers that work in any
    image.

    The input is added to each of some clean images, pixel by pixel, with saturation. A clean input gets lost
    in the sum, so the model's answers are uncertain and vary. A trigger survives, and the model stays sure of
    its target. The score is the negative mean entropy of the answers, in bits, over all replicas.

    Replicas are computed in stages. An input is accepted as soon as its mean entropy is certain to stay above
    the threshold, or is so by several standard errors. It is never rejected early, so an early exit raises no
    rate of false rejections.
    """

    title = "STRIP"
    source = "Y. Gao et al., STRIP, ACSAC 2019, arXiv 1902.06531"
    limits = (
        "It misses triggers that work in images of some classes only, differ from image to image, or do not "
        "survive the sum, and models that were trained to be uncertain of triggered sums."
    )
    highest: ClassVar[float] = 0.0

    replicas: int = Field(20, ge=2, le=1000, description="Clean images that are laid over each input")
    weight_input: float = Field(1.0, gt=0, le=1, description="Weight of the input in the sum")
    weight_overlay: float = Field(1.0, gt=0, le=1, description="Weight of the clean image in the sum")
    early_exit: Literal["off", "certain", "estimated"] = Field(
        "estimated",
        description="When the rest of the replicas is left out: never, where it cannot change the decision, "
        "or where the mean entropy is above the threshold by several standard errors",
    )
    standard_errors: float = Field(2.5, gt=0, description="How many, if estimated")
    first: int = Field(3, ge=2, description="Replicas before the first decision; their number then doubles")

    @property
    def kept(self) -> int:
        """Return the number of overlays."""
        return self.replicas

    def learn(self, images: Tensor) -> State:
        """Keep clean images (n, c, h, w) uint8 as overlays, which all inputs share."""
        return {"overlays": images.clone()}

    def warning(self, clean: Floats, classes: int) -> str | None:
        """Return a warning if sums of clean images are answered almost at random."""
        most = math.log2(classes)
        if -clean.mean() < ALMOST_RANDOM * most:
            return None
        mean = f"mean entropy {number(-clean.mean())} of at most {number(most)} bits"
        return (
            f"the model answers superimposed clean images almost at random ({mean}), as models do that were "
            "trained to deceive STRIP"
        )

    def score(
        self,
        classifier: Classifier,
        images: Tensor,
        logits: Tensor,
        *,
        state: State,
        threshold: float | None = None,
        deadline: Deadline | None = None,
    ) -> Scored:
        """Return the negative mean entropy (n,) of the replicas of images (n, c, h, w) uint8."""
        overlays = state["overlays"]
        seen = torch.zeros(len(images), len(overlays), dtype=torch.float64)
        used = torch.zeros(len(images), dtype=torch.long)
        active = torch.arange(len(images))
        for begin, end in self._stages(len(overlays)):
            if not len(active):
                break
            seen[active, begin:end] = self._entropies(
                classifier, images[active], overlays[begin:end], deadline
            )
            used[active] = end
            if threshold is not None and end < len(overlays) and self.early_exit != "off":
                active = active[~self._accepted(seen[active, :end], -threshold, len(overlays))]
        mean = (seen.sum(1) / used.clamp_min(1)).numpy()
        told = tuple(
            f"the mean entropy of {n} superimposed images is {number(h)} bits"
            for n, h in zip(used.tolist(), mean.tolist(), strict=True)
        )
        return Scored(np.negative(mean), told)

    def _stages(self, most: int) -> list[tuple[int, int]]:
        ends = [most] if self.early_exit == "off" else []
        at = self.first
        while not ends or ends[-1] < most:
            ends.append(min(at, most))
            at *= 2
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def _accepted(self, seen: Tensor, boundary: float, most: int) -> Tensor:
        """Return whether inputs (n,) can be accepted by the entropies (n, m) of their first m replicas."""
        m = seen.shape[1]
        accepted = seen.sum(1) / most > boundary  # entropies are not negative, so the sum only grows
        if self.early_exit == "estimated":
            # the mean over all replicas is estimated from some of them, drawn without replacement
            error = seen.std(1) * math.sqrt((1 / m) * (1 - m / most))
            accepted |= seen.mean(1) - self.standard_errors * error > boundary
        return accepted

    def _entropies(
        self, classifier: Classifier, images: Tensor, overlays: Tensor, deadline: Deadline | None
    ) -> Tensor:
        """Return the entropy (n, m) of every image with every overlay, some images at a time."""
        weights = (self.weight_input, self.weight_overlay)
        guard = TimeGuard(
            deadline or Deadline(), len(images), work=f"superimposing {len(images)} images on {len(overlays)}"
        )
        rows = []
        for part in torch.split(images, max(1, chunk_images(classifier) // len(overlays))):
            mixed = superimpose(part, overlays, weights=weights).flatten(0, 1)
            rows.append(entropy(finite_logits(classifier, mixed)).view(len(part), -1))
            guard.advance(len(part))
        return torch.cat(rows)
