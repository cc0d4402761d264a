"""The bench on models that are there already, and on a suite in a file of one's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from command_line import BACKDOORED, CLEAN, CLOTHES, QUICK, assert_one_line, call
from doorward.bench import own_models, summary, tables
from doorward.bench.own_models import read_labels
from doorward.core.errors import InputError
from doorward.core.records import Report
from doorward.scan.pipeline import Scanned
from doorward.scan.request import ScanRequest
from report_examples import backdoored, could_not_tell, nothing_found, suspicious

HEAD = "path,planted,target\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of a backdoored and a clean model."""
    models = tmp_path / "models"
    shutil.copytree(BACKDOORED, models / "a")
    shutil.copytree(CLEAN, models / "b")
    return models


def labels(folder: Path, text: str) -> Path:
    file = folder.parent / "truth.csv"
    file.write_text(text, encoding="utf-8")
    return file


def test_models_are_scanned_counted_and_kept(folder: Path, tmp_path: Path) -> None:
    file = labels(folder, HEAD + "a,yes,0\nb,no,\n")
    words = ("bench", "models", folder, "--labels", file, "--clean", CLOTHES, "--images", 40, *QUICK)
    first = call(*words, "--out", tmp_path / "kept")
    assert first.code == 0, first
    assert "2 models: 2 done." in first.out
    assert "| detector | models | planted flagged | clean flagged | AUROC of its score |" in first.out
    assert "| max-margin | 2 |" in first.out
    assert first.err.splitlines()[0] == "a (1 of 2): scanning"
    reports = sorted((tmp_path / "kept").iterdir())
    assert len(reports) == 2
    changed = json.loads(reports[0].read_text()) | {"seconds": 4321.0}
    reports[0].write_text(json.dumps(changed))
    second = call(*words, "--out", tmp_path / "kept")
    assert "72 min 1 s" in second.err, "what is kept is not scanned again"


def measured(
    monkeypatch: pytest.MonkeyPatch, folder: Path, text: str, reports: dict[str, Report | Exception]
) -> summary.Summary:
    """Return the summary of models of which scans give these reports."""

    def scan(request: ScanRequest) -> Scanned:
        found = reports[Path(str(request.model)).name]
        if isinstance(found, Exception):
            raise found
        return Scanned(found)

    for name in reports:
        (folder / name).mkdir(exist_ok=True)
    monkeypatch.setattr(own_models, "scan_in_full", scan)
    models = read_labels(labels(folder, text), folder, ScanRequest())
    held = own_models.measure(models, folder)
    return summary.summarise(own_models.suite_of(models, folder), held)


