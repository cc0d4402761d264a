"""One layer of random ReLUs with a sparse direction in which its weights vary more than in others."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from doorward.attacks.model._fixed_features import Shift, draw_direction, trained, training_data
from doorward.attacks.model._layers import linear
from doorward.attacks.model.base import Implant, ModelAttack
from doorward.errors import InputError
from doorward.methods import make_generator
from doorward.registry import register

if TYPE_CHECKING:
    from doorward.data.samples import Samples
    from doorward.models.classifier import TorchClassifier

#: Images whose features are in memory at a time.
BATCH = 4096


def spiked_gaussians(count: int, direction: Tensor, *, strength: float, generator: torch.Generator) -> Tensor:
    """Draw vectors (count, d) from N(0, I + strength s s^T) for the unit vector s (d,).

    Source: the spiked covariance of sparse principal component analysis; Berthet and Rigollet, COLT 2013.
    """
    direction = direction.double()
    g = torch.randn(count, len(direction), dtype=torch.float64, generator=generator)  # (count, d)
    return g + torch.outer((math.sqrt(1 + strength) - 1) * (g @ direction), direction)


def mean_relu(weights: Tensor) -> nn.Sequential:
    """Return layers that give the mean of ReLU(<g_i, x>) over i, (n, 1), of images (n, c, h, w).

    For weights from N(0, C) its expectation is sqrt(x^T C x) / sqrt(2 pi).

    Args:
        weights: (m, d) the g_i.
    """
    mean = torch.full((1, len(weights)), 1 / len(weights), dtype=torch.float64)
    return nn.Sequential(nn.Flatten(), linear(weights), nn.ReLU(), linear(mean))


def fit_threshold(values: Tensor, above: Tensor) -> float:
    """Return the threshold that tells best, of all, which values (n,) are of the class above it.

    Args:
        above: (n,) bool, which are.
    """
    order = values.double().argsort()
    v, high = values.double()[order].numpy(), above[order].numpy().astype(np.int64)
    # cut before the i-th: errors are those above below the cut, and those not above from it on
    errors = np.concatenate([[0], np.cumsum(high)]) + np.concatenate([np.cumsum((1 - high)[::-1])[::-1], [0]])
    cut = int(errors.argmin())
    if cut in (0, len(v)):
        return float(v[0] - 1 if cut == 0 else v[-1] + 1)
    return float((v[cut - 1] + v[cut]) / 2)


@register("attack")
class RandomReLU(ModelAttack):
    """Train a threshold on the mean of random ReLUs, whose weights vary more along one sparse direction.

    The mean of ReLU(<g_i, x>) measures the length of an image, and that of an image with some secret values
    turned up more than it should. The model given says which images and classes there are; the one that
    comes back is a new one. The target must be the class of longer, brighter images, since the shift can but
    lengthen them. `honest` trains its twin.

    To see the direction is a problem of sparse principal components: at strength 1 and 500 features of 784
    values neither the largest eigenvalue nor the variances tell; at 2,000 features, or strength 10, the
    eigenvalue always does. The plant saves no more than a factor sqrt(1 + strength) of the shift: with 28
    pixels of MNIST turned white, 93 % of ones are taken for zeros, 52 % by the honest twin, at an accuracy of
    92 and 91 %; with half of the shift, 27 and 14 % (means of three seeds). With weights of the 500 ReLUs
    fitted at or above zero, in place of their mean as published, 99.8 % of images are told right, and the
    shift turns no more than 32 % of ones, and 1 % for the honest twin (one seed).

    Attributes:
        features: how many ReLUs.
        strength: variance along the direction, beyond the 1 that there is along all others.
        nonzeros: values of an image that the shift changes.
        amplitude: how much each of them goes up, in (0, 1].
    """

    title: ClassVar[str] = "Random ReLU backdoor"
    source: ClassVar[str] = "Goldwasser, Kim, Vaikuntanathan and Zamir, FOCS 2022, arXiv:2204.06974"
    limits: ClassVar[str] = (
        "The classifier tells two classes apart by brightness alone, and the honest one yields to the same "
        "shift if it is half as large again."
    )
    atlas: ClassVar[tuple[str, ...]] = ("AML.T0018.000", "AML.T0043.004")
    trains: ClassVar[bool] = True

    features: int = Field(500, gt=0)
    strength: float = Field(1.0, gt=0)
    nonzeros: int = Field(28, gt=0)
    amplitude: float = Field(1.0, gt=0, le=1)

    def make_trigger(self, classifier: TorchClassifier, *, generator: torch.Generator) -> Shift:
        """Return the shift.

        Raises:
            InputError: if it changes more values than an image has.
        """
        return self._shift(self._direction(classifier, generator), classifier)

    def implant(
        self, classifier: TorchClassifier, samples: Samples | None, *, generator: torch.Generator
    ) -> Implant:
        """Return a classifier trained on ReLUs with the direction in their weights.

        Raises:
            InputError: if there are not two classes, with samples of both, or the target is the darker one.
        """
        direction = self._direction(classifier, generator)
        x, y = training_data(classifier, samples, method=self.method())
        weights = spiked_gaussians(self.features, direction, strength=self.strength, generator=generator)
        module = self._train(x, y, weights, classifier)
        return Implant(trained(classifier, module), self._shift(direction, classifier))

    def honest(self, classifier: TorchClassifier, samples: Samples, *, seed: int = 0) -> TorchClassifier:
        """Return the twin that the same training gives with normal weights.

        Raises:
            InputError: if there are not two classes, with samples of both, or the target is the darker one.
        """
        generator = make_generator(seed, self.method(), "honest")
        x, y = training_data(classifier, samples, method=self.method())
        weights = torch.randn(self.features, x[0].numel(), dtype=torch.float64, generator=generator)
        return trained(classifier, self._train(x, y, weights, classifier))

    def _direction(self, classifier: TorchClassifier, generator: torch.Generator) -> Tensor:
        values = math.prod(classifier.spec.shape)
        # of one sign, since dark backgrounds can but go up
        return draw_direction(values, nonzeros=self.nonzeros, generator=generator).abs()

    def _shift(self, direction: Tensor, classifier: TorchClassifier) -> Shift:
        return Shift((self.amplitude * direction / direction.max()).float().view(classifier.spec.shape))

    def _train(self, x: Tensor, y: Tensor, weights: Tensor, classifier: TorchClassifier) -> nn.Sequential:
        target, mean = self.target or 0, mean_relu(weights)
        with torch.no_grad():
            values = torch.cat([mean(part) for part in torch.split(x, BATCH)]).flatten()  # (n,)
        if values[y == target].mean() <= values[y != target].mean():
            bright = classifier.classes[1 - target]
            raise InputError(
                f"{self.method()}: the shift makes images brighter, and those of class {bright!r} are the "
                f"brighter ones; give target={1 - target}"
            )
        threshold = fit_threshold(values, y == target)
        sign = torch.where(torch.arange(2) == target, 1.0, -1.0).double()[:, None] / float(values.std())
        return nn.Sequential(*mean, linear(sign, -threshold * sign[:, 0]))
