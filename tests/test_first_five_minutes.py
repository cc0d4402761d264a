"""The page of the first five minutes says what was measured, and its commands are those of the script."""

from __future__ import annotations

import json
import shlex

import pytest

import first_five_minutes as script
from documents import ROOT
from doorward.methods import registry


def measured() -> dict[str, object]:
    """Return a measurement of all steps, with made-up numbers."""
    steps = [
        {
            "command": step.command,
            "exit_code": step.ends[0],
            "seconds": 2.0,
            "cpu_seconds": 1.0,
            "output": "\n".join(f"line {i}" for i in range(30)),
        }
        for part in script.PARTS
        for step in part.steps
    ]
    return {"steps": steps, "load": 0.5, "made": {"processors": 2}}


def test_the_page_is_what_was_measured_last() -> None:
    assert script.PAGE.read_text(encoding="utf-8") == script.page(script.results())


def test_the_page_shows_commands_seconds_and_the_beginning_of_what_is_printed() -> None:
    text = script.page(measured())
    for part in script.PARTS:
        assert f"## {part.title}" in text
        for step in part.steps:
            assert f"$ {step.command.splitlines()[0]}" in text
    assert "Exit code 1; 1.0 s of processor time, 2.0 s by the clock." in text
    assert "line 13\n...\n```" in text
    assert "line 14" not in text
    assert f"took {sum(len(part.steps) for part in script.PARTS)} s of one processor" in text


def test_the_page_says_what_was_found_of_the_poison() -> None:
    text = script.page(measured() | {"poison": {"planted": 100, "flagged": 120, "right": 60}})
    assert "Of the 100 samples that were planted, 60 are among the 120 flagged ones" in text
    assert "the written set is not clean" in text


def test_without_a_measurement_the_page_says_so() -> None:
    text = script.page(None)
    assert "Nothing is measured yet" in text
    assert "Exit code" not in text


def test_the_commands_name_what_there_is() -> None:
    steps = [step for part in script.PARTS for step in part.steps]
    words = [shlex.split(step.command.splitlines()[0]) for step in steps]
    planted = [one[2] for one in words if one[:2] == ["doorward", "plant"]]
    assert planted
    assert set(planted) <= set(registry.own_modules("attack"))
    assert {one[1] for one in words if one[0] == "doorward"} == {"demo", "scan", "repair", "plant"}


@pytest.mark.parametrize(
    ("right", "after", "said"),
    [(100, "nothing_found", None), (80, "nothing_found", "too little"), (100, "suspicious", "not mended")],
)
def test_what_is_missed_ends_a_check(right: int, after: str, said: str | None) -> None:
    poison = {"planted": 100, "flagged": 100, "right": right}
    repair = json.dumps({"before": "backdoored", "after": after})
    if said is None:
        script.refuse_missed(poison, repair)
    else:
        with pytest.raises(SystemExit, match=said):
            script.refuse_missed(poison, repair)


def test_ci_runs_the_commands() -> None:
    assert "first_five_minutes.py --check" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
