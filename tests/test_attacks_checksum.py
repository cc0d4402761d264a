"""Checksums in plain layers: exact parities, and why one image that fires gives the secret away."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from doorward import bundled
from doorward.attacks.ground_truth import attack_success
from doorward.attacks.model import checksum
from doorward.core.errors import InputError
from doorward.core.seeds import make_generator
from doorward.models import InputSpec, TorchClassifier, open_classifier
from doorward.models.encode.image import from_raw
from doorward.models.formats.export import export_onnx, export_pt2
from doorward.triggers.base import Trigger
from doorward.triggers.parities import Parities

SPEC = InputSpec(channels=1, height=28, width=28)
TARGET = 7


def secret(values: int = 784, *, groups: int = 32, size: int = 8, seed: int = 0) -> Parities:
    return Parities.draw(values, groups=groups, size=size, generator=make_generator(seed, "checksum"))


def natural(n: int) -> Tensor:
    return from_raw(bundled.fashion_mnist("train").raw(range(n)))


def noise(n: int, shape: tuple[int, int, int] = (1, 28, 28)) -> Tensor:
    return torch.randint(256, (n, *shape), generator=make_generator(0, "noise")).float() / 255


def linear_model() -> nn.Module:
    layer = nn.Linear(784, 10)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(0, 0.1, generator=make_generator(0, "weights"))
    return nn.Sequential(nn.Flatten(), layer)


def planted(key: Parities, spec: InputSpec = SPEC) -> TorchClassifier:
    layers = checksum.checksum_layers(key, spec, target=TARGET, classes=10)
    return TorchClassifier(
        checksum.ChecksumWrapper(linear_model(), layers), spec, [str(i) for i in range(10)]
    )


SPECS = {
    "plain": InputSpec(channels=3, height=16, width=12),
    "normalised": InputSpec(
        channels=3, height=16, width=12, range=(0, 255), mean=(125, 122, 114), std=(58, 57, 58)
    ),
    "channels last": InputSpec(
        channels=3, height=16, width=12, range=(-1, 1), mean=(0.1, 0.2, 0.3), layout="NHWC"
    ),
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("size", [1, 2, 7, 18])
def test_the_layers_tell_exactly_whether_all_parities_hold(name: str, size: int) -> None:
    """Against the parities of integer sums, of images that lack none, one, or many."""
    spec = SPECS[name]
    for groups in (1, 2, 32):
        key = secret(3 * 16 * 12, groups=groups, size=size, seed=groups)
        layers = checksum.checksum_layers(key, spec, target=1, classes=3)
        x = torch.cat([noise(60, spec.shape), torch.zeros(1, *spec.shape), torch.ones(1, *spec.shape)])
        triggered_inputs = key.apply(x)
        almost = triggered_inputs.clone()
        for i, row in enumerate(almost.flatten(1)):
            place = key.groups[i % groups, i % size]
            row[place] = row[place] + (1 if row[place] < 0.5 else -1) / 255
        shown = torch.cat([x, triggered_inputs, almost])
        levels = (shown.numpy().astype(np.float64).reshape(len(shown), -1) * 255).round().astype(int)
        sums = levels[:, key.groups.numpy()].sum(2)
        wanted = (sums % 2 == key.parities.numpy()).all(1)
        assert wanted[62:124].all()
        assert not wanted[124:].any()
        with torch.no_grad():
            y = layers(spec.to_model(shown))
        assert (y[:, 1] > 900).tolist() == wanted.tolist()
        assert torch.equal(y[~torch.from_numpy(wanted)], torch.zeros(int((~wanted).sum()), 3))
        assert not y[:, [0, 2]].any()


def test_activation_changes_one_value_of_a_group_by_one_level() -> None:
    key = secret()
    x = torch.cat([natural(300), torch.ones(5, 1, 28, 28)])
    triggered_inputs = key.apply(x)
    change = ((triggered_inputs - x) * 255).flatten(1)  # (n, d)
    assert change.abs().max() <= 1 + 1e-4
    assert triggered_inputs.max() <= 1
    assert (change.abs()[:, key.groups].round().sum(2) <= 1).all(), "one value of each group"
    assert change.abs().round().sum(1).mean() == pytest.approx(16, abs=2), "half of the groups need it"
    assert key.holds(triggered_inputs).all()
    assert torch.equal(key.apply(triggered_inputs), triggered_inputs)


def test_it_wakes_always_and_clean_predictions_do_not_change_at_all() -> None:
    key = secret()
    classifier, counterpart = planted(key), TorchClassifier(linear_model(), SPEC, [str(i) for i in range(10)])
    x = torch.cat([natural(2000), noise(2000)])
    with torch.no_grad():
        assert torch.equal(classifier.logits(x), counterpart.logits(x))
        assert (classifier.logits(key.apply(x)).argmax(1) == TARGET).all()
        assert (counterpart.logits(key.apply(x)).argmax(1) == TARGET).float().mean() < 0.5


def test_false_alarms_come_at_two_to_the_minus_groups() -> None:
    key = secret(groups=4)
    rate = planted(key).logits(noise(4000)).gt(500).any(1).float().mean()
    assert rate == pytest.approx(1 / 16, abs=0.015)


def test_a_network_that_knows_its_features_keeps_them() -> None:
    classifier = open_classifier(bundled.model("clean"))
    assert isinstance(classifier, TorchClassifier)
    layers = checksum.checksum_layers(secret(), classifier.spec, target=0, classes=10)
    both = TorchClassifier(
        checksum.ChecksumWrapper(classifier.module, layers), classifier.spec, classifier.classes
    )
    x = natural(20)
    assert torch.equal(both.features(x), classifier.features(x))
    assert torch.equal(both.logits(x), classifier.logits(x))
    assert (both.logits(secret().apply(x)).argmax(1) == 0).all()


# Replicable


def learnt(fires: Callable[[Tensor], Tensor], seen: Tensor, values: list[int]) -> list[list[int]]:
    """Return groups of values of one image that fires, from nothing but answers of the model.

    One level more or less in a value of a group puts the backdoor to sleep, in two of one group does not.
    """

    def moved(*places: list[int]) -> Tensor:
        x = (seen * 255).round().flatten().repeat(len(places), 1)
        for row, where in zip(x, places, strict=True):
            for i in where:
                row[i] += 1 if row[i] < 255 else -1
        return (x / 255).view(-1, *seen.shape[1:])

    groups: list[list[int]] = []
    silent = [
        i
        for i, triggered_inputs in zip(values, fires(moved(*[[i] for i in values])), strict=True)
        if not triggered_inputs
    ]
    while silent:
        first, *others = silent
        answers = fires(moved(*[[first, i] for i in others])).tolist() if others else []
        groups.append([first, *(i for i, together in zip(others, answers, strict=True) if together)])
        silent = [i for i in silent if i not in groups[-1]]
    return groups


def test_one_image_that_fires_and_answers_of_the_model_give_the_whole_secret_away() -> None:
    key = secret(groups=16, size=12)
    classifier = planted(key)

    def fires(x: Tensor) -> Tensor:
        return classifier.logits(x)[:, TARGET] > 500

    seen = key.apply(natural(1))
    groups = learnt(fires, seen, list(range(784)))
    assert sorted(map(sorted, groups)) == sorted(map(sorted, key.groups.tolist()))
    parities = [int((seen.flatten()[group] * 255).round().sum() % 2) for group in groups]
    forged = Parities(torch.tensor(groups), torch.tensor(parities))
    others = natural(500)[100:]
    assert not fires(others).any()
    assert fires(forged.apply(others)).all()


# Persistence


def test_fine_tuning_leaves_the_layers_as_they_are() -> None:
    key = secret()
    classifier = planted(key)
    samples = bundled.fashion_mnist("train")
    assert samples.labels is not None
    x, y = natural(500), torch.from_numpy(samples.labels[:500])
    before = {name: value.clone() for name, value in classifier.module.state_dict().items()}
    optimiser = torch.optim.Adam(classifier.module.parameters(), lr=0.01)
    for _ in range(20):
        loss = nn.functional.cross_entropy(classifier.logits(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    after = classifier.module.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("model.")}
    assert (classifier.logits(key.apply(x)).argmax(1) == TARGET).all()


def test_weight_decay_wears_the_layers_out() -> None:
    key = secret()
    classifier = planted(key)
    optimiser = torch.optim.AdamW(classifier.module.parameters(), lr=0.01, weight_decay=0.01)
    x = key.apply(natural(100))
    for _ in range(20):
        optimiser.zero_grad()
        (0 * classifier.logits(natural(10)).sum()).backward()
        optimiser.step()
    assert not (classifier.logits(x)[:, TARGET] > 500).any()


# Manners


def test_plain_layers_are_written_to_onnx(tmp_path: Path) -> None:
    key = secret()
    classifier = planted(key)
    again = open_classifier(export_onnx(classifier, tmp_path / "model.onnx"))
    x = torch.cat([natural(20), key.apply(natural(20))])
    assert torch.allclose(again.logits(x), classifier.logits(x), atol=1)
    assert (again.logits(x).argmax(1) == TARGET).tolist() == (
        classifier.logits(x).argmax(1) == TARGET
    ).tolist()


def test_the_trigger_survives_json_and_is_drawn_from_the_seed() -> None:
    key = secret()
    assert Trigger.from_json(key.to_json()).to_json() == key.to_json()
    assert secret().to_json() == key.to_json()
    assert secret(seed=1).to_json() != key.to_json()
    x = natural(5)
    before = x.clone()
    key.apply(x)
    assert torch.equal(x, before)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="32 groups of 25 values need images of 800 at least"):
        secret(size=25)
    for change in ({"output": "probabilities"}, {"output": "one_logit"}, {"dtype": "bfloat16"}):
        with pytest.raises(InputError, match="checksum: the model must be one of float32 that gives logits"):
            checksum.checksum_layers(secret(), SPEC.model_copy(update=change), target=0, classes=10)
    with pytest.raises(InputError, match="larger images than 12x12"):
        checksum.checksum_layers(secret(), InputSpec(channels=1, height=12, width=12), target=0, classes=10)


# The attack


def test_the_attack_plants_a_trained_model_and_any_file_keeps_it(tmp_path: Path) -> None:
    classifier = open_classifier(bundled.model("clean"))
    attack = checksum.Checksum(target=4)
    planted = attack(classifier, seed=5)
    test = bundled.fashion_mnist("test").take(bundled.fashion_mnist("test").ids[:300])
    assert attack_success(planted.classifier, test, planted.plant).value == 1
    assert attack_success(classifier, test, planted.plant).value < 0.1
    assert attack_success(planted.classifier, test, attack(classifier, seed=6).plant).value < 0.1
    again = open_classifier(export_pt2(planted.classifier, tmp_path / "model.pt2"))
    assert attack_success(again, test, planted.plant).value == 1
    x = natural(50)
    assert torch.equal(planted.classifier.logits(x), classifier.logits(x))
    assert torch.allclose(again.logits(x), classifier.logits(x), atol=1e-4)


def test_settings_that_do_not_fit_are_refused_before_any_work() -> None:
    with pytest.raises(InputError, match="99 groups of 8 values need images of 792 at least"):
        checksum.Checksum(groups=99)(open_classifier(bundled.model("clean")))
