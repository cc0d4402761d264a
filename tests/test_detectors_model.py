from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from doorward.data import InMemorySamples
from doorward.detectors.model.max_margin import MaxMargin, maximum_margins
from doorward.detectors.model.neural_cleanse import NeuralCleanse
from doorward.methods import Deadline, make_generator
from doorward.models import TorchClassifier
from doorward.models.spec import InputSpec
from doorward.outliers import gamma_order_p
from doorward.subject import Subject
from doorward.triggers import Trigger

SIDE = 12


class Bands(nn.Module):
    """Tell the class by the brightest of k rows; the last pixel adds `wired` to class 2, for a trigger."""

    def __init__(self, classes: int, wired: float) -> None:
        super().__init__()
        self.classes, self.wired = classes, wired

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = 10 * x[:, 0, : self.classes, :-2].mean(2)  # (n, k)
        wire = torch.zeros(self.classes, device=x.device)
        wire[2 % self.classes] = self.wired
        return z + x[:, 0, -1, -1, None] * wire


def subject(classes: int, wired: float, *, images: int = 60, labelled: bool = True) -> Subject:
    spec = InputSpec(channels=1, height=SIDE, width=SIDE)
    classifier = TorchClassifier(Bands(classes, wired), spec, [f"band {i}" for i in range(classes)])
    rng = np.random.default_rng(0)
    x = rng.integers(0, 60, (images, SIDE, SIDE), dtype=np.uint8)
    labels = np.arange(images) % classes
    for image, label in zip(x, labels, strict=True):
        image[label] = 200
        # every class is a little easier or harder to reach than the next
        image[label] -= np.uint8(3 * label)
    return Subject(
        classifier=classifier,
        clean=InMemorySamples(x, labels if labelled else None, classes=classifier.classes),
    )


@pytest.mark.parametrize("labelled", [True, False])
def test_neural_cleanse_finds_the_wired_pixel_and_its_class(labelled: bool) -> None:
    found = NeuralCleanse(steps=100)(subject(6, 12.0, labelled=labelled))
    assert found.verdict == "suspicious"
    assert found.targets == (2,)
    assert found.p_value is not None
    assert found.p_value < 0.045
    trigger = Trigger.from_json(next(e.trigger for e in found.evidence if e.type == "trigger"))
    mask = trigger.tensors()["mask"]
    assert mask.argmax() == SIDE * SIDE - 1
    assert mask.sum() < 3


def test_neural_cleanse_says_how_far_each_class_lies() -> None:
    found = NeuralCleanse(steps=60)(subject(6, 12.0))
    assert sorted(found.per_class) == list(range(6))
    assert found.score == max(found.per_class.values())
    table = next(e for e in found.evidence if e.type == "table")
    norms = {row[0]: row[1] for row in table.rows}
    assert norms["band 2"] == min(norms.values())


def test_neural_cleanse_halves_the_batch_of_many_classes() -> None:
    many = NeuralCleanse(steps=10, restarts=0, batch_size=8, many_classes=5)
    # and one run of one class, in a whole batch, to confirm
    assert many(subject(6, 0.0)).cost.gradients == 6 * 4 * 10 + 8 * 10
    assert many(subject(5, 0.0)).cost.gradients == 5 * 8 * 10 + 8 * 10


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes_are_compared_too(classes: int) -> None:
    target = 2 % classes
    for detector in (NeuralCleanse(steps=100), MaxMargin()):
        found = detector(subject(classes, 40.0))
        assert found.score is not None
        assert max(found.per_class, key=lambda t: found.per_class[t] or 0.0) == target
        assert found.score == found.per_class[target]


def test_a_single_class_cannot_be_compared() -> None:
    for detector in (NeuralCleanse(steps=10), MaxMargin(steps=5)):
        assert detector(subject(1, 0.0)).verdict == "could_not_tell"


def test_neural_cleanse_wants_enough_images() -> None:
    found = NeuralCleanse()(subject(6, 12.0, images=12))
    assert found.verdict == "could_not_tell"
    assert found.reason == "12 clean images are too few; give at least 20"


def test_max_margin_finds_the_class_with_the_wired_pixel() -> None:
    found = MaxMargin()(subject(6, 200.0))
    assert found.targets == (2,)
    assert found.verdict == "suspicious"
    assert found.cost.gradients == 6 * 10 * 60


def test_max_margin_shows_the_published_statistic() -> None:
    found = MaxMargin()(subject(6, 4.0))
    margins, published = (e for e in found.evidence if e.type == "table")
    values = np.array([row[1] for row in margins.rows], dtype=float)
    assert published.rows[0][1] == pytest.approx(gamma_order_p(values), rel=0.02, abs=1e-4)


def test_maximum_margins_reach_the_known_maximum() -> None:
    one = subject(6, 0.0)
    assert one.classifier is not None
    # the largest margin is that of one full band among dark ones: 10
    reached = maximum_margins(
        one.classifier,
        starts=3,
        steps=80,
        learning_rate=0.05,
        generator=make_generator(0),
        deadline=Deadline(),
    )
    assert reached.shape == (6, 3)
    torch.testing.assert_close(reached, torch.full((6, 3), 10.0), atol=0.05, rtol=0)


def test_maximum_margins_do_not_depend_on_the_chunks(monkeypatch) -> None:
    one = subject(5, 3.0)
    assert one.classifier is not None

    def run() -> torch.Tensor:
        return maximum_margins(
            one.classifier,
            starts=2,
            steps=50,
            learning_rate=0.05,
            generator=make_generator(0),
            deadline=Deadline(),
        )

    whole = run()
    monkeypatch.setattr("doorward.inversion.CHUNK_ELEMENTS", SIDE * SIDE * 3)
    torch.testing.assert_close(run(), whole, atol=1e-4, rtol=1e-4)


def test_the_time_budget_is_kept() -> None:
    for detector in (NeuralCleanse(), MaxMargin()):
        found = detector(subject(6, 12.0), deadline=Deadline(0.0))
        assert found.verdict == "could_not_tell"
        assert "time budget" in (found.reason or "")
