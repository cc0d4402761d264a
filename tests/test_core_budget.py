from __future__ import annotations

import pytest

from doorward.core import budget as module
from doorward.core.budget import Deadline, TimeGuard
from doorward.core.errors import CouldNotTell


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the time, as a list of one number that the test sets."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def started(now: list[float], *, budget: float | None, total: float) -> TimeGuard:
    return TimeGuard(Deadline(budget, started=now[0]), total, work="counting")


def parts_done(clock: list[float], guard: TimeGuard, *parts: tuple[float, float]) -> int:
    """Let parts of (seconds, amount) pass; return how many of them went through."""
    for done, (seconds, amount) in enumerate(parts):
        clock[0] += seconds
        try:
            guard.advance(amount)
        except CouldNotTell:
            return done
    return len(parts)


def test_work_in_time_goes_through(clock: list[float]) -> None:
    guard = started(clock, budget=100, total=10)
    assert parts_done(clock, guard, *[(9.9, 1)] * 10) == 10


def test_without_a_limit_nothing_ends(clock: list[float]) -> None:
    guard = TimeGuard(Deadline(), 10, work="counting")
    assert parts_done(clock, guard, *[(1e9, 1)] * 10) == 10


def test_hopeless_work_ends_after_its_first_part(clock: list[float]) -> None:
    guard = started(clock, budget=900, total=1000)
    clock[0] += 10  # 999 more of these would be 2.8 hours
    with pytest.raises(CouldNotTell, match=r"^counting would take 3 hours more, and 15 min.*--time-budget"):
        guard.advance(1)


def test_a_slow_first_part_is_forgiven_and_the_third_counts(clock: list[float]) -> None:
    guard = started(clock, budget=100, total=10)
    clock[0] += 20  # nine more of these would be 180 s, 80 are left
    guard.advance(1)
    clock[0] += 5
    guard.advance(1)
    clock[0] += 5
    guard.advance(1)  # 30 s for three parts, 70 s for seven: just enough
    late = started(clock, budget=100, total=10)
    clock[0] += 20
    late.advance(1)
    clock[0] += 6
    late.advance(1)
    clock[0] += 6
    with pytest.raises(CouldNotTell, match="take 75 seconds more, and 68 seconds of the time"):
        late.advance(1)


def test_the_end_of_the_budget_ends_the_work(clock: list[float]) -> None:
    guard = started(clock, budget=10, total=100)
    for _ in range(4):
        clock[0] += 0.05
        guard.advance(1)
    clock[0] += 20
    with pytest.raises(CouldNotTell, match="and 0 seconds of the time budget are left"):
        guard.advance(1)
    with pytest.raises(CouldNotTell, match="ended before counting"):
        TimeGuard(Deadline(0.0, started=clock[0]), 1, work="counting")


def test_work_that_is_done_is_not_taken_back(clock: list[float]) -> None:
    guard = started(clock, budget=10, total=4)
    assert parts_done(clock, guard, *[(2.4, 1)] * 3, (60, 1)) == 4


def test_unequal_parts_are_weighed(clock: list[float]) -> None:
    guard = started(clock, budget=100, total=100)
    # 9 s for 95 of 100
    assert parts_done(clock, guard, (3, 50), (3, 25), (3, 20)) == 3


def test_no_work_at_all(clock: list[float]) -> None:
    assert parts_done(clock, started(clock, budget=1, total=0), (0, 0)) == 1
