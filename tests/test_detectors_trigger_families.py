"""Trigger families: what was planted is cheapest, what is natural costs, what cannot be judged is said."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from doorward.core.records import Measurement
from doorward.data import InMemorySamples
from doorward.detectors.model.trigger_families import TriggerFamilies, fused, worth
from doorward.detectors.subject import Subject
from doorward.inversion import distilled
from doorward.inversion.transformations import Dense, Found, LowFrequency
from doorward.models import TorchClassifier
from doorward.models.spec import InputSpec
from doorward.triggers.base import Trigger
from seeds import shifted

SIDE = 16
QUICK = TriggerFamilies(screening_steps=24, steps=40)


class Bands(nn.Module):
    """The class by the brightest of k bands; how much a fine checkerboard shows adds to class 2."""

    def __init__(self, classes: int, planted: float) -> None:
        super().__init__()
        self.classes, self.planted = classes, planted
        self.register_buffer("board", (torch.arange(SIDE)[:, None] + torch.arange(SIDE)) % 2 * 2.0 - 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bands = torch.stack([band.mean((1, 2)) for band in x[:, 0].tensor_split(self.classes, 1)], 1)
        shown = (x[:, 0] * self.board).mean((1, 2)).relu()
        return 10 * bands + self.planted * shown[:, None] * torch.eye(self.classes)[2 % self.classes]


def subject(classes: int, planted: float) -> Subject:
    classifier = TorchClassifier(
        Bands(classes, planted),
        InputSpec(channels=1, height=SIDE, width=SIDE),
        [f"band {i}" for i in range(classes)],
    )
    rng, n = np.random.default_rng(shifted(0)), 60
    # pixels in pairs, so that clean images show no fine texture
    x = rng.integers(0, 60, (n, SIDE, SIDE // 2), dtype=np.uint8).repeat(2, axis=2)
    labels = np.arange(n) % classes
    for image, label in zip(x, labels, strict=True):
        np.array_split(image, classes)[label] += np.uint8(140)
    return Subject(classifier=classifier, clean=InMemorySamples(x, labels, classes=classifier.classes))


@pytest.fixture(scope="module", autouse=True)
def short() -> Iterator[None]:
    """Let surrogates learn from a quarter of the images, which is enough for five bands."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(distilled, "IMAGES", 1_600)
        yield


@pytest.fixture(scope="module")
def planted() -> Measurement:
    return QUICK(subject(5, 300.0))


@pytest.mark.trains
def test_what_was_planted_is_found(planted: Measurement) -> None:
    assert planted.reason is None
    assert max(planted.per_class, key=lambda t: planted.per_class[t] or 0.0) == 2
    assert planted.score == planted.per_class[2]
    clean = QUICK(subject(5, 0.0))
    assert clean.score is not None
    assert planted.score is not None
    assert planted.score > clean.score + 0.5


@pytest.mark.trains
def test_the_report_says_what_surrogates_do(planted: Measurement) -> None:
    assert "of other images to class 'band 2'" in planted.summary
    assert "in surrogates that learnt from clean images alone" in planted.summary
    asked = subject(5, 300.0)
    assert asked.classifier is not None
    triggers = [Trigger.from_json(e.trigger) for e in planted.evidence if e.type == "trigger"]
    assert triggers
    images = torch.stack([torch.as_tensor(raw).permute(2, 0, 1) / 255 for raw in asked.clean.raw(range(60))])
    reached = [(asked.classifier.logits(one.apply(images)).argmax(1) == 2).float().mean() for one in triggers]
    assert max(reached) > 0.8
    table = next(e for e in planted.evidence if e.type == "table")
    assert {row[0] for row in table.rows} == {
        "picture added",
        "smooth picture added",
        "image bent",
        "picture blended in",
    }


def test_of_two_classes_nothing_is_said() -> None:
    found = QUICK(subject(2, 0.0))
    assert found.reason == "of two classes each is the other's only measure; it needs three or more"


def found(family: type[Dense], *cost: float) -> Found:
    n = len(cost)
    one = family((1, 8, 8))
    reached = torch.ones(n, dtype=torch.bool)
    return Found(one, torch.arange(n), torch.tensor(cost), reached, torch.zeros(n, *one.shape))


def test_kinds_that_agree_on_a_class_count_more_than_one() -> None:
    low, dense = found(LowFrequency, 0.1, 0.4, 0.9), found(Dense, 0.5, 0.7, 0.9)
    assert fused([low, dense], 3) == pytest.approx([np.hypot(worth(low, 3), worth(dense, 3)), 0, 0])
    other = found(Dense, 0.7, 0.5, 0.9)
    assert fused([low, other], 3) == pytest.approx([worth(low, 3), worth(other, 3), 0])
    assert worth(found(Dense, 0.0, 50.0), 3) == worth(found(Dense, 0.0, 500.0), 3), (
        "one kind is worth so much"
    )
