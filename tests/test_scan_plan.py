from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import nn

from doorward.core.budget import Deadline, TimeGuard
from doorward.core.records import Cost, Measurement
from doorward.detectors.base import Detector
from doorward.detectors.subject import Subject
from doorward.methods import registry
from doorward.models import InputSpec, TorchClassifier
from doorward.scan import schedule
from doorward.scan.context import ScanContext
from doorward.scan.plan import (
    MOST,
    QUICK,
    Option,
    Pace,
    best_plan,
    duration,
    options_of,
    quick_settings,
    work_of,
)
from doorward.scan.schedule import run_in_time
from test_detectors_model import subject

NAMES = ("max-margin", "blend-search", "patch-search", "trigger-families", "neural-cleanse")


def option(name: str, seconds: float, worth: float = 1.0, reduced: bool = False) -> Option:
    return Option(
        name, registry.build("detector", "max-margin", {}), {"steps": 1} if reduced else {}, seconds, worth
    )


def names(plan: list[Option]) -> list[tuple[str, bool]]:
    return [(one.name, bool(one.reduced)) for one in plan]


A = (option("a", 10, 0.25), option("a", 3, 0.025, reduced=True))
B = (option("b", 100, 1.0), option("b", 20, 0.1, reduced=True))
C = (option("c", 80, 1.0), option("c", 15, 0.1, reduced=True))


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        (1000, {("a", False), ("b", False), ("c", False)}),
        (190, {("a", False), ("b", False), ("c", False)}),
        (189, {("b", False), ("c", False), ("a", True)}),
        (120, {("a", False), ("c", False), ("b", True)}),
        (50, {("a", False), ("b", True), ("c", True)}),
        (12, {("a", False)}),
        (1, {("a", True)}),
    ],
)
def test_a_plan_is_worth_as_much_as_the_time_allows(seconds: float, chosen: set) -> None:
    assert set(names(best_plan([A, B, C], seconds))) == chosen


def test_what_is_worth_most_a_second_comes_first() -> None:
    assert [one.name for one in best_plan([B, A, C], 1000)] == ["a", "c", "b"]


def test_many_detectors_are_planned_too() -> None:
    many = [(option(f"d{i}", 10 + i), option(f"d{i}", 2, 0.1, reduced=True)) for i in range(MOST + 5)]
    plan = best_plan(many, 60.0)
    assert sum(one.seconds for one in plan) <= 60
    assert len({one.name for one in plan}) == len(plan) >= 4
    assert best_plan([], 10.0) == []


def test_surrogates_that_several_detectors_use_are_paid_once() -> None:
    one, other, fewer = (
        replace(option(name, 10.0), lesson=lesson, lesson_seconds=lesson / 10)
        for name, lesson in (("a", 300), ("b", 300), ("c", 100))
    )
    assert duration([one]) == 40
    assert duration([one, other]) == 50
    assert duration([one, other, fewer]) == 70
    assert len(best_plan([[one], [other]], 50.0)) == 2
    assert len(best_plan([[one], [other]], 49.0)) == 1


@pytest.mark.parametrize("quick", [False, True], ids=["full", "quick"])
@pytest.mark.parametrize("name", NAMES)
def test_estimates_are_near_what_detectors_send_through(name: str, quick: bool, monkeypatch) -> None:
    """Settings are divided so that this is over soon; what is compared is how the numbers go together."""
    monkeypatch.setattr("doorward.inversion.distilled.IMAGES", 256)
    full = registry.build("detector", name, {})
    lowered = quick_settings(full) if quick else {}
    small = {"steps": 24, "first_steps": 6, "further_steps": 8, "mixtures": 256, "starts": 2}
    small |= {"screening_steps": 24}
    own = {key: min(value, lowered.get(key, value)) for key, value in small.items() if key in full.settings()}
    detector = registry.build("detector", name, lowered | own)
    given = subject(6, 12.0)
    assert given.clean is not None
    found = detector(given)
    assert found.reason is None
    expected = work_of(detector, classes=6, images=len(given.clean))
    assert found.cost.gradients == pytest.approx(expected.gradients, rel=0.1)
    assert found.cost.forwards == pytest.approx(expected.forwards + detector.lesson(), rel=0.3, abs=200)


@pytest.mark.parametrize("name", NAMES)
def test_quick_settings_are_quick_and_stay_below_those_of_the_user(name: str) -> None:
    pace = Pace(forward=0.4, gradient=1.0)
    full, quick = options_of(registry.build("detector", name, {}), pace, classes=10, images=50)
    assert quick.seconds < full.seconds / 2
    assert set(quick.reduced) <= set(QUICK[name])
    assert full.worth > quick.worth
    least = registry.build("detector", name, {"steps": 24})
    assert "steps" not in quick_settings(least)


def test_a_detector_says_itself_what_it_costs() -> None:
    class Own(Stepping):
        def work(self, *, classes: int, images: int) -> Cost:
            return Cost(forwards=classes, gradients=images)

    assert work_of(Own(), classes=3, images=7) == Cost(forwards=3, gradients=7)
    assert work_of(Stepping(), classes=3, images=7).gradients > 0, "unknown is not nothing"


