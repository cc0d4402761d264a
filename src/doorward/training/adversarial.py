"""Adversarial training: each batch is attacked with the model as it is, and trained on as attacked.

Source: A. Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018
(arXiv 1706.06083); the fast variant: E. Wong, L. Rice, J. Z. Kolter, Fast is better than free, ICLR 2020
(arXiv 2001.03994).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from doorward.core.errors import CouldNotTell
from doorward.core.records import Rate, Record
from doorward.core.seeds import make_generator
from doorward.data.samples import Samples
from doorward.models.classifier import Classifier
from doorward.models.encode.image import to_float, to_tensor
from doorward.stats.metrics import rate
from doorward.training.loop import LogitsOf, OnBatch, labels_of

Norm = Literal["linf", "l2"]

#: What is usual for natural images: Madry et al. (linf), and robust models with backdoors
#: (arXiv 2003.00865, l2).
USUAL_EPS: dict[str, float] = {"linf": 8 / 255, "l2": 0.5}


class AdversarialSettings(Record):
    """How images are attacked: gradient steps up the loss, from a random start in a ball around each.

    Attributes:
        norm: that the ball is measured in; l2 is over all pixels and channels of an image.
        eps: radius of the ball, in units of pixel values in [0, 1].
        variant: `pgd`, or `fast`, which takes a single step.
        steps: gradients taken; 7 if not given.
        step_size: in units of pixel values; 2.5 radii shared among the steps of `pgd`, 1.25 radii for
            `fast`, if None.
    """

    norm: Norm = "linf"
    eps: float = Field(ge=0)
    variant: Literal["pgd", "fast"] = "pgd"
    steps: int = Field(7, ge=1)
    step_size: float | None = Field(None, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _one_step(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("variant") == "fast":
            return {"steps": 1} | given
        return given

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if self.norm == "linf" and self.eps > 1:
            raise ValueError(
                f"pixel values are in [0, 1]: eps is 1 at most, got {self.eps:g} (8/255 is 0.031)"
            )
        if self.variant == "fast" and self.steps != 1:
            raise ValueError(f"the fast variant takes one step, got {self.steps}")
        return self

    @property
    def step(self) -> float:
        """Return the length of one step.

        >>> AdversarialSettings(eps=0.2, steps=10).step, AdversarialSettings(eps=0.2, variant="fast").step
        (0.05, 0.25)
        """
        if self.step_size is not None:
            return self.step_size
        return self.eps * (1.25 if self.variant == "fast" else 2.5 / self.steps)

    def describe(self) -> str:
        """Say in words what the attack is.

        >>> AdversarialSettings(eps=8 / 255, steps=20).describe()
        '20 steps of PGD within 0.0314 (linf)'
        """
        steps = "1 step" if self.steps == 1 else f"{self.steps} steps"
        return f"{steps} of PGD within {self.eps:.3g} ({self.norm})"

    def stronger(self) -> AdversarialSettings:
        """Return an attack in the same ball to measure with, of 20 steps or twice as many.

        >>> AdversarialSettings(eps=0.1, variant="fast").stronger().steps
        20
        """
        return AdversarialSettings(norm=self.norm, eps=self.eps, steps=max(20, 2 * self.steps))


def perturb(
    logits_of: LogitsOf, x: Tensor, y: Tensor, *, settings: AdversarialSettings, generator: torch.Generator
) -> Tensor:
    """Return images (n, c, h, w) in [0, 1], each moved within its ball to where the loss is large.

    The last step's images are returned. No parameter's `.grad` changes. We depart from Wong et al.: images
    stay in [0, 1] at the random start too.

    Args:
        logits_of: gives logits (n, k) for images in [0, 1]; differentiable.
        x, y: images in [0, 1], and the classes (n,) they are driven away from.
        generator: on the CPU; source of the start.

    Raises:
        CouldNotTell: if the logits are not finite.
    """
    x = x.detach()
    attacked = _inside(x + _start(x, settings, generator), x, settings)
    for _ in range(settings.steps):
        attacked.requires_grad_()
        with torch.enable_grad():
            # the sum, so that an image's gradient is the same in any batch
            loss = F.cross_entropy(logits_of(attacked), y, reduction="sum")
        if not loss.isfinite():
            raise CouldNotTell("the model's logits are not finite, so no attack can follow their gradient")
        (gradient,) = torch.autograd.grad(loss, attacked)
        uphill = gradient.sign() if settings.norm == "linf" else _normalised(gradient)
        attacked = _inside(attacked.detach() + settings.step * uphill, x, settings)
    return attacked


def adversarial_batches(settings: AdversarialSettings) -> OnBatch:
    """Return the hook that makes `train` and `train_classifier` train adversarially."""
    return partial(perturb, settings=settings)


def robust_accuracy(
    classifier: Classifier,
    samples: Samples,
    *,
    settings: AdversarialSettings,
    seed: int,
    restarts: int = 1,
    batch_size: int = 100,
) -> Rate:
    """Return the share of labelled images that are classified rightly as they are and after every attack.

    Args:
        restarts: attacks on each image, each from another start.

    Raises:
        InputError: if there are no labels, or an image does not fit the classifier.
        CouldNotTell: if the classifier gives no gradients, or its logits are not finite.
    """
    if "gradients" not in classifier.capabilities:
        raise CouldNotTell("robust accuracy needs the model's gradients, and it gives none")
    labels, generator = torch.from_numpy(labels_of(samples)), make_generator(seed, "robust accuracy")
    held = 0
    for start in range(0, len(samples), batch_size):
        positions = np.arange(start, min(start + batch_size, len(samples)))
        part = samples.select(positions)
        x = to_float(to_tensor(part, classifier.spec).to(classifier.device))  # (n, c, h, w)
        y = labels[positions].to(classifier.device)
        x, y = _still_right(classifier, x, y, x)
        for _ in range(restarts):
            attacked = perturb(classifier.logits, x, y, settings=settings, generator=generator)
            x, y = _still_right(classifier, x, y, attacked)
        held += len(y)
    return rate(held, len(samples))


def _still_right(classifier: Classifier, x: Tensor, y: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
    """Return the images and labels that the classifier gets right on what is shown in their place."""
    with torch.no_grad():
        right = classifier.logits(shown).argmax(1) == y  # (n,)
    return x[right], y[right]


def _start(x: Tensor, settings: AdversarialSettings, generator: torch.Generator) -> Tensor:
    """Draw a point of the ball around 0 for each image, evenly over its volume: (n, c, h, w)."""
    if settings.norm == "linf":
        drawn = torch.rand(x.shape, generator=generator).mul_(2).sub_(1).mul_(settings.eps)
    else:
        direction = _normalised(torch.randn(x.shape, generator=generator))
        radius = torch.rand((len(x), 1, 1, 1), generator=generator) ** (1 / math.prod(x.shape[1:]))
        drawn = direction * radius * settings.eps
    return drawn.to(x.device)


def _normalised(x: Tensor) -> Tensor:
    """Return each image (n, c, h, w) at length 1, or 0 where it is 0 everywhere."""
    # scaled first: a confident model's gradients have squares too small for float32, in which GPUs sum them
    tiny = torch.finfo(x.dtype).tiny
    x = x / x.abs().amax((1, 2, 3), keepdim=True).clamp_min(tiny)
    length: Tensor = torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True)
    return x / length.clamp_min(tiny)


def _inside(attacked: Tensor, x: Tensor, settings: AdversarialSettings) -> Tensor:
    """Bring images (n, c, h, w) back into the balls around x, and into [0, 1]."""
    if settings.norm == "linf":
        near = torch.clamp(attacked, x - settings.eps, x + settings.eps)
    else:
        near = x + torch.renorm(attacked - x, 2, 0, settings.eps)  # each image by itself
    return near.clamp_(0, 1)
