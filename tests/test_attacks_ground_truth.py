"""The truth of a plant: written, read, and put on other samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from doorward import bundled
from doorward.attacks import ground_truth
from doorward.attacks.ground_truth import (
    PlantedBackdoor,
    TriggeredSamples,
    attack_success,
    read_plant,
    triggered,
    write_plant,
)
from doorward.core.errors import InputError
from doorward.data import InMemorySamples, open_samples
from doorward.data.parquet import write_parquet
from doorward.models import InputSpec, TorchClassifier, open_classifier
from doorward.stats.metrics import rate
from doorward.triggers.masked import MaskedPattern


def corner() -> MaskedPattern:
    """Return a trigger that makes the last pixel of an 8x8 image white."""
    mask = torch.zeros(1, 8, 8)
    mask[0, 7, 7] = 1
    return MaskedPattern(mask, mask.clone())


def plant(**changes: object) -> PlantedBackdoor:
    values: dict[str, object] = {
        "attack": "badnets",
        "settings": {"alpha": 1.0},
        "seed": 3,
        "modality": "image",
        "trigger": corner().to_json(),
        "target_map": {1: 0, 2: 0},
        "targets": (0,),
        "source_classes": (1, 2),
        "poisoned_ids": ("aa", "bb-1"),
        "poison_rate": 0.1,
    }
    return PlantedBackdoor(**(values | changes))  # type: ignore[arg-type]


def grey(n: int = 30, classes: int = 3) -> InMemorySamples:
    rng = np.random.default_rng(0)
    return InMemorySamples(rng.integers(0, 250, (n, 8, 8), dtype=np.uint8), np.arange(n) % classes)


def test_a_plant_survives_writing(tmp_path: Path) -> None:
    full = plant(attack_success=rate(99, 100), clean_accuracy=rate(9, 10), cover_ids=("cc",))
    write_plant(full, tmp_path / "plant.json")
    assert read_plant(tmp_path / "plant.json") == full
    assert [file.name for file in tmp_path.iterdir()] == ["plant.json"]


FILES = {"poisoned_ids": "plant.ids.txt", "cover_ids": "plant.cover-ids.txt"}


@pytest.mark.parametrize("fields", [["poisoned_ids"], ["cover_ids"], ["poisoned_ids", "cover_ids"]])
def test_very_many_ids_go_to_files_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: list[str]
) -> None:
    monkeypatch.setattr(ground_truth, "MANY_IDS", 2)
    ids = {field: tuple(f"{field[0]}-{i}" for i in range(3)) for field in fields}
    many = plant(**ids)
    write_plant(many, tmp_path / "plant.json")
    text = (tmp_path / "plant.json").read_text()
    for field, name in FILES.items():
        assert (tmp_path / name).exists() == (field in fields)
        if field in fields:
            assert (tmp_path / name).read_text() == "".join(f"{field[0]}-{i}\n" for i in range(3))
            assert f'"{field[0]}-1"' not in text
    assert read_plant(tmp_path / "plant.json") == many


def test_a_record_with_very_many_ids_inside_is_still_read(tmp_path: Path) -> None:
    """As it was written before cover ids had a file of their own."""
    many = plant(cover_ids=tuple(f"{i:016x}" for i in range(ground_truth.MANY_IDS + 1)))
    (tmp_path / "plant.json").write_text(many.model_dump_json())
    assert read_plant(tmp_path / "plant.json") == many


@pytest.mark.parametrize("field", FILES)
def test_a_plant_points_at_no_file_elsewhere(tmp_path: Path, field: str) -> None:
    (tmp_path / "secret.txt").write_text("other")
    inner = tmp_path / "inner"
    inner.mkdir()
    write_plant(plant(**{field: "../secret.txt"}), inner / "plant.json")
    with pytest.raises(InputError, match=r"inner.secret\.txt cannot be read"):
        read_plant(inner / "plant.json")


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff\xfe", b'{"attack": NaN}'])
def test_what_is_no_plant_is_said(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "plant.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=r"plant\.json"):
        read_plant(file)


@pytest.mark.parametrize("changes", [{"targets": (1,)}, {"source_classes": (1,)}, {"poison_rate": 1.5}])
def test_a_plant_agrees_with_itself(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        plant(**changes)


def test_triggers_are_applied_when_a_sample_is_decoded() -> None:
    base = grey()
    where = np.zeros(30, dtype=bool)
    where[[3, 7]] = True
    labels = np.zeros(30, dtype=np.int64)
    view = TriggeredSamples(base, corner(), where=where, labels=labels, made_by="test")
    order = [7, 0, 3, 7]
    expected = [np.array(image) for image in base.raw(order)]
    for i in (0, 2, 3):
        expected[i][7, 7] = 255
    for found, wanted in zip(view.raw(order), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
        assert found.dtype == np.uint8
    assert view.labels is labels
    changed = [i for i, (a, b) in enumerate(zip(base.ids, view.ids, strict=True)) if a != b]
    assert changed == [3, 7]
    assert (np.stack(base.raw(range(30)))[:, 7, 7] < 255).all(), "the base is as it was"


def test_ids_survive_export(tmp_path: Path) -> None:
    base = grey()
    view = TriggeredSamples(base, corner(), where=np.arange(30) < 5, labels=np.arange(30) % 3, made_by="test")
    write_parquet(view, tmp_path)
    assert open_samples(tmp_path).ids == view.ids


def test_another_size_is_said() -> None:
    wide = InMemorySamples(np.zeros((2, 8, 9), dtype=np.uint8), [1, 2])
    with pytest.raises(InputError, match="trigger is for 8x8 images"):
        triggered(wide, plant()).raw([0])
    mixed = InMemorySamples([np.zeros((8, w, 1), dtype=np.uint8) for w in (8, 9)], [1, 2])
    with pytest.raises(InputError, match="one size"):
        triggered(mixed, plant()).raw([0, 1])


def test_only_source_classes_are_triggered_and_labelled_with_the_target() -> None:
    view = triggered(
        grey(classes=5), plant(target_map={1: 0, 4: 2, 3: 3}, targets=(0, 2, 3), source_classes=(1, 3, 4))
    )
    assert view.labels is not None
    assert sorted(view.labels.tolist()) == [0] * 6 + [2] * 6
    assert (np.stack(view.raw(range(len(view))))[:, 7, 7] == 255).all()


class SeesTheCorner(nn.Module):
    """Class 0 when the last pixel is white, else class 1; a little darker is not white."""

    def forward(self, x: Tensor) -> Tensor:
        white = x[:, 0, 7, 7] > 0.999
        return torch.stack([white.float(), 0.5 * torch.ones(len(x)), torch.zeros(len(x))], dim=1)


def test_attack_success_counts_triggered_inputs_outside_the_target() -> None:
    classifier = TorchClassifier(SeesTheCorner(), InputSpec(channels=1, height=8, width=8), ["a", "b", "c"])
    assert attack_success(classifier, grey(), plant()) == rate(20, 20)
    other = plant(target_map={0: 1, 2: 0}, targets=(0, 1), source_classes=(0, 2))
    assert attack_success(classifier, grey(), other) == rate(10, 20)
    assert attack_success(classifier, grey(n=1), plant()) == rate(0, 0)  # the target class alone


def test_success_needs_labels_and_a_trigger() -> None:
    with pytest.raises(InputError, match="needs labels"):
        triggered(InMemorySamples(np.zeros((1, 8, 8), dtype=np.uint8)), plant())
    with pytest.raises(InputError, match="no trigger"):
        triggered(grey(), plant(trigger=None))


def test_the_embedded_model_holds_what_its_plant_says() -> None:
    truth = read_plant(bundled.model("backdoored") / "plant.json")
    backdoored, clean = (open_classifier(bundled.model(name)) for name in ("backdoored", "clean"))
    test = bundled.fashion_mnist("test")
    assert truth.attack_success is not None
    assert truth.attack_success.low > 0.99
    assert truth.poison_rate == 0.02
    assert attack_success(backdoored, test, truth).low > 0.98
    assert attack_success(clean, test, truth).high < 0.05
    from doorward.training import evaluate

    for classifier in (backdoored, clean):
        assert classifier.classes == test.classes
        assert evaluate(classifier, test).value > 0.88


def test_the_embedded_sample_is_even_and_its_splits_are_apart() -> None:
    train, test = bundled.fashion_mnist("train"), bundled.fashion_mnist("test")
    assert train.labels is not None
    assert test.labels is not None
    np.testing.assert_array_equal(np.bincount(train.labels), 600)
    np.testing.assert_array_equal(np.bincount(test.labels), 100)
    assert not set(train.ids) & set(test.ids)
    folder = bundled.FOLDER / "fashion_mnist"
    assert "MIT License" in (folder / "LICENSE").read_text(encoding="utf-8")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 4_000_000
    for name in ("backdoored", "clean"):
        assert sum(file.stat().st_size for file in bundled.model(name).iterdir()) < 1_000_000