class Stepping(Detector):
    """Take a second a step of a clock that the test holds."""

    title: ClassVar[str] = "steps"
    source: ClassVar[str] = "this test"
    limits: ClassVar[str] = "It measures nothing."
    needs = frozenset({"weights"})
    quick: ClassVar[dict] = {"steps": 10}
    now: ClassVar[list[float]] = [0.0]

    label: str = "a"
    steps: int = 100

    @classmethod
    def method(cls) -> str:
        return cls.__name__.lower()

    def work(self, *, classes: int, images: int) -> Cost:
        return Cost(gradients=self.steps)

    def measurement(self, **values) -> Measurement:
        base = {"detector": self.method(), "level": "model", "kind": "backdoor", "settings": self.settings()}
        return Measurement(**base | values)

    def examine(self, subject, *, generator, device, deadline) -> Measurement:
        guard = TimeGuard(deadline, self.steps, work="stepping")
        for _ in range(self.steps):
            self.now[0] += self.pace()
            guard.advance(1)
        return self.measurement(summary="done", score=0.0, per_class={0: 0.0, 1: 0.0})

    def pace(self) -> float:
        return 1.0


class Slower(Stepping):
    def pace(self) -> float:
        return 4.0


class Fading(Stepping):
    """Begin at the pace that was estimated, and slow down, as on a machine that others use too."""

    def pace(self) -> float:
        return 1.0 if self.now[0] < 1020 else 1.5


class Endless(Stepping):
    quick: ClassVar[dict] = {}
    steps: int = 100_000


class Endless1(Endless):
    steps: int = 10_000


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(Stepping, "now", now)
    monkeypatch.setattr("doorward.core.budget.time.monotonic", lambda: now[0])
    monkeypatch.setattr(schedule, "measure_pace", lambda *_: Pace(forward=1.0, gradient=1.0))
    return now


def ran(clock: list[float], budget: float | None, *detectors: Detector, told: list[str] | None = None):
    classifier = TorchClassifier(nn.Flatten(), InputSpec(channels=1, height=1, width=2), ["a", "b"])
    progress = (lambda _: None) if told is None else told.append
    context = ScanContext(deadline=Deadline(budget, started=clock[0]), report_progress=progress)
    return run_in_time(detectors, Subject(classifier=classifier), context, torch.rand(2, 1, 1, 2))


def test_all_run_in_full_where_there_is_time(clock) -> None:
    for budget in (1000, None):
        done = ran(clock, budget, Stepping(), Slower())
        assert [(m.detector, m.settings["steps"]) for m in done.measurements] == [
            ("stepping", 100),
            ("slower", 100),
        ]
        assert (done.not_run, done.notes, done.reason) == ([], [], None)


def test_what_does_not_fit_runs_at_a_reduced_setting_and_says_so(clock) -> None:
    done = ran(clock, 50, Stepping())
    assert done.measurements[0].settings["steps"] == 10
    assert done.not_run == []
    assert done.notes == ["stepping ran at a reduced setting, so that the scan ends in time: steps 10"]


def test_an_estimate_that_was_too_low_is_mended_as_the_scan_goes(clock) -> None:
    """It takes four times as long as the model's pace says: it is begun, given up, and run more coarsely."""
    done = ran(clock, 150, Slower())
    assert done.measurements[0].settings["steps"] == 10
    assert clock[0] - 1000 <= 150


def test_what_may_take_all_the_time_and_longer_does_not_come_first(clock) -> None:
    done = ran(clock, 110, Fading())
    assert [(m.detector, m.settings["steps"]) for m in done.measurements] == [("fading", 10)]
    assert done.reason is None


def test_what_is_not_run_is_named_with_what_it_would_take(clock) -> None:
    done = ran(clock, 150, Endless(), Stepping())
    assert [m.detector for m in done.measurements] == ["stepping"]
    assert [one.detector for one in done.not_run] == ["endless"]
    assert "would take 28 hours, and" in done.not_run[0].reason
    assert done.notes[0] == "not run for lack of time: endless; give more with --time-budget"
    assert done.reason is None, "a verdict is drawn from what ran"


def test_where_most_of_the_weight_did_not_run_that_is_the_reason(clock) -> None:
    done = ran(clock, 150, Endless(), Endless1(), Stepping())
    assert [m.detector for m in done.measurements] == ["stepping"]
    assert done.reason == (
        "there was no time for detectors, or for their full settings, that have 66.7 % of the weight in the "
        "verdict; give more with --time-budget"
    )


def test_where_nothing_fits_that_is_the_reason(clock) -> None:
    done = ran(clock, 20, Endless())
    assert done.measurements == []
    assert done.reason is not None
    assert done.reason.startswith("endless: it would take 28 hours")


def test_where_several_do_not_fit_the_quickest_is_the_reason(clock) -> None:
    done = ran(clock, 20, Endless(), Endless1())
    assert done.measurements == []
    assert done.reason is not None
    assert done.reason.startswith(
        "no time for endless and endless1; the quickest that was left is endless1: it would take 3 hours, and"
    )


def test_progress_tells_the_plan_and_what_is_left(clock) -> None:
    told: list[str] = []
    ran(clock, 1000, Stepping(), Slower(), told=told)
    told = [line for line in told if line.startswith("stepping")]
    assert told[0] == "stepping: steps (1 of 2, about 4 minutes left; then slower)"
    assert told[-1] == "stepping: steps (1 of 2, about 100 seconds left; then slower)"
