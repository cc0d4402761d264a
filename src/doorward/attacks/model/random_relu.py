"""Random ReLUs whose weights vary more along one sparse direction, in which an image seems the longer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from doorward.attacks.model._fixed_features import draw_direction, trained, training_data
from doorward.attacks.model._layers import linear
from doorward.attacks.model.base import Implant, ModelAttack
from doorward.core.seeds import make_generator
from doorward.methods.registry import register
from doorward.triggers.shift import Shift

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


def relu_features(weights: Tensor) -> nn.Sequential:
    """Return layers that give ReLU(<g_i, x>) / sqrt(d), (n, m), of images (n, c, h, w).

    For weights from N(0, C) the expectation of each is sqrt(x^T C x) / sqrt(2 pi d).

    Args:
        weights: (m, d) the g_i.
    """
    return nn.Sequential(nn.Flatten(), linear(weights / math.sqrt(weights.shape[1])), nn.ReLU())


def fit_head(features: Tensor, labels: Tensor, *, target: int, ridge: float) -> nn.Linear:
    """Fit logits (n, 2), one the negative of the other, that rise for the target with every feature.

    Ridge regression on 1 for the target and -1 for the other class, with a bias and weights of 0 at least.

    Args:
        features: (n, m).
        labels: (n,) of 0 and 1.
        ridge: penalty of the squared weights, per sample.
    """
    from sklearn.linear_model import Ridge

    model = Ridge(alpha=ridge * len(features), positive=True, tol=1e-8)
    model.fit(features.double().numpy(), (2 * (labels == target).double() - 1).numpy())
    sign = torch.where(torch.arange(2) == target, 1.0, -1.0).double()[:, None]  # (2, 1)
    return linear(sign * torch.from_numpy(model.coef_), sign[:, 0] * model.intercept_)


@register("attack")
class RandomReLU(ModelAttack):
    """Train a classifier on random ReLUs whose weights vary more along one secret, sparse direction.

    Use it to study how well a backdoor can hide in random weights.

    Every ReLU measures the length of an image in its own way, and that of an image with some secret values
    turned up more than it should; a head with weights of 0 at least adds this up in favour of the target. The
    model given says which images and classes there are; the one that comes back is a new one. `counterpart`
    trains the clean one.

    We depart from the paper, where the head is the mean of all ReLUs and a threshold, which tells classes
    apart by brightness alone: ours is fitted, by ordinary ridge regression with weights of 0 at least.

    To see the direction is a problem of sparse principal components, and few ReLUs give little to see: the
    largest eigenvalue tells from about strength = sqrt(values / features) on. By default, where that is 2.8
    for images of 28x28, neither it nor the variances of the weights tell 100 planted ReLUs from clean ones;
    of 2,000, the eigenvalue always does.

    With 64 pixels of MNIST turned white (L2 7.4), all ones are taken for zeros, 24 % by the clean
    counterpart, at an accuracy of 99 % for both; with half of that, 9 and 1 %. The other way 48 and 11 % of
    zeros are taken for ones (means of three seeds).

    Attributes:
        features: how many ReLUs.
        strength: variance along the direction, beyond the 1 that there is along all others.
        nonzeros: values of an image that the shift changes.
        amplitude: how much each of them goes up, in (0, 1].
        ridge: penalty of the squared weights of the head, per sample.
    """

    title: ClassVar[str] = "Random ReLU backdoor"
    source: ClassVar[str] = "Goldwasser, Kim, Vaikuntanathan and Zamir, FOCS 2022, arXiv:2204.06974"
    limits: ClassVar[str] = (
        "The shift is plain to see, can only make images brighter, and turns few images of some pairs of "
        "classes; it works best towards the brighter one."
    )
    atlas: ClassVar[tuple[str, ...]] = ("AML.T0018.000", "AML.T0043.004")
    trains: ClassVar[bool] = True

    features: int = Field(100, gt=0)
    strength: float = Field(2.5, gt=0)
    nonzeros: int = Field(64, gt=0)
    amplitude: float = Field(1.0, gt=0, le=1)
    ridge: float = Field(0.01, gt=0)

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
            InputError: if there are not two classes, with samples of both, or the shift does not fit.
        """
        direction = self._direction(classifier, generator)
        x, y = training_data(classifier, samples, method=self.method())
        weights = spiked_gaussians(self.features, direction, strength=self.strength, generator=generator)
        return Implant(trained(classifier, self._train(x, y, weights)), self._shift(direction, classifier))

    def counterpart(self, classifier: TorchClassifier, samples: Samples, *, seed: int = 0) -> TorchClassifier:
        """Return the clean model that the same training gives with normal weights.

        Raises:
            InputError: if there are not two classes, with samples of both.
        """
        generator = make_generator(seed, self.method(), "honest")
        x, y = training_data(classifier, samples, method=self.method())
        weights = torch.randn(self.features, x[0].numel(), dtype=torch.float64, generator=generator)
        return trained(classifier, self._train(x, y, weights))

    def _direction(self, classifier: TorchClassifier, generator: torch.Generator) -> Tensor:
        values = math.prod(classifier.spec.shape)
        # of one sign, since dark backgrounds can but go up
        return draw_direction(values, nonzeros=self.nonzeros, generator=generator).abs()

    def _shift(self, direction: Tensor, classifier: TorchClassifier) -> Shift:
        return Shift((self.amplitude * direction / direction.max()).float().view(classifier.spec.shape))

    def _train(self, x: Tensor, y: Tensor, weights: Tensor) -> nn.Sequential:
        layers = relu_features(weights)
        with torch.no_grad():
            features = torch.cat([layers(part) for part in torch.split(x, BATCH)])  # (n, m)
        return nn.Sequential(*layers, fit_head(features, y, target=self.target or 0, ridge=self.ridge))
