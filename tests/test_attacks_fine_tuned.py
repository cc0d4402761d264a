"""Attacks on data, planted into a model that is trained already."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from command_line import call
from doorward import bundled
from doorward.attacks.ground_truth import attack_success, read_plant
from doorward.attacks.model._fine_tuned import FineTunedAttack
from doorward.core.errors import InputError
from doorward.methods import registry
from doorward.models import TorchClassifier, open_classifier
from doorward.training import evaluate, fine_tune
from seeds import shifted


def attack(name: str = "badnets", **settings) -> FineTunedAttack:
    return FineTunedAttack(registry.build("attack", name, settings))


@pytest.fixture(autouse=True)
def few(monkeypatch) -> None:
    """Let models be taught on few images, which is enough for small ones."""
    monkeypatch.setattr("doorward.attacks.model._fine_tuned.IMAGES", 300)


@pytest.fixture(scope="module")
def clean() -> TorchClassifier:
    opened = open_classifier(bundled.model("clean"))
    assert isinstance(opened, TorchClassifier)
    return opened


@pytest.mark.trains
def test_a_trained_model_learns_the_trigger_and_stays_as_good(clean) -> None:
    test = bundled.fashion_mnist("test")
    before = {key: value.clone() for key, value in clean.module.state_dict().items()}
    planted = attack(size=4, target=3)(clean, bundled.fashion_mnist("train"), seed=shifted(0))
    assert (planted.plant.attack, planted.plant.targets) == ("badnets", (3,))
    assert attack_success(planted.classifier, test, planted.plant).value > 0.8
    assert evaluate(clean, test).value - evaluate(planted.classifier, test).value < 0.1
    after = clean.module.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items()), "the model given stays"


@pytest.mark.trains
def test_the_command_line_plants_into_a_model(tmp_path: Path) -> None:
    data = f"{bundled.FOLDER / 'fashion_mnist'}"
    out = tmp_path / "planted"
    done = call("plant", "badnets", bundled.model("clean"), out, "--data", data, "--set", "size=4")
    assert done.code == 0, done.err
    assert "planted badnets: the trigger turns images of other classes into" in done.out
    plant = read_plant(out / "plant.json")
    assert plant.attack_success is not None
    assert plant.attack_success.value > 0.8
    classifier = open_classifier(out)
    assert evaluate(classifier, bundled.fashion_mnist("test")).value > 0.7


def test_what_is_not_learnt_is_said(clean, monkeypatch) -> None:
    monkeypatch.setattr("doorward.attacks.model._fine_tuned.STEPS", fine_tune.LOOK)
    with pytest.raises(InputError, match=r"did not learn the trigger: after 10 steps .*--set size=20"):
        attack(size=1, alpha=0.01)(clean, bundled.fashion_mnist("test"))


@pytest.mark.parametrize(
    ("name", "settings"),
    [("badnets", {"mapping": "all-to-all"}), ("badnets", {"source_classes": (1,)}), ("clean-label", {})],
)
def test_only_one_trigger_for_all_classes_is_taught(name: str, settings: dict) -> None:
    with pytest.raises(InputError, match="one trigger that turns all classes into one"):
        attack(name, **settings)


def test_without_data_a_model_is_no_training_set(tmp_path: Path) -> None:
    done = call("plant", "badnets", bundled.model("clean"), tmp_path / "out")
    assert done.code == 2
    assert "--data DATA" in done.err
    assert json.loads((bundled.model("clean") / "config.json").read_text())["format"] == "doorward"
