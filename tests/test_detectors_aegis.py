"""AEGIS: the pixels that translated images have in common, and the robustness that is reported with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from doorward.core.budget import Deadline
from doorward.core.records import Measurement, RecoveredTrigger, Table
from doorward.data import InMemorySamples
from doorward.detectors.model.aegis import Aegis
from doorward.detectors.subject import Subject
from doorward.models import TorchClassifier
from doorward.models.spec import InputSpec
from doorward.scan.calibration import calibrations, judge
from doorward.triggers.base import Trigger
from seeds import shifted

SIDE, CLASSES, TARGET = 16, 5, 2
#: Rows and columns of the pixels that open the backdoor; of 256 pixels, four are 1.5 %.
PLACES = ((1, 12), (1, 13), (13, 2), (14, 2))


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


def table(found: Measurement, start: str) -> Table:
    return next(e for e in found.evidence if isinstance(e, Table) and e.title.startswith(start))


@pytest.fixture(scope="module")
def planted() -> Measurement:
    return Aegis()(subject(30.0), seed=shifted(0))


@pytest.mark.trains
def test_what_was_planted_is_found(planted: Measurement) -> None:
    assert planted.reason is None
    assert planted.score == planted.per_class[TARGET]
    assert planted.score is not None
    assert planted.score > 0.9
    assert max(v or 0.0 for t, v in planted.per_class.items() if t != TARGET) < 0.5
    clean = Aegis()(subject(0.0), seed=shifted(0))
    assert clean.score is not None
    assert clean.score < 0.5


@pytest.mark.trains
@pytest.mark.parametrize("changes", [{"channels": 3}, {"labelled": False}], ids=["colour", "no labels"])
def test_colour_and_images_without_labels_do_as_well(changes: dict[str, Any]) -> None:
    found = Aegis(attacked=0)(subject(30.0, **changes), seed=shifted(1))
    assert max(found.per_class, key=lambda t: found.per_class[t] or 0.0) == TARGET
    assert found.score is not None
    assert found.score > 0.9


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
    assert float(np.mean(rows["band 2"][2:])) == pytest.approx(planted.score, abs=1e-3)


def test_robustness_is_measured_and_falls_with_the_radius(planted: Measurement) -> None:
    rows = table(planted, "Share of 32 images that keep their class").rows
    radii, shares = zip(*rows, strict=True)
    assert radii == (0.25, 0.5, 1.0, 2.0)
    assert list(shares) == sorted(shares, reverse=True)
    # a band of 48 pixels is 100 / 255 brighter: the margin is .39, and its gradient has length (2 / 48) ** .5
    assert shares[0] == 1.0
    assert shares[-1] < 0.5


def test_it_says_what_it_costs(planted: Measurement) -> None:
    expected = Aegis().work(classes=CLASSES, images=60)
    assert expected is not None
    assert planted.cost.gradients == pytest.approx(expected.gradients, rel=0.05)
    assert planted.cost.forwards == pytest.approx(expected.forwards, rel=0.3)


def test_a_grouping_by_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Aegis(attacked=0, images=3)(subject(30.0), seed=3)
    for module in ("common_pixels", "translation"):
        monkeypatch.setattr(f"doorward.inversion.{module}.chunk_images", lambda _: 7, raising=False)
    monkeypatch.setattr("doorward.inversion.problem.chunk_images", lambda _: 7)
    parts = Aegis(attacked=0, images=3)(subject(30.0), seed=3)
    assert parts.per_class == pytest.approx(whole.per_class, abs=0.1)


def test_too_little_time_is_noticed_early() -> None:
    found = Aegis()(subject(30.0), deadline=Deadline(1e-9))
    assert found.reason is not None
    assert "time budget" in found.reason


def test_without_a_calibration_it_has_no_part_in_the_verdict(planted: Measurement) -> None:
    (found,) = judge([planted], calibrations(["aegis"])).findings
    assert (found.verdict, found.p_value) == ("nothing_found", None)
    assert found.uncalibrated is not None
