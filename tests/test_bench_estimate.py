"""How long a run takes: what is measured before it, and what is learned during it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench_examples import clean, planted, robust, trials
from doorward.bench import estimate as module
from doorward.bench.cache import ModelCache
from doorward.bench.estimate import Speed, TimeLeft, estimate
from doorward.bench.plan import Planned, Sources, plan
from doorward.bench.suite import Data, Group
from doorward.bench.worker import TrialRunner

SOURCES = Sources(None)


def plans(*groups: Group) -> list[Planned]:
    return [plan(trial, SOURCES) for trial in trials(*groups)]


def test_an_estimate_adds_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem: list[tuple[object, ...]] = []

    def speed(*kind: object) -> Speed:
        problem.append(kind)
        return Speed(training=100, gradients=1000)

    monkeypatch.setattr(module, "_speed", speed)
    cache = ModelCache(tmp_path)
    todo = plans(clean(2, seeds=3), planted(1), clean(1, name="missing", data=Data(name="nowhere")))
    TrialRunner(cache, SOURCES).make(todo[0])
    found = estimate(todo, cache, workers=2, threads=1, device="cpu")
    assert (found.models, found.cached) == (3, 1)
    assert found.training == pytest.approx(2 * 400 * 3 / 100 / 2), "two models of 400 images, 3 epochs"
    each = (10 * module.GRADIENTS_PER_CLASS + module.GRADIENTS_BESIDE) / 1000
    assert found.scanning == pytest.approx(7 * each / 2), "seven scans of ten classes"
    assert problem == [("small-cnn", (1, 28, 28), "cpu")]
    attacked = estimate(
        plans(robust(1, robust={"eps": 0.1, "steps": 3})), cache, workers=1, threads=1, device="cpu"
    )
    assert attacked.training == pytest.approx(400 * 3 / 100 * 4), "each step of the attack takes as long"


def test_a_calibration_sets_threads_and_sets_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def speed(*_: object) -> Speed:
        seen.append(torch.get_num_threads())
        return Speed(training=1, gradients=1)

    monkeypatch.setattr(module, "_speed", speed)
    before = torch.get_num_threads()
    estimate(plans(clean(1)), ModelCache(Path("nowhere")), workers=1, threads=before + 2, device="cpu")
    assert seen == [before + 2]
    assert torch.get_num_threads() == before


def test_a_calibration_measures_training_and_gradients() -> None:
    found = module._speed("small-cnn", (1, 28, 28), "cpu")
    assert 50 < found.training < 1e6
    assert 50 < found.gradients < 1e6


def test_time_left_is_learned_from_the_closest_kind() -> None:
    todo = plans(clean(4, architectures=("small-cnn", "vgg")), planted(2))
    small, vgg, small_again, vgg_again, first, _ = todo
    left = TimeLeft(todo, workers=2)
    assert left.seconds() is None
    left.ended(small, 10)
    assert left.seconds() == (10 + 10 + 10 + 10 + 10) / 2, "what is not known is taken from what is"
    left.ended(vgg, 30)
    assert left.seconds() == (10 + 30 + 10 + 10) / 2, "a planted small CNN is closest to a clean one"
    left.ended(first, 4)
    assert left.seconds() == (10 + 30 + 4) / 2
    for one in (small_again, vgg_again, todo[-1]):
        left.ended(one, 1)
    assert left.seconds() is None


def test_what_is_copied_says_nothing_of_the_time_of_a_scan() -> None:
    todo = plans(clean(3))
    left = TimeLeft(todo, workers=1)
    left.ended(todo[0], 5)
    left.ended(todo[1], 0)
    assert left.seconds() == 5


def test_what_is_skipped_takes_no_time() -> None:
    todo = plans(clean(1), clean(3, name="missing", data=Data(name="nowhere")))
    left = TimeLeft(todo, workers=1)
    left.ended(todo[0], 5)
    assert left.seconds() is None


@pytest.mark.parametrize("architecture", ["text-cnn", "audio-cnn"])
def test_texts_and_recordings_are_calibrated_by_training_alone(architecture: str) -> None:
    speed = module._speed(architecture, (1, 1, 1), "cpu")
    assert 10 < speed.training < 1e7
    assert speed.gradients is None
