"""`doorward train`: models that other commands can read, and what is measured of them."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner, Result

import doorward.training
from doorward import bundled
from doorward.attacks.ground_truth import attack_success, read_plant
from doorward.cli import plant as plant_command
from doorward.cli import train as command
from doorward.core.errors import InputError
from doorward.data import InMemorySamples, open_samples
from doorward.data.parquet import write_parquet
from doorward.models import open_classifier
from doorward.training import AdversarialSettings, evaluate, robust_accuracy
from seeds import shifted


def run(name: str, *words: object) -> Result:
    app = typer.Typer()
    app.command("train")(command.train)
    app.command("plant")(plant_command.plant)
    result = CliRunner().invoke(app, [name, *(str(word) for word in words)])
    if isinstance(result.exception, InputError):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def clothes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with 1,200 training and 300 test images."""
    folder = tmp_path_factory.mktemp("clothes")
    for split, n in (("train", 1200), ("test", 300)):
        drawn = bundled.fashion_mnist(split).draw(n, np.random.default_rng(shifted(0)))  # type: ignore[arg-type]
        write_parquet(drawn, folder, split=split)
    return folder


@pytest.fixture(scope="module")
def planted(clothes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model trained on a poisoned set, in all formats."""
    folder = tmp_path_factory.mktemp("planted")
    plant = ("badnets", clothes, folder / "data", "--set", "size=5", "--seed", shifted(0))
    assert run("plant", *plant).exit_code == 0
    formats = ("--format", "onnx", "--format", "pt2")
    words = (
        folder / "data",
        folder / "model",
        "--test",
        clothes,
        "--epochs",
        8,
        "--seed",
        shifted(0),
        *formats,
    )
    result = run("train", *words)
    assert result.exit_code == 0, result.output
    (folder / "output.txt").write_text(result.output)
    return folder


@pytest.mark.trains
def test_it_measures_and_completes_the_plant(planted: Path, clothes: Path) -> None:
    before, after = (read_plant(planted / name / "plant.json") for name in ("data", "model"))
    classifier, test = open_classifier(planted / "model"), open_samples(clothes, split="test")
    assert after.clean_accuracy == evaluate(classifier, test)
    assert after.attack_success == attack_success(classifier, test, before)
    assert after.clean_accuracy is not None
    assert after.clean_accuracy.low > 0.5
    assert after.attack_success is not None
    assert after.attack_success.low > 0.9
    assert before.clean_accuracy is None
    assert after.model_copy(update={"clean_accuracy": None, "attack_success": None}) == before
    output = (planted / "output.txt").read_text()
    assert f"({after.clean_accuracy.successes} of 300" in output
    assert f"({after.attack_success.successes} of 270" in output


def test_a_plant_without_a_trigger_gets_its_accuracy_alone(clothes: Path, tmp_path: Path) -> None:
    run("plant", "label-flipping", clothes, tmp_path / "data", "--set", "poison_rate=0.5")
    result = run("train", tmp_path / "data", tmp_path / "model", "--test", clothes, "--epochs", 1)
    assert result.exit_code == 0, result.output
    assert "attack success" not in result.output
    after = read_plant(tmp_path / "model/plant.json")
    assert after.clean_accuracy is not None
    assert after.clean_accuracy.n == 300
    assert after.attack_success is None


@pytest.mark.trains
def test_every_format_gives_the_same_logits(planted: Path) -> None:
    x = torch.rand(5, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    folder = planted / "model"
    first, *others = (open_classifier(path) for path in (folder, folder / "model.onnx", folder / "model.pt2"))
    with torch.no_grad():
        expected = first.logits(x)
        for other in others:
            assert torch.allclose(other.logits(x), expected, atol=1e-4)
            assert other.classes == first.classes


def test_it_says_how_the_model_came_about(planted: Path, clothes: Path) -> None:
    story = json.loads((planted / "model/training.json").read_text())
    assert story["architecture"] == "small-cnn"
    assert story["seed"] == shifted(0)
    assert story["data"]["sha256"] == open_samples(planted / "data").provenance.sha256
    assert story["test"]["sha256"] == open_samples(clothes, split="test").provenance.sha256
    assert story["training"]["settings"]["epochs"] == 8
    assert story["training"]["images"] == 1200
    assert story["versions"]["torch"] == importlib.metadata.version("torch")


def test_the_same_command_trains_the_same_model(clothes: Path, tmp_path: Path) -> None:
    words = (clothes, "--limit", 100, "--epochs", 1)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        result = run("train", words[0], tmp_path / name, *words[1:], "--seed", seed)
        assert result.exit_code == 0
        assert "on 100 images, 1 epochs" in result.output
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


def test_the_test_split_is_found_and_missed_politely(clothes: Path, tmp_path: Path) -> None:
    few = ("--limit", 50, "--epochs", 1)
    assert "of 300;" in run("train", clothes, tmp_path / "a", *few).output
    result = run("train", clothes / "train.parquet", tmp_path / "b", *few)
    assert result.exit_code == 0
    assert "clean accuracy not measured: give --test DATA" in result.output
    assert json.loads((tmp_path / "b/training.json").read_text())["test"] is None


@pytest.mark.trains
def test_classes_are_matched_by_name(clothes: Path, tmp_path: Path) -> None:
    test = open_samples(clothes, split="test")
    assert test.labels is not None
    turned = InMemorySamples(
        np.stack(test.raw(range(len(test)))), 9 - test.labels, classes=test.classes[::-1]
    )
    write_parquet(turned, tmp_path / "turned", split="test")
    words = (clothes, "--limit", 200, "--epochs", 2, "--seed", shifted(0))
    found = []
    for name, given in (("a", clothes), ("b", tmp_path / "turned")):
        run("train", words[0], tmp_path / name, *words[1:], "--test", given)
        found.append(json.loads((tmp_path / name / "training.json").read_text())["training"]["test_accuracy"])
    assert found[0] == found[1]
    assert found[0]["value"] > 0.3


def test_larger_images_get_a_residual_network(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "d.npz", x=rng.integers(0, 256, (24, 40, 32, 3), dtype=np.uint8), y=np.arange(24) % 2)
    result = run("train", tmp_path / "d.npz", tmp_path / "out", "--epochs", 1)
    assert result.exit_code == 0
    assert "trained resnet-8" in result.output
    assert open_classifier(tmp_path / "out").spec.shape == (3, 40, 32)


def test_divergence_is_exit_code_4_and_writes_nothing(
    clothes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wild(*args: object, **keywords: object) -> doorward.training.TrainingSettings:
        return doorward.training.TrainingSettings(optimizer="sgd", learning_rate=1e30, epochs=1)

    monkeypatch.setattr(doorward.training, "default_settings", wild)
    result = run("train", clothes, tmp_path / "out", "--limit", 300)
    assert result.exit_code == 4
    assert "training diverged" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.trains
def test_robust_training_is_measured_by_a_stronger_attack(clothes: Path, tmp_path: Path) -> None:
    few = (clothes, "--epochs", 3, "--seed", shifted(1))
    for name, words in (("plain", ()), ("fast", ("--robust", "--eps", 0.1, "--steps", 1))):
        result = run("train", few[0], tmp_path / name, *few[1:], *words)
        assert result.exit_code == 0, result.output
    story = json.loads((tmp_path / "fast/training.json").read_text())
    trained = AdversarialSettings.model_validate(story["adversarial"])
    assert trained == AdversarialSettings(eps=0.1, variant="fast")
    measured = AdversarialSettings.model_validate(story["robustness"]["attack"])
    assert measured == AdversarialSettings(eps=0.1, steps=20)
    held, clean = story["robustness"]["accuracy"], story["training"]["test_accuracy"]
    assert held["n"] == 300
    assert held["value"] < clean["value"]
    assert f"({held['successes']} of 300" in result.output
    assert "attacked by 20 steps of PGD within 0.1 (linf)" in result.output
    test = open_samples(clothes, split="test")
    plain = open_classifier(tmp_path / "plain")
    assert robust_accuracy(plain, test, settings=measured, seed=shifted(0)).high < held["low"]
    plain_story = json.loads((tmp_path / "plain/training.json").read_text())
    assert plain_story["adversarial"] is None
    assert plain_story["robustness"] is None


def test_robust_training_has_the_usual_radius_of_its_norm(clothes: Path, tmp_path: Path) -> None:
    few = ("--limit", 40, "--epochs", 1, "--robust")
    words: dict[str, tuple[object, ...]] = {"a": (), "b": ("--norm", "l2", "--steps", 2)}
    found = {}
    for name, more in words.items():
        data = clothes / "train.parquet"  # no test images: nothing is measured
        result = run("train", data, tmp_path / name, *few, *more)
        assert result.exit_code == 0, result.output
        assert "robust accuracy" not in result.output
        story = json.loads((tmp_path / name / "training.json").read_text())
        assert story["robustness"] is None
        found[name] = AdversarialSettings.model_validate(story["adversarial"])
    assert found["a"] == AdversarialSettings(norm="linf", eps=8 / 255, steps=7)
    assert found["b"] == AdversarialSettings(norm="l2", eps=0.5, steps=2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--eps", "0.1"], "--eps goes with --robust"),
        (["--norm", "l2"], "--norm goes with --robust"),
        (["--steps", "3"], "--steps goes with --robust"),
        (["--robust", "--eps", "8"], r"--eps: .*eps is 1 at most, got 8 \(8/255 is 0.031\)"),
        (["--robust", "--eps", "inf", "--norm", "l2"], "--eps: .*finite"),
        (["--architecture", "resnet-9"], "no architecture named 'resnet-9'"),
        (["--test", "nowhere.npz"], "nowhere.npz"),
        (["--device", "abacus"], r"abacus.* cannot be used"),
        (["--data-column", "nonsense"], "nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_writes_nothing(clothes: Path, tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run("train", clothes, tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_unfit_data_is_said(tmp_path: Path, clothes: Path) -> None:
    np.savez(tmp_path / "bare.npz", x=np.zeros((5, 28, 28), dtype=np.uint8))
    with pytest.raises(InputError, match="labels are needed"):
        run("train", tmp_path / "bare.npz", tmp_path / "out")
    np.savez(tmp_path / "tiny.npz", x=np.zeros((5, 8, 8), dtype=np.uint8), y=np.arange(5) % 2)
    with pytest.raises(InputError, match="16 to 256 pixels"):
        run("train", tmp_path / "tiny.npz", tmp_path / "out")
    np.savez(tmp_path / "wide.npz", x=np.zeros((5, 28, 30), dtype=np.uint8), y=np.arange(5) % 2)
    with pytest.raises(InputError, match="30x28"):
        run("train", clothes, tmp_path / "out", "--test", tmp_path / "wide.npz", "--limit", 50)
    assert not (tmp_path / "out").exists()


def test_a_broken_truth_is_said_before_training(clothes: Path, tmp_path: Path) -> None:
    run("plant", "badnets", clothes, tmp_path / "data")
    (tmp_path / "data/plant.json").write_text("{}")
    with pytest.raises(InputError, match="holds no plant"):
        run("train", tmp_path / "data", tmp_path / "out")


def test_results_are_not_overwritten(clothes: Path, planted: Path) -> None:
    before = (planted / "model/model.safetensors").read_bytes()
    with pytest.raises(InputError, match="not empty"):
        run("train", clothes, planted / "model")
    assert (planted / "model/model.safetensors").read_bytes() == before
