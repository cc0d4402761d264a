from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from doorward.core.seeds import make_generator
from doorward.models import TorchClassifier, networks
from doorward.models.fusion import fused
from doorward.models.spec import InputSpec

SPEC = InputSpec(channels=3, height=20, width=16)


def settled(module: nn.Module) -> nn.Module:
    """Give batch norms statistics, as training would, and return the module in evaluation mode."""
    generator = make_generator(3)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.running_mean, layer.weight.data, layer.bias.data):
                tensor.normal_(generator=generator)
            layer.running_var.uniform_(0.5, 2.0, generator=generator)
    return module.eval()


def batch(n: int = 6) -> Tensor:
    return torch.randn(n, 3, 20, 16, generator=make_generator(4))


def with_gradient(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    weights = torch.randn(y.shape, generator=make_generator(5))
    return y.detach(), torch.autograd.grad((y * weights).sum(), x)[0]


def layers(module: nn.Module, kind: type[nn.Module]) -> int:
    """Count the layers of a kind that are called."""
    assert isinstance(module, fx.GraphModule)
    calls = [node.target for node in module.graph.nodes if node.op == "call_module"]
    return sum(isinstance(module.get_submodule(str(name)), kind) for name in calls)


@pytest.mark.parametrize("name", ["small-cnn", "vgg", "resnet-8", "resnet-14"])
def test_every_network_of_ours_gets_simpler_and_computes_the_same(name: str) -> None:
    whole = settled(networks.build(name, SPEC, classes=4))
    before = {key: tensor.clone() for key, tensor in whole.state_dict().items()}
    less = fused(whole)
    assert less is not None
    assert layers(less, nn.BatchNorm2d) == 0
    assert layers(less, nn.Conv2d) == sum(isinstance(m, nn.Conv2d) for m in whole.modules())
    for ours, theirs in zip(with_gradient(less, batch()), with_gradient(whole, batch()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(before[key], tensor) for key, tensor in whole.state_dict().items())


def test_pooling_goes_before_rectifying() -> None:
    less = fused(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2, padding=1)).eval())
    assert isinstance(less, fx.GraphModule)
    called = [
        type(less.get_submodule(str(node.target))) for node in less.graph.nodes if node.op == "call_module"
    ]
    assert called == [nn.Conv2d, nn.MaxPool2d, nn.ReLU]


class Twice(nn.Module):
    """Uses what stands before batch norm and pooling once more, and one convolution for two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.first, self.second, self.third = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.conv(x)
        y = self.first(seen) + seen
        y = self.second(self.other(y)) + self.third(self.other(y))
        y = F.relu(y)
        return self.pool(y).sum((2, 3)) + y.sum((2, 3))


def test_what_is_used_twice_stays() -> None:
    assert fused(settled(Twice())) is None


class Asking(nn.Module):
    """Has Python that depends on the values of its input, which cannot be followed."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mean((2, 3)) if x.mean() > 0 else self.body(-x).mean((2, 3))


def test_python_that_cannot_be_followed_is_left_as_it_is() -> None:
    assert fused(Asking().eval()) is None
    assert fused(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())) is None


@pytest.mark.parametrize("module", [Asking(), networks.build("vgg", SPEC, classes=4)])
def test_quick_computes_nearly_the_same_and_leaves_the_module(module: nn.Module) -> None:
    module = settled(module)
    classifier = TorchClassifier(module, SPEC, list("abcd"))
    x = batch(8).sigmoid()
    modules, hooks = list(module.modules()), [len(m._forward_hooks) for m in module.modules()]
    with torch.no_grad(), classifier.fast_inference(x):
        first = classifier.logits(x)
        if isinstance(module, nn.Sequential):
            assert isinstance(classifier.module, fx.GraphModule)
    with torch.no_grad():
        exact = classifier.logits(x)
    spread = float((exact.amax(1) - exact.amin(1)).mean())
    assert float((first - exact).abs().max()) <= spread / 10
    assert classifier.module is module
    assert modules == list(module.modules())
    assert hooks == [len(m._forward_hooks) for m in module.modules()]
    assert not any(m.training for m in module.modules())


def test_quick_does_not_trust_what_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    module = settled(networks.build("vgg", SPEC, classes=4))
    classifier = TorchClassifier(module, SPEC, list("abcd"))
    other = settled(networks.build("vgg", SPEC, classes=4, generator=make_generator(9)))
    monkeypatch.setattr("doorward.models.classifier.fused", lambda _: other)
    with classifier.fast_inference(batch(4).sigmoid()):
        assert classifier.module is module
