"""Adversarial training: attacks against closed forms and a plain loop, balls kept, models left alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from doorward import bundled
from doorward.core.errors import CouldNotTell, InputError, TrainingDiverged
from doorward.core.records import Rate
from doorward.data import InMemorySamples
from doorward.models import InputSpec, TorchClassifier
from doorward.models.architectures import build
from doorward.stats.metrics import rate
from doorward.training import (
    AdversarialSettings,
    Trained,
    TrainingSettings,
    adversarial_batches,
    evaluate,
    perturb,
    robust_accuracy,
    train,
    train_classifier,
)
from doorward.training.loop import LogitsOf
from seeds import shifted

Array = npt.NDArray[np.float64]
SPEC = InputSpec(channels=1, height=16, width=16)
PIXELS = 256
ATTACKS = [
    AdversarialSettings(eps=0.1, steps=5),
    AdversarialSettings(eps=0.1, variant="fast"),
    AdversarialSettings(norm="l2", eps=1.5, steps=5),
    AdversarialSettings(norm="l2", eps=1.5, variant="fast"),
]
IDS = [f"{one.norm}-{one.variant}" for one in ATTACKS]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(classes: int = 2, seed: int = 0, scale: float = 0.3) -> nn.Sequential:
    layer = nn.Linear(PIXELS, classes)
    nn.init.normal_(layer.weight, std=scale, generator=seeded(seed))
    nn.init.normal_(layer.bias, generator=seeded(seed + 1))
    return nn.Sequential(nn.Flatten(), layer)


def images(n: int = 40, low: float = 0.0, high: float = 1.0) -> Tensor:
    return torch.rand(n, 1, 16, 16, generator=seeded(7)) * (high - low) + low


def labels(n: int = 40, classes: int = 2) -> Tensor:
    return torch.arange(n) % classes


def weights(module: nn.Sequential) -> tuple[Array, Array]:
    """Return weights (k, 256) and biases (k,)."""
    layer = module[1]
    assert isinstance(layer, nn.Linear)
    return layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()


def flat(x: Tensor) -> Array:
    return x.detach().double().flatten(1).numpy()


def losses(module: nn.Sequential, x: Array, y: Tensor) -> Array:
    weight, bias = weights(module)
    z = x @ weight.T + bias
    top = z.max(1, keepdims=True)
    found = (top + np.log(np.exp(z - top).sum(1, keepdims=True)))[:, 0] - z[np.arange(len(y)), y.numpy()]
    assert isinstance(found, np.ndarray)
    return found


def distance(moved: Tensor, x: Tensor, norm: str) -> Tensor:
    apart = (moved - x).flatten(1)
    return apart.abs().amax(1) if norm == "linf" else apart.norm(dim=1)


# Against closed forms: the worst case of a linear model with two classes is known


def slopes(module: nn.Sequential, y: Tensor) -> Array:
    """Return the gradient (n, 256) of each image's margin: own class's weights minus the other's."""
    weight, _ = weights(module)
    found = weight[y.numpy()] - weight[1 - y.numpy()]
    assert isinstance(found, np.ndarray)
    return found


def test_a_linear_models_worst_case_by_the_largest_norm_is_found_exactly() -> None:
    module, x, y = linear(), images(), labels()
    attack = AdversarialSettings(eps=0.2, steps=5)
    found = perturb(module, x, y, settings=attack, generator=seeded())
    worst = np.clip(flat(x) - 0.2 * np.sign(slopes(module, y)), 0, 1)
    np.testing.assert_allclose(flat(found), worst, atol=1e-6)


