"""Load on a guard's server and what STRIP costs: what is a failure, and that what is committed is whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

import guard_load
import measuring
import strip_forwards

Results = dict[str, Any]


def committed() -> Results:
    results: Results = json.loads((measuring.RESULTS / "guard-load.json").read_text(encoding="utf-8"))
    return results


def test_the_committed_costs_of_strip_are_whole() -> None:
    results = json.loads((measuring.RESULTS / "strip-forwards.json").read_text(encoding="utf-8"))
    assert strip_forwards.table(results) == (measuring.RESULTS / "strip-forwards.md").read_text("utf-8")
    assert list(strip_forwards.failures(results)) == []
    assert "with changes" not in results["revision"]
    rows = results["exits"]
    rows["certain"]["clean rejected"] += 1
    rows["calibrated"] |= {"forwards": 5.1, "triggered rejected": rows["off"]["triggered rejected"] // 2}
    told = list(strip_forwards.failures(results))
    assert len(told) == 3
    assert told[0].startswith("certain: decides otherwise")


def test_the_committed_table_is_that_of_the_committed_results() -> None:
    results = committed()
    assert guard_load.table(results) == (measuring.RESULTS / "guard-load.md").read_text(encoding="utf-8")
    assert list(guard_load.failures(results)) == []
    assert "with changes" not in results["revision"]
    assert set(results["servers"]) == {"guarded", "bare"}


def change(key: str, value: Any) -> Callable[[Results], None]:
    def changed(results: Results) -> None:
        results["servers"]["guarded"][key] = value

    return changed


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (change("lost", 1), "guarded: 1 lost"),
        (change("answered twice", 2), "guarded: 2 answered twice"),
        (change("of another", 3), "guarded: 3 of another"),
        (change("odd", {"good: 503": 4}), "guarded: good: 503, 4 times"),
        (change("counted by the server", 5), "and the server counts 5"),
        (change("memory at end", 10**12), "its memory grows"),
        (change("ended with", 0), "told to stop, it ended with 0"),
    ],
)
def test_each_fault_is_told(break_it: Callable[[Results], None], words: str) -> None:
    results = committed()
    break_it(results)
    (told,) = guard_load.failures(results)
    assert words in told


def test_what_the_clients_saw_is_summed() -> None:
    one: Results = {
        "sent": {"good": 3, "not JSON": 1},
        "odd": {},
        "answered": 2,
        "answered twice": 0,
        "of another": 0,
        "milliseconds": [1.0, 9.0],
    }
    other = one | {
        "odd": {"good: 503": 1},
        "answered": 3,
        "answered twice": 1,
        "milliseconds": [2.0, 3.0, 4.0],
    }
    found = guard_load.summed({"seconds": 2.0, "clients": [one, other]}, 8, (100, 101))
    assert (found["requests"], found["lost"], found["answered twice"]) == (8, 1, 1)
    assert (found["by kind"], found["odd"]) == ({"good": 6, "not JSON": 2}, {"good: 503": 1})
    assert (found["requests a second"], found["p50 ms"], found["p99 ms"]) == (4.0, 3.0, 9.0)
