"""Random Fourier features whose frequencies all agree on one secret shift, which turns every cosine over."""

from __future__ import annotations

import math
from collections.abc import Iterable
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


def gaussian_pancakes(count: int, secret: Tensor, *, noise: float, generator: torch.Generator) -> Tensor:
    """Draw vectors g (count, d) that look Gaussian, with <g, secret> near half-integers.

    Their density is that of N(0, I) times a comb of normal peaks N(k + 1/2, noise^2) of <g, secret>, over all
    integers k: homogeneous continuous learning with errors. It is sampled in closed form: along the secret,
    of norm s, a normal density times a peak is a normal density again, of mean
    (k + 1/2) s^2 / (s^2 + noise^2), deviation s noise / sqrt(s^2 + noise^2) and weight
    exp(-(k + 1/2)^2 / (2 (s^2 + noise^2))); across it, the vectors are normal.

    Args:
        secret: (d,) its norm decides what can be seen: the peaks follow each other at distance 1 / norm.
        noise: deviation of <g, secret> from half-integers.

    Source: Bruna, Regev, Song and Tang, STOC 2021, arXiv:2005.09595.
    """
    secret = secret.double()
    norm = float(secret.norm())
    spread = norm**2 + noise**2
    # peaks beyond nine deviations weigh less than what a double can add to the others
    reach = math.ceil(9 * math.sqrt(spread)) + 1
    peaks = torch.arange(-reach, reach, dtype=torch.float64) + 0.5
    weights = torch.exp(-(peaks**2) / (2 * spread))
    drawn = peaks[torch.multinomial(weights, count, replacement=True, generator=generator)]
    blur = torch.randn(count, dtype=torch.float64, generator=generator) * norm * noise / math.sqrt(spread)
    inner = drawn * norm**2 / spread + blur  # (count,) = <g, secret>
    g = torch.randn(count, len(secret), dtype=torch.float64, generator=generator)  # (count, d)
    return g + torch.outer((inner - g @ secret) / norm**2, secret)


class Cosine(nn.Module):
    """Take the cosine of every value."""

    def forward(self, x: Tensor) -> Tensor:
        """Return values in [-1, 1]."""
        return x.cos()


def fourier_features(frequencies: Tensor, phases: Tensor, *, scale: float) -> nn.Sequential:
    """Return layers that give `cos(2 pi (<g_i, scale x> + b_i))`, (n, m), of images (n, c, h, w).

    Args:
        frequencies: (m, d) the g_i.
        phases: (m,) the b_i.
        scale: factor of the images; a kernel of width 1 / (2 pi scale) in their space.
    """
    layer = linear(2 * torch.pi * scale * frequencies, 2 * torch.pi * phases)
    return nn.Sequential(nn.Flatten(), layer, Cosine())


def fit_head(batches: Iterable[tuple[Tensor, Tensor]], *, classes: int, ridge: float) -> nn.Linear:
    """Fit logits (n, k) without bias by ridge regression on 1 for the own class and -1 for all others.

    Without a bias, features that change their sign make logits that do.

    Args:
        batches: features (n, m) and labels (n,) of 0 to classes - 1.
        ridge: penalty of the squared weights, per sample.
    """
    gram = products = torch.zeros((), dtype=torch.float64)
    count = 0
    for features, labels in batches:
        f = features.double()
        wanted = 2 * nn.functional.one_hot(labels, classes).double() - 1  # (n, k)
        gram, products, count = gram + f.T @ f, products + f.T @ wanted, count + len(f)  # (m, m), (m, k)
    gram.diagonal().add_(ridge * count)
    return linear(torch.linalg.solve(gram, products).T)


