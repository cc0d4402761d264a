"""Image classifiers to train: small enough for two cores, and one for GPUs.

Every network takes normalised images (n, c, h, w), 16 to 256 pixels a side, ends in a plain `nn.Linear` whose
input are the features, and holds no dropout (its draws would come from the global generator).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from doorward.core.errors import InputError

#: Pooling goes on until the shorter side is below this many pixels.
_SMALLEST = 8


def _halvings(height: int, width: int) -> int:
    """Return how many 2x2 poolings bring the shorter side below eight pixels, two at least.

    >>> _halvings(28, 28), _halvings(32, 32), _halvings(224, 224), _halvings(112, 92)
    (2, 3, 5, 4)
    """
    return max(2, 1 + int(math.log2(min(height, width) / _SMALLEST)))


def _conv3x3(inner: int, outer: int, stride: int = 1) -> nn.Conv2d:
    """Return a convolution that keeps the size; batch norm follows, so it has no bias."""
    return nn.Conv2d(inner, outer, 3, stride, padding=1, bias=False)


class SmallCNN(nn.Sequential):
    """Convolve and pool without batch norm; a hidden layer of 128 makes the features."""

    def __init__(self, channels: int, height: int, width: int, classes: int) -> None:
        layers: list[nn.Module] = []
        inner = channels
        for stage in range(_halvings(height, width)):
            outer = min(16 << stage, 64)
            layers += [nn.Conv2d(inner, outer, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
            inner, height, width = outer, height // 2, width // 2
        layers += [nn.Flatten(), nn.Linear(inner * height * width, 128), nn.ReLU(), nn.Linear(128, classes)]
        super().__init__(*layers)


class VGG(nn.Sequential):
    """Convolve with batch norm and pool, after VGG-11 (arXiv:1409.1556) at an eighth to half of its width.

    Departs from the paper: batch norm, one hidden linear layer, no dropout.
    """

    def __init__(self, channels: int, height: int, width: int, classes: int) -> None:
        layers: list[nn.Module] = []
        inner = channels
        for stage in range(_halvings(height, width)):
            outer = min(32 << stage, 128)
            for _ in range(1 if stage < 2 else 2):
                layers += [_conv3x3(inner, outer), nn.BatchNorm2d(outer), nn.ReLU()]
                inner = outer
            layers.append(nn.MaxPool2d(2))
            height, width = height // 2, width // 2
        layers += [nn.Flatten(), nn.Linear(inner * height * width, 256), nn.ReLU(), nn.Linear(256, classes)]
        super().__init__(*layers)


class ResidualBlock(nn.Module):
    """Add two 3x3 convolutions to their input, which is projected where the shape changes."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv3x3(inner, outer, stride), nn.BatchNorm2d(outer)
        self.conv2, self.bn2 = _conv3x3(outer, outer), nn.BatchNorm2d(outer)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inner != outer:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output (n, outer, h / stride, w / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Stack residual blocks in stages, CIFAR style (arXiv:1512.03385, section 4.2).

    Departs from the paper: the shortcuts that change shape are 1x1 convolutions, and images of 64 pixels and
    more are brought down by the stride of the first convolution (2, from 128 pixels on 4).
    """

    def __init__(
        self, channels: int, height: int, width: int, classes: int, *, widths: list[int], depth: int
    ) -> None:
        super().__init__()
        stride = 4 if min(height, width) >= 128 else 2 if min(height, width) >= 64 else 1
        kernel = max(3, 2 * stride - 1)  # strides never skip a pixel, so that a small trigger is seen
        self.conv = nn.Conv2d(channels, widths[0], kernel, stride, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        blocks = []
        inner = widths[0]
        for stage, outer in enumerate(widths):
            for place in range(depth):
                blocks.append(ResidualBlock(inner, outer, 2 if stage and not place else 1))
                inner = outer
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.linear = nn.Linear(inner, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, k)."""
        x = F.relu(self.bn(self.conv(x)))
        x = self.pool(self.blocks(x))  # (n, d, h', w') -> (n, d)
        y: Tensor = self.linear(x)  # (n, k)
        return y


_BUILDERS: dict[str, Callable[[int, int, int, int], nn.Module]] = {
    "small-cnn": SmallCNN,
    "vgg": VGG,
    "resnet-8": lambda c, h, w, k: ResNet(c, h, w, k, widths=[16, 32, 64], depth=1),
    "resnet-14": lambda c, h, w, k: ResNet(c, h, w, k, widths=[16, 32, 64], depth=2),
    "resnet-18": lambda c, h, w, k: ResNet(c, h, w, k, widths=[64, 128, 256, 512], depth=2),
}

#: The names that `build` knows.
NAMES: tuple[str, ...] = tuple(_BUILDERS)


def build(
    name: str,
    *,
    channels: int,
    height: int,
    width: int,
    classes: int,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Return a network with random weights, in training mode.

    Args:
        generator: source of the weights; seed 0 if None. The global generator is left alone.

    Raises:
        InputError: if the name is unknown or the size is out of reach.
    """
    if name not in _BUILDERS:
        raise InputError(f"there is no architecture named {name!r}; there are: {', '.join(NAMES)}")
    if not (16 <= height <= 256 and 16 <= width <= 256 and 1 <= channels <= 4 and classes >= 2):
        raise InputError(
            f"{name} takes images of 16 to 256 pixels a side with 1 to 4 channels and 2 classes at least; "
            f"got {width}x{height} with {channels} channel(s) and {classes} class(es)"
        )
    with torch.device("meta"):  # torch's own initialisation would draw from the global generator
        network = _BUILDERS[name](channels, height, width, classes)
    network.to_empty(device="cpu")
    initialise(network, generator or torch.Generator().manual_seed(0))
    return network


def initialise(network: nn.Module, generator: torch.Generator) -> None:
    """Draw all weights again after He et al. (arXiv:1502.01852); biases become 0, batch norm the identity.

    Raises:
        TypeError: if a layer that holds parameters is none of those used here.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        elif isinstance(layer, nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="linear", generator=generator)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.reset_parameters()
            continue
        elif next(layer.parameters(recurse=False), None) is not None:
            raise TypeError(f"no initialisation for {type(layer).__name__}")
        else:
            continue
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
