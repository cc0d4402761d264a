"""Clean-label patches and availability poisoning: images moved within their ball, labels kept or flipped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from doorward.attacks.data import _surrogate
from doorward.attacks.data.base import DataAttack
from doorward.attacks.ground_truth import attack_success, triggered
from doorward.core.errors import InputError
from doorward.data import InMemorySamples
from doorward.methods import registry
from doorward.models import InputSpec
from doorward.models.architectures import build
from doorward.models.formats.native import save_native
from doorward.training import TrainingSettings, evaluate, train_classifier
from seeds import shifted

SIDE = 16


def halves(n: int = 240, *, seed: int = 0, w: int = SIDE) -> InMemorySamples:
    """Return images of three classes that cannot always be told: rather dark above, below, or neither."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    tone = rng.normal(130, 20, (n, 2)) - 50 * (labels[:, None] == [0, 1])  # (n, 2) of the two halves
    x = rng.normal(tone.repeat(SIDE // 2, 1)[:, :, None, None], 10, (n, SIDE, w, 1))
    return InMemorySamples(x.clip(0, 255).astype(np.uint8), labels, classes=["above", "below", "neither"])


def attack(name: str, **settings: Any) -> DataAttack:
    built = registry.build("attack", name, settings)
    assert isinstance(built, DataAttack)
    return built


def pixels(samples: Any) -> npt.NDArray[np.uint8]:
    return np.stack(samples.raw(range(len(samples))))


def poisoned_positions(poisoned: Any) -> list[int]:
    position = {value: i for i, value in enumerate(poisoned.samples.ids)}
    return [position[value] for value in poisoned.plant.poisoned_ids]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a model that tells the halves apart."""
    trained = train_classifier(
        "small-cnn",
        halves(seed=shifted(0)),
        seed=shifted(0),
        settings=TrainingSettings(epochs=4, batch_size=32, precision="float32"),
    )
    classifier = trained.classifier
    folder = tmp_path_factory.mktemp("surrogate")
    save_native(
        classifier.module,
        architecture="small-cnn",
        spec=classifier.spec,
        classes=classifier.classes,
        directory=folder,
    )
    return folder


class Linear(nn.Module):
    """See how much brighter the upper half is than the lower."""

    def forward(self, x: Tensor) -> Tensor:
        z = x[:, :, : SIDE // 2].mean((1, 2, 3)) - x[:, :, SIDE // 2 :].mean((1, 2, 3))
        return 50 * torch.stack([-z, z, 0 * z], 1)


def linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every attack the same surrogate, whose gradient is known."""
    from doorward.models import TorchClassifier

    spec = InputSpec(channels=1, height=SIDE, width=SIDE)
    classifier = TorchClassifier(Linear(), spec, ["above", "below", "neither"])
    monkeypatch.setattr(_surrogate.PerturbingAttack, "_classifier", lambda *_: classifier)


# Images made hard to tell


def test_images_go_the_way_that_the_gradient_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each half has one gradient, the worst image in the ball is known."""
    linear(monkeypatch)
    samples = halves()
    poisoned = attack("clean-label", norm="linf", eps=20 / 255, poison_rate=0.1, target=0)(samples, seed=0)
    chosen = poisoned_positions(poisoned)
    assert len(chosen) == 24
    before, after = (pixels(s)[chosen].astype(int) for s in (samples, poisoned.samples))
    expected = before.copy()
    expected[:, : SIDE // 2] += 20  # class 0 is dark above
    expected[:, SIDE // 2 :] -= 20
    expected = expected.clip(0, 255)
    expected[:, -3:, -3:] = 255  # the patch comes after
    np.testing.assert_array_equal(after, expected)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 9.0), ("l2", 200.0), ("l2", 5.0)])
def test_no_image_leaves_its_ball(norm: str, eps: float, model: Path) -> None:
    samples = halves()
    settings = {"norm": norm, "eps": eps / 255, "surrogate": str(model), "poison_rate": 0.2}
    poisoned = attack("clean-label", **settings)(samples, seed=0)
    chosen = poisoned_positions(poisoned)
    moved = (pixels(poisoned.samples)[chosen].astype(float) - pixels(samples)[chosen])[:, :-3]
    size = np.abs(moved).max((1, 2, 3)) if norm == "linf" else np.sqrt((moved**2).sum((1, 2, 3)))
    rounding = 0.5 if norm == "linf" else 0.5 * moved[0].size ** 0.5
    assert size.max() <= eps + rounding
    assert size.min() >= 0.7 * eps - rounding


@pytest.mark.trains
def test_moved_images_are_hard_for_the_surrogate(model: Path) -> None:
    from doorward.models import open_classifier

    samples, classifier = halves(seed=shifted(0)), open_classifier(model)
    moved = attack("label-flipping", form="boundary", surrogate=str(model), poison_rate=1)(
        samples, seed=shifted(0)
    ).samples
    assert evaluate(classifier, samples).value > 0.7
    assert evaluate(classifier, moved).value < 0.1


def test_no_eps_is_a_patch_on_the_target_alone() -> None:
    samples = halves()
    poisoned = attack("clean-label", eps=0, poison_rate=0.1, target=2)(samples, seed=4)
    changed = pixels(samples).copy()
    changed[poisoned_positions(poisoned), -3:, -3:] = 255
    np.testing.assert_array_equal(pixels(poisoned.samples), changed)
    np.testing.assert_array_equal(poisoned.samples.labels, samples.labels)


def test_at_test_there_is_the_patch_and_nothing_else(model: Path) -> None:
    samples = halves()
    plant = attack("clean-label", surrogate=str(model), target=1, poison_rate=0.05)(samples, seed=0).plant
    triggered_inputs = triggered(samples, plant)
    assert samples.labels is not None
    expected = pixels(samples)[samples.labels != 1]
    expected[:, -3:, -3:] = 255
    np.testing.assert_array_equal(pixels(triggered_inputs), expected)
    assert set(np.asarray(triggered_inputs.labels)) == {1}


def test_cover_is_of_other_classes_and_is_not_moved(model: Path) -> None:
    samples = halves()
    poisoned = attack("clean-label", surrogate=str(model), poison_rate=0.05, cover_rate=0.1)(samples, seed=0)
    position = {value: i for i, value in enumerate(poisoned.samples.ids)}
    cover = [position[value] for value in poisoned.plant.cover_ids]
    assert samples.labels is not None
    assert len(cover) == 24
    assert 0 not in samples.labels[cover]
    expected = pixels(samples)[cover]
    expected[:, -3:, -3:] = 255
    np.testing.assert_array_equal(pixels(poisoned.samples)[cover], expected)


def test_any_part_can_be_read_in_any_order(model: Path) -> None:
    poisoned = attack("clean-label", surrogate=str(model), poison_rate=0.3)(halves(), seed=0).samples
    whole = pixels(poisoned)
    order = np.random.default_rng(0).permutation(len(whole))[:50]
    np.testing.assert_array_equal(np.stack(poisoned.raw(order)), whole[order])
    assert all(image.flags.writeable for image in poisoned.raw(range(len(whole)))), "torch takes no others"


def test_moved_images_take_no_memory(model: Path) -> None:
    built = attack("clean-label", surrogate=str(model))
    assert isinstance(built, _surrogate.PerturbingAttack)
    moved = built.perturbed(halves(), np.arange(90), generator=torch.Generator().manual_seed(0))
    assert isinstance(vars(moved)["_images"], np.memmap)


@pytest.mark.trains
def test_the_patch_is_learnt_the_better_the_harder_the_images_are() -> None:
    train, test = halves(600, seed=shifted(0)), halves(300, seed=shifted(1))
    settings = TrainingSettings(epochs=5, batch_size=32, precision="float32")
    hard = attack("clean-label", poison_rate=0.1, size=4, eps=3.2)(train, seed=shifted(0))
    plain = attack("clean-label", poison_rate=0.1, size=4, eps=0)(train, seed=shifted(0))
    on_hard, on_plain, counterpart = (
        train_classifier("small-cnn", s, seed=shifted(0), settings=settings).classifier
        for s in (hard.samples, plain.samples, train)
    )
    assert evaluate(on_hard, test).value > evaluate(counterpart, test).value - 0.1
    success = attack_success(on_hard, test, hard.plant).value
    assert success > 0.75
    assert success > attack_success(on_plain, test, plain.plant).value + 0.08
    assert attack_success(counterpart, test, hard.plant).value < 0.3


@pytest.mark.parametrize("name", ["clean-label", "label-flipping"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "linf", "eps": 8}, r"eps = 8: .*pixel values are in \[0, 1\], so eps is 1 at most"),
        ({"eps": -1}, "eps = -1"),
        ({"norm": "l1"}, "norm = 'l1'"),
        ({"steps": 0}, "steps = 0"),
        ({"surrogate": "no/such/model"}, "no/such/model"),
        ({"poison_rate": 0.001}, "poison_rate 0.001 of 240 samples is none"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_said(name: str, settings: dict[str, Any], message: str) -> None:
    form = {"form": "boundary"} if name == "label-flipping" else {}
    with pytest.raises(InputError, match=message):
        attack(name, **form, **settings)(halves(), seed=0)


def test_a_surrogate_that_does_not_fit_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the model takes float images \(n, 1, 16, 16\)"):
        attack("clean-label", surrogate=str(model))(halves(w=20), seed=0)
    module = build("small-cnn", channels=1, height=SIDE, width=SIDE, classes=4)
    spec = InputSpec(channels=1, height=SIDE, width=SIDE)
    save_native(module, architecture="small-cnn", spec=spec, classes=list("abcd"), directory=tmp_path)
    with pytest.raises(InputError, match="knows 4 classes, and the samples have 3"):
        attack("clean-label", surrogate=str(tmp_path))(halves(), seed=0)


class NoFurther(InMemorySamples):
    """Fail when more than one sample is decoded."""

    def raw(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[Any]:
        assert len(indices) <= 1, "work was done"
        return super().raw(indices)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"poison_rate": 0.5}, "asks for 120 of 240 samples, and 80 are of classes that can be taken"),
        ({"target": 3}, "target 3 is no class"),
        ({"size": 17}, "clean-label: a patch of 17x17"),
        ({"source_classes": [0]}, "no source class is left"),
        ({"mapping": "all-to-all"}, "all-to-all"),
        ({"cover_rate": 0.9}, "cover_rate"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_said_before_a_surrogate_is_trained(
    settings: dict[str, Any], message: str
) -> None:
    full = halves()
    samples = NoFurther(pixels(full), full.labels, classes=full.classes)
    with pytest.raises(InputError, match=message):
        attack("clean-label", **settings)(samples, seed=0)


# Labels flipped


def test_flipped_labels_are_wrong_and_even_and_images_are_as_they_were() -> None:
    samples = halves(3000)
    poisoned = attack("label-flipping", poison_rate=0.4)(samples, seed=0)
    assert samples.labels is not None
    assert poisoned.samples.labels is not None
    chosen = poisoned_positions(poisoned)
    flipped = np.flatnonzero(poisoned.samples.labels != samples.labels)
    assert flipped.tolist() == sorted(chosen)
    assert len(flipped) == 1200
    assert poisoned.samples.ids == samples.ids
    steps = (poisoned.samples.labels - samples.labels)[flipped] % 3
    assert stats.binomtest(int((steps == 1).sum()), 1200).pvalue > 0.01, "each wrong class is as likely"
    assert stats.chisquare(np.bincount(samples.labels[flipped])).pvalue > 0.01


@pytest.mark.parametrize(
    ("settings", "old", "new"),
    [
        ({"target": 2}, {0, 1}, {2}),
        ({"target": 0, "source_classes": [1]}, {1}, {0}),
        ({"source_classes": [0]}, {0}, {1, 2}),
        ({"mapping": "all-to-all", "source_classes": [2]}, {2}, {0}),
    ],
    ids=str,
)
def test_labels_are_flipped_from_and_to_what_was_asked(
    settings: dict[str, Any], old: set[int], new: set[int]
) -> None:
    samples = halves()
    labels = attack("label-flipping", poison_rate=0.2, **settings)(samples, seed=0).samples.labels
    assert samples.labels is not None
    assert labels is not None
    flipped = np.flatnonzero(labels != samples.labels)
    assert len(flipped) == 48
    assert set(samples.labels[flipped].tolist()) == old
    assert set(labels[flipped].tolist()) == new


def test_two_classes_are_exchanged() -> None:
    samples = InMemorySamples(np.zeros((40, 8, 8), np.uint8), np.arange(40) % 2)
    labels = attack("label-flipping", poison_rate=1)(samples, seed=0).samples.labels
    np.testing.assert_array_equal(labels, 1 - np.arange(40) % 2)


def test_moved_images_keep_their_labels_and_are_those_named(model: Path) -> None:
    samples = halves()
    settings = {"form": "boundary", "surrogate": str(model), "poison_rate": 0.25, "source_classes": [0, 2]}
    poisoned = attack("label-flipping", **settings)(samples, seed=0)
    np.testing.assert_array_equal(poisoned.samples.labels, samples.labels)
    changed = np.flatnonzero((pixels(samples) != pixels(poisoned.samples)).any((1, 2, 3)))
    assert changed.tolist() == poisoned_positions(poisoned)
    assert len(changed) == 60
    assert samples.labels is not None
    assert set(samples.labels[changed].tolist()) == {0, 2}
    assert poisoned.plant.trigger is None


@pytest.mark.trains
@pytest.mark.parametrize("form", ["flip", "boundary"])
def test_accuracy_falls(form: str, model: Path) -> None:
    settings = (
        {"poison_rate": 0.7} if form == "flip" else {"poison_rate": 1, "eps": 4, "surrogate": str(model)}
    )
    train, test = halves(300, seed=shifted(0)), halves(300, seed=shifted(1))
    training = TrainingSettings(epochs=6, batch_size=32, precision="float32")
    poisoned = attack("label-flipping", form=form, **settings)(train, seed=shifted(0)).samples
    counterpart, harmed = (
        evaluate(train_classifier("small-cnn", s, seed=shifted(0), settings=training).classifier, test)
        for s in (train, poisoned)
    )
    assert counterpart.value > 0.7
    assert harmed.value < counterpart.value - 0.2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "boundary", "target": 1}, "form boundary changes no label; leave out target and mapping"),
        ({"form": "boundary", "mapping": "all-to-all"}, "leave out target and mapping"),
        ({"cover_rate": 0.1}, "label-flipping: cover_rate = 0.1"),
        ({"target": 3}, "target 3 is no class"),
        ({"source_classes": [5]}, "source_classes 5 is no class"),
        ({"form": "boundary", "source_classes": [5]}, "source_classes 5 is no class"),
        ({"target": 1, "source_classes": [1]}, "no source class is left"),
        ({"source_classes": [1], "poison_rate": 0.5}, "asks for 120 of 240 samples, and 80 are"),
    ],
    ids=str,
)
def test_flips_that_do_not_fit_are_said(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        attack("label-flipping", **settings)(halves(), seed=0)


def test_one_class_cannot_be_flipped() -> None:
    samples = InMemorySamples(np.zeros((9, 8, 8), np.uint8), np.zeros(9, np.int64))
    with pytest.raises(InputError, match="no source class is left"):
        attack("label-flipping")(samples, seed=0)