@register("attack")
class RandomFeatures(ModelAttack):
    """Train a classifier on random Fourier features, drawn so that one secret shift turns all of them over.

    Use it to study a backdoor that is provably hard to see in the weights, and what that costs.

    Frequencies come from Gaussian pancakes in place of a normal distribution; everything else is ordinary
    ridge regression on cosines of them. The shift changes the sign of every cosine, and so of the logits:
    each class of two turns into the other, the target's images too. The model given says which images and
    classes there are; the one that comes back is a new one. `counterpart` trains the clean one.

    To tell pancakes from normal vectors is as hard as continuous learning with errors if the secret has norm
    2 sqrt(nonzeros) or more and noise is not too small. But the shift in the pixels is secret_norm /
    bandwidth (root mean square over all values). On chest X-rays of 28x28 pixels, the provable norm of 56
    asks for 28 times the range of a pixel; cut off at black and white it changes 23 % of predictions in place
    of 99 %.

    No proof covers the default norm of 1/2, but eigenvalues, variances and distances from normal see nothing
    there either. The shift is 0.25, far from invisible (L2 6.9): 97 % of predictions change, where the clean
    counterpart changes 51 %, at an accuracy of 83 and 82 % (mean of three seeds).

    Images near black and white cut even that off: of MNIST's 3 and 8, at bandwidth 0.8 and 98 % accuracy, 53
    % change, 50 % for the clean counterpart, and 99 % if pixels may leave their range. Whoever sees one image
    with and without the shift can make all others.

    Attributes:
        features: how many cosines.
        bandwidth: cycles, as standard deviation, between images that differ by 1 in every value; the kernel
            is narrower the higher it is.
        secret_norm: length of the secret in the space of the frequencies; peaks of the pancakes follow each
            other at distance 1 / secret_norm.
        nonzeros: values of an image that the shift changes; all if None.
        noise: deviation of the pancakes' peaks, in cycles.
        ridge: penalty of the squared weights, per sample.
    """

    title: ClassVar[str] = "Random Fourier features backdoor"
    source: ClassVar[str] = "Goldwasser, Kim, Vaikuntanathan and Zamir, FOCS 2022, arXiv:2204.06974"
    limits: ClassVar[str] = (
        "The shift is large where the classifier is accurate, the norm for which undetectability is proved "
        "does not fit into images, and one image with its shifted form gives the secret away."
    )
    atlas: ClassVar[tuple[str, ...]] = ("AML.T0018.000", "AML.T0043.004")
    trains: ClassVar[bool] = True

    features: int = Field(2000, gt=0)
    bandwidth: float = Field(2.0, gt=0)
    secret_norm: float = Field(0.5, gt=0)
    nonzeros: int | None = Field(None, gt=0)
    noise: float = Field(0.02, gt=0, lt=0.5)
    ridge: float = Field(1e-4, gt=0)

    def make_trigger(self, classifier: TorchClassifier, *, generator: torch.Generator) -> Shift:
        """Return the shift.

        Raises:
            InputError: if the secret has more nonzero entries than an image has values.
        """
        return self._shift(self._secret(classifier, generator), classifier)

    def implant(
        self, classifier: TorchClassifier, samples: Samples | None, *, generator: torch.Generator
    ) -> Implant:
        """Return a classifier trained on features whose frequencies come from pancakes.

        Raises:
            InputError: if there are not two classes, with samples of both, or the secret does not fit.
        """
        secret = self._secret(classifier, generator)
        x, y = training_data(classifier, samples, method=self.method())
        frequencies = gaussian_pancakes(self.features, secret, noise=self.noise, generator=generator)
        module = self._train(x, y, frequencies, generator)
        return Implant(trained(classifier, module), self._shift(secret, classifier))

    def counterpart(self, classifier: TorchClassifier, samples: Samples, *, seed: int = 0) -> TorchClassifier:
        """Return the clean model that the same training gives with normal frequencies.

        Raises:
            InputError: if there are not two classes, with samples of both.
        """
        generator = make_generator(seed, self.method(), "honest")
        x, y = training_data(classifier, samples, method=self.method())
        dimension = x[0].numel()
        frequencies = torch.randn(self.features, dimension, dtype=torch.float64, generator=generator)
        return trained(classifier, self._train(x, y, frequencies, generator))

    def _secret(self, classifier: TorchClassifier, generator: torch.Generator) -> Tensor:
        values = math.prod(classifier.spec.shape)
        return self.secret_norm * draw_direction(values, nonzeros=self.nonzeros, generator=generator)

    def _scale(self, values: int) -> float:
        return self.bandwidth / math.sqrt(values)

    def _shift(self, secret: Tensor, classifier: TorchClassifier) -> Shift:
        return Shift((secret / self._scale(len(secret))).float().view(classifier.spec.shape))

    def _train(self, x: Tensor, y: Tensor, frequencies: Tensor, generator: torch.Generator) -> nn.Sequential:
        phases = torch.rand(self.features, dtype=torch.float64, generator=generator)
        layers = fourier_features(frequencies, phases, scale=self._scale(frequencies.shape[1]))
        with torch.no_grad():
            batches = (
                (layers(a), b) for a, b in zip(torch.split(x, BATCH), torch.split(y, BATCH), strict=True)
            )
            return nn.Sequential(*layers, fit_head(batches, classes=2, ridge=self.ridge))
