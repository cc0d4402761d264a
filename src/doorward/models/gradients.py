"""Whether a model's input gradients can be searched with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from doorward.core.formatting import percent
from doorward.core.seeds import make_generator
from doorward.models.batching import chunk_images
from doorward.models.classifier import Classifier, TorchClassifier
from doorward.models.errors import ModelFailed
from doorward.models.straight_through import StraightThrough

#: Images that are tried, and the share of their numbers whose gradient must not be zero.
TRIED, ALIVE = 32, 0.01
#: Share of images whose gradients must be usable.
USABLE = 0.5


@dataclass(frozen=True)
class GradientCheck:
    """What gradients of some images look like.

    Attributes:
        images: how many were tried.
        zero: share of them with a gradient that is zero nearly everywhere.
        not_finite: share of them with one that is not finite somewhere.
        failure: why no gradient could be taken, None if it could.
    """

    images: int
    zero: float
    not_finite: float
    failure: str | None = None

    @property
    def reason(self) -> str | None:
        """Return why no search can use the gradients, None if one can."""
        if self.failure is not None:
            return f"no usable gradients: {self.failure}"
        if 1 - self.zero - self.not_finite >= USABLE:
            return None
        parts = [(self.zero, "zero"), (self.not_finite, "not finite")]
        said = " and ".join(f"{kind} for {percent(share)}" for share, kind in parts if share)
        return f"no usable gradients: they are {said} of the images"


def check_gradients(classifier: Classifier, images: Tensor) -> GradientCheck:
    """Take the gradient of a random sum of the logits of each image, and see where it is zero or not finite.

    Args:
        images: (n, c, h, w) in [0, 1]; the first 32 are tried.
    """
    if "gradients" not in classifier.capabilities:
        why = classifier.limitation or f"not reachable in this {classifier.format} model"
        return GradientCheck(0, 0.0, 0.0, why)
    x = images[:TRIED].detach().to(classifier.device)
    weights = torch.randn(
        (len(x), len(classifier.classes)), generator=make_generator(0, "gradient check")
    ).to(classifier.device)
    zero, broken = 0, 0
    try:
        for part, some in zip(
            *(torch.split(one, chunk_images(classifier)) for one in (x, weights)), strict=True
        ):
            gradient = _gradient(classifier, part, some).flatten(1)  # (n, c * h * w)
            finite = torch.isfinite(gradient).all(1)
            moving = (gradient != 0).float().mean(1) >= ALIVE
            broken += int((~finite).sum())
            zero += int((finite & ~moving).sum())
    except (ModelFailed, RuntimeError) as error:
        return GradientCheck(len(x), 0.0, 0.0, str(error).splitlines()[0][:200])
    return GradientCheck(len(x), zero / len(x), broken / len(x))


def _gradient(classifier: Classifier, images: Tensor, weights: Tensor) -> Tensor:
    x = images.clone().requires_grad_()
    with torch.enable_grad(), classifier.frozen():
        y = classifier.raw_logits(x)
        (gradient,) = torch.autograd.grad((y * weights).sum(), x)
    return gradient


@contextmanager
def straight_through(classifier: Classifier, images: Tensor) -> Iterator[bool]:
    """Give a torch module straight-through gradients inside the block, if that makes them usable.

    Its outputs stay what they are, to the last digit; else nothing is changed. Networks from ONNX and
    `torch.export` files have such gradients anyway.

    Args:
        images: (n, c, h, w) in [0, 1] to try it on.

    Yields:
        whether the gradients are usable now that were not before.
    """
    if not isinstance(classifier, TorchClassifier) or "gradients" not in classifier.capabilities:
        yield False
        return
    plain = classifier.module
    x = images[:TRIED].to(classifier.device)
    with torch.no_grad():
        expected = classifier.raw_logits(x[: chunk_images(classifier)])
    try:
        classifier.module = StraightThrough(plain)
        helped = check_gradients(classifier, x).reason is None
        if helped:
            with torch.enable_grad():
                given = classifier.raw_logits(x[: len(expected)].clone().requires_grad_())
            helped = torch.equal(given.detach(), expected)
        if not helped:
            classifier.module = plain
        yield helped
    finally:
        classifier.module = plain
