"""Two reports held against each other: no field of one can be forged without being noticed."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from doorward import bundled, reports
from doorward.core.errors import InputError
from doorward.core.records import Report
from doorward.models import LoadOptions
from doorward.scan.comparison import compare
from doorward.scan.pipeline import scan
from doorward.scan.request import ScanRequest
from doorward.scan.rerun import verify
from report_examples import EXAMPLES, backdoored, png

Path_ = tuple[str | int, ...]
#: What a second run does not repeat, or what is told only where something else differs.
NOT_COMPARED = ("seconds", "cost", "environment", "request", "schema_version")


#: So many entries, from all over it, are tried of a longer table: they are all of one kind.
ENTRIES = 50


def leaves(value: Any, place: Path_ = ()) -> Iterator[Path_]:
    """Yield the place of each value that holds no others."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not inner:
        yield place
    for key, one in list(inner)[:: max(1, len(value) // ENTRIES)] if inner else ():
        yield from leaves(one, (*place, key))


def compared(place: Path_) -> bool:
    finding = place[0] in ("findings", "positive_control") and "settings" not in place
    return not (place[0] in NOT_COMPARED or (finding and {"seconds", "cost"} & set(place)))


def other(value: Any) -> Any:
    """Return another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value * 2 + 1
    if isinstance(value, float):
        return value * 2 + 0.37 if not 0 <= value <= 1 else value + (0.4 if value < 0.5 else -0.4)
    if isinstance(value, str):
        return f"{value[: len(value) // 2]}\x1b[2Jforged{value[len(value) // 2 :]}"
    return "forged"


def changed(form: dict[str, Any], place: Path_) -> dict[str, Any]:
    form = json.loads(json.dumps(form))
    inside: Any = form
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = other(inside[place[-1]])
    return form


def valid(form: dict[str, Any]) -> Report | None:
    """Return the report that a form makes, or None: what no report can hold needs no comparison."""
    try:
        return Report.model_validate_json(json.dumps(form))
    except ValueError:
        return None


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_field_that_is_forged_is_noticed(name: str) -> None:
    new = EXAMPLES[name]()
    assert compare(new, new) == []
    form = new.model_dump(mode="json")
    tried = 0
    for place in leaves(form):
        if not place or not compared(place):
            continue
        old = valid(changed(form, place))
        if old is None or old == new:
            continue
        tried += 1
        lines = compare(old, new)
        if place[-1] == "path":
            continue  # told where it is not what the request asked for; see below
        assert lines, place
        assert not any("\x1b" in line for line in lines), place
    assert tried >= 5


def test_entries_that_were_added_or_taken_away_are_noticed() -> None:
    new = backdoored()
    for field in ("findings", "data", "confirmations"):
        entries = getattr(new, field)
        assert entries, field
        fewer = new.model_copy(update={field: entries[:-1]})
        more = new.model_copy(update={field: (*entries, entries[-1])})
        assert compare(fewer, new), field
        assert compare(more, new), field


def test_numbers_agree_to_a_tolerance() -> None:
    new = backdoored()
    finding = new.findings[-1]
    assert finding.score is not None

    def with_score(score: float, summary: str = finding.summary) -> Report:
        one = finding.model_copy(update={"score": score, "summary": summary})
        return new.model_copy(update={"findings": (*new.findings[:-1], one)})

    assert compare(with_score(finding.score * 1.0001), new) == []
    (line,) = compare(with_score(finding.score * 1.01), new)
    assert line.startswith(f"{finding.detector} score: was ")
    one, two = (
        with_score(1.0, f"A patch moves {share} % of 80 images to class 3") for share in ("71.2", "71.3")
    )
    assert compare(one, two) == []
    assert compare(with_score(1.0, "A patch moves 71.2 % of 81 images to class 3"), two)


def test_a_small_p_value_is_compared_by_its_own_size() -> None:
    new = backdoored()
    (line,) = compare(new.model_copy(update={"p_value": 0.0044}), new.model_copy(update={"p_value": 0.0049}))
    assert line.startswith("p_value: was 0.0044, is 0.0049")


def test_pictures_may_differ_a_little() -> None:
    import numpy as np

    pixels = np.full((8, 8, 3), 100, dtype=np.uint8)
    new = backdoored()
    place = next(i for i, f in enumerate(new.findings) if any(e.type == "picture" for e in f.evidence))

    def with_picture(data: str) -> Report:
        evidence = tuple(
            e.model_copy(update={"png": data}) if e.type == "picture" else e
            for e in new.findings[place].evidence
        )
        findings = list(new.findings)
        findings[place] = findings[place].model_copy(update={"evidence": evidence})
        return new.model_copy(update={"findings": tuple(findings)})

    same = with_picture(png(pixels))
    assert compare(with_picture(png(pixels + 1)), same) == []
    for forged in (
        png(pixels + 90),
        png(pixels[:4]),
        "not base64!",
        base64.b64encode(b"no picture").decode(),
    ):
        lines = compare(with_picture(forged), same)
        assert lines
        assert all(line.endswith("it is another one") for line in lines)


def test_a_report_that_names_other_files_than_its_request_is_noticed() -> None:
    new = backdoored()
    request = {"model": new.subject.path if new.subject else "", "clean": new.data[0].path}
    new = new.model_copy(update={"request": request})
    assert compare(new, new) == []
    assert new.subject is not None
    forged = new.model_copy(update={"subject": new.subject.model_copy(update={"path": "other\x1b[31m.onnx"})})
    (line,) = compare(forged, new)
    assert line.startswith(r"model path: the report says other\x1b[31m.onnx, and its scan was of ")
    forged = new.model_copy(update={"data": (new.data[0].model_copy(update={"path": "other"}),)})
    (line,) = compare(forged, new)
    assert line.startswith("clean path: the report says other")


def test_many_differences_are_cut() -> None:
    new = backdoored()
    forged = new.model_copy(update={"warnings": tuple("x" for _ in range(500))})
    other_one = new.model_copy(update={"warnings": tuple("y" for _ in range(500))})
    lines = compare(forged, other_one)
    assert len(lines) == 101
    assert lines[-1] == "and in 400 more places"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the reports of a quick scan."""
    path = tmp_path_factory.mktemp("reports")
    request = ScanRequest(
        model=str(bundled.model("clean")),
        clean=f"{bundled.FOLDER / 'fashion_mnist'}:test",
        images=60,
        detectors=("unsafe-code", "max-margin"),
        options=LoadOptions(),
    )
    reports.write_reports(scan(request), path)
    return path


def test_a_second_run_agrees_and_a_forged_report_does_not(folder: Path, tmp_path: Path) -> None:
    assert verify(folder) == []
    form = json.loads((folder / "report.json").read_text())
    form["findings"][-1]["summary"] = "All is \x1b[2Jwell"
    form["findings"][-1]["p_value"] = 0.9
    form["data"][0]["rows"] = 7
    form["warnings"] = []
    (tmp_path / "report.json").write_text(json.dumps(form))
    lines = verify(tmp_path)
    assert not any("\x1b" in line for line in lines)
    told = "\n".join(lines)
    for what in ("max-margin summary", "max-margin p_value", "clean data rows: was 7"):
        assert what in told


def test_a_report_that_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "report.json")
    with pytest.raises(InputError, match="cannot be read: it is a pipe"):
        verify(tmp_path)
