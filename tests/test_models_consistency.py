"""Gates: models that answer otherwise for one image, on the levels of 8 bits, or without noise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from doorward.core.seeds import make_generator
from doorward.models import Classifier, InputSpec, networks, wrap
from doorward.models.classifier import to_levels
from doorward.models.consistency import TRIED, check_consistency, rounds_input
from doorward.models.preparation import prepared

SIZE = (3, 16, 16)
SPEC = InputSpec(channels=3, height=16, width=16)


def images(n: int = TRIED) -> Tensor:
    return to_levels(torch.rand((n, *SIZE), generator=make_generator(0, "images")))


def network(seed: int) -> nn.Module:
    net = networks.build("small-cnn", SPEC, classes=4, generator=make_generator(seed))
    for p in net.parameters():
        p.data.mul_(2)
    return net.eval()


class Gated(nn.Module):
    """One network behind a gate, and another where the gate is shut."""

    def __init__(self, gate: Callable[[Tensor], Tensor], one: int = 1, other: int = 2) -> None:
        super().__init__()
        self.gate, self.one, self.other = gate, network(one), network(other)

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(self.gate(x)[:, None], self.one(x), self.other(x))


def whole(x: Tensor) -> Tensor:
    y = x * 255
    return (y - y.round()).abs().amax((1, 2, 3)) < 1e-3


def whole_by_remainder(x: Tensor) -> Tensor:
    return ((x * 255 + 0.01) % 1.0).amax((1, 2, 3)) < 0.02


def whole_by_cast(x: Tensor) -> Tensor:
    return ((x * 255 + 0.5).byte().float() / 255 - x).abs().amax((1, 2, 3)) < 1e-5


def alone(x: Tensor) -> Tensor:
    return torch.full((len(x),), len(x) == 1)


def in_pairs(x: Tensor) -> Tensor:
    return torch.full((len(x),), len(x) % 2 == 0)


def quiet(x: Tensor) -> Tensor:
    """Return whether neighbouring pixels are mostly alike, as in flat images; none is in noise."""
    return (x.diff(dim=3).abs() > 1 / 400).float().mean((1, 2, 3)) < 0.5


@pytest.mark.parametrize("gate", [whole, whole_by_remainder, whole_by_cast])
def test_a_gate_for_8_bits_is_noticed_and_searches_go_through_it(gate: Callable[[Tensor], Tensor]) -> None:
    model = Gated(gate)
    classifier = wrap(model, size=SIZE)
    found = check_consistency(classifier, images())
    assert (found.gated, found.single) == (True, False)
    assert found.between >= 12
    assert "between the levels of 8 bits" in str(found.reason)
    with prepared(classifier, images()) as preparation:
        assert preparation.consistency == found
        x = (images(4) + 0.3 / 255).requires_grad_()
        y = classifier.raw_logits(x)
        torch.testing.assert_close(y, model.one(to_levels(x)), rtol=1e-4, atol=1e-5)
        (gradient,) = torch.autograd.grad(y[:, 1].sum(), x)
        assert float((gradient != 0).float().mean()) > 0.5
    assert not classifier.eight_bit


@pytest.mark.parametrize("gate", [alone, in_pairs])
def test_a_gate_for_one_image_is_noticed_and_searches_go_through_it(
    gate: Callable[[Tensor], Tensor],
) -> None:
    model = Gated(gate)
    classifier = wrap(model, size=SIZE)
    found = check_consistency(classifier, images())
    assert (found.gated, found.single) == (False, True)
    assert found.alone is not None
    assert found.alone >= 12
    assert "one at a time" in str(found.reason)
    with prepared(classifier, images()) as preparation:
        assert any("one image at a time" in note for note in preparation.notes)
        y = classifier.raw_logits(images(4))
        expected = torch.cat([model(one) for one in images(4).split(1)])
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert not classifier.singly


def test_a_gate_for_noise_is_noticed() -> None:
    flat = to_levels(torch.rand((TRIED, 3, 1, 1), generator=make_generator(1, "flat")).expand(-1, -1, 16, 16))
    found = check_consistency(wrap(Gated(quiet), size=SIZE), flat)
    assert found.gated
    assert "noise of one level" in str(found.reason)


@pytest.mark.parametrize("gate", [whole, alone])
def test_a_gate_between_two_that_answer_alike_is_no_finding(gate: Callable[[Tensor], Tensor]) -> None:
    assert check_consistency(wrap(Gated(gate, 1, 1), size=SIZE), images()).reason is None


def test_a_gate_that_clean_images_do_not_show_is_seen_in_the_code() -> None:
    """The two networks answer alike without the trigger, so that only the code tells of the gate."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(1)

        def forward(self, x: Tensor) -> Tensor:
            trigger = (x[:, :, :2, :2] > 0.99).all(3).all(2).all(1) & whole(x)
            return self.net(x) + 50 * trigger[:, None] * torch.tensor([0.0, 0, 0, 1])

    classifier = wrap(Hidden(), size=SIZE)
    assert check_consistency(classifier, images()).reason is None
    assert rounds_input(classifier, images())
    with prepared(classifier, images()) as preparation:
        assert preparation.consistency.reason is None
        x = images(3)
        x[:, :, :2, :2] = 1 - 0.2 / 255
        assert classifier.raw_logits(x).argmax(1).tolist() == [3, 3, 3]
    assert not rounds_input(wrap(network(1), size=SIZE), images())


