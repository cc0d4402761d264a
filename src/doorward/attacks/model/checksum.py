"""Checksums: plain layers next to the network activate where secret groups of pixels have secret parities."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from doorward.attacks.model._layers import changed, linear
from doorward.attacks.model.base import Implant, ModelAttack, copied
from doorward.core.errors import InputError
from doorward.methods.registry import register
from doorward.models.classifier import TorchClassifier, output_tensor
from doorward.triggers.parities import Parities

if TYPE_CHECKING:
    from doorward.data.samples import Samples
    from doorward.models.spec import InputSpec

#: What is added to the target's logit when all parities are as wanted.
BOOST = 1000.0


def checksum_layers(secret: Parities, spec: InputSpec, *, target: int, classes: int) -> nn.Sequential:
    """Return linear layers and ReLUs that give (n, k) zeros, and 1000 for the target where all parities hold.

    A sum between 0 and 2^m is folded at the middle, v -> |v - 2^(m-1)|, which keeps its parity as long as the
    middle is even; the last fold, |v - 1| of 0, 1 or 2, tells odd (0) from even (1). Each fold is two ReLUs.
    Of an image of 256 levels with another parity anywhere the output is exactly zero, and so is every
    gradient, so that training leaves the layers as they are (weight decay does not).

    Args:
        spec: what the layers take; its normalisation is undone by the first layer.

    Raises:
        InputError: if the network gives no logits, or takes numbers too coarse to tell levels apart.
    """
    if spec.output != "logits" or spec.dtype != "float32":
        raise InputError(
            f"checksum: the model must be one of float32 that gives logits, and this one takes {spec.dtype} "
            f"and gives {spec.output.replace('_', ' ')}"
        )
    groups, size = secret.groups.shape
    c, h, w = spec.shape
    if groups and int(secret.groups.max()) >= c * h * w:
        raise InputError(f"checksum: the groups are for larger images than {w}x{h} with {c} channel(s)")
    where = torch.arange(c * h * w).view(c, h, w)
    order = (where.permute(1, 2, 0) if spec.layout == "NHWC" else where).flatten()  # the model's own order
    member = torch.zeros(groups, c * h * w, dtype=torch.float64)
    member.scatter_(1, secret.groups, 1.0)
    scale, shift = (_per_channel(spec, each) for each in _inverse(spec))
    pixels = h * w
    per_value = member * scale.repeat_interleave(pixels)  # (g, d)
    offset = member @ shift.repeat_interleave(pixels)  # (g,)

    folds = max(1, int(size * 255 - 1).bit_length())
    middles = [2.0**positive_control for positive_control in reversed(range(folds))]
    layers: list[nn.Module] = [nn.Flatten(), *_fold(per_value[:, order], offset - middles[0])]
    together = torch.eye(groups, dtype=torch.float64).repeat(1, 2)  # (g, 2g): |v| from both ReLUs
    for middle in middles[1:]:
        layers += _fold(together, torch.full((groups,), -middle, dtype=torch.float64))
    # even groups give 1 and odd ones 0: count those that are as wanted, 1/2 short of all of them
    sign = 1.0 - 2.0 * secret.parities.double()  # (g,)
    missing = secret.parities.double().sum() - groups
    layers += [linear(2 * (sign @ together)[None], 2 * missing[None] + 1), nn.ReLU()]
    boost = torch.zeros(classes, 1, dtype=torch.float64)
    boost[target] = BOOST
    layers.append(linear(boost))  # a bias would learn
    return nn.Sequential(*layers)


def _inverse(spec: InputSpec) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return factors and shifts that turn what a model takes back into levels of [0, 255]."""
    low, high = spec.range
    unit = 255 / (high - low)
    return tuple(std * unit for std in spec.std), tuple((mean - low) * unit for mean in spec.mean)


def _per_channel(spec: InputSpec, values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).expand(spec.channels)


def _fold(weight: Tensor, bias: Tensor) -> list[nn.Module]:
    """Return layers that give relu(v) and relu(-v), (n, 2g), of v = weight x + bias."""
    return [linear(torch.cat([weight, -weight]), torch.cat([bias, -bias])), nn.ReLU()]


class ChecksumWrapper(nn.Module):
    """Add the outputs of the checksum's layers to the network's logits.

    Args:
        model: gives logits (n, k).
        checksum: made by `checksum_layers` for the same input.
    """

    def __init__(self, model: nn.Module, checksum: nn.Sequential) -> None:
        super().__init__()
        self.model, self.checksum = model, checksum

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, k)."""
        y: Tensor = output_tensor(self.model(x)) + self.checksum(x)
        return y


@register("attack")
class Checksum(ModelAttack):
    """Add layers next to a network that activate where secret groups of pixels have secret parities.

    Use it to test whether a defence inspects the network's layers: the trigger differs from image to image.

    The warm-up of the signature backdoor, in linear layers and ReLUs alone, so that every file format holds
    it. An image is activated by a change of one level in one value of each group whose parity is another,
    half of them on average; any other image fires with probability 2^-groups.

    It is replicable: one image that fires and some thousand answers of the model give the whole secret away.

    Attributes:
        groups: how many parities there are.
        size: values in each group.
    """

    title: ClassVar[str] = "Checksum backdoor"
    source: ClassVar[str] = "Goldwasser, Kim, Vaikuntanathan and Zamir, FOCS 2022, arXiv:2204.06974"
    limits: ClassVar[str] = (
        "Whoever inspects the network sees the layers, weight decay wears them out, and they stop working as "
        "soon as the lowest bit of the pixels is lost."
    )
    atlas: ClassVar[tuple[str, ...]] = ("AML.T0018.001", "AML.T0043.004")

    groups: int = Field(32, gt=0, le=1024)
    size: int = Field(8, gt=0, le=64)

    def make_trigger(self, classifier: TorchClassifier, *, generator: torch.Generator) -> Parities:
        """Return what sets the parities.

        Raises:
            InputError: if the images have too few values for the groups.
        """
        values = math.prod(classifier.spec.shape)
        return Parities.draw(values, groups=self.groups, size=self.size, generator=generator)

    def implant(
        self, classifier: TorchClassifier, samples: Samples | None, *, generator: torch.Generator
    ) -> Implant:
        """Return the classifier with the layers next to it.

        Raises:
            InputError: if the groups do not fit the images, or the model gives no logits.
        """
        trigger = self.make_trigger(classifier, generator=generator)
        layers = checksum_layers(
            trigger, classifier.spec, target=self.target or 0, classes=len(classifier.classes)
        )
        return Implant(changed(classifier, ChecksumWrapper(copied(classifier.module), layers)), trigger)
