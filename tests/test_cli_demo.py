"""The README's commands run as written; its demo shows both verdicts, mends a model, and leaves all of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from command_line import Outcome, call
from documents import RESCANS, run_readme
from doorward.bench import demo
from doorward.core.records import Report
from doorward.reports import from_json

pytestmark = pytest.mark.trains


@pytest.fixture(scope="module")
def shown(shared_folder: Path) -> tuple[Path, Outcome]:
    run = run_readme(shared_folder)
    return run.folder, run.outcomes["doorward demo --fast"]


def test_both_verdicts_are_right(shown: tuple[Path, Outcome]) -> None:
    folder, outcome = shown
    assert outcome.code == 0, outcome
    assert outcome.err == ""
    assert "=== Both verdicts are right ===" in outcome.out.splitlines()
    assert "=== The backdoor is gone ===" in outcome.out.splitlines()
    backdoored, clean = (
        from_json((folder / f"doorward-demo/report-{name}/report.json").read_text(encoding="utf-8"))
        for name in ("backdoored", "clean")
    )
    assert (backdoored.verdict, backdoored.targets) == ("backdoored", (0,))
    assert (clean.verdict, clean.targets) == ("nothing_found", ())


def test_it_says_what_is_true_what_was_found_and_where_it_is(shown: tuple[Path, Outcome]) -> None:
    folder, outcome = shown
    lines = outcome.out.splitlines()
    planted, twin = (lines.index(f"=== The {name} model ===") for name in ("backdoored", "clean"))
    assert planted < twin
    assert any(line.startswith("The truth: accuracy ") for line in lines[planted:twin])
    assert any(line.startswith("BACKDOORED") for line in lines[planted:twin])
    assert any(line.startswith("NOTHING FOUND") for line in lines[twin:])
    pages = [line.rpartition(": ")[2] for line in lines if line.startswith("report on the ")]
    place = folder.resolve() / "doorward-demo"
    assert pages == [str(place / f"report-{name}/report.html") for name in ("backdoored", "clean")]
    assert all(Path(page).is_file() for page in pages)


def test_it_ends_with_the_model_mended(shown: tuple[Path, Outcome]) -> None:
    folder, outcome = shown
    told = json.loads((folder / "doorward-demo/mended/repair.json").read_text(encoding="utf-8"))
    assert (told["before"], told["after"]) == ("backdoored", "nothing_found")
    assert told["accuracy_after"]["value"] >= told["accuracy_before"]["value"] - 0.05
    lines = outcome.out.splitlines()
    mended = lines[lines.index("=== The backdoored model, mended ===") :]
    assert any(line.startswith("success of the trigger for class 0 ") for line in mended)
    assert any(line.startswith("The truth: the planted trigger works on ") for line in mended)
    place = folder.resolve() / "doorward-demo/mended"
    assert f"mended model: {place}" in mended


def test_all_that_recovered_the_trigger_scan_the_mended_model(shown: tuple[Path, Outcome]) -> None:
    report = from_json((shown[0] / "doorward-demo/report-backdoored/report.json").read_text(encoding="utf-8"))
    named = {finding.detector for finding in report.findings if finding.flagged}
    assert RESCANS in named
    assert len(named) >= 4
    assert {one.method() for one in demo._alarming(report)} == named


def test_its_models_can_be_scanned_like_anybodys(shown: tuple[Path, Outcome]) -> None:
    folder = shown[0] / "doorward-demo"
    words = ("clean", "--clean", "images", "--images", 20, "--detector", "max-margin")
    assert call("scan", *words, folder=folder).code == 0


def test_a_wrong_verdict_ends_with_4(
    shown: tuple[Path, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = from_json((shown[0] / "doorward-demo/report-clean/report.json").read_text(encoding="utf-8"))
    seeds = []

    def scan_twin(*_: Any, seed: int, **__: Any) -> Report:
        seeds.append(seed)
        return report

    monkeypatch.setattr("doorward.bench.demo.scan_twin", scan_twin)
    outcome = call("demo", "--fast", "--seed", 3, "--out", tmp_path / "new")
    assert outcome.code == 4
    assert seeds == [3, 3]
    assert "=== A verdict is not as expected ===" in outcome.out


def test_the_page_is_opened_when_asked(
    shown: tuple[Path, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = from_json((shown[0] / "doorward-demo/report-backdoored/report.json").read_text(encoding="utf-8"))
    opened: list[str] = []
    monkeypatch.setattr("doorward.bench.demo.scan_twin", lambda *_, **__: report)
    monkeypatch.setattr("typer.launch", opened.append)
    call("demo", "--fast", "--open", "--out", "new", folder=tmp_path)
    assert opened == [(tmp_path / "new/report-backdoored/report.html").resolve().as_uri()]