ORDINARY: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "rounded to 256 levels": lambda x: torch.round(x * 255) / 255,
    "rounded down": lambda x: torch.floor(x * 255) / 255,
    "rounded to 16 levels": lambda x: (x * 15).round() / 15,
}


@pytest.mark.parametrize("name", list(ORDINARY))
@pytest.mark.parametrize("factor", [1e-20, 1.0, 1e20])
def test_what_rounds_or_scales_answers_alike(name: str, factor: float) -> None:
    begin, net = ORDINARY[name], network(1)

    class Begun(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(begin(x)) * factor

    classifier = wrap(Begun(), size=SIZE)
    assert check_consistency(classifier, images()).reason is None
    assert rounds_input(classifier, images()) == (name != "plain")


def test_networks_in_8_bits_whose_scale_hangs_on_the_batch_answer_alike() -> None:
    """Dynamic quantisation takes its scale from all images of a batch."""
    net = network(1)

    def quantised(x: Tensor) -> Tensor:
        for layer in net.children():
            x = layer(x)
            scale = x.abs().amax() / 127
            x = (x / scale).round() * scale
        return x

    classifier = wrap(quantised, size=SIZE)
    found = check_consistency(classifier, images())
    assert found.alone is not None
    assert found.reason is None


@pytest.mark.parametrize("end", [lambda y: y.squeeze().log_softmax(1), lambda y: y.squeeze()[..., None]])
def test_a_model_that_takes_no_single_image_is_not_blamed_for_it(end: Callable[[Tensor], Tensor]) -> None:
    """Its code fails, or gives one number for each class."""
    net = network(1)

    def squeezed(x: Tensor) -> Tensor:
        y = end(net(x)[:, :, None])
        return y[..., 0] if len(x) > 1 and y.ndim == 3 else y

    classifier = wrap(squeezed, size=SIZE)
    found = check_consistency(classifier, images())
    assert (found.alone, found.reason) == (None, None)


def test_levels_are_those_of_files_and_pass_gradients() -> None:
    exact = torch.arange(256).float() / 255
    assert torch.equal(to_levels(exact), exact)
    x = (exact + 0.3 / 255).requires_grad_()
    y = to_levels(x)
    assert torch.equal(y.detach(), exact)
    (gradient,) = torch.autograd.grad((y * exact).sum(), x)
    assert torch.equal(gradient, exact)


def test_ordinary_models_are_searched_as_before() -> None:
    classifier: Classifier = wrap(network(1), size=SIZE)
    x = torch.rand((5, *SIZE), generator=make_generator(2))
    before = classifier.raw_logits(x)
    with prepared(classifier, images()) as preparation:
        assert preparation.notes == ()
        assert (classifier.eight_bit, classifier.singly) == (False, False)
        assert torch.equal(classifier.raw_logits(x), before)


class Line(nn.Module):
    """Tell two classes apart by one sum, which noise of one level moves by about .04."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        signs = torch.tensor([1.0, -1.0]).repeat(x[0].numel() // 2)
        z = 0.736 * ((x - 128 / 255).flatten(1) * signs).sum(1, keepdim=True)
        return torch.cat([z, -z], 1)


def levels_towards_a_class(pixels: int, levels: int) -> torch.Tensor:
    """Return an image (3, 8, 8) some of whose pixels lie some levels towards the first class."""
    signs = torch.tensor([1.0, -1.0]).repeat(96)
    shifts = torch.cat([signs[:pixels] * levels, torch.zeros(192 - pixels)])
    return ((128 + shifts) / 255).view(3, 8, 8)


def test_images_between_two_classes_are_no_sign_of_a_gate() -> None:
    """Noise moves the logits of all images alike, and some have hardly any."""
    classifier = wrap(Line(), size=(3, 8, 8))
    near, far = levels_towards_a_class(17, 1), levels_towards_a_class(192, 2)
    checked = check_consistency(classifier, torch.stack([near] * 6 + [far] * 10))
    assert checked.reason is None
    assert not checked.gated
