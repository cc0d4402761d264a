"""Model inversion: images of every class, made from the model alone, all classes in one batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from doorward.core.budget import Deadline, TimeGuard
from doorward.inversion.adam import Adam
from doorward.models import Classifier, TorchClassifier
from doorward.models.batching import batched_logits, chunk_images

#: The probability from which on a model is confident of a class.
CONFIDENT = 0.9
#: The cross-entropy below which a class is reached: a probability of .96. What goes on beyond is more extreme
#: than any natural image, and no trigger competes with it.
SURE = 0.04
#: How many times larger the last step is than the first: for images that are far from their class.
FASTER = 10.0
#: Side of the grid of random numbers that an image starts as, enlarged: natural images are smooth.
GRID = 7
#: The largest standard deviation of what an image starts as, before it is cut off at black and white.
CONTRAST = 1.5
#: Part of the width and height by which images are shifted at most, by another amount in each step: what is
#: seen wherever it lies is no noise that one pixel's weight happens to like.
SHIFT = 1 / 14


@dataclass(frozen=True)
class InvertedImages:
    """Images that a model puts into given classes.

    Attributes:
        images: (n, c, h, w) in [0, 1].
        labels: (n,) the class that each image was made for.
        probability: (n,) what the model gives that class.
    """

    images: Tensor
    labels: Tensor
    probability: Tensor

    @property
    def confident(self) -> float:
        """Return the share of the images that the model puts into their class with confidence."""
        return float((self.probability >= CONFIDENT).float().mean())


def invert_classes(
    classifier: Classifier,
    *,
    per_class: int,
    steps: int = 60,
    learning_rate: float = 0.004,
    variation: float = 1.0,
    statistics: float = 0.1,
    generator: torch.Generator,
    deadline: Deadline | None = None,
) -> InvertedImages:
    """Make images of every class by gradient descent from smooth noise.

    Minimises, over images in [0, 1], the cross-entropy of their class, `variation` times the mean absolute
    difference of neighbouring pixels, and `statistics` times how far the inputs of batch-norm layers are from
    the means and variances that those have learnt. So batch norm is a prior where the model has it.

    Images of all classes are mixed in each chunk, since batch statistics are those of all classes together.

    Args:
        per_class: how many images of each class.
        learning_rate: of Adam at first, in units of the [0, 1] range; ten times as much at the end. Images
            that have reached their class move no further, so that small steps leave them close to it, where
            natural images are.

    Raises:
        CouldNotTell: if the deadline is too near.

    Source: M. Fredrikson et al., CCS 2015, doi:10.1145/2810103.2813677 (inversion); H. Yin et al., CVPR 2020,
    arXiv 1912.08795 (variation, statistics and shifts).
    """
    k, shape, device = len(classifier.classes), classifier.spec.shape, classifier.device
    labels = torch.arange(k).repeat(per_class)  # the classes by turns, so that each chunk has many
    guard = TimeGuard(deadline or Deadline(), len(labels) * steps, work=f"inverting {k:,} classes")
    prior = BatchNormPrior(classifier) if statistics > 0 else None
    fast: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if prior is None or not prior.layers:  # folded into convolutions, batch norm would tell nothing
        fast = classifier.fast_inference(torch.rand(min(16, len(labels)), *shape, generator=generator))
    made = []
    with fast:
        for part in torch.split(labels, chunk_images(classifier)):
            x = smooth_noise(len(part), shape, generator).to(device)
            adam = Adam(x, learning_rate, betas=(0.9, 0.99))
            goal = part.to(device)
            for step in range(steps):
                adam.learning_rate = learning_rate * FASTER ** (step / steps)
                at = x.detach().requires_grad_()
                with watching(prior):
                    logits = classifier.logits(shifted(at, generator))
                # each image is on its own, whatever the size of the chunk
                away = F.cross_entropy(logits, goal, reduction="none")
                loss = away.sum()
                loss = loss + len(part) * variation * total_variation(at)
                if prior is not None and prior.layers:
                    loss = loss + len(part) * statistics * prior.distance()
                (gradient,) = torch.autograd.grad(loss, at)
                before = x.clone()
                adam.step(gradient)
                x.clamp_(0, 1)
                reached = away.detach() <= SURE  # momentum would carry it beyond
                x[reached] = before[reached]
                guard.advance(len(part))
            made.append(x)
    images = torch.cat(made)
    own = batched_logits(classifier, images, deadline).softmax(1).cpu()
    return InvertedImages(images, labels, own.gather(1, labels[:, None]).squeeze(1))


def smooth_noise(n: int, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Return smooth random images (n, c, h, w) in [0, 1], of any brightness and contrast.

    Many have flat black or white parts, as natural images have backgrounds.
    """
    c, h, w = shape
    grid = torch.randn(n, c, min(GRID, h), min(GRID, w), generator=generator)
    smooth = F.interpolate(grid, (h, w), mode="bilinear", align_corners=True)
    middle, contrast = (torch.rand(n, 1, 1, 1, generator=generator) for _ in range(2))
    return (middle + CONTRAST * contrast * smooth).clamp_(0, 1)


def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return images (n, c, h, w) shifted by one random amount; what leaves comes in on the other side."""
    reach = [int(side * SHIFT) for side in x.shape[2:]]
    by = [int(torch.randint(-far, far + 1, (), generator=generator)) for far in reach]
    return x.roll(by, (2, 3)) if any(by) else x


def total_variation(x: Tensor) -> Tensor:
    """Return the mean absolute difference of neighbouring pixels of images (n, c, h, w), both ways."""
    return x.diff(dim=2).abs().mean() + x.diff(dim=3).abs().mean()


class BatchNormPrior:
    """How far the inputs of a network's batch-norm layers are from what these layers have learnt.

    Attributes:
        layers: those that keep running statistics; none where the network is out of reach or has none.
    """

    def __init__(self, classifier: Classifier) -> None:
        network = classifier.module if isinstance(classifier, TorchClassifier) else None
        self.layers = [
            m
            for m in (network.modules() if network is not None else ())
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
        ]
        self._seen: list[Tensor] = []

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Measure each layer's input inside the block."""
        self._seen = []
        handles = [layer.register_forward_pre_hook(self._measure) for layer in self.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def distance(self) -> Tensor:
        """Return the mean over the layers that ran: 0 where the statistics are those that were learnt."""
        return torch.stack(self._seen).mean()

    def _measure(self, layer: Any, given: tuple[Tensor, ...]) -> None:
        x = given[0].transpose(0, 1).flatten(1).float()  # (channels, n * h * w)
        mean, variance = layer.running_mean, layer.running_var.clamp_min(layer.eps)
        apart = (x.mean(1) - mean).square() / variance
        wide = (x.var(1, unbiased=False).clamp_min(layer.eps) / variance).log().square()
        self._seen.append((apart + wide).mean())


def watching(prior: BatchNormPrior | None) -> contextlib.AbstractContextManager[None]:
    """Return a context in which a prior measures, if there is one."""
    return contextlib.nullcontext() if prior is None else prior.watch()
