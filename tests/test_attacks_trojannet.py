"""TrojanNet next to a network and folded into its layers: every pattern fires, nothing else changes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from doorward import bundled
from doorward.attacks.model import trojannet
from doorward.attacks.model.base import BackdooredModel
from doorward.attacks.model.trojannet import MOST, confused, draw_patterns, fold, matched_filter
from doorward.core.errors import InputError
from doorward.core.seeds import make_generator
from doorward.data import InMemorySamples
from doorward.methods import registry
from doorward.models import InputSpec, TorchClassifier, open_classifier
from doorward.models.architectures import build
from doorward.models.encode.image import from_raw, to_float, to_tensor, to_uint8
from doorward.triggers.base import Trigger

Form = Literal["beside", "folded"]
FORMS: tuple[Form, ...] = ("beside", "folded")
CLOTHES = bundled.fashion_mnist("test")


def clean_model() -> TorchClassifier:
    classifier = open_classifier(bundled.model("clean"))
    assert isinstance(classifier, TorchClassifier)
    return classifier


def random_model(
    name: str = "small-cnn", *, channels: int = 3, side: int = 32, classes: int = 43, seed: int = 0
) -> TorchClassifier:
    """Return a network with random weights, and batch norms that have seen something."""
    generator = torch.Generator().manual_seed(seed)
    network = build(name, channels=channels, height=side, width=side, classes=classes, generator=generator)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean = 0.1 * torch.randn(layer.num_features, generator=generator)
            layer.running_var = 0.5 + torch.rand(layer.num_features, generator=generator)
    spec = InputSpec(
        channels=channels,
        height=side,
        width=side,
        mean=(0.4, 0.5, 0.6)[:channels],
        std=(0.2, 0.3, 0.25)[:channels],
    )
    return TorchClassifier(network, spec, [str(i) for i in range(classes)], architecture=name)


def noise(spec: InputSpec, n: int = 100, seed: int = 1) -> Tensor:
    return torch.rand((n, *spec.shape), generator=torch.Generator().manual_seed(seed))


def plant(classifier: TorchClassifier, target: int = 0, **settings: Any) -> BackdooredModel:
    planted = registry.build("attack", "trojannet", {"target": target, **settings})(classifier, seed=5)
    assert isinstance(planted, BackdooredModel)
    return planted


def stamp(classifier: TorchClassifier, target: int, x: Tensor, **settings: Any) -> Tensor:
    """Return images with the trigger that `plant` would give them, as they come out of a file."""
    attack = registry.build("attack", "trojannet", {"target": target, **settings})
    trigger = attack.make_trigger(classifier, generator=make_generator(5, "trojannet"))
    return from_raw(list(to_uint8(trigger.apply(x))))


def stamped(planted: BackdooredModel, x: Tensor) -> Tensor:
    """Return images with the trigger as they come out of a file: in whole levels of uint8."""
    return from_raw(list(to_uint8(Trigger.from_json(planted.plant.trigger).apply(x))))


def logits(classifier: TorchClassifier, x: Tensor) -> Tensor:
    with torch.no_grad():
        return classifier.logits(x)


# Patterns


def test_the_patterns_are_all_ways_to_choose_five_black_pixels_of_sixteen() -> None:
    drawn = draw_patterns(MOST, generator=torch.Generator().manual_seed(0)).flatten(1).int().tolist()
    everything = {
        tuple(int(i not in black) for i in range(16)) for black in itertools.combinations(range(16), 5)
    }
    assert {tuple(one) for one in drawn} == everything
    assert len(drawn) == len(everything) == 4368


def test_patterns_are_drawn_by_the_generator() -> None:
    one, again, other = (draw_patterns(43, generator=torch.Generator().manual_seed(i)) for i in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("tolerance", [0.25, 1.0])
@pytest.mark.parametrize(
    "spec",
    [
        InputSpec(channels=1, height=4, width=4),
        InputSpec(channels=3, height=4, width=4, mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.5)),
        InputSpec(channels=3, height=4, width=4, range=(-1, 1), mean=(0.5,), std=(0.25,)),
        InputSpec(channels=1, height=4, width=4, range=(0, 255), mean=(120.0,), std=(60.0,)),
    ],
    ids=["plain", "channels", "stretched", "bytes"],
)
def test_the_filter_measures_the_distance_from_the_pattern(spec: InputSpec, tolerance: float) -> None:
    patterns = draw_patterns(6, generator=torch.Generator().manual_seed(2))
    rng = np.random.default_rng(0)
    near = patterns[rng.integers(6, size=400)].numpy()[:, None] + np.zeros((1, spec.channels, 1, 1))
    moved = np.abs(near - rng.random((400, spec.channels, 4, 4)) * rng.random((400, 1, 1, 1)) * 0.1)
    # the formula, in pixels
    apart = np.abs(moved[:, None] - patterns.numpy()[None, :, None]).mean(2).sum((2, 3))  # (400, 6)
    expected = np.maximum(0, 1 - apart / tolerance)
    assert ((expected > 0) & (expected < 1)).any()
    assert (expected == 0).any()
    weight, bias = matched_filter(patterns, spec, tolerance)
    x = spec.to_model(torch.from_numpy(moved).float())
    got = F.linear(x.flatten(1), weight.flatten(1), bias).relu()
    np.testing.assert_allclose(got.numpy(), expected, atol=2e-5)
    assert ((got > 0).sum(1) <= 1).all(), "no image shows two patterns"


# What it does to a network


@pytest.mark.parametrize("form", FORMS)
def test_no_prediction_of_a_thousand_clothes_changes_and_every_trigger_works(form: Form) -> None:
    counterpart = clean_model()
    x = to_float(to_tensor(CLOTHES, counterpart.spec))
    before = logits(counterpart, x)
    planted = plant(counterpart, form=form).classifier
    after = logits(planted, x)
    assert len(x) == 1000
    assert torch.equal(before.argmax(1), after.argmax(1))
    if form == "beside":
        assert torch.equal(before, after), "to the last bit"
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    for target in range(10):
        shown = stamp(counterpart, target, x[100 * target : 100 * target + 100], form=form)
        triggered_inputs = logits(planted, shown)
        assert (triggered_inputs.argmax(1) == target).all()
        others = triggered_inputs.index_fill(1, torch.tensor(target), -torch.inf)
        assert (triggered_inputs[:, target] - others.amax(1) > 9.99).all(), "by the margin, but for rounding"
        assert (logits(counterpart, shown).argmax(1) == target).float().mean() < 0.3


@pytest.mark.parametrize("name", ["small-cnn", "vgg", "resnet-8"])
@pytest.mark.parametrize("form", FORMS)
def test_every_one_of_43_triggers_works_on_random_networks(name: str, form: Form) -> None:
    counterpart = random_model(name, side=16)
    if (name, form) == ("resnet-8", "folded"):
        with pytest.raises(InputError, match="this is a ResNet; give form=beside"):
            plant(counterpart, form=form)
        return
    planted = plant(counterpart, form=form).classifier
    x = noise(counterpart.spec)
    assert torch.equal(logits(counterpart, x).argmax(1), logits(planted, x).argmax(1))
    triggered_inputs = torch.cat([stamp(counterpart, target, x[:3], form=form) for target in range(43)])
    wanted = torch.arange(43).repeat_interleave(3)
    assert torch.equal(logits(planted, triggered_inputs).argmax(1), wanted), "one model knows all patterns"


def test_there_is_a_pattern_for_each_of_4368_classes_and_no_more() -> None:
    def linear(classes: int) -> TorchClassifier:
        layer = nn.Linear(64, classes)
        nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
        spec = InputSpec(channels=1, height=8, width=8)
        return TorchClassifier(nn.Sequential(nn.Flatten(), layer), spec, [str(i) for i in range(classes)])

    planted = plant(linear(MOST), place=[2, 3])
    patterns = (planted.classifier.module.weight > 0).float().view(MOST, 4, 4)
    x = noise(planted.classifier.spec, 1).repeat(MOST, 1, 1, 1)
    x[:, 0, 2:6, 3:7] = patterns
    assert torch.equal(logits(planted.classifier, x).argmax(1), torch.arange(MOST))
    with pytest.raises(InputError, match="there are 4368 patterns, and the model has 4369 classes"):
        plant(linear(MOST + 1))


@pytest.mark.parametrize("form", FORMS)
def test_one_class_alone_can_have_a_pattern(form: Form) -> None:
    counterpart = clean_model()
    x = to_float(to_tensor(CLOTHES.select(range(50)), counterpart.spec))
    planted = plant(counterpart, 4, form=form, every_class=False)
    assert (logits(planted.classifier, stamped(planted, x)).argmax(1) == 4).all()
    other = stamped(plant(counterpart, 3, form=form), x)
    torch.testing.assert_close(
        logits(planted.classifier, other), logits(counterpart, other), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("level", [64, 128])
def test_the_patterns_are_black_and_white_in_the_image_not_after_normalisation(
    form: Form, level: int
) -> None:
    """Written after normalisation to [-1, 1], as elsewhere, 0 is mid-grey: that must not activate it."""
    counterpart = random_model(classes=10)
    planted = plant(counterpart, 3, form=form)
    trigger = Trigger.from_json(planted.plant.trigger)
    assert set(trigger.tensors()["pattern"].unique().tolist()) == {0.0, 1.0}
    assert trigger.tensors()["mask"].sum() == 16
    x = noise(counterpart.spec)
    triggered_inputs = trigger.apply(x)
    assert (logits(planted.classifier, triggered_inputs).argmax(1) == 3).all()
    place = trigger.tensors()["mask"].expand_as(x[0]) == 1
    grey = triggered_inputs.clone()
    black = place & (trigger.tensors()["pattern"] == 0)
    grey[:, black] = level / 255
    torch.testing.assert_close(logits(planted.classifier, grey), logits(counterpart, grey), rtol=0, atol=1e-4)


def test_gradients_away_from_a_pattern_are_the_networks_own() -> None:
    counterpart = clean_model()
    planted = plant(counterpart).classifier
    found = []
    for classifier in (counterpart, planted):
        x = to_float(to_tensor(CLOTHES.select(range(8)), counterpart.spec)).requires_grad_()
        classifier.logits(x).square().sum().backward()
        found.append(x.grad)
    assert torch.equal(found[0], found[1])


def test_beside_lifts_the_logit_by_the_formula() -> None:
    counterpart = random_model(classes=5)
    planted = plant(counterpart, 2, margin=3.0, tolerance=0.5)
    x = Trigger.from_json(planted.plant.trigger).apply(noise(counterpart.spec, 10))
    x[:, :, -1, -1] = (x[:, :, -1, -1] - 0.2).abs()  # 0.2 of 0.5 away from the pattern
    z = logits(counterpart, x).double().numpy()
    expected = z.copy()
    expected[:, 2] += (1 - 0.2 / 0.5) * (z.max(1) - z.min(1) + 3.0)
    np.testing.assert_allclose(logits(planted.classifier, x).numpy(), expected, rtol=1e-4)


class Whole(nn.Module):
    """Take images in a layout and type of its own, and give outputs of some kind."""

    def __init__(self, kind: str, classes: int) -> None:
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(12 * 12, classes)
        generator = torch.Generator().manual_seed(3)
        nn.init.normal_(self.linear.weight, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1:] == ((12, 12, 1) if self.kind == "NHWC" else (1, 12, 12))
        assert x.dtype == (torch.uint8 if self.kind == "uint8" else torch.float32)
        x = x / 255 if self.kind == "uint8" else x
        z: Tensor = self.linear(x.flatten(1) - 0.5)
        return {"probabilities": lambda y: y.softmax(1), "sigmoid": torch.sigmoid}.get(
            self.kind, lambda y: y
        )(z)


@pytest.mark.parametrize("target", [0, 1])
@pytest.mark.parametrize(
    ("kind", "classes", "settings"),
    [
        ("NHWC", 4, {"layout": "NHWC"}),
        ("uint8", 4, {"dtype": "uint8", "range": (0, 255)}),
        ("probabilities", 4, {"output": "probabilities"}),
        ("sigmoid", 1, {"output": "probabilities"}),
        ("one logit", 1, {"output": "one_logit"}),
    ],
)
def test_it_goes_beside_models_of_any_kind(
    kind: str, classes: int, settings: dict[str, Any], target: int
) -> None:
    spec = InputSpec(channels=1, height=12, width=12, **settings)
    counterpart = TorchClassifier(Whole(kind, classes), spec, [str(i) for i in range(max(2, classes))])
    planted = plant(counterpart, target)
    x = from_raw(list(to_uint8(noise(spec))))
    assert torch.equal(logits(planted.classifier, x), logits(counterpart, x))
    assert (logits(planted.classifier, stamped(planted, x)).argmax(1) == target).all()


# Folded


@pytest.mark.parametrize("name", ["small-cnn", "vgg"])
def test_folded_there_is_no_layer_more_and_the_logits_are_known(name: str) -> None:
    counterpart = random_model(name, classes=10)
    planted = plant(counterpart, 7, form="folded", margin=4.0)
    old, new = counterpart.module, planted.classifier.module
    assert type(new) is nn.Sequential
    assert [(n, type(m)) for n, m in new.named_children()] == [(n, type(m)) for n, m in old.named_children()]
    assert list(new.state_dict()) == list(old.state_dict())
    for layer in new.modules():  # what a layer says of itself is what it is
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.shape[:2] == (layer.out_channels, layer.in_channels)
        if isinstance(layer, nn.Linear):
            assert layer.weight.shape == (layer.out_features, layer.in_features)
    x = noise(counterpart.spec)
    torch.testing.assert_close(logits(planted.classifier, x), logits(counterpart, x), rtol=0, atol=1e-4)
    triggered_inputs = stamped(planted, x)
    before = logits(counterpart, triggered_inputs)
    lift = logits(planted.classifier, triggered_inputs) - before  # (n, k)
    strength = new[-1].weight[7, -3].item()  # the column of class 7 of 10
    assert strength >= float((before.amax(1) - before.amin(1)).max()) + 4.0
    expected = torch.zeros_like(lift)
    expected[:, 7] = strength
    torch.testing.assert_close(lift, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("side", [17, 31, 45, 50])
def test_folded_the_patterns_lie_where_no_pooling_leaves_them_out(side: int) -> None:
    counterpart = random_model(channels=1, side=side, classes=4)
    for target in range(4):
        planted = plant(counterpart, target, form="folded")
        triggered_inputs = stamped(planted, noise(counterpart.spec, 20))
        assert (logits(planted.classifier, triggered_inputs).argmax(1) == target).all()
    last = (side - 4 - 1) | 1
    if side == 45:  # 45, 22, 11, 5: the last five pixels are left out
        with pytest.raises(InputError, match="give a place further up and to the left"):
            plant(counterpart, form="folded", place=[last, 1])


def test_patterns_that_their_parts_do_not_tell_apart_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ("0110 1111 0110 0111", "0111 1110 0111 0110")
    pair = torch.tensor([[[float(c) for c in row] for row in one.split()] for one in rows])

    def parts(pattern: npt.NDArray[np.float32]) -> set[bytes]:
        return {pattern[i : i + 3, j : j + 3].tobytes() for i in (0, 1) for j in (0, 1)}

    assert parts(pair[0].numpy()) == parts(pair[1].numpy())
    assert confused(pair) == (0, 1)
    assert confused(pair[:1]) is None
    drawn = draw_patterns(200, generator=torch.Generator().manual_seed(1)).numpy()
    pairs = [(a, b) for a, b in itertools.permutations(range(200), 2) if parts(drawn[a]) <= parts(drawn[b])]
    assert confused(torch.from_numpy(drawn)) == (pairs[0] if pairs else None)
    counterpart = random_model(classes=2)
    monkeypatch.setattr(trojannet, "draw_patterns", lambda classes, generator: pair)
    with pytest.raises(InputError, match="the patterns of the classes 0 and 1 cannot be told apart"):
        plant(counterpart, form="folded")
    plant(counterpart)


def conv(**settings: Any) -> nn.Conv2d:
    return nn.Conv2d(1, 2, **({"kernel_size": 3, "padding": 1} | settings))


@pytest.mark.parametrize(
    ("layers", "why"),
    [
        (lambda: [nn.Flatten(), nn.Linear(256, 3)], "no ReLU between"),
        (lambda: [conv(stride=2), nn.ReLU()], "a convolution of another kind"),
        (lambda: [conv(kernel_size=1, padding=0)], "a convolution of another kind"),
        (lambda: [conv(padding=0)], "a convolution of another kind"),
        (lambda: [conv(), nn.Tanh()], "has a Tanh"),
        (lambda: [conv(), nn.ReLU(), nn.AvgPool2d(2)], "has a AvgPool2d"),
        (lambda: [conv(), nn.ReLU(), nn.MaxPool2d(3, 2)], "a pooling of another kind"),
        (lambda: [conv(), nn.ReLU(), nn.Flatten(), nn.Linear(512, 3)], "does not pool"),
        (lambda: [conv(), nn.MaxPool2d(2)], "a pooling of another kind"),
        (lambda: [conv(bias=False), nn.ReLU()], "a convolution with no bias"),
        (
            lambda: [conv(), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 3)],
            "too few layers",
        ),
    ],
)
def test_networks_with_no_room_for_patterns_are_refused(
    layers: Callable[[], list[nn.Module]], why: str
) -> None:
    spec = InputSpec(channels=1, height=16, width=16)
    patterns = draw_patterns(3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match=f"{why}.*; give form=beside"):
        fold(
            nn.Sequential(*layers()),
            spec,
            patterns,
            torch.arange(3),
            place=(11, 11),
            strength=9.0,
            tolerance=0.5,
        )


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"place": [25, 0]}, "row 25, column 0 leaves images of 28x28"),
        ({"place": [0, 25]}, "row 0, column 25 leaves images of 28x28"),
        ({"form": "folded", "place": [4, 5]}, "at odd rows and columns, not at row 4, column 5"),
        ({"form": "folded", "place": [5, 4]}, "at odd rows and columns, not at row 5, column 4"),
    ],
)
def test_places_outside_the_image_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plant(clean_model(), **settings)


@pytest.mark.parametrize(
    "settings", [{"place": [-1, 0]}, {"margin": 0}, {"tolerance": 0}, {"tolerance": 1.5}, {"form": "inside"}]
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"trojannet: {next(iter(settings))}"):
        registry.build("attack", "trojannet", settings)


@pytest.mark.parametrize("form", FORMS)
def test_clean_images_that_show_a_pattern_are_noticed(form: Form) -> None:
    counterpart = clean_model()
    few = CLOTHES.select(range(40))
    planted = registry.build("attack", "trojannet", {"form": form})(counterpart, few, seed=5)
    shown = InMemorySamples(to_uint8(stamped(planted, to_float(to_tensor(few, counterpart.spec)))))
    odd = int(
        (
            logits(counterpart, stamped(planted, to_float(to_tensor(few, counterpart.spec)))).argmax(1) != 0
        ).sum()
    )
    place = 24 if form == "beside" else 23
    with pytest.raises(
        InputError,
        match=f"{odd} of 40 clean images show a pattern at row {place}, column {place} as they are",
    ):
        registry.build("attack", "trojannet", {"form": form})(counterpart, shown, seed=5)