def test_they_are_counted_as_those_of_a_suite(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    reports = {"p": backdoored(), "q": suspicious(), "r": nothing_found(), "s": could_not_tell()}
    text = HEAD + "p,yes,3\nq,1,14;30\nr,no,\ns,clean,\n"
    found = measured(monkeypatch, folder, text, reports)
    (row,) = found.groups
    assert (row.exact_target.successes, row.exact_target.n) == (1, 2), "14 and 33 are not 14 and 30"
    assert (row.flagged.successes, row.flagged.n) == (2, 2)
    assert (row.false_alarms.successes, row.false_alarms.n) == (0, 2)
    assert row.clean_unknown.successes == 1
    assert row.by_detector["neural-cleanse"].auroc == 1.0
    text = tables.to_markdown(found)
    assert "4 models: 4 done." in text
    assert "scale" not in text


def test_groups_are_counted_apart(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    text = "path,planted,target,group\np,yes,3,patch\nq,yes,14,blend\nr,no,,\n"
    reports = {"p": backdoored(), "q": nothing_found(), "r": nothing_found()}
    rows = {row.group: row for row in measured(monkeypatch, folder, text, reports).groups}
    assert {name: row.flagged.successes for name, row in rows.items()} == {"patch": 1, "blend": 0}
    assert all(row.false_alarms.n == 1 for row in rows.values()), "the clean ones stand next to every group"


def test_a_model_that_cannot_be_scanned_is_told_and_the_rest_is_counted(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    reports = {"p": backdoored(), "q": InputError("it is a picture")}
    found = measured(monkeypatch, folder, HEAD + "p,yes,3\nq,no,\n", reports)
    assert found.trials == {"done": 1, "failed": 1}
    other = measured(monkeypatch, folder, HEAD + "p,yes,99\n", {"p": backdoored()})
    assert other.trials == {"done": 0, "failed": 1}, "it has no class 99"
    nothing = measured(monkeypatch, folder, HEAD + "q,no,\n", {"q": InputError("it is a picture")})
    assert "No model could be scanned." in tables.to_markdown(nothing)


def test_a_row_says_how_its_model_is_scanned(folder: Path) -> None:
    text = 'path,planted,target,mean,seed\na,yes,3,"0.5,0.5",7\nb,no,,,\n'
    one, other = read_labels(labels(folder, text), folder, ScanRequest(seed=1))
    assert (one.place.request.options.mean, one.place.request.seed) == ((0.5, 0.5), 7)
    assert (other.place.request.seed, other.targets) == (1, None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (HEAD, "has no rows"),
        ("model,planted\na,yes\n", "has no column 'path'"),
        (HEAD + "a,maybe,3\n", "row 2: the column 'planted' takes yes or no, got 'maybe'"),
        ("path,target\na,3\n", "row 2: the column 'planted' takes yes or no, got None"),
        (HEAD + "a,yes,\n", "row 2: a planted model needs its target"),
        (HEAD + "a,yes,Dress\n", "takes class numbers, as in 3 or 3;5, got 'Dress'"),
        (HEAD + "a,yes,-2\n", "takes class numbers"),
        (HEAD + "a,no,3\n", "row 2: a clean model has no target"),
        (HEAD + "c,no,\n", "c is not there; paths count from"),
        (HEAD + "a,yes,3\na,yes,3\n", "row 3: a is named twice"),
        ("path,planted,target,group\na,yes,3,x\nb,no,,x\n", "group 'x' has clean and planted models"),
        ("path,planted,target,means\na,yes,3,1\n", "there is no option 'means'"),
        ("path,planted,target,seed\na,yes,3,many\n", "row 2: seed: "),
    ],
)
def test_a_table_that_cannot_be_understood_says_where(folder: Path, text: str, said: str) -> None:
    outcome = call("bench", "models", folder, "--labels", labels(folder, text))
    assert_one_line(outcome, said)


def test_models_that_no_row_names_are_told(folder: Path) -> None:
    models = read_labels(labels(folder, HEAD + "a,yes,0\n"), folder, ScanRequest())
    assert [Path(one).name for one in own_models.unlabelled(folder, models)] == ["b"]


def test_a_folder_and_a_table_that_are_not_there_are_told(folder: Path, tmp_path: Path) -> None:
    file = labels(folder, HEAD)
    assert_one_line(call("bench", "models", tmp_path / "none", "--labels", file), "none is no folder")
    assert_one_line(call("bench", "models", folder, "--labels", tmp_path / "x.csv"), "there is no such file")
    clean = ("--clean", "./nowhere")
    assert_one_line(call("bench", "models", folder, "--labels", file, *clean), "nowhere")


SUITE = """
from doorward.bench.suite import Data, Group, MethodChoice, ScanSettings, Suite

SUITE = Suite(
    name="mine",
    title="Mine",
    about="A patch on clothes.",
    scales={"smoke": (Group(name="clean", data=Data(name="reference:fashion_mnist", rows=400), models=2),)},
    scan_settings=ScanSettings(detectors=(MethodChoice(name="max-margin"),), images=40),
)
"""


def test_a_suite_of_ones_own_is_planned_and_shown_by_its_file(tmp_path: Path) -> None:
    (tmp_path / "my_suite.py").write_text(SUITE)
    cache = ("--cache", tmp_path / "cache")
    outcome = call("bench", "run", "my_suite.py", *cache, "--dry-run", folder=tmp_path)
    assert outcome.out.startswith("2 trials, 0 done already, 2 to do"), outcome
    outcome = call("bench", "show", "my_suite.py", *cache, folder=tmp_path)
    assert "**Mine.** A patch on clothes." in outcome.out, outcome


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "is no file; a suite of your own is a file of Python with one SUITE"),
        ("1 / 0\n", "cannot be run: ZeroDivisionError: division by zero"),
        (SUITE.split("scales=")[0] + "scales={'smoke': ()})", "the suite has no trials at this scale"),
        ("SUITE = 3\n", "makes no SUITE = Suite(...)"),
        (SUITE.replace('"mine"', '"null"'), "the name 'null' is that of a suite of Doorward's"),
        ("import sys\nsys.exit(1)\n", "cannot be run: SystemExit: 1"),
        (SUITE.replace("models=2", "models=-1"), "Group does not fit: models: "),
    ],
)
def test_a_file_that_makes_no_suite_says_why(text: str | None, said: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "my_suite.py").write_text(text)
    assert_one_line(call("bench", "run", "my_suite.py", folder=tmp_path), said)
