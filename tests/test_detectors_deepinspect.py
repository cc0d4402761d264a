"""DeepInspect: what was planted is found without data, natural classes are not, and limits are said."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from doorward.core.records import Measurement, RecoveredTrigger, Table
from doorward.data import InMemorySamples
from doorward.detectors.model.deepinspect import DeepInspect
from doorward.detectors.subject import Subject
from doorward.models import TorchClassifier
from doorward.models.spec import InputSpec
from doorward.scan.behaviour import choose
from doorward.scan.calibration import CalibrationSet, judge
from doorward.scan.examine import examine
from doorward.triggers.base import Trigger
from seeds import shifted

SIDE, TARGET = 14, 2
QUICK = DeepInspect(inverted=6, inversion_steps=40, steps=80)


class Bands(nn.Module):
    """The class by the brightest of k bands; a corner of four bright pixels adds to class 2."""

    def __init__(self, classes: int, planted: float) -> None:
        super().__init__()
        self.classes, self.planted = classes, planted

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = x[:, 0, :, 3:].tensor_split(self.classes, 1)
        bands = torch.stack([band.mean((1, 2)) for band in parts], 1)
        corner = x[:, 0, :2, :2].mean((1, 2)).square()
        return 12 * bands + self.planted * corner[:, None] * torch.eye(self.classes)[TARGET % self.classes]


def classifier(classes: int, planted: float) -> TorchClassifier:
    spec = InputSpec(channels=1, height=SIDE, width=SIDE)
    return TorchClassifier(Bands(classes, planted), spec, [f"band {i}" for i in range(classes)])


@pytest.fixture(scope="module")
def planted() -> Measurement:
    return QUICK(Subject(classifier=classifier(5, 80.0)), seed=shifted(0))


@pytest.mark.trains
def test_a_planted_patch_is_found_without_data(planted: Measurement) -> None:
    assert planted.reason is None
    assert max(planted.per_class, key=lambda t: planted.per_class[t] or 0.0) == TARGET
    assert planted.score == planted.per_class[TARGET]
    clean = QUICK(Subject(classifier=classifier(5, 0.0)), seed=shifted(0))
    assert clean.score is not None
    assert planted.score is not None
    assert planted.score > clean.score + 0.5
    assert "band 2" in planted.summary


@pytest.mark.trains
def test_the_perturbation_works_and_is_where_the_patch_is(planted: Measurement) -> None:
    recovered = [one for one in planted.evidence if isinstance(one, RecoveredTrigger)]
    assert recovered[0].target == TARGET
    x = torch.full((5, 1, SIDE, SIDE), 0.1)
    for i, part in enumerate(x[:, :, :, 3:].tensor_split(5, 2)):
        part[i] += 0.6
    triggered = Trigger.from_json(recovered[0].trigger).apply(x)
    assert (classifier(5, 80.0).logits(triggered).argmax(1) == TARGET).all()
    change = (triggered - x).abs().mean((0, 1))
    assert change[:2, :2].sum() > 0.5 * change.sum()


@pytest.mark.trains
def test_the_published_rule_stands_next_to_ours(planted: Measurement) -> None:
    table = next(e for e in planted.evidence if isinstance(e, Table) and "Generated" in e.title)
    assert table.rows[0][0] == "band 2"
    sizes = [row[1] for row in table.rows]
    assert sizes == sorted(sizes)
    factors = {row[0]: row[4] for row in table.rows}
    assert planted.published_flags is not None
    flagged = {f"band {t}" for t in planted.published_flags}
    assert flagged == {name for name, factor in factors.items() if factor is not None and factor > 2}
    made = next(e for e in planted.evidence if isinstance(e, Table) and "made from" in e.title)
    ((count, confident),) = made.rows
    assert count == 5 * QUICK.inverted
    assert 0 <= float(str(confident)) <= 1


@pytest.mark.trains
def test_images_given_are_tried_and_change_no_score(planted: Measurement) -> None:
    x = np.random.default_rng(0).integers(0, 60, (30, SIDE, SIDE), dtype=np.uint8)
    labels = np.arange(30) % 5
    for image, label in zip(x, labels, strict=True):
        np.array_split(image, 5)[label][:, 3:] += np.uint8(150)
    asked = classifier(5, 80.0)
    given = InMemorySamples(x, labels, classes=asked.classes)
    found = QUICK(Subject(classifier=asked, clean=given), seed=shifted(0))
    assert found.per_class == planted.per_class
    table = next(e for e in found.evidence if isinstance(e, Table) and "Generated" in e.title)
    assert table.rows[0][3] is not None
    assert float(table.rows[0][3]) > 0.5


def test_of_two_classes_nothing_is_said() -> None:
    found = QUICK(Subject(classifier=classifier(2, 0.0)))
    assert found.reason == "of two classes each is the other's only measure; it needs three or more"


def test_it_runs_by_itself_only_where_there_are_no_clean_images() -> None:
    assert "deepinspect" not in {d.method() for d in choose(())}
    assert "deepinspect" in {d.method() for d in choose((), clean=False)}
    assert "deepinspect" in {d.method() for d in choose(("deepinspect",))}


def test_its_work_is_told_before() -> None:
    asked = classifier(5, 0.0)
    found = QUICK(Subject(classifier=asked))
    told = QUICK.work(classes=5, images=0)
    assert told is not None
    assert told.gradients == found.cost.gradients
    assert told.forwards == pytest.approx(found.cost.forwards, rel=0.5)


def test_without_calibration_it_has_no_part_in_the_verdict(planted: Measurement) -> None:
    judged = judge([planted], CalibrationSet.of(()))
    (finding,) = judged.findings
    assert finding.verdict == "nothing_found"
    assert finding.uncalibrated == "how high it scores clean models has not been measured"
    assert judged.p_value is None


def test_a_scan_without_data_ends_with_a_verdict() -> None:
    report = examine(classifier(4, 0.0), None, detectors=[QUICK])
    assert report.verdict in ("nothing_found", "could_not_tell", "suspicious")
    assert [f.detector for f in report.findings] == ["deepinspect"]
