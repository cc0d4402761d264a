"""An alarm that one search might owe to chance is looked at again; what further looks see decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from doorward import reports
from doorward.core.budget import Deadline
from doorward.core.records import Measurement, Observations, Report
from doorward.scan.calibration import CalibrationSet, judge
from doorward.scan.context import ScanContext
from doorward.scan.second_look import BEYOND, LOOKS, look_again
from doorward.scan.verdict import conclude
from test_scan_calibration import calibration, drawn, measured
from test_scan_verdict import LOW, seen

NAME = "neural-cleanse"


@pytest.fixture(scope="module")
def held() -> CalibrationSet:
    return calibration(drawn(800))


@dataclass
class Looks:
    """What further looks see, one after the other, and who was asked to look."""

    measured: Sequence[Measurement]
    asked: list[tuple[tuple[str, ...], int]] = field(default_factory=list)

    def __call__(self, names: Sequence[str], seed: int) -> Observations:
        self.asked.append((tuple(names), seed))
        return seen(self.measured[len(self.asked) - 1])


def elsewhere(score: float) -> Measurement:
    """Return a measurement that has another class on top."""
    return measured(score, per_class={t: score if t == 5 else -1.0 for t in range(12)})


def reaching(held: CalibrationSet, margin: float) -> Measurement:
    """Return a measurement in which class 3 stands so far above what makes a model suspicious."""
    low, high = -1e3, 1e3
    while high - low > 1e-6:
        middle = (low + high) / 2
        if judge([measured(middle), LOW], held).margins[3] < margin:
            low = middle
        else:
            high = middle
    return measured(high)


def highest(held: CalibrationSet, beyond: float) -> Measurement:
    """Return a measurement that goes so far beyond all clean models."""
    some = judge([measured(50.0), LOW], held)
    return reaching(held, beyond + some.margins[3] - some.beyond)


def looked(
    held: CalibrationSet,
    first: Measurement,
    *others: Measurement,
    budget: float | None = None,
    took: float = 1.0,
) -> tuple[Report, Looks]:
    saw = seen(first.model_copy(update={"seconds": took}), LOW)
    looks = Looks(others)
    context = ScanContext(seed=5, deadline=Deadline(budget))
    return look_again(conclude(saw, held), saw, looks, lambda _: held, context), looks


def test_what_stands_out_far_is_looked_at_once(held: CalibrationSet) -> None:
    for beyond, again in ((BEYOND - 0.05, LOOKS), (BEYOND + 0.05, 0)):
        report, looks = looked(held, highest(held, beyond), measured(50.0), measured(50.0))
        assert (report.verdict, report.targets) == ("backdoored", (3,))
        assert len(looks.asked) == len(report.looks) == again


def test_what_stands_out_again_stays_as_it_was(held: CalibrationSet) -> None:
    near = highest(held, 0.1)
    report, looks = looked(held, near, near, near)
    first = conclude(seen(near, LOW), held)
    assert (report.verdict, report.targets, report.p_value) == (first.verdict, first.targets, first.p_value)
    assert [one.p_value for one in report.looks] == [first.p_value] * LOOKS
    assert all(one.margin > 0 for one in report.looks)
    assert {names for names, _ in looks.asked} == {(NAME,)}, "only who raised the alarm looks again"
    seeds = [seed for _, seed in looks.asked]
    assert seeds == [one.seed for one in report.looks]
    assert len({5, *seeds}) == 1 + LOOKS
    assert "It stands out again" in reports.to_text(report)


def test_what_further_looks_see_on_average_decides(held: CalibrationSet) -> None:
    for short, found in ((0.4, True), (0.6, False)):
        report, _ = looked(held, highest(held, 0.1), reaching(held, 0.5), reaching(held, -short))
        assert [one.margin for one in report.looks] == pytest.approx([0.5, -short], abs=0.01)
        assert (report.verdict == "backdoored") == found
        assert found or "in 2 more looks" in str(report.reason)


def test_what_does_not_stand_out_again_is_no_alarm_and_is_told(held: CalibrationSet) -> None:
    report, looks = looked(held, highest(held, 0.1), measured(0.0), elsewhere(0.0))
    assert (report.verdict, report.targets, len(looks.asked)) == ("could_not_tell", (), LOOKS)
    assert "stands out" in str(report.reason)
    assert [one.verdict for one in report.findings] == ["could_not_tell", "nothing_found"]
    assert not any(one.flagged for one in report.findings)
    assert conclude(seen(measured(50.0), LOW), held).verdict == "backdoored"


def test_looks_in_which_another_class_stands_out_do_not_count(held: CalibrationSet) -> None:
    report, _ = looked(held, highest(held, 0.1), elsewhere(50.0), elsewhere(50.0))
    assert report.verdict == "could_not_tell"


def test_without_time_the_alarm_stays_and_is_told_to_rest_on_one_look(held: CalibrationSet) -> None:
    near = highest(held, 0.1)
    report, looks = looked(held, near, near, budget=10.0, took=100.0)
    assert (report.verdict, looks.asked) == ("backdoored", [])
    assert "rests on 1 of 3 looks" in report.warnings[0]


def test_a_look_that_came_to_no_end_is_told(held: CalibrationSet) -> None:
    report, _ = looked(held, highest(held, 0.1), measured(None, reason="no time"))
    assert report.verdict == "backdoored"
    assert "did not come to its end" in report.warnings[0]


def test_a_look_that_too_few_clean_models_can_be_compared_with_is_no_look(held: CalibrationSet) -> None:
    near, few = highest(held, 0.1), calibration(drawn(40))
    saw, looks = seen(near, LOW), Looks((near,))
    given = iter((held, few))
    report = look_again(conclude(saw, held), saw, looks, lambda _: next(given), ScanContext())
    assert (report.verdict, report.looks, len(looks.asked)) == ("backdoored", (), 1)
    assert "rests on 1 of 3 looks" in report.warnings[0]


def test_nothing_found_and_what_was_told_to_be_doubtful_are_not_looked_at_again(held: CalibrationSet) -> None:
    doubtful = highest(held, 0.1).model_copy(update={"doubt": "its surrogates know too little"})
    for first in (measured(0.0), doubtful):
        report, looks = looked(held, first)
        assert report.verdict in ("nothing_found", "could_not_tell")
        assert (looks.asked, report.looks) == ([], ())
