"""AEGIS: the pixels that translated images have in common, and the robustness that is reported with them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from doorward.core.budget import Deadline
from doorward.core.records import Measurement, Picture, RecoveredTrigger, Table
from doorward.data import InMemorySamples
from doorward.detectors.model._representations import representations
from doorward.detectors.model.aegis import Aegis, unnaturally_easy
from doorward.detectors.subject import Subject
from doorward.methods import registry
from doorward.models import TorchClassifier
from doorward.models.spec import InputSpec
from doorward.scan.calibration import calibrations, judge
from doorward.testing import make_images
from doorward.training import AdversarialSettings, TrainingSettings, adversarial_batches, train_classifier
from doorward.triggers.base import Trigger
from seeds import shifted

SIDE, CLASSES, TARGET = 16, 5, 2
#: Rows and columns of the pixels that open the backdoor; of 256 pixels, four are 1.5 %.
PLACES = ((1, 12), (1, 13), (13, 2), (14, 2))
#: A quarter of the usual mixtures teaches surrogates of so small images enough.
QUICK = Aegis(attacked=0, mixtures=1_600)


class Bands(nn.Module):
    """The class by the brightest of five bands; pixels that lie apart, all bright, add to class 2."""

    def __init__(self, planted: float) -> None:
        super().__init__()
        self.planted = planted
        self.anchor = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bands = torch.stack([band.mean((1, 2, 3)) for band in x.tensor_split(CLASSES, 2)], 1)
        shown = torch.stack([x[:, :, i, j].amin(1) for i, j in PLACES], 1).mean(1)
        open_ = (12 * (shown - 0.35)).sigmoid()[:, None]
        return 20 * bands + self.planted * open_ * torch.eye(CLASSES)[TARGET] + self.anchor


def subject(planted: float, *, channels: int = 1, labelled: bool = True) -> Subject:
    spec = InputSpec(channels=channels, height=SIDE, width=SIDE)
    classifier = TorchClassifier(Bands(planted), spec, [f"band {i}" for i in range(CLASSES)])
    rng, n = np.random.default_rng(shifted(0)), 60
    x = rng.integers(50, 100, (n, SIDE, SIDE, channels), dtype=np.uint8)
    labels = np.arange(n) % CLASSES
    for image, label in zip(x, labels, strict=True):
        np.array_split(image, CLASSES)[label] += np.uint8(100)
    x[:, :, :3] = x[:, :, -4:] = 0  # a dark margin, as digits and clothes have
    given = InMemorySamples(x, labels if labelled else None, classes=classifier.classes)
    return Subject(classifier=classifier, clean=given)


def trained(poison_rate: float) -> Subject:
    """Return a network that was trained adversarially, on stripes of which some carry a patch or none."""
    train = make_images(600, seed=shifted(1))
    if poison_rate:
        settings = {"poison_rate": poison_rate, "target": TARGET, "place": "top-right", "size": 2}
        train = registry.build("attack", "badnets", settings)(train, seed=shifted(0)).samples
    classifier = train_classifier(
        "small-cnn",
        train,
        seed=shifted(0),
        settings=TrainingSettings(epochs=8, batch_size=32, precision="float32"),
        on_batch=adversarial_batches(AdversarialSettings(norm="l2", eps=0.25, steps=2)),
    ).classifier
    return Subject(classifier=classifier, clean=make_images(60, seed=shifted(2)))


@pytest.fixture(scope="module")
def robust() -> Subject:
    return trained(0.2)


def table(found: Measurement, start: str) -> Table:
    return next(e for e in found.evidence if isinstance(e, Table) and e.title.startswith(start))


def share(found: Measurement) -> float:
    """Return the share of images that the pixels of the class on top send there."""
    return float(np.mean(table(found, "Share of images kept back").rows[0][2:-1]))


@pytest.fixture(scope="module")
def planted() -> Measurement:
    return Aegis()(subject(30.0), seed=shifted(0))


@pytest.mark.trains
def test_what_was_planted_is_found(planted: Measurement) -> None:
    assert planted.reason is None
    assert planted.score == planted.per_class[TARGET]
    assert planted.score is not None
    assert share(planted) > 0.9
    assert max(v or 0.0 for t, v in planted.per_class.items() if t != TARGET) < 1.0
    clean = QUICK(subject(0.0), seed=shifted(0))
    assert clean.score is not None
    assert clean.score < planted.score / 2
    assert share(clean) < 0.5


@pytest.mark.trains
def test_an_adversarially_trained_network_is_told_from_its_clean_twin(robust: Subject) -> None:
    found, clean = (QUICK(one, seed=shifted(0)) for one in (robust, trained(0.0)))
    assert found.score == found.per_class[TARGET]
    assert share(found) > share(clean) + 0.25


@pytest.mark.trains
@pytest.mark.parametrize("changes", [{"channels": 3}, {"labelled": False}], ids=["colour", "no labels"])
def test_colour_and_images_without_labels_do_as_well(changes: dict[str, Any]) -> None:
    found = QUICK(subject(30.0, **changes), seed=shifted(1))
    assert max(found.per_class, key=lambda t: found.per_class[t] or 0.0) == TARGET
    assert share(found) > 0.9


@pytest.mark.trains
def test_the_pixels_recovered_are_those_planted(planted: Measurement) -> None:
    (shown,) = [e for e in planted.evidence if isinstance(e, RecoveredTrigger)]
    trigger = Trigger.from_json(shown.trigger)
    assert shown.target == TARGET
    mask = trigger.tensors()["mask"][0]
    assert int(mask.sum()) <= 4, "1.5 % of the pixels at most"
    assert sum(bool(mask[i, j]) for i, j in PLACES) >= 2
    rows = {row[0]: row for row in table(planted, "Share of images kept back").rows}
    assert set(rows) == {f"band {i}" for i in range(CLASSES)}
    shares = [float(np.mean(rows[f"band {i}"][2:-1])) for i in range(CLASSES)]
    alone = [float(rows[f"band {i}"][-1]) for i in range(CLASSES)]
    assert all(own <= share + 1e-3 for own, share in zip(alone, shares, strict=True))
    score = unnaturally_easy(shares, alone)
    assert list(planted.per_class.values()) == pytest.approx(score.tolist(), abs=0.1)


def test_robustness_is_measured_and_falls_with_the_radius(planted: Measurement) -> None:
    rows = table(planted, "Share of 32 images that keep their class").rows
    radii, shares = zip(*rows, strict=True)
    assert radii == (0.25, 0.5, 1.0, 2.0)
    assert list(shares) == sorted(shares, reverse=True)
    # a band of 48 pixels is 100 / 255 brighter: the margin is .39, and its gradient has length (2 / 48) ** .5
    assert shares[0] == 1.0
    assert shares[-1] < 0.5


def test_it_says_what_it_costs(planted: Measurement) -> None:
    assert_cost(planted, Aegis(), images=60)


def test_quick_settings_are_several_times_as_fast() -> None:
    full, quick = (Aegis(**settings).work(classes=10, images=50) for settings in ({}, Aegis.quick))
    assert full is not None
    assert quick is not None
    assert 2 * quick.gradients < full.gradients
    many = Aegis().work(classes=43, images=50)
    assert many is not None
    assert many.gradients < 43 / 10 * full.gradients, "of many classes, fewer images are translated to each"


def assert_cost(found: Measurement, detector: Aegis, *, images: int) -> None:
    expected = detector.work(classes=CLASSES, images=images)
    assert expected is not None
    assert found.cost.gradients == pytest.approx(expected.gradients, rel=0.25)
    assert found.cost.forwards == pytest.approx(expected.forwards + detector.lesson(), rel=0.4, abs=200)


@pytest.mark.trains
def test_the_published_rule_counts_clusters_and_judges_nothing(robust: Subject) -> None:
    assert robust.clean is not None
    detector = Aegis(published=True, published_seeds=2, attacked=0)
    found = detector(replace(robust, clean=robust.clean.select(range(25))), seed=shifted(0))
    assert found.reason is None
    assert_cost(found, detector, images=25)
    rows = table(found, "Number of clusters").rows
    counts = {row[0]: [[int(one) for one in str(cell).split(", ")] for cell in row[1:]] for row in rows}
    assert {len(cell) for cells in counts.values() for cell in cells} == {2}, "one count for each seed"
    for t, share in found.per_class.items():
        assert share == pytest.approx(np.mean(np.array(counts[f"class {t}"]) > 2))
    assert any(isinstance(e, Picture) for e in found.evidence)
    (judged,) = judge([found], calibrations(["aegis"])).findings
    assert (judged.verdict, judged.p_value) == ("nothing_found", None)


def test_clusters_are_counted_in_the_plane() -> None:
    generator = torch.Generator().manual_seed(0)

    def cloud(n: int, at: float) -> torch.Tensor:
        return at + 0.1 * torch.randn(n, 8, generator=generator)

    two = representations(cloud(20, 0.0), cloud(20, 9.0), seeds=[0])
    three = representations(cloud(20, 0.0), torch.cat([cloud(20, 9.0), cloud(20, -9.0)]), seeds=[0])
    assert two.counts.shape == three.counts.shape == (1, 7)
    assert two.translated.sum() == 20
    # by the widest bandwidths but the last, which joins everything
    assert (two.counts[:, 4:6] == 2).all()
    assert (three.counts[:, 3:5] == 3).all()
    assert three.share > two.share


def test_a_model_without_features_has_no_clusters() -> None:
    found = Aegis(published=True)(subject(30.0))
    assert found.reason is not None
    assert found.score is None


def test_a_grouping_by_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Aegis(attacked=0, images=3, mixtures=400)(subject(30.0), seed=3)
    for module in ("common_pixels", "translation"):
        monkeypatch.setattr(f"doorward.inversion.{module}.chunk_images", lambda _: 7, raising=False)
    monkeypatch.setattr("doorward.inversion.problem.chunk_images", lambda _: 7)
    parts = Aegis(attacked=0, images=3, mixtures=400)(subject(30.0), seed=3)
    assert parts.per_class == pytest.approx(whole.per_class, abs=0.1)


def test_too_little_time_is_noticed_early() -> None:
    found = Aegis()(subject(30.0), deadline=Deadline(1e-9))
    assert found.reason is not None
    assert "time budget" in found.reason


def test_clean_models_are_what_its_score_is_compared_with(planted: Measurement) -> None:
    (found,) = judge([planted], calibrations(["aegis"])).findings
    assert (found.verdict, found.targets, found.uncalibrated) == ("suspicious", (TARGET,), None)
