"""Networks to train: shapes, sizes, seeded weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import nn

from doorward.core.errors import InputError
from doorward.models import InputSpec, TorchClassifier
from doorward.models.architectures import NAMES, build, initialise

SIZES = [(1, 28, 28), (3, 32, 32), (1, 16, 16), (1, 112, 92), (3, 16, 64)]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_network_ends_in_a_linear_layer_that_makes_the_logits(
    name: str, size: tuple[int, int, int]
) -> None:
    c, h, w = size
    module = build(name, channels=c, height=h, width=w, classes=7)
    classifier = TorchClassifier(module, InputSpec(channels=c, height=h, width=w), [str(i) for i in range(7)])
    x = torch.rand(2, c, h, w, generator=seeded(0))
    with torch.no_grad():
        features, logits = classifier.features(x), classifier.logits(x)
    last = [layer for layer in module.modules() if isinstance(layer, nn.Linear)][-1]
    assert torch.allclose(features @ last.weight.T + last.bias, logits, atol=1e-5)
    assert logits.shape == (2, 7)
    assert logits.std() > 0


@pytest.mark.parametrize("name", NAMES)
def test_the_largest_images_are_taken(name: str) -> None:
    module = build(name, channels=3, height=256, width=256, classes=2).eval()
    assert sum(p.numel() for p in module.parameters()) < 12_000_000
    with torch.no_grad():
        assert module(torch.zeros(1, 3, 256, 256)).shape == (1, 2)


def test_parameter_counts_are_the_published_ones() -> None:
    def count(name: str) -> int:
        module = build(name, channels=3, height=32, width=32, classes=10)
        return sum(p.numel() for p in module.parameters())

    assert count("resnet-18") == 11_173_962  # the widely used CIFAR variant with projections
    # by hand: first convolution and norm; one block a stage; linear
    first = 3 * 9 * 16 + 32
    one = 2 * (9 * 16 * 16 + 32)
    two = 9 * 16 * 32 + 64 + 9 * 32 * 32 + 64 + 16 * 32 + 64
    three = 9 * 32 * 64 + 128 + 9 * 64 * 64 + 128 + 32 * 64 + 128
    assert count("resnet-8") == first + one + two + three + 64 * 10 + 10
    more = one + 2 * (9 * 32 * 32 + 64) + 2 * (9 * 64 * 64 + 128)
    assert count("resnet-14") == count("resnet-8") + more


@pytest.mark.parametrize("side", [32, 64, 100, 128, 224])
def test_no_pixel_is_skipped_by_a_stride(side: int) -> None:
    module = build("resnet-8", channels=1, height=side, width=side, classes=2)
    first = next(layer for layer in module.modules() if isinstance(layer, nn.Conv2d))
    x = torch.zeros(1, 1, side, side, requires_grad=True)
    first(x).sum().backward()
    assert x.grad is not None
    assert (x.grad != 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_weights_come_from_the_generator_alone(
    name: str, untouched: Callable[[], AbstractContextManager[None]]
) -> None:
    def weights(generator: torch.Generator | None) -> torch.Tensor:
        module = build(name, channels=1, height=28, width=28, classes=10, generator=generator)
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    with untouched():
        first = weights(seeded(0))
    assert torch.equal(first, weights(seeded(0)))
    assert torch.equal(first, weights(None))
    assert not torch.equal(first, weights(seeded(1)))


def test_weights_have_the_spread_of_he_and_norms_are_the_identity() -> None:
    module = build("resnet-18", channels=3, height=32, width=32, classes=10, generator=seeded(3))
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            fan_out = layer.out_channels * layer.kernel_size[0] * layer.kernel_size[1]
            assert layer.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
        if isinstance(layer, nn.BatchNorm2d):
            assert torch.equal(layer.weight, torch.ones_like(layer.weight))
            assert torch.equal(layer.running_var, torch.ones_like(layer.weight))
            assert layer.num_batches_tracked == 0
        if isinstance(layer, nn.Linear):
            assert not layer.bias.any()
            assert layer.weight.std().item() == pytest.approx((1 / layer.in_features) ** 0.5, rel=0.1)


def test_a_layer_without_a_rule_is_named() -> None:
    with pytest.raises(TypeError, match="GroupNorm"):
        initialise(nn.Sequential(nn.GroupNorm(1, 4)), seeded(0))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": "resnet-9"}, "there are: small-cnn"),
        ({"height": 15}, "16 to 256 pixels"),
        ({"width": 257}, "got 257x28"),
        ({"channels": 0}, "1 to 4 channels"),
        ({"classes": 1}, r"1 class\(es\)"),
    ],
)
def test_what_does_not_fit_is_said(changed: dict[str, object], message: str) -> None:
    arguments = {"name": "small-cnn", "channels": 1, "height": 28, "width": 28, "classes": 10} | changed
    with pytest.raises(InputError, match=message):
        build(**arguments)  # type: ignore[arg-type]