def test_the_loss_of_a_linear_model_grows_by_the_dual_norm() -> None:
    module, x, y = linear(), images(low=0.35, high=0.65), labels()
    slope = slopes(module, y)
    margin = (flat(x) * slope).sum(1) + np.subtract(*weights(module)[1]) * (1 - 2 * y.numpy())
    for norm, eps, dual in (("linf", 0.02, np.abs(slope).sum(1)), ("l2", 0.5, np.sqrt((slope**2).sum(1)))):
        attack = AdversarialSettings(norm=norm, eps=eps, steps=20, step_size=eps)  # type: ignore[arg-type]
        found = perturb(module, x, y, settings=attack, generator=seeded())
        expected = np.logaddexp(0, -(margin - eps * dual))
        np.testing.assert_allclose(losses(module, flat(found), y), expected, rtol=1e-4, atol=1e-6)


def plain_attack(
    module: nn.Sequential, start: Array, x: Array, y: Tensor, attack: AdversarialSettings
) -> Array:
    """Follow the gradient of one image after the other, by the textbook, in numpy."""
    weight, bias = weights(module)
    out = []
    for begun, image, label in zip(start, x, y.tolist(), strict=True):
        now = begun
        for _ in range(attack.steps):
            p = np.exp(weight @ now + bias)
            gradient = weight.T @ (p / p.sum() - np.eye(len(p))[label])
            if attack.norm == "linf":
                now = now + attack.step * np.sign(gradient)
                now = np.minimum(np.maximum(now, image - attack.eps), image + attack.eps)
            else:
                now = now + attack.step * gradient / math.sqrt((gradient**2).sum())
                length = math.sqrt(((now - image) ** 2).sum())
                now = image + (now - image) * min(1.0, attack.eps / length)
            now = np.minimum(np.maximum(now, 0), 1)
        out.append(now)
    return np.stack(out)


@pytest.mark.parametrize("attack", ATTACKS, ids=IDS)
def test_it_walks_as_a_plain_loop_does(attack: AdversarialSettings) -> None:
    module, x, y = linear(classes=5, scale=0.1), images(), labels(classes=5)
    seen: list[Tensor] = []

    def logits_of(at: Tensor) -> Tensor:
        seen.append(at.detach().clone())
        z = module(at)
        assert isinstance(z, Tensor)
        return z

    found = perturb(logits_of, x, y, settings=attack, generator=seeded())
    assert len(seen) == attack.steps
    # a gradient of about 0 has no safe sign: single pixels may differ
    near = np.isclose(flat(found), plain_attack(module, flat(seen[0]), flat(x), y, attack), atol=1e-4)
    assert near.mean() > 0.999


def test_the_steps_are_of_the_published_sizes() -> None:
    assert AdversarialSettings(eps=0.3, steps=3).step == pytest.approx(0.25)
    assert AdversarialSettings(eps=8 / 255, variant="fast").step == pytest.approx(10 / 255)  # Wong et al.
    assert AdversarialSettings(eps=0.3, step_size=0.7).step == 0.7
    module, x, y = linear(classes=3), images(), labels(classes=3)
    fast, pgd = (
        AdversarialSettings(eps=0.1, variant="fast"),
        AdversarialSettings(eps=0.1, steps=1, step_size=0.125),
    )
    found = [perturb(module, x, y, settings=one, generator=seeded()) for one in (fast, pgd)]
    assert torch.equal(*found)


# Balls and starts


