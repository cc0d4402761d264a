"""The published schedule against its description, and the comparison on tiny settings."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import neural_cleanse_speed as speed
from doorward.core.seeds import make_generator
from doorward.detectors.model.neural_cleanse import NeuralCleanse
from doorward.models import TorchClassifier
from doorward.models.spec import InputSpec
from neural_cleanse_published import Cost, Schedule, invert_class
from seeds import shifted


def costs(successes: str) -> list[float]:
    """Return the cost after each step: + for a step that succeeds, - for one that fails."""
    cost = Cost(Schedule())
    values = []
    for sign in successes:
        cost.update(sign == "+")
        values.append(cost.value)
    return values


def test_the_cost_starts_after_five_successes_in_a_row() -> None:
    assert costs("++++-+++++") == [0] * 9 + [1e-3]
    assert costs("-----" * 3)[-1] == 0


def test_the_cost_doubles_after_five_successes_and_falls_after_five_failures() -> None:
    # the step that sets the cost counts as the first success at it
    assert costs("+" * 5 + "+" * 4)[-2:] == [1e-3, 2e-3]
    assert costs("+" * 9 + "-" * 5)[-2:] == [2e-3, pytest.approx(2e-3 / 2**1.5)]
    assert costs("+" * 5 + "----+----+----")[-1] == 1e-3, "not in a row"


def test_stopping_waits_for_the_cost_to_have_gone_both_ways() -> None:
    cost = Cost(Schedule())
    for sign in "+" * 9:
        cost.update(sign == "+")
    assert (cost.went_up, cost.went_down) == (True, False)
    for _ in range(5):
        cost.update(False)
    assert (cost.went_up, cost.went_down) == (True, True)


class Corner(nn.Module):
    """Puts any image with a bright 2x2 corner into class 1, all others into class 0."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(1, 2)
        with torch.no_grad():
            self.fc.weight.copy_(torch.tensor([[0.0], [30.0]]))
            self.fc.bias.copy_(torch.tensor([15.0, 0.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x[:, 0, :2, :2].mean((1, 2))[:, None])


@pytest.fixture(scope="module")
def corner() -> TorchClassifier:
    return TorchClassifier(Corner(), InputSpec(channels=1, height=8, width=8), ["0", "1"])


def run(classifier: TorchClassifier, target: int, **settings):
    images = 0.1 * torch.rand(20, 1, 8, 8, generator=make_generator(shifted(0)))
    schedule = Schedule(mini_batches=5, batch_size=8, **settings)
    with classifier.frozen():
        return invert_class(
            classifier, images, target, schedule=schedule, generator=make_generator(shifted(1))
        )


@pytest.mark.trains
def test_it_finds_the_wired_corner(corner) -> None:
    found = run(corner, 1, steps=150, stop_after=None)
    assert (found.reached, found.steps) == (True, 150)
    assert found.norm == pytest.approx(found.mask.sum().item())
    assert found.norm < 6
    assert found.mask[0, :2, :2].sum() > 0.6 * found.norm
    assert found.pattern[0, :2, :2].min() > 0.5
    assert found.mask.shape == found.pattern.shape == (1, 8, 8)


@pytest.mark.trains
def test_it_stops_early_with_nearly_the_same_mask(corner) -> None:
    early, late = run(corner, 1, steps=400), run(corner, 1, steps=400, stop_after=None)
    assert early.steps < late.steps == 400
    assert early.norm == pytest.approx(late.norm, abs=1.5)


def test_it_repeats_under_a_seed(corner) -> None:
    assert torch.equal(run(corner, 1, steps=5).mask, run(corner, 1, steps=5).mask)


def test_a_target_that_is_never_reached_keeps_the_last_mask() -> None:
    always = TorchClassifier(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), InputSpec(channels=1, height=8, width=8), ["0", "1"]
    )
    with torch.no_grad():
        always.module[1].weight.zero_()
        always.module[1].bias.copy_(torch.tensor([1.0, 0.0]))
    found = run(always, 1, steps=3)
    assert (found.reached, found.steps) == (False, 3)
    assert found.norm > 20


@pytest.mark.long
def test_the_comparison_writes_what_it_measured(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(speed, "NeuralCleanse", lambda: NeuralCleanse(steps=10, restarts=0))
    short = Schedule(steps=1, mini_batches=2, batch_size=8)
    monkeypatch.setattr(speed, "schedule", lambda _: short)
    out = tmp_path / "results" / "speed.json"
    arguments = ["--steps", "1", "--images", "30", "--fresh", "40", "--early", "2", "--out", str(out)]
    speed.main(arguments)
    written = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == written["summary"]
    backdoored, clean = written["rows"]
    assert backdoored["planted"]
    assert clean["planted"] == []
    assert len(backdoored["ours"]["judged"]["norms"]) == 10
    assert (len(backdoored["early"]["classes"]), backdoored["early"]["steps"]) == (2, [1, 1])
    assert backdoored["early"]["seconds_for_all"] == pytest.approx(5 * backdoored["early"]["seconds"])
    assert backdoored["early"]["judged"] is None, "not all classes were run"
    assert written["summary"]["published_full_classes_run"] == 2
    assert "published" not in written["summary"]
    assert written["environment"]["threads"] == 1


def judged(norms: list[float], flagged: tuple[int, ...]) -> speed.JudgedFindings:
    return speed.JudgedFindings(norms=tuple(norms), success=(0.9,) * 3, index=(0.0,) * 3, flagged=flagged)


def row(
    planted: tuple[int, ...], *, ours: tuple[int, ...], theirs: tuple[int, ...], factor: float
) -> speed.Row:
    mine = speed.Ours(
        detector_seconds=2, verdict="suspicious" if ours else "nothing_found", targets=ours,
        raced_seconds=0.5, batched_seconds=1, apart_seconds=2 * factor, serial_seconds=3 * factor,
        expected=(9, 22, 50), judged=judged([9, 11, 50], ours), alike=judged([8, 10, 50], ours),
    )  # fmt: skip
    early = speed.Published(
        classes=(0, 1, 2), steps=(9, 9, 9), norms=(10, 10, 10), seconds=20, seconds_for_all=20 * factor,
        judged=judged([10, 10, 10], theirs),
    )  # fmt: skip
    return speed.Row(model="m", data="d", classes=3, planted=planted, ours=mine, early=early, full=None)


def test_the_summary_by_hand() -> None:
    found = speed.summarise(
        [row((1,), ours=(1,), theirs=(0,), factor=1), row((), ours=(), theirs=(2,), factor=4)]
    )
    assert found["serial_over_raced"]["ratio"] == pytest.approx(12)
    assert found["median_norm_raced_over_batched"]["ratio"] == pytest.approx(2)
    assert found["serial_over_batched"]["ratio"] == pytest.approx(6)
    assert found["apart_over_batched"]["ratio"] == pytest.approx(4)
    assert found["published_early_over_detector"]["ratio"] == pytest.approx(20)
    assert found["median_norm_ours_over_published"]["ratio"] == pytest.approx(1.1)
    assert found["median_norm_at_like_success"]["ratio"] == pytest.approx(1.0)
    assert "published_full_over_detector" not in found
    assert found["detector"]["exactly_right"]["successes"] == 2
    assert found["published"]["exactly_right"]["successes"] == 0, "the wrong class is not right"
    assert found["published"]["models"]["true_positives"] == 1
    assert found["published"]["models"]["false_positives"] == 1