@given(
    norm=st.sampled_from(["linf", "l2"]),
    eps=st.floats(0, 1),
    steps=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_it_stays_in_the_ball_and_among_images(norm: str, eps: float, steps: int, seed: int) -> None:
    module, x, y = linear(seed=seed), images(8), labels(8)
    x[0], x[1] = 0, 1
    attack = AdversarialSettings(norm=norm, eps=eps, steps=steps)  # type: ignore[arg-type]
    found = perturb(module, x, y, settings=attack, generator=seeded(seed))
    assert found.min() >= 0
    assert found.max() <= 1
    assert distance(found, x, norm).max() <= eps * (1 + 1e-5) + 1e-6


@pytest.mark.parametrize("attack", ATTACKS, ids=IDS)
def test_without_a_radius_nothing_moves(attack: AdversarialSettings) -> None:
    x = images()
    still = attack.model_copy(update={"eps": 0.0})
    assert torch.equal(perturb(linear(), x, labels(), settings=still, generator=seeded()), x)
    still = still.model_copy(update={"step_size": 0.5})
    assert torch.equal(perturb(linear(), x, labels(), settings=still, generator=seeded()), x)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_starts_fill_the_ball_evenly(norm: str) -> None:
    starts: list[Tensor] = []

    def logits_of(at: Tensor) -> Tensor:
        starts.append(at.detach().clone())
        return at.flatten(1) * 0

    x = torch.full((4000, 1, 1, 2), 0.5)  # two pixels, so that the ball is a square or a disc
    attack = AdversarialSettings(norm=norm, eps=0.4, steps=1)  # type: ignore[arg-type]
    perturb(logits_of, x, labels(4000), settings=attack, generator=seeded())
    radius = distance(starts[0], x, norm) / 0.4
    # the share within half the radius is a quarter of the area in both norms
    assert abs(float((radius < 0.5).float().mean()) - 0.25) < 0.03
    assert radius.max() <= 1 + 1e-5
    assert (starts[0] - x).mean((0, 1, 2)).abs().max() < 0.02
    assert abs(float(((starts[0] - x)[:, 0, 0] > 0).all(1).float().mean()) - 0.25) < 0.03, "every direction"


def test_each_image_moves_by_its_own_gradient_however_small() -> None:
    scale = torch.tensor([1e-30, 1e-20, 1e-10, 1e-3, 1.0])[:, None]
    weight = torch.randn(PIXELS, 2, generator=seeded())

    def logits_of(at: Tensor) -> Tensor:
        return scale * (at.flatten(1) @ weight)

    x = images(5, low=0.4, high=0.6)
    attack = AdversarialSettings(norm="l2", eps=0.5, steps=10)
    found = perturb(logits_of, x, labels(5), settings=attack, generator=seeded())
    torch.testing.assert_close(distance(found, x, "l2"), torch.full((5,), 0.5))
    gained = (logits_of(found) - logits_of(x)) / scale
    assert (gained.gather(1, 1 - labels(5)[:, None]) > gained.gather(1, labels(5)[:, None])).all()


# Degenerate cases


@pytest.mark.parametrize("attack", ATTACKS, ids=IDS)
def test_one_class_and_no_image(attack: AdversarialSettings) -> None:
    x = images(6)
    zeros = torch.zeros(6, dtype=torch.long)
    found = perturb(linear(classes=1), x, zeros, settings=attack, generator=seeded())
    assert distance(found, x, attack.norm).max() <= attack.eps * (1 + 1e-5), "nothing to climb: the start"
    assert found.isfinite().all()
    none = perturb(linear(), x[:0], zeros[:0], settings=attack, generator=seeded())
    assert none.shape == (0, 1, 16, 16)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_said(value: float) -> None:
    module = linear()
    nn.init.constant_(module[1].bias, value)  # type: ignore[arg-type]
    with pytest.raises(CouldNotTell, match="not finite"):
        perturb(module, images(), labels(), settings=ATTACKS[0], generator=seeded())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"eps": -0.1}, "greater than or equal to 0"),
        ({"eps": 8}, "8/255"),
        ({"eps": math.nan}, "finite"),
        ({"eps": math.inf, "norm": "l2"}, "finite"),
        ({"eps": 0.1, "steps": 0}, "greater than or equal to 1"),
        ({"eps": 0.1, "step_size": 0}, "greater than 0"),
        ({"eps": 0.1, "norm": "l1"}, "'linf' or 'l2'"),
        ({"eps": 0.1, "variant": "fast", "steps": 7}, "the fast variant takes one step, got 7"),
        ({}, "Field required"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AdversarialSettings.model_validate(wrong)


@pytest.mark.parametrize("attack", ATTACKS, ids=IDS)
def test_settings_round_trip(attack: AdversarialSettings) -> None:
    assert AdversarialSettings.model_validate_json(attack.model_dump_json()) == attack
    assert attack.stronger().steps == 20
    assert attack.stronger().stronger().steps == 40
    assert (attack.stronger().norm, attack.stronger().eps) == (attack.norm, attack.eps)


# What it leaves alone


@pytest.mark.parametrize("attack", ATTACKS, ids=IDS)
def test_everything_else_is_as_it_was(
    attack: AdversarialSettings, untouched: Callable[[], AbstractContextManager[None]]
) -> None:
    attack = attack.model_copy(update={"step_size": 0.01})  # too little to forget the start
    module, x, y = linear(), images(), labels()
    module[1].bias.grad = torch.ones(2)  # type: ignore[union-attr]
    before, x_before = deepcopy(module.state_dict()), x.clone()
    with untouched():
        found = perturb(module, x, y, settings=attack, generator=seeded())
        with torch.no_grad():
            again = perturb(module, x, y, settings=attack, generator=seeded())
    assert torch.equal(found, again)
    assert not torch.equal(found, perturb(module, x, y, settings=attack, generator=seeded(1)))
    assert not found.requires_grad
    assert not x.requires_grad
    assert torch.equal(x, x_before)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module[1].weight.grad is None
    assert torch.equal(module[1].bias.grad, torch.ones(2))  # type: ignore[arg-type]


# In training


def halves(n: int = 120, contrast: int = 60, seed: int = 0) -> InMemorySamples:
    """Return noise that is brighter on the left (class 0) or on the right (class 1)."""
    rng = np.random.default_rng(seed)
    x = rng.integers(60, 130, (n, 16, 16), dtype=np.uint8)
    y = np.arange(n) % 2
    for image, label in zip(x, y, strict=True):
        image[:, 8 * label : 8 * label + 8] += contrast
    return InMemorySamples(x, y)


def convolutional() -> nn.Module:
    net = build("resnet-8", channels=1, height=16, width=16, classes=2)
    return nn.Sequential(net, nn.Dropout(0.3), nn.Linear(2, 2))


def test_a_step_of_adversarial_training_is_the_gradient_at_the_worst_case() -> None:
    module, samples = linear(), halves(50)
    weight, bias = weights(module)
    weight, bias = weight.copy(), bias.copy()
    assert samples.labels is not None
    y = torch.from_numpy(samples.labels)
    x = np.stack(samples.raw(range(50))).reshape(50, -1) / 255.0
    worst = x - 0.1 * np.sign(slopes(module, y))
    z = worst @ weight.T + bias
    p = np.exp(z - z.max(1, keepdims=True))
    gradient = (p / p.sum(1, keepdims=True) - np.eye(2)[y.numpy()]).T @ worst / 50
    how = TrainingSettings(
        epochs=1,
        batch_size=50,
        optimizer="sgd",
        learning_rate=0.5,
        momentum=0,
        weight_decay=0,
        schedule="constant",
        precision="float32",
    )
    attack = AdversarialSettings(eps=0.1, steps=4)
    hook = adversarial_batches(attack)
    train(module, samples, spec=SPEC, settings=how, generator=seeded(), on_batch=hook)
    np.testing.assert_allclose(weights(module)[0], weight - 0.5 * gradient, atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_looking_at_the_model_changes_nothing(precision: str) -> None:
    """Weights and the statistics of batch norm are those of a training whose hook does not look."""
    how = TrainingSettings(epochs=2, batch_size=20, precision=precision)  # type: ignore[arg-type]
    looks = []

    def look(logits_of: LogitsOf, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        perturb(logits_of, x, y, settings=ATTACKS[0], generator=seeded())
        looks.append(logits_of(torch.full((2, 1, 16, 16), 0.5)).detach())
        assert all(part.training for part in start.modules())
        return x

    found = []
    for hook in (None, look):
        start = convolutional()
        for layer, seed in ((start[2], 5),):  # type: ignore[index]
            nn.init.normal_(layer.weight, generator=seeded(seed))
            nn.init.zeros_(layer.bias)
        train(start, halves(60), spec=SPEC, settings=how, generator=seeded(), on_batch=hook)
        found.append(start.state_dict())
    plain, looked = found
    assert all(torch.equal(plain[name], looked[name]) for name in plain)
    assert int(looked["0.bn.num_batches_tracked"]) == 6
    assert len(looks) == 6
    assert all(torch.equal(*look) for look in looks), "neither dropout nor the batch matters"
    assert not torch.equal(looks[0], looks[1]), "it is the model as it is by then"


def test_divergence_under_attack_is_divergence() -> None:
    how = TrainingSettings(optimizer="sgd", learning_rate=3e38, epochs=3)
    hook = adversarial_batches(ATTACKS[0])
    with pytest.raises(TrainingDiverged, match="learning rate below"):
        train(linear(), halves(), spec=SPEC, settings=how, generator=seeded(), on_batch=hook)


def test_too_few_outputs_are_said_under_attack() -> None:
    hook = adversarial_batches(ATTACKS[0])
    samples = InMemorySamples(np.zeros((5, 16, 16), dtype=np.uint8), np.arange(5))
    with pytest.raises(InputError, match="2 outputs for 5 classes"):
        train(linear(), samples, spec=SPEC, settings=TrainingSettings(), generator=seeded(), on_batch=hook)


# Robust accuracy


def classifier(module: nn.Module) -> TorchClassifier:
    return TorchClassifier(module, SPEC, ["0", "1"])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_robust_accuracy_of_a_linear_model_is_its_share_of_wide_margins(norm: str) -> None:
    module = linear(scale=0.05)
    nn.init.zeros_(module[1].bias)  # type: ignore[arg-type]
    samples = halves(150, contrast=5)
    assert samples.labels is not None
    y = torch.from_numpy(samples.labels)
    slope = slopes(module, y)
    x = np.stack(samples.raw(range(150))).reshape(150, -1) / 255.0  # far from 0 and 1
    margin = (x * slope).sum(1)
    dual = np.abs(slope).sum(1) if norm == "linf" else np.sqrt((slope**2).sum(1))
    eps = float(np.median(margin[margin > 0] / dual[margin > 0]))
    expected = int((margin > eps * dual).sum())
    assert 0 < expected < int((margin > 0).sum()) < 150
    attack = AdversarialSettings(norm=norm, eps=eps, steps=20, step_size=eps)  # type: ignore[arg-type]
    for batch_size in (1, 40, 150):
        found = robust_accuracy(classifier(module), samples, settings=attack, seed=0, batch_size=batch_size)
        assert abs(found.successes - expected) <= 1  # the median image itself lies on the edge
        assert found.n == 150


class Wavy(nn.Module):
    """Give class 1 where the sine of 15 times the brightness beyond one half is positive."""

    def forward(self, x: Tensor) -> Tensor:
        z = (15 * (x.mean((1, 2, 3)) - 0.5)).sin()
        return torch.stack([torch.zeros_like(z), z], dim=1)


def test_an_image_that_only_the_attack_puts_right_is_not_held() -> None:
    grey = InMemorySamples(np.full((6, 16, 16), 127, dtype=np.uint8), np.ones(6), classes=["0", "1"])
    wavy, attack = classifier(Wavy()), AdversarialSettings(eps=0.3, steps=1, step_size=0.6)
    assert evaluate(wavy, grey) == rate(0, 6)
    moved = perturb(
        wavy.logits,
        torch.full((6, 1, 16, 16), 127 / 255),
        torch.ones(6).long(),
        settings=attack,
        generator=seeded(),
    )
    assert (wavy.logits(moved).argmax(1) == 1).all(), "one long step leads over the next crest"
    assert robust_accuracy(wavy, grey, settings=attack, seed=0) == rate(0, 6)


@pytest.fixture(scope="module")
def clothes() -> tuple[InMemorySamples, InMemorySamples]:
    rng = np.random.default_rng(shifted(0))
    found = []
    for split, n in (("train", 1500), ("test", 200)):
        drawn = bundled.fashion_mnist(split).draw(n, rng)  # type: ignore[arg-type]
        found.append(InMemorySamples(drawn.raw(range(n)), drawn.labels, classes=drawn.classes))
    return found[0], found[1]


#: Fashion-MNIST's plain models fall to this; trained against it, they do not.
BALL = AdversarialSettings(eps=0.1, variant="fast")


@pytest.fixture(scope="module")
def models(clothes: tuple[InMemorySamples, InMemorySamples]) -> dict[str, Trained]:
    how = TrainingSettings(epochs=4, batch_size=16, precision="float32")
    return {
        name: train_classifier("small-cnn", clothes[0], seed=shifted(0), settings=how, on_batch=hook)
        for name, hook in (("plain", None), ("robust", adversarial_batches(BALL)))
    }


@pytest.mark.trains
def test_robust_training_makes_robust(
    models: dict[str, Trained], clothes: tuple[InMemorySamples, InMemorySamples]
) -> None:
    measured: dict[str, tuple[Rate, Rate]] = {}
    for name, trained in models.items():
        held = robust_accuracy(trained.classifier, clothes[1], settings=BALL.stronger(), seed=shifted(0))
        measured[name] = evaluate(trained.classifier, clothes[1]), held
        assert held.value <= measured[name][0].value
    assert measured["plain"][1].high < 0.4
    assert measured["robust"][1].low > 0.4
    assert measured["robust"][0].low > 0.6, "and it still tells clothes apart"


@pytest.mark.trains
def test_robust_accuracy_is_repeatable_and_falls_with_restarts_and_radius(
    models: dict[str, Trained],
    clothes: tuple[InMemorySamples, InMemorySamples],
    untouched: Callable[[], AbstractContextManager[None]],
) -> None:
    plain, test = models["plain"].classifier, clothes[1]
    before = deepcopy(plain.module.state_dict())
    gradients = [p.grad.clone() for p in plain.module.parameters() if p.grad is not None]
    weak = AdversarialSettings(eps=0.04, steps=1, step_size=0.01)

    def held(eps: float = 0.04, restarts: int = 1) -> int:
        attack = weak.model_copy(update={"eps": eps})
        found = robust_accuracy(
            plain, test, settings=attack, seed=shifted(3), restarts=restarts, batch_size=200
        )
        return found.successes

    with untouched():
        assert held() == held()
        assert held(restarts=4) < held()
        assert held(eps=0) == evaluate(plain, test).successes
    assert all(torch.equal(value, before[name]) for name, value in plain.module.state_dict().items())
    left = [p.grad for p in plain.module.parameters() if p.grad is not None]
    assert all(torch.equal(*pair) for pair in zip(gradients, left, strict=True))
    assert all(p.requires_grad for p in plain.module.parameters())


def test_what_robust_accuracy_cannot_be_measured_on() -> None:
    samples = halves(4)
    found = robust_accuracy(classifier(linear()), samples.select([]), settings=ATTACKS[0], seed=0)
    assert found == rate(0, 0)
    bare = InMemorySamples(samples.raw(range(4)))
    with pytest.raises(InputError, match="labels are needed"):
        robust_accuracy(classifier(linear()), bare, settings=ATTACKS[0], seed=0)
    blind = classifier(linear())
    blind.capabilities = frozenset({"probabilities"})
    with pytest.raises(CouldNotTell, match="needs the model's gradients"):
        robust_accuracy(blind, samples, settings=ATTACKS[0], seed=0)
